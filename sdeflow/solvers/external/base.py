"""What the solvers of external libraries share: the frame of a solve, and the clock."""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from sdeflow.errors import GridError
from sdeflow.noise import Noise
from sdeflow.plan.instructions import Call
from sdeflow.process import Level, Process
from sdeflow.process.clock import Clock
from sdeflow.reverse import Reverse
from sdeflow.solvers.base import (
    OnCall,
    Solution,
    Solver,
    check_levels,
    check_times,
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
    def check(self, times: Tensor, noise: Noise | None, finish: bool) -> None:
        """Raise an error where the method cannot solve along `times`."""

    @abstractmethod
    def states(
        self,
        reverse: Reverse,
        x: Tensor,
        levels: list[Level],
        noise: Noise | None,
        record: bool,
        on_call: OnCall | None,
    ) -> list[Tensor]:
        """The states at the levels, at least two; without `record` the last one will do."""

    def levels(self, nfe: int, *, finish: bool = True) -> int:
        least = 1 if finish else 2
        return search_levels(self.title, partial(self.calls, finish=finish), nfe, least)

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
        self.check(times, noise, finish)
        before, forwards = reverse.nfe, reverse.forwards
        levels = check_levels(reverse.prepare(times), reverse.process)
        states, dtype = [x.to(torch.promote_types(x.dtype, torch.float32))], x.dtype
        if len(levels) > 1:
            states = self.states(reverse, states[0], levels, noise, record, on_call)
        if finish:
            x0 = reverse(states[-1], levels[-1]).to(states[-1].dtype)
            watch(on_call, reverse.nfe - before - 1, levels[-1], states[-1], x0)
            states = [*states, x0]
        return Solution(
            states[-1].to(dtype),
            reverse.nfe - before,
            reverse.forwards - forwards,
            trajectory=torch.stack(states).to(dtype) if record else None,
            statistics={"method": self.method},
        )


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
    """The levels, between two times, where a clock has some values. Only the clock `t` needs, and
    gets, the derivatives of the process.
    """
    t = clock.times(process, values).clamp(min(t_first, t_last), max(t_first, t_last))
    if clock.name == "t":
        return process.levels(t)
    s, sigma = (torch.broadcast_to(c, t.shape).tolist() for c in process.kernel(t))
    return [Level(*row, math.nan, math.nan) for row in zip(t.tolist(), s, sigma, strict=True)]


def watch(on_call: OnCall | None, index: int, t: Level, x: Tensor, x0: Tensor) -> None:
    """Show a network call to a callback, if there is one."""
    if on_call is not None:
        on_call(index, Call(1, 0, t.t, t.s, t.sigma), x, x0)
