"""Step-size control for every sample of a batch: what adaptive solvers share.

A solve runs over a clock, from one value to another, towards data or towards noise. Every sample
has its own value and its own step. Samples that have finished leave the batch, so that a network
call holds only samples under way, and the steps of a row do not depend on its batch. A subclass of
`PerSampleSolve` has the state and the step. The bookkeeping, the budget and the errors are here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from sdeflow._utils.checks import whole_number
from sdeflow.errors import BudgetError, NonFiniteError, SolverError
from sdeflow.plan.instructions import Call
from sdeflow.process.clock import ClockRange
from sdeflow.solvers.base import Solution, Solver, Task, check_levels


@dataclass(frozen=True)
class StepSize:
    """A controller of step sizes: tolerances, bounds, and the rule for the next step. A value.

    After an accepted step `h_next = h clip(safety ratio^(0.75 beta - exponent) ratio_before^beta,
    shrink, grow)`, after a refused one `h_next = h clip(safety ratio^-exponent, shrink, 0.9)`.
    `ratio` is the error of the step over its tolerance; a step is accepted where it is at most 1.

    - `rtol`, `atol`: tolerances of a step, relative to the state and absolute.
    - `max_nfe`: network calls that a sample may take.
    - `min_step`, `first_step`, `max_step`: lengths of steps in the clock of the method, positive.
      A `first_step` of None leaves it to the method.
    - `safety`: in (0, 1]. `shrink` and `grow`: the smallest and the largest factor, below 1 and
      from 1 up. An error of zero grows the step by `grow`; one that is not finite shrinks it by
      `shrink`, or to a tenth.
    - `exponent`: in (0, 1]; None is `1 / order` of the method. `beta`: from 0 to below the
      exponent, the weight of the error of the last accepted step.
    - `hold`: whether the step after a refused one may not grow.

    Errors: `ValueError` for values outside of these ranges.

    Source: Gustafsson (1991) for `beta`; Hairer, Norsett & Wanner, "Solving ordinary differential
    equations I" (1993), section II.4.
    """

    rtol: float = 1e-3
    atol: float = 1e-3
    max_nfe: int = 10_000
    min_step: float = 1e-7
    first_step: float | None = None
    max_step: float = field(default=math.inf, kw_only=True)
    safety: float = field(default=0.9, kw_only=True)
    shrink: float = field(default=0.1, kw_only=True)
    grow: float = field(default=10.0, kw_only=True)
    exponent: float | None = field(default=None, kw_only=True)
    beta: float = field(default=0.0, kw_only=True)
    hold: bool = field(default=False, kw_only=True)

    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not (0 <= self.rtol < math.inf and 0 < self.atol < math.inf):
            raise ValueError(
                f"tolerances are positive numbers, such as 1e-3; got rtol={self.rtol},"
                f" atol={self.atol}"
            )
        whole_number("max_nfe", self.max_nfe, of="network calls a sample")
        first = 1.0 if self.first_step is None else self.first_step
        if not (self.min_step > 0 and first > 0 and self.max_step > 0):
            raise ValueError(
                f"steps are positive; got min_step={self.min_step}, first_step={self.first_step},"
                f" max_step={self.max_step}"
            )
        if not (
            0 < self.safety <= 1
            and 0 < self.shrink < 1 <= self.grow
            and 0 <= self.beta < self.rate <= 1
        ):
            raise ValueError(
                "the controller needs 0 < safety <= 1, 0 < shrink < 1 <= grow, 0 < exponent <= 1"
                f" and 0 <= beta < exponent; got safety={self.safety}, shrink={self.shrink},"
                f" grow={self.grow}, exponent={self.rate}, beta={self.beta}"
            )

    @property
    def rate(self) -> float:
        """`exponent`, or `1 / order` where it is None."""
        return 1.0 / self.order if self.exponent is None else self.exponent

    def factor(self, ratio: float, before: float = 1.0, after_rejection: bool = False) -> float:
        """The length of the next step over that of a step whose error was `ratio` times the
        tolerance.

        `before` is the ratio of the last accepted step, at least 1e-4.
        """
        if not math.isfinite(ratio):
            return min(0.1, self.shrink)
        if (
            ratio > 1.0
        ):  # a step that keeps its noise must become shorter, or it is refused for ever
            return min(max(self.safety * ratio**-self.rate, self.shrink), 0.9)
        power = 0.75 * self.beta - self.rate
        wish = self.safety * max(ratio, 1e-10) ** power * before**self.beta
        return min(max(wish, self.shrink), 1.0 if self.hold and after_rejection else self.grow)


@dataclass(frozen=True)
class PerSample(StepSize, Solver):
    """A solver whose samples each choose their own steps; its subclasses have the method.

    It has the fields of `StepSize`.
    """

    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        StepSize.__post_init__(self)
        Solver.__post_init__(self)

    def levels(self, nfe: int, *, finish: bool = True) -> int:
        raise BudgetError(
            f"{type(self).__name__} is adaptive: it takes max_nfe, a bound, not nfe; say how"
            " accurate with rtol= and atol=, or take a solver with a fixed grid, such as 'heun',"
            " for an exact budget"
        )

    def _solve(self, task: Task) -> Solution:
        check_levels(task.reverse.prepare(task.times), task.reverse.process)
        return self.begin(task).run()

    @abstractmethod
    def begin(self, task: Task) -> PerSampleSolve:
        """A solve, ready to run."""


class PerSampleSolve(ABC):
    """One solve under way: the samples that have not finished, compacted, and those that have.

    `carried` names the attributes with a row for each active sample (tensors, or lists). `results`
    are those of them that are kept of the samples that have finished.
    """

    carried: ClassVar[tuple[str, ...]]
    results: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        solver: PerSample,
        task: Task,
        clock: ClockRange,
        first_step: float,
        span: tuple[float, float] | None = None,
    ):
        """`span` is the first and the last value of the clock, where they are not its own."""
        self.solver, self.clock, self.times = solver, clock, task.times
        self.reverse, self.finish, self.on_call = task.reverse, task.finish, task.on_call
        self.n, self.dtype = len(task.x), task.x.dtype
        if (bad := first_bad(task.x)) is not None:
            raise NonFiniteError(f"the state of sample {bad} to start from holds NaN or infinity")
        self.start = task.x.to(torch.promote_types(self.dtype, torch.float32))
        self.trajectory = (
            [self.start] + [torch.zeros_like(self.start) for _ in self.times[1:]]
            if task.record
            else None
        )
        begin, self.end = span or (float(clock.levels[0]), float(clock.levels[-1]))
        self.sign = 1.0 if self.end >= begin else -1.0
        first = min(first_step if solver.first_step is None else solver.first_step, solver.max_step)
        self.calls, self.forwards_before = 0, self.reverse.forwards
        self.nfe, self.accepted, self.rejected = (
            torch.zeros(self.n, dtype=torch.int64) for _ in range(3)
        )
        self.seen: tuple[Tensor, Tensor] | None = None
        self.set_out(begin, torch.full((self.n,), first, dtype=torch.float64))

    def set_out(self, begin: float, steps: Tensor) -> None:
        """All samples are active, where the clock has the value `begin`, each with its step."""
        n = self.n
        self.rows, self.h = torch.arange(n), steps
        self.a = torch.full((n,), begin, dtype=torch.float64)
        # For each active sample: the error of its last accepted step, whether its last was refused,
        # how many were not finite.
        self.before, self.refused, self.broken = [1e-4] * n, [False] * n, [0] * n
        self.finished: list[tuple[Tensor, dict[str, Tensor]]] = []
        self.active = self.reverse.rows(self.rows, n)

    @abstractmethod
    def run(self) -> Solution:
        """Solve."""

    def current_states(self) -> Tensor:
        """The states of all samples, in their order, each at its own time: for `error.partial`."""
        return self.gather("x").to(self.dtype)

    # --------------------------------------------------------------------------------------- a step

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        """The prediction for the active samples, at a time for each of them; counted."""
        self.check_budget(1)
        x0 = self.active.ask(x, t).to(x.dtype)
        self.calls += 1
        self.nfe[self.rows] += 1
        if self.on_call is not None:
            self.watch(x, x0, t)
        return x0

    @property
    def forwards(self) -> int:
        """Forwards of networks in this solve."""
        return self.reverse.forwards - self.forwards_before

    def check_budget(self, calls: int) -> None:
        """Fail unless `calls` more calls can be made.

        An attempt that cannot be completed is not begun.
        """
        if self.calls + calls <= self.solver.max_nfe:
            return
        behind = int((self.sign * self.a).argmin())
        self.fail(
            SolverError,
            f"{type(self.solver).__name__} spent {self.calls} of max_nfe={self.solver.max_nfe}"
            f" network calls with {len(self.rows)} of {self.n} samples under way; sample"
            f" {int(self.rows[behind])} is farthest behind, at {self.where(behind)}. Raise max_nfe,"
            " loosen rtol and atol, or take a solver with a fixed grid",
        )

    def propose(self) -> Tensor:
        """The value of the clock after the step that each active sample tries next.

        The end is met exactly.
        """
        rest = (self.end - self.a).abs()
        left = (
            (rest / self.h - 1e-3).ceil().clamp(min=1.0)
        )  # steps; the last two share the way between them
        step = torch.where(left <= 2, rest / left, self.h)
        return torch.where(left <= 1, self.end, self.a + self.sign * step)

    def judge(
        self, ratios: Tensor, a_next: Tensor, shown: Tensor, some: Tensor | None = None
    ) -> Tensor:
        """Which of the active samples `some` (else all) accept the step to `a_next` whose errors
        were `ratios` times the tolerance.

        `a_next` and `shown`, what the network returned there, have a row for each active sample.
        Sets the next steps. Fails where they are too short: as broken where `shown` is not finite,
        else as stiff.
        """
        some = torch.arange(len(self.rows)) if some is None else some
        lengths, errors, h = (a_next - self.a).abs().tolist(), ratios.tolist(), self.h.tolist()
        for i, ratio in zip(some.tolist(), errors, strict=True):
            factor = self.solver.factor(ratio, self.before[i], self.refused[i])
            h[i] = min(lengths[i] * factor, self.solver.max_step)
            self.refused[i] = not ratio <= 1.0
            if ratio <= 1.0:
                self.before[i] = max(ratio, 1e-4)
                continue
            self.broken[i] += not (math.isfinite(ratio) or bool(torch.isfinite(shown[i]).all()))
            short = h[i] < self.solver.min_step
            if self.broken[i] >= 8 or (short and self.broken[i]):
                self.fail_nonfinite(i, a_next, lengths[i])
            if short:
                self.fail_stiff(i, h[i])
        self.h = torch.tensor(h, dtype=torch.float64)
        mask = torch.tensor([ratio <= 1.0 for ratio in errors], dtype=torch.bool)
        self.accepted[self.rows[some]] += mask
        self.rejected[self.rows[some]] += ~mask
        return mask

    @torch.no_grad()
    def error_ratios(self, error: Tensor, u: Tensor, other: Tensor) -> Tensor:
        """Root mean square of `error / max(atol, rtol max(|u|, |other|))` over each row, `[b]`,
        float64 on the CPU.
        """
        largest = torch.maximum(u.abs(), other.abs())
        return row_rms(error / largest.mul_(self.solver.rtol).clamp_(min=self.solver.atol))

    def advance(self, mask: Tensor, a_next: Tensor, new: Mapping[str, Tensor]) -> None:
        """Take the accepted steps, `new` by name, and put the samples that have finished aside."""
        all_of_them = bool(mask.all())
        for name, value in new.items():
            if not all_of_them:
                where = mask.reshape(-1, *[1] * (value.ndim - 1)).to(value.device)
                value = torch.where(where, value, getattr(self, name))
            setattr(self, name, value)
        self.a = a_next if all_of_them else torch.where(mask, a_next, self.a)
        self.retire(self.a == self.end)

    def retire(self, done: Tensor) -> None:
        """Put the active samples that are `done` aside."""
        if not bool(done.any()):
            return
        rows, stay = done.nonzero().flatten(), (~done).nonzero().flatten()
        self.finished.append(
            (self.rows[done], {name: take(getattr(self, name), rows) for name in self.results})
        )
        for name in ("rows", "a", "h", "before", "refused", "broken", *self.carried):
            setattr(self, name, take(getattr(self, name), stay))
        self.active = self.reverse.rows(self.rows, self.n)

    def watch(self, x: Tensor, x0: Tensor, t: Tensor) -> None:
        """Show a call to `on_call`, as a batch of all samples."""
        assert self.on_call is not None
        if self.seen is None:
            self.seen = (x.detach().clone(), x0.detach().clone())
        rows = self.rows.to(x.device)
        # New tensors, which `on_call` may keep.
        seen_x, seen_x0 = self.seen
        self.seen = (
            seen_x.index_copy(0, rows, x.detach()),
            seen_x0.index_copy(0, rows, x0.detach()),
        )
        behind = int((self.sign * self.a).argmin())
        level = self.reverse.process.level(float(t[behind]))
        self.on_call(self.calls - 1, Call(1, 0, level.t, level.s, level.sigma), *self.seen)

    # ----------------------------------------------------------------------------- how a solve ends

    def gather(self, name: str) -> Tensor:
        """One of `results` of all samples, in their order, wherever they are."""
        rows = torch.cat([part for part, _ in self.finished] + [self.rows])
        values = torch.cat([part[name] for _, part in self.finished] + [getattr(self, name)])
        return values.index_select(0, rows.argsort().to(values.device))

    def readings(self) -> Tensor:
        """The value of the clock of every sample."""
        a = torch.full((self.n,), self.end, dtype=torch.float64)
        a[self.rows] = self.a
        return a

    def statistics(self) -> dict[str, Any]:
        return {"nfe": self.nfe, "accepted": self.accepted, "rejected": self.rejected}

    def solution(self, state: Tensor, x0: Tensor, interpolant: Any = None) -> Solution:
        """The solution, by the states at the last level and, if asked for, the step to zero
        noise `x0`.
        """
        trajectory = None
        if self.trajectory is not None:
            if len(self.times) > 1:
                self.trajectory[-1] = state
            parts = [*self.trajectory, x0] if self.finish else self.trajectory
            trajectory = torch.stack(parts).to(self.dtype)
        return Solution(
            (x0 if self.finish else state).to(self.dtype),
            self.calls,
            self.forwards,
            statistics=self.statistics(),
            trajectory=trajectory,
            interpolant=interpolant,
        )

    def fail(self, kind: type[SolverError | NonFiniteError], reason: str) -> NoReturn:
        """Raise an error that holds every sample's state at its own time, `statistics["t"]`."""
        a = self.readings()
        statistics = {**self.statistics(), "t": self.clock.time(a), "arrived": a == self.end}
        error = kind(f"{reason}. error.partial holds what was reached")
        error.partial = Solution(
            self.current_states(), self.calls, self.forwards, statistics=statistics
        )
        raise error

    def fail_stiff(self, i: int, h: float) -> None:
        self.fail(
            SolverError,
            f"{type(self.solver).__name__} cannot meet rtol={self.solver.rtol:g},"
            f" atol={self.solver.atol:g} for sample {int(self.rows[i])}: at {self.where(i)} its"
            f" step fell to {h:.3g}, below min_step={self.solver.min_step:g}. The state is finite:"
            " the network jumps there, or its rounding is coarser than the tolerance. Loosen the"
            " tolerances, compute in a wider dtype, or lower min_step",
        )

    def fail_nonfinite(self, i: int, a: Tensor, width: float) -> None:
        time = f"{float(self.clock.time(a[i])):.6g}"
        between = f" (a step of {abs(width):.3g} to t={time})" if width else ""
        self.fail(
            NonFiniteError,
            f"the network returned NaN or infinity for sample {int(self.rows[i])} at"
            f" {self.where(i)}{between}, though the state there is finite",
        )

    def where(self, i: int) -> str:
        name = self.clock.clock.name
        name = "asinh(s / sigma)" if name == "asinh" else name
        return f"t={float(self.clock.time(self.a[i])):.6g} (h={float(self.h[i]):.3g} in {name})"


