r"""What `solver="auto"` does at each budget: a member of the exponential Adams family, and where its levels stand.

`benchmarks/tune_auto.py` searched both together, for the error against the exact probability-flow solution on targets with a
known density and on the bundled network; `benchmarks/results/tune_auto.json` holds what it found, and the table below is of its
rows. All of it is written in the noise-to-signal ratio, in which every process is the same one, and for data of standard deviation
1/2, as images in [-1, 1] have; for other data the ratios scale with it.

Smooth targets and a network want different things: four predictions with a corrector against two or three, a start below the ratio
10 against one above 30, where pictures of many pixels begin to take shape. The rows from six calls on are between the two. From
eight on nearly all are four predictions in the frame of the flow's velocity, every step corrected, with levels dense about the
ratio 1/2.
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


RECIPES = {
    # p, frame, clock, corrector; frame_scale, clock_scale; center, high, low; nsr_end, nsr_top
    2: Recipe(2, "v", "bounded_lam", False, 2.15, 4.24, -0.0704, 0.886, 0.47, 1, 14.4),
    3: Recipe(2, "v", "bounded_lam", False, 0.719, 35, -4.89, 0.0525, 0.236, 0.702, 8.03),
    4: Recipe(2, "v", "bounded_lam", False, 1.05, 75.8, 0.739, 0.762, 0.37, 0.171, 7.86),
    5: Recipe(2, "v", "bounded_lam", False, 1.74, 47, 0.607, 0.702, 0.511, 0.0687, 9),
    6: Recipe(2, "flow", "bounded_lam", True, 0.755, 8.58, 0.904, 0.255, 0.05, 0.0882, 10.8),
    7: Recipe(2, "flow", "bounded_lam", True, 1.08, 5.63, -0.0843, 0.391, 0.121, 0.071, 11.8),
    8: Recipe(4, "flow", "angle", True, 0.0798, 2.55, 0.725, 0.494, 0.516, 0.00722, 11.3),
    10: Recipe(4, "flow", "angle", True, 0.129, 2.82, 0.502, 0.494, 0.586, 0.0014, 18.6),
    12: Recipe(4, "flow", "angle", True, 0.152, 302, -0.674, 0.379, 0.36, 0.0114, 29.9),
    15: Recipe(3, "flow", "bounded_lam", True, 0.219, 16, -1.24, 0.721, 0.226, 0.0145, 33.6),
    20: Recipe(4, "flow", "angle", True, 0.162, 1.37, -0.393, 0.597, 0.484, 0.0064, 159),
    25: Recipe(4, "flow", "angle", True, 0.166, 1.16, -0.336, 0.6, 0.423, 0.00449, 244),
    30: Recipe(4, "flow", "angle", True, 0.247, 1.01, -0.123, 0.588, 0.455, 0.00244, 599),
    50: Recipe(4, "flow", "angle", True, 0.191, 0.659, 0.562, 0.524, 0.643, 0.0011, 613),
}
"""The table: a row serves from its budget up to the next one's."""


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
