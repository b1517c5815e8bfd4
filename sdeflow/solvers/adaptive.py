r"""Adaptive Runge-Kutta methods on the probability-flow ODE, with a step size of its own for every sample.

The ODE is integrated neither in a process's time nor in its noise-to-signal ratio, but in the state and the clock

$$u = \frac{x}{\sqrt{s^2 + \sigma^2}}, \qquad a = \operatorname{asinh}\frac{s}{\sigma}, \qquad
\frac{du}{da} = x_0 - \tanh(a)\,u .$$

*Derivation.* With $\theta = \operatorname{atan2}(\sigma, s)$, $u = \cos\theta\,x_0 + \sin\theta\,\varepsilon$ and
$du/d\theta = \cos\theta\,\varepsilon - \sin\theta\,x_0 = (\cos\theta\,u - x_0)/\sin\theta$; and $\cot\theta = \sinh a$ means
$\cos\theta = \tanh a$, $da = -d\theta/\sin\theta$.

The clock is 0 where no signal is left (rectified flow at t = 1), where the posterior of $x_0$ is a smooth function of
$s/\sigma = \sinh a$, and grows like the log of $s/\sigma$ at small noise, so that no scale of the data is stepped over. The
right-hand side has no derivative of the process and nothing to cancel. `u` has the scale of the data or of the noise,
whichever is larger, all the way: the tolerances are in units of `x / sqrt(s^2 + sigma^2)`, which end as units of the data.
Under every process it is the same ODE, so that a network costs the same number of calls under each of them.

Measured on a 64-d mixture of 50 anisotropic components, it takes fewer calls than log SNR at every tolerance tried, and about as
many as the log of the angle; `benchmarks/rk45_tolerance.py` has the figures against torchdiffeq.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sdeflow._math import evenly
from sdeflow.errors import BudgetError, GridError, NonFiniteError, SolverError
from sdeflow.instructions import Call
from sdeflow.noise import Noise
from sdeflow.process import Process
from sdeflow.reverse import Reverse
from sdeflow.solvers import tableaus
from sdeflow.solvers.base import OnCall, Solution, Solver, check_levels, check_times
from sdeflow.solvers.tableaus import Tableau


@dataclass(frozen=True)
class Adaptive(Solver):
    """An embedded Runge-Kutta pair with error control and step size per sample; its subclasses name a tableau.

    A step is accepted where the root mean square of `error / (atol + rtol max(|u|, |u_next|))`, over the sample's entries,
    is at most 1.

    - `rtol`, `atol`: tolerances of a step, in units of `u = x / sqrt(s^2 + sigma^2)`; the result's error is a few times that.
    - `max_nfe`: network calls that a sample may take. `min_step`, `first_step`: in the clock `a`, which runs over 5 to 10.
    - `dense`: keep the interpolant (`Solution.interpolant(t)`), at the price of five states a step.
    - `safety`, `shrink`, `grow`, `beta`: of the controller, which takes
      `h_next = h clip(safety ratio^(0.75 beta - 1/order) ratio_before^beta, shrink, grow)`, `ratio` being the quotient above.

    Rows do not depend on their batch: not in their steps, nor, where the network is exact row by row, in a single bit. Every
    network call holds just the samples that have not arrived. `Solution.nfe` counts the calls of the sample that took most,
    which is the number of forwards; `Solution.statistics` has `nfe`, `accepted` and `rejected` for each sample. The last
    step's slope holds the prediction at the last level, so that `finish` costs no call. Levels between the first and the
    last time are read off the interpolant and shorten no step. `on_call` sees the whole batch, samples that are not in
    the call as they were in their last one, with the time of the sample that is farthest behind.

    Gradients flow through the states; step sizes are constants to them.

    Errors: `SolverError` where a step falls below `min_step` or `max_nfe` is spent, `NonFiniteError` where the network
    returns NaN; both say where and for which sample, and carry what was reached as `error.partial`.
    """

    rtol: float = 1e-3
    atol: float = 1e-3
    max_nfe: int = 10_000
    min_step: float = 1e-7
    first_step: float | None = None
    dense: bool = False
    safety: float = 0.9
    shrink: float = 0.2
    grow: float = 10.0
    beta: float = 0.04

    adaptive: ClassVar[bool] = True
    tableau: ClassVar[Tableau]

    def __post_init__(self) -> None:
        if not (0 <= self.rtol < math.inf and 0 < self.atol < math.inf):
            raise ValueError(f"tolerances are positive numbers, such as 1e-3; got rtol={self.rtol}, atol={self.atol}")
        if isinstance(self.max_nfe, bool) or not isinstance(self.max_nfe, int) or self.max_nfe < 1:
            raise ValueError(f"max_nfe is a whole number of network calls a sample, at least 1; got {self.max_nfe!r}")
        if not (self.min_step > 0 and (self.first_step is None or self.first_step > 0)):
            raise ValueError(f"steps are positive; got min_step={self.min_step}, first_step={self.first_step}")
        if not (0 < self.safety <= 1 and 0 < self.shrink < 1 < self.grow and 0 <= self.beta < 1 / self.tableau.order):
            raise ValueError("the controller needs 0 < safety <= 1, 0 < shrink < 1 < grow and 0 <= beta < 1 / order")

    def levels(self, nfe: int, *, finish: bool = True) -> int:
        raise BudgetError(
            f"{type(self).__name__} is adaptive: it takes max_nfe, a bound, not nfe; say how accurate with rtol= and atol=, "
            "or take a solver with a fixed grid, such as 'heun', for an exact budget"
        )

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
        if finish and len(times) > 1 and times[-1] > times[0]:
            raise GridError("a solve towards noise does not end at zero noise: pass finish=False")
        check_levels(reverse.prepare(times), reverse.process)
        return _Solve(self, reverse, x, times, finish, record, on_call).run()

    def factor(self, ratio: float, before: float, after_rejection: bool) -> float:
        """By how much the next step is longer than one whose error was `ratio` times the tolerance."""
        if not math.isfinite(ratio):
            return min(0.1, self.shrink)
        exponent = 1.0 / self.tableau.order
        if ratio > 1.0:
            return max(self.safety * ratio**-exponent, self.shrink)
        wish = self.safety * max(ratio, 1e-10) ** (0.75 * self.beta - exponent) * before**self.beta
        return min(max(wish, self.shrink), 1.0 if after_rejection else self.grow)


@dataclass(frozen=True)
class RK45(Adaptive):
    """Dormand and Prince's pair of orders 5 and 4, each sample with its own steps: accurate to a tolerance, not to a budget.

    Cost: 6 calls a step, and 1. Order: 5, its interpolant's 4. Source: Dormand & Prince (1980); the controller is Gustafsson's
    (1991), with the constants of Hairer, Norsett & Wanner's DOPRI5.
    """

    order: ClassVar[int] = 5
    tableau: ClassVar[Tableau] = tableaus.DORMAND_PRINCE
    source: ClassVar[str] = "Dormand & Prince 1980"
    cost: ClassVar[str] = "6 a step, adaptive"


@dataclass(frozen=True)
class RK23(Adaptive):
    """Bogacki and Shampine's pair of orders 3 and 2, each sample with its own steps: for loose tolerances.

    Cost: 3 calls a step, and 1. Order: 3, its interpolant's 3. Source: Bogacki & Shampine (1989).
    """

    order: ClassVar[int] = 3
    tableau: ClassVar[Tableau] = tableaus.BOGACKI_SHAMPINE
    source: ClassVar[str] = "Bogacki & Shampine 1989"
    cost: ClassVar[str] = "3 a step, adaptive"


# ---------------------------------------------------------------------------------------------------------- the clock


class _Clock:
    """The clock `a = asinh(s / sigma)` over the given times of a process, float64 on the CPU."""

    def __init__(self, process: Process, times: Tensor):
        self.process, self.times = process, times
        s, sigma = (torch.broadcast_to(c, times.shape) for c in process.kernel(times))
        self.levels = torch.asinh(s / sigma)
        self.scales = torch.hypot(s, sigma)
        steps = self.levels.diff()
        if len(times) > 1 and not bool((steps * steps[0] > 0).all()):
            raise GridError(f"sigma / s of {process!r} is not monotone between the times of the grid")

    @property
    def sign(self) -> float:
        """+1 towards data, -1 towards noise."""
        return 1.0 if self.levels[-1] >= self.levels[0] else -1.0

    def time(self, a: Tensor) -> Tensor:
        """The time at which the clock shows `a`; the first and the last are met exactly."""
        t = self.process.t_of_lam(a - math.log(2.0) + torch.log(-torch.expm1(-2.0 * a)))
        t = t.clamp(min=float(self.times.min()), max=float(self.times.max()))
        t = torch.where(a == self.levels[0], self.times[0], t)
        return torch.where(a == self.levels[-1], self.times[-1], t)

    def read(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(t, sqrt(s^2 + sigma^2), tanh a)` at `a` (of any shape)."""

        def numbers(a: Tensor) -> Tensor:
            t = self.time(a)
            return torch.stack([t, torch.hypot(*self.process.kernel(t)), torch.tanh(a)])

        t, scale, tanh = evenly(numbers, a)
        return t, scale, tanh


