"""`solver="auto"`: the method that measured best at the budget."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, cast

import torch

from sdeflow._utils.math import value_of
from sdeflow._utils.renamed import renamed
from sdeflow.denoisers import Denoiser
from sdeflow.grid import GridFunction
from sdeflow.process import Level
from sdeflow.reverse import Reverse
from sdeflow.solvers.auto.grid import auto
from sdeflow.solvers.auto.recipes import DATA_STD, Recipe, Table, recipe
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.adams import ExponentialAdams
from sdeflow.solvers.ode.to_zero import ToZero
from sdeflow.solvers.ode.weights import NodeClock, Predicts


@renamed({"exact": "table"})
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
    - `table`: for which kind of denoiser: `"network"`, which predicts x0, v or the velocity;
      `"noise"`, which predicts eps or the score, and says little of x0 at high noise; `"density"`,
      a known density, whose paths are smooth. None is what the denoiser says of itself, and
      `"network"` where there is none.

    **The first call.** At a ratio of noise to signal $n$ a prediction of the noise that is off by
    $e$ gives an x0 that is off by $n e$. Where the path begins above `nsr_asked` of the recipe, a
    network is asked at that ratio about the rescaled state, `x sqrt(s_a^2 + sigma_a^2) /
    sqrt(s^2 + sigma^2)`, which is what the state there would be if it were noise alone.

    Cost: 1 call a step. Order: 3, since its start costs one; in practice 4. Source:
    `benchmarks/defaults/tune_auto.py`; the family is Hochbruck & Ostermann (2010), Zhang & Chen
    (2022), Zhao et al. (2023).
    """

    data_std: float = DATA_STD
    table: Table | None = None

    order: ClassVar[int] = 3
    source: ClassVar[str] = "benchmarks/defaults/tune_auto.py"

    def __post_init__(self) -> None:
        if isinstance(self.table, bool):  # what `exact` was
            object.__setattr__(self, "table", "density" if self.table else "network")
        super().__post_init__()
        if not 0.0 < self.data_std < math.inf:
            raise ValueError(
                "data_std is the data's standard deviation, positive and finite; got"
                f" {self.data_std!r}"
            )

    @property
    def default_grid(self) -> str | GridFunction:  # type: ignore[override]
        """`grid="auto"`, for this data and this kind of denoiser."""
        if self.data_std == DATA_STD and self.table in (None, "network"):
            return "auto"
        own = partial(auto, data_std=self.data_std, table=self.table or "network")
        own.__name__ = "auto"  # type: ignore[attr-defined]
        return own

    def for_denoiser(self, denoiser: Denoiser) -> Auto:
        """With the table for this kind of denoiser, unless one was asked for."""
        return replace(self, table=table_for(denoiser)) if self.table is None else self

    def recipe(self, levels: int) -> Recipe:
        """What it does on a grid of so many levels."""
        return recipe(levels, self.data_std, self.table or "network")

    def member(self, levels: int) -> ExponentialAdams:
        """The method for a grid of so many levels."""
        return member(self.recipe(levels))

    def start(self, steps: int) -> Any:
        member = self.member(steps + 1)
        return self.recipe(steps + 1).nsr_asked, member, member.start(steps)

    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        asked, member, inner = state
        below, t = self._asked(reverse, t, asked)
        x_next, inner = member.step(below, x, t, t_next, noise, inner)
        return x_next, (asked, member, inner)

    def finish(self, reverse: Reverse, x: Any, t: Level, noise: Any, state: Any) -> Any:
        asked, member, inner = state
        return member.finish(self._asked(reverse, t, asked)[0], x, t, noise, inner)

    def _asked(self, reverse: Reverse, t: Level, asked: float) -> tuple[Reverse, Level]:
        """The reverse process that is asked up to a ratio alone, and the level to step from."""
        below = _AskedBelow(reverse, asked)
        if self.table == "density" and value_of(t.s) == 0.0:
            # From a level with a millionth of signal the first step can be corrected.
            below.at, t = t, reverse.level_of_lam(-math.log(_NO_SIGNAL))
        return cast(Reverse, below), t


_NO_SIGNAL = 1e6


class _AskedBelow:
    """A reverse process whose denoiser is asked at noise-to-signal ratios up to `nsr` alone.

    `at` is the level without signal for which a level at `_NO_SIGNAL` stands in.
    """

    def __init__(self, reverse: Reverse, nsr: float):
        self._reverse, self._nsr = reverse, nsr
        self.at: Level | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reverse, name)

    def __call__(self, x: Any, t: Level) -> Any:
        t = t if self.at is None else self.at
        if not value_of(t.nsr) > self._nsr * (1.0 + 1e-9):
            return self._reverse(x, t)
        level = self._reverse.level_of_lam(-math.log(self._nsr))
        size, there = (torch.hypot(*map(torch.as_tensor, (a.s, a.sigma))) for a in (t, level))
        return self._reverse(x * float(there / size), level)


def table_for(denoiser: Denoiser) -> Table:
    """The table for a denoiser: by what it says of itself, or the network in it predicts."""
    if denoiser.known_density:
        return "density"
    return "noise" if getattr(denoiser, "predicts", None) in ("eps", "score") else "network"


def member(r: Recipe) -> ExponentialAdams:
    """The method of a recipe."""
    return ExponentialAdams(
        r.p,
        cast(Predicts, r.frame),
        cast(NodeClock, r.clock),
        r.corrector,
        predicts_scale=r.frame_scale,
        clock_scale=r.clock_scale,
        to_zero=cast(ToZero, r.to_zero),
    )
