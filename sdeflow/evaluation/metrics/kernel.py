r"""The kernel distance between two sets of features: unbiased, with its standard error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.evaluation.metrics.base import Context, Metric, Seen, Value, features_of

MOST = 10_000
"""At most so many of each set are used, the first ones; the estimate stays unbiased."""

ROWS = 1000
"""So many rows of the kernel are held at a time."""


@dataclass(frozen=True)
class KernelDistance(Metric):
    """The metric of `kernel_distance` in the features of one extractor."""

    needs_features: bool = True

    def value(self, real: Seen, fake: Seen, context: Context) -> Value:
        return kernel_distance(features_of(real)[:MOST], features_of(fake)[:MOST])


def kernel_distance(real: Tensor, fake: Tensor) -> Value:
    r"""The squared maximum mean discrepancy of `fake [M, D]` and `real [N, D]`, and its error.

    $$\frac{\sum_{i \ne j} k(x_i, x_j)}{N (N - 1)} + \frac{\sum_{i \ne j} k(y_i, y_j)}{M (M - 1)}
      - \frac{2 \sum_{ij} k(x_i, y_j)}{N M}, \qquad k(x, y) = (x \cdot y / D + 1)^3$$

    It is unbiased at every N and M, so it can be negative, and scores of unequal numbers of images
    can be compared. The standard error is that of the first-order projection,
    `sqrt(4 var(u)/N + 4 var(v)/M)` with `u_i` the mean of `k(x_i, .)` over the other real features
    less that over the fake ones. Where the distributions are equal that term vanishes and the error
    is too small. Computed in float64, in blocks of rows.

    Errors: `ValueError` for shapes that do not fit and for sets of fewer than two.
    Source: Gretton et al. 2012, "A Kernel Two-Sample Test"; with Inception features it is the KID
    of Binkowski et al. 2018, there over subsets.
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"features are [N, D] with one D; real is {tuple(real.shape)}, fake {tuple(fake.shape)}"
        )
    if min(len(real), len(fake)) < 2:
        raise ValueError(
            f"a kernel distance needs two images of each set; there are {len(real)} and {len(fake)}"
        )
    device = torch.device("cpu") if fake.device.type == "mps" else fake.device
    x, y = real.to(device).double(), fake.to(device).double()
    n, m = len(x), len(y)
    rows = torch.cat([_kernel(part, y).sum(1) for part in x.split(ROWS)])
    columns = torch.cat([_kernel(part, x).sum(1) for part in y.split(ROWS)])
    within_x, within_y = _within(x), _within(y)
    value = within_x.sum() / (n * (n - 1)) + within_y.sum() / (m * (m - 1))
    value = value - 2.0 * rows.sum() / (n * m)
    u, v = within_x / (n - 1) - rows / m, within_y / (m - 1) - columns / n
    error = (4 * u.var() / n + 4 * v.var() / m).sqrt()
    return Value(float(value), float(error))


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1.0) ** 3


def _within(x: Tensor) -> Tensor:
    """Of each row, the sum of its kernel with the others."""
    own = (x.square().sum(1) / x.shape[1] + 1.0) ** 3
    return torch.cat([_kernel(part, x).sum(1) for part in x.split(ROWS)]) - own
