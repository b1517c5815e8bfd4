"""The times of a solve: from a budget and a grid's name, function or values."""

from __future__ import annotations

import contextlib
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdeflow import registry
from sdeflow.denoisers import Denoiser
from sdeflow.errors import BudgetError, GridError
from sdeflow.grid import GridFunction
from sdeflow.plan.plan import Plan
from sdeflow.process import Process
from sdeflow.sampling.request import Request
from sdeflow.solvers.base import Solver, check_times

DEFAULT_NFE = 35


def times_of(method: Solver | Plan, denoiser: Denoiser, request: Request) -> tuple[Tensor, str]:
    """The times of the solve and the name of their grid."""
    process, grid = denoiser.process, request.grid
    nfe, t, finish = request.nfe, request.t, request.finish
    if isinstance(method, Plan):
        if grid is not None or nfe not in (None, method.nfe):
            raise ValueError(
                f"a plan brings its own grid and budget (NFE {method.nfe}): pass neither grid= nor"
                " another nfe="
            )
        levels = process.levels([t for t, _, _ in method.grid])
        for mine, (time, s, sigma) in zip(levels, method.grid, strict=True):
            pairs = ((mine.s, s), (mine.sigma, sigma))
            if any(abs(a - b) > 1e-9 * (1 + abs(b)) for a, b in pairs):
                raise ValueError(
                    f"this plan was traced under {method.process}, and {process!r} differs from it"
                    f" at t={time:g}: pass process="
                )
        if t is not None and not same_time(t, method.grid[0][0]):
            raise ValueError(f"this plan starts at t={method.grid[0][0]:g}, not at t={t:g}")
        if finish != method.finished:
            raise ValueError(f"this plan was traced with finish={method.finished}")
        times = torch.tensor([time for time, _, _ in method.grid], dtype=torch.float64)
        return times, "the plan's own"
    grid = grid_for(grid, method, denoiser, finish)
    # An adaptive solver refuses a budget.
    levels_asked = None if nfe is None else method.levels(nfe, finish=finish)
    if grid is not None and not isinstance(grid, str) and not callable(grid):
        times = without_zero_noise(check_times(grid), process, finish)
        if levels_asked not in (None, len(times)):
            raise BudgetError(
                f"the grid has {len(times)} levels; {type(method).__name__} needs {levels_asked}"
                f" for nfe={nfe}"
            )
        if t is not None and not same_time(t, times[0]):
            raise GridError(
                f"the grid starts at t={float(times[0]):.9g}, the state at t={float(t):.9g}: they"
                " must be the same, to the precision of float32. Give the state at the first time"
                " of the grid, or leave t= out"
            )
        return times, "given"
    count = levels_asked or (2 if method.adaptive else default_levels(method, finish))
    name = process.default_grid if grid is None else _name_of(grid)
    times = make_times(process, grid, count, t)
    if nfe is not None and len(times) != count:
        raise BudgetError(
            f"the grid {name} has {len(times)} levels from t={float(times[0]):g}; "
            f"{type(method).__name__} needs {count} for nfe={nfe}"
        )
    return times, name


def same_time(a: Any, b: Any) -> bool:
    """Whether two times are the same to the precision of float32, in which one of them may have
    been computed.
    """
    return math.isclose(float(a), float(b), rel_tol=4e-7)


def without_zero_noise(times: Tensor, process: Process, finish: bool) -> Tensor:
    """Given times, without a last one where no noise is left if `finish`: the step to zero noise
    leads there.
    """
    if not finish or len(times) < 2 or times[-1] > times[0]:
        return times
    return times[:-1] if process.level(float(times[-1].detach())).sigma == 0.0 else times


def default_levels(method: Solver, finish: bool) -> int:
    """Levels for the default budget, or for the next below it that the solver can spend."""
    for budget in range(DEFAULT_NFE, 0, -1):
        with contextlib.suppress(BudgetError):
            return method.levels(budget, finish=finish)
    return method.levels(DEFAULT_NFE, finish=finish)


def grid_for(grid: Any, method: Solver, denoiser: Denoiser, finish: bool) -> Any:
    """`grid`; where none is given the one that goes with the solver, or else with the model.

    The name of the solver's own grid means that grid too: `auto` has one for networks and one for
    known densities.
    """
    own = method.default_grid
    if own is None:
        return denoiser.default_grid if grid is None else grid
    name = _name_of(own)
    if grid is not None and not (isinstance(grid, str) and grid == name):
        return grid
    if finish:
        return own
    # The grid may end above t_min, since the step to zero noise takes over there. Without that
    # step, it must reach t_min.
    whole = partial(registry.grid_function(own), t_min=denoiser.process.t_min)
    whole.__name__ = name  # type: ignore[attr-defined]
    return whole


def _name_of(grid: str | GridFunction) -> str:
    return grid if isinstance(grid, str) else getattr(grid, "__name__", "given")


def make_times(
    process: Process, grid: str | GridFunction | None, levels: int, t: float | None
) -> Tensor:
    """A grid of so many levels from `t` (or the end of time) down."""
    function = registry.grid_function(process.default_grid if grid is None else grid)
    if t is not None:
        ends = (process.t_min, process.t_max)
        t = next((end for end in ends if same_time(t, end)), t)
    if t is not None and not process.t_min <= t <= process.t_max:
        raise GridError(
            f"{type(process).__name__} runs from t={process.t_min:g} to t={process.t_max:g}; got"
            f" t={t:g}"
        )
    if t is not None and t == process.t_min:
        return torch.tensor([t], dtype=torch.float64)
    if t is None:
        return check_times(function(process, levels))
    times = check_times(function(process, levels, t_max=t)).clone()
    times[0] = t  # exactly, whatever rounding or a table made of it
    return check_times(times)
