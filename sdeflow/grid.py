r"""Time grids: where a solver's levels stand. Float64 on the CPU, decreasing, `n` levels from `t_max` to `t_min`.

Every grid is a function `grid(process, n, *, t_min=None, t_max=None, ...)`; any function of that form, or any strictly
monotone vector of times, serves as `grid=` too and is honoured exactly. The step from the last level to zero noise is the
solver's `finish`; no grid holds zero.

A grid in the noise-to-signal ratio needs a finite top. Where `nsr(t_max)` is infinite, or beyond `NSR_TOP`, the grid is laid
from `NSR_TOP` down and `t_max` itself stands in front.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sdeflow.errors import GridError
from sdeflow.process import FromBetas, Process

GridFunction = Callable[..., Tensor]
"""`grid(process, n, *, t_min=None, t_max=None) -> times`."""

NSR_TOP = 1e3
"""Where grids in the noise-to-signal ratio begin, if the process goes further."""


def _ends(process: Process, n: int, t_min: float | None, t_max: float | None) -> tuple[float, float]:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise GridError(f"a grid has a whole number of levels, at least 1; got {n!r}")
    low, high = process.t_min if t_min is None else float(t_min), process.t_max if t_max is None else float(t_max)
    if not low < high:
        raise GridError(f"a grid runs from t_max down to a smaller t_min; got t_max={high:g}, t_min={low:g}")
    return low, high


def _ramp(n: int) -> Tensor:
    """`n` numbers from 0 to 1; `[0]` for one."""
    return torch.linspace(0.0, 1.0, n, dtype=torch.float64)


def _pin(times: Tensor, low: float, high: float) -> Tensor:
    """The same grid with its ends exactly where they were asked."""
    times = times.clone()
    if len(times) > 1:
        times[-1] = low
    times[0] = high
    return times


def power_t(
    process: Process, n: int, *, rho: float = 2.0, t_min: float | None = None, t_max: float | None = None
) -> Tensor:
    """Uniform in `t^(1/rho)`: `rho=1` is uniform in `t`, 2 in the square root.

    Source: the power schedules of DDIM, DEIS and EDM in one.
    """
    low, high = _ends(process, n, t_min, t_max)
    if not rho > 0 or low < 0:
        raise GridError(f"a power grid needs rho > 0 and t_min >= 0; got rho={rho}, t_min={low}")
    a, b = high ** (1 / rho), low ** (1 / rho)
    return _pin((a + _ramp(n) * (b - a)) ** rho, low, high)


def uniform_t(process: Process, n: int, *, t_min: float | None = None, t_max: float | None = None) -> Tensor:
    """Uniform in the process's own time. Source: Song et al. (2021)."""
    return power_t(process, n, rho=1.0, t_min=t_min, t_max=t_max)


def uniform_sqrt_t(process: Process, n: int, *, t_min: float | None = None, t_max: float | None = None) -> Tensor:
    """Uniform in the square root of time: finer near the data. Source: DDIM's "quadratic" grid (Song et al., 2020)."""
    return power_t(process, n, rho=2.0, t_min=t_min, t_max=t_max)


def _in_nsr(
    process: Process,
    n: int,
    t_min: float | None,
    t_max: float | None,
    nsr_min: float | None,
    nsr_max: float | None,
    lay: Callable[[float, float, int], Tensor],
) -> Tensor:
    """A grid laid by `lay(top, bottom, n)` in nsr, between the process's ends or the given bounds."""
    low, high = _ends(process, n, t_min, t_max)
    ends = process.nsr(torch.tensor([low, high], dtype=torch.float64)).tolist()
    bottom = ends[0] if nsr_min is None else float(nsr_min)
    top = ends[1] if nsr_max is None else float(nsr_max)
    if not 0 < bottom < top:
        raise GridError(
            f"a grid in nsr needs 0 < nsr_min < nsr_max; got {bottom:g} and {top:g} (nsr is 0 at t_min={low:g}?)"
        )
    infront = nsr_max is None and top > NSR_TOP
    if infront and n == 1:
        return torch.tensor([high], dtype=torch.float64)
    times = process.t_of_nsr(lay(min(top, NSR_TOP) if infront else top, bottom, n - 1 if infront else n))
    if infront:
        times = torch.cat([torch.tensor([high], dtype=torch.float64), times])
    elif nsr_max is None:
        times[0] = high
    if nsr_min is None and n > 1:
        times[-1] = low
    return times