class _Segment(NamedTuple):
    """A step of some samples as a polynomial: `u` between the clock's `a` and `a + width`."""

    rows: Tensor  # which samples, [b]
    a: Tensor
    width: Tensor
    terms: tuple[Tensor, ...]  # of the nested form, each [b, *shape]

    def at(self, some: Tensor, a: Tensor) -> Tensor:
        """`u` of the samples `some` (indices into `rows`) where their clocks show `a`."""
        like = self.terms[0]
        theta = ((a - self.a[some]) / self.width[some]).reshape(-1, *[1] * (like.ndim - 1))
        theta = theta.to(like.dtype).to(like.device)
        start, chord, *rest = (term.index_select(0, some.to(like.device)) for term in self.terms)
        bend, twist, *quartic = rest
        if quartic:
            twist = twist + (1 - theta) * quartic[0]
        return start + theta * (chord + (1 - theta) * (bend + theta * twist))


class Interpolant:
    """A dense solution of the probability-flow ODE: the state `[n, *shape]` at any time between the first and the last.

    Order 4 under `RK45`, 3 under `RK23`.

    Errors: `ValueError` for a time outside the solve.
    """

    def __init__(self, clock: _Clock, segments: Sequence[_Segment], n: int):
        self._clock, self._segments, self._n = clock, segments, n

    def __call__(self, t: float | Tensor) -> Tensor:
        times = torch.as_tensor(t, dtype=torch.float64, device="cpu").expand(self._n)
        low, high = float(self._clock.times.min()), float(self._clock.times.max())
        if not bool(((times >= low) & (times <= high)).all()):
            raise ValueError(f"this solve ran between t={low:g} and t={high:g}; got t={t}")
        s, sigma = self._clock.process.kernel(times)
        a, scale = torch.asinh(s / sigma), torch.hypot(s, sigma)
        like = self._segments[0].terms[0]
        out = like.new_zeros(self._n, *like.shape[1:])
        missing = torch.ones(self._n, dtype=torch.bool)
        for segment in self._segments:
            wanted, sign = a[segment.rows], self._clock.sign
            past, ahead = sign * (wanted - segment.a), sign * (segment.a + segment.width - wanted)
            within = (past >= -1e-12) & (ahead >= -1e-12)
            some = (within & missing[segment.rows]).nonzero().flatten()
            if len(some):
                rows = segment.rows[some]
                missing[rows] = False
                out = out.index_copy(0, rows.to(out.device), segment.at(some, wanted[some]))
        return out * _column(scale, out)


