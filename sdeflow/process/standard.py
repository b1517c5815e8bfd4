"""The standard processes: variance preserving, sub-VP, cosine, variance exploding, EDM and
rectified flow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sdeflow._utils.math import as_time
from sdeflow.process.base import Process, check_span


@dataclass(frozen=True)
class _LinearBeta(Process):
    """A process with `s = exp(-1/2 int beta)` and beta linear in time; its subclasses define
    `sigma`.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        check_span(self)
        if not 0 < self.beta_min <= self.beta_max:
            name = type(self).__name__
            raise ValueError(
                f"{name} needs 0 < beta_min <= beta_max; got {self.beta_min} and {self.beta_max}"
            )

    def _decay(self, t: Tensor) -> Tensor:
        """`-log s(t)`, half the integral of beta."""
        return t * (0.5 * self.beta_min + 0.25 * (self.beta_max - self.beta_min) * t)

    def _t_of_decay(self, decay: Tensor) -> Tensor:
        """The positive root of the quadratic `-log s(t) = decay`.

        It is large, but finite, where no signal is left.
        """
        decay = decay.clamp_max(torch.finfo(decay.dtype).max / 1e8)
        half = 0.5 * self.beta_min
        return 2.0 * decay / (half + (half**2 + (self.beta_max - self.beta_min) * decay).sqrt())

    def s(self, t: Tensor) -> Tensor:
        """`exp(-1/2 int beta)`."""
        return torch.exp(-self._decay(t))


@dataclass(frozen=True)
class VP(_LinearBeta):
    r"""Variance preserving, linear beta: $s = \exp(-\frac12\int_0^t\beta)$ and
    $s^2 + \sigma^2 = 1$.

    $\beta(t) = \beta_{min} + t(\beta_{max} - \beta_{min})$, $t \in [0, 1]$.

    Source: Song et al. (2021), equation 11; the continuous form of DDPM (Ho et al., 2020).
    """

    _one_law: ClassVar[bool] = True  # sigma comes from the same function as s

    def variance(self, t: Tensor) -> Tensor:
        """`1 - s^2`, without cancellation."""
        return -torch.expm1(-2.0 * self._decay(t))

    def sigma(self, t: Tensor) -> Tensor:
        """`sqrt(1 - s^2)`."""
        return self.variance(t).sqrt()

    def t_of_lam(self, lam: float | Tensor) -> Tensor:
        """Closed form, from `-log s = log(1 + e^(-2 lam)) / 2`."""
        lam = as_time(lam)
        return self._t_of_decay(0.5 * torch.logaddexp(torch.zeros_like(lam), -2.0 * lam))


@dataclass(frozen=True)
class SubVP(_LinearBeta):
    r"""Sub-VP, linear beta: `s` of `VP` and $\sigma = 1 - s^2$, a variance below that of `VP`.

    Source: Song et al. (2021), equation 12.
    """

    _one_law: ClassVar[bool] = True  # sigma comes from the same function as s

    def sigma(self, t: Tensor) -> Tensor:
        """`1 - s^2`, without cancellation."""
        return -torch.expm1(-2.0 * self._decay(t))

    def t_of_lam(self, lam: float | Tensor) -> Tensor:
        """Closed form, from `nsr = 1/s - s = 2 sinh(-log s)`."""
        return self._t_of_decay(torch.asinh(0.5 * torch.exp(-as_time(lam))))


