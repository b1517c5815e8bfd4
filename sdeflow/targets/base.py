r"""Distributions whose score is known exactly, as denoisers: every solver, process and test can run
on them.

A mixture of Gaussians $\sum_k w_k N(m_k, C_k)$ stays one along $x(t) = s x_0 + \sigma\varepsilon$:
its components are $N(s\,m_k, A_k)$ with $A_k = s^2 C_k + \sigma^2 I$. With the posterior weights
$\pi_k(x) \propto w_k N(x; s\,m_k, A_k)$,

$$E[x_0 \mid x(t) = x] = \sum_k \pi_k\,\bigl(m_k + s\,C_k A_k^{-1}(x - s\,m_k)\bigr), \qquad
\nabla\log p_t(x) = -\sum_k \pi_k\,A_k^{-1}(x - s\,m_k).$$

Everything is written in $s$ and $\sigma$, never in their ratio, and without differences of nearly
equal numbers, so that it holds in float32 from $s = 0$ to $\sigma = 0$. What depends on time alone
is computed in float64 (`Target.at`).

Source: Tweedie's formula (Robbins, 1956; Efron, 2011); Karras et al. (2022), appendix B.3, for
`Empirical`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdeflow._utils.math import as_time
from sdeflow.denoisers import Denoiser
from sdeflow.process import Process

TINY = 1e-30
"""A variance: keeps 0 / 0 at 0 where a direction has neither data nor noise; its inverse fits
float32.
"""


class Target(Denoiser):
    """A distribution of data with an exact denoiser, score, density and sampler at every time of
    any process.

    `process` is the path, `shape` the shape of one sample; `.under(process)` is the same
    distribution on another path and shares its tensors. States of any floating dtype are taken;
    half precision is computed in float32.
    """

    shape: tuple[int, ...]
    known_density = True

    def __init__(self, shape: Sequence[int], process: Process):
        if not isinstance(process, Process):
            raise TypeError(
                f"process is the path of the target, such as EDM() or VP(); got {process!r}"
            )
        self.shape, self.process = tuple(shape), process

    @property
    def dim(self) -> int:
        """Number of entries of one sample."""
        return math.prod(self.shape)

    def under(self, process: Process) -> Target:
        """The same distribution on the path of another process."""
        other = copy(self)
        other.process = process
        return other

    def __call__(self, x: Tensor, t: float | Tensor, /, **condition: Any) -> Tensor:
        """`E[x0 | x(t) = x]`, of the shape of `x`; `t` is one time, or one a sample (`[B]`)."""
        return self._apply(self._denoise, self._level(t, x), self._check(x, condition))

    def at(
        self, times: Tensor, x: Tensor, /, **condition: Any
    ) -> Sequence[Callable[[Tensor], Tensor]]:
        """The denoiser at each of `times` (`[K]`), everything but its work on `x` done once."""
        self._check(x, condition)
        fixed = self._fixed(x)
        levels = (
            self._prepare(s, sigma, x, fixed)
            for s, sigma in zip(*(c.split(1) for c in self._kernel(times)), strict=True)
        )
        return [partial(self._apply, self._denoise, level) for level in levels]

    def score(self, x: Tensor, t: float | Tensor) -> Tensor:
        """Gradient in `x` of the log density of `x(t)`, of the shape of `x`."""
        return self._apply(self._score, self._level(t, x), self._check(x))

    def log_prob(self, x: Tensor, t: float | Tensor | None = None) -> Tensor:
        """Log density of `x(t)` at `x`, in nats, `[B]`; without `t`, that of the data.

        Errors: `ValueError` where there is no density: data on a subspace or on points, without
        noise.
        """
        return self._log_prob(self._flat(self._check(x)), self._level(t, x)).to(x.dtype)

    def sample(
        self,
        n: int,
        seed: int | torch.Generator = 0,
        t: float | Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """`n` independent samples of `x(t)`, `[n, *shape]` on the CPU; without `t`, of the data."""
        generator = as_generator(seed)
        x = self._draw(n, generator)
        s, sigma = (c.reshape(-1, 1) for c in self._kernel(t))
        x = s * x
        if bool(sigma.any()):
            x = x + sigma * standard_normal(*x.shape, generator=generator)
        return x.reshape(n, *self.shape).to(dtype)

    @abstractmethod
    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        """`n` samples of the data, flat, `[n, dim]`, float64."""

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """Mean of the data, `shape`, float64."""

    @abstractmethod
    def covariance(self) -> Tensor:
        """Covariance matrix of the flattened data, `[dim, dim]`, float64."""

    def moments(self, t: float | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean (`shape`) and covariance matrix (`[dim, dim]`) of `x(t)`, float64; without `t`, of
        the data.
        """
        s, sigma = self._kernel(t)
        covariance = s[0] ** 2 * self.covariance()
        return s[0] * self.mean, covariance + sigma[0] ** 2 * torch.eye(
            self.dim, dtype=torch.float64
        )

    # --------------------------------------------------------------------- what a distribution says

    @abstractmethod
    def _prepare(self, s: Tensor, sigma: Tensor, x: Tensor, fixed: Any) -> Any:
        """What depends on time alone, from `s` and `sigma` (`[T]`, float64, CPU), where `x` is and
        as precise.
        """

    def _fixed(self, x: Tensor) -> Any:
        """What does not even depend on time, where `x` is and as precise."""
        return None

    @abstractmethod
    def _denoise(self, x: Tensor, level: Any) -> Tensor: ...

    @abstractmethod
    def _score(self, x: Tensor, level: Any) -> Tensor: ...

    @abstractmethod
    def _log_prob(self, x: Tensor, level: Any) -> Tensor: ...

    # ------------------------------------------------------------------------------------- plumbing

    def _apply(self, function: Callable[[Tensor, Any], Tensor], level: Any, x: Tensor) -> Tensor:
        return function(self._flat(x), level).reshape(x.shape).to(x.dtype)

    def _flat(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1).to(compute_dtype(x))

    def _kernel(self, t: float | Tensor | None) -> tuple[Tensor, Tensor]:
        """`(s, sigma)` of shape `[T]`, float64 on the CPU."""
        if t is None:
            return torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        t = as_time(t).to("cpu", torch.float64)
        if t.ndim > 1:
            raise ValueError(
                f"t is one time or one a sample; got a tensor of shape {tuple(t.shape)}"
            )
        s, sigma = self.process.kernel(t)
        return s.reshape(-1), sigma.reshape(-1)

    def _level(self, t: float | Tensor | None, x: Tensor) -> Any:
        s, sigma = self._kernel(t)
        if len(s) not in (1, len(x)):
            raise ValueError(
                f"{len(s)} times for a batch of {len(x)}: give one time, or one a sample"
            )
        return self._prepare(s, sigma, x, self._fixed(x))

    def _check(self, x: Tensor, condition: dict[str, Any] | None = None) -> Tensor:
        if condition:
            raise TypeError(
                f"{type(self).__name__} is unconditional: it takes no"
                f" {', '.join(map(repr, condition))}"
            )
        if x.shape[1:] != self.shape or x.ndim != 1 + len(self.shape):
            raise ValueError(
                f"a state of {type(self).__name__} has shape {('B', *self.shape)}; got"
                f" {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise TypeError(f"a state is a floating tensor; got {x.dtype}")
        return x


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a state like `x` is computed: float64 for float64, else float32."""
    return x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32


def cast_like(value: Tensor, x: Tensor) -> Tensor:
    """`value` on the device of `x`, in its `compute_dtype`."""
    return value.to(device=x.device, dtype=compute_dtype(x))


def as_generator(seed: int | torch.Generator) -> torch.Generator:
    """A generator: the one given, or a CPU generator of that seed."""
    return seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)


def standard_normal(*size: int, generator: torch.Generator) -> Tensor:
    """Standard normals, float64 on the CPU."""
    return torch.randn(
        *size, generator=generator, dtype=torch.float64, device=generator.device
    ).cpu()


def finite_float64(name: str, value: Any) -> Tensor:
    """`value` as a float64 tensor on the CPU; `ValueError` where it is not finite."""
    value = torch.as_tensor(value).to("cpu", torch.float64)
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} has entries that are not finite")
    return value
