r"""An adaptive solver of the reverse SDE: every sample has its own steps, and rejected ones do not
change the law of the noise.

An attempt is a step of a first-order method. The prediction where it ends makes it a second-order
one, and the difference of the two is the error. The form `"euler"` is the paper's, over the time of
the process ($h = t - t_+$, $\Delta B$ an increment of a Brownian motion in $t$):

$$K_1 = -h\,(f x - g^2 \nabla\log p) + g\,\Delta B, \qquad x' = x + K_1, \qquad
K_2 = K_1\text{ at }(x', t_+), \qquad x'' = x + \tfrac12 (K_1 + K_2).$$

The form `"ancestral"` solves the linear part exactly. With $z = x / s$ and $\tau = \mathrm{nsr}^2$
the reverse SDE is $d(z / \tau) = x_0\,d(1/\tau) + dV$ with a Brownian motion $V$ in $1/\tau$, so
that

$$z' = \frac{\tau_+}{\tau} z + \Big(1 - \frac{\tau_+}{\tau}\Big) x_0 + \tau_+ \Delta V, \qquad
z'' = z' + \tfrac12 \Big(1 - \frac{\tau_+}{\tau}\Big) (x_0' - x_0),$$

The first of these is an ancestral step. It is finite where no signal is left ($1/\tau = 0$), and
runs over the clock $\operatorname{asinh}(s / \sigma)$, as RK45 does.

New noise after a rejected step would favour noise that makes small errors. So the increment is
kept, and a shorter step takes its part of it, by a Brownian bridge.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from sdeflow.errors import GridError, SolverError
from sdeflow.noise import BrownianNoise, Noise
from sdeflow.process.clock import Clock, ClockRange
from sdeflow.solvers.adaptive.step_size import PerSample, PerSampleSolve, column, first_bad
from sdeflow.solvers.base import Solution, Task

Form = Literal["euler", "ancestral"]
"""The first-order step: Euler-Maruyama's in the time of the process, or the ancestral one."""


@dataclass(frozen=True)
class AdaptiveSDE(PerSample):
    r"""The adaptive solver of the reverse SDE of Jolicoeur-Martineau et al. ("Gotta Go Fast"), each
    sample with its own steps.

    A step is accepted where the root mean square of
    `(u'' - u') / max(atol, rtol max(|u'|, |u'_before|))` is at most 1, with
    `u = x / sqrt(s^2 + sigma^2)` (under VP, `x`) and `u'_before` the first-order end of the last
    accepted step; then `x''` is taken.

    - `form`: `"euler"`, the paper's, or `"ancestral"`, with the linear part solved exactly; see the
      module.
    - `rtol`, `atol`: tolerances of a step; the paper has `rtol` 0.01 to 0.05 and `atol` 1/128 for
      images in [-1, 1].
    - `max_nfe`: network calls that a sample may take. `min_step`, `first_step`, `max_step`: in the
      clock of the form, `t` or `asinh(s / sigma)`.
    - `safety`, `shrink`, `grow`, `exponent`, `beta`, `hold`: of the controller, see `StepSize`.

    Rejected steps cost their two calls, and keep their noise: the increment is split by a Brownian
    bridge. With `noise="brownian"` the noise is that of the sample's one path. Rows do not depend
    on their batch. Every sample meets every level of a given grid; two levels are fastest.
    `Solution.statistics` has `nfe`, `accepted` and `rejected` for each sample.

    Errors: as `RK45`; `GridError` for `"euler"` where no signal is left (rectified flow at t = 1),
    which `"ancestral"` can leave.

    Cost: 2 calls a step tried, and 1 at the end. Weak order: 2. Source: Jolicoeur-Martineau et al.,
    "Gotta go fast when generating data with score-based models" (2021), algorithm 1; Roberts
    (2012); Rackauckas & Nie (2017) for rejected steps.
    """

    rtol: float = 0.02
    atol: float = 0.0078
    form: Form = "euler"
    exponent: float | None = field(default=0.9, kw_only=True)

    order: ClassVar[int] = 2
    stochastic: ClassVar[bool] = True
    source: ClassVar[str] = "Jolicoeur-Martineau et al. 2021"
    cost: ClassVar[str] = "2 a step, adaptive"

    def begin(self, task: Task) -> PerSampleSolve:
        if self.form == "euler" and (first := task.reverse.level(float(task.times[0]))).s == 0.0:
            raise GridError(
                f"the SDE's coefficients are infinite at t={first.t:g}, where no signal is"
                " left: AdaptiveSDE(form='ancestral') can start there, or start from a smaller t"
            )
        if task.noise is None:
            raise SolverError("AdaptiveSDE draws noise: give it a source of noise")
        return _Solve(self, task._replace(times=task.times.detach()), task.noise)