def karras(
    process: Process,
    n: int,
    *,
    rho: float = 7.0,
    nsr_min: float | None = None,
    nsr_max: float | None = None,
    t_min: float | None = None,
    t_max: float | None = None,
) -> Tensor:
    """Uniform in `nsr^(1/rho)`; `n` positive levels, as EDM counts them. Source: Karras et al. (2022), equation 5."""
    if not rho > 0:
        raise GridError(f"karras needs rho > 0; got {rho}")

    def lay(top: float, bottom: float, n: int) -> Tensor:
        a, b = top ** (1 / rho), bottom ** (1 / rho)
        return (a + _ramp(n) * (b - a)) ** rho

    return _in_nsr(process, n, t_min, t_max, nsr_min, nsr_max, lay)


def uniform_lam(
    process: Process,
    n: int,
    *,
    nsr_min: float | None = None,
    nsr_max: float | None = None,
    t_min: float | None = None,
    t_max: float | None = None,
) -> Tensor:
    """Uniform in `log(s / sigma)`: every scale of the data gets the same share of steps. Source: Lu et al., DPM-Solver (2022)."""

    def lay(top: float, bottom: float, n: int) -> Tensor:
        return torch.exp(math.log(top) + _ramp(n) * (math.log(bottom) - math.log(top)))

    return _in_nsr(process, n, t_min, t_max, nsr_min, nsr_max, lay)


def uniform_angle(process: Process, n: int, *, t_min: float | None = None, t_max: float | None = None) -> Tensor:
    """Uniform in `atan(sigma / s)`: finite where no signal is left, coarse at small noise.

    Source: the angle of Salimans & Ho, "Progressive distillation" (2022), appendix D.
    """
    low, high = _ends(process, n, t_min, t_max)
    b, a = process.angle(torch.tensor([low, high], dtype=torch.float64)).tolist()
    return _pin(process.t_of_nsr(torch.tan(a + _ramp(n) * (b - a))), low, high)


# ------------------------------------------------------------------------------------------ on the nodes of a table


def _table(process: Process, n: int, t_min: float | None, t_max: float | None) -> tuple[FromBetas, int]:
    """The table behind a discrete grid, and how many of its entries lie at or below `t_max`."""
    if not isinstance(process, FromBetas):
        raise GridError(
            f"this grid stands on the entries of a table of betas; {type(process).__name__} has none: "
            "use uniform_t, or Process.from_betas"
        )
    if t_min is not None and t_min > process.t_min:
        raise GridError(
            f"grids on a table run down to its first entry, t={process.t_min:g}; for t_min={t_min:g} use uniform_t"
        )
    size = len(process.betas)
    if t_max is not None:
        size = math.floor(float(process.index(t_max)) + 1.0 + 1e-9)
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= size:
        raise GridError(f"a grid on a table of {size} entries has 1 to {size} levels; got {n!r}")
    return process, size


def leading(
    process: Process, n: int, *, offset: int = 0, t_min: float | None = None, t_max: float | None = None
) -> Tensor:
    """Entries `j floor(N/n) + offset` of the table, counted from 0; never visits the last entry.

    Source: DDIM (Song et al., 2020); Stable Diffusion takes an offset of 1.
    """
    table, size = _table(process, n, t_min, t_max)
    stride = size // n
    if not 0 <= offset < max(stride, 2) or (n - 1) * stride + offset >= size:
        raise GridError(
            f"leading spacing with {n} of {size} entries takes an offset from 0 to "
            f"{min(stride - 1, size - 1 - (n - 1) * stride)}; got {offset}"
        )
    return table.time(torch.arange(n - 1, -1, -1) * stride + offset)


def trailing(process: Process, n: int, *, t_min: float | None = None, t_max: float | None = None) -> Tensor:
    """Entries `round(N - j N/n) - 1`: starts at the last, right for few steps.

    Source: Lin et al., "Common diffusion noise schedules and sample steps are flawed" (2023).
    """
    table, size = _table(process, n, t_min, t_max)
    return table.time(torch.round(size - torch.arange(n, dtype=torch.float64) * size / n) - 1)


def linspace(process: Process, n: int, *, t_min: float | None = None, t_max: float | None = None) -> Tensor:
    """Entries `round(linspace(N - 1, 0, n))`, both ends included. Source: improved DDPM (2021)."""
    table, size = _table(process, n, t_min, t_max)
    return table.time(torch.round((size - 1) * (1.0 - _ramp(n))))


def quadratic(process: Process, n: int, *, t_min: float | None = None, t_max: float | None = None) -> Tensor:
    """Entries nearest to `(N - 1) u^2`, `u` uniform from 1 to 0, no entry twice. Source: DDIM (Song et al., 2020), section D.2."""
    table, size = _table(process, n, t_min, t_max)
    up = torch.round((size - 1) * _ramp(n) ** 2) if n > 1 else torch.tensor([size - 1.0], dtype=torch.float64)
    # Rounding merges the smallest entries; j distinct ones below need at least index j.
    return table.time(torch.maximum(up, torch.arange(n, dtype=torch.float64)).flip(0))
