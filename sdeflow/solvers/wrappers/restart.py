"""Restart sampling: at a low noise level, noise takes the state back up, and the solver runs down
again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

from sdeflow._utils import math as _math
from sdeflow._utils.checks import is_whole
from sdeflow._utils.math import value_of
from sdeflow.errors import GridError
from sdeflow.process import Level
from sdeflow.reverse import Reverse
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.ddim import from_pure_noise
from sdeflow.solvers.ode.runge_kutta import Heun
from sdeflow.solvers.ode.weights import has_signal
from sdeflow.solvers.wrappers.base import Nested, independent, noised

Interval = tuple[int, int, float, float]
"""`(steps, repeats, nsr_min, nsr_max)`."""


@dataclass(frozen=True)
class Restart(Nested):
    r"""Restart sampling around any solver: `repeats` times, noise from `nsr_min` up to `nsr_max`,
    and down again in `steps` steps.

        x_up = (s_up / s) x + s_up s_noise sqrt(nsr_max^2 - nsr^2) z
        then `solver` from nsr_max to nsr over `steps` steps

    The way up follows the forward process exactly. A correct marginal stays correct, and errors
    made above shrink.

    - `intervals`: each is `(steps, repeats, nsr_min, nsr_max)`. It is entered at the level of the
      grid that is nearest to `nsr_min` and below `nsr_max`. The paper's code counts points: its
      `[3, 2, 0.14, 0.30]`, for CIFAR-10, is `(2, 2, 0.14, 0.30)`.
    - `rho`: the levels of the passes are uniform in `nsr^(1/rho)`.
    - `s_noise`: as in `Churn`.

    A multistep method forgets its predictions at each restart. After the last pass it continues
    down the grid with the predictions of that pass. Every grid of two levels or more makes every
    pass, so that the cost is known in advance.

    Errors: `GridError` for a grid that starts below `nsr_min` or ends above `nsr_max`, and for a
    process that does not reach `nsr_max`. `ValueError` for a solver whose steps differ in cost.
    `BudgetError` for budgets above 1 call that do not pay for all passes.

    Cost: that of `solver`, and `repeats` times `steps` more of its steps an interval (35 calls of
    Heun become 43). Order: 0: that of `solver` down to the error of the passes, whose steps do not
    shrink with the grid. Source: Xu et al., "Restart sampling" (2023), algorithm 2.
    """

    solver: GridSolver = field(default_factory=lambda: Heun("nsr"))
    intervals: tuple[Interval, ...] = ((2, 2, 0.14, 0.30),)
    rho: float = 7.0
    s_noise: float = 1.0

    source: ClassVar[str] = "Xu et al. 2023, alg. 2"
    cost: ClassVar[str] = "that of `solver` + `repeats steps` of its steps an interval"

    def __post_init__(self) -> None:
        super().__post_init__()
        intervals = tuple(tuple(interval) for interval in self.intervals)
        object.__setattr__(self, "intervals", intervals)
        for interval in intervals:
            if len(interval) != 4 or not all(is_whole(n, -math.inf) for n in interval[:2]):
                raise ValueError(
                    "an interval is (steps, repeats, nsr_min, nsr_max), two whole numbers first;"
                    f" got {interval}"
                )
            steps, repeats, low, high = interval
            if steps < 1 or repeats < 0 or not 0.0 < low < high < math.inf:
                raise ValueError(
                    "an interval needs steps >= 1, repeats >= 0 and 0 < nsr_min < nsr_max; got"
                    f" {interval}"
                )
        if not (self.rho > 0.0 and 0.0 <= self.s_noise < 2.0):
            raise ValueError(
                f"Restart needs rho > 0 and 0 <= s_noise < 2; got rho={self.rho},"
                f" s_noise={self.s_noise}"
            )
        one = self.one_step_calls
        if self._passes and any(
            self.solver.calls(n + 1, finish=False) != n * one for n in (2, 3, 4, 9)
        ):
            raise ValueError(
                "Restart holds a solver whose steps all cost the same, such as Heun(); those of"
                f" {self.solver} differ"
            )

    @property
    def _passes(self) -> tuple[Interval, ...]:
        return tuple(interval for interval in self.intervals if interval[1])

    @property
    def active(self) -> bool:
        return bool(self._passes)

    @property
    def order(self) -> int:  # type: ignore[override]
        """That of the solver within if there are no passes; their steps do not shrink."""
        return 0 if self._passes else self.solver.order

    def calls(self, levels: int, *, finish: bool = True) -> int:
        passes = sum(steps * repeats for steps, repeats, _, _ in self._passes) if levels > 1 else 0
        return self.solver.calls(levels, finish=finish) + passes * self.one_step_calls

    def start(self, steps: int) -> Any:
        return (
            steps,
            None,
            self.solver.start(steps),
        )  # steps left; the passes to come, None before the first step

    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        if not self._passes:
            x, inner = self.solver.step(reverse, x, t, t_next, noise, state[2])
            return x, (*state[:2], inner)
        left, waiting, inner = state
        if waiting is None:
            waiting = self._passes
            for interval in waiting:
                if value_of(t.nsr) < interval[2] * (1.0 - 1e-9):
                    raise GridError(
                        f"Restart's interval {interval} begins above nsr={value_of(t.nsr):g}, where"
                        " this solve starts: leave it out"
                    )
        now, waiting = _divide(waiting, lambda interval: _nearer(interval, t, t_next))
        for interval in now:
            x, inner = self._climb(reverse, x, t, interval, noise, left)
        if self.needs_signal and not has_signal(t):
            x = from_pure_noise(reverse, x, t, t_next, self.one_step_calls, noise)
        else:
            x, inner = self.solver.step(reverse, x, t, t_next, noise, inner)
        left -= 1
        last = (
            (lambda interval: True)
            if left == 0
            else (lambda interval: _nearer(interval, t_next, t))
        )
        now, waiting = _divide(waiting, last)
        for interval in now:
            x, inner = self._climb(reverse, x, t_next, interval, noise, left)
        return x, (left, waiting, inner)

    def finish(self, reverse: Reverse, x: Any, t: Level, noise: Any, state: Any) -> Any:
        return self.solver.finish(reverse, x, t, noise, state[2])

    def _climb(
        self, reverse: Reverse, x: Any, t: Level, interval: Interval, noise: Any, left: int
    ) -> tuple[Any, Any]:
        """`(x, state of the solver)` after all passes of an interval from the level `t`, with so
        many steps of the grid left.
        """
        steps, repeats, _, high = interval
        if not value_of(t.nsr) < high:
            raise GridError(
                f"this grid ends at nsr={value_of(t.nsr):g}, above Restart's interval {interval}:"
                " leave it out"
            )
        bottom, top = t.nsr ** (1.0 / self.rho), high ** (1.0 / self.rho)
        rungs = [(top + (bottom - top) * k / steps) ** self.rho for k in range(steps)]
        levels = [*(reverse.level_of_lam(-_math.log(nsr)) for nsr in rungs), t]
        up = levels[0]
        end = value_of(reverse.level(reverse.process.t_max).nsr)
        if high > end * (1.0 + 1e-9):
            raise GridError(
                f"Restart's interval {interval} goes beyond the end of {reverse.process!r},"
                f" nsr={end:g}: leave it out"
            )
        inner: Any = None
        for k in range(repeats):
            x = noised(reverse.materialise(x), t, up, self.s_noise, noise)
            inner = self.solver.start(steps + (left if k == repeats - 1 else 0))
            for a, b in pairwise(levels):
                x, inner = reverse.materialise(
                    self.solver.step(reverse, x, a, b, independent(noise), inner)
                )
        return x, inner


def _nearer(interval: Interval, t: Level, other: Level) -> bool:
    """Whether an interval is entered at `t`, of two levels with its `nsr_min` between them: the
    nearer that is below `nsr_max`.
    """
    _, _, low, high = interval
    here, there = value_of(t.nsr), value_of(other.nsr)
    if here >= high or (here - low) * (there - low) > 0.0:
        return False
    return there >= high or abs(here - low) <= abs(there - low)


def _divide(
    intervals: tuple[Interval, ...], test: Any
) -> tuple[tuple[Interval, ...], tuple[Interval, ...]]:
    """Those that pass the test, and the others."""
    return tuple(i for i in intervals if test(i)), tuple(i for i in intervals if not test(i))
