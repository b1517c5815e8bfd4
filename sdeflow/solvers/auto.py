"""`solver="auto"`: the method that measured best at the budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

from sdeflow.grid import GridFunction, auto
from sdeflow.process import Level
from sdeflow.recipes import DATA_STD, Recipe, recipe
from sdeflow.reverse import Reverse
from sdeflow.solvers.adams import ExponentialAdams
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.weights import Frame, NodeClock


@dataclass(frozen=True)
class Auto(GridSolver):
    r"""The exponential Adams method that was most accurate at the budget, with the grid that goes with it (`grid="auto"`).

    Up to seven levels `x_next = a x + b_0 F_0 + b_1 F_1` in the frame `"v"` with a corrected start, from eight on four predictions
    in the frame `"flow"`, every step corrected; see `sdeflow.recipes` for the table and how it was found, and `member(levels)` for
    the method. Deterministic. On another grid than its own it is the same method.

    - `data_std`: standard deviation of the data, about 0.5 for images in [-1, 1], 1 for normalised latents.

    Cost: 1 call a step. Order: 3, since its start costs one; in practice 4.
    Source: `benchmarks/tune_auto.py`; the family is Hochbruck & Ostermann (2010), Zhang & Chen (2022), Zhao et al. (2023).
    """

    data_std: float = DATA_STD

    order: ClassVar[int] = 3
    source: ClassVar[str] = "benchmarks/tune_auto.py"

    def __post_init__(self) -> None:
        if not 0.0 < self.data_std < math.inf:
            raise ValueError(f"data_std is the data's standard deviation, positive and finite; got {self.data_std!r}")

    @property
    def default_grid(self) -> str | GridFunction:  # type: ignore[override]
        """`grid="auto"`, for this data."""
        return "auto" if self.data_std == DATA_STD else partial(auto, data_std=self.data_std)

    def member(self, levels: int) -> ExponentialAdams:
        """The method for a grid of so many levels."""
        return member(recipe(levels, self.data_std))

    def start(self, steps: int) -> Any:
        member = self.member(steps + 1)
        return member, member.start(steps)

    def step(self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any) -> tuple[Any, Any]:
        member, inner = state
        x_next, inner = member.step(reverse, x, t, t_next, noise, inner)
        return x_next, (member, inner)


def member(r: Recipe) -> ExponentialAdams:
    """The method of a recipe."""
    frame, clock = cast(Frame, r.frame), cast(NodeClock, r.clock)
    return ExponentialAdams(r.p, frame, clock, r.corrector, frame_scale=r.frame_scale, clock_scale=r.clock_scale)
