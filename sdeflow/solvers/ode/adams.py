r"""Linear multistep exponential integrators: one family that contains DDIM, DEIS, DPM-Solver++
multistep and UniPC.

Four choices make a member: how many predictions are interpolated (`p`), as which function of them
(`predicts`), in which variable (`clock`), and whether the next prediction corrects the step that
led to it (`corrector`). `sdeflow.solvers.ode.weights` derives the weights, which are those of the
actual nodes, in float64. `sdeflow.solvers.ode.multistep` has the step and its corrector.

**Starting up.** One step of order 1 has an error of $h^2$. A method that starts by orders 1, 2, ...
is therefore of order 2, whatever its later steps are. There are three ways to start, `start_up=`:

| `start_up` | first `p - 1` steps | keeps order |
|---|---|---|
| `"orders"` | of orders 1, 2, ... | 2 |
| `"corrected"` | corrected, at no cost | 3 |
| `"singlestep"` | exponential Runge-Kutta steps of order `p - 1`, at `p - 1` calls each | any |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from sdeflow._utils.renamed import renamed
from sdeflow.process import Level, Process
from sdeflow.reverse import Reverse
from sdeflow.solvers.ode.ddim import STAGES
from sdeflow.solvers.ode.dpm_solver import single_step
from sdeflow.solvers.ode.multistep import Multistep, Weights, check_p
from sdeflow.solvers.ode.to_zero import ToZero, seen_with
from sdeflow.solvers.ode.weights import NodeClock, Predicts, adams, predicted

StartUp = Literal["orders", "corrected", "singlestep"]
"""How a multistep method takes its first steps."""


@renamed({"frame": "predicts", "frame_scale": "predicts_scale"})
@dataclass(frozen=True)
class ExponentialAdams(Multistep):
    r"""Exponential Adams: `x_next = a x + sum_j b_j F_j` over the last `p` predictions, with exact
    weights for any function `F` and any clock.

    - `p`: predictions that are interpolated, 1 to 6.
    - `predicts`: the function of them: `"x0"`, `"eps"`, `"v"` (the angle's velocity) or `"flow"`
      (`eps - x0`).
    - `clock`: the variable of the polynomial: `"lam"`, `"nsr"`, `"angle"` (`atan nsr`), `"flow"`
      (`sigma / (s + sigma)`), `"bounded_lam"` or `"t"`.
    - `corrector`: take each step again with the next prediction, one order higher at no cost
      (Adams-Bashforth-Moulton, PEC).
    - `start_up`: `"orders"`, `"corrected"` or `"singlestep"`, see the module.
    - `lower_final`: the last steps use fewer predictions, `min(p, steps left + 1)`.
    - `predicts_scale`, `clock_scale`: the scale `c` of `sdeflow.solvers.ode.weights`, in units of
      the data: of the functions `"v"` and `"flow"`, and of the clocks `"angle"`, `"flow"` and
      `"bounded_lam"`.
    - `to_zero`: the step to zero noise: `"prediction"`, `"linear"` or `"smooth"`, see
      `sdeflow.solvers.ode.to_zero`.

    Cost: 1 call a step (with `start_up="singlestep"`, `p - 1` in the first `p - 2`). Order: `p`,
    with the corrector `p + 1`, but at most 2 with `start_up="orders"` (3 with the corrector), 3
    with `"corrected"`, `p` with `"singlestep"`. Source: Hochbruck & Ostermann (2010), section 2.5;
    Zhang & Chen, "DEIS" (2022); Lu et al., "DPM-Solver++" (2022); Zhao et al., "UniPC" (2023).
    """

    p: int = 3
    predicts: Predicts = "x0"
    clock: NodeClock = "lam"
    corrector: bool = False
    start_up: StartUp = "corrected"
    lower_final: bool = False
    predicts_scale: float = 1.0
    clock_scale: float = 1.0
    to_zero: ToZero = field(default="prediction", kw_only=True)

    source: ClassVar[str] = "Hochbruck & Ostermann 2010; Zhang & Chen 2022"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_p(self.p, 6, "an exponential Adams method")
        for name in ("predicts_scale", "clock_scale"):
            if not (0.0 < getattr(self, name) < math.inf):
                raise ValueError(
                    f"{name} is a noise-to-signal ratio, positive and finite; got"
                    f" {getattr(self, name)!r}"
                )
        if self.start_up == "singlestep" and self.p > 4:
            raise ValueError(
                f"single steps at the start reach order 3, enough for p up to 4; got p={self.p}"
            )

    @property
    def order(self) -> int:  # type: ignore[override]
        """Order of convergence, the start included."""
        full = self.p + int(self.corrector)
        if self.start_up == "singlestep" and self.p > 2:
            return min(full, self.p)
        return min(full, 3 if self.corrector or self.start_up == "corrected" else 2)

    @property
    def _single(self) -> int:
        """Steps at the start that are single steps of order `p - 1`."""
        return max(self.p - 2, 0) if self.start_up == "singlestep" else 0

    def calls(self, levels: int, *, finish: bool = True) -> int:
        return levels - 1 + int(finish) + (self.p - 2) * min(self._single, levels - 1)

    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        left, history, _, seen = state
        if len(history) >= self._single:
            return super().step(reverse, x, t, t_next, noise, state)
        x0 = reverse(x, t)
        if self.to_zero != "prediction":
            seen = seen_with(seen, x, x0, t)
        value = predicted(self.predicts, x, x0, t, self.predicts_scale)
        x_next = single_step(reverse, x, x0, t, t_next, STAGES[self.p - 1], taylor=self.p == 3)
        return x_next, (left - 1, ((t, value), *history), None, seen)

    def corrector_nodes(self, used: int) -> int:
        again = self.corrector or (self.start_up == "corrected" and used < self.p)
        return used + 1 if again else 0

    def weights(self, nodes: Sequence[Level], t: Level, t_next: Level, process: Process) -> Weights:
        scales = (self.predicts_scale, self.clock_scale)
        return adams(self.predicts, self.clock, nodes, t, t_next, process, scales=scales)[1]
