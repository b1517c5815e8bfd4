"""The grid that goes with `solver="auto"`."""

from __future__ import annotations

import torch
from torch import Tensor

from sdeflow.grid.base import count, ends, falling
from sdeflow.grid.continuous import place_two_powers
from sdeflow.process import Process
from sdeflow.solvers.auto.recipes import DATA_STD, Recipe, Table, recipe


def auto(
    process: Process,
    n: int,
    *,
    data_std: float = DATA_STD,
    table: Table = "network",
    t_min: float | None = None,
    t_max: float | None = None,
) -> Tensor:
    """The levels that were most accurate at `n` calls: `t_max`, then dense about the data's scale,
    see `sdeflow.solvers.auto.recipes`.

    With few calls it ends at a higher noise than `t_min`: the step to zero noise goes further than
    to the process's end. A given `t_min` is honoured. `data_std` is the standard deviation of the
    data; `table` says for which kind of denoiser, as `Auto(table=)` does.

    Source: `benchmarks/defaults/tune_auto.py`.
    """
    return lay(process, n, recipe(count(n), data_std, table), t_min, t_max)


def lay(
    process: Process, n: int, r: Recipe, t_min: float | None = None, t_max: float | None = None
) -> Tensor:
    """The grid of a recipe."""
    low, high = ends(process, n, t_min, t_max)
    first = torch.tensor([high], dtype=torch.float64)
    if n == 1:
        return first
    end, start = process.nsr(torch.tensor([low, high], dtype=torch.float64)).tolist()
    infront = start > 1.5 * r.nsr_top
    top = r.nsr_top if infront else start
    # In proportion, where the start is below where the grid begins.
    bottom = end if t_min is not None else max(end, r.nsr_end * min(1.0, top / r.nsr_top))
    nsr = place_two_powers(r.center, r.high, r.low, top, bottom, n - 1 if infront else n)
    if len(nsr) == 1:
        nsr[0] = bottom
    times = process.t_of_nsr(nsr).clamp(min=low)
    if bottom == end:
        times[-1] = low
    return falling(torch.cat([first, times if infront else times[1:]]), process)
