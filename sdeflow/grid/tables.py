"""Grids given as numbers: those of a user, and published ones that were optimised for a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sdeflow.errors import GridError, unknown
from sdeflow.grid.base import count, ends, falling, ramp
from sdeflow.process import Process

_CLOSE = math.log(1.02)
"""An end of a table within 2 % of the process's end counts as that end: published tables are
rounded.
"""

ALIGN_YOUR_STEPS = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "deepfloyd_if": (160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186, 0.030, 0.006),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}
"""Noise-to-signal ratios of the grids of ten steps, by model."""


@dataclass(frozen=True)
class Table:
    """A grid given as a list of noise-to-signal ratios, or of times.

    Other numbers of levels are interpolated.

        solve(model, solver="dpmpp_2m", nfe=10, grid=grid.table([14.6, 3.9, 1.9, 0.96, 0.4, 0.03]))

    With as many levels as `values` the levels are those values. Other numbers are interpolated
    linearly over the index: the logarithms of nsr, or the times. Without `last`, `n` levels are the
    first of `n + 1`: the step to zero noise takes the place of the last.

    The grid runs between its own ends, cut to those of the process. A `t_max` or `t_min` given is
    met exactly.

    Source: Sabour et al., "Align your steps" (2024), for the interpolation.
    """

    values: tuple[float, ...]
    of: Literal["nsr", "t"] = "nsr"
    last: bool = True

    def __post_init__(self) -> None:
        if self.of not in ("nsr", "t"):
            raise GridError(
                'a table holds noise-to-signal ratios, of="nsr", or times, of="t"; got'
                f" of={self.of!r}"
            )
        given = np.asarray(self.values, dtype=np.float64)
        fine = (
            given.ndim == 1
            and len(given) > 1
            and bool(np.isfinite(given).all())
            and bool((np.diff(given) < 0).all())
        )
        if not fine or (self.of == "nsr" and given[-1] <= 0):
            positive = " and are positive (zero is the solver's own last step)"
            raise GridError(
                "a table is a list of at least two finite numbers that fall strictly"
                f"{positive if self.of == 'nsr' else ''}; got {self.values}"
            )

    def __call__(
        self, process: Process, n: int, *, t_min: float | None = None, t_max: float | None = None
    ) -> Tensor:
        count(n)
        low, high = ends(process, n, t_min, t_max)
        curve = np.log(self.values) if self.of == "nsr" else np.array(self.values)
        if self.of == "nsr":
            bottom, top = (-process.lam(torch.tensor([low, high], dtype=torch.float64))).tolist()
            slack = _CLOSE
        else:
            bottom, top, slack = low, high, 1e-9 * (high - low)
        cut_top = top < curve[0] - (slack if t_max is None else 0.0)
        cut_bottom = bottom > curve[-1] + (slack if t_min is None else 0.0)
        first = _index_of(top, curve) if cut_top else 0.0
        final = _index_of(bottom, curve) if cut_bottom else len(curve) - 1.0
        if not first < final:
            raise GridError(
                f"none of the table, from {self.of}={self.values[0]:g} to {self.values[-1]:g}, lies"
                f" within t={low:g} and t={high:g} of {type(process).__name__}"
            )
        index = first + ramp(n if self.last else n + 1) * (final - first)
        read = torch.from_numpy(np.interp(index.numpy(), np.arange(len(curve)), curve))
        times = (process.t_of_lam(-read) if self.of == "nsr" else read).clamp(low, high)
        if len(times) > 1 and (cut_bottom or t_min is not None):
            times[-1] = low
        if cut_top or t_max is not None:
            times[0] = high
        return falling(times[:n], process)


def _index_of(value: float, curve: np.ndarray) -> float:
    """Where a falling curve over the index has a value."""
    return float(np.interp(-value, -curve, np.arange(len(curve))))


def table(
    values: Sequence[float] | Tensor, of: Literal["nsr", "t"] = "nsr", *, last: bool = True
) -> Table:
    """The grid of a list of noise-to-signal ratios (`sigmas` of a VE model), or of times, in either
    order; see `Table`.

    A zero at the end of a list of ratios is dropped: it means the step to zero noise, which is the
    solver's `finish`.
    """
    numbers = torch.as_tensor(values, dtype=torch.float64, device="cpu").reshape(-1).tolist()
    if len(numbers) > 1 and numbers[0] < numbers[-1]:
        numbers.reverse()
    if of == "nsr" and len(numbers) > 1 and numbers[-1] == 0.0:
        numbers.pop()
    return Table(tuple(numbers), of, last)


def align_your_steps(
    process: Process,
    n: int,
    *,
    model: str = "sd15",
    last: bool = False,
    t_min: float | None = None,
    t_max: float | None = None,
) -> Tensor:
    """The grid that was optimised for a model of images: `sd15`, `sdxl`, `svd` (video) or
    `deepfloyd_if`.

    Ten levels are the first ten of the eleven published ones: the step to zero noise takes the
    place of the last, as in diffusers and ComfyUI. With `last=True` eleven levels are the eleven.
    Other numbers are interpolated (`Table`).

    Source: Sabour et al., "Align your steps: optimizing sampling schedules in diffusion models"
    (2024), table 3.
    """
    if model not in ALIGN_YOUR_STEPS:
        raise unknown("table of align_your_steps", model, ALIGN_YOUR_STEPS)
    return Table(ALIGN_YOUR_STEPS[model], last=last)(process, n, t_min=t_min, t_max=t_max)
