r"""Adaptive Runge-Kutta methods on the probability-flow ODE, with a step size for every sample.

The ODE is integrated in the clock and the state

$$a = \operatorname{asinh}\frac{s}{\sigma}, \qquad u = \frac{x}{\sqrt{s^2 + \sigma^2}}, \qquad
\frac{du}{da} = x_0 - \tanh(a)\,u .$$

*Derivation.* With $\theta = \operatorname{atan2}(\sigma, s)$,
$u = \cos\theta\,x_0 + \sin\theta\,\varepsilon$ and
$du/d\theta = \cos\theta\,\varepsilon - \sin\theta\,x_0 = (\cos\theta\,u - x_0)/\sin\theta$. From
$\cot\theta = \sinh a$ follow $\cos\theta = \tanh a$ and $da = -d\theta/\sin\theta$.

The clock is 0 where no signal is left (rectified flow at t = 1). There the posterior of $x_0$ is a
smooth function of $s/\sigma = \sinh a$. At small noise the clock grows like the log of $s/\sigma$,
so that no scale of the data is stepped over. The right-hand side has no derivative of the process,
and nothing in it cancels. `u` has the scale of the data or of the noise, whichever is larger. The
tolerances are in units of `u`, which end as units of the data. Under every process it is the same
ODE, so that a network costs the same number of calls under each of them.

`benchmarks/accuracy/rk45_tolerance.py` measures it against torchdiffeq.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sdeflow.process.clock import Clock, ClockRange
from sdeflow.solvers.adaptive.step_size import (
    PerSample,
    PerSampleSolve,
    column,
    combine,
    first_bad,
    row_rms,
)
from sdeflow.solvers.base import Solution, Task
from sdeflow.solvers.ode import tableaus
from sdeflow.solvers.ode.tableaus import Tableau


@dataclass(frozen=True)
class Adaptive(PerSample):
    """An embedded Runge-Kutta pair with error control and step size per sample; its subclasses name
    a tableau.

    A step is accepted where the root mean square of `error / (atol + rtol max(|u|, |u_next|))`,
    over the sample's entries, is at most 1.

    - `rtol`, `atol`: tolerances of a step, in units of `u = x / sqrt(s^2 + sigma^2)`. The error of
      the result is a few times that.
    - `max_nfe`: network calls that a sample may take. `min_step`, `first_step`, `max_step`: in the
      clock `a`, which runs over 5 to 10.
    - `dense`: keep the interpolant (`Solution.interpolant(t)`), at the price of five states a step.
    - `safety`, `shrink`, `grow`, `exponent`, `beta`, `hold`: of the controller, see `StepSize`.

    Rows do not depend on their batch: not in their steps, nor, where the network is exact row by
    row, in a single bit. Every network call holds only the samples that have not finished.
    `Solution.nfe` counts the calls of the sample that took most, which is the number of forwards.
    `Solution.statistics` has `nfe`, `accepted` and `rejected` for each sample. The slope at the end
    of the last step holds the prediction at the last level, so that `finish` costs no call. Levels
    between the first and the last time are read off the interpolant and shorten no step. `on_call`
    sees the whole batch, with the time of the sample that is farthest behind. Samples that are not
    in the call appear as they were in their last one.

    Gradients flow through the states. Step sizes are constants to them.

    Errors: `SolverError` where a step falls below `min_step` or `max_nfe` is spent,
    `NonFiniteError` where the network returns NaN. Both say where and for which sample, and hold
    what was reached as `error.partial`.
    """

    dense: bool = False
    shrink: float = field(default=0.2, kw_only=True)
    beta: float = field(default=0.04, kw_only=True)
    hold: bool = field(default=True, kw_only=True)

    tableau: ClassVar[Tableau]

    def begin(self, task: Task) -> PerSampleSolve:
        return _Solve(self, task)


@dataclass(frozen=True)
class RK45(Adaptive):
    """Dormand and Prince's pair of orders 5 and 4, each sample with its own steps: accurate to a
    tolerance, not to a budget.

    Cost: 6 calls a step, and 1. Order: 5, its interpolant's 4. Source: Dormand & Prince (1980); the
    controller is Gustafsson's (1991), with the constants of Hairer, Norsett & Wanner's DOPRI5.
    """

    order: ClassVar[int] = 5
    tableau: ClassVar[Tableau] = tableaus.DORMAND_PRINCE
    source: ClassVar[str] = "Dormand & Prince 1980"
    cost: ClassVar[str] = "6 a step, adaptive"


@dataclass(frozen=True)
class RK23(Adaptive):
    """Bogacki and Shampine's pair of orders 3 and 2, each sample with its own steps: for loose
    tolerances.

    Cost: 3 calls a step, and 1. Order: 3, its interpolant's 3. Source: Bogacki & Shampine (1989).
    """

    order: ClassVar[int] = 3
    tableau: ClassVar[Tableau] = tableaus.BOGACKI_SHAMPINE
    source: ClassVar[str] = "Bogacki & Shampine 1989"
    cost: ClassVar[str] = "3 a step, adaptive"


class _Segment(NamedTuple):
    """A step of some samples as a polynomial: `u` from the clock's `a` to `a + width`."""

    rows: Tensor  # which samples, [b]
    a: Tensor
    width: Tensor
    terms: tuple[Tensor, ...]  # of the nested form, each [b, *shape]

    def at(self, some: Tensor, a: Tensor) -> Tensor:
        """`u` of the samples `some` (indices into `rows`) where the clock is at `a`."""
        like = self.terms[0]
        theta = ((a - self.a[some]) / self.width[some]).reshape(-1, *[1] * (like.ndim - 1))
        theta = theta.to(like.dtype).to(like.device)
        start, chord, *rest = (term.index_select(0, some.to(like.device)) for term in self.terms)
        bend, twist, *quartic = rest
        if quartic:
            twist = twist + (1 - theta) * quartic[0]
        return start + theta * (chord + (1 - theta) * (bend + theta * twist))


