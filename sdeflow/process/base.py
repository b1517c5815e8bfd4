r"""Processes: two functions of time, `s(t)` and `sigma(t)`, from which everything else follows.

A process takes data $x_0$ at small $t$ to noise at large $t$,

$$x(t) = s(t)\,x_0 + \sigma(t)\,\varepsilon, \qquad \varepsilon \sim N(0, I).$$

Matching the mean and the variance of this with those of the linear SDE
$dx = f(t)\,x\,dt + g(t)\,dw$ gives $m' = f m$ and $v' = 2 f v + g^2$, hence

$$f = s'/s, \qquad g^2 = (\sigma^2)' - 2 f \sigma^2 = 2(\sigma\sigma' - f\sigma^2)
= s^2\,\frac{d\,\mathrm{nsr}^2}{dt},
\qquad \mathrm{nsr} = \sigma/s,$$

and back again $s = s_0 \exp\int f$, $\sigma^2 = s^2(\sigma_0^2/s_0^2 + \int g^2/s^2)$ (`from_sde`).
All of it is computed in float64 by automatic differentiation, vectorised over `t`. A solve computes
it once, before its loop (`Process.levels`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sdeflow._utils import math as _math
from sdeflow._utils.math import Scalar, as_time, derivative, expand, with_derivative

if TYPE_CHECKING:
    from sdeflow.process.from_betas import FromBetas
    from sdeflow.process.from_sde import FromSDE
    from sdeflow.process.from_table import FromTable
    from sdeflow.process.reversed import Reversed


@dataclass(frozen=True, slots=True)
class Level:
    """A process at one time: the time and the numbers that a step needs there.

    The entries are Python floats; or 0-d float64 tensors, where gradients flow through them; or
    tensors with one value for each of several times.
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
        """Squared diffusion coefficient `2 (sigma sigma' - f sigma^2)`; infinite where no signal is
        left.
        """
        return 2.0 * self.sigma * (self.dsigma - self.f * self.sigma)


