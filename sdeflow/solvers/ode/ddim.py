r"""DDIM, the simplest exponential integrator: the ODE's linear part is solved exactly, the
prediction is held.

With the prediction $x_0$ held constant over a step, the probability-flow ODE has the solution

$$x_+ = \frac{\sigma_+}{\sigma} x + \Big(s_+ - s\frac{\sigma_+}{\sigma}\Big) x_0
= s_+ x_0 + \sigma_+ \varepsilon,$$

which is DDIM. With $\varepsilon$ held constant it is the same map. With the prediction at stages
within the step, the same integral gives exponential Runge-Kutta methods
(`sdeflow.solvers.ode.dpm_solver`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from sdeflow._utils import math as _math
from sdeflow.errors import GridError
from sdeflow.process import Clock, Level
from sdeflow.reverse import Reverse, eps_of
from sdeflow.solvers.base import GridSolver


@dataclass(frozen=True)
class DDIM(GridSolver):
    r"""DDIM: `x_next = s_next x0 + sqrt(sigma_next^2 - u^2) eps + u z`,
    `u^2 = eta^2 sigma_next^2 (1 - nsr_next^2 / nsr^2)`.

    `eta=0` is deterministic, of order 1, and also encodes; `eta=1` is ancestral sampling (`DDPM`),
    of weak order 1.

    Cost: 1 call a step. Order: 1. Source: Song, Meng & Ermon, "DDIM" (2020), equation 12.
    """

    eta: float = 0.0

    order: ClassVar[int] = 1
    source: ClassVar[str] = "Song, Meng & Ermon 2020"

    def __post_init__(self) -> None:
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(
                f"DDIM's eta runs from 0 (deterministic) to 1 (ancestral); got {self.eta}"
            )

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether noise is drawn."""
        return self.eta > 0.0

    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        x0 = reverse(x, t)
        if self.eta == 0.0:
            return t_next.s * x0 + t_next.sigma * eps_of(x, x0, t), state
        share, spread = ancestral_shares(t, t_next, self.eta)
        down, up = t_next.sigma * share, t_next.sigma * spread
        return t_next.s * x0 + down * eps_of(x, x0, t) + up * noise(t, t_next), state


def ancestral_ratio(t: Level, t_next: Level) -> Any:
    """`nsr_next / nsr`: given `x0`, the share of the noise at `t` that an ancestral step keeps; 0
    where no signal is left.

    Given `x(t)` and `x0`, `x(t_next)` has the mean `s_next x0 + sigma_next ratio eps` and the
    standard deviation `sigma_next sqrt(1 - ratio^2)`.
    """
    ratio = (t_next.sigma * t.s) / (t_next.s * t.sigma)
    if not _math.is_tensor(ratio) and ratio >= 1.0:
        raise GridError(
            f"an ancestral step runs from noise to data; nsr went from {t.nsr:g} to {t_next.nsr:g}"
        )
    return ratio


def ancestral_shares(t: Level, t_next: Level, eta: float = 1.0) -> tuple[Any, Any]:
    """What an ancestral step keeps of the noise and what it adds, in units of `sigma_next`; their
    squares sum to 1.
    """
    ratio = ancestral_ratio(t, t_next)
    kept = ratio if eta == 1.0 else _math.sqrt(1.0 - eta**2 + (eta * ratio) ** 2)
    return kept, eta * _math.sqrt((1.0 - ratio) * (1.0 + ratio))


def from_pure_noise(
    reverse: Reverse, x: Any, t: Level, t_next: Level, calls: int, noise: Any, eta: float = 0.0
) -> Any:
    """The way from a level where no signal is left, in `calls` steps of `DDIM(eta)`, evenly spaced
    in the angle `atan nsr`.
    """
    clock = Clock("angle")
    end = clock.reading(t_next)
    lams = [clock.lam(math.pi / 2 + (end - math.pi / 2) * k / calls) for k in range(1, calls)]
    for a, b in pairwise([t, *map(reverse.level_of_lam, lams), t_next]):
        x, _ = DDIM(eta).step(reverse, reverse.materialise(x), a, b, noise, None)
    return x


STAGES: dict[int, tuple[float, ...]] = {1: (), 2: (0.5,), 3: (1.0 / 3.0, 2.0 / 3.0)}
"""The stages of an exponential Runge-Kutta step by its order, as fractions of the step in `lam`."""
