r"""DEIS and LMS: the last predictions of eps, interpolated by a polynomial and integrated over a
step.

With the scaled state $z = x/s$ the probability-flow ODE is $dz = \varepsilon\,d\rho$, where
$\rho = \sigma/s$ is the noise-to-signal ratio (`nsr`). A step replaces $\varepsilon$ by the
polynomial through its last `p` values:

$$x_+ = \frac{s_+}{s}\,x + \sum_{j<p} b_j\,\varepsilon_j,
\qquad b_j = s_+ \int_\rho^{\rho_+} \ell_j\,d\rho .$$

The methods differ only in the variable of the polynomial, their clock. LMS is the method in $\rho$
with `p = 4`. All belong to the family of `sdeflow.solvers.ode.adams` (`predicts="eps"`, started by
orders 1, 2, ...), under the names by which they are known.

**The ends.** From and to a level without signal ($s = 0$) a step is DDIM's. There $\rho$ is
infinite, and polynomials in it or in its logarithm leave that level out. The step to zero noise is
the prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from sdeflow._utils.renamed import renamed
from sdeflow.process import Level, Process
from sdeflow.reverse import Reverse
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.multistep import Multistep, Weights, check_p
from sdeflow.solvers.ode.runge_kutta import RK4, Heun, Midpoint, RungeKutta
from sdeflow.solvers.ode.tableaus import Tableau
from sdeflow.solvers.ode.to_zero import ToZero
from sdeflow.solvers.ode.weights import adams, has_signal

DEISClock = Literal["t", "nsr", "lam"]
"""The variable of a polynomial of DEIS: the process's time, `nsr` (the paper's rho), or `lam`
(minus its logarithm).
"""


@dataclass(frozen=True)
class EpsMultistep(Multistep):
    r"""A step that weighs the last `p` predictions of eps:
    `x_next = (s_next / s) x + sum_j b_j eps_j`.

    The weights are those of the polynomial in the method's clock; subclasses may have others.
    `to_zero` is the step to zero noise, see `sdeflow.solvers.ode.to_zero`.
    """

    p: int = 4
    to_zero: ToZero = field(default="prediction", kw_only=True)

    predicts = "eps"
    most: ClassVar[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_p(self.p, self.most, type(self).__name__)

    def weights(self, nodes: Sequence[Level], t: Level, t_next: Level, process: Process) -> Weights:
        return adams("eps", self.clock, nodes, t, t_next, process)[1]


@renamed({"variable": "clock"}, {"clock": {"rho": "nsr", "logrho": "lam"}})
@dataclass(frozen=True)
class DEIS(EpsMultistep):
    r"""DEIS, multistep: `x_next = (s_next / s) x + sum_j b_j eps_j`, eps a polynomial through its
    last `p` values.

    - `p`: values that are interpolated, 1 to 4. The paper counts the polynomial's degree: its tAB2
      is `p=3`.
    - `clock`: the variable of the polynomial. `"t"`, the process's time, is the paper's tAB.
      `"nsr"`, the paper's rho, is its rhoAB; on EDM the two are the same. `"lam"`, minus the
      logarithm of nsr, is what diffusers has as DEIS (there `p=2`, and `p=3` on request).

    The weights are exact for every clock. It starts with orders 1, 2, ..., `p`. For another start,
    lower orders at the end or a corrector see `ExponentialAdams(p, "eps", clock)`.

    Cost: 1 call a step. Order: 2 (1 with `p=1`, which is DDIM): the start bounds it. Source: Zhang
    & Chen, "Fast sampling of diffusion models with exponential integrator" (2022), sections 3 and
    4.
    """

    p: int = 3
    clock: DEISClock = "t"

    source: ClassVar[str] = "Zhang & Chen 2022"


@dataclass(frozen=True)
class LMS(EpsMultistep):
    r"""The linear multistep method in nsr: `x_next = (s_next / s) x + sum_j b_j eps_j`, eps a
    polynomial in nsr.

    Adams-Bashforth on `d(x/s) = eps dnsr` with the weights of the actual steps; `DEIS(p, "nsr")` is
    the same method. k-diffusion's `sample_lms` takes `p=4`. Its step to zero noise extrapolates
    too, where this one returns the prediction.

    - `p`: values that are interpolated, 1 to 6.

    Cost: 1 call a step. Order: 2 (1 with `p=1`, which is DDIM): the first step, of order 1, bounds
    it. Source: Bashforth & Adams (1883); Crowson, k-diffusion (2022), `sample_lms`.
    """

    p: int = 4

    clock = "nsr"
    most: ClassVar[int] = 6
    source: ClassVar[str] = "Bashforth & Adams 1883; Crowson 2022"


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

    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        method = _METHODS[self.method]("nsr" if has_signal(t, t_next) else "t")
        return method.step(reverse, x, t, t_next, noise, state)