def _column(values: Tensor, like: Tensor) -> Tensor:
    """Float64 numbers `[..., b]` on the CPU, shaped to multiply `like` `[b, ...]`, where it is and as precise."""
    values = values.reshape(*values.shape, *[1] * (like.ndim - 1))
    return values.to(like.dtype).to(like.device)


def _first_bad(x: Tensor) -> int | None:
    """The first row that holds NaN or infinity."""
    finite = torch.isfinite(x).reshape(len(x), -1).all(1)
    return None if bool(finite.all()) else int((~finite).nonzero()[0])


def _combine(start: Tensor, weights: Sequence[float], increments: Sequence[Tensor]) -> Tensor:
    """`start + sum_i weight_i increment_i`, a new tensor."""
    terms = [(weight, increment) for weight, increment in zip(weights, increments, strict=True) if weight]
    total = torch.add(start, terms[0][1], alpha=terms[0][0])
    for weight, increment in terms[1:]:
        total.add_(increment, alpha=weight)
    return total


def _row_rms(values: Tensor) -> Tensor:
    """Root mean square of each row, `[b]`, float64 on the CPU.

    Halves are added to halves: a library's reduction may add in an order that depends on the size of the batch.
    """
    squares = values.reshape(len(values), -1) ** 2
    count = squares.shape[1]
    while (width := squares.shape[1]) > 1:
        half = width // 2
        odd = squares[:, 2 * half :]
        squares = torch.cat([squares[:, :half] + squares[:, half : 2 * half], odd], 1)
    return (squares[:, 0].cpu().double() / count).sqrt()


