"""Small mathematics that everything else stands on: broadcasting, derivatives in time, quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

Scalar = Any
"""A Python float, or a 0-d float64 tensor where gradients flow through it, or a `[B, 1, ...]` tensor, one value a sample."""


def as_time(t: float | Tensor) -> Tensor:
    """`t` as a tensor: Python numbers and integer tensors become float64, floating tensors stay as they are."""
    if isinstance(t, Tensor):
        return t if t.is_floating_point() else t.double()
    return torch.as_tensor(t, dtype=torch.float64)


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient of shape `[]` or `[B]`, shaped to multiply `x` of shape `[B, ...]`, in the dtype and on the device of `x`."""
    if coefficient.ndim not in (0, 1):
        raise ValueError(f"a time is a number or a vector with one entry a sample, not a tensor of shape {tuple(coefficient.shape)}")
    if coefficient.ndim == 1:
        if coefficient.shape[0] not in (1, x.shape[0]):
            raise ValueError(f"{coefficient.shape[0]} times for a batch of {x.shape[0]}: give one time, or one a sample")
        coefficient = coefficient.reshape(-1, *[1] * (x.ndim - 1))
    return coefficient.to(device=x.device, dtype=x.dtype)


def derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """`d function / dt` at every entry of `t`, by forward-mode differentiation; itself differentiable."""
    return torch.func.jvp(function, (t,), (torch.ones_like(t),))[1]


def is_tensor(*values: Scalar) -> bool:
    """Whether any of `values` is a tensor, so that scalar functions must be torch's."""
    return any(isinstance(value, Tensor) for value in values)


def exp(x: Scalar) -> Scalar:
    """`e^x` of a float or a tensor."""
    return torch.exp(x) if isinstance(x, Tensor) else math.exp(x)


def expm1(x: Scalar) -> Scalar:
    """`e^x - 1` of a float or a tensor, accurate near zero."""
    return torch.expm1(x) if isinstance(x, Tensor) else math.expm1(x)


def log(x: Scalar) -> Scalar:
    """Natural logarithm of a float or a tensor; `log 0 = -inf`."""
    if isinstance(x, Tensor):
        return torch.log(x)
    return math.log(x) if x > 0.0 else -math.inf


def sqrt(x: Scalar) -> Scalar:
    """Square root of a float or a tensor."""
    return torch.sqrt(x) if isinstance(x, Tensor) else math.sqrt(x)


@lru_cache(maxsize=8)
def gauss_legendre(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the `n`-point Gauss-Legendre rule on `[0, 1]`, float64; exact for polynomials of degree `2n - 1`."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return torch.from_numpy((nodes + 1.0) / 2.0), torch.from_numpy(weights / 2.0)


class _MonotoneRoot(torch.autograd.Function):
    """The root of `function(t) = value`, with the derivative `dt/dvalue = 1 / function'(t)` of the implicit function theorem."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, function: Callable[[Tensor], Tensor], low: float, high: float) -> Tensor:
        with torch.no_grad():
            root = _bisect(function, value, low, high)
        ctx.function = function
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (root,) = ctx.saved_tensors
        with torch.enable_grad():
            slope = derivative(ctx.function, root)
        return grad / slope, None, None, None


def _bisect(function: Callable[[Tensor], Tensor], value: Tensor, low: float, high: float) -> Tensor:
    """The root of a monotone function by bisection to float64 resolution, in float64, at every entry of `value` at once."""
    target = value.double()
    a, b = torch.full_like(target, low), torch.full_like(target, high)
    rising = bool(function(b.reshape(-1)[:1]) > function(a.reshape(-1)[:1])) if target.numel() else True
    for _ in range(200):
        middle = torch.where((a > 0) & (b / a.clamp_min(1e-300) > 4), (a * b).abs().sqrt(), (a + b) / 2)
        above = (function(middle) > target) == rising
        a_next, b_next = torch.where(above, a, middle), torch.where(above, middle, b)
        if bool(((a_next == a) & (b_next == b) | (b_next - a_next <= 4e-16 * b_next.abs())).all()):
            break
        a, b = a_next, b_next
    return (a / 2 + b / 2).to(value.dtype)


def monotone_root(function: Callable[[Tensor], Tensor], value: Tensor, low: float, high: float) -> Tensor:
    """`t` in `[low, high]` with `function(t) = value`, for a monotone function; differentiable in `value`.

    Values outside the function's range give the nearer end of the interval.
    """
    return _MonotoneRoot.apply(value, function, low, high)  # type: ignore[no-untyped-call]
