r"""What `solver="auto"` does at each budget: a member of the exponential Adams family, and where its levels stand.

`benchmarks/tune_auto.py` searched both together, for the error against the exact probability-flow solution on targets with a
known density, and on the bundled network where the two disagreed; its result, `benchmarks/results/tune_auto.json`, is the table
below. All of it is written in the noise-to-signal ratio, in which every process is the same one, and for data of standard deviation
1/2, as images in [-1, 1] have; for other data the ratios scale with it.

Two regimes came out. Up to seven calls: two predictions in the frame of the angle's velocity, the start corrected. From eight on:
four in the frame of the flow's velocity, every step corrected. Levels are dense about the ratio 1/2, where samples take their
shape; above ten there is little to see but for the widest directions of large pictures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

DATA_STD = 0.5
"""Standard deviation of the data for which the table stands."""


@dataclass(frozen=True)
class Recipe:
    """The member and the grid of a budget; ratios of noise to signal in units of the data."""

    p: int
    frame: str
    clock: str
    corrector: bool
    frame_scale: float
    clock_scale: float
    center: float
    high: float
    low: float
    nsr_end: float
    nsr_top: float


def _few(*numbers: float) -> Recipe:
    return Recipe(2, "v", "bounded_lam", False, *numbers)


def _many(*numbers: float) -> Recipe:
    return Recipe(4, "flow", "angle", True, *numbers)


RECIPES = {
    #          frame, clock, center, high, low, end, top
    2: _few(2.15, 4.24, -0.0704, 0.886, 0.47, 1, 14.4),
    3: _few(0.946, 23, -2.51, 0.398, 0.263, 0.223, 2.66),
    4: _few(1.05, 75.8, 0.739, 0.762, 0.37, 0.171, 7.86),
    5: _few(1.74, 47, 0.607, 0.702, 0.511, 0.0687, 9),
    6: _few(1.26, 41.3, 0.5, 0.741, 0.546, 0.0441, 9),
    8: _many(0.121, 2.56, 0.72, 0.477, 0.493, 0.00143, 11.1),
    10: _many(0.107, 1.63, 0.549, 0.797, 0.548, 0.00389, 10.6),
    12: _many(0.107, 1.63, 0.709, 0.8, 0.548, 0.00389, 10.6),
    16: _many(0.333, 0.742, 0.227, 0.612, 0.528, 0.00292, 194),
    30: _many(0.191, 0.659, 0.562, 0.524, 0.643, 0.0011, 613),
}
"""The table: a row serves from its budget up to the next one's. That of 16 was searched at 20 calls."""


@lru_cache(maxsize=512)
def recipe(nfe: int, data_std: float = DATA_STD) -> Recipe:
    """The recipe of a budget, for data of a standard deviation."""
    r = RECIPES[max((n for n in RECIPES if n <= nfe), default=min(RECIPES))]
    unit = data_std / DATA_STD
    return replace(
        r,
        frame_scale=r.frame_scale * unit,
        clock_scale=r.clock_scale * unit,
        center=r.center - math.log(unit),
        nsr_end=r.nsr_end * unit,
        nsr_top=r.nsr_top * unit,
    )
