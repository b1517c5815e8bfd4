"""Count, mean and scatter of features, streamed and merged in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from sdeflow._utils import distributed
from sdeflow.errors import NonFiniteError


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
            raise ValueError(f"a covariance needs at least two images; there are {self.n}")
        if not bool(torch.isfinite(self.mean).all() & torch.isfinite(self.scatter).all()):
            raise NonFiniteError(
                f"NaN or infinity among the features of {self.n} images; their covariance is"
                " unknown"
            )
        scatter = self.scatter / (self.n - 1)
        return (scatter + scatter.T) / 2
