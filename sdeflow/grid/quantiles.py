"""Quantiles of the beta distribution, in float64, without scipy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdeflow._utils.math import monotone_root


def beta_cdf(x: Tensor, a: float, b: float) -> Tensor:
    r"""The regularised incomplete beta function $I_x(a, b)$ for `x` in [0, 1], to some 1e-14.

    Its continued fraction by Lentz's method, on the side of the mean where it converges fast.
    Source: Didonato & Morris, "Significant digit computation of the incomplete beta function
    ratios" (1992).
    """
    flip = x > (a + 1.0) / (a + b + 2.0)
    z = torch.where(flip, 1.0 - x, x)
    p = torch.full_like(x, a).masked_fill(flip, b)
    q = torch.full_like(x, b).masked_fill(flip, a)
    log_front = (
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + p * z.log() + q * (-z).log1p()
    )
    value = torch.exp(log_front) / p * _fraction(z, p, q)
    value = torch.where(z > 0, value, torch.zeros_like(value))
    return torch.where(flip, 1.0 - value, value)


def _fraction(z: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """`1 / (1 + d_1 / (1 + d_2 / ...))` of the incomplete beta function."""
    tiny = 1e-30
    c = torch.ones_like(z)
    d = 1.0 / _away(1.0 - (p + q) * z / (p + 1.0), tiny)
    value = d.clone()
    for m in range(1, 300):
        even = m * (q - m) * z / ((p + 2 * m - 1) * (p + 2 * m))
        odd = -(p + m) * (p + q + m) * z / ((p + 2 * m) * (p + 2 * m + 1))
        for term in (even, odd):
            d = 1.0 / _away(1.0 + term * d, tiny)
            c = _away(1.0 + term / c, tiny)
            value = value * c * d
        if bool(((c * d - 1.0).abs() < 1e-15).all()):
            break
    return value


def _away(value: Tensor, tiny: float) -> Tensor:
    return torch.where(value.abs() < tiny, torch.full_like(value, tiny), value)


def beta_quantile(p: Tensor, a: float, b: float) -> Tensor:
    """`x` with `beta_cdf(x, a, b) = p`, for `p` in [0, 1]; float64."""
    p = p.double()
    x = monotone_root(lambda x: beta_cdf(x, a, b), p, 0.0, 1.0)
    return torch.where(p <= 0, torch.zeros_like(x), torch.where(p >= 1, torch.ones_like(x), x))
