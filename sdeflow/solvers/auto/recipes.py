r"""What `solver="auto"` does at each budget: a member of the exponential Adams family, and where
its levels stand.

Searches found both together, by the error against the exact probability-flow solution.
`benchmarks/defaults/tune_auto.py` found the table for networks, and that for densities up to 7
calls (`benchmarks/results/tune_auto.json`); `benchmarks/defaults/search_tables.py` the rest
(`benchmarks/results/search_tables.json`). All is written in the noise-to-signal ratio, in which
every process is the same one, and for data of standard deviation 1/2, as images in [-1, 1] have;
for other data the ratios scale with it.

There are three tables, for three kinds of denoiser. A row of one is several times worse in the
place of another.

- `"density"`: a known density has smooth paths. From 8 calls on: four predictions with a
  corrector, levels dense about the ratio 0.4, the numbers of the method constant from 16 calls on,
  and a second level that rises with the budget.
- `"network"`: a network that predicts x0, v or the velocity. Its paths are less smooth, and images
  of many pixels begin to take shape at ratios above 30: two or three predictions, and a wider grid.
- `"noise"`: a network that predicts eps or the score. Its x0 at the ratio n is off by n times its
  error, so that the first call of a few says nothing at the top of the path: it is asked at
  `nsr_asked` at most, and the levels after it are lower.

`to_zero` is the step to zero noise, see `sdeflow.solvers.ode.to_zero`: over several predictions
where there are enough calls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from sdeflow.errors import unknown

Table = Literal["network", "noise", "density"]
"""What a denoiser is made of."""

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
    nsr_asked: float = math.inf
    to_zero: str = "prediction"


# A row: p, frame, clock, corrector; frame_scale, clock_scale; center, high, low; nsr_end, nsr_top.

NETWORK = {
    2: Recipe(2, "v", "bounded_lam", False, 0.884, 2.38, -0.384, 0.591, 0.492, 1, 42.1),
    3: Recipe(2, "v", "bounded_lam", False, 0.719, 35, -4.89, 0.0525, 0.236, 0.702, 8.03),
    4: Recipe(3, "v", "bounded_lam", False, 0.345, 258, -0.705, 1.1, 0.538, 0.224, 9.9),
    5: Recipe(3, "flow", "bounded_lam", False, 0.284, 18.6, 0.116, 0.562, 0.277, 0.166, 11.6),
    6: Recipe(2, "flow", "bounded_lam", True, 0.755, 8.58, 0.904, 0.255, 0.05, 0.0882, 10.8),
    7: Recipe(2, "flow", "bounded_lam", True, 1.08, 5.63, -0.0843, 0.391, 0.121, 0.071, 11.8),
    8: Recipe(2, "flow", "bounded_lam", True, 0.691, 5.55, -0.00838, 0.378, 0.16, 0.0565, 12.5),
    10: Recipe(3, "flow", "bounded_lam", True, 0.148, 245, 0.173, 0.394, 0.232, 0.0267, 25.3),
    # As for 10: what lies between 10 and 12 is worse.
    11: Recipe(3, "flow", "bounded_lam", True, 0.148, 245, 0.173, 0.394, 0.232, 0.0267, 25.3),
    12: Recipe(3, "flow", "bounded_lam", True, 0.12, 161, -0.836, 0.457, 0.3, 0.0154, 34),
    15: Recipe(2, "flow", "bounded_lam", True, 0.672, 101, -0.406, 0.551, 0.335, 0.0145, 28),
    20: Recipe(3, "flow", "bounded_lam", True, 0.157, 109, -0.871, 0.62, 0.289, 0.00885, 47.3),
    25: Recipe(3, "flow", "bounded_lam", True, 0.0885, 109, -0.689, 0.62, 0.234, 0.00591, 49.4),
    30: Recipe(3, "flow", "bounded_lam", True, 0.0554, 247, -8.1, 0.428, 0.0661, 0.00304, 85.7),
    40: Recipe(3, "flow", "bounded_lam", True, 0.05, 102, -8, 0.633, 0.0747, 0.00284, 200),
}
"""The table for networks that predict x0, v or the velocity."""

# fmt: off
NOISE = {
    2: Recipe(
        2, "v", "bounded_lam", False, 0.884, 2.38, -0.384, 0.591, 0.492, 1, 42.1,
        nsr_asked=20,
    ),
    3: Recipe(
        3, "flow", "bounded_lam", True, 0.608, 309, -3.23, 0.0601, 1.18, 0.585, 2,
        nsr_asked=30.3,
    ),
    4: Recipe(
        3, "flow", "bounded_lam", True, 0.0696, 290, -3.06, 0.05, 0.11, 0.23, 2,
        nsr_asked=11.1,
    ),
    5: Recipe(
        2, "flow", "bounded_lam", True, 0.197, 125, -0.736, 1.67, 0.192, 0.118, 3.02,
        nsr_asked=27.8,
    ),
    6: Recipe(
        3, "flow", "bounded_lam", True, 0.487, 180, -0.272, 1.5, 0.235, 0.133, 6.84,
        nsr_asked=11.7,
    ),
    7: Recipe(
        2, "flow", "bounded_lam", True, 0.458, 185, -0.274, 0.518, 0.406, 0.0458, 42.1,
        nsr_asked=50.5,
    ),
    8: Recipe(
        2, "flow", "bounded_lam", True, 0.211, 262, -0.316, 0.474, 0.311, 0.018, 37,
        nsr_asked=48,
    ),
    10: Recipe(
        2, "flow", "bounded_lam", True, 0.247, 221, -0.293, 0.546, 0.314, 0.0168, 41.5,
        nsr_asked=50, to_zero="linear",
    ),
    12: Recipe(
        2, "flow", "bounded_lam", True, 2.31, 0.798, 1.08, 0.366, 0.718, 0.0104, 141,
        nsr_asked=264, to_zero="linear",
    ),
    14: Recipe(
        2, "flow", "bounded_lam", True, 2.47, 0.642, 1.12, 0.366, 0.712, 0.01, 167,
        nsr_asked=399, to_zero="linear",
    ),
    16: Recipe(
        3, "flow", "bounded_lam", True, 0.6, 121, 0.3, 0.45, 0.4, 0.015, 101,
        nsr_asked=121, to_zero="linear",
    ),
    50: Recipe(
        3, "flow", "bounded_lam", True, 0.6, 121, 0.3, 0.45, 0.4, 0.0105, 101,
        nsr_asked=121, to_zero="linear",
    ),
}
"""The table for networks that predict eps or the score."""

DENSITY = {
    2: Recipe(2, "v", "bounded_lam", False, 2.15, 4.24, -0.0704, 0.886, 0.47, 1, 14.4),
    3: Recipe(2, "v", "bounded_lam", False, 0.946, 23, -2.51, 0.398, 0.263, 0.223, 2.66),
    4: Recipe(2, "v", "bounded_lam", False, 1.05, 75.8, 0.739, 0.762, 0.37, 0.171, 7.86),
    5: Recipe(2, "v", "bounded_lam", False, 1.74, 47, 0.607, 0.702, 0.511, 0.0687, 9),
    6: Recipe(2, "v", "bounded_lam", False, 1.26, 41.3, 0.5, 0.741, 0.546, 0.0441, 9),
    7: Recipe(2, "v", "bounded_lam", False, 1.53, 100, -0.206, 0.809, 0.312, 0.0271, 11.4),
    8: Recipe(
        4, "flow", "angle", True, 0.0805, 2.43, 0.727, 0.426, 0.616, 0.00157, 24.1,
        to_zero="smooth",
    ),
    12: Recipe(
        4, "flow", "angle", True, 0.0725, 5.1, 0.727, 0.413, 0.536, 0.00144, 34.3,
        to_zero="smooth",
    ),
    16: Recipe(
        4, "flow", "angle", True, 0.0659, 7.24, 0.992, 0.413, 0.674, 0.00185, 38.8,
        to_zero="smooth",
    ),
    40: Recipe(
        4, "flow", "angle", True, 0.0659, 7.24, 0.992, 0.413, 0.674, 0.0014, 110,
        to_zero="smooth",
    ),
    80: Recipe(
        4, "flow", "angle", True, 0.0659, 7.24, 0.992, 0.413, 0.674, 0.0012, 160,
        to_zero="smooth",
    ),
    200: Recipe(
        4, "flow", "angle", True, 0.0659, 7.24, 0.992, 0.413, 0.674, 0.001, 400,
        to_zero="smooth",
    ),
}
# fmt: on
"""The table for denoisers of known densities."""


TABLES: dict[str, dict[int, Recipe]] = {"network": NETWORK, "noise": NOISE, "density": DENSITY}
"""The tables by the kind of denoiser that they are for."""


@lru_cache(maxsize=512)
def recipe(nfe: int, data_std: float = DATA_STD, table: Table = "network") -> Recipe:
    """The recipe of a budget, for data of a standard deviation and a kind of denoiser.

    Between two rows of one kind of method its numbers lie between theirs: along straight lines in
    their logarithms (`center` is one) over the logarithm of the budget, so that a call more changes
    them little. Where the methods differ a row serves until the next.
    """
    if table not in TABLES:
        raise unknown("table", table, TABLES)
    r = _between(TABLES[table], nfe)
    unit = data_std / DATA_STD
    return replace(
        r,
        frame_scale=r.frame_scale * unit,
        clock_scale=r.clock_scale * unit,
        center=r.center - math.log(unit),
        nsr_end=r.nsr_end * unit,
        nsr_top=r.nsr_top * unit,
        nsr_asked=r.nsr_asked * unit,
    )


_METHOD = ("p", "frame", "clock", "corrector", "to_zero")
_NUMBERS = ("frame_scale", "clock_scale", "high", "low", "nsr_end", "nsr_top", "nsr_asked")


def _between(rows: dict[int, Recipe], nfe: int) -> Recipe:
    """The row of a budget, between those beside it."""
    low = max((n for n in rows if n <= nfe), default=min(rows))
    high = min((n for n in rows if n > nfe), default=low)
    a, b = rows[low], rows[high]
    if high == low or nfe <= low or any(getattr(a, k) != getattr(b, k) for k in _METHOD):
        return a
    u = math.log(nfe / low) / math.log(high / low)
    mixed = {k: getattr(a, k) ** (1.0 - u) * getattr(b, k) ** u for k in _NUMBERS}
    return replace(a, center=a.center * (1.0 - u) + b.center * u, **mixed)
