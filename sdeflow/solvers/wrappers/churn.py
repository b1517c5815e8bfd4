"""EDM's stochastic sampler: noise is added before each step, and the step removes it as well."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sdeflow._utils.math import value_of
from sdeflow.process import Level
from sdeflow.reverse import Reverse
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.runge_kutta import Heun
from sdeflow.solvers.ode.weights import has_signal
from sdeflow.solvers.wrappers.base import Stepwise, independent, noised

LIMIT = math.sqrt(2.0) - 1.0
"""The largest `gamma`: no step more than doubles the variance of the noise."""


@dataclass(frozen=True)
class Churn(Stepwise):
    r"""EDM's stochastic sampler around any solver: raise the noise by a factor `1 + gamma`, then
    step from there.

        nsr_up = (1 + gamma) nsr
        gamma = min(s_churn / N, sqrt(2) - 1) where s_tmin <= nsr <= s_tmax, else 0
        x_up = (s_up / s) x + s_up s_noise sqrt(nsr_up^2 - nsr^2) z
        then a step of `solver` from nsr_up to nsr_next

    `N` is the number of levels: it counts the steps, the last one to zero noise included, as EDM
    and k-diffusion do. All levels are in units of the signal and mean the same under every process.
    The noise is never raised beyond `t_max`, where the network's range ends; a step from `t_max`
    itself adds none. Each step is a solve of its own, so that a multistep method takes only first
    steps. From a level without signal the steps are DDIM's, as many as the solver makes calls. With
    `s_churn=0` the solver is `solver`, bit for bit.

    The defaults are EDM's for ImageNet-64, except for its `s_noise=1.003`. For CIFAR-10 EDM takes
    `s_churn` of 30 or 80, `s_tmax=1` and `s_noise=1.007`. An `s_noise` slightly above 1 makes up
    for the detail that an imperfect network removes. With an exact denoiser it is a bias.

    Cost: that of `solver`. Weak order: that of `solver`, where it needs no past; 0 unless
    `s_noise=1`, a bias that no grid removes. Source: Karras et al. (2022), algorithm 2 and section
    4.
    """

    solver: GridSolver = field(default_factory=lambda: Heun("nsr"))
    s_churn: float = 40.0
    s_tmin: float = 0.05
    s_tmax: float = 50.0
    s_noise: float = 1.0

    source: ClassVar[str] = "Karras et al. 2022, alg. 2"
    cost: ClassVar[str] = "that of `solver`"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (
            0.0 <= self.s_churn < math.inf
            and 0.0 <= self.s_tmin <= self.s_tmax
            and 0.0 <= self.s_noise < 2.0
        ):
            raise ValueError(
                "Churn needs s_churn >= 0, 0 <= s_tmin <= s_tmax and 0 <= s_noise < 2; got"
                f" s_churn={self.s_churn}, s_tmin={self.s_tmin}, s_tmax={self.s_tmax},"
                f" s_noise={self.s_noise}"
            )

    @property
    def active(self) -> bool:
        return self.s_churn > 0.0

    def start(self, steps: int) -> Any:
        return self._gamma(steps + 1) if self.active else super().start(steps)

    def one(self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any) -> Any:
        x, t = self._raised(reverse, x, t, noise, state)
        return self.one_step(reverse, x, t, t_next, independent(noise))

    def finish(self, reverse: Reverse, x: Any, t: Level, noise: Any, state: Any) -> Any:
        if self.active:
            x, t = self._raised(reverse, x, t, noise, state)
            noise = independent(noise)
        return super().finish(reverse, x, t, noise, state)

    def _gamma(self, steps: int) -> float:
        return min(self.s_churn / steps, LIMIT)

    def _raised(
        self, reverse: Reverse, x: Any, t: Level, noise: Any, gamma: float
    ) -> tuple[Any, Level]:
        """The state with more noise, and the level where it then is."""
        if not (has_signal(t) and self.s_tmin <= value_of(t.nsr) <= self.s_tmax):
            return x, t
        lam, end = t.lam - math.log1p(gamma), reverse.level(reverse.process.t_max)
        up = reverse.level_of_lam(lam) if value_of(lam) >= value_of(end.lam) else end
        if not value_of(up.nsr) > value_of(t.nsr) * (1.0 + 1e-12):
            return x, t
        return noised(x, t, up, self.s_noise, noise), up
