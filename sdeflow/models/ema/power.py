r"""Averages of a training's weights with a power profile.

What of their profiles is known in closed form stands here too.

The average of exponent $\gamma$ over a training up to image t is

$$\bar\theta(t) = \int_0^t p_{t,\gamma}(\tau)\,\theta(\tau)\,d\tau,\qquad
p_{t,\gamma}(\tau) = \frac{(\gamma+1)\,\tau^\gamma}{t^{\gamma+1}},$$

kept up to date by $\bar\theta \leftarrow \beta\,\bar\theta + (1-\beta)\,\theta$,
$\beta = (1 - B/t)^{\gamma+1}$ after a batch of B images. Its length is given by `std`, the standard
deviation of its profile as a fraction of the training so far,

$$\mathrm{std}^2 = \frac{\gamma+1}{(\gamma+2)^2(\gamma+3)}.$$

Source. Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models",
section 3.1 and appendix C.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from torch import nn

from sdeflow.models.ema.ema import EMA

WIDEST = 12**-0.5
"""The largest `std`: that of the plain mean over the whole training, exponent 0."""

NARROWEST = 0.001
"""The smallest `std` that is taken: a thousandth of the training."""

Floats = NDArray[np.float64]


def exponent(std: float) -> float:
    r"""The exponent $\gamma \ge 0$ of a profile of relative width `std`.

    It is the largest root of a cubic, in closed form.

    $\gamma^3 + 7\gamma^2 + (16 - s)\gamma + 12 - s = 0$ with $s = \mathrm{std}^{-2}$. Raises
    `ValueError` unless 0.001 <= `std` <= 12^(-1/2) = 0.2887, the width of the plain mean.
    """
    if not NARROWEST <= std <= WIDEST + 1e-12:
        raise ValueError(
            f"the relative width of an average is from {NARROWEST} to {WIDEST:.4f} (the mean of the"
            f" whole training), got std={std}"
        )
    s = std**-2.0
    # With g = u - 7/3 the cubic is u^3 - p u + q = 0, which has three real roots.
    p, q = s + 1 / 3, 2 / 27 + 4 * s / 3
    angle = math.acos(max(-1.0, -1.5 * q / p * math.sqrt(3 / p)))
    return max(0.0, 2 * math.sqrt(p / 3) * math.cos(angle / 3) - 7 / 3)


def width(gamma: float) -> float:
    """The `std` of the profile of exponent `gamma`; `exponent` is its inverse for `gamma` >= 0."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


class PowerEMA(EMA):
    """An average of a network's parameters with a power profile.

    `std` is the profile's relative width. The average is in float32, on the parameters' device.

    It is an average whose half-life grows with the training: ln 2/(gamma + 1) of the images seen.
    What came before the first `update` is forgotten in that update if it is the training's first;
    begun later, the parameters that the network then has stand for all that came before.
    """

    def __init__(self, network: nn.Module, std: float) -> None:
        self.std, self.gamma = float(std), exponent(std)
        super().__init__(network, half_life=math.inf, warmup=math.log(2) / (self.gamma + 1))

    def decay(self, images: int, batch: int) -> float:
        """The factor that the old average keeps after a batch.

        The batch has `batch` images and ends at image number `images`.
        """
        return max(0.0, 1 - batch / images) ** (self.gamma + 1)


def inner(s: Floats, alpha: Floats, t: Floats, gamma: Floats) -> Floats:
    r"""The inner products of profiles.

    One profile is up to s with exponent alpha, the other up to t with gamma; arrays are broadcast.

    $$\frac{(\alpha+1)(\gamma+1)}{\alpha+\gamma+1}\,\frac{(s/t)^\gamma}{t},\qquad s \le t.$$
    """
    first, last = np.minimum(s, t), np.maximum(s, t)
    late = np.where(np.less_equal(s, t), gamma, alpha)
    return (alpha + 1) * (gamma + 1) / (alpha + gamma + 1) * (first / last) ** late / last
