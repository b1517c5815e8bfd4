r"""Distributions whose score is known exactly, as denoisers: every solver, process and test can run on them.

A mixture of Gaussians $\sum_k w_k N(m_k, C_k)$ stays one along $x(t) = s x_0 + \sigma\varepsilon$: its components are
$N(s\,m_k, A_k)$ with $A_k = s^2 C_k + \sigma^2 I$. With the posterior weights $\pi_k(x) \propto w_k N(x; s\,m_k, A_k)$,

$$E[x_0 \mid x(t) = x] = \sum_k \pi_k\,\bigl(m_k + s\,C_k A_k^{-1}(x - s\,m_k)\bigr), \qquad
\nabla\log p_t(x) = -\sum_k \pi_k\,A_k^{-1}(x - s\,m_k).$$

Everything is written in $s$ and $\sigma$, never in their ratio, and without differences of nearly equal numbers, so
that it holds in float32 from $s = 0$ to $\sigma = 0$. What depends on time alone is computed in float64 (`Target.at`).

Source: Tweedie's formula (Robbins, 1956; Efron, 2011); Karras et al. (2022), appendix B.3, for `Empirical`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdeflow._math import as_time
from sdeflow.denoiser import Denoiser
from sdeflow.process import EDM, Process

_TINY = 1e-30  # a variance: keeps 0 / 0 at 0 where a direction has neither data nor noise; its inverse fits float32


class Target(Denoiser):
    """A distribution of data with an exact denoiser, score, density and sampler at every time of any process.

    `process` is the path, `shape` the shape of one sample; `.under(process)` is the same distribution on another path
    and shares its tensors. States of any floating dtype are taken; half precision is computed in float32.
    """

    shape: tuple[int, ...]
    exact = True

    def __init__(self, shape: Sequence[int], process: Process):
        if not isinstance(process, Process):
            raise TypeError(f"process is the path of the target, such as EDM() or VP(); got {process!r}")
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

    def at(self, times: Tensor, x: Tensor, /, **condition: Any) -> Sequence[Callable[[Tensor], Tensor]]:
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

        Errors: `ValueError` where there is no density: data on a subspace or on points, without noise.
        """
        return self._log_prob(self._flat(self._check(x)), self._level(t, x)).to(x.dtype)

    @abstractmethod
    def sample(
        self,
        n: int,
        seed: int | torch.Generator = 0,
        t: float | Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """`n` independent samples of `x(t)`, `[n, *shape]` on the CPU; without `t`, of the data."""

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """Mean of the data, `shape`, float64."""

    @abstractmethod
    def covariance(self) -> Tensor:
        """Covariance matrix of the flattened data, `[dim, dim]`, float64."""

    def moments(self, t: float | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean (`shape`) and covariance matrix (`[dim, dim]`) of `x(t)`, float64; without `t`, of the data."""
        s, sigma = self._kernel(t)
        covariance = s[0] ** 2 * self.covariance()
        return s[0] * self.mean, covariance + sigma[0] ** 2 * torch.eye(self.dim, dtype=torch.float64)

    # ----------------------------------------------------------------------------------------- what a distribution says

    @abstractmethod
    def _prepare(self, s: Tensor, sigma: Tensor, x: Tensor, fixed: Any) -> Any:
        """What depends on time alone, from `s` and `sigma` (`[T]`, float64, CPU), where `x` is and as precise."""

    def _fixed(self, x: Tensor) -> Any:
        """What does not even depend on time, where `x` is and as precise."""
        return None

    @abstractmethod
    def _denoise(self, x: Tensor, level: Any) -> Tensor: ...

    @abstractmethod
    def _score(self, x: Tensor, level: Any) -> Tensor: ...

    @abstractmethod
    def _log_prob(self, x: Tensor, level: Any) -> Tensor: ...

    # --------------------------------------------------------------------------------------------------------- plumbing

    def _apply(self, function: Callable[[Tensor, Any], Tensor], level: Any, x: Tensor) -> Tensor:
        return function(self._flat(x), level).reshape(x.shape).to(x.dtype)

    def _flat(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1).to(_working(x))

    def _kernel(self, t: float | Tensor | None) -> tuple[Tensor, Tensor]:
        """`(s, sigma)` of shape `[T]`, float64 on the CPU."""
        if t is None:
            return torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        t = as_time(t).to("cpu", torch.float64)
        if t.ndim > 1:
            raise ValueError(f"t is one time or one a sample; got a tensor of shape {tuple(t.shape)}")
        s, sigma = self.process.kernel(t)
        return s.reshape(-1), sigma.reshape(-1)

    def _level(self, t: float | Tensor | None, x: Tensor) -> Any:
        s, sigma = self._kernel(t)
        if len(s) not in (1, len(x)):
            raise ValueError(f"{len(s)} times for a batch of {len(x)}: give one time, or one a sample")
        return self._prepare(s, sigma, x, self._fixed(x))

    def _check(self, x: Tensor, condition: dict[str, Any] | None = None) -> Tensor:
        if condition:
            raise TypeError(f"{type(self).__name__} is unconditional: it takes no {', '.join(map(repr, condition))}")
        if x.shape[1:] != self.shape or x.ndim != 1 + len(self.shape):
            raise ValueError(f"a state of {type(self).__name__} has shape {('B', *self.shape)}; got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"a state is a floating tensor; got {x.dtype}")
        return x


def _working(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32


def _like(value: Tensor, x: Tensor) -> Tensor:
    return value.to(device=x.device, dtype=_working(x))


def _generator(seed: int | torch.Generator) -> torch.Generator:
    return seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)


def _normal(*size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*size, generator=generator, dtype=torch.float64, device=generator.device).cpu()


# --------------------------------------------------------------------------------------------------------- covariances


class _Spectral(NamedTuple):
    """Components with $A_k = U_k\\,\\mathrm{diag}(a_k)\\,U_k^T$ at a level, `[T, K, D]`."""

    s_mean: Tensor
    mean: Tensor
    gain: Tensor  # s c / a
    precision: Tensor  # 1 / a
    log_norm: Tensor  # log w - log det(2 pi A) / 2, [T, K]
    basis: Tensor | None  # U, [K or 1, D, D]; None is the identity

    def whiten(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Residuals in the eigenbasis, `[B, K, D]`, and the log joint density of `x` and the component, `[B, K]`."""
        residual = x.unsqueeze(1) - self.s_mean
        residual = residual if self.basis is None else _by_component(residual, self.basis)
        return residual, self.log_norm - 0.5 * (residual**2 * self.precision).sum(-1)

    def rotate_back(self, residual: Tensor) -> Tensor:
        return residual if self.basis is None else _by_component(residual, self.basis.mT)

    def x0(self, residual: Tensor) -> Tensor:
        return self.mean + self.rotate_back(self.gain * residual)

    def score(self, residual: Tensor) -> Tensor:
        return -self.rotate_back(self.precision * residual)


class _LowRank(NamedTuple):
    r"""Components with $A_k = s^2 F_k F_k^T + \mathrm{diag}(e_k)$, $e = s^2 d + \sigma^2$, by the Woodbury identity.

    With $P = s F^T A^{-1} = M^{-1} s F^T/e$, $M = I + s^2 F^T \mathrm{diag}(1/e) F$, made in float64, $q = P r$ and
    $u = r - s F q$: $A^{-1} r = u / e$ and $r^T A^{-1} r = |q|^2 + \sum u^2/e$, in which nothing cancels.
    """

    s_mean: Tensor
    mean: Tensor
    factor: Tensor  # F^T, [K, R, D]
    project: Tensor  # P^T, [T, K, D, R]
    s: Tensor  # [T, 1, 1]
    gain: Tensor  # s d / e, [T, K, D]
    precision: Tensor  # 1 / e
    log_norm: Tensor

    def whiten(self, x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        residual = x.unsqueeze(1) - self.s_mean
        if len(self.project) == 1:
            q = _by_component(residual, self.project[0])
        else:
            q = torch.einsum("bkd,bkdr->bkr", residual, self.project)
        along = _by_component(q, self.factor)
        rest = residual - self.s * along
        return (along, rest), self.log_norm - 0.5 * ((rest**2 * self.precision).sum(-1) + (q**2).sum(-1))

    def x0(self, parts: tuple[Tensor, Tensor]) -> Tensor:
        along, rest = parts
        return self.mean + along + self.gain * rest

    def score(self, parts: tuple[Tensor, Tensor]) -> Tensor:
        return -self.precision * parts[1]


def _by_component(values: Tensor, matrices: Tensor) -> Tensor:
    """`[B, K, D]` times `[K or 1, D, E]`, component by component, without a copy of a matrix for each sample."""
    return torch.matmul(values.transpose(0, 1), matrices).transpose(0, 1)


class GaussianMixture(Target):
    r"""A mixture of Gaussians, $\sum_k w_k N(m_k, C_k)$, with scalar, diagonal, full or low-rank covariances.

    - `weights`: `[K]`, non-negative; they are normalised. None weighs all alike.
    - `means`: `[K, *shape]`.
    - one of `std` (a number, `[K]`, or `[K, *shape]`), `cov` (`[dim, dim]` for all, or `[K, dim, dim]`), or `factor`
      (`[K, *shape, R]`, or `[K, dim, R]`) with `diag` (variances: a number, `[K]`, or `[K, *shape]`), where
      $C_k = F_k F_k^T + \mathrm{diag}(d_k)$.

    Gradients flow to whichever of these require them, and to the state.

    Errors: `ValueError` for shapes that do not fit, weights that are negative or all zero, and covariances that are not
    symmetric and positive semi-definite; `TypeError` where not exactly one form of covariance is given.

    Cost: `O(B K dim)`; `O(B K dim^2)` with `cov`, after one eigendecomposition; `O(B K dim R)` with `factor`.
    """

    def __init__(
        self,
        weights: Sequence[float] | Tensor | None,
        means: Sequence[Any] | Tensor,
        *,
        std: float | Sequence[Any] | Tensor | None = None,
        cov: Sequence[Any] | Tensor | None = None,
        factor: Sequence[Any] | Tensor | None = None,
        diag: float | Sequence[Any] | Tensor | None = None,
        process: Process | None = None,
    ):
        centres = _float64("means", means)
        if centres.ndim < 2 or not centres.numel():
            raise ValueError(f"means has shape [K, *shape], one mean a component; got {tuple(centres.shape)}")
        super().__init__(centres.shape[1:], EDM() if process is None else process)
        if sum(given is not None for given in (std, cov, factor)) != 1 or (diag is not None and factor is None):
            raise TypeError("give one form of covariance: std=, or cov=, or factor= (with diag= or without)")
        self._centres = centres.reshape(len(centres), -1)
        self.weights = _weights(weights, len(centres))
        self._basis: Tensor | None = None
        self._factor: Tensor | None = None
        if std is not None:
            self._variances = self._per_component("std", std) ** 2
        elif cov is not None:
            self._variances, self._basis = _eigenbasis(_float64("cov", cov), len(centres), self.dim)
        else:
            assert factor is not None
            self._factor = self._check_factor(_float64("factor", factor))
            self._variances = self._per_component("diag", 0.0 if diag is None else diag)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.weights)} components of shape {self.shape}, {self.process})"

    def _per_component(self, name: str, value: Any) -> Tensor:
        """A non-negative number, one a component, or one a component and entry, as `[K, dim]`."""
        value, k = _float64(name, value), len(self._centres)
        if value.shape == (k, *self.shape):
            value = value.reshape(k, -1)
        elif value.shape == (k,):
            value = value.unsqueeze(-1)
        elif value.ndim:
            raise ValueError(f"{name} is a number, or of shape [{k}] or {[k, *self.shape]}; got {tuple(value.shape)}")
        if not bool((value >= 0).all()):
            raise ValueError(f"{name} is non-negative; its smallest entry is {float(value.min()):g}")
        return value.expand(k, self.dim)

    def _check_factor(self, factor: Tensor) -> Tensor:
        k = len(self._centres)
        if factor.ndim < 3 or factor.shape[:-1] not in ((k, *self.shape), (k, self.dim)):
            raise ValueError(f"factor has shape {[k, *self.shape, 'R']}; got {tuple(factor.shape)}")
        factor = factor.reshape(k, self.dim, -1)
        if factor.requires_grad:
            return factor
        # The same F F^T with orthogonal columns, so that a factor of deficient rank does no harm without noise.
        vectors, values, _ = torch.linalg.svd(factor, full_matrices=False)
        values = torch.where(values > 1e-15 * self.dim * values.amax(-1, keepdim=True), values, 0.0)
        return vectors * values.unsqueeze(-2)

    # -------------------------------------------------------------------------------------------------- at one level

    def _fixed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        matrices = self._basis if self._factor is None else self._factor.mT
        return _like(self._centres, x), None if matrices is None else _like(matrices, x)

    def _prepare(
        self, s: Tensor, sigma: Tensor, x: Tensor, fixed: tuple[Tensor, Tensor | None]
    ) -> _Spectral | _LowRank:
        mean, matrices = fixed
        s, sigma = s.reshape(-1, 1, 1), sigma.reshape(-1, 1, 1)
        spread = (s**2 * self._variances + sigma**2).clamp_min(_TINY)
        precision = 1.0 / spread
        s_mean, gain = _like(s * self._centres, x), _like(s * self._variances * precision, x)
        log_norm = self.weights.log() - 0.5 * (spread.log().sum(-1) + self.dim * math.log(2.0 * math.pi))
        if self._factor is None:
            return _Spectral(s_mean, mean, gain, _like(precision, x), _like(log_norm, x), matrices)
        assert matrices is not None
        s4 = s.unsqueeze(-1)
        scaled = s4 * self._factor.mT * precision.unsqueeze(-2)
        capacity = torch.eye(self._factor.shape[-1], dtype=torch.float64) + s4 * scaled @ self._factor
        cholesky = torch.linalg.cholesky(capacity)
        project = _like(torch.cholesky_solve(scaled, cholesky).mT, x)
        log_norm = log_norm - cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return _LowRank(s_mean, mean, matrices, project, _like(s, x), gain, _like(precision, x), _like(log_norm, x))

    def _mix(self, values: Tensor, log_joint: Tensor) -> Tensor:
        """The average of `[B, K, dim]` under the posterior weights of the components."""
        if log_joint.shape[-1] == 1:
            return values.squeeze(1)
        return torch.matmul(log_joint.softmax(-1).unsqueeze(1), values).squeeze(1)

    def _denoise(self, x: Tensor, level: Any) -> Tensor:
        residual, log_joint = level.whiten(x)
        return self._mix(level.x0(residual), log_joint)

    def _score(self, x: Tensor, level: Any) -> Tensor:
        residual, log_joint = level.whiten(x)
        return self._mix(level.score(residual), log_joint)

    def _log_prob(self, x: Tensor, level: Any) -> Tensor:
        if bool((level.precision >= 0.1 / _TINY).any()):
            raise ValueError(f"{self!r} has no density here: its covariance is singular; give a t with noise")
        return level.whiten(x)[1].logsumexp(-1)

    # --------------------------------------------------------------------------------------------------------- moments

    @property
    def means(self) -> Tensor:
        """Means of the components, `[K, *shape]`, float64."""
        return self._centres.reshape(-1, *self.shape)

    @property
    def mean(self) -> Tensor:
        """Mean of the data, `shape`, float64."""
        return (self.weights @ self._centres).reshape(self.shape)

    def covariances(self) -> Tensor:
        """Covariance matrices of the components, `[K, dim, dim]`, float64."""
        if self._basis is not None:
            return self._basis @ (self._variances.unsqueeze(-1) * self._basis.mT)
        diagonal = torch.diag_embed(self._variances)
        return diagonal if self._factor is None else diagonal + self._factor @ self._factor.mT

    def covariance(self) -> Tensor:
        """Covariance matrix of the flattened data, `[dim, dim]`, float64."""
        centred = self._centres - self.weights @ self._centres
        within = torch.einsum("k,kij->ij", self.weights, self.covariances())
        return within + centred.mT @ (self.weights.unsqueeze(-1) * centred)

    def sample(
        self,
        n: int,
        seed: int | torch.Generator = 0,
        t: float | Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """`n` independent samples of `x(t)`, `[n, *shape]` on the CPU; without `t`, of the data."""
        generator = _generator(seed)
        which = torch.multinomial(
            self.weights.detach().to(generator.device), n, replacement=True, generator=generator
        ).cpu()
        deviation = self._variances[which].sqrt() * _normal(n, self.dim, generator=generator)
        along = None if self._factor is None else _normal(n, self._factor.shape[-1], generator=generator)
        for k in which.unique().tolist():  # the matrices of a component are large: never one a sample
            rows = which == k
            if self._basis is not None:
                deviation[rows] = deviation[rows] @ self._basis[min(k, len(self._basis) - 1)].mT
            if self._factor is not None and along is not None:
                deviation[rows] = deviation[rows] + along[rows] @ self._factor[k].mT
        return _diffuse(self._centres[which] + deviation, self._kernel(t), generator).reshape(n, *self.shape).to(dtype)


class Gaussian(GaussianMixture):
    r"""A Gaussian, $N(m, C)$, whose probability-flow ODE is solved in closed form by `transport`.

    - `mean`: `shape`.
    - one of `std` (a number, or of the shape of `mean`), `cov` (`[dim, dim]`), or `factor` (`[*shape, R]`) with `diag`
      (variances: a number, or of the shape of `mean`).

        Gaussian(torch.zeros(3), std=[0.2, 0.5, 1.0], process=VP())

    Errors: as `GaussianMixture`.
    """

    def __init__(
        self,
        mean: Sequence[Any] | Tensor,
        *,
        std: float | Sequence[Any] | Tensor | None = None,
        cov: Sequence[Any] | Tensor | None = None,
        factor: Sequence[Any] | Tensor | None = None,
        diag: float | Sequence[Any] | Tensor | None = None,
        process: Process | None = None,
    ):
        centre = _float64("mean", mean)
        if centre.ndim == 0:
            raise ValueError("mean has the shape of one sample, at least one dimension: torch.zeros(3), say")

        def one(name: str, value: Any) -> Tensor | None:
            if value is None:
                return None
            value = _float64(name, value)
            if value.ndim and value.shape != centre.shape:
                raise ValueError(f"{name} is a number, or of shape {list(centre.shape)}; got {list(value.shape)}")
            return value.unsqueeze(0) if value.ndim else value

        super().__init__(
            None,
            centre.unsqueeze(0),
            std=one("std", std),
            cov=cov,
            factor=None if factor is None else _float64("factor", factor).unsqueeze(0),
            diag=one("diag", diag),
            process=process,
        )

    def transport(self, x: Tensor, t: float | Tensor, t_next: float | Tensor) -> Tensor:
        r"""The exact solution at `t_next` of the probability-flow ODE that is at `x` at time `t`.

        In the eigenbasis of the covariance, with eigenvalues $c$ and primes at `t_next`,
        $x' = s' m + \sqrt{(s'^2 c + \sigma'^2) / (s^2 c + \sigma^2)}\,(x - s\,m)$, from $s = 0$ to $\sigma = 0$.
        """
        self._check(x)
        s, sigma = (c.reshape(-1, 1) for c in self._kernel(t))
        s_next, sigma_next = (c.reshape(-1, 1) for c in self._kernel(t_next))
        variances, basis = self._variances, self._basis
        if self._factor is not None:
            variances, basis = _eigenbasis(self.covariances(), 1, self.dim)
        ratio = ((s_next**2 * variances + sigma_next**2) / (s**2 * variances + sigma**2).clamp_min(_TINY)).sqrt()
        residual = self._flat(x) - _like(s * self._centres, x)
        if basis is None:
            residual = residual * _like(ratio, x)
        else:
            residual = (residual @ _like(basis[0], x) * _like(ratio, x)) @ _like(basis[0].mT, x)
        return (residual + _like(s_next * self._centres, x)).reshape(x.shape).to(x.dtype)


# ------------------------------------------------------------------------------------------------------ a data set


class _Cloud(NamedTuple):
    """A data set at a level; all of shape `[T, 1]`."""

    s: Tensor
    spread: Tensor  # s^2 bandwidth^2 + sigma^2
    gain: Tensor  # s bandwidth^2 / spread
    rest: Tensor  # 1 - s gain = sigma^2 / spread


class Empirical(Target):
    r"""A kernel density on a data set, $\frac1N\sum_i N(x_i, h^2 I)$: with $h = 0$, the ideal denoiser of the data.

    - `data`: `[N, *shape]`, kept in its own dtype (integers become float32), never copied to float64 as a whole.
    - `bandwidth`: $h \ge 0$, the standard deviation of the kernel.
    - `chunk`: how many data are compared at a time, by default what makes 4 million numbers. Memory beyond the data is
      `O(chunk (B + dim))`, unless gradients flow.

    The posterior weights are $\mathrm{softmax}_i(-|x - s\,x_i|^2 / 2(s^2 h^2 + \sigma^2))$. At small noise
    distances must not cancel: on the CPU they come from products of matrices in float64, on other devices they are
    summed entry by entry.

    Errors: `ValueError` for an empty data set or a negative bandwidth.

    Cost: `O(B N dim)`. Source: Karras et al. (2022), equation 57.
    """

    def __init__(
        self, data: Tensor, bandwidth: float = 0.0, *, process: Process | None = None, chunk: int | None = None
    ):
        data = torch.as_tensor(data)
        if data.ndim < 2 or not data.numel():
            raise ValueError(f"data has shape [N, *shape], N at least 1; got {tuple(data.shape)}")
        if not (bandwidth >= 0.0 and math.isfinite(bandwidth)):
            raise ValueError(f"bandwidth is the kernel's standard deviation, finite and at least 0; got {bandwidth}")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk is how many data are compared at a time, at least 1; got {chunk}")
        super().__init__(data.shape[1:], EDM() if process is None else process)
        self.data = data if data.is_floating_point() else data.float()
        if not bool(torch.isfinite(self.data).all()):
            raise ValueError("data has entries that are not finite")
        self.bandwidth = float(bandwidth)
        self.chunk = max(1, 2**22 // self.dim) if chunk is None else int(chunk)
        self._moved: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __repr__(self) -> str:
        return f"Empirical({len(self.data)} data of shape {self.shape}, bandwidth={self.bandwidth:g}, {self.process})"

    def _prepare(self, s: Tensor, sigma: Tensor, x: Tensor, fixed: Any) -> _Cloud:
        spread = (s**2 * self.bandwidth**2 + sigma**2).clamp_min(_TINY)
        gain = s * self.bandwidth**2 / spread
        columns = (s, spread, gain, 1.0 - s * gain)
        return _Cloud(*(c.reshape(-1, 1).to(device=x.device, dtype=self._precision(x)) for c in columns))

    @staticmethod
    def _precision(x: Tensor) -> torch.dtype:
        return torch.float64 if x.device.type == "cpu" else _working(x)

    def _rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The flattened data where `x` is, and half their squared norms; kept for the next call."""
        key = x.device, self._precision(x)
        if key not in self._moved:
            rows = self.data.reshape(len(self.data), -1).to(x.device)
            norms = [0.5 * part.to(key[1]).square().sum(-1) for part in rows.split(self.chunk)]
            self._moved[key] = rows, torch.cat(norms)
        return self._moved[key]

    def _half_distances(self, x: Tensor, part: Tensor, half_norms: Tensor, s: Tensor) -> Tensor:
        """`|x - s x_i|^2 / 2`, `[B, chunk]`."""
        if x.dtype == torch.float64:
            return s**2 * half_norms + 0.5 * x.square().sum(-1, keepdim=True) - s * (x @ part.mT)
        if len(s) == 1:
            return 0.5 * torch.cdist(x, s * part, compute_mode="donot_use_mm_for_euclid_dist") ** 2
        # One time a sample: one sample at a time, lest every sample get its own copy of the data.
        pairs = zip(x.split(1), s.split(1), strict=True)
        return torch.cat([self._half_distances(row, part, half_norms, scale) for row, scale in pairs])

    def _posterior(self, x: Tensor, level: _Cloud) -> tuple[Tensor, Tensor]:
        r"""`E[x_i | x]` and $\log\sum_i e^{-|x - s x_i|^2 / 2\,\mathrm{spread}}$, streamed under a running maximum."""
        rows, norms = self._rows(x)
        x = x.to(self._precision(x))
        top = x.new_full((len(x), 1), -math.inf)
        total, average = torch.zeros_like(top), torch.zeros_like(x)
        for part, half_norms in zip(rows.split(self.chunk), norms.split(self.chunk), strict=True):
            part = part.to(x.dtype)
            logits = -self._half_distances(x, part, half_norms, level.s) / level.spread
            top_next = torch.maximum(top, logits.detach().amax(-1, keepdim=True))
            shrink, weights = torch.exp(top - top_next), torch.exp(logits - top_next)
            total = total * shrink + weights.sum(-1, keepdim=True)
            average = average * shrink + weights @ part
            top = top_next
        return average / total, (top + total.log()).squeeze(-1)

    def _denoise(self, x: Tensor, level: Any) -> Tensor:
        average, _ = self._posterior(x, level)
        return level.gain * x + level.rest * average

    def _score(self, x: Tensor, level: Any) -> Tensor:
        average, _ = self._posterior(x, level)
        return (level.s * average - x) / level.spread

    def _log_prob(self, x: Tensor, level: Any) -> Tensor:
        if bool((level.spread <= 10.0 * _TINY).any()):
            raise ValueError("points have no density without noise; give a bandwidth, or a t with noise")
        _, log_sum = self._posterior(x, level)
        log_norm = 0.5 * self.dim * torch.log(2.0 * math.pi * level.spread).squeeze(-1) + math.log(len(self.data))
        return log_sum - log_norm

    @property
    def mean(self) -> Tensor:
        """Mean of the data, `shape`, float64."""
        return self.data.mean(0, dtype=torch.float64).cpu()

    def covariance(self) -> Tensor:
        """Covariance matrix of the flattened data, the kernel's included, `[dim, dim]`, float64."""
        centre, total = self.mean.reshape(-1), torch.zeros(self.dim, self.dim, dtype=torch.float64)
        for part in self.data.reshape(len(self.data), -1).split(self.chunk):
            centred = part.cpu().double() - centre
            total += centred.mT @ centred
        return total / len(self.data) + self.bandwidth**2 * torch.eye(self.dim, dtype=torch.float64)

    def sample(
        self,
        n: int,
        seed: int | torch.Generator = 0,
        t: float | Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """`n` independent samples of `x(t)`, `[n, *shape]` on the CPU; without `t`, of the data."""
        generator = _generator(seed)
        which = torch.randint(len(self.data), (n,), generator=generator, device=generator.device)
        x0 = self.data.reshape(len(self.data), -1)[which.to(self.data.device)].cpu().double()
        if self.bandwidth:
            x0 = x0 + self.bandwidth * _normal(n, self.dim, generator=generator)
        return _diffuse(x0, self._kernel(t), generator).reshape(n, *self.shape).to(dtype)


# ---------------------------------------------------------------------------------------------------------- input


def _diffuse(x0: Tensor, kernel: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
    s, sigma = (c.reshape(-1, 1) for c in kernel)
    if not bool(sigma.any()):
        return s * x0
    return s * x0 + sigma * _normal(*x0.shape, generator=generator)


def _float64(name: str, value: Any) -> Tensor:
    value = torch.as_tensor(value).to("cpu", torch.float64)
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} has entries that are not finite")
    return value


def _weights(weights: Any, k: int) -> Tensor:
    if weights is None:
        return torch.full((k,), 1.0 / k, dtype=torch.float64)
    weights = _float64("weights", weights)
    if weights.shape != (k,):
        raise ValueError(f"weights has one entry a component, shape [{k}]; got {tuple(weights.shape)}")
    if not bool((weights >= 0).all()) or not bool(weights.sum() > 0):
        raise ValueError(f"weights are non-negative and not all zero; got {weights.tolist()}")
    return weights / weights.sum()


def _eigenbasis(cov: Tensor, k: int, dim: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[k, dim]` and eigenvectors `[k or 1, dim, dim]` of covariance matrices."""
    if cov.ndim == 2:
        cov = cov.unsqueeze(0)
    if cov.shape not in ((k, dim, dim), (1, dim, dim)):
        raise ValueError(f"cov has shape {[dim, dim]}, or {[k, dim, dim]}; got {list(cov.shape)}")
    size = cov.detach().abs().amax((-1, -2)).clamp_min(_TINY)
    if bool(((cov - cov.mT).detach().abs().amax((-1, -2)) > 1e-6 * size).any()):
        raise ValueError("cov is not symmetric")
    values, vectors = torch.linalg.eigh((cov + cov.mT) / 2)
    if bool((values.detach() < -1e-6 * size.unsqueeze(-1)).any()):
        raise ValueError(f"cov is not positive semi-definite: it has the eigenvalue {float(values.detach().min()):g}")
    # Eigenvalues within rounding of zero are zero: data on a subspace stay on it at any noise.
    values = torch.where(values > 1e-15 * dim * size.unsqueeze(-1), values, 0.0)
    return values.expand(k, dim), vectors
