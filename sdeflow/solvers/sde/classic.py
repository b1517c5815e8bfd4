r"""Solvers of the reverse SDE, and Langevin sampling at falling noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sdeflow._utils import math as _math
from sdeflow._utils.math import value_of
from sdeflow.errors import SolverError, unknown
from sdeflow.plan.instructions import Call
from sdeflow.plan.plan import Plan
from sdeflow.process import Level, Process
from sdeflow.reverse import Reverse, eps_of
from sdeflow.solvers.base import GridSolver, Solution, Task, check_levels
from sdeflow.solvers.ode.ddim import ancestral_shares
from sdeflow.solvers.sde.optimal import Optimal


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
    `x_next = s_next x0 + sqrt(sigma_next^2 - u^2) eps + v z`. `variance` says what `v` is:

    - `"small"`: `v = u`, DDPM's beta-tilde on consecutive entries of a table. It is exact for data
      of a single point.
    - `"large"`: the noise of the forward step, `v^2 = sigma^2 - (s / s_next)^2 sigma_next^2`, which
      is beta on consecutive entries. It is exact for `N(0, I)` data under VP. With exact scores on
      Gaussian data of standard deviation 0.5 it is nearer to the right law than `"small"` at all
      step counts from 10 to 1000.
    - `Optimal(moment)`: `v^2 = u^2 + s_next^2 (1 - nsr_next^2 / nsr^2)^2 e`, with the prediction's
      mean squared error e (Analytic-DPM). It is exact for Gaussian data `N(m, c^2 I)`.
    - `"learned"`: `log v^2` between those of "small" and "large", as a network with
      `learned_variance=True` says for each entry. The fraction is read on the process that the
      network was trained under. Such a solve has no plan: no capture, no tuning.

    Errors: `ValueError` for an unknown variance, or `"learned"` with a denoiser that has none.

    Cost: 1 call a step. Weak order: 1. Source: Ho et al. (2020), algorithm 2 and section 3.2; Bao
    et al. (2022); Nichol & Dhariwal (2021), equation 15.
    """

    variance: Literal["small", "large", "learned"] | Optimal = "small"

    order: ClassVar[int] = 1
    stochastic: ClassVar[bool] = True
    source: ClassVar[str] = "Ho et al. 2020, alg. 2"

    def __post_init__(self) -> None:
        if not isinstance(self.variance, Optimal):
            names = ("small", "large", "learned")
            if self.variance not in names:
                raise unknown("variance", self.variance, names)

    @property
    def without_plan(self) -> str | None:
        if self.variance == "learned":
            return "DDPM(variance='learned') draws noise of a variance that the network predicts"
        return None

    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        if self.variance == "learned":
            return self._learned(reverse, x, t, t_next, noise)[0], state
        x0 = reverse(x, t)
        share, spread = ancestral_shares(t, t_next)
        down = t_next.sigma * share  # sqrt(sigma_next^2 - u^2), without cancellation
        # The forward step's variance is sigma^2 - (s / s_next)^2 sigma_next^2 = sigma^2 (1 -
        # ratio^2).
        up = (t if self.variance == "large" else t_next).sigma * spread
        if isinstance(self.variance, Optimal):
            error = self.variance.mean_squared_error(value_of(t.nsr))
            up = _math.sqrt(up**2 + (t_next.s * spread**2) ** 2 * error)
        return t_next.s * x0 + down * eps_of(x, x0, t) + up * noise(t, t_next), state

    def _learned(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any
    ) -> tuple[Any, Any]:
        """The step with a learned variance, and the prediction."""
        x0, fraction = reverse.predict(x, t)[:2]
        share, spread = ancestral_shares(t, t_next)
        least = t_next.sigma * spread
        # "large" is sigma / sigma_next times "small", on the network's own process.
        native = getattr(reverse.denoiser, "native", reverse.process)
        wide, narrow = t.sigma, t_next.sigma
        if native != reverse.process:
            wide, narrow = (
                float(native.sigma(native.t_of_lam(level.lam))) for level in (t, t_next)
            )
        up = least * (fraction * math.log(wide / narrow)).exp()
        mean = t_next.s * x0 + t_next.sigma * share * eps_of(x, x0, t)
        return mean + up * noise(t, t_next), x0

    def plan(
        self,
        process: Process,
        times: Tensor | Sequence[float],
        *,
        finish: bool = True,
        record: bool = False,
    ) -> Plan:
        if self.without_plan:
            raise SolverError(
                f"{self.without_plan}, so that it has no plan: sample with it directly, or choose"
                " variance='small', 'large' or Optimal(...)"
            )
        return super().plan(process, times, finish=finish, record=record)

    def _solve(self, task: Task) -> Solution:
        if not self.without_plan:
            return super()._solve(task)
        reverse, x, noise, on_call = task.reverse, task.x, task.noise, task.on_call
        if "fraction" not in reverse.denoiser.outputs:
            raise ValueError(
                "DDPM(variance='learned') needs a network that says its variance:"
                f" Prediction(..., learned_variance=True); {reverse.denoiser!r} does not"
            )
        if noise is None:
            raise SolverError("DDPM draws noise: give it a source of noise")
        levels = check_levels(reverse.prepare(task.times), reverse.process)
        before, states = reverse.forwards, [x]

        def draw(t: Level, t_next: Level) -> Tensor:
            return noise.draw(value_of(t.nsr), value_of(t_next.nsr)).to(x)

        for k, (t, t_next) in enumerate(pairwise([*levels, *levels[-1:] * task.finish])):
            given = x
            if k == len(levels) - 1:  # the step to zero noise
                x = x0 = reverse(x, t)
            else:
                x, x0 = self._learned(reverse, x, t, t_next, draw)
            states = [*states, x] if task.record else [x]
            if on_call is not None:
                on_call(k, Call(0, 0, t.t, t.s, t.sigma), given, x0)
        return Solution(
            x,
            self.calls(len(levels), finish=task.finish),
            reverse.forwards - before,
            trajectory=torch.stack(states) if task.record else None,
        )


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
