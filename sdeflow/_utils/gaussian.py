"""Divergences and likelihoods of Gaussians, entry by entry, in nats."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

LEAST = 1e-12
"""A probability of a value below it counts as it."""


def divergence(gap2: Tensor, log_q: Any, log_p: Any) -> Tensor:
    """`KL(N(., e^log_q) || N(., e^log_p))` of means whose squared difference is `gap2`; `log_q` and
    `log_p` are log variances.
    """
    log_ratio = torch.as_tensor(log_q - log_p, dtype=gap2.dtype, device=gap2.device)
    # (r - 1 - log r) / 2 of the ratio of variances, without cancellation near 1.
    spread = torch.expm1(log_ratio) - log_ratio
    inverse = torch.exp(-torch.as_tensor(log_p, dtype=gap2.dtype, device=gap2.device))
    return 0.5 * (spread + gap2 * inverse)


def gaussian_nll(x: Tensor, mean: Tensor, log_variance: Any) -> Tensor:
    """`-log N(x; mean, e^log_variance)`, a density."""
    log_variance = torch.as_tensor(log_variance, dtype=mean.dtype, device=mean.device)
    return 0.5 * (
        (x - mean).square() * torch.exp(-log_variance) + log_variance + math.log(2.0 * math.pi)
    )


def discretised_nll(x: Tensor, mean: Tensor, log_variance: Any, levels: int = 256) -> Tensor:
    """`-log P(x)` where `x` is one of `levels` equally spaced values from -1 to 1: the mass of
    `N(mean, e^log_variance)` within half a spacing; the first and the last value take the tails.

    Source: Ho et al. 2020, equation 13.
    """
    std = torch.exp(0.5 * torch.as_tensor(log_variance, dtype=mean.dtype, device=mean.device))
    half = 1.0 / (levels - 1)
    upper, lower = (x + half - mean) / std, (x - half - mean) / std
    upper = torch.where(x > 1.0 - half, torch.full_like(upper, math.inf), upper)
    lower = torch.where(x < half - 1.0, torch.full_like(lower, -math.inf), lower)
    # In the upper tail the difference of two numbers near 1 is that of their complements.
    flip = lower > 0
    high, low = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    mass = torch.special.ndtr(high) - torch.special.ndtr(low)
    return -mass.clamp_min(LEAST).log()