@dataclass(frozen=True)
class Cosine(Process):
    r"""Variance preserving, cosine: $s = \cos a(t) / \cos a(0)$ with
    $a(t) = \frac{t + \epsilon}{1 + \epsilon}\frac{\pi}{2}$.

    At `t = 1` no signal is left and `nsr` is infinite. The default `t_max` is where `nsr = 1000`.

    Source: Nichol & Dhariwal, "Improved DDPM" (2021), equation 17.
    """

    offset: float = 0.008
    t_min: float = 1e-3
    t_max: float = 1.0 - 1.008 * 2.0 / math.pi * 1e-3
    _one_law: ClassVar[bool] = True  # sigma comes from the same function as s

    def __post_init__(self) -> None:
        check_span(self)
        if self.t_max > 1.0 or not 0 < self.offset < 1:
            raise ValueError(
                f"Cosine needs t_max <= 1 and 0 < offset < 1; got {self.t_max} and {self.offset}"
            )

    @property
    def _start(self) -> float:
        return self.offset * math.pi / 2 / (1.0 + self.offset)

    def s(self, t: Tensor) -> Tensor:
        """`cos a(t) / cos a(0)`."""
        # cos a = sin(pi/2 - a), which is exactly zero at t = 1.
        return torch.sin((1.0 - t) * (math.pi / 2 / (1.0 + self.offset))) / math.cos(self._start)

    def variance(self, t: Tensor) -> Tensor:
        """`1 - s^2 = sin(a(t) - a(0)) sin(a(t) + a(0)) / cos^2 a(0)`, without cancellation."""
        turn = t * (math.pi / 2 / (1.0 + self.offset))
        return torch.sin(turn) * torch.sin(turn + 2.0 * self._start) / math.cos(self._start) ** 2

    def sigma(self, t: Tensor) -> Tensor:
        """`sqrt(1 - s^2)`."""
        return self.variance(t).sqrt()

    def t_of_lam(self, lam: float | Tensor) -> Tensor:
        """Closed form, `a = atan2(sin a, cos a)` with both from `s^2 = sigmoid(2 lam)`."""
        lam = as_time(lam)
        cos, sin = math.cos(self._start), math.sin(self._start)
        a = torch.atan2(
            (sin**2 + cos**2 * torch.sigmoid(-2.0 * lam)).sqrt(),
            cos * torch.sigmoid(2.0 * lam).sqrt(),
        )
        return a * (2.0 * (1.0 + self.offset) / math.pi) - self.offset


@dataclass(frozen=True)
class VE(Process):
    r"""Variance exploding, geometric: $s = 1$,
    $\sigma = \sigma_{min} (\sigma_{max}/\sigma_{min})^t$, $t \in [0, 1]$.

    Source: Song & Ermon, NCSN (2019); Song et al. (2021), equation 9.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 0.0
    t_max: float = 1.0
    default_grid: ClassVar[str] = "uniform_lam"
    default_clock: ClassVar[str] = "nsr"

    def __post_init__(self) -> None:
        check_span(self)
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"VE needs 0 < sigma_min < sigma_max; got {self.sigma_min} and {self.sigma_max}"
            )

    def s(self, t: Tensor) -> Tensor:
        """One."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """`sigma_min (sigma_max / sigma_min)^t`."""
        return self.sigma_min * torch.exp(t * math.log(self.sigma_max / self.sigma_min))

    def t_of_lam(self, lam: float | Tensor) -> Tensor:
        """Closed form."""
        return (-as_time(lam) - math.log(self.sigma_min)) / math.log(
            self.sigma_max / self.sigma_min
        )


@dataclass(frozen=True)
class EDM(Process):
    r"""Variance exploding with time as noise: $s = 1$, $\sigma = t$, from `t_min` = 0.002 to
    `t_max` = 80.

    Source: Karras et al., "Elucidating the design space of diffusion-based generative models"
    (2022).
    """

    t_min: float = 0.002
    t_max: float = 80.0
    default_grid: ClassVar[str] = "uniform_lam"

    def __post_init__(self) -> None:
        check_span(self)

    def s(self, t: Tensor) -> Tensor:
        """One."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """`t`."""
        return t * 1.0

    def t_of_lam(self, lam: float | Tensor) -> Tensor:
        """Closed form, `exp(-lam)`."""
        return torch.exp(-as_time(lam))


@dataclass(frozen=True)
class RectifiedFlow(Process):
    r"""Rectified flow, or flow matching with straight paths: $s = 1 - t$, $\sigma = t$,
    $t \in [0, 1]$.

    At `t = 1` no signal is left: `f`, `g2` and `nsr` are infinite, `velocity = eps - x0` is not.

    Source: Liu et al., "Flow straight and fast" (2022); Lipman et al., "Flow matching" (2022).
    """

    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        check_span(self)
        if self.t_max > 1.0:
            raise ValueError(f"rectified flow ends at t = 1; got t_max={self.t_max}")

    def s(self, t: Tensor) -> Tensor:
        """`1 - t`."""
        return 1.0 - t

    def sigma(self, t: Tensor) -> Tensor:
        """`t`."""
        return t * 1.0

    def t_of_lam(self, lam: float | Tensor) -> Tensor:
        """Closed form, `1 / (1 + e^lam)`."""
        return torch.sigmoid(-as_time(lam))