# ----------------------------------------------------------------------------------------------------------- the solve


class _Solve:
    """One solve under way: the samples that have not arrived, compacted, and those that have."""

    def __init__(
        self,
        solver: Adaptive,
        reverse: Reverse,
        x: Tensor,
        times: Tensor,
        finish: bool,
        record: bool,
        on_call: OnCall | None,
    ):
        self.solver, self.reverse, self.finish, self.on_call = solver, reverse, finish, on_call
        self.clock = _Clock(reverse.process, times)
        self.n, self.dtype = len(x), x.dtype
        working = torch.promote_types(x.dtype, torch.float32)
        self.u = x.to(working) * (1.0 / float(self.clock.scales[0]))
        self.rows = torch.arange(self.n)
        self.a = self.clock.levels[:1].repeat(self.n)
        # In the clock, whose natural unit is 1, this is a fair guess; a call spent on a better one is not won back.
        tolerance = max(solver.atol, solver.rtol)
        first = 0.4 * tolerance ** (1.0 / solver.tableau.order) if solver.first_step is None else solver.first_step
        self.h = torch.full((self.n,), first, dtype=torch.float64)
        # For each active sample: the error of its last accepted step, whether its last was refused, how many were not finite.
        self.before, self.refused, self.broken = [1e-4] * self.n, [False] * self.n, [0] * self.n
        self.calls = 0
        self.nfe, self.accepted, self.rejected = (torch.zeros(self.n, dtype=torch.int64) for _ in range(3))
        self.arrived: list[tuple[Tensor, Tensor, Tensor]] = []  # rows, u, x0
        self.segments: list[_Segment] = []
        self.trajectory = [x.to(working)] + [torch.zeros_like(self.u) for _ in times[1:]] if record else None
        self.seen: tuple[Tensor, Tensor] | None = None
        self.active = reverse.rows(self.rows, self.n)

    def run(self) -> Solution:
        if (bad := _first_bad(self.u)) is not None:
            raise NonFiniteError(f"the state of sample {bad} to start from holds NaN or infinity")
        steps = len(self.clock.times) > 1
        if steps or self.finish:
            t, scale, tanh = self.clock.read(self.a)
            self.x0 = self.ask(self.u, t, _column(scale, self.u))
            self.slope = self.x0 - _column(tanh, self.u) * self.u
            if (bad := _first_bad(self.slope)) is not None:
                self.fail_nonfinite(bad, self.a, 0.0)
        else:
            self.x0 = self.u
        while steps and len(self.rows):
            self.attempt()
        return self.solution()

    def ask(self, u: Tensor, t: Tensor, scale: Tensor) -> Tensor:
        """The prediction for the active samples, at a time for each of them."""
        if self.calls >= self.solver.max_nfe:
            self.fail_budget()
        x = u * scale
        x0 = self.active.ask(x, t).to(u.dtype)
        self.reverse.nfe += 1
        self.calls += 1
        self.nfe[self.rows] += 1
        if self.on_call is not None:
            self.watch(x, x0, t)
        return x0

    def attempt(self) -> None:
        """One step of every active sample, which each of them accepts or refuses."""
        if self.calls + self.solver.tableau.stages - 1 > self.solver.max_nfe:
            self.fail_budget()
        end = self.clock.levels[-1]
        rest = (end - self.a).abs()
        left = (rest / self.h - 1e-3).ceil().clamp(min=1.0)  # steps; the last two share the way between them
        step = torch.where(left <= 2, rest / left, self.h)
        a_next = torch.where(left <= 1, end, self.a + self.clock.sign * step)
        width = a_next - self.a
        increments, u, x0, slope = self.stages(width, a_next)
        ratios, h = self.error(increments, u).tolist(), []
        accept = [ratio <= 1.0 for ratio in ratios]
        for i, (ratio, length) in enumerate(zip(ratios, width.abs().tolist(), strict=True)):
            h.append(length * self.solver.factor(ratio, self.before[i], self.refused[i]))
            self.refused[i] = not accept[i]
            if accept[i]:
                self.before[i] = max(ratio, 1e-4)
                continue
            self.broken[i] += not (math.isfinite(ratio) or bool(torch.isfinite(slope[i]).all()))
            short = h[i] < self.solver.min_step
            if self.broken[i] >= 8 or (short and self.broken[i]):
                self.fail_nonfinite(i, a_next, length)
            if short:
                self.fail_stiff(i, h[i])
        self.h = torch.tensor(h, dtype=torch.float64)
        mask = torch.tensor(accept)
        self.accepted[self.rows] += mask
        self.rejected[self.rows] += ~mask
        if (self.trajectory is not None or self.solver.dense) and bool(mask.any()):
            self.interpolate(mask, width, increments, u)
        self.advance(mask, a_next, u, x0, slope)

    def stages(self, width: Tensor, a_next: Tensor) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """The increments `width k_i` of a step, and state, prediction and slope at its end, where the last stage stands."""
        tableau = self.solver.tableau
        nodes = torch.stack([a_next if c == 1.0 else self.a + c * width for c in tableau.c[1:]])
        t, scale, tanh = self.clock.read(nodes)
        *numbers, h = _column(torch.cat([scale, tanh, width.unsqueeze(0)]), self.u)
        u, x0, slope = self.u, self.x0, self.slope
        increments = [h * slope]
        for i, weights in enumerate(tableau.a[1:]):
            u = _combine(self.u, weights, increments)
            x0 = self.ask(u, t[i], numbers[i])
            slope = x0 - numbers[len(t) + i] * u
            increments.append(h * slope)
        return increments, u, x0, slope

    @torch.no_grad()
    def error(self, increments: list[Tensor], u: Tensor) -> Tensor:
        """The estimated error of a step over its tolerance, `[b]`, float64 on the CPU."""
        tableau = self.solver.tableau
        assert tableau.b_low is not None
        differences = [high - low for high, low in zip(tableau.b, tableau.b_low, strict=True)]
        error = _combine(torch.zeros_like(u), differences, increments)
        return _row_rms(error / torch.maximum(self.u.abs(), u.abs()).mul_(self.solver.rtol).add_(self.solver.atol))

    def interpolate(self, mask: Tensor, width: Tensor, increments: list[Tensor], u: Tensor) -> None:
        """Keep the accepted steps as polynomials, and read the levels within them."""
        some = mask.nonzero().flatten()
        first, last, start, end = (v[some.to(v.device)] for v in (increments[0], increments[-1], self.u, u))
        chord = end - start
        bend = first - chord
        terms = [start, chord, bend, chord - last - bend]
        if self.solver.tableau.dense is not None:
            whole = _combine(torch.zeros_like(u), self.solver.tableau.dense, increments)
            terms.append(whole[some.to(u.device)])
        segment = _Segment(self.rows[some], self.a[some], width[some], tuple(terms))
        if self.solver.dense:
            self.segments.append(segment)
        if self.trajectory is None:
            return
        sign = self.clock.sign
        for j in range(1, len(self.clock.levels) - 1):
            level = self.clock.levels[j]
            inside = (sign * (level - segment.a) > 0) & (sign * (level - segment.a - segment.width) <= 0)
            if bool(inside.any()):
                found = inside.nonzero().flatten()
                state = segment.at(found, level.expand(len(found))) * float(self.clock.scales[j])
                rows = segment.rows[found].to(state.device)
                self.trajectory[j] = self.trajectory[j].index_copy(0, rows, state)

    def advance(self, mask: Tensor, a_next: Tensor, u: Tensor, x0: Tensor, slope: Tensor) -> None:
        """Take the accepted steps, and put the samples that have arrived aside."""
        if not bool(mask.all()):
            where = mask.reshape(-1, *[1] * (u.ndim - 1)).to(u.device)
            u, x0, slope = (
                torch.where(where, new, old) for new, old in ((u, self.u), (x0, self.x0), (slope, self.slope))
            )
            a_next = torch.where(mask, a_next, self.a)
        self.u, self.x0, self.slope, self.a = u, x0, slope, a_next
        there = self.a == self.clock.levels[-1]
        if not bool(there.any()):
            return
        rows, stay = there.nonzero().flatten().to(u.device), (~there).nonzero().flatten()
        self.arrived.append((self.rows[there], self.u[rows], self.x0[rows]))
        on_device = stay.to(u.device)
        self.u, self.x0, self.slope = self.u[on_device], self.x0[on_device], self.slope[on_device]
        self.rows, self.a, self.h = self.rows[stay], self.a[stay], self.h[stay]
        keep = stay.tolist()
        self.before, self.refused, self.broken = (
            [values[i] for i in keep] for values in (self.before, self.refused, self.broken)
        )
        self.active = self.reverse.rows(self.rows, self.n)

    def watch(self, x: Tensor, x0: Tensor, t: Tensor) -> None:
        """Show a call to `on_call`, as a batch of all samples."""
        assert self.on_call is not None
        if self.seen is None:
            self.seen = (x.detach().clone(), x0.detach().clone())
        rows = self.rows.to(x.device)
        for whole, part in zip(self.seen, (x, x0), strict=True):
            whole.index_copy_(0, rows, part.detach())
        behind = int((self.clock.sign * self.a).argmin())
        level = self.reverse.process.level(float(t[behind]))
        self.on_call(self.calls - 1, Call(1, 0, level.t, level.s, level.sigma), *self.seen)

    # ---------------------------------------------------------------------------------------------- how a solve ends

    def gather(self) -> tuple[Tensor, Tensor]:
        """`u` and `x0` of all samples, in their order, wherever they are."""
        rows = torch.cat([part[0] for part in self.arrived] + [self.rows])
        order = rows.argsort().to(self.u.device)
        u = torch.cat([part[1] for part in self.arrived] + [self.u]).index_select(0, order)
        x0 = torch.cat([part[2] for part in self.arrived] + [self.x0]).index_select(0, order)
        return u, x0

    def statistics(self) -> dict[str, object]:
        return {
            "nfe": self.nfe,
            "accepted": self.accepted,
            "rejected": self.rejected,
        }

    def solution(self) -> Solution:
        u, x0 = self.gather()
        state = u * float(self.clock.scales[-1])
        result = (x0 if self.finish else state).to(self.dtype)
        trajectory = None
        if self.trajectory is not None:
            if len(self.clock.times) > 1:
                self.trajectory[-1] = state
            trajectory = torch.stack([*self.trajectory, x0] if self.finish else self.trajectory).to(self.dtype)
        interpolant = Interpolant(self.clock, self.segments, self.n) if self.segments else None
        return Solution(
            result, self.calls, self.calls, statistics=self.statistics(), trajectory=trajectory, interpolant=interpolant
        )

    def partial(self) -> Solution:
        """What was reached: every sample's state at its own time, `statistics["t"]`."""
        if not hasattr(self, "x0"):
            self.x0 = self.u
        u, _ = self.gather()
        a = self.clock.levels[-1:].repeat(self.n)
        a[self.rows] = self.a
        t, scale, _ = self.clock.read(a)
        statistics = {**self.statistics(), "t": t, "arrived": a == self.clock.levels[-1]}
        return Solution((u * _column(scale, u)).to(self.dtype), self.calls, self.calls, statistics=statistics)

    def fail_budget(self) -> None:
        behind = int((self.clock.sign * self.a).argmin())
        error = SolverError(
            f"{type(self.solver).__name__} spent {self.calls} of max_nfe={self.solver.max_nfe} network calls with {len(self.rows)} "
            f"of {self.n} samples under way; sample {int(self.rows[behind])} is farthest behind, at {self.where(behind)}. "
            "Raise max_nfe, loosen rtol and atol, or take a solver with a fixed grid. error.partial holds what was reached"
        )
        error.partial = self.partial()
        raise error

    def fail_stiff(self, i: int, h: float) -> None:
        error = SolverError(
            f"{type(self.solver).__name__} cannot meet rtol={self.solver.rtol:g}, atol={self.solver.atol:g} for sample "
            f"{int(self.rows[i])}: at {self.where(i)} its step fell to {h:.3g}, below min_step={self.solver.min_step:g}. "
            "The state is finite: the network jumps there, or its rounding is coarser than the tolerance. Loosen the "
            "tolerances, compute in a wider dtype, or lower min_step. error.partial holds what was reached"
        )
        error.partial = self.partial()
        raise error

    def fail_nonfinite(self, i: int, a: Tensor, width: float) -> None:
        between = f" (a step of {abs(width):.3g} to t={float(self.clock.time(a[i])):.6g})" if width else ""
        error = NonFiniteError(
            f"the network returned NaN or infinity for sample {int(self.rows[i])} at {self.where(i)}{between}, though the state "
            "there is finite. error.partial holds what was reached"
        )
        error.partial = self.partial()
        raise error

    def where(self, i: int) -> str:
        return f"t={float(self.clock.time(self.a[i])):.6g} (h={float(self.h[i]):.3g} in asinh(s / sigma))"
