r"""What `solver="auto"` does at each budget: a member of the exponential Adams family, and where its levels stand.

`benchmarks/tune_auto.py` searched both together, for the error against the exact probability-flow solution on targets with a
known density; its result, `benchmarks/results/tune_auto.json`, is the table below. All of it is written in the noise-to-signal
ratio, in which every process is the same one, and for data of standard deviation 1/2, as images in [-1, 1] have; for other data
the ratios scale with it.

Two regimes came out. Up to seven calls: two predictions in the frame of the angle's velocity, the start corrected. From eight on:
four in the frame of the flow's velocity, every step corrected. Levels are dense about the ratio 1/2, where samples take their
shape, and the first step is a long one, since beyond a ratio of 10 all that is to be seen is the data's mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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
    2: _few(1.64, 7.4, 0.237, 0.886, 0.5, 0.812, 16.3),
    3: _few(0.809, 36.3, -2.52, 0.372, 0.235, 0.23, 2.66),
    4: _few(1.09, 254, 2.46, 0.582, 0.819, 0.138, 3.1),
    5: _few(1.03, 62.8, 1.72, 0.604, 1.55, 0.0776, 3.55),
    6: _many(0.05, 1.7, 0.5, 0.979, 0.528, 0.0302, 4.36),
    7: _many(0.106, 2.07, -0.0328, 0.872, 0.417, 0.00466, 5.75),
    8: _many(0.112, 2.36, 0.472, 0.6, 0.496, 0.00401, 11.3),
    9: _many(0.105, 1.73, 0.425, 0.649, 0.478, 0.00478, 11.7),
    10: _many(0.157, 1.33, 0.586, 0.628, 0.488, 0.00955, 20.3),
    12: _many(0.177, 1.11, 0.514, 0.874, 0.483, 0.0124, 48.4),
    15: _many(0.387, 1.37, 0.504, 0.871, 0.613, 0.0121, 67.8),
    20: _many(0.199, 0.413, 0.141, 0.855, 0.497, 0.00326, 184),
    25: _many(0.22, 0.514, 0.336, 0.744, 0.543, 0.00224, 446),
    30: _many(0.185, 0.516, 0.536, 0.715, 0.643, 0.00123, 524),
    40: _many(0.134, 0.509, 0.397, 0.755, 0.65, 0.0011, 1e03),
    50: _many(0.129, 0.66, 0.52, 0.702, 0.667, 0.0011, 1e03),
    70: _many(0.21, 0.722, 0.641, 0.588, 0.679, 0.0011, 976),
    100: _many(0.363, 1.08, 0.735, 0.487, 0.732, 0.0011, 1e03),
}
"""The table, by budget; between its rows numbers are interpolated in the logarithm of the budget, beyond its ends they stay."""


@lru_cache(maxsize=512)
def recipe(nfe: int, data_std: float = DATA_STD) -> Recipe:
    """The recipe of a budget, for data of a standard deviation."""
    below = max((n for n in RECIPES if n <= nfe), default=min(RECIPES))
    above = min((n for n in RECIPES if n >= nfe), default=max(RECIPES))
    a, b = RECIPES[below], RECIPES[above]
    u = (math.log(nfe) - math.log(below)) / (math.log(above) - math.log(below)) if above != below else 0.0
    if a.p != b.p:
        a, u = (a, 0.0)  # two regimes do not mix

    def between(name: str) -> float:
        low, high = getattr(a, name), getattr(b, name)
        return low + u * (high - low) if name == "center" else low ** (1.0 - u) * high**u

    unit = data_std / DATA_STD
    return Recipe(
        a.p,
        a.frame,
        a.clock,
        a.corrector,
        between("frame_scale") * unit,
        between("clock_scale") * unit,
        between("center") - math.log(unit),
        between("high"),
        between("low"),
        between("nsr_end") * unit,
        between("nsr_top") * unit,
    )
