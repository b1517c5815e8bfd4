"""Step-size control for every sample of a batch: what solvers that choose their own steps have in
common.

A solve runs over a clock, from one reading to another, towards data or towards noise. Every sample
has its own reading and its own step; those that have arrived leave the batch, so that a network
call holds only samples under way, and a row's steps do not depend on its batch. A subclass of
`PerSampleSolve` has the state and the step; here are the bookkeeping, the budget and the errors.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sdeflow.errors import BudgetError, NonFiniteError, SolverError
from sdeflow.plan.execute import OnCall
from sdeflow.plan.instructions import Call
from sdeflow.reverse import Reverse
from sdeflow.solvers.base import Solution, Solver


@dataclass(frozen=True)
class PerSample(Solver):
    """A solver whose samples each choose their own steps; its subclasses have the method.

    - `rtol`, `atol`: tolerances of a step.
    - `max_nfe`: network calls that a sample may take. `min_step`, `first_step`: in the clock of the
      method.
    """

    rtol: float = 1e-3
    atol: float = 1e-3
    max_nfe: int = 10_000
    min_step: float = 1e-7
    first_step: float | None = None

    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (0 <= self.rtol < math.inf and 0 < self.atol < math.inf):
            raise ValueError(
                f"tolerances are positive numbers, such as 1e-3; got rtol={self.rtol},"
                f" atol={self.atol}"
            )
        if isinstance(self.max_nfe, bool) or not isinstance(self.max_nfe, int) or self.max_nfe < 1:
            raise ValueError(
                "max_nfe is a whole number of network calls a sample, at least 1; got"
                f" {self.max_nfe!r}"
            )
        if not (self.min_step > 0 and (self.first_step is None or self.first_step > 0)):
            raise ValueError(
                f"steps are positive; got min_step={self.min_step}, first_step={self.first_step}"
            )

    def levels(self, nfe: int, *, finish: bool = True) -> int:
        raise BudgetError(
            f"{type(self).__name__} is adaptive: it takes max_nfe, a bound, not nfe; say how"
            " accurate with rtol= and atol=, or take a solver with a fixed grid, such as 'heun',"
            " for an exact budget"
        )

    @abstractmethod
    def factor(self, ratio: float, before: float, after_rejection: bool) -> float:
        """By how much the next step is longer than one whose error was `ratio` times the tolerance.

        `before` is the ratio of the last accepted step, at least 1e-4.
        """


class PerSampleSolve:
    """One solve under way: the samples that have not arrived, compacted, and those that have.

    `carried` names the attributes with a row for each active sample (tensors, or lists), `results`
    those of them that are kept of the samples that have arrived.
    """

    carried: ClassVar[tuple[str, ...]]
    results: ClassVar[tuple[str, ...]]
    clock_name: ClassVar[str]

    def __init__(
        self,
        solver: PerSample,
        reverse: Reverse,
        n: int,
        a: float,
        end: float,
        first: float,
        on_call: OnCall | None,
    ):
        self.solver, self.reverse, self.on_call, self.n, self.end = solver, reverse, on_call, n, end
        self.sign = 1.0 if end >= a else -1.0
        self.rows = torch.arange(n)
        self.a = torch.full((n,), a, dtype=torch.float64)
        self.h = torch.full((n,), first, dtype=torch.float64)
        # For each active sample: the error of its last accepted step, whether its last was refused,
        # how many were not finite.
        self.before, self.refused, self.broken = [1e-4] * n, [False] * n, [0] * n
        self.calls, self.forwards_before = 0, reverse.forwards
        self.nfe, self.accepted, self.rejected = (
            torch.zeros(n, dtype=torch.int64) for _ in range(3)
        )
        self.arrived: list[tuple[Tensor, dict[str, Tensor]]] = []
        self.seen: tuple[Tensor, Tensor] | None = None
        self.active = reverse.rows(self.rows, n)

    def time(self, a: Tensor) -> Tensor:
        """The time at which the clock shows `a`."""
        raise NotImplementedError

    def reached(self) -> Tensor:
        """The states of all samples, in their order, each at its own time: for `error.partial`."""
        raise NotImplementedError

    # --------------------------------------------------------------------------------------- a step

    def ask(self, x: Tensor, t: Tensor) -> Tensor:
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
        """Whether so many more calls can be made; an attempt that cannot be completed is not
        begun.
        """
        if self.calls + calls > self.solver.max_nfe:
            self.fail_budget()

    def propose(self) -> Tensor:
        """Where the clock will stand after the step that each active sample tries next; the end is
        met exactly.
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
        Sets the next steps, or fails where they are too short: as stiff or as broken, according to
        whether `shown` is finite.
        """
        some = torch.arange(len(self.rows)) if some is None else some
        lengths, errors, h = (a_next - self.a).abs().tolist(), ratios.tolist(), self.h.tolist()
        for i, ratio in zip(some.tolist(), errors, strict=True):
            h[i] = lengths[i] * self.solver.factor(ratio, self.before[i], self.refused[i])
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

    def advance(self, mask: Tensor, a_next: Tensor, new: Mapping[str, Tensor]) -> None:
        """Take the accepted steps, `new` by name, and put the samples that have arrived aside."""
        all_of_them = bool(mask.all())
        for name, value in new.items():
            if not all_of_them:
                where = mask.reshape(-1, *[1] * (value.ndim - 1)).to(value.device)
                value = torch.where(where, value, getattr(self, name))
            setattr(self, name, value)
        self.a = a_next if all_of_them else torch.where(mask, a_next, self.a)
        self.depart(self.a == self.end)

    def depart(self, there: Tensor) -> None:
        """Put the active samples that are `there` aside."""
        if not bool(there.any()):
            return
        rows, stay = there.nonzero().flatten(), (~there).nonzero().flatten()
        self.arrived.append(
            (self.rows[there], {name: take(getattr(self, name), rows) for name in self.results})
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
        for whole, part in zip(self.seen, (x, x0), strict=True):
            whole.index_copy_(0, rows, part.detach())
        behind = int((self.sign * self.a).argmin())
        level = self.reverse.process.level(float(t[behind]))
        self.on_call(self.calls - 1, Call(1, 0, level.t, level.s, level.sigma), *self.seen)

    # ----------------------------------------------------------------------------- how a solve ends

    def gather(self, name: str) -> Tensor:
        """One of `results` of all samples, in their order, wherever they are."""
        rows = torch.cat([part for part, _ in self.arrived] + [self.rows])
        values: Tensor = torch.cat([part[name] for _, part in self.arrived] + [getattr(self, name)])
        return values.index_select(0, rows.argsort().to(values.device))

    def readings(self) -> Tensor:
        """Where the clock of every sample stands."""
        a = torch.full((self.n,), self.end, dtype=torch.float64)
        a[self.rows] = self.a
        return a

    def statistics(self) -> dict[str, Any]:
        return {"nfe": self.nfe, "accepted": self.accepted, "rejected": self.rejected}

    def partial(self) -> Solution:
        """What was reached: every sample's state at its own time, `statistics["t"]`."""
        a = self.readings()
        statistics = {**self.statistics(), "t": self.time(a), "arrived": a == self.end}
        return Solution(self.reached(), self.calls, self.forwards, statistics=statistics)

    def fail_budget(self) -> None:
        behind = int((self.sign * self.a).argmin())
        error = SolverError(
            f"{type(self.solver).__name__} spent {self.calls} of max_nfe={self.solver.max_nfe}"
            f" network calls with {len(self.rows)} of {self.n} samples under way; sample"
            f" {int(self.rows[behind])} is farthest behind, at {self.where(behind)}. Raise max_nfe,"
            " loosen rtol and atol, or take a solver with a fixed grid. error.partial holds what"
            " was reached"
        )
        error.partial = self.partial()
        raise error

    def fail_stiff(self, i: int, h: float) -> None:
        error = SolverError(
            f"{type(self.solver).__name__} cannot meet rtol={self.solver.rtol:g},"
            f" atol={self.solver.atol:g} for sample {int(self.rows[i])}: at {self.where(i)} its"
            f" step fell to {h:.3g}, below min_step={self.solver.min_step:g}. The state is finite:"
            " the network jumps there, or its rounding is coarser than the tolerance. Loosen the"
            " tolerances, compute in a wider dtype, or lower min_step. error.partial holds what"
            " was reached"
        )
        error.partial = self.partial()
        raise error

    def fail_nonfinite(self, i: int, a: Tensor, width: float) -> None:
        between = (
            f" (a step of {abs(width):.3g} to t={float(self.time(a[i])):.6g})" if width else ""
        )
        error = NonFiniteError(
            f"the network returned NaN or infinity for sample {int(self.rows[i])} at"
            f" {self.where(i)}{between}, though the state there is finite. error.partial holds what"
            " was reached"
        )
        error.partial = self.partial()
        raise error

    def where(self, i: int) -> str:
        return (
            f"t={float(self.time(self.a[i])):.6g} (h={float(self.h[i]):.3g} in {self.clock_name})"
        )


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
