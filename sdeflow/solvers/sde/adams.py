r"""Stochastic exponential Adams: linear multistep methods of the reverse SDE, of which SA-Solver is
the published one.

Over nodes $t_j$ with the predictions $D_j$ and their Lagrange polynomials $\ell_j$ in a clock $c$,
and with $\eta$ the rate of noise, the step of `sdeflow.solvers.sde.exponential` has the weights

$$b_j = s_+\, (1 + \eta) \int_\lambda^{\lambda_+} e^{-(1 + \eta)(\lambda_+ - l)}\, \ell_j(c(l))\, dl.$$

The nodes up to $t$ make a predictor. With the next prediction the same step, from the same state
and with the same noise, is done again: both differ in their weights alone, so that
$x_c = x_+ + \sum_j (b^c_j - b^p_j) D_j$, and a plan needs no second state.

| member of the family | is |
|---|---|
| `StochasticAdams(p, eta=0)` | `ExponentialAdams(p, "x0", start_up="orders")` |
| `StochasticAdams(1, eta)` | `SDEDPMSolverPP(1, eta)`, `SEEDS(1, eta)`; `DDPM` at `eta=1` |
| `StochasticAdams(2, eta)`, `StochasticAdams(3, eta)` | `SDEDPMSolverPP(p, eta, exact=True)` |
| `StochasticAdams(p, eta, clock="nsr")` | `ERSDE(p, phi=1 + eta, exact=True)` |
| `StochasticAdams(p, tau**2, corrector=True)` | `SASolver(p, p + 1, tau, lower_final=False)` |
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from sdeflow._utils.math import Scalar
from sdeflow.errors import unknown
from sdeflow.process import Level, Process
from sdeflow.reverse import Reverse
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.weights import CLOCKS, NodeClock, adams, has_signal
from sdeflow.solvers.sde.exponential import RateSolver, check_rate, rate_weights


class StochasticMultistep(GridSolver):
    """A step over the last predictions, and perhaps again over the next one too; subclasses say
    with which weights.
    """

    again: ClassVar[bool] = False
    """Whether the network is asked anew at the corrected state (PECE)."""

    @abstractmethod
    def nodes(self, left: int) -> tuple[int, int]:
        """How many predictions predictor and corrector interpolate where `left` steps are left; 0
        for no corrector.
        """

    @abstractmethod
    def rate(self, t_next: Level) -> float:
        """The rate of noise of the step to a level."""

    @abstractmethod
    def weights(
        self, process: Process, levels: Sequence[Level], t: Level, t_next: Level, rate: float
    ) -> Sequence[Scalar]:
        """The weights of the predictions at two or more `levels`, the newest first, in a step
        between levels with signal.
        """

    def readable(self, level: Level) -> bool:
        """Whether a level can be a node."""
        return has_signal(level)

    def start(self, steps: int) -> Any:
        return (
            steps,
            (),
            None,
        )  # steps left; (level, prediction), newest first; the step that may be corrected

    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        left, history, last = state
        x0 = reverse(x, t)
        if last is not None:
            x = self._correct(reverse.process, x, x0, t, last)
        p, c = self.nodes(left)
        history = ((t, x0), *history)[: max(p, c - 1)]
        # From and to a level without signal the prediction there stands alone.
        usable = (
            tuple(node for node in history if self.readable(node[0]))
            if has_signal(t, t_next)
            else history[:1]
        )
        rate = self.rate(t_next)
        kept, _, spread = rate_weights(t, t_next, rate)
        weights = self._weights(
            reverse.process, [level for level, _ in usable[:p]], t, t_next, rate
        )
        x_next = kept * x
        for weight, (_, value) in zip(weights, usable, strict=False):
            x_next = x_next + weight * value
        if rate:
            x_next = x_next + spread * noise(t, t_next)
        last = (t, usable, c, tuple(weights), rate)
        if self.again:
            x_next = self._correct(reverse.process, x_next, reverse(x_next, t_next), t_next, last)
        return x_next, (
            left - 1,
            history,
            last if c and not self.again and has_signal(t, t_next) else None,
        )

    def _correct(self, process: Process, x: Any, x0: Any, t: Level, last: Any) -> Any:
        """The state at `t`, the step to it done again with the prediction there."""
        before, usable, c, weights, rate = last
        levels = [t, *(level for level, _ in usable[: c - 1])]
        anew = self._weights(process, levels, before, t, rate)
        x = x + anew[0] * x0
        for j in range(max(len(weights), len(anew) - 1)):
            new = anew[j + 1] if j + 1 < len(anew) else 0.0
            x = x + (new - (weights[j] if j < len(weights) else 0.0)) * usable[j][1]
        return x

    def _weights(
        self, process: Process, levels: Sequence[Level], t: Level, t_next: Level, rate: float
    ) -> Sequence[Scalar]:
        whole = rate_weights(t, t_next, rate)[1]
        if len(levels) == 1:
            return [whole]
        if not has_signal(t, t_next):
            # Of a corrector that has its own call: the line through the step's two ends in e^lam,
            # which is zero at one of them.
            new = whole * (1.0 + rate) / (2.0 + rate)
            return [new, whole - new]
        return self.weights(process, levels, t, t_next, rate)


@dataclass(frozen=True)
class StochasticAdams(StochasticMultistep, RateSolver):
    r"""Stochastic exponential Adams: the last `p` predictions interpolated in any clock, with exact
    weights and any noise.

        x_next = (sigma_next / sigma) e^{-eta h} x + sum_j b_j D_j + sigma_next sqrt(1 - e^{-2 eta h}) z

    with the weights of the module.

    - `p`: predictions that are interpolated, 1 to 6; the first steps have fewer.
    - `eta`: the rate of noise: 0 is the ODE, 1 the reverse SDE.
    - `clock`: the variable of the polynomial: `"lam"`, `"nsr"`, `"angle"` (`atan nsr`) or `"t"`.
    - `corrector`: redo each step with the next prediction and the same noise, at no cost (PEC).

    Cost: 1 call a step. Weak order: `min(p, 2)`, with the corrector 2; with `eta=0` the corrector
    brings `min(p + 1, 3)`. Strong order: 1. Source: Xue et al., "SA-Solver" (2023), propositions
    4.2 and 5.1; Hochbruck & Ostermann (2010).
    """

    p: int = 2
    eta: float = 1.0
    clock: NodeClock = "lam"
    corrector: bool = False

    source: ClassVar[str] = "Xue et al. 2023; Hochbruck & Ostermann 2010"

    def __post_init__(self) -> None:
        check_count("p", self.p, 1, "predictions are interpolated")
        check_rate("eta", self.eta)
        if self.clock not in CLOCKS:
            raise unknown("clock", self.clock, CLOCKS)

    @property
    def order(self) -> int:  # type: ignore[override]
        """Weak order of convergence, the first steps included."""
        return min(self.p + 1, 2 if self.eta else 3) if self.corrector else min(self.p, 2)

    def nodes(self, left: int) -> tuple[int, int]:
        return self.p, self.p + 1 if self.corrector else 0

    def rate(self, t_next: Level) -> float:
        return self.eta

    def weights(
        self, process: Process, levels: Sequence[Level], t: Level, t_next: Level, rate: float
    ) -> Sequence[Scalar]:
        return adams("x0", self.clock, levels, t, t_next, process, math.sqrt(rate))[1]

    def readable(self, level: Level) -> bool:
        return self.clock in ("angle", "t") or has_signal(level)


def check_count(name: str, count: Any, least: int, what: str) -> None:
    """A `ValueError` unless `count` is a whole number from `least` to 6."""
    if isinstance(count, bool) or not isinstance(count, int) or not least <= count <= 6:
        raise ValueError(f"{name} = {least} to 6 {what}; got {name}={count!r}")
