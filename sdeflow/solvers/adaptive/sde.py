r"""An adaptive solver of the reverse SDE: every sample has its own steps, and refused ones leave no
trace in the noise.

A step is tried with a first-order method; the prediction where that ends makes it a second-order
one, and the difference of the two is the error. In the form `"euler"`, the paper's, over the
process's own time ($h = t - t_+$, $\Delta B$ an increment of a Brownian motion in $t$):

$$K_1 = -h\,(f x - g^2 \nabla\log p) + g\,\Delta B, \qquad x' = x + K_1, \qquad
K_2 = K_1\text{ at }(x', t_+), \qquad x'' = x + \tfrac12 (K_1 + K_2).$$

The form `"ancestral"` solves the linear part exactly. With $z = x / s$ and $\tau = \mathrm{nsr}^2$
the reverse SDE is $d(z / \tau) = x_0\,d(1/\tau) + dV$ with a Brownian motion $V$ in $1/\tau$, so
that

$$z' = \frac{\tau_+}{\tau} z + \Big(1 - \frac{\tau_+}{\tau}\Big) x_0 + \tau_+ \Delta V, \qquad
z'' = z' + \tfrac12 \Big(1 - \frac{\tau_+}{\tau}\Big) (x_0' - x_0),$$

of which the first is an ancestral step. It is finite where no signal is left ($1/\tau = 0$), and
runs over the clock $\operatorname{asinh}(s / \sigma)$, as RK45 does.

A refused step has shown its noise. Drawing anew would prefer the noise that makes for small errors;
so the increment is kept, and a shorter step takes its part of it, by a Brownian bridge.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sdeflow._utils.math import batch_invariant
from sdeflow.errors import GridError, NonFiniteError, SolverError, unknown
from sdeflow.noise import BrownianNoise, Noise
from sdeflow.process import Process
from sdeflow.reverse import Reverse
from sdeflow.solvers.adaptive.step_size import PerSample, PerSampleSolve, column, first_bad, row_rms
from sdeflow.solvers.base import OnCall, Solution, check_levels, check_times

Form = Literal["euler", "ancestral"]
"""The first-order step within: Euler-Maruyama's in the process's time, or the ancestral one."""


@dataclass(frozen=True)
class AdaptiveSDE(PerSample):
    r"""The adaptive solver of the reverse SDE of Jolicoeur-Martineau et al. ("Gotta Go Fast"), each
    sample with its own steps.

    A step is accepted where the root mean square of
    `(u'' - u') / max(atol, rtol max(|u'|, |u'_before|))` is at most 1, with
    `u = x / sqrt(s^2 + sigma^2)` (under VP, `x`) and `u'_before` the first-order end of the last
    accepted step; then `x''` is taken. `h_next = h clip(safety ratio^-exponent, shrink, grow)`.

    - `form`: `"euler"`, the paper's, or `"ancestral"`, with the linear part solved exactly; see the
      module.
    - `rtol`, `atol`: tolerances of a step; the paper has `rtol` 0.01 to 0.05 and `atol` 1/128 for
      images in [-1, 1].
    - `max_nfe`: network calls that a sample may take. `min_step`, `first_step`: in the form's
      clock, `t` or `asinh(s / sigma)`.

    Refused steps cost their two calls, and keep their noise: the increment is split by a Brownian
    bridge. With `noise="brownian"` the noise is that of the sample's one path. Rows do not depend
    on their batch. Every level of a given grid is met by every sample; for speed give two.
    `Solution.statistics` has `nfe`, `accepted` and `rejected` for each sample.

    Errors: as `RK45`; `GridError` for `"euler"` where no signal is left (rectified flow at t = 1),
    which `"ancestral"` can leave.

    Cost: 2 calls a step tried, and 1 at the end. Weak order: 2. Source: Jolicoeur-Martineau et al.,
    "Gotta go fast when generating data with score-based models" (2021), algorithm 1; Roberts
    (2012); Rackauckas & Nie (2017) for refused steps.
    """

    rtol: float = 0.02
    atol: float = 0.0078
    form: Form = "euler"
    safety: float = 0.9
    exponent: float = 0.9
    shrink: float = 0.1
    grow: float = 10.0

    order: ClassVar[int] = 2
    stochastic: ClassVar[bool] = True
    reversible: ClassVar[bool] = False
    source: ClassVar[str] = "Jolicoeur-Martineau et al. 2021"
    cost: ClassVar[str] = "2 a step, adaptive"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in get_args(Form):
            raise unknown("form", self.form, get_args(Form))
        if not (
            0 < self.safety <= 1 and 0.5 <= self.exponent <= 1 and 0 < self.shrink < 1 <= self.grow
        ):
            raise ValueError(
                "the controller needs 0 < safety <= 1, 0.5 <= exponent <= 1 and 0 < shrink < 1 <="
                " grow"
            )

    def factor(self, ratio: float, before: float, after_rejection: bool) -> float:
        if not math.isfinite(ratio):
            return self.shrink
        wish = (
            self.safety * max(ratio, 1e-10) ** -self.exponent
        )  # an error of 0 asks for the longest step
        # A refused step keeps its noise, so that the same step would be refused for ever.
        return min(max(wish, self.shrink), 0.9 if ratio > 1.0 else self.grow)

    def integrate(
        self,
        reverse: Reverse,
        x: Tensor,
        times: Tensor,
        noise: Noise | None,
        *,
        finish: bool = True,
        record: bool = False,
        on_call: OnCall | None = None,
    ) -> Solution:
        times = check_times(times)
        if len(times) > 1 and times[-1] > times[0]:
            raise GridError(
                "AdaptiveSDE only runs from noise to data; encode with a solver of the ODE, such as"
                " RK45, and finish=False"
            )
        levels = check_levels(reverse.prepare(times.detach()), reverse.process)
        if self.form == "euler" and levels[0].s == 0.0:
            raise GridError(
                f"the SDE's coefficients are infinite at t={levels[0].t:g}, where no signal is"
                " left: AdaptiveSDE(form='ancestral') can start there, or start from a smaller t"
            )
        if noise is None:
            raise SolverError("AdaptiveSDE draws noise: give it a source of noise")
        return _Solve(self, reverse, x, times.detach(), noise, finish, record, on_call).run()


class _Numbers(NamedTuple):
    """A process at the readings of a clock, `[b]` each, float64."""

    t: Tensor
    s: Tensor
    sigma: Tensor
    scale: Tensor  # sqrt(s^2 + sigma^2)
    f: Tensor
    g2: Tensor


class _Clock:
    """What a form steps in: `t` itself, or `asinh(s / sigma)`; and the clock of its Brownian
    motion.
    """

    def __init__(self, process: Process, form: str, times: Tensor):
        self.process, self.form, self.times = process, form, times
        s, sigma = (torch.broadcast_to(c, times.shape) for c in process.kernel(times))
        self.levels = times if form == "euler" else torch.asinh(s / sigma)
        if form != "euler" and len(times) > 1 and not bool((self.levels.diff() > 0).all()):
            raise GridError(
                f"sigma / s of {process!r} is not monotone between the times of the grid"
            )

    def time(self, a: Tensor) -> Tensor:
        """The time at which the clock shows `a`; the levels are met exactly."""
        if self.form == "euler":
            return a
        t = self.process.t_of_lam(a - math.log(2.0) + torch.log(-torch.expm1(-2.0 * a)))
        t = t.clamp(min=float(self.times.min()), max=float(self.times.max()))
        for level, time in zip(self.levels, self.times, strict=True):
            t = torch.where(a == level, time, t)
        return t

    def read(self, a: Tensor) -> _Numbers:
        def numbers(a: Tensor) -> Tensor:
            t = self.time(a)
            s, sigma = (torch.broadcast_to(c, t.shape) for c in self.process.kernel(t))
            euler = self.form == "euler"
            f, g2 = (
                (self.process.f(t), self.process.g2(t))
                if euler
                else (torch.zeros_like(t), torch.zeros_like(t))
            )
            return torch.stack([t, s, sigma, torch.hypot(s, sigma), f, g2]).detach()

        return _Numbers(*batch_invariant(numbers, a))

    def brownian(self, at: _Numbers) -> Tensor:
        """What the clock of the form's Brownian motion shows: `-t`, or `1 / nsr^2`; it increases
        towards data.
        """
        return -at.t if self.form == "euler" else (at.s / at.sigma) ** 2


class _Paths:
    """The Brownian motion of every sample, as far as steps have asked for it: increments ahead, in
    order.

    A step asks for the increment to where it ends. What is known beyond is kept; what lies between
    two known points is split by a bridge. A request takes at most one draw of the sample's own
    stream, whatever its batch does.
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
        """The increments `[b, *shape]` of some samples between two readings of the Brownian
        clock.
        """
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
        """Forget what lies behind the samples that have gone so far."""
        for row, end in zip(rows.tolist(), to.tolist(), strict=True):
            self.ahead[row] = [piece for piece in self.ahead[row] if piece[0] > end]


