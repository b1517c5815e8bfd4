r"""Exponential integrators: the ODE's linear part solved exactly, the network's prediction
interpolated.

With the prediction $x_0$ held constant over a step, the probability-flow ODE has the solution

$$x_+ = \frac{\sigma_+}{\sigma} x + \Big(s_+ - s\frac{\sigma_+}{\sigma}\Big) x_0 = s_+ x_0 + \sigma_+ \varepsilon,$$

which is DDIM; with $\varepsilon$ held constant it is the same map. With the prediction at stages
within the step, at fractions $r$ of it in $\lambda$, the same integral gives exponential
Runge-Kutta methods (`exponential_step`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sdeflow._utils import math as _math
from sdeflow._utils.math import Scalar
from sdeflow.errors import GridError
from sdeflow.process import Level, Process
from sdeflow.reverse import Reverse, eps_of
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.weights import frame_value, has_signal, moment


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

    @property
    def reversible(self) -> bool:  # type: ignore[override]
        """Whether it also encodes."""
        return self.eta == 0.0

    def step(
        self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
    ) -> tuple[Any, Any]:
        x0 = reverse(x, t)
        if self.eta == 0.0:
            return t_next.s * x0 + t_next.sigma * eps_of(x, x0, t), state
        ratio = ancestral_ratio(t, t_next)
        up = self.eta * t_next.sigma * _math.sqrt((1.0 - ratio) * (1.0 + ratio))
        # sqrt(sigma_next^2 - up^2), without cancellation.
        down = t_next.sigma * (
            ratio if self.eta == 1.0 else _math.sqrt(1.0 - self.eta**2 + (self.eta * ratio) ** 2)
        )
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


STAGES: dict[int, tuple[float, ...]] = {1: (), 2: (0.5,), 3: (1.0 / 3.0, 2.0 / 3.0)}
"""Where the stages of an exponential Runge-Kutta step stand, as fractions of it in `lam`, by
order.
"""


def stage_times(process: Process, times: Tensor, ratios: tuple[float, ...]) -> Tensor | None:
    """The times of the stages of the steps between `times`."""
    lam = process.lam(times)
    lam = lam[torch.isfinite(lam)]
    if not ratios or len(lam) < 2:
        return None
    return process.t_of_lam(torch.stack([lam[:-1] + r * lam.diff() for r in ratios]))


def exponential_step(
    reverse: Reverse,
    x: Any,
    x0: Any,
    t: Level,
    t_next: Level,
    ratios: tuple[float, ...],
    frame: str = "x0",
    taylor: bool = True,
    parabola: bool = False,
) -> Any:
    r"""An exponential Runge-Kutta step in `lam` of order 1, 2 or 3, with `len(ratios)` stages
    besides the prediction `x0` at `t`.

    With $P(r)$ the first-order step to $\lambda + r h$, $M_k(r)$ the weight of $u^k$ on the way
    there (`moment`) and $F_j$ the prediction at the $j$-th stage, in the frame x0 or eps:

        u_1 = P(r_1)
        x_next = P(1) + M_1(1)/r_1 (F_1 - F_0)                                                      one stage
        u_2 = P(r_2) + (r_2/r_1) M_1(r_2) (F_1 - F_0),  x_next = P(1) + M_1(1)/r_2 (F_2 - F_0)      two stages

    `taylor=False` takes $M_0/2$ for $M_1$ where there is one stage; `parabola` takes, where there
    are two, the polynomial of degree 2 through all three predictions instead of a line through two.
    From and to a level without signal the step is of order 1.

    Source: Lu et al., "DPM-Solver" (2022), algorithms 1-2 and 4-5; Hochbruck & Ostermann (2005).
    """
    if not ratios or not has_signal(t, t_next):
        return t_next.s * x0 + t_next.sigma * eps_of(x, x0, t)
    h = t_next.lam - t.lam
    value = frame_value(frame, x, x0, t)

    def weight(k: int, level: Level, r: float) -> Scalar:
        return level.s * moment(k, r * h) if frame == "x0" else level.sigma * moment(k, -r * h)

    def first_order(level: Level, r: float) -> Any:
        kept = level.sigma / t.sigma if frame == "x0" else level.s / t.s
        return kept * x + weight(0, level, r) * value

    def slope(u: Any, level: Level) -> Any:
        return frame_value(frame, u, reverse(u, level), level) - value

    stages = [reverse.level_of_lam(t.lam + r * h) for r in ratios]
    u = first_order(stages[0], ratios[0])
    change = slope(u, stages[0])
    if len(ratios) == 1:
        full = weight(1, t_next, 1.0) if taylor else 0.5 * weight(0, t_next, 1.0)
        return first_order(t_next, 1.0) + (full / ratios[0]) * change
    r1, r2 = ratios
    u = first_order(stages[1], r2) + (r2 / r1 * weight(1, stages[1], r2)) * change
    second = slope(u, stages[1])
    x_next = first_order(t_next, 1.0)
    if not parabola:
        return x_next + (weight(1, t_next, 1.0) / r2) * second
    # Its slope at the start is (r2 d1 - r1 d2) / (r2 - r1) and its curve (d2 - d1) / (r2 - r1),
    # with d = change / r.
    line, curve = weight(1, t_next, 1.0), weight(2, t_next, 1.0)
    return (
        x_next
        + ((r2 * line - curve) / (r1 * (r2 - r1))) * change
        + ((curve - r1 * line) / (r2 * (r2 - r1))) * second
    )
