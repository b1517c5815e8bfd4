"""What the solvers of external libraries share: their clock, and how a call is shown to a callback."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdeflow.errors import GridError, unknown
from sdeflow.plan.instructions import Call
from sdeflow.process import Level, Process
from sdeflow.process.clock import Clock
from sdeflow.solvers.base import OnCall


def check_clock(clock: str, known: tuple[str, ...]) -> None:
    """Raise `UnknownNameError` for a clock that is not among the known ones."""
    if clock not in known:
        raise unknown("clock", clock, known)


def finite_readings(clock: Clock, levels: list[Level]) -> Tensor:
    """The values of a clock at some levels, float64; `GridError` where one is infinite."""
    values = torch.tensor([clock.reading(level) for level in levels], dtype=torch.float64)
    if not bool(torch.isfinite(values).all()):
        where = levels[int((~torch.isfinite(values)).nonzero()[0])]
        raise GridError(
            f"{clock.name} is infinite at t={where.t:g}, where no signal is left: use clock='t'"
        )
    return values


def levels_at(clock: Clock, process: Process, values: Tensor, times: Tensor) -> list[Level]:
    """The levels, within `times`, where a clock has some values. Only the clock `t` needs, and
    gets, the derivatives of the process.
    """
    t = clock.times(process, values).clamp(float(times.min()), float(times.max()))
    if clock.name == "t":
        return process.levels(t)
    s, sigma = (torch.broadcast_to(c, t.shape).tolist() for c in process.kernel(t))
    return [Level(*row, math.nan, math.nan) for row in zip(t.tolist(), s, sigma, strict=True)]


def watch(on_call: OnCall | None, index: int, t: Level, x: Tensor, x0: Tensor) -> None:
    """Show a network call to a callback, if there is one."""
    if on_call is not None:
        on_call(index, Call(1, 0, t.t, t.s, t.sigma), x, x0)
