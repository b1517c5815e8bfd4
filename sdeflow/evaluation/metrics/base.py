r"""Distances between sets of pictures, from their features: Frechet distance, improved precision
and recall.

Features are injected: a metric does not know what made them (`sdeflow.evaluation.features.base`
does). Statistics are float64 and streamed: a set of any size needs its mean and scatter alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sdeflow._utils import distributed
from sdeflow._utils.distributed import Rank
from sdeflow.errors import NonFiniteError

ENOUGH = 50_000
"""How many pictures a Frechet distance is usually taken over; below it, results say how far off
they are.
"""

BLOCK = 1 << 24
"""At most about so many distances are held at a time (128 MiB)."""


class Statistics:
    r"""Count, mean and scatter of features, in float64, fed in batches.

    $$\mu = \frac1n \sum_i f_i, \qquad S = \sum_i (f_i - \mu)(f_i - \mu)^\top, \qquad C = \frac{S}{n - 1}$$

    A batch is reduced about its own mean and then merged, so that a large mean costs no digits and
    the order of batches changes the last bits alone. `device` may be a GPU that knows float64.
    Source: Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing
    sample variances".
    """

    def __init__(self, dim: int, device: str | torch.device = "cpu") -> None:
        if dim < 1:
            raise ValueError(f"features have at least one dimension; got dim={dim}")
        self.dim, self.n = dim, 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, features: Tensor) -> Statistics:
        """Add a batch of features `[B, dim]` of any floating dtype, on any device; returns
        itself.
        """
        if features.ndim != 2 or features.shape[1] != self.dim or not features.is_floating_point():
            raise ValueError(
                f"features are floating-point [B, {self.dim}]; got {features.dtype}"
                f" {tuple(features.shape)}"
            )
        if len(features) == 0:
            return self
        # cast on the side that knows float64
        features = (
            features.to(self.mean.device).double()
            if features.device.type == "mps"
            else features.to(self.mean)
        )
        mean = features.mean(0)
        centred = features - mean
        return self._add(len(features), mean, centred.T @ centred)

    def merge(self, other: Statistics) -> Statistics:
        """Add what `other` has seen; returns itself."""
        if other.dim != self.dim:
            raise ValueError(f"statistics of {other.dim} dimensions do not merge into {self.dim}")
        return (
            self._add(other.n, other.mean.to(self.mean), other.scatter.to(self.mean))
            if other.n
            else self
        )

    def _add(self, n: int, mean: Tensor, scatter: Tensor) -> Statistics:
        total = self.n + n
        step = mean - self.mean
        self.scatter += scatter
        self.scatter += torch.outer(step, step) * (self.n * n / total)
        self.mean += step * (n / total)
        self.n = total
        return self

    def all_reduce(self) -> Statistics:
        """Take in what all processes have seen, about the mean of all: then each holds the same;
        returns itself.

        Call it on every process, once. Without torchrun it changes nothing. The tensors must be
        where the process group communicates (on the GPU for NCCL).
        """
        count = torch.tensor([self.n], device=self.mean.device)
        counts = distributed.all_gather(count).to(self.mean)
        if len(counts) == 1:
            return self
        total = int(counts.sum())
        if total == 0:
            return self
        means = distributed.all_gather(self.mean.unsqueeze(0))
        mean = (counts / total) @ means
        step = self.mean - mean
        self.scatter += self.n * torch.outer(step, step)
        distributed.mean_(self.scatter).mul_(len(counts))
        self.mean, self.n = mean, total
        return self

    def covariance(self) -> Tensor:
        """The unbiased covariance `[dim, dim]`, symmetric to the bit.

        Errors: `ValueError` below two samples, `NonFiniteError` if a feature was not finite.
        """
        if self.n < 2:
            raise ValueError(f"a covariance needs at least two pictures; there are {self.n}")
        if not bool(torch.isfinite(self.mean).all() & torch.isfinite(self.scatter).all()):
            raise NonFiniteError(
                f"NaN or infinity among the features of {self.n} pictures; their covariance is"
                " unknown"
            )
        scatter = self.scatter / (self.n - 1)
        return (scatter + scatter.T) / 2


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
    are singular (fewer pictures than dimensions). Errors: `ValueError` for statistics of unequal
    dimension or below two pictures. Source: Dowson & Landau 1982; with Inception features it is the
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


# ----------------------------------------------------------------------------- precision and recall


def precision_recall(
    real: Tensor, fake: Tensor, *, k: int = 3, rank: Rank | None = None
) -> tuple[float, float]:
    """Improved precision and recall of features `fake [M, D]` against `real [N, D]`, each in [0,
    1].

    A set's manifold is the union of balls about its points, each reaching to the point's `k`-th
    nearest neighbour in the set. Precision is the share of `fake` inside the manifold of `real`
    (are the pictures good?), recall the share of `real` inside that of `fake` (are they varied?).
    Both depend on N and M: compare at equal numbers. Computed in blocks, in float64; with `rank`
    the processes share the rows, and all of them must hold all features. Errors: `ValueError` for
    shapes that do not fit and for sets of at most `k`. Source: Kynkaanniemi et al. 2019, "Improved
    Precision and Recall Metric for Assessing Generative Models".
    """
    for name, features in (("real", real), ("fake", fake)):
        if features.ndim != 2 or features.shape[1] != real.shape[-1]:
            raise ValueError(
                f"features are [N, D] with one D; real is {tuple(real.shape)}, fake"
                f" {tuple(fake.shape)}"
            )
        if len(features) <= k or k < 1:
            raise ValueError(
                f"{len(features)} {name} pictures have no {k}-th nearest neighbour each; k is 1 or"
                " more, below the number"
            )
    device = torch.device("cpu") if real.device.type == "mps" else real.device
    real, fake = real.to(device).double(), fake.to(device).double()
    centre = real.mean(0)  # digits are lost in proportion to the distance from zero
    real, fake = real - centre, fake - centre
    rank = rank or Rank()
    precision = _inside(fake, real, _radii(real, k, rank), rank)
    return precision, _inside(real, fake, _radii(fake, k, rank), rank)


def _blocks(points: Tensor, others: Tensor, rank: Rank) -> Iterator[tuple[range, Tensor]]:
    """Squared distances of this process's share of `points` to all `others`, a block of rows at a
    time.
    """
    share, norms = rank.share(len(points)), others.square().sum(1)
    rows = max(1, BLOCK // len(others))
    for start in range(share.start, share.stop, rows):
        block = range(start, min(start + rows, share.stop))
        part = points[block.start : block.stop]
        yield (
            block,
            torch.addmm(norms + part.square().sum(1, keepdim=True), part, others.T, alpha=-2.0),
        )


def _radii(points: Tensor, k: int, rank: Rank) -> Tensor:
    """The squared distance of each point to its k-th nearest neighbour, itself not counted."""
    parts = [points.new_zeros(0)]
    for block, squared in _blocks(points, points, rank):
        own = torch.arange(len(block), device=points.device)
        squared[own, own + block.start] = math.inf
        parts.append(squared.topk(k, largest=False).values[:, -1])
    return distributed.all_gather(torch.cat(parts)) if rank.world > 1 else torch.cat(parts)


def _inside(points: Tensor, others: Tensor, radii: Tensor, rank: Rank) -> float:
    """The share of `points` that lie in a ball about one of `others`."""
    slack = 1e-13 * float(
        max(points.square().sum(1).max(), others.square().sum(1).max())
    )  # of the matrix product
    hits = torch.zeros(1, dtype=torch.int64, device=points.device)
    for _, squared in _blocks(points, others, rank):
        hits += (squared <= radii + slack).any(1).sum()
    total = distributed.all_gather(hits).sum() if rank.world > 1 else hits
    return int(total) / len(points)
