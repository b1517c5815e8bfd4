"""`solver="auto"`: the method that measured best at the budget."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, cast

from sdeflow.denoisers import Denoiser
from sdeflow.grid import GridFunction
from sdeflow.process import Level
from sdeflow.reverse import Reverse
from sdeflow.solvers.auto.grid import auto
from sdeflow.solvers.auto.recipes import DATA_STD, Recipe, recipe
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.adams import ExponentialAdams
from sdeflow.solvers.ode.weights import NodeClock, Predicts


@dataclass(frozen=True)
class Auto(GridSolver):
    r"""The exponential Adams method that was most accurate at the budget, with the grid that goes
    with it (`grid="auto"`).

    `x_next = a x + sum_j b_j F_j` over two to four predictions in the frame `"v"` or `"flow"`,
    mostly with every step corrected; see `sdeflow.solvers.auto.recipes` for the tables and how they
    were found, and `member(levels)` for the method. Deterministic. On another grid than its own it
    is the same method.

    - `data_std`: standard deviation of the data, about 0.5 for images in [-1, 1], 1 for normalised
      latents.
    - `exact`: whether the denoiser is that of a known density, whose smooth paths reward higher
      orders. None is what the denoiser says of itself (`Denoiser.known_density`), and no where there is
      none.

    Cost: 1 call a step. Order: 3, since its start costs one; in practice 4. Source:
    `benchmarks/defaults/tune_auto.py`; the family is Hochbruck & Ostermann (2010), Zhang & Chen
    (2022), Zhao et al. (2023).
    """

    data_std: float = DATA_STD
    exact: bool | None = None

    order: ClassVar[int] = 3
    source: ClassVar[str] = "benchmarks/defaults/tune_auto.py"

    def __post_init__(self) -> None:
        if not 0.0 < self.data_std < math.inf:
            raise ValueError(
                "data_std is the data's standard deviation, positive and finite; got"
                f" {self.data_std!r}"
            )

    @property
    def default_grid(self) -> str | GridFunction:  # type: ignore[override]
        """`grid="auto"`, for this data and this kind of denoiser."""
        if self.data_std == DATA_STD and not self.exact:
            return "auto"
        own = partial(auto, data_std=self.data_std, exact=bool(self.exact))
        own.__name__ = "auto"  # type: ignore[attr-defined]
        return own

    def for_denoiser(self, denoiser: Denoiser) -> Auto:
        """With the table for this kind of denoiser, unless one was asked for."""
        return replace(self, exact=denoiser.known_density) if self.exact is None else self

    def member(self, levels: int) -> ExponentialAdams:
        """The method for a grid of so many levels."""
        return member(recipe(levels, self.data_std, bool(self.exact)))

    def start(self, steps: int) -> Any:
        member = self.member(steps + 1)
        return member, member.start(steps)

    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        member, inner = state
        x_next, inner = member.step(reverse, x, t, t_next, noise, inner)
        return x_next, (member, inner)


def member(r: Recipe) -> ExponentialAdams:
    """The method of a recipe."""
    predicts, clock = cast(Predicts, r.frame), cast(NodeClock, r.clock)
    return ExponentialAdams(
        r.p, predicts, clock, r.corrector, predicts_scale=r.frame_scale, clock_scale=r.clock_scale
    )
