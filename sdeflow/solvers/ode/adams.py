r"""Linear multistep exponential integrators: one family, of which DDIM, DEIS, DPM-Solver++
multistep and UniPC are members.

A member is chosen by four things: how many predictions are interpolated (`p`), as which function
(`frame`), in which clock, and whether the next prediction corrects the step that led to it
(`corrector`); `sdeflow.solvers.ode.weights` has the derivation. The weights are those of the actual
nodes, in float64.

**The corrector is free.** The prediction at the predicted state is needed by the next step anyhow.
With it the last step is done again over one more node, and not evaluated again. As both are linear,
the corrected state is the predicted one plus a combination of predictions,
$x_c = x + \sum_j (b^c_j - b^p_j) F_j$, so that a plan needs no second state for it.

**Starting up.** A step of order 1 leaves an error of $h^2$ once: a method that starts by orders 1,
2, ... is of order 2 whatever it does later. Three ways, `start_up=`: `"orders"`; `"corrected"`,
where the first `p - 1` steps are corrected for free, which keeps order 3; and `"singlestep"`,
exponential Runge-Kutta steps of order `p - 1` at `p - 1` calls each, which keep any order.

**The ends.** From and to a level without signal ($s = 0$) a step is DDIM's; in the clocks `lam` and
`nsr`, where such a level has no reading, it is left out of the nodes. The step to zero noise is the
prediction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from sdeflow.errors import unknown
from sdeflow.process import Level, Process
from sdeflow.reverse import Reverse, eps_of
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.ddim import STAGES, exponential_step, stage_times
from sdeflow.solvers.ode.to_zero import TO_ZERO, ToZero, integrated, kept_with
from sdeflow.solvers.ode.weights import (
    CLOCKS,
    FRAMES,
    Frame,
    NodeClock,
    adams,
    between,
    frame_value,
    has_signal,
)

StartUp = Literal["orders", "corrected", "singlestep"]
"""How a multistep method takes its first steps."""


@dataclass(frozen=True)
class ExponentialAdams(GridSolver):
    r"""Exponential Adams: `x_next = a x + sum_j b_j F_j` over the last `p` predictions, with exact
    weights in any frame and clock.

    - `p`: predictions that are interpolated, 1 to 6.
    - `frame`: what of them: `"x0"`, `"eps"`, `"v"` (the angle's velocity) or `"flow"` (`eps - x0`).
    - `clock`: the variable of the polynomial: `"lam"`, `"nsr"`, `"angle"` (`atan nsr`), `"flow"`
      (`sigma / (s + sigma)`), `"bounded_lam"` or `"t"`.
    - `corrector`: redo each step with the next prediction, one order higher at no cost
      (Adams-Bashforth-Moulton, PEC).
    - `start_up`: `"orders"`, `"corrected"` or `"singlestep"`, see the module.
    - `lower_final`: the last steps use fewer predictions, `min(p, steps left + 1)`.
    - `frame_scale`, `clock_scale`: the ratio of noise to signal about which the frames `"v"` and
      `"flow"` and the clocks `"angle"`, `"flow"` and `"bounded_lam"` turn, see
      `sdeflow.solvers.ode.weights`; in units of the data.

    Cost: 1 call a step (with `start_up="singlestep"`, `p - 1` in the first `p - 2`). Order: `p`,
    with the corrector `p + 1`, but at most 2 with `start_up="orders"` (3 with the corrector), 3
    with `"corrected"`, `p` with `"singlestep"`. Source: Hochbruck & Ostermann (2010), section 2.5;
    Zhang & Chen, "DEIS" (2022); Lu et al., "DPM-Solver++" (2022); Zhao et al., "UniPC" (2023).
    """

    p: int = 3
    frame: Frame = "x0"
    clock: NodeClock = "lam"
    corrector: bool = False
    start_up: StartUp = "corrected"
    lower_final: bool = False
    frame_scale: float = 1.0
    clock_scale: float = 1.0
    to_zero: ToZero = "prediction"

    source: ClassVar[str] = "Hochbruck & Ostermann 2010; Zhang & Chen 2022"

    def __post_init__(self) -> None:
        if isinstance(self.p, bool) or not isinstance(self.p, int) or not 1 <= self.p <= 6:
            raise ValueError(
                f"an exponential Adams method interpolates p = 1 to 6 predictions; got p={self.p!r}"
            )
        for kind, value, known in (
            ("frame", self.frame, FRAMES),
            ("clock", self.clock, CLOCKS),
            ("start-up", self.start_up, ("orders", "corrected", "singlestep")),
            ("step to zero noise", self.to_zero, TO_ZERO),
        ):
            if value not in known:
                raise unknown(kind, value, known)
        for name in ("frame_scale", "clock_scale"):
            if not (0.0 < getattr(self, name) < math.inf):
                raise ValueError(
                    f"{name} is a ratio of noise to signal, positive and finite; got"
                    f" {getattr(self, name)!r}"
                )
        if self.start_up == "singlestep" and self.p > 4:
            raise ValueError(
                f"single steps at the start reach order 3, which serves p up to 4; got p={self.p}"
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

    def extra_times(self, process: Process, times: Tensor) -> Tensor | None:
        return (
            stage_times(process, times[: self._single + 1], STAGES[self.p - 1])
            if self._single
            else None
        )

    def start(self, steps: int) -> Any:
        # Steps left; (level, F) of the last predictions, newest first; the step that may be
        # corrected; (level, eps) for the step to zero noise.
        return steps, (), None, ()

    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        left, history, last, kept = state
        x0 = reverse(x, t)
        if self.to_zero != "prediction":
            kept = kept_with(kept, x, x0, t)
        value = frame_value(self.frame, x, x0, t, self.frame_scale)
        if last is not None:
            x = self._correct(reverse, x, t, value, last)
        history = ((t, value), *history)[: self.p]
        taken = len(history)
        if not has_signal(t, t_next):  # DDIM's step, or as many of them as the start makes calls
            first = t
            for ratio in (*STAGES[self.p - 1], 1.0) if taken <= self._single else (1.0,):
                if t is not first:
                    x0 = reverse(x, t)
                level = between(reverse, first, t_next, ratio)
                x, t = level.s * x0 + level.sigma * eps_of(x, x0, t), level
            return x, (left - 1, history, None, kept)
        if taken <= self._single:
            return exponential_step(reverse, x, x0, t, t_next, STAGES[self.p - 1]), (
                left - 1,
                history,
                None,
                kept,
            )
        p = min(self.p, left + 1) if self.lower_final else self.p
        used = self._usable(history)[:p]
        a, b = self._weights([level for level, _ in used], t, t_next, reverse.process)
        x_next = a * x
        for weight, (_, F) in zip(b, used, strict=True):
            x_next = x_next + weight * F
        again = self.corrector or (self.start_up == "corrected" and len(used) < self.p)
        return x_next, (left - 1, history, (t, used, tuple(b)) if again else None, kept)

    def finish(self, reverse: Reverse, x: Any, t: Level, noise: Any, state: Any) -> Any:
        _, _, last, kept = state
        x0 = reverse(x, t)
        if self.to_zero == "prediction":
            return x0
        kept = kept_with(kept, x, x0, t)
        if last is not None:
            value = frame_value(self.frame, x, x0, t, self.frame_scale)
            x = self._correct(reverse, x, t, value, last)
        return integrated(self.to_zero, x, x0, t, kept)

    def _correct(self, reverse: Reverse, x: Any, t: Level, value: Any, last: Any) -> Any:
        """The state at `t`, the step to it done again over one more node."""
        before, used, b = last
        nodes = [t, *(level for level, _ in used)]
        _, again = self._weights(nodes, before, t, reverse.process)
        x = x + again[0] * value
        for new, old, (_, F) in zip(again[1:], b, used, strict=True):
            x = x + (new - old) * F
        return x

    def _weights(
        self, nodes: list[Level], t: Level, t_next: Level, process: Process
    ) -> tuple[Any, list[Any]]:
        return adams(
            self.frame,
            self.clock,
            nodes,
            t,
            t_next,
            process,
            scales=(self.frame_scale, self.clock_scale),
        )

    def _usable(self, history: Any) -> Any:
        """The nodes that have a reading in the clock."""
        if self.clock in ("lam", "nsr"):
            return tuple(node for node in history if has_signal(node[0]))
        return history
