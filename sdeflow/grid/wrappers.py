"""Grids made of grids: with all levels shifted to more noise, or without the last level."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.errors import GridError
from sdeflow.grid.base import GridFunction, count, ends, falling, positive
from sdeflow.grid.continuous import uniform_t
from sdeflow.process import Process


def _check(grid: GridFunction) -> None:
    if not callable(grid):
        raise TypeError(
            f"a wrapper takes a grid function, such as sdeflow.grid.karras; got {grid!r}"
        )


@dataclass(frozen=True)
class Shifted:
    """Any grid with every noise-to-signal ratio times `shift`; see `shifted`."""

    grid: GridFunction
    shift: float

    def __post_init__(self) -> None:
        _check(self.grid)
        positive("shifted", "shift", self.shift)

    def __call__(
        self, process: Process, n: int, *, t_min: float | None = None, t_max: float | None = None
    ) -> Tensor:
        low, high = ends(process, n, t_min, t_max)
        nsr = process.nsr(torch.tensor([low, high], dtype=torch.float64))
        inner_low, inner_high = process.t_of_nsr(nsr / self.shift).tolist()
        inner_low = inner_low if inner_low >= 0.0 else low
        inner_high = inner_high if math.isfinite(float(nsr[1])) else high
        # A grid on a table has its own end; a t_min given counts as another one.
        inner_min = None if inner_low == process.t_min else inner_low
        times = self.grid(process, n, t_min=inner_min, t_max=inner_high)
        moved = process.t_of_nsr(self.shift * process.nsr(times))
        moved = torch.where(torch.isfinite(process.nsr(times)), moved, times)
        if times[0] == inner_high:
            moved[0] = high
        if n > 1 and times[-1] == inner_low:
            moved[-1] = low
        return falling(moved, process)


def shifted(grid: GridFunction = uniform_t, shift: float = 3.0) -> Shifted:
    """`grid` with every noise-to-signal ratio times `shift`: `lam` less `log(shift)`,
    `t' = a t / (1 + (a - 1) t)` on a flow.

        sample(model, nfe=28, grid=grid.shifted(grid.uniform_t, shift_of_tokens(4096)))

    The grid is made between the levels that the shift moves to the ends asked for, so that the ends
    are met exactly. (Where the process has no such level, as below the first entry of a table, only
    the end is moved.)

    Source: Esser et al., "Scaling rectified flow transformers" (SD3, 2024), equation 23; Hoogeboom
    et al., "Simple diffusion" (2023), for other paths.
    """
    return Shifted(grid, float(shift))


def shift_of_tokens(
    tokens: float,
    low: tuple[float, float] = (256.0, 0.5),
    high: tuple[float, float] = (4096.0, 1.15),
) -> float:
    """The shift for a sequence of `tokens`: `log shift` on the line through two points
    `(tokens, log shift)`.

    Source: FLUX.1 (Black Forest Labs, 2024), whose two points are the defaults.
    """
    positive("shift_of_tokens", "tokens", tokens)
    if low[0] == high[0]:
        raise GridError(
            f"shift_of_tokens needs two different numbers of tokens; got {low} and {high}"
        )
    return math.exp(low[1] + (tokens - low[0]) * (high[1] - low[1]) / (high[0] - low[0]))


def shift_of_pixels(pixels: float, reference: float) -> float:
    """The shift that keeps the uncertainty of an image of `reference` pixels in one of `pixels`:
    `sqrt(pixels / reference)`.

    Source: Esser et al., "Scaling rectified flow transformers" (SD3, 2024), equation 23.
    """
    positive("shift_of_pixels", "pixels", pixels)
    positive("shift_of_pixels", "reference", reference)
    return math.sqrt(pixels / reference)


@dataclass(frozen=True)
class WithoutLast:
    """The first `n` of `n + 1` levels of a grid; see `without_last`."""

    grid: GridFunction

    def __post_init__(self) -> None:
        _check(self.grid)

    def __call__(
        self, process: Process, n: int, *, t_min: float | None = None, t_max: float | None = None
    ) -> Tensor:
        return self.grid(process, count(n) + 1, t_min=t_min, t_max=t_max)[:n]


def without_last(grid: GridFunction) -> WithoutLast:
    """The first `n` of `n + 1` levels of any grid: the step to zero noise takes the place of the
    last level.

    Source: the convention of ComfyUI's "sgm_uniform" and of flow models.
    """
    return WithoutLast(grid)