class Process(ABC):
    """A noising process $x(t) = s(t) x_0 + \\sigma(t) \\varepsilon$.

    A subclass defines `s` and `sigma`; the rest is derived.

    `s` is positive (zero is allowed at `t_max`) and `sigma / s` increases with `t`. Both are
    written in torch and are called with float64 tensors of any shape. Samplers start at `t_max` and
    take the step to zero noise at `t_min`.

    A subclass of a process that overrides `s` or `sigma` loses the closed forms and the default
    grid that its parent has for its own law; they are derived again. `check` says where a process
    breaks these rules; `Prediction`, `sample` and `plan` call it.

        class Trigonometric(Process):
            def s(self, t): return torch.cos(t * torch.pi / 2)
            def sigma(self, t): return torch.sin(t * torch.pi / 2)

    Source: Song et al., "Score-based generative modeling through SDEs" (2021); Karras et al.
    (2022), appendix B.
    """

    t_min: float = 1e-3
    t_max: float = 1.0
    default_grid: ClassVar[str] = "uniform_sqrt_t"
    """The grid that samplers use by default, chosen by measurement
    (`benchmarks/defaults/defaults.py`).
    """
    default_clock: ClassVar[str] = "t"
    """The clock in which Runge-Kutta methods step by default, chosen in the same way."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _check_fields(cls)
        _drop_what_no_longer_follows(cls)
        # A user's s may return one number, or a tensor of one, which then holds at every time.
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
        """`sigma(t)^2`.

        Override it where `sigma` is a square root that reaches zero: `g2` then is finite there.
        """
        return self.sigma(t) ** 2

    # ---------------------------------------------------------------------------- derived functions

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
        if type(self).dsigma is Process.dsigma:
            growth = derivative(self.variance, t)
        else:
            growth = 2.0 * self.sigma(t) * self.dsigma(t)
        return growth - 2.0 * self.f(t) * self.variance(t)

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

        It is found by a search between `t_min` and `t_max`; beyond these it is the nearer end. A
        closed form, where a process has one, continues beyond them.
        """
        return _math.monotone_root(self.lam, as_time(lam), self.t_min, self.t_max)

    def t_of_nsr(self, nsr: float | Tensor) -> Tensor:
        """The time at which `sigma / s = nsr`, differentiable; `nsr = inf` gives the end of
        time.
        """
        return self.t_of_lam(-as_time(nsr).log())

    @property
    def prior_std(self) -> float:
        """Standard deviation of the noise from which samplers start, `sigma(t_max)`."""
        return float(self.sigma(torch.tensor(self.t_max, dtype=torch.float64)))

    def levels(self, times: Tensor | Sequence[float]) -> list[Level]:
        """The process at each of `times` (`[K]`), in one vectorised pass.

        The entries are Python floats, or 0-d tensors where gradients flow through the times or the
        process.
        """
        t = torch.as_tensor(times, dtype=torch.float64)
        kind = type(self)
        if kind.ds is Process.ds:
            s, ds = with_derivative(self.s, t)
        else:
            s, ds = self.s(t), self.ds(t)
        if kind.dsigma is Process.dsigma:
            sigma, dsigma = with_derivative(self.sigma, t)
        else:
            sigma, dsigma = self.sigma(t), self.dsigma(t)
        # A signal as small as rounding counts as zero: cos(pi/2) may be 6e-17 or -6e-17.
        s = torch.where(s.abs() < 1e-15 * sigma, torch.zeros_like(s), s)
        columns = [torch.broadcast_to(column, t.shape) for column in (t, s, sigma, ds, dsigma)]
        if any(column.requires_grad for column in columns) and torch.is_grad_enabled():
            return [
                Level(*row) for row in zip(*(column.unbind() for column in columns), strict=True)
            ]
        return [Level(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]

    def level(self, t: float | Tensor) -> Level:
        """The process at one time."""
        return self.levels(as_time(t).reshape(1))[0]

    def check(self) -> None:
        """Raise `ValueError` where this is no process.

        Between `t_min` and `t_max`, `s` and `sigma` are finite and not negative, `sigma / s` does
        not fall, and the derivatives, closed forms and inverse are those of `s` and `sigma`.
        """
        from sdeflow.process.checks import check_process

        check_process(self)

    # ------------------------------------------------------------------ the time that networks know

    def network_time(self, t: Tensor) -> Tensor:
        """The time that a network of this process is given at `t`: `t` itself, and for a reversed
        process the time before it was reversed.
        """
        return t

    def reversed(self, total: float | None = None) -> Reversed:
        """This process with its time reversed, for one that is written with noise at small times;
        see `Reversed`.
        """
        from sdeflow.process.reversed import Reversed

        return Reversed(self, self.t_min + self.t_max if total is None else total)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """The process as a `matplotlib` figure: `s` and `sigma`, `nsr` and `g2` over time; as PNG
        in `path` too if given.

        Errors: `MissingExtraError` without matplotlib (`pip install 'sdeflow[plot]'`).
        """
        from sdeflow.process.plot import plot_process

        return plot_process(self, path)

    # -------------------------------------------------------------------- kernel, SDEs, and the ODE

    def kernel(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """`(s, sigma)`: the perturbation kernel is `x(t) | x0 ~ N(s x0, sigma^2 I)`."""
        t = as_time(t)
        return self.s(t), self.sigma(t)

    def perturb(self, x0: Tensor, t: float | Tensor, eps: Tensor) -> Tensor:
        """`x(t) = s(t) x0 + sigma(t) eps`; `t` is one time or one a sample (`[B]`)."""
        s, sigma = self.kernel(t)
        return expand(s, x0) * x0 + expand(sigma, x0) * eps

    def transition(self, t: float | Tensor, t_noisier: float | Tensor) -> tuple[Tensor, Tensor]:
        r"""`(scale, std)` of the kernel between two times:
        `x(t_noisier) | x(t) ~ N(scale x(t), std^2 I)`, float64.

        `scale = s_noisier / s` and, with `ratio = nsr / nsr_noisier`,
        `std^2 = sigma_noisier^2 (1 - ratio^2) = sigma_noisier^2 - scale^2 sigma^2`. On consecutive
        entries of a table of betas these are `sqrt(1 - beta)` and `sqrt(beta)`. The times are
        numbers, or tensors of one shape.

        Errors: `ValueError` where `t_noisier < t`, or from a time at which no signal is left.
        Source: Ho et al. (2020), equation 2, between any two times.
        """
        early, late = torch.broadcast_tensors(as_time(t), as_time(t_noisier))
        if bool((late < early).any()):
            raise ValueError(
                "a transition goes from t to a noisier time, t_noisier >= t; got"
                f" t={early.tolist()} and t_noisier={late.tolist()}: the way back is posterior"
            )
        (s, sigma), (s_late, sigma_late) = self.kernel(early), self.kernel(late)
        same = early == late
        if bool(((s == 0.0) & ~same).any()):
            raise ValueError("no transition starts where no signal is left (s = 0)")
        safe = torch.where(same, torch.ones_like(s), s)
        scale = torch.where(same, torch.ones_like(s), s_late / safe)
        ratio = torch.where(same, torch.ones_like(s), sigma * s_late / (safe * sigma_late))
        return scale, sigma_late * ((1.0 - ratio) * (1.0 + ratio)).clamp_min(0.0).sqrt()

    def posterior(
        self, x: Tensor, x0: Tensor, t: float | Tensor, t_next: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        r"""`(mean, std)` of `x(t_next)` given `x` at the noisier time `t` and `x0`: the forward
        process seen backwards, `x(t_next) | x, x0 ~ N(mean, std^2 I)`.

        With `ratio = nsr_next / nsr`:
        `mean = (sigma_next / sigma) ratio x + s_next (1 - ratio^2) x0` and
        `std^2 = sigma_next^2 (1 - ratio^2)`. On consecutive entries of a table of betas this is
        DDPM's posterior, and `std^2` its beta-tilde. `mean` has the shape of `x`; `std` is float64,
        one number or one a sample, as the times are.

        Errors: `ValueError` where `t_next > t`. Source: Ho et al. (2020), equations 6 and 7.
        """
        late, early = torch.broadcast_tensors(as_time(t), as_time(t_next))
        if bool((early > late).any()):
            raise ValueError(
                "the posterior goes from t to a time with less noise, t_next <= t; got"
                f" t={late.tolist()} and t_next={early.tolist()}: towards noise it is transition,"
                " which does not depend on x0"
            )
        (s, sigma), (s_next, sigma_next) = self.kernel(late), self.kernel(early)
        same = early == late
        one = torch.ones_like(sigma)
        noise = torch.where(same, one, sigma)
        ratio = torch.where(same, one, sigma_next * s / (torch.where(same, one, s_next) * noise))
        lost = ((1.0 - ratio) * (1.0 + ratio)).clamp_min(0.0)
        keep = torch.where(same, one, sigma_next / noise * ratio)
        return expand(keep, x) * x + expand(s_next * lost, x) * x0, sigma_next * lost.sqrt()

    def drift(self, x: Tensor, t: float | Tensor) -> Tensor:
        """Drift `f(t) x` of the forward SDE $dx = f x dt + g dw$."""
        return expand(self.f(t), x) * x

    def reverse_drift(self, x: Tensor, t: float | Tensor, score: Tensor) -> Tensor:
        r"""Drift of the reverse SDE $dx = (f x - g^2 \nabla\log p)\,dt + g\,d\bar w$, run from
        `t_max` down.

        Source: Anderson, "Reverse-time diffusion equation models" (1982).
        """
        return expand(self.f(t), x) * x - expand(self.g2(t), x) * score

    def velocity(self, x0: Tensor, eps: Tensor, t: float | Tensor) -> Tensor:
        r"""Right-hand side of the probability-flow ODE,
        $dx/dt = s' x_0 + \sigma' \varepsilon = f x - g^2 \nabla\log p / 2$.
        """
        return expand(self.ds(t), x0) * x0 + expand(self.dsigma(t), x0) * eps

    # ---------------------------------------------------------------------------------- conversions

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
        """`x0 = (s x - sigma r v) / r^2` with `r^2 = s^2 + sigma^2`, where
        `v = (s eps - sigma x0) / r`.
        """
        s, sigma = (expand(c, x) for c in self.kernel(t))
        r2 = s**2 + sigma**2
        return (s * x - sigma * r2.sqrt() * v) / r2

    def v_from_x0(self, x: Tensor, x0: Tensor, t: float | Tensor) -> Tensor:
        """`v = (s eps - sigma x0) / sqrt(s^2 + sigma^2)`, the velocity along the angle
        `atan(sigma / s)`.

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

    # --------------------------------------------------------------------------------- constructors

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
        """The process of the SDE $dx = f(t) x dt + g(t) dw$, started at `t = 0` with `s0` and
        `sigma0`; see `FromSDE`.
        """
        from sdeflow.process.from_sde import FromSDE

        return FromSDE(f, g2, s0=s0, sigma0=sigma0, t_min=t_min, t_max=t_max)

    @classmethod
    def from_betas(cls, betas: Sequence[float] | Tensor) -> FromBetas:
        """The process of a DDPM table of variances $\\beta_1 \\dots \\beta_N$; see `FromBetas`."""
        from sdeflow.process.from_betas import FromBetas

        return FromBetas(tuple(torch.as_tensor(betas, dtype=torch.float64).tolist()))

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Sequence[float] | Tensor) -> FromBetas:
        """The process of a table of $\\bar\\alpha_i = s_i^2$, the products of `1 - beta`.

        It falls from below 1; the last entry may be 0 (zero-terminal SNR). See `FromBetas`.
        """
        from sdeflow.process.from_betas import betas_of

        return cls.from_betas(betas_of(torch.as_tensor(alphas_cumprod, dtype=torch.float64)))

    @classmethod
    def from_table(cls, s: Sequence[float] | Tensor, sigma: Sequence[float] | Tensor) -> FromTable:
        """The process of a table of pairs `(s, sigma)`, from data to noise; see `FromTable`."""
        from sdeflow.process.from_table import FromTable

        columns = (torch.as_tensor(c, dtype=torch.float64).tolist() for c in (s, sigma))
        return FromTable(*(tuple(c) if isinstance(c, list) else (c,) for c in columns))


_LAW = ("s", "sigma", "variance")
_KEPT = {*_LAW, "t_min", "t_max", "from_sde", "from_betas", "from_alphas_cumprod", "from_table"}


def _drop_what_no_longer_follows(cls: type[Process]) -> None:
    """Give `cls` the derived functions of `Process` in place of those that its ancestors have for a
    law that `cls`, or a class before them, overrides.
    """
    order = cls.__mro__
    base = order.index(Process)

    def place(name: str) -> int:
        """Where in the order of resolution a name is defined."""
        return next(i for i, kind in enumerate(order) if name in vars(kind))

    where = {name: place(name) for name in _LAW}
    for name, at in where.items():
        if 0 < at < base and not issubclass(order[at], Process):  # a mixin
            setattr(cls, name, vars(order[at])[name])
    sigma = min(where["sigma"], where["variance"])
    if where["s"] < sigma and "_one_law" in vars(order[sigma]):
        parent = order[sigma].__name__
        raise TypeError(
            f"{cls.__name__} overrides s, but the sigma of {parent} comes from the same function as"
            f" the s of {parent}: define sigma too, or derive from Process"
        )
    if where["sigma"] < where["variance"] < base:
        cls.variance = Process.variance  # type: ignore[method-assign]
    elif where["variance"] < where["sigma"]:
        cls.sigma = _root_of_variance  # type: ignore[method-assign]
    law = min(where.values())
    for name, value in vars(Process).items():
        if not name.startswith("_") and name not in _KEPT and law < place(name) < base:
            setattr(cls, name, value)


def _check_fields(cls: type[Process]) -> None:
    """Refuse a class attribute that the constructor of a parent would overwrite."""
    if "__init__" in vars(cls):
        return
    parents = [kind for kind in reversed(cls.__mro__[1:]) if dataclasses.is_dataclass(kind)]
    known = {f.name: kind.__name__ for kind in parents for f in dataclasses.fields(kind) if f.init}
    for name, value in vars(cls).items():
        if name in known and name not in cls.__annotations__ and not hasattr(value, "__get__"):
            raise TypeError(
                f"{cls.__name__}.{name} has no effect, as {known[name]} takes {name} as an"
                f" argument: pass {cls.__name__}({name}={value!r}), or write"
                f" `{name}: {type(value).__name__} = {value!r}` in a dataclass"
            )


def _root_of_variance(self: Process, t: Tensor) -> Tensor:
    """`sqrt(variance)`."""
    return self.variance(t).sqrt()


def _filled(function: Callable[[Process, Tensor], Tensor]) -> Callable[[Process, Tensor], Tensor]:
    """`function` with a result of the shape of the time, also where it returns one number."""

    @functools.wraps(function)
    def fill(self: Process, t: Tensor) -> Tensor:
        value = function(self, t)
        if isinstance(value, Tensor) and value.shape == t.shape:
            return value
        return torch.as_tensor(value, dtype=t.dtype, device=t.device).expand(t.shape)

    return fill


def check_span(process: Process) -> None:
    """Raise `ValueError` where `t_min` is not below `t_max`."""
    if not process.t_min < process.t_max:
        raise ValueError(
            f"a process runs from t_min to a larger t_max; got t_min={process.t_min},"
            f" t_max={process.t_max}"
        )