class _Solve(PerSampleSolve):
    """One solve under way."""

    carried = ("x", "low")
    results = ("x", "low", "h")
    solver: AdaptiveSDE

    def __init__(
        self,
        solver: AdaptiveSDE,
        reverse: Reverse,
        x: Tensor,
        times: Tensor,
        noise: Noise,
        finish: bool,
        record: bool,
        on_call: OnCall | None,
    ):
        self.clock, self.finish, self.dtype = (
            _Clock(reverse.process, solver.form, times),
            finish,
            x.dtype,
        )
        start, end = float(self.clock.levels[0]), float(self.clock.levels[-1])
        euler = solver.form == "euler"
        first = solver.first_step or (
            0.01 * (reverse.process.t_max - reverse.process.t_min) if euler else 0.1
        )
        super().__init__(solver, reverse, len(x), start, end, first, on_call)
        self.x = x.to(torch.promote_types(x.dtype, torch.float32))
        self.low = self.x / float(self.clock.read(self.a[:1]).scale)
        self.paths = _Paths(noise, self.x)
        self.trajectory = [self.x] if record else None

    @property
    def clock_name(self) -> str:  # type: ignore[override]
        """What steps are measured in."""
        return "t" if self.solver.form == "euler" else "asinh(s / sigma)"

    def run(self) -> Solution:
        if (bad := first_bad(self.x)) is not None:
            raise NonFiniteError(f"the state of sample {bad} to start from holds NaN or infinity")
        levels = self.clock.levels.tolist()
        for end in levels[1:]:
            self.end = end
            while len(self.rows):
                self.attempt(last=end == levels[-1])
            self.gather_all()
            if self.trajectory is not None:
                self.trajectory.append(self.x)
        result = self.x
        if self.finish:
            result = self.ask(self.x, self.clock.read(self.a).t)
            if (bad := first_bad(result)) is not None:
                self.fail_nonfinite(bad, self.a, 0.0)
            if self.trajectory is not None:
                self.trajectory.append(result)
        trajectory = (
            torch.stack(self.trajectory).to(self.dtype) if self.trajectory is not None else None
        )
        statistics = self.statistics()
        return Solution(
            result.to(self.dtype),
            self.calls,
            self.forwards,
            statistics=statistics,
            trajectory=trajectory,
        )

    def attempt(self, last: bool) -> None:
        """One step of every active sample, which each of them accepts or refuses."""
        self.check_budget(2)
        a_next = self.propose()
        here, there = self.clock.read(self.a), self.clock.read(a_next)
        x0 = self.ask(self.x, here.t)
        start, end = self.clock.brownian(here), self.clock.brownian(there)
        needed = set(self.rows.tolist()) if last else set(range(self.n))
        nsr, nsr_next = here.sigma / here.s, there.sigma / there.s
        dw = self.paths.increments(self.rows, start, end, nsr, nsr_next, needed)
        step = self.euler if self.solver.form == "euler" else self.ancestral
        low, high, shown = step(here, there, x0, dw)
        scale = column(there.scale, low)
        u = low / scale
        mask = self.judge(self.error(u, high / scale), a_next, shown)
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
        shown = self.ask(low, there.t)
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
        shown = self.ask(low, there.t)
        return low, low + 0.5 * of_x0 * (shown - x0), shown

    @torch.no_grad()
    def error(self, low: Tensor, high: Tensor) -> Tensor:
        """The estimated error of a step over its tolerance, `[b]`, float64 on the CPU."""
        largest = torch.maximum(low.abs(), self.low.abs())
        return row_rms((high - low) / largest.mul_(self.solver.rtol).clamp_(min=self.solver.atol))

    def gather_all(self) -> None:
        """All samples have arrived at a level: they set out from there together."""
        gathered = {name: self.gather(name) for name in self.results}
        self.arrived, self.rows, self.a = (
            [],
            torch.arange(self.n),
            torch.full((self.n,), self.end, dtype=torch.float64),
        )
        self.x, self.low, self.h = gathered["x"], gathered["low"], gathered["h"]
        self.before, self.refused, self.broken = [1e-4] * self.n, [False] * self.n, [0] * self.n
        self.active = self.reverse.rows(self.rows, self.n)

    def time(self, a: Tensor) -> Tensor:
        return self.clock.read(a).t

    def reached(self) -> Tensor:
        return self.gather("x").to(self.dtype)
