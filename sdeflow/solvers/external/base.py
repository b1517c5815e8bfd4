"""What the solvers of external libraries share: the frame of a solve, and the clock."""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from sdeflow.errors import GridError
from sdeflow.plan.instructions import Call
from sdeflow.process import Level, Process
from sdeflow.process.clock import Clock
from sdeflow.reverse import Reverse
from sdeflow.solvers.base import (
    OnCall,
    Solution,
    Solver,
    Task,
    check_levels,
    search_levels,
)


class External(Solver):
    """A method of an external library, by name; subclasses say how it is run."""

    library: ClassVar[str]
    method: str

    @property
    def title(self) -> str:
        """The method in words, for errors."""
        return f"{self.library}'s {self.method}"

    @abstractmethod
    def calls(self, levels: int, *, finish: bool = True) -> int:
        """Network calls on a grid of `levels`."""

    @abstractmethod
    def states(self, task: Task, reverse: Watched, levels: list[Level]) -> list[Tensor]:
        """The states at the levels, at least two; without `record` the last one will do."""

    def levels(self, nfe: int, *, finish: bool = True) -> int:
        least = 1 if finish else 2
        return search_levels(self.title, partial(self.calls, finish=finish), nfe, least)

    def _solve(self, task: Task) -> Solution:
        reverse, dtype = Watched(task.reverse, task.on_call), task.x.dtype
        levels = check_levels(reverse.prepare(task.times), reverse.process)
        before = reverse.forwards
        task = task._replace(x=task.x.to(torch.promote_types(dtype, torch.float32)))
        states = self.states(task, reverse, levels) if len(levels) > 1 else [task.x]
        if task.finish:
            states = [*states, reverse(states[-1], levels[-1])]
        return Solution(
            states[-1].to(dtype),
            reverse.made,
            reverse.forwards - before,
            trajectory=torch.stack(states).to(dtype) if task.record else None,
            statistics={"method": self.method},
        )


class Watched(Reverse):
    """A `Reverse` that shows every call to a callback, the prediction in the dtype of the state."""

    def __init__(self, reverse: Reverse, on_call: OnCall | None):
        vars(self).update(vars(reverse))  # one count, and the levels that are known
        self.on_call, self._before = on_call, reverse.nfe

    @property
    def made(self) -> int:
        """Calls that were made since."""
        return self.nfe - self._before

    def __call__(self, x: Tensor, t: Level) -> Tensor:
        x0 = super().__call__(x, t).to(x.dtype)
        if self.on_call is not None:
            self.on_call(self.made - 1, Call(1, 0, t.t, t.s, t.sigma), x, x0)
        return x0


def finite_readings(clock: Clock, levels: list[Level]) -> Tensor:
    """The values of a clock at some levels, float64; `GridError` where one is infinite."""
    values = torch.tensor([clock.reading(level) for level in levels], dtype=torch.float64)
    if not bool(torch.isfinite(values).all()):
        where = levels[int((~torch.isfinite(values)).nonzero()[0])]
        raise GridError(
            f"{clock.name} is infinite at t={where.t:g}, where no signal is left: use clock='t'"
        )
    return values


def levels_at(
    clock: Clock, process: Process, values: Tensor, t_first: float, t_last: float
) -> list[Level]:
    """The levels, between two times, where a clock has some values.

    Only the clock `t` needs, and gets, the derivatives of the process.
    """
    t = clock.times(process, values).clamp(min(t_first, t_last), max(t_first, t_last))
    if clock.name == "t":
        return process.levels(t)
    s, sigma = (c.tolist() for c in process.kernel(t))
    return [Level(*row, math.nan, math.nan) for row in zip(t.tolist(), s, sigma, strict=True)]
