"""What all grids share: their ends, their checks, and how one is made in the noise-to-signal
ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sdeflow._utils.checks import whole_number
from sdeflow.errors import GridError
from sdeflow.process import Process

GridFunction = Callable[..., Tensor]
"""`grid(process, n, *, t_min=None, t_max=None) -> times`."""

NSR_TOP = 1e3
"""The noise-to-signal ratio at which grids in it begin, if the process goes further."""

Place = Callable[[float, float, int], Tensor]
"""`place(top, bottom, n)`: `n` noise-to-signal ratios from `top` down to `bottom`."""


def count(n: int) -> int:
    """`n`, if it is a number of levels."""
    return whole_number("n", n, of="levels of a grid", error=GridError)


def ends(process: Process, n: int, t_min: float | None, t_max: float | None) -> tuple[float, float]:
    """The time at the end and at the start of a grid of `n` levels."""
    count(n)
    low = process.t_min if t_min is None else float(t_min)
    high = process.t_max if t_max is None else float(t_max)
    if not low < high:
        raise GridError(
            f"a grid runs from t_max down to a smaller t_min; got t_max={high:g}, t_min={low:g}"
        )
    return low, high


def ramp(n: int) -> Tensor:
    """`n` numbers from 0 to 1; `[0]` for one."""
    return torch.linspace(0.0, 1.0, n, dtype=torch.float64)


def pin(times: Tensor, low: float, high: float) -> Tensor:
    """The same grid with its ends exactly as asked."""
    times = times.clone()
    if len(times) > 1:
        times[-1] = low
    times[0] = high
    return times


def positive(who: str, what: str, value: float) -> None:
    """`GridError` unless `value` is a positive finite number."""
    if not (value > 0 and math.isfinite(value)):
        raise GridError(f"{who} needs {what} > 0, and finite; got {value}")


def falling(times: Tensor, process: Process) -> Tensor:
    """`times`, if they are finite and strictly decreasing."""
    if bool(torch.isfinite(times).all()) and bool((times.diff() < 0).all()):
        return times
    raise GridError(
        f"the levels asked for are not apart under {type(process).__name__}, which runs from"
        f" t_min={process.t_min:g} to t_max={process.t_max:g}: two of {len(times)} are at the same"
        " time, or beyond an end. Ask for fewer levels, or for bounds within the process"
    )


def in_nsr(
    process: Process,
    n: int,
    t_min: float | None,
    t_max: float | None,
    nsr_min: float | None,
    nsr_max: float | None,
    place: Place,
    *,
    last: bool = True,
    endless: bool = False,
) -> Tensor:
    """A grid made by `place(top, bottom, n)` in nsr, between the ends of the process or the bounds.

    Where the top is beyond `NSR_TOP`, `t_max` itself is put in front of a grid from there, except
    where `place` is `endless` and can begin at infinity. Without `last` it is the first `n` of
    `n + 1` levels: the step to zero noise takes the place of the last.
    """
    low, high = ends(process, n, t_min, t_max)
    bounds = process.nsr(torch.tensor([low, high], dtype=torch.float64)).tolist()
    bottom = bounds[0] if nsr_min is None else float(nsr_min)
    top = bounds[1] if nsr_max is None else float(nsr_max)
    if not 0 < bottom < top:
        raise GridError(
            f"a grid in nsr needs 0 < nsr_min < nsr_max; got {bottom:g} and {top:g} (nsr is 0 at"
            f" t_min={low:g}?)"
        )
    in_front = nsr_max is None and top > NSR_TOP * (1.0 + 1e-6) and not endless
    if in_front and n == 1:
        return torch.tensor([high], dtype=torch.float64)
    levels = n if last else n + 1
    times = process.t_of_nsr(
        place(min(top, NSR_TOP) if in_front else top, bottom, levels - 1 if in_front else levels)
    )
    if in_front:
        times = torch.cat([torch.tensor([high], dtype=torch.float64), times])
    elif nsr_max is None:
        times[0] = high
    if nsr_min is None and levels > 1:
        times[-1] = low
    return falling(times[:n], process)