class Interpolant:
    """A dense solution of the probability-flow ODE: the state `[n, *shape]` at any time between the
    first and the last.

    Order 4 under `RK45`, 3 under `RK23`.

    Errors: `ValueError` for a time outside the solve.
    """

    def __init__(self, clock: ClockRange, segments: Sequence[_Segment], n: int):
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
        return out * column(scale, out)


# ---------------------------------------------------------------------------------------- the solve


class _Solve(PerSampleSolve):
    """One solve under way."""

    carried = ("u", "x0", "slope")
    results = ("u", "x0")
    solver: Adaptive
    slope: Tensor

    def __init__(self, solver: Adaptive, task: Task):
        clock = ClockRange(Clock("asinh"), task.reverse.process, task.times)
        # A fair guess, as the natural unit of the clock is 1. A call for a better one is not
        # saved later.
        first = 0.4 * max(solver.atol, solver.rtol) ** (1.0 / solver.tableau.order)
        super().__init__(solver, task, clock, first)
        self.scales = torch.hypot(*clock.process.kernel(self.times))
        self.u = self.start * (1.0 / float(self.scales[0]))
        self.x0 = self.u  # until the first prediction
        self.segments: list[_Segment] = []

    def read(self, a: Tensor) -> tuple[Tensor, ...]:
        """`(t, sqrt(s^2 + sigma^2), tanh a)` where the clock is at `a` (of any shape)."""
        return self.clock.read(a, lambda a, t, s, sigma: (t, torch.hypot(s, sigma), torch.tanh(a)))

    def run(self) -> Solution:
        steps = len(self.times) > 1
        if steps or self.finish:
            t, scale, tanh = self.read(self.a)
            self.x0 = self.predict(self.u * column(scale, self.u), t)
            self.slope = self.x0 - column(tanh, self.u) * self.u
            if (bad := first_bad(self.slope)) is not None:
                self.fail_nonfinite(bad, self.a, 0.0)
        while steps and len(self.rows):
            self.attempt()
        state = self.gather("u") * float(self.scales[-1])
        interpolant = Interpolant(self.clock, self.segments, self.n) if self.segments else None
        return self.solution(state, self.gather("x0"), interpolant)

    def attempt(self) -> None:
        """One step of every active sample, which each of them accepts or rejects."""
        self.check_budget(self.solver.tableau.stages - 1)
        a_next = self.propose()
        width = a_next - self.a
        increments, u, x0, slope = self.stages(width, a_next)
        mask = self.judge(self.error(increments, u), a_next, slope)
        if (self.trajectory is not None or self.solver.dense) and bool(mask.any()):
            self.interpolate(mask, width, increments, u)
        self.advance(mask, a_next, {"u": u, "x0": x0, "slope": slope})

    def stages(self, width: Tensor, a_next: Tensor) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """The increments `width k_i` of a step, and state, prediction and slope at its end, where
        the last stage is.
        """
        tableau = self.solver.tableau
        nodes = torch.stack([a_next if c == 1.0 else self.a + c * width for c in tableau.c[1:]])
        t, scale, tanh = self.read(nodes)
        *numbers, h = column(torch.cat([scale, tanh, width.unsqueeze(0)]), self.u)
        u, x0, slope = self.u, self.x0, self.slope
        increments = [h * slope]
        for i, weights in enumerate(tableau.a[1:]):
            u = combine(self.u, weights, increments)
            x0 = self.predict(u * numbers[i], t[i])
            slope = x0 - numbers[len(t) + i] * u
            increments.append(h * slope)
        return increments, u, x0, slope

    @torch.no_grad()
    def error(self, increments: list[Tensor], u: Tensor) -> Tensor:
        """The estimated error of a step over its tolerance, `[b]`, float64 on the CPU."""
        tableau = self.solver.tableau
        assert tableau.b_low is not None
        differences = [high - low for high, low in zip(tableau.b, tableau.b_low, strict=True)]
        error = combine(torch.zeros_like(u), differences, increments)
        return row_rms(
            error
            / torch.maximum(self.u.abs(), u.abs()).mul_(self.solver.rtol).add_(self.solver.atol)
        )

    def interpolate(self, mask: Tensor, width: Tensor, increments: list[Tensor], u: Tensor) -> None:
        """Keep the accepted steps as polynomials, and read the levels within them."""
        some = mask.nonzero().flatten()
        first, last, start, end = (
            v[some.to(v.device)] for v in (increments[0], increments[-1], self.u, u)
        )
        chord = end - start
        bend = first - chord
        terms = [start, chord, bend, chord - last - bend]
        if self.solver.tableau.dense is not None:
            whole = combine(torch.zeros_like(u), self.solver.tableau.dense, increments)
            terms.append(whole[some.to(u.device)])
        segment = _Segment(self.rows[some], self.a[some], width[some], tuple(terms))
        if self.solver.dense:
            self.segments.append(segment)
        if self.trajectory is None:
            return
        sign = self.clock.sign
        for j in range(1, len(self.clock.levels) - 1):
            level = self.clock.levels[j]
            inside = (sign * (level - segment.a) > 0) & (
                sign * (level - segment.a - segment.width) <= 0
            )
            if bool(inside.any()):
                found = inside.nonzero().flatten()
                state = segment.at(found, level.expand(len(found))) * float(self.scales[j])
                rows = segment.rows[found].to(state.device)
                self.trajectory[j] = self.trajectory[j].index_copy(0, rows, state)

    def current_states(self) -> Tensor:
        u = self.gather("u")
        _, scale, _ = self.read(self.readings())
        return (u * column(scale, u)).to(self.dtype)
