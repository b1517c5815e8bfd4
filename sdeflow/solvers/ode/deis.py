r"""DEIS and LMS: the last predictions of eps, interpolated by a polynomial, integrated over a step.

With the scaled state $z = x/s$ the probability-flow ODE is $dz = \varepsilon\,d\rho$, where
$\rho = \sigma/s$ is the noise-to-signal ratio (`nsr`). A step replaces $\varepsilon$ by the
polynomial through its last `p` values:

$$x_+ = \frac{s_+}{s}\,x + \sum_{j<p} b_j\,\varepsilon_j, \qquad b_j = s_+ \int_\rho^{\rho_+} \ell_j\,d\rho .$$

The methods of this module differ in the variable of the polynomial alone; LMS is the one in $\rho$
with `p = 4`. All of them are members of the family of `sdeflow.solvers.ode.adams` (frame eps,
started by orders 1, 2, ...), under the names by which they are known.

**The ends.** From and to a level without signal ($s = 0$) a step is DDIM's. There $\rho$ is
infinite: polynomials in it, or in its logarithm, leave that level out. The step to zero noise is
the prediction.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sdeflow._utils.math import Scalar
from sdeflow.errors import unknown
from sdeflow.process import Level, Process
from sdeflow.reverse import Reverse, eps_of
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.runge_kutta import RK4, Heun, Midpoint, RungeKutta
from sdeflow.solvers.ode.tableaus import Tableau
from sdeflow.solvers.ode.weights import adams, has_signal

Variable = Literal["t", "rho", "logrho"]
"""What a polynomial of DEIS is in: the process's time, `rho = nsr`, or its logarithm."""

_CLOCKS = {"t": "t", "rho": "nsr", "logrho": "lam"}


@dataclass(frozen=True)
class EpsMultistep(GridSolver):
    r"""A step that weighs the last `p` predictions of eps:
    `x_next = (s_next / s) x + sum_j b_j eps_j`.

    Subclasses give the weights.
    """

    p: int = 4

    most: ClassVar[int] = 4

    def __post_init__(self) -> None:
        if isinstance(self.p, bool) or not isinstance(self.p, int) or not 1 <= self.p <= self.most:
            raise ValueError(
                f"{type(self).__name__} weighs p = 1 to {self.most} predictions; got p={self.p!r}"
            )

    @property
    def order(self) -> int:  # type: ignore[override]
        """Order of convergence: the first step, of order 1, bounds it by 2."""
        return min(self.p, 2)

    @abstractmethod
    def weights(self, nodes: Sequence[Level], t_next: Level, process: Process) -> Sequence[Scalar]:
        """`b_j` of the step from `nodes[0]` to `t_next`, for each of `nodes`, newest first."""

    def usable(self, t: Level) -> bool:
        """Whether the prediction at a level can be weighed."""
        return True

    def start(self, steps: int) -> Any:
        return ()  # (level, eps) of the last calls, newest first

    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        x0 = reverse(x, t)
        history = ((t, eps_of(x, x0, t)), *state)[: self.p]
        if not has_signal(t, t_next):
            return t_next.s * x0 + t_next.sigma * history[0][1], history
        nodes = [node for node in history if self.usable(node[0])]
        x_next = (t_next.s / t.s) * x
        for weight, (_, eps) in zip(
            self.weights([level for level, _ in nodes], t_next, reverse.process), nodes, strict=True
        ):
            x_next = x_next + weight * eps
        return x_next, history


@dataclass(frozen=True)
class DEIS(EpsMultistep):
    r"""DEIS, multistep: `x_next = (s_next / s) x + sum_j b_j eps_j`, eps a polynomial through its
    last `p` values.

    - `p`: values that are interpolated, 1 to 4. The paper counts the polynomial's degree: its tAB2
      is `p=3`.
    - `variable`: what the polynomial is in. `"t"`, the process's time, is the paper's tAB; `"rho"`
      (`sigma / s`) its rhoAB, on EDM the same; `"logrho"` is what diffusers has as DEIS (there
      `p=2`, and `p=3` on request).

    The weights are exact for every variable. It starts with orders 1, 2, ..., `p`; for another
    start, lower orders at the end or a corrector see `ExponentialAdams(p, "eps", clock)`.

    Cost: 1 call a step. Order: 2 (1 with `p=1`, which is DDIM): the start bounds it. Source: Zhang
    & Chen, "Fast sampling of diffusion models with exponential integrator" (2022), sections 3 and
    4.
    """

    p: int = 3
    variable: Variable = "t"

    source: ClassVar[str] = "Zhang & Chen 2022"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variable not in _CLOCKS:
            raise unknown("variable", self.variable, tuple(_CLOCKS))

    def weights(self, nodes: Sequence[Level], t_next: Level, process: Process) -> Sequence[Scalar]:
        return adams("eps", _CLOCKS[self.variable], nodes, nodes[0], t_next, process)[1]

    def usable(self, t: Level) -> bool:
        return self.variable == "t" or has_signal(t)