class _Numbers(NamedTuple):
    """A process at some values of a clock, `[b]` each, float64."""

    t: Tensor
    s: Tensor
    sigma: Tensor
    scale: Tensor  # sqrt(s^2 + sigma^2)
    f: Tensor
    g2: Tensor


class _Paths:
    """The Brownian motion of every sample, as far as steps have needed it: the increments ahead,
    in order.

    A step needs the increment to where it ends. What is known beyond is kept. What lies between two
    known points is split by a bridge. A request takes at most one draw of the sample's own stream,
    whatever its batch does.
    """

    def __init__(self, noise: Noise, like: Tensor):
        self.noise, self.like = noise, like
        n = len(like)
        self.ahead: list[list[tuple[float, Tensor]]] = [[] for _ in range(n)]
        self.drawn: list[deque[Tensor]] = [deque() for _ in range(n)]
        self.trees: list[BrownianNoise] | None = None
        if isinstance(noise, BrownianNoise):
            self.trees = [
                BrownianNoise([seed], noise.shape, noise.device, noise.dtype)
                for seed in noise.seeds
            ]

    def increments(
        self, rows: Tensor, at: Tensor, to: Tensor, nsr: Tensor, nsr_to: Tensor, needed: set[int]
    ) -> Tensor:
        """The increments `[b, *shape]` of some samples between two values of the Brownian clock."""
        found = []
        for row, a, b, n, m in zip(*(v.tolist() for v in (rows, at, to, nsr, nsr_to)), strict=True):
            if self.trees is not None:
                found.append(self.trees[row].draw(n, m)[0].to(self.like) * math.sqrt(b - a))
            else:
                found.append(self._increment(row, a, b, needed))
        return torch.stack(found)

    def _increment(self, row: int, at: float, to: float, needed: set[int]) -> Tensor:
        ahead, k = self.ahead[row], 0
        while k < len(ahead) and ahead[k][0] <= to:
            at = ahead[k][0]
            k += 1
        if k == len(ahead) and at < to:
            ahead.append((to, math.sqrt(to - at) * self._draw(row, needed)))
            k += 1
        elif at < to:
            end, whole = ahead[k]
            share = (to - at) / (end - at)
            part = share * whole + math.sqrt(share * (end - to)) * self._draw(row, needed)
            ahead[k : k + 1] = [(to, part), (end, whole - part)]
            k += 1
        total = ahead[0][1]
        for _, increment in ahead[1:k]:
            total = total + increment
        return total

    def _draw(self, row: int, needed: set[int]) -> Tensor:
        if not self.drawn[row]:
            for other, z in enumerate(self.noise.draw().to(self.like).unbind()):
                if other in needed:
                    self.drawn[other].append(z)
        return self.drawn[row].popleft()

    def pass_over(self, rows: Tensor, to: Tensor) -> None:
        """Drop the increments that the samples have passed."""
        for row, end in zip(rows.tolist(), to.tolist(), strict=True):
            self.ahead[row] = [piece for piece in self.ahead[row] if piece[0] > end]


