"""Gaussians and mixtures of Gaussians, with exact denoisers, flows and densities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdeflow.process import EDM, Process
from sdeflow.targets.base import (
    TINY,
    Target,
    cast_like,
    finite_float64,
    standard_normal,
)


class _Spectral(NamedTuple):
    """Components with $A_k = U_k\\,\\mathrm{diag}(a_k)\\,U_k^T$ at a level, `[T, K, D]`."""

    s_mean: Tensor
    mean: Tensor
    gain: Tensor  # s c / a
    precision: Tensor  # 1 / a
    log_norm: Tensor  # log w - log det(2 pi A) / 2, [T, K]
    basis: Tensor | None  # U, [K or 1, D, D]; None is the identity

    def whiten(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Residuals in the eigenbasis, `[B, K, D]`, and the log joint density of `x` and the
        component, `[B, K]`.
        """
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
    r"""Components with $A_k = s^2 F_k F_k^T + \mathrm{diag}(e_k)$, $e = s^2 d + \sigma^2$, by the
    Woodbury identity.

    With $P = s F^T A^{-1} = M^{-1} s F^T/e$, $M = I + s^2 F^T \mathrm{diag}(1/e) F$, made in
    float64, $q = P r$ and $u = r - s F q$: $A^{-1} r = u / e$ and
    $r^T A^{-1} r = |q|^2 + \sum u^2/e$, in which nothing cancels.
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
        return (along, rest), self.log_norm - 0.5 * (
            (rest**2 * self.precision).sum(-1) + (q**2).sum(-1)
        )

    def x0(self, parts: tuple[Tensor, Tensor]) -> Tensor:
        along, rest = parts
        return self.mean + along + self.gain * rest

    def score(self, parts: tuple[Tensor, Tensor]) -> Tensor:
        return -self.precision * parts[1]


def _by_component(values: Tensor, matrices: Tensor) -> Tensor:
    """`[B, K, D]` times `[K or 1, D, E]`, component by component, without a copy of a matrix for
    each sample.
    """
    return torch.matmul(values.transpose(0, 1), matrices).transpose(0, 1)


class GaussianMixture(Target):
    r"""A mixture of Gaussians, $\sum_k w_k N(m_k, C_k)$, with scalar, diagonal, full or low-rank
    covariances.

    - `weights`: `[K]`, non-negative; they are normalised. None weighs all alike.
    - `means`: `[K, *shape]`.
    - one of `std` (a number, `[K]`, or `[K, *shape]`), `cov` (`[dim, dim]` for all, or
      `[K, dim, dim]`), or `factor` (`[K, *shape, R]`, or `[K, dim, R]`) with `diag` (variances: a
      number, `[K]`, or `[K, *shape]`), where $C_k = F_k F_k^T + \mathrm{diag}(d_k)$.

    Gradients flow to whichever of these require them, and to the state.

    Errors: `ValueError` for shapes that do not fit, weights that are negative or all zero, and
    covariances that are not symmetric and positive semi-definite; `TypeError` where not exactly one
    form of covariance is given.

    Cost: `O(B K dim)`; `O(B K dim^2)` with `cov`, after one eigendecomposition; `O(B K dim R)` with
    `factor`.
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
        centres = finite_float64("means", means)
        if centres.ndim < 2 or not centres.numel():
            raise ValueError(
                f"means has shape [K, *shape], one mean a component; got {tuple(centres.shape)}"
            )
        super().__init__(centres.shape[1:], EDM() if process is None else process)
        if sum(given is not None for given in (std, cov, factor)) != 1 or (
            diag is not None and factor is None
        ):
            raise TypeError(
                "give one form of covariance: std=, or cov=, or factor= (with diag= or without)"
            )
        self._centres = centres.reshape(len(centres), -1)
        self.weights = _weights(weights, len(centres))
        self._basis: Tensor | None = None
        self._factor: Tensor | None = None
        if std is not None:
            self._variances = self._per_component("std", std) ** 2
        elif cov is not None:
            self._variances, self._basis = _eigenbasis(
                finite_float64("cov", cov), len(centres), self.dim
            )
        else:
            assert factor is not None
            self._factor = self._check_factor(finite_float64("factor", factor))
            self._variances = self._per_component("diag", 0.0 if diag is None else diag)
        self.data_std = self._root_mean_square()

    def _root_mean_square(self) -> float:
        """Of the entries of the data."""
        with torch.no_grad():
            squares = self._centres.square().mean(-1) + self._variances.mean(-1)
            if self._factor is not None:
                squares = squares + self._factor.square().sum((-2, -1)) / self.dim
            return math.sqrt(float((self.weights * squares).sum()))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self.weights)} components of shape {self.shape},"
            f" {self.process})"
        )

    def _per_component(self, name: str, value: Any) -> Tensor:
        """A non-negative number, one a component, or one a component and entry, as `[K, dim]`."""
        value, k = finite_float64(name, value), len(self._centres)
        if value.shape == (k, *self.shape):
            value = value.reshape(k, -1)
        elif value.shape == (k,):
            value = value.unsqueeze(-1)
        elif value.ndim:
            raise ValueError(
                f"{name} is a number, or of shape [{k}] or {[k, *self.shape]}; got"
                f" {tuple(value.shape)}"
            )
        if not bool((value >= 0).all()):
            raise ValueError(
                f"{name} is non-negative; its smallest entry is {float(value.min()):g}"
            )
        return value.expand(k, self.dim)

    def _check_factor(self, factor: Tensor) -> Tensor:
        k = len(self._centres)
        if factor.ndim < 3 or factor.shape[:-1] not in ((k, *self.shape), (k, self.dim)):
            raise ValueError(f"factor has shape {[k, *self.shape, 'R']}; got {tuple(factor.shape)}")
        factor = factor.reshape(k, self.dim, -1)
        if factor.requires_grad:
            return factor
        # The same F F^T with orthogonal columns, so that a factor of deficient rank does no harm
        # without noise.
        vectors, values, _ = torch.linalg.svd(factor, full_matrices=False)
        values = torch.where(values > 1e-15 * self.dim * values.amax(-1, keepdim=True), values, 0.0)
        return vectors * values.unsqueeze(-2)

    # --------------------------------------------------------------------------------- at one level

    def _fixed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        matrices = self._basis if self._factor is None else self._factor.mT
        return cast_like(self._centres, x), None if matrices is None else cast_like(matrices, x)

    def _prepare(
        self, s: Tensor, sigma: Tensor, x: Tensor, fixed: tuple[Tensor, Tensor | None]
    ) -> _Spectral | _LowRank:
        mean, matrices = fixed
        s, sigma = s.reshape(-1, 1, 1), sigma.reshape(-1, 1, 1)
        spread = (s**2 * self._variances + sigma**2).clamp_min(TINY)
        precision = 1.0 / spread
        cast = partial(cast_like, x=x)
        s_mean, gain = cast(s * self._centres), cast(s * self._variances * precision)
        log_norm = self.weights.log() - 0.5 * (
            spread.log().sum(-1) + self.dim * math.log(2.0 * math.pi)
        )
        if self._factor is None:
            return _Spectral(s_mean, mean, gain, cast(precision), cast(log_norm), matrices)
        assert matrices is not None
        s4 = s.unsqueeze(-1)
        scaled = s4 * self._factor.mT * precision.unsqueeze(-2)
        capacity = (
            torch.eye(self._factor.shape[-1], dtype=torch.float64) + s4 * scaled @ self._factor
        )
        cholesky = torch.linalg.cholesky(capacity)
        project = cast(torch.cholesky_solve(scaled, cholesky).mT)
        log_norm = log_norm - cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        precision, log_norm = cast(precision), cast(log_norm)
        return _LowRank(s_mean, mean, matrices, project, cast(s), gain, precision, log_norm)

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
        if bool((level.precision >= 0.1 / TINY).any()):
            raise ValueError(
                f"{self!r} has no density here: its covariance is singular; give a t with noise"
            )
        return level.whiten(x)[1].logsumexp(-1)

    # -------------------------------------------------------------------------------------- moments

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

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        which = torch.multinomial(
            self.weights.detach().to(generator.device), n, replacement=True, generator=generator
        ).cpu()
        size = (n, self.dim)
        deviation = self._variances[which].sqrt() * standard_normal(*size, generator=generator)
        if self._factor is not None:
            along = standard_normal(n, self._factor.shape[-1], generator=generator)
        # The matrices of a component are large: never one a sample.
        for k in which.unique().tolist():
            rows = which == k
            if self._basis is not None:
                deviation[rows] = deviation[rows] @ self._basis[min(k, len(self._basis) - 1)].mT
            if self._factor is not None:
                deviation[rows] = deviation[rows] + along[rows] @ self._factor[k].mT
        return self._centres[which] + deviation


