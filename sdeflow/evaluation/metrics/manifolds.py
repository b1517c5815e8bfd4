"""Improved precision and recall: the share of samples among real images, and the reverse."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow._utils import distributed
from sdeflow._utils.distributed import Rank
from sdeflow.evaluation.metrics.base import (
    ENOUGH,
    Better,
    Context,
    Metric,
    Seen,
    Value,
    features_of,
)

BLOCK = 1 << 24
"""At most about so many distances are held at a time (128 MiB)."""


@dataclass(frozen=True)
class Precision(Metric):
    """The share of samples inside the manifold of the reference: are they good?"""

    better: Better = "larger"
    needs_features: bool = True

    def check(self, real: int | None, fake: int | None, context: Context) -> None:
        for what, n in (("reference images", real), ("samples", fake)):
            if n is not None and n <= context.k:
                raise ValueError(
                    f"precision and recall look at the {context.k} nearest neighbours of each"
                    f" image, and there are only {n} {what}: take more, a smaller k, or the metrics"
                    " without them"
                )

    def value(self, real: Seen, fake: Seen, context: Context) -> Value:
        others, points = _both(features_of(real), features_of(fake), context.k)
        radii = _radii(others, context.k, context.rank)
        return Value(_inside(points, others, radii, context.rank))

    def warnings(self, real: Seen, fake: Seen) -> list[str]:
        numbers = fake.statistics.n, real.statistics.n
        if min(numbers) >= ENOUGH:
            return []
        return [
            f"precision and recall depend on how many samples ({numbers[0]}) and reference images"
            f" ({numbers[1]}) there are; compare them only at the same numbers"
        ]


@dataclass(frozen=True)
class Recall(Precision):
    """The share of the reference inside the manifold of the samples: are they varied?"""

    def value(self, real: Seen, fake: Seen, context: Context) -> Value:
        points, others = _both(features_of(real), features_of(fake), context.k)
        radii = _radii(others, context.k, context.rank)
        return Value(_inside(points, others, radii, context.rank))


def precision_recall(
    real: Tensor, fake: Tensor, *, k: int = 3, rank: Rank | None = None
) -> tuple[float, float]:
    """Improved precision and recall of features `fake [M, D]` against `real [N, D]`, in [0, 1].

    A set's manifold is the union of balls about its points, each reaching to the point's `k`-th
    nearest neighbour in the set. Precision is the share of `fake` inside the manifold of `real`
    (are the images good?). Recall is the share of `real` inside that of `fake` (are they varied?).
    Both depend on N and M: compare at equal numbers. Computed in blocks, in float64. With `rank`
    the processes share the rows, and all of them must hold all features. Matrix products of other
    shapes round differently, so a point at the border of a ball may count on one machine or number
    of processes and not on another; each such point changes a score by 1/M or 1/N.

    Errors: `ValueError` for shapes that do not fit and for sets of at most `k`.
    Source: Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative
    Models".
    """
    rank = rank or Rank()
    real, fake = _both(real, fake, k)
    precision = _inside(fake, real, _radii(real, k, rank), rank)
    return precision, _inside(real, fake, _radii(fake, k, rank), rank)


def _both(real: Tensor, fake: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Both sets checked, in float64, about the mean of the real one."""
    for name, features in (("real", real), ("fake", fake)):
        if features.ndim != 2 or features.shape[1] != real.shape[-1]:
            raise ValueError(
                f"features are [N, D] with one D; real is {tuple(real.shape)}, fake"
                f" {tuple(fake.shape)}"
            )
        if len(features) <= k or k < 1:
            raise ValueError(
                f"{len(features)} {name} images have no {k}-th nearest neighbour each; k is 1 or"
                " more, below the number"
            )
    device = torch.device("cpu") if fake.device.type == "mps" else fake.device
    real, fake = real.to(device).double(), fake.to(device).double()
    centre = real.mean(0)  # digits are lost in proportion to the distance from zero
    return real - centre, fake - centre


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
