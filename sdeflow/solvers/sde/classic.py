r"""Solvers of the reverse SDE, and Langevin sampling at falling noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sdeflow._utils import math as _math
from sdeflow.process import Level
from sdeflow.reverse import Reverse, eps_of
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.ddim import ancestral_shares


@dataclass(frozen=True)
class EulerMaruyama(GridSolver):
    r"""Euler-Maruyama on the reverse SDE: `x_next = x + h (f x - g2 score) + sqrt(g2 |h|) z`,
    `h = t_next - t`.

    Where no signal is left (`s = 0`: rectified flow at t = 1) `f` and `g2` are infinite, and the
    step taken is the exact ancestral one.

    Cost: 1 call a step. Weak order: 1. Source: Song et al. (2021); Kloeden & Platen (1992), section
    10.2.
    """

    order: ClassVar[int] = 1
    stochastic: ClassVar[bool] = True
    source: ClassVar[str] = "Song et al. 2021"

    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        if _no_signal(t):
            return DDPM().step(reverse, x, t, t_next, noise, state)
        h = t_next.t - t.t
        g2 = t.g2
        eps = reverse.eps(x, t)  # score = -eps / sigma
        return (
            x + h * (t.f * x + (g2 / t.sigma) * eps) + _math.sqrt(-g2 * h) * noise(t, t_next),
            state,
        )


@dataclass(frozen=True)
class DDPM(GridSolver):
    r"""DDPM's ancestral sampling (its algorithm 2): the posterior mean of `x(t_next)` given `x(t)`
    and `x0`, plus noise.

    With `u` the posterior's standard deviation, `u^2 = sigma_next^2 (1 - nsr_next^2 / nsr^2)`:
    `x_next = s_next x0 + sqrt(sigma_next^2 - u^2) eps + u z`. `variance="large"` draws the noise of
    the forward step instead, `u^2 = sigma^2 - (s / s_next)^2 sigma_next^2` (beta on consecutive
    entries of a table), which suits only many small steps.

    Cost: 1 call a step. Weak order: 1. Source: Ho et al. (2020), algorithm 2 and section 3.2.
    """

    variance: Literal["small", "large"] = "small"

    order: ClassVar[int] = 1
    stochastic: ClassVar[bool] = True
    source: ClassVar[str] = "Ho et al. 2020, alg. 2"

    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        x0 = reverse(x, t)
        share, spread = ancestral_shares(t, t_next)
        down = t_next.sigma * share  # sqrt(sigma_next^2 - u^2), without cancellation
        # The forward step's variance is sigma^2 - (s / s_next)^2 sigma_next^2 = sigma^2 (1 -
        # ratio^2).
        up = (t if self.variance == "large" else t_next).sigma * spread
        return t_next.s * x0 + down * eps_of(x, x0, t) + up * noise(t, t_next), state


@dataclass(frozen=True)
class AnnealedLangevin(GridSolver):
    r"""Annealed Langevin dynamics: at every level `steps` moves `x += a/2 score + sqrt(a) z`,
    `a = step_size sigma^2`.

    Between levels the state is rescaled by the ratio of `s`. NCSN's `a_i = e sigma_i^2 / sigma_L^2`
    is `step_size = e / sigma_L^2` (0.2 in the paper, with 100 steps a level; the default of 5 mixes
    far modes poorly). It samples each level's distribution up to the bias of the moves. The bias
    falls with `step_size` and not with the number of levels: the method has no order. Levels must
    be close together, since the moves cannot remove the noise of a distant level: use hundreds.

    Cost: `steps` calls a level, and 1. Order: 0. Source: Song & Ermon, "NCSN" (2019), algorithm 1.
    """

    steps: int = 5
    step_size: float = 0.2

    order: ClassVar[int] = 0
    stochastic: ClassVar[bool] = True
    source: ClassVar[str] = "Song & Ermon 2019, alg. 1"
    cost: ClassVar[str] = "`steps` a level"

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0.0 < self.step_size < 4.0:
            raise ValueError(
                "AnnealedLangevin needs steps >= 1 and 0 < step_size < 4 (beyond, it diverges);"
                f" got {self.steps}, {self.step_size}"
            )

    def calls(self, levels: int, *, finish: bool = True) -> int:
        return self.steps * levels + 1 if finish else self.steps * (levels - 1)

    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        x = self._moves(reverse, x, t, noise)
        # Where no signal is left the state is noise alone, and keeps its place in the next level's
        # noise.
        return x * (t_next.sigma / t.sigma if _no_signal(t) else t_next.s / t.s), state

    def finish(self, reverse: Reverse, x: Any, t: Level, noise: Any, state: Any) -> Any:
        return reverse(self._moves(reverse, x, t, noise), t)

    def _moves(self, reverse: Reverse, x: Any, t: Level, noise: Any) -> Any:
        for _ in range(self.steps):
            x = langevin_move(reverse, x, t, 0.5 * self.step_size * t.sigma**2, noise)
        return x


def _no_signal(t: Level) -> bool:
    """Whether all is noise at a level; of one time only, levels with one time a sample are inside
    of the process.
    """
    return bool(t.s == 0.0) if not _math.is_tensor(t.s) or t.s.numel() == 1 else False


def langevin_move(reverse: Reverse, x: Any, t: Level, size: Any, noise: Any) -> Any:
    """One move of Langevin dynamics at a level, `x + size score + sqrt(2 size) z`, which leaves
    `p(x, t)` almost unchanged.
    """
    return x + size * reverse.score(x, t) + _math.sqrt(2.0 * size) * noise()