def take(values: Any, some: Tensor) -> Any:
    """The rows `some` of a tensor, wherever it is, or of a list."""
    return (
        values[some.to(values.device)]
        if isinstance(values, Tensor)
        else [values[i] for i in some.tolist()]
    )


def column(values: Tensor, like: Tensor) -> Tensor:
    """Float64 numbers `[..., b]` on the CPU, shaped to multiply `like` `[b, ...]`, where it is and
    as precise.
    """
    values = values.reshape(*values.shape, *[1] * (like.ndim - 1))
    return values.to(like.dtype).to(like.device)


def first_bad(x: Tensor) -> int | None:
    """The first row that holds NaN or infinity."""
    finite = torch.isfinite(x).reshape(len(x), -1).all(1)
    return None if bool(finite.all()) else int((~finite).nonzero()[0])


def combine(start: Tensor, weights: Sequence[float], increments: Sequence[Tensor]) -> Tensor:
    """`start + sum_i weight_i increment_i`, a new tensor."""
    terms = [
        (weight, increment) for weight, increment in zip(weights, increments, strict=True) if weight
    ]
    total = torch.add(start, terms[0][1], alpha=terms[0][0])
    for weight, increment in terms[1:]:
        total.add_(increment, alpha=weight)
    return total


def row_rms(values: Tensor) -> Tensor:
    """Root mean square of each row, `[b]`, float64 on the CPU.

    Halves are added to halves: a library's reduction may add in an order that depends on the size
    of the batch.
    """
    squares = values.reshape(len(values), -1) ** 2
    count = squares.shape[1]
    while (width := squares.shape[1]) > 1:
        half = width // 2
        odd = squares[:, 2 * half :]
        squares = torch.cat([squares[:, :half] + squares[:, half : 2 * half], odd], 1)
    return (squares[:, 0].cpu().double() / count).sqrt()