class Gaussian(GaussianMixture):
    r"""A Gaussian, $N(m, C)$, whose probability-flow ODE is solved in closed form by `transport`.

    - `mean`: `shape`.
    - one of `std` (a number, or of the shape of `mean`), `cov` (`[dim, dim]`), or `factor`
      (`[*shape, R]`) with `diag` (variances: a number, or of the shape of `mean`).

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
        centre = finite_float64("mean", mean)
        if centre.ndim == 0:
            raise ValueError(
                "mean has the shape of one sample, at least one dimension: torch.zeros(3), say"
            )

        def one(name: str, value: Any) -> Tensor | None:
            if value is None:
                return None
            value = finite_float64(name, value)
            if value.ndim and value.shape != centre.shape:
                raise ValueError(
                    f"{name} is a number, or of shape {list(centre.shape)}; got {list(value.shape)}"
                )
            return value.unsqueeze(0) if value.ndim else value

        super().__init__(
            None,
            centre.unsqueeze(0),
            std=one("std", std),
            cov=cov,
            factor=None if factor is None else finite_float64("factor", factor).unsqueeze(0),
            diag=one("diag", diag),
            process=process,
        )

    def transport(self, x: Tensor, t: float | Tensor, t_next: float | Tensor) -> Tensor:
        r"""The exact solution at `t_next` of the probability-flow ODE that is at `x` at time `t`.

        In the eigenbasis of the covariance, with eigenvalues $c$ and primes at `t_next`,
        $x' = s' m + \sqrt{(s'^2 c + \sigma'^2) / (s^2 c + \sigma^2)}\,(x - s\,m)$, from $s = 0$ to
        $\sigma = 0$.
        """
        self._check(x)
        s, sigma = (c.reshape(-1, 1) for c in self._kernel(t))
        s_next, sigma_next = (c.reshape(-1, 1) for c in self._kernel(t_next))
        variances, basis = self._variances, self._basis
        if self._factor is not None:
            variances, basis = _eigenbasis(self.covariances(), 1, self.dim)
        ratio = (
            (s_next**2 * variances + sigma_next**2) / (s**2 * variances + sigma**2).clamp_min(TINY)
        ).sqrt()
        residual = self._flat(x) - cast_like(s * self._centres, x)
        if basis is None:
            residual = residual * cast_like(ratio, x)
        else:
            residual = (residual @ cast_like(basis[0], x) * cast_like(ratio, x)) @ cast_like(
                basis[0].mT, x
            )
        return (residual + cast_like(s_next * self._centres, x)).reshape(x.shape).to(x.dtype)


# --------------------------------------------------------------------------------------- a data set


def _weights(weights: Any, k: int) -> Tensor:
    if weights is None:
        return torch.full((k,), 1.0 / k, dtype=torch.float64)
    weights = finite_float64("weights", weights)
    if weights.shape != (k,):
        raise ValueError(
            f"weights has one entry a component, shape [{k}]; got {tuple(weights.shape)}"
        )
    if not bool((weights >= 0).all()) or not bool(weights.sum() > 0):
        raise ValueError(f"weights are non-negative and not all zero; got {weights.tolist()}")
    return weights / weights.sum()


def _eigenbasis(cov: Tensor, k: int, dim: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[k, dim]` and eigenvectors `[k or 1, dim, dim]` of covariance matrices."""
    if cov.ndim == 2:
        cov = cov.unsqueeze(0)
    if cov.shape not in ((k, dim, dim), (1, dim, dim)):
        raise ValueError(f"cov has shape {[dim, dim]}, or {[k, dim, dim]}; got {list(cov.shape)}")
    size = cov.detach().abs().amax((-1, -2)).clamp_min(TINY)
    if bool(((cov - cov.mT).detach().abs().amax((-1, -2)) > 1e-6 * size).any()):
        raise ValueError("cov is not symmetric")
    values, vectors = torch.linalg.eigh((cov + cov.mT) / 2)
    if bool((values.detach() < -1e-6 * size.unsqueeze(-1)).any()):
        raise ValueError(
            "cov is not positive semi-definite: it has the eigenvalue"
            f" {float(values.detach().min()):g}"
        )
    # Eigenvalues within rounding of zero are zero: data on a subspace stay on it at any noise.
    values = torch.where(values > 1e-15 * dim * size.unsqueeze(-1), values, 0.0)
    return values.expand(k, dim), vectors