@dataclass(frozen=True)
class LMS(EpsMultistep):
    r"""The linear multistep method in nsr: `x_next = (s_next / s) x + sum_j b_j eps_j`, eps a
    polynomial in nsr.

    Adams-Bashforth on `d(x/s) = eps dnsr` with the weights of the actual steps; `DEIS(p, "rho")` is
    the same method. k-diffusion's `sample_lms` takes `p=4`, and its step to zero noise extrapolates
    too, where this one returns the prediction.

    - `p`: values that are interpolated, 1 to 6.

    Cost: 1 call a step. Order: 2 (1 with `p=1`, which is DDIM): the first step, of order 1, bounds
    it. Source: Bashforth & Adams (1883); Crowson, k-diffusion (2022), `sample_lms`.
    """

    p: int = 4

    most: ClassVar[int] = 6
    source: ClassVar[str] = "Bashforth & Adams 1883; Crowson 2022"

    def weights(self, nodes: Sequence[Level], t_next: Level, process: Process) -> Sequence[Scalar]:
        return adams("eps", "nsr", nodes, nodes[0], t_next, process)[1]

    def usable(self, t: Level) -> bool:
        return has_signal(t)


@dataclass(frozen=True)
class _Kutta3(RungeKutta):
    """Kutta's third-order method."""

    order: ClassVar[int] = 3
    tableau: ClassVar[Tableau] = Tableau(
        (0.0, 0.5, 1.0), ((), (0.5,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6), 3
    )
    source: ClassVar[str] = "Kutta 1901"


_METHODS: dict[str, type[RungeKutta]] = {
    "midpoint": Midpoint,
    "heun": Heun,
    "kutta3": _Kutta3,
    "rk4": RK4,
}


@dataclass(frozen=True)
class DEISRungeKutta(GridSolver):
    r"""DEIS, single-step (rhoRK): a Runge-Kutta method on `d(x/s) = eps dnsr`.

    - `method`: `"midpoint"`, `"heun"`, `"kutta3"` or `"rk4"`. `"heun"` is EDM's deterministic
      sampler, `Heun(clock="nsr")`.

    From and to a level without signal, where nsr is infinite, the same method steps in the
    process's own time.

    Cost: 2, 2, 3 or 4 calls a step. Order: 2, 2, 3, 4. Source: Zhang & Chen, "DEIS" (2022), section
    4.
    """

    method: Literal["midpoint", "heun", "kutta3", "rk4"] = "kutta3"

    source: ClassVar[str] = "Zhang & Chen 2022"

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise unknown("method", self.method, tuple(_METHODS))

    @property
    def order(self) -> int:  # type: ignore[override]
        """Order of convergence."""
        return _METHODS[self.method].tableau.order

    @property
    def cost(self) -> str:  # type: ignore[override]
        """Network calls a step, in words."""
        return f"{self.calls_of_step} a step"

    @property
    def calls_of_step(self) -> int:
        return _METHODS[self.method].tableau.stages

    def extra_times(self, process: Process, times: Tensor) -> Tensor | None:
        # Where no signal is left at one end only: the step there is taken in t.
        finite = torch.isfinite(process.nsr(times))
        kind = _METHODS[self.method]
        stages = [kind("nsr").extra_times(process, times[finite])]
        if not bool(finite.all()):
            first = times[:2] if not bool(finite[0]) else times[-2:]
            stages.append(kind("t").extra_times(process, first))
        found = [times.reshape(-1) for times in stages if times is not None]
        return torch.cat(found) if found else None

    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        method = _METHODS[self.method]("nsr" if has_signal(t, t_next) else "t")
        return method.step(reverse, x, t, t_next, noise, state)
