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
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch

from sdeflow._utils import math as _math
from sdeflow._utils.checks import is_number
from sdeflow._utils.math import value_of
from sdeflow.errors import GridError
from sdeflow.process import Clock, Level
from sdeflow.reverse import Reverse, eps_of
from sdeflow.solvers.base import GridSolver


@dataclass(frozen=True)
class DDIM(GridSolver):
    r"""DDIM: `x_next = s_next x0 + sqrt(sigma_next^2 - u^2) eps + u z`,
    `u^2 = eta^2 sigma_next^2 (1 - nsr_next^2 / nsr^2)`.

    `eta=0` is deterministic, of order 1, and also encodes; `eta=1` is ancestral sampling (`DDPM`),
    of weak order 1. Every `eta >= 0` has the right marginals for exact predictions of a point, as
    long as `u <= sigma_next` in every step; beyond 1 that limits how far a step may go.

    `std` sets `u` freely, in place of `eta`: a number for each step, or a function
    `std(t, t_next)` of two levels. These are the paper's `sigma_t`, on any sub-sequence of times.

    Errors: `GridError` where `u > sigma_next` (the paper's `sigma_t^2 > 1 - alpha_bar_{t-1}`):
    there is no such process. `ValueError` for an `eta` below 0, or `std` that does not fit.

    Cost: 1 call a step. Order: 1. Source: Song, Meng & Ermon, "DDIM" (2020), equations 12 and 16.
    """

    eta: float = 0.0
    std: tuple[float, ...] | Callable[[Level, Level], Any] | None = field(
        default=None, kw_only=True, repr=False
    )

    order: ClassVar[int] = 1
    source: ClassVar[str] = "Song, Meng & Ermon 2020"

    def __post_init__(self) -> None:
        if not is_number(self.eta, 0.0):
            raise ValueError(
                "DDIM's eta is a number from 0 (deterministic) up, 1 is ancestral; got"
                f" {self.eta!r}"
            )
        if self.std is None:
            return
        if self.eta != 0.0:
            raise ValueError("DDIM takes eta or std, not both")
        if not callable(self.std):
            numbers = tuple(float(u) for u in self.std)
            if not all(is_number(u, 0.0) for u in numbers):
                raise ValueError(f"std holds a number of at least 0 for each step; got {numbers}")
            object.__setattr__(self, "std", numbers)

    def __repr__(self) -> str:
        free = "" if self.std is None else f", std={self.std!r}"
        return f"DDIM(eta={self.eta!r}{free})"

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether noise is drawn."""
        return self.eta > 0.0 or (self.std is not None and (callable(self.std) or any(self.std)))

    def start(self, steps: int) -> Any:
        """With `std`, the number of the step; else nothing."""
        if self.std is None:
            return None
        if not callable(self.std) and len(self.std) != steps:
            raise ValueError(
                f"std of DDIM holds {len(self.std)} numbers, and the grid has {steps} steps between"
                " its levels: give one a step (the step to zero noise draws none)"
            )
        return 0

    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        x0 = reverse(x, t)
        if self.std is not None:
            up = self.std(t, t_next) if callable(self.std) else self.std[state]
            share = up / t_next.sigma
            return self._noised(x, x0, t, t_next, up, 1.0 - share * share, noise), state + 1
        if self.eta == 0.0:
            return t_next.s * x0 + t_next.sigma * eps_of(x, x0, t), state
        if self.eta > 1.0:
            ratio = ancestral_ratio(t, t_next)
            up = self.eta * t_next.sigma * _math.sqrt((1.0 - ratio) * (1.0 + ratio))
            left = 1.0 - self.eta**2 + (self.eta * ratio) ** 2
            return self._noised(x, x0, t, t_next, up, left, noise), state
        share, spread = ancestral_shares(t, t_next, self.eta)
        down, up = t_next.sigma * share, t_next.sigma * spread
        return t_next.s * x0 + down * eps_of(x, x0, t) + up * noise(t, t_next), state

    def _noised(
        self, x: Any, x0: Any, t: Level, t_next: Level, up: Any, left: Any, noise: Any
    ) -> Any:
        """The step that draws noise of the standard deviation `up`, with `left` of the variance of
        the noise kept: `left = 1 - (up / sigma_next)^2`.
        """
        if bool(torch.as_tensor(left).min() < -1e-12):
            most = (
                ""
                if self.std is not None
                else (f": eta is at most {value_of(self.eta / _math.sqrt(1.0 - left)):.6g} there")
            )
            raise GridError(
                f"DDIM draws noise of standard deviation {value_of(up):.6g} in the step from"
                f" t={value_of(t.t):g} to {value_of(t_next.t):g}, more than the whole noise at the"
                f" end, {value_of(t_next.sigma):.6g}{most}"
            )
        down = t_next.sigma * _math.sqrt(left if _math.is_tensor(left) else max(left, 0.0))
        x_next = t_next.s * x0 + down * eps_of(x, x0, t)
        return x_next if isinstance(up, float) and up == 0.0 else x_next + up * noise(t, t_next)


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
