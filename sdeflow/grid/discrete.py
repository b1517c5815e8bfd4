"""Grids on the entries of a table of betas, and the schedules of image programs that are measured
in its index.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from sdeflow._utils.checks import is_whole
from sdeflow.errors import GridError
from sdeflow.grid.base import count, ends, falling, in_nsr, positive, ramp
from sdeflow.grid.continuous import uniform_t
from sdeflow.process import Process, Tabulated


def _table_of(
    process: Process, n: int, t_min: float | None, t_max: float | None
) -> tuple[Tabulated, int]:
    """The table behind a discrete grid, and how many of its entries lie at or below `t_max`."""
    if not isinstance(process, Tabulated):
        raise GridError(
            f"this grid consists of entries of a table of betas; {type(process).__name__} has"
            " none: use uniform_t, or Process.from_betas or from_table"
        )
    if t_min is not None and t_min > process.t_min:
        raise GridError(
            f"grids on a table run down to its first entry, t={process.t_min:g}; for"
            f" t_min={t_min:g} use uniform_t"
        )
    size = process.size
    if t_max is not None:
        size = math.floor(float(process.index(t_max)) + 1.0 + 1e-9)
    if not is_whole(n, 1, size):
        raise GridError(f"a grid on a table of {size} entries has 1 to {size} levels; got {n!r}")
    return process, size


def leading(
    process: Process,
    n: int,
    *,
    offset: int = 0,
    spare: int = 0,
    t_min: float | None = None,
    t_max: float | None = None,
) -> Tensor:
    """The upper `n` of the entries `j floor(N/m) + offset` of the table, counted from 0, with
    `m = n + spare`. Never the last entry.

    Source: DDIM (Song et al., 2020); Stable Diffusion takes an offset of 1, the DPM-Solver
    schedulers of diffusers a spare level.
    """
    table, size = _table_of(process, n, t_min, t_max)
    stride = size // (n + spare) if n + spare > 0 else 0
    if (
        spare < 0
        or stride < 1
        or not 0 <= offset < max(stride, 2)
        or (n + spare - 1) * stride + offset >= size
    ):
        raise GridError(
            f"leading spacing with {n} and {spare} spare levels on {size} entries takes an offset"
            f" from 0 to {max(min(stride - 1, size - 1 - (n + spare - 1) * stride), 0)}, and spare"
            f" levels from 0 to {size - n}; got offset={offset}"
        )
    return table.time(torch.arange(n + spare - 1, spare - 1, -1) * stride + offset)


def ddim_uniform(
    process: Process, n: int, *, t_min: float | None = None, t_max: float | None = None
) -> Tensor:
    """Entries `j floor(N/n) + 1` of the table: `leading` with Stable Diffusion's offset.

    ComfyUI's list of that name has more than `n` levels where `n` does not divide the table. Here
    it has `n`.

    Source: DDIM (Song et al., 2020), as latent diffusion counts (Rombach et al., 2022).
    """
    _, size = _table_of(process, n, t_min, t_max)
    return leading(
        process, n, offset=int((n - 1) * (size // n) + 1 < size), t_min=t_min, t_max=t_max
    )


def trailing(
    process: Process, n: int, *, t_min: float | None = None, t_max: float | None = None
) -> Tensor:
    """Entries `round(N - j N/n) - 1`: starts at the last, right for few steps.

    Source: Lin et al., "Common diffusion noise schedules and sample steps are flawed" (2023).
    """
    table, size = _table_of(process, n, t_min, t_max)
    return table.time(torch.round(size - torch.arange(n, dtype=torch.float64) * size / n) - 1)


def linspace(
    process: Process, n: int, *, t_min: float | None = None, t_max: float | None = None
) -> Tensor:
    """Entries `round(linspace(N - 1, 0, n))`, both ends included. Source: improved DDPM (2021)."""
    table, size = _table_of(process, n, t_min, t_max)
    return table.time(torch.round((size - 1) * (1.0 - ramp(n))))


def quadratic(
    process: Process, n: int, *, t_min: float | None = None, t_max: float | None = None
) -> Tensor:
    """Entries nearest to `(N - 1) u^2`, `u` uniform from 1 to 0, no entry twice.

    Source: DDIM (Song et al., 2020), section D.2.
    """
    table, size = _table_of(process, n, t_min, t_max)
    up = (
        torch.round((size - 1) * ramp(n) ** 2)
        if n > 1
        else torch.tensor([size - 1.0], dtype=torch.float64)
    )
    # Rounding merges the smallest entries; j distinct ones below need at least index j.
    return table.time(torch.maximum(up, torch.arange(n, dtype=torch.float64)).flip(0))


# ----------------------------------------------------- one step short of the end, under any process


def _to_zero(
    process: Process, n: int, t_min: float | None, t_max: float | None
) -> tuple[float, float]:
    """`(end, high)` of a grid that counts the step to zero noise: it ends at `t = 0`, or at a given
    `t_min`.
    """
    count(n)
    low, high = ends(process, n, t_min, t_max)
    return (min(low, 0.0) if t_min is None else low), high


def simple(
    process: Process, n: int, *, t_min: float | None = None, t_max: float | None = None
) -> Tensor:
    """`n` equal steps in time from the start to `t = 0`, `t_max (1 - j/n)`.

    The last one is the solver's step to zero noise.

    On a table of betas the entries `N - 1 - floor(j N/n)`: `trailing` but for the rounding. With
    `t_min`, the steps end there.

    Source: ComfyUI's "simple"; the grid of flow models in practice.
    """
    if isinstance(process, Tabulated):
        table, size = _table_of(process, n, t_min, t_max)
        return table.time(size - 1 - torch.arange(n) * size // n)
    end, high = _to_zero(process, n, t_min, t_max)
    return high + torch.arange(n, dtype=torch.float64) / n * (end - high)


def sgm_uniform(
    process: Process, n: int, *, t_min: float | None = None, t_max: float | None = None
) -> Tensor:
    """Uniform in time to `t_min`, without the last level: the first `n` of `n + 1`.

    Source: Stability AI's generative models, ComfyUI's "sgm_uniform".
    """
    count(n)
    return uniform_t(process, n + 1, t_min=t_min, t_max=t_max)[:n]


def linear_quadratic(
    process: Process,
    n: int,
    *,
    threshold: float = 0.025,
    linear_steps: int | None = None,
    t_min: float | None = None,
    t_max: float | None = None,
) -> Tensor:
    """Equal small steps in time over the first `threshold` of the way, then a parabola to `t = 0`
    with the same slope.

    The small steps are `linear_steps`, by default half of `n`. The last of the `n` steps is the
    solver's step to zero noise. With `t_min`, the steps end there.

    Source: Polyak et al., "Movie Gen" (2024), for flows, from one network's finer grid; ComfyUI's
    "linear_quadratic".
    """
    end, high = _to_zero(process, n, t_min, t_max)
    linear = n // 2 if linear_steps is None else linear_steps
    if not (is_whole(linear, 0, n - 1) or (n == 1 and is_whole(linear, -math.inf))):
        raise GridError(
            f"linear_quadratic with {n} levels takes 0 to {n - 1} linear steps; got"
            f" {linear_steps!r}"
        )
    if not 0 < threshold < 1:
        raise GridError(
            "linear_quadratic needs a threshold between 0 and 1, a part of the way; got"
            f" {threshold}"
        )
    i = torch.arange(n, dtype=torch.float64)
    slope = threshold / linear if linear else 0.0
    bend = (1.0 - slope * n) / (n - linear) ** 2
    way = slope * i + bend * (i - linear).clamp_min(0.0) ** 2
    return falling(high + way * (end - high), process)


def beta_quantiles(
    process: Process,
    n: int,
    *,
    alpha: float = 0.6,
    beta: float = 0.6,
    clock: Literal["t", "nsr"] = "t",
    last: bool = False,
    t_min: float | None = None,
    t_max: float | None = None,
) -> Tensor:
    """Quantiles of a beta distribution, in time: fine at both ends for `alpha` and `beta` below 1.

    As in ComfyUI's "beta" it is the first `n` of `n + 1` levels: the step to zero noise takes the
    place of the last. They are not rounded to entries of a table. diffusers' `use_beta_sigmas`
    takes them in nsr, with the last: `clock="nsr", last=True`.

    Source: Lee et al., "Beta sampling is all you need" (2024).
    """
    from scipy.special import betaincinv

    positive("beta_quantiles", "alpha", alpha)
    positive("beta_quantiles", "beta", beta)
    low, high = ends(process, n, t_min, t_max)
    if clock not in ("t", "nsr"):
        raise GridError(f'beta_quantiles are taken in the clock "t" or "nsr"; got {clock!r}')
    levels = n if last else n + 1

    def place(top: float, bottom: float, n: int) -> Tensor:
        quantiles = betaincinv(alpha, beta, (1.0 - ramp(n)).numpy())
        return bottom + (top - bottom) * torch.from_numpy(quantiles)

    if clock == "nsr":
        return in_nsr(process, n, t_min, t_max, None, None, place, last=last)
    times = place(high, low, levels)[:n]
    if last and n > 1:
        times[-1] = low
    times[0] = high
    return falling(times, process)
