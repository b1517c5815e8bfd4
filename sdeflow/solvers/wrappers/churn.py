"""EDM's stochastic sampler: noise is added before each step, and the step goes so much farther."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sdeflow._utils import math as _math
from sdeflow._utils.math import value_of
from sdeflow.process import Level
from sdeflow.reverse import Reverse
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.runge_kutta import Heun
from sdeflow.solvers.ode.weights import has_signal
from sdeflow.solvers.wrappers.base import Nested, independent

LIMIT = math.sqrt(2.0) - 1.0
"""The largest `gamma`: no step more than doubles the variance of the noise."""


@dataclass(frozen=True)
class Churn(Nested):
    r"""EDM's stochastic sampler around any solver: raise the noise by a factor `1 + gamma`, then
    step from there.

        nsr_up = (1 + gamma) nsr,  gamma = min(s_churn / N, sqrt(2) - 1) where s_tmin <= nsr <= s_tmax, else 0
        x_up = (s_up / s) x + s_up s_noise sqrt(nsr_up^2 - nsr^2) z,  then a step of `solver` from nsr_up to nsr_next

    `N` counts the steps with the last, to zero noise: it is the number of levels, as EDM and
    k-diffusion count. All is in units of the signal, so that it means the same under every process.
    The noise is never raised beyond the process's end of time, where the network's knowledge ends:
    from `t_max` itself a step is taken without. Each step is a solve of its own: a multistep method
    would take nothing but first steps. From a level without signal the steps are DDIM's, as many as
    the solver makes calls. With `s_churn=0` the solver is `solver`, bit for bit.

    The defaults are EDM's for ImageNet-64, but for its `s_noise=1.003`; for CIFAR-10 it takes 30 or
    80 up to `s_tmax=1`, and `s_noise=1.007`. A little more than 1 makes up for what an imperfect
    network takes away, and is a bias for an exact one.

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
    def order(self) -> int:  # type: ignore[override]
        """That of the solver within, of a step at a time."""
        if not self.s_churn:
            return self.solver.order
        return self.one_step_order if self.s_noise == 1.0 else 0

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether noise is drawn."""
        return self.s_churn > 0.0 or self.solver.stochastic

    @property
    def reversible(self) -> bool:  # type: ignore[override]
        """Whether it also encodes."""
        return not self.s_churn and self.solver.reversible

    def calls(self, levels: int, *, finish: bool = True) -> int:
        return (
            self.one_step_budget(levels, finish)
            if self.s_churn
            else self.solver.calls(levels, finish=finish)
        )

    def start(self, steps: int) -> Any:
        return self._gamma(steps + 1) if self.s_churn else self.solver.start(steps)

    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        if not self.s_churn:
            return self.solver.step(reverse, x, t, t_next, noise, state)
        x, t = self._raised(reverse, x, t, noise, state)
        return self.one_step(reverse, x, t, t_next, independent(noise)), state

    def finish(self, reverse: Reverse, x: Any, t: Level, noise: Any, state: Any) -> Any:
        if not self.s_churn:
            return self.solver.finish(reverse, x, t, noise, state)
        x, t = self._raised(reverse, x, t, noise, state)
        return self.solver.finish(reverse, x, t, independent(noise), self.solver.start(0))

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
        x = (up.s / t.s) * x
        if self.s_noise:
            x = (
                x
                + (self.s_noise * up.s * _math.sqrt((up.nsr - t.nsr) * (up.nsr + t.nsr))) * noise()
            )
        return x, up