class _Solve(PerSampleSolve):
    """One solve under way."""

    carried = ("x", "low")
    results = ("x", "low", "h")
    solver: AdaptiveSDE

    def __init__(self, solver: AdaptiveSDE, task: Task, noise: Noise):
        process, self.is_euler = task.reverse.process, solver.form == "euler"
        clock = ClockRange(
            Clock("t" if self.is_euler else "asinh"), process, task.times, every=True
        )
        first = 0.01 * (process.t_max - process.t_min) if self.is_euler else 0.1
        super().__init__(solver, task, clock, first)
        self.x = self.start
        self.low = self.x / float(self.read(self.a[:1]).scale)
        self.paths = _Paths(noise, self.x)

    def read(self, a: Tensor) -> _Numbers:
        """The process where the clock is at `a`."""

        def numbers(a: Tensor, t: Tensor, s: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
            process, none = self.clock.process, torch.zeros_like(t)
            f, g2 = (process.f(t), process.g2(t)) if self.is_euler else (none, none)
            return t, s, sigma, torch.hypot(s, sigma), f, g2

        return _Numbers(*(number.detach() for number in self.clock.read(a, numbers)))

    def brownian(self, at: _Numbers) -> Tensor:
        """The clock of the Brownian motion: `-t`, or `1 / nsr^2`. It increases towards data."""
        return -at.t if self.is_euler else (at.s / at.sigma) ** 2

    def run(self) -> Solution:
        levels = self.clock.levels.tolist()
        for i, end in enumerate(levels[1:], 1):
            self.end = end
            while len(self.rows):
                self.attempt(last=end == levels[-1])
            # All samples have reached the level: they go on from there together.
            gathered = {name: self.gather(name) for name in self.results}
            self.set_out(end, gathered["h"])
            self.x, self.low = gathered["x"], gathered["low"]
            if self.trajectory is not None:
                self.trajectory[i] = self.x
        result = self.x
        if self.finish:
            result = self.predict(self.x, self.read(self.a).t)
            if (bad := first_bad(result)) is not None:
                self.fail_nonfinite(bad, self.a, 0.0)
        return self.solution(self.x, result)

    def attempt(self, last: bool) -> None:
        """One step of every active sample, which each of them accepts or rejects."""
        self.check_budget(2)
        a_next = self.propose()
        here, there = self.read(self.a), self.read(a_next)
        x0 = self.predict(self.x, here.t)
        start, end = self.brownian(here), self.brownian(there)
        needed = set(self.rows.tolist()) if last else set(range(self.n))
        nsr, nsr_next = here.sigma / here.s, there.sigma / there.s
        dw = self.paths.increments(self.rows, start, end, nsr, nsr_next, needed)
        step = self.euler if self.is_euler else self.ancestral
        low, high, shown = step(here, there, x0, dw)
        scale = column(there.scale, low)
        u = low / scale
        mask = self.judge(self.error_ratios(high / scale - u, u, self.low), a_next, shown)
        self.paths.pass_over(self.rows[mask], end[mask])
        self.advance(mask, a_next, {"x": high, "low": u})

    def euler(
        self, here: _Numbers, there: _Numbers, x0: Tensor, dw: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`x'`, `x''`, and the prediction between them, of the improved Euler method."""

        def increment(x: Tensor, x0: Tensor, at: _Numbers) -> Tensor:
            # -h (f x - g2 score) with score = (s x0 - x) / sigma^2
            h, pull = here.t - there.t, at.g2 / at.sigma**2
            of_x, of_x0, of_noise = column(
                torch.stack([-h * (at.f + pull), h * pull * at.s, at.g2.sqrt()]), x
            )
            return of_x * x + of_x0 * x0 + of_noise * dw

        first = increment(self.x, x0, here)
        low = self.x + first
        shown = self.predict(low, there.t)
        return low, self.x + 0.5 * (first + increment(low, shown, there)), shown

    def ancestral(
        self, here: _Numbers, there: _Numbers, x0: Tensor, dw: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same with the linear part solved."""
        ratio = (there.sigma * here.s) / (there.s * here.sigma)
        gain = there.s * (1.0 - ratio) * (1.0 + ratio)
        numbers = torch.stack([ratio * there.sigma / here.sigma, gain, there.sigma**2 / there.s])
        of_x, of_x0, of_noise = column(numbers, self.x)
        low = of_x * self.x + of_x0 * x0 + of_noise * dw
        shown = self.predict(low, there.t)
        return low, low + 0.5 * of_x0 * (shown - x0), shown
