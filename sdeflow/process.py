r"""What noise does: two functions of time, `s(t)` and `sigma(t)`, from which everything else follows.

A process takes data $x_0$ at small $t$ to noise at large $t$,

$$x(t) = s(t)\,x_0 + \sigma(t)\,\varepsilon, \qquad \varepsilon \sim N(0, I).$$

Matching the mean and the variance of this with those of the linear SDE $dx = f(t)\,x\,dt + g(t)\,dw$ gives
$m' = f m$ and $v' = 2 f v + g^2$, hence

$$f = s'/s, \qquad g^2 = (\sigma^2)' - 2 f \sigma^2 = 2(\sigma\sigma' - f\sigma^2) = s^2\,\frac{d\,\mathrm{nsr}^2}{dt},
\qquad \mathrm{nsr} = \sigma/s,$$

and back again $s = s_0 \exp\int f$, $\sigma^2 = s^2(\sigma_0^2/s_0^2 + \int g^2/s^2)$ (`from_sde`). All of it is computed in
float64 by automatic differentiation, vectorised over `t`; a solve asks once, before its loop (`Process.levels`).
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sdeflow import _math
from sdeflow._math import Scalar, as_time, derivative, expand, with_derivative


@dataclass(frozen=True, slots=True)
class Level:
    """One instant of a process: its time and the numbers that a step needs there.

    The entries are Python floats; 0-d float64 tensors where gradients flow through them; or tensors `[B, 1, ...]`, one
    value a sample, in solvers that step every sample by itself.
    """

    t: Scalar
    s: Scalar
    sigma: Scalar
    ds: Scalar
    dsigma: Scalar

    @property
    def nsr(self) -> Scalar:
        """Noise-to-signal ratio `sigma / s`; infinite where no signal is left."""
        return self.sigma / self.s if _math.is_tensor(self.s) or self.s != 0.0 else math.inf

    @property
    def lam(self) -> Scalar:
        """Half the log signal-to-noise ratio, `log(s / sigma)`."""
        return _math.log(self.s) - _math.log(self.sigma)

    @property
    def f(self) -> Scalar:
        """Drift coefficient `f = s' / s`; infinite where no signal is left."""
        return self.ds / self.s if _math.is_tensor(self.s) or self.s != 0.0 else -math.inf

    @property
    def g2(self) -> Scalar:
        """Squared diffusion coefficient `2 (sigma sigma' - f sigma^2)`; infinite where no signal is left."""
        return 2.0 * self.sigma * (self.dsigma - self.f * self.sigma)


class Process(ABC):
    """A noising process $x(t) = s(t) x_0 + \\sigma(t) \\varepsilon$; subclass it with `s` and `sigma`, the rest is derived.

    `s` is positive (zero is allowed at `t_max`) and `sigma / s` increases with `t`. Both are written in torch and are
    called with float64 tensors of any shape. `t_min` and `t_max` bound the times at which samplers work: they start at
    `t_max` and take the step to zero noise at `t_min`.

        class Trigonometric(Process):
            def s(self, t): return torch.cos(t * torch.pi / 2)
            def sigma(self, t): return torch.sin(t * torch.pi / 2)

    Source: Song et al., "Score-based generative modeling through SDEs" (2021); Karras et al. (2022), appendix B.
    """

    t_min: float = 1e-3
    t_max: float = 1.0
    default_grid: ClassVar[str] = "uniform_sqrt_t"
    """The grid that samplers use unless told otherwise; chosen by measurement (`benchmarks/defaults.py`)."""
    default_clock: ClassVar[str] = "t"
    """The variable in which Runge-Kutta methods step unless told otherwise; chosen likewise."""

    def __init_subclass__(cls) -> None:
        # A user's s = 1 is a number, or a tensor of one: it stands for every time.
        super().__init_subclass__()
        for name in ("s", "sigma", "variance"):
            if name in vars(cls):
                setattr(cls, name, _filled(vars(cls)[name]))

    @abstractmethod
    def s(self, t: Tensor) -> Tensor:
        """Signal coefficient `s(t)`, of the shape of `t`."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise in `x(t)`, of the shape of `t`."""

    def variance(self, t: Tensor) -> Tensor:
        """`sigma(t)^2`; override it where `sigma` is a square root that reaches zero, so that `g2` stays finite there."""
        return self.sigma(t) ** 2

    # ------------------------------------------------------------------------------------------------ derived functions

    def ds(self, t: float | Tensor) -> Tensor:
        """`s'(t)`."""
        return derivative(self.s, as_time(t))

    def dsigma(self, t: float | Tensor) -> Tensor:
        """`sigma'(t)`; infinite where `sigma` is a square root that reaches zero."""
        return derivative(self.sigma, as_time(t))

    def f(self, t: float | Tensor) -> Tensor:
        """Drift coefficient `f(t) = s'(t) / s(t)` of the SDE."""
        return self.ds(t) / self.s(as_time(t))

    def g2(self, t: float | Tensor) -> Tensor:
        """Squared diffusion coefficient `g(t)^2 = (sigma^2)' - 2 f sigma^2` of the SDE."""
        t = as_time(t)
        return derivative(self.variance, t) - 2.0 * self.f(t) * self.variance(t)

    def g(self, t: float | Tensor) -> Tensor:
        """Diffusion coefficient `g(t)`."""
        return self.g2(t).sqrt()

    def nsr(self, t: float | Tensor) -> Tensor:
        """Noise-to-signal ratio `sigma / s`, which EDM calls sigma; from 0 to infinity."""
        t = as_time(t)
        return self.sigma(t) / self.s(t)

    def lam(self, t: float | Tensor) -> Tensor:
        """`log(s / sigma)`, half the log signal-to-noise ratio."""
        t = as_time(t)
        return self.s(t).log() - self.sigma(t).log()

    def angle(self, t: float | Tensor) -> Tensor:
        """`atan(sigma / s)`, from 0 (data) to pi/2 (noise); finite where `nsr` is not."""
        t = as_time(t)
        return torch.atan2(self.sigma(t), self.s(t))

    def t_of_lam(self, lam: float | Tensor) -> Tensor:
        """The time at which `log(s / sigma) = lam`, differentiable.

        A root sought between `t_min` and `t_max`, beyond which it is the nearer end; closed forms, where a process has one,
        go on.
        """
        return _math.monotone_root(self.lam, as_time(lam), self.t_min, self.t_max)

    def t_of_nsr(self, nsr: float | Tensor) -> Tensor:
        """The time at which `sigma / s = nsr`, differentiable; `nsr = inf` gives the end of time."""
        return self.t_of_lam(-as_time(nsr).log())

    @property
    def prior_std(self) -> float:
        """Standard deviation of the noise from which samplers start, `sigma(t_max)`."""
        return float(self.sigma(torch.tensor(self.t_max, dtype=torch.float64)))

    def levels(self, times: Tensor | Sequence[float]) -> list[Level]:
        """The process at each of `times` (`[K]`), everything that steps need of it, in one vectorised pass.

        The entries are Python floats, or 0-d tensors where gradients flow through the times or the process.
        """
        t = torch.as_tensor(times, dtype=torch.float64)
        s, ds = with_derivative(self.s, t)
        sigma, dsigma = with_derivative(self.sigma, t)
        # A signal of rounding's size is none: cos(pi/2) is 6e-17, and may be -6e-17.
        s = torch.where(s.abs() < 1e-15 * sigma, torch.zeros_like(s), s)
        columns = [torch.broadcast_to(column, t.shape) for column in (t, s, sigma, ds, dsigma)]
        if any(column.requires_grad for column in columns) and torch.is_grad_enabled():
            return [Level(*row) for row in zip(*(column.unbind() for column in columns), strict=True)]
        return [Level(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]

    def level(self, t: float | Tensor) -> Level:
        """The process at one time."""
        return self.levels(as_time(t).reshape(1))[0]

    # ---------------------------------------------------------------------------------------- kernel, SDEs, and the ODE

    def kernel(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """`(s, sigma)`: the perturbation kernel is `x(t) | x0 ~ N(s x0, sigma^2 I)`."""
        t = as_time(t)
        return self.s(t), self.sigma(t)

    def perturb(self, x0: Tensor, t: float | Tensor, eps: Tensor) -> Tensor:
        """`x(t) = s(t) x0 + sigma(t) eps`; `t` is one time or one a sample (`[B]`)."""
        s, sigma = self.kernel(t)
        return expand(s, x0) * x0 + expand(sigma, x0) * eps

    def drift(self, x: Tensor, t: float | Tensor) -> Tensor:
        """Drift `f(t) x` of the forward SDE $dx = f x dt + g dw$."""
        return expand(self.f(t), x) * x

    def reverse_drift(self, x: Tensor, t: float | Tensor, score: Tensor) -> Tensor:
        r"""Drift of the reverse SDE $dx = (f x - g^2 \nabla\log p)\,dt + g\,d\bar w$, run from `t_max` down.

        Source: Anderson, "Reverse-time diffusion equation models" (1982).
        """
        return expand(self.f(t), x) * x - expand(self.g2(t), x) * score

    def velocity(self, x0: Tensor, eps: Tensor, t: float | Tensor) -> Tensor:
        r"""Right-hand side of the probability-flow ODE, $dx/dt = s' x_0 + \sigma' \varepsilon = f x - g^2 \nabla\log p / 2$."""
        return expand(self.ds(t), x0) * x0 + expand(self.dsigma(t), x0) * eps

    # ---------------------------------------------------------------------------------------------------- conversions

    def x0_from_eps(self, x: Tensor, eps: Tensor, t: float | Tensor) -> Tensor:
        """`x0 = (x - sigma eps) / s`."""
        s, sigma = self.kernel(t)
        return (x - expand(sigma, x) * eps) / expand(s, x)

    def eps_from_x0(self, x: Tensor, x0: Tensor, t: float | Tensor) -> Tensor:
        """`eps = (x - s x0) / sigma`."""
        s, sigma = self.kernel(t)
        return (x - expand(s, x) * x0) / expand(sigma, x)

    def x0_from_score(self, x: Tensor, score: Tensor, t: float | Tensor) -> Tensor:
        """Tweedie's formula, `x0 = (x + sigma^2 score) / s`."""
        t = as_time(t)
        return (x + expand(self.variance(t), x) * score) / expand(self.s(t), x)

    def score_from_x0(self, x: Tensor, x0: Tensor, t: float | Tensor) -> Tensor:
        """`score = (s x0 - x) / sigma^2`."""
        t = as_time(t)
        return (expand(self.s(t), x) * x0 - x) / expand(self.variance(t), x)

    def x0_from_v(self, x: Tensor, v: Tensor, t: float | Tensor) -> Tensor:
        """`x0 = (s x - sigma r v) / r^2` with `r^2 = s^2 + sigma^2`, where `v = (s eps - sigma x0) / r`."""
        s, sigma = (expand(c, x) for c in self.kernel(t))
        r2 = s**2 + sigma**2
        return (s * x - sigma * r2.sqrt() * v) / r2

    def v_from_x0(self, x: Tensor, x0: Tensor, t: float | Tensor) -> Tensor:
        """`v = (s eps - sigma x0) / sqrt(s^2 + sigma^2)`, the velocity along the angle `atan(sigma / s)`.

        Source: Salimans & Ho, "Progressive distillation" (2022), where `s^2 + sigma^2 = 1`.
        """
        s, sigma = (expand(c, x) for c in self.kernel(t))
        r = (s**2 + sigma**2).sqrt()
        return (s * x - r**2 * x0) / (sigma * r)

    def x0_from_velocity(self, x: Tensor, velocity: Tensor, t: float | Tensor) -> Tensor:
        """`x0 = (sigma' x - sigma velocity) / (s sigma' - s' sigma)`."""
        s, sigma = (expand(c, x) for c in self.kernel(t))
        ds, dsigma = expand(self.ds(t), x), expand(self.dsigma(t), x)
        return (dsigma * x - sigma * velocity) / (s * dsigma - ds * sigma)

    def velocity_from_x0(self, x: Tensor, x0: Tensor, t: float | Tensor) -> Tensor:
        """`velocity = s' x0 + sigma' eps` with `eps = (x - s x0) / sigma`."""
        return self.velocity(x0, self.eps_from_x0(x, x0, t), t)

    # --------------------------------------------------------------------------------------------------- constructors

    @classmethod
    def from_sde(
        cls,
        f: Callable[[Tensor], Tensor],
        g2: Callable[[Tensor], Tensor],
        *,
        s0: float = 1.0,
        sigma0: float = 0.0,
        t_min: float = 1e-3,
        t_max: float = 1.0,
    ) -> FromSDE:
        """The process of the SDE $dx = f(t) x dt + g(t) dw$, started at `t = 0` with `s0` and `sigma0`; see `FromSDE`."""
        return FromSDE(f, g2, s0=s0, sigma0=sigma0, t_min=t_min, t_max=t_max)

    @classmethod
    def from_betas(cls, betas: Sequence[float] | Tensor) -> FromBetas:
        """The process of a DDPM table of variances $\\beta_1 \\dots \\beta_N$; see `FromBetas`."""
        return FromBetas(tuple(torch.as_tensor(betas, dtype=torch.float64).tolist()))


def _filled(function: Callable[[Process, Tensor], Tensor]) -> Callable[[Process, Tensor], Tensor]:
    """`function` of time with a result of the shape of the time, also where it returns one number."""

    @functools.wraps(function)
    def fill(self: Process, t: Tensor) -> Tensor:
        value = function(self, t)
        if isinstance(value, Tensor) and value.shape == t.shape:
            return value
        return torch.as_tensor(value, dtype=t.dtype, device=t.device).expand(t.shape)

    return fill


def _check_span(process: Process) -> None:
    if not process.t_min < process.t_max:
        raise ValueError(
            f"a process runs from t_min to a larger t_max; got t_min={process.t_min}, t_max={process.t_max}"
        )


@dataclass(frozen=True)
class _LinearBeta(Process):
    """A process with `s = exp(-1/2 int beta)` and beta linear in time; its subclasses say what `sigma` is."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        _check_span(self)
        if not 0 < self.beta_min <= self.beta_max:
            name = type(self).__name__
            raise ValueError(f"{name} needs 0 < beta_min <= beta_max; got {self.beta_min} and {self.beta_max}")

    def _decay(self, t: Tensor) -> Tensor:
        """`-log s(t)`, half the integral of beta."""
        return t * (0.5 * self.beta_min + 0.25 * (self.beta_max - self.beta_min) * t)

    def _t_of_decay(self, decay: Tensor) -> Tensor:
        """The positive root of the quadratic `-log s(t) = decay`; finite, if large, where no signal is left."""
        decay = decay.clamp_max(torch.finfo(decay.dtype).max / 1e8)
        half = 0.5 * self.beta_min
        return 2.0 * decay / (half + (half**2 + (self.beta_max - self.beta_min) * decay).sqrt())

    def s(self, t: Tensor) -> Tensor:
        """`exp(-1/2 int beta)`."""
        return torch.exp(-self._decay(t))


@dataclass(frozen=True)
class VP(_LinearBeta):
    r"""Variance preserving, linear beta: $s = \exp(-\frac12\int_0^t\beta)$ and $s^2 + \sigma^2 = 1$.

    $\beta(t) = \beta_{min} + t(\beta_{max} - \beta_{min})$, $t \in [0, 1]$.

    Source: Song et al. (2021), equation 11; the continuous form of DDPM (Ho et al., 2020).
    """

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

    def sigma(self, t: Tensor) -> Tensor:
        """`1 - s^2`, without cancellation."""
        return -torch.expm1(-2.0 * self._decay(t))

    def t_of_lam(self, lam: float | Tensor) -> Tensor:
        """Closed form, from `nsr = 1/s - s = 2 sinh(-log s)`."""
        return self._t_of_decay(torch.asinh(0.5 * torch.exp(-as_time(lam))))


@dataclass(frozen=True)
class Cosine(Process):
    r"""Variance preserving, cosine: $s = \cos a(t) / \cos a(0)$ with $a(t) = \frac{t + \epsilon}{1 + \epsilon}\frac{\pi}{2}$.

    At `t = 1` the signal is gone and `nsr` infinite; the default `t_max` stops at `nsr = 1000`.

    Source: Nichol & Dhariwal, "Improved DDPM" (2021), equation 17.
    """

    offset: float = 0.008
    t_min: float = 1e-3
    t_max: float = 1.0 - 1.008 * 2.0 / math.pi * 1e-3

    def __post_init__(self) -> None:
        _check_span(self)
        if self.t_max > 1.0 or not 0 < self.offset < 1:
            raise ValueError(f"Cosine needs t_max <= 1 and 0 < offset < 1; got {self.t_max} and {self.offset}")

    @property
    def _start(self) -> float:
        return self.offset * math.pi / 2 / (1.0 + self.offset)

    def s(self, t: Tensor) -> Tensor:
        """`cos a(t) / cos a(0)`."""
        # cos a, from what is missing to a right angle: exact at t = 1, where it is zero.
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
        a = torch.atan2((sin**2 + cos**2 * torch.sigmoid(-2.0 * lam)).sqrt(), cos * torch.sigmoid(2.0 * lam).sqrt())
        return a * (2.0 * (1.0 + self.offset) / math.pi) - self.offset


@dataclass(frozen=True)
class VE(Process):
    r"""Variance exploding, geometric: $s = 1$, $\sigma = \sigma_{min} (\sigma_{max}/\sigma_{min})^t$, $t \in [0, 1]$.

    Source: Song & Ermon, NCSN (2019); Song et al. (2021), equation 9.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 0.0
    t_max: float = 1.0
    default_grid: ClassVar[str] = "uniform_lam"
    default_clock: ClassVar[str] = "nsr"

    def __post_init__(self) -> None:
        _check_span(self)
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"VE needs 0 < sigma_min < sigma_max; got {self.sigma_min} and {self.sigma_max}")

    def s(self, t: Tensor) -> Tensor:
        """One."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """`sigma_min (sigma_max / sigma_min)^t`."""
        return self.sigma_min * torch.exp(t * math.log(self.sigma_max / self.sigma_min))

    def t_of_lam(self, lam: float | Tensor) -> Tensor:
        """Closed form."""
        return (-as_time(lam) - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class EDM(Process):
    r"""Variance exploding with time as noise: $s = 1$, $\sigma = t$, from `t_min` = 0.002 to `t_max` = 80.

    Source: Karras et al., "Elucidating the design space of diffusion-based generative models" (2022).
    """

    t_min: float = 0.002
    t_max: float = 80.0
    default_grid: ClassVar[str] = "uniform_lam"

    def __post_init__(self) -> None:
        _check_span(self)

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
    r"""Rectified flow, or flow matching with straight paths: $s = 1 - t$, $\sigma = t$, $t \in [0, 1]$.

    At `t = 1` no signal is left: `f`, `g2` and `nsr` are infinite, `velocity = eps - x0` is not.

    Source: Liu et al., "Flow straight and fast" (2022); Lipman et al., "Flow matching" (2022).
    """

    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        _check_span(self)
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


@dataclass(frozen=True)
class FromBetas(Process):
    r"""The process of a DDPM table $\beta_1 \dots \beta_N$, exact at its own nodes: $s(i/N)^2 = \prod_{j \le i}(1 - \beta_j)$.

    Between the nodes $-\log s$ is the monotone piecewise cubic through them (and through $s(0) = 1$), once continuously
    differentiable. The network's index of time `t` is `t N - 1`. A table of any length works.

    Errors: `ValueError` where a beta is outside (0, 1); a last beta of 1 (zero-terminal SNR) has no logarithm.

    Source: Ho et al., "Denoising diffusion probabilistic models" (2020); Fritsch & Carlson (1980) for the curve.
    """

    betas: tuple[float, ...]
    _nodes: Tensor = field(init=False, repr=False, compare=False)
    _slopes: Tensor = field(init=False, repr=False, compare=False)
    t_min: float = field(init=False)
    t_max: float = field(init=False, default=1.0)
    default_grid: ClassVar[str] = "quadratic"

    @torch.inference_mode(False)
    def __post_init__(self) -> None:
        betas = torch.tensor(self.betas, dtype=torch.float64)
        if betas.ndim != 1 or len(betas) < 1 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(
                "a table of betas is a vector with every entry inside (0, 1)"
                + (
                    "; a last beta of 1 means zero-terminal SNR: drop it, or use a continuous process"
                    if len(betas) and float(betas.max()) >= 1
                    else ""
                )
            )
        n = len(betas)
        nodes = torch.cat([torch.zeros(1, dtype=torch.float64), -0.5 * torch.log1p(-betas).cumsum(0)])
        object.__setattr__(self, "t_min", 1.0 / n if n > 1 else 0.5)
        object.__setattr__(self, "_nodes", nodes)
        object.__setattr__(self, "_slopes", _monotone_slopes(nodes, 1.0 / n))

    def __repr__(self) -> str:
        return f"FromBetas({len(self.betas)} betas, {self.betas[0]:g} .. {self.betas[-1]:g})"

    def index(self, t: float | Tensor) -> Tensor:
        """The position of `t` in the table, counted from 0, as a real number."""
        return as_time(t) * len(self.betas) - 1.0

    def time(self, index: int | float | Tensor) -> Tensor:
        """The time of an entry of the table, counted from 0."""
        return (as_time(index) + 1.0) / len(self.betas)

    def _decay(self, t: Tensor) -> Tensor:
        """`-log s(t)`: the cubic Hermite curve through the table."""
        n = len(self.betas)
        nodes, slopes = self._nodes.to(t.device, t.dtype), self._slopes.to(t.device, t.dtype)
        i = (t.detach() * n * (1 + 1e-15)).floor().long().clamp(0, n - 1)
        u, h = t * n - i, 1.0 / n
        return (
            nodes[i] * (1 + 2 * u) * (1 - u) ** 2
            + nodes[i + 1] * u**2 * (3 - 2 * u)
            + h * u * (1 - u) * (slopes[i] * (1 - u) - slopes[i + 1] * u)
        )

    def s(self, t: Tensor) -> Tensor:
        """Square root of the cumulative product of `1 - beta`."""
        return torch.exp(-self._decay(t))

    def variance(self, t: Tensor) -> Tensor:
        """`1 - s^2`, without cancellation."""
        return -torch.expm1(-2.0 * self._decay(t))

    def sigma(self, t: Tensor) -> Tensor:
        """`sqrt(1 - s^2)`."""
        return self.variance(t).sqrt()


def _monotone_slopes(y: Tensor, h: float) -> Tensor:
    """Slopes that make the cubic Hermite curve through equally spaced `y` monotone (harmonic means of the secants)."""
    secants = y.diff() / h
    inner = 2.0 * secants[:-1] * secants[1:] / (secants[:-1] + secants[1:])
    if len(secants) == 1:
        return secants.repeat(2)
    # One-sided three-point slopes at the ends, kept within [0, 3 secant], where the curve stays monotone.
    first = (1.5 * secants[0] - 0.5 * secants[1]).clamp(min=0.0).minimum(3 * secants[0])
    last = (1.5 * secants[-1] - 0.5 * secants[-2]).clamp(min=0.0).minimum(3 * secants[-1])
    return torch.cat([first.reshape(1), inner, last.reshape(1)])


@dataclass(frozen=True, eq=False)
class FromSDE(Process):
    r"""The process of a linear SDE $dx = f(t)\,x\,dt + g(t)\,dw$ by quadrature.

    $s = s_0 \exp\int_0^t f$ and $\sigma^2 = s^2\,(\sigma_0^2/s_0^2 + \int_0^t g^2/s^2)$, with 16-point Gauss-Legendre
    panels that are halved until they agree to 1e-13; accurate to 1e-10 wherever `f` and `g2` are smooth and finite on
    `[0, t_max]`. `f` and `g2` are torch functions of a float64 tensor of any shape; what is derived is these themselves.

    Errors: `ValueError` where `f` or `g2` is not finite on `[0, t_max]`, or `g2` is negative.
    """

    f_given: Callable[[Tensor], Tensor]
    g2_given: Callable[[Tensor], Tensor]
    s0: float = 1.0
    sigma0: float = 0.0
    t_min: float = 1e-3
    t_max: float = 1.0
    _edges: Tensor = field(init=False, repr=False)
    _log_s: Tensor = field(init=False, repr=False)
    _nsr2: Tensor = field(init=False, repr=False)

    @torch.inference_mode(False)
    def __post_init__(self) -> None:
        _check_span(self)
        if self.s0 <= 0 or self.sigma0 < 0 or self.t_min < 0:
            raise ValueError("from_sde needs s0 > 0, sigma0 >= 0 and t_min >= 0")
        probe = torch.linspace(0.0, self.t_max, 257, dtype=torch.float64)
        for name, values in (("f", self.f(probe)), ("g2", self.g2(probe))):
            bad = ~torch.isfinite(values)
            if name == "g2":
                bad |= values < 0
            if bool(bad.any()):
                where = float(probe[bad][0])
                raise ValueError(
                    f"{name}({where:.6g}) = {float(values[bad][0])}: from_sde needs finite f and g2 >= 0 on [0, t_max]; "
                    "lower t_max?"
                )
        edges = self._refine(probe[::16].contiguous())
        log_s = self._integrate(self._f, edges[:-1], edges[1:]).cumsum(0)
        object.__setattr__(self, "_edges", edges)
        object.__setattr__(self, "_log_s", torch.cat([torch.zeros(1, dtype=torch.float64), log_s]))
        growth = self._integrate(self._growth, edges[:-1], edges[1:]).cumsum(0)
        object.__setattr__(
            self, "_nsr2", (self.sigma0 / self.s0) ** 2 + torch.cat([torch.zeros(1, dtype=torch.float64), growth])
        )

    def _f(self, t: Tensor) -> Tensor:
        return torch.broadcast_to(torch.as_tensor(self.f_given(t), dtype=t.dtype), t.shape)

    def f(self, t: float | Tensor) -> Tensor:
        """The `f` that was given."""
        return self._f(as_time(t))

    def g2(self, t: float | Tensor) -> Tensor:
        """The `g2` that was given."""
        t = as_time(t)
        return torch.broadcast_to(torch.as_tensor(self.g2_given(t), dtype=t.dtype), t.shape)

    def _growth(self, t: Tensor) -> Tensor:
        """`d nsr^2 / dt = g2 / s^2`."""
        return self.g2(t) * torch.exp(-2.0 * self._log_signal(t)) / self.s0**2

    @staticmethod
    def _integrate(function: Callable[[Tensor], Tensor], a: Tensor, b: Tensor, n: int = 16) -> Tensor:
        nodes, weights = (c.to(a.device, a.dtype) for c in _math.gauss_legendre(n))
        width = (b - a).unsqueeze(-1)
        return ((function(a.unsqueeze(-1) + width * nodes) * weights) * width).sum(-1)

    def _refine(self, edges: Tensor) -> Tensor:
        """Panels halved until 16 nodes and twice 16 nodes agree on the integrals of `f` and of `g2 / s^2`."""
        for _ in range(40):
            a, b = edges[:-1], edges[1:]
            middle = (a + b) / 2

            def growth(t: Tensor, a: Tensor = a) -> Tensor:
                """`g2 / s^2` in units of `s(a)`, `a` the panel's start."""
                return self.g2(t) * torch.exp(-2.0 * self._integrate(self._f, a.unsqueeze(-1).expand_as(t), t))

            poor = torch.zeros_like(a, dtype=torch.bool)
            for function in (self._f, growth):
                whole = self._integrate(function, a, b)
                halves = self._integrate(function, a, middle) + self._integrate(function, middle, b)
                poor |= (whole - halves).abs() > 1e-13 * (1.0 + halves.abs())
            if not bool(poor.any()) or len(edges) > 20_000:
                break
            edges = torch.cat([edges, middle[poor]]).sort().values
        return edges

    def _panel(self, t: Tensor) -> Tensor:
        return (torch.searchsorted(self._edges.to(t.device), t.detach().double().contiguous(), right=True) - 1).clamp(
            0, len(self._edges) - 2
        )

    def _log_signal(self, t: Tensor) -> Tensor:
        """`log(s / s0)`."""
        i = self._panel(t)
        return self._log_s.to(t.device, t.dtype)[i] + self._integrate(self._f, self._edges.to(t.device, t.dtype)[i], t)

    def s(self, t: Tensor) -> Tensor:
        """`s0 exp(int f)`."""
        return self.s0 * torch.exp(self._log_signal(t))

    def variance(self, t: Tensor) -> Tensor:
        """`s^2 (sigma0^2 / s0^2 + int g2 / s^2)`."""
        i = self._panel(t)
        growth = self._integrate(self._growth, self._edges.to(t.device, t.dtype)[i], t)
        return self.s(t) ** 2 * (self._nsr2.to(t.device, t.dtype)[i] + growth)

    def sigma(self, t: Tensor) -> Tensor:
        """Square root of `variance`."""
        return self.variance(t).sqrt()
