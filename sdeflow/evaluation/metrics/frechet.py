"""The Frechet distance between two sets of images, from the mean and covariance of their
features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.evaluation.metrics.base import ENOUGH, Context, Metric, Seen, Value
from sdeflow.evaluation.metrics.statistics import Statistics


@dataclass(frozen=True)
class FrechetDistance(Metric):
    """The metric of `frechet_distance` in the features of one extractor, which has its name."""

    def value(self, real: Seen, fake: Seen, context: Context) -> Value:
        return Value(frechet_distance(real.statistics, fake.statistics))

    def bias(self, real: Seen, fake: Seen) -> float:
        return expected_bias(real.statistics, fake.statistics.n, real.statistics.n)

    def warnings(self, real: Seen, fake: Seen) -> list[str]:
        few = min(real.statistics.n, fake.statistics.n)
        if few >= ENOUGH:
            return []
        text = (
            f"{self.name} over {fake.statistics.n} samples and {real.statistics.n} reference"
            f" images is biased upwards, by about {self.bias(real, fake):.2g} here; compare it only"
            f" with results of the same numbers ({ENOUGH} is usual)"
        )
        if few <= real.statistics.dim:
            text += f", and {few} are not even more than the {real.statistics.dim} dimensions"
        return [text]


def _factor(covariance: Tensor) -> Tensor:
    """`F [dim, rank]` with `F F^T` the covariance; directions without variance, up to rounding, are
    left out.
    """
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1].clamp_min(0)
    return vectors[:, kept] * values[kept].sqrt()


def frechet_distance(a: Statistics, b: Statistics) -> float:
    r"""The squared Frechet (2-Wasserstein) distance of two Gaussians with these statistics; 0 where
    they are the same.

    $$d^2 = |\mu_a - \mu_b|^2 + \operatorname{tr}\!\left(C_a + C_b - 2 (C_a C_b)^{1/2}\right)$$

    With symmetric factors $C = F F^\top$ (an eigendecomposition each), the trace of the root is the
    sum of the singular values of $F_a^\top F_b$: real by construction, and exact where covariances
    are singular (fewer images than dimensions). Errors: `ValueError` for statistics of unequal
    dimension or below two images. Source: Dowson & Landau 1982; with Inception features it is the
    FID of Heusel et al. 2017.
    """
    if a.dim != b.dim:
        raise ValueError(
            f"features of {a.dim} and {b.dim} dimensions have no distance; use one extractor for"
            " both"
        )
    first, second = a.covariance(), b.covariance().to(a.mean)
    root = torch.linalg.svdvals(_factor(first).T @ _factor(second)).sum()
    apart = (a.mean - b.mean.to(a.mean)).square().sum()
    return max(0.0, float(apart + first.trace() + second.trace() - 2.0 * root))


def expected_bias(statistics: Statistics, n: int, n_other: float = math.inf) -> float:
    r"""About what two sets of `n` and `n_other` draws from one distribution score, though the
    distance of it to itself is 0.

    $$\left(\frac1n + \frac1{n'}\right) \left( \operatorname{tr} C
      + \frac12 \Big( \sum_{ij} \frac{\lambda_i \lambda_j}{\lambda_i + \lambda_j} + \sum_i \frac{\lambda_i}2 \Big) \right)$$

    from the eigenvalues $\lambda$ of `statistics`: the second-order expansion of the distance in
    the error of a covariance, for Gaussian features. For a unit covariance of `dim` dimensions it
    is `(1/n + 1/n') dim (dim + 5) / 4`: 16.7 at `dim = 256`, `n = n' = 2000`. Far below `n = dim`
    it is an upper bound more than an estimate. `n_other = inf` is a reference without an error of
    its own.
    """
    values = torch.linalg.eigvalsh(statistics.covariance()).clamp_min(0.0)
    sums = (values[:, None] + values[None, :]).clamp_min(torch.finfo(values.dtype).tiny)
    off = (values[:, None] * values[None, :] / sums).sum()
    return float((values.sum() + 0.5 * (off + 0.5 * values.sum())) * (1.0 / n + 1.0 / n_other))
