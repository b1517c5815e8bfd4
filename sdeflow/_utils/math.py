"""Small mathematics: broadcasting, derivatives in time, quadrature, roots."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

Scalar = Any
"""A Python float, or a 0-d float64 tensor where gradients flow through it, or a `[B, 1, ...]`
tensor, one value a sample.
"""


def as_time(t: float | Tensor) -> Tensor:
    """`t` as a tensor.

    Python numbers and integer tensors become float64, floating tensors stay as they are.
    """
    if isinstance(t, Tensor):
        return t if t.is_floating_point() else t.double()
    return torch.as_tensor(t, dtype=torch.float64)


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient of shape `[]` or `[B]`, shaped to multiply `x`.

    `x` has shape `[B, ...]`; the result has its dtype and device.
    """
    if coefficient.ndim not in (0, 1):
        raise ValueError(
            "a time is a number or a vector with one entry a sample, not a tensor of shape"
            f" {tuple(coefficient.shape)}"
        )
    if coefficient.ndim == 1:
        if coefficient.shape[0] not in (1, x.shape[0]):
            raise ValueError(
                f"{coefficient.shape[0]} times for a batch of {x.shape[0]}: give one time, or one a"
                " sample"
            )
        coefficient = coefficient.reshape(-1, *[1] * (x.ndim - 1))
    return coefficient.to(device=x.device, dtype=x.dtype)


def not_finite(x: Tensor) -> list[int]:
    """The rows of `x` that hold NaN or infinity."""
    return (~x.isfinite()).reshape(len(x), -1).any(1).nonzero().flatten().tolist()


def with_derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> tuple[Tensor, Tensor]:
    """`function(t)` and `d function / dt` at every entry of `t`, by automatic differentiation.

    `function` works entry by entry, so the gradient of its sum holds the derivative of every entry:
    reverse mode, whose first use costs nothing, where forward mode compiles for seconds. Both
    results carry gradients where `t`, or something in the function, requires them.
    """
    t = _plain(t)
    value = function(t)
    onward = value.requires_grad  # never so where the caller has gradients switched off
    with _outside_transforms(t), torch.inference_mode(False), torch.enable_grad():
        at = t if t.requires_grad and onward else t.detach().clone().requires_grad_()
        again = function(at)
        slope = None
        if again.requires_grad:
            (slope,) = torch.autograd.grad(again.sum(), at, create_graph=onward, allow_unused=True)
    return value, torch.zeros_like(t) if slope is None else slope


def transformed(x: Tensor) -> bool:
    """Whether a transform of `torch.func` (grad, jvp, vmap, ...) looks at `x`."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def vectorised(x: Tensor) -> bool:
    """Whether `torch.func.vmap` looks at `x`, so that its values are not known."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def _plain(t: Tensor) -> Tensor:
    """Times without the wrappers that a transform of `torch.func` puts around all that is computed
    within it, where no gradient and no batch is asked of them.
    """
    if not transformed(t) or t.requires_grad or vectorised(t):
        return t
    while transformed(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t


def _outside_transforms(t: Tensor) -> AbstractContextManager[Any]:
    """Outside the transforms of `torch.func`, which refuse `requires_grad_`, where none looks at
    `t`.
    """
    if torch._C._functorch.peek_interpreter_stack() is None or transformed(t):
        return nullcontext()
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()


def derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """`d function / dt` at every entry of `t`."""
    return with_derivative(function, t)[1]


def is_tensor(*values: Scalar) -> bool:
    """Whether any of `values` is a tensor, so that scalar functions must be torch's."""
    return any(isinstance(value, Tensor) for value in values)


def value_of(x: Scalar) -> float:
    """The value of a float or a 0-d tensor, without its gradient."""
    return float(x.detach()) if isinstance(x, Tensor) else float(x)


def log(x: Scalar) -> Scalar:
    """Natural logarithm of a float or a tensor; `log 0 = -inf`."""
    if isinstance(x, Tensor):
        return torch.log(x)
    return math.log(x) if x > 0.0 else -math.inf


def sqrt(x: Scalar) -> Scalar:
    """Square root of a float or a tensor."""
    return torch.sqrt(x) if isinstance(x, Tensor) else math.sqrt(x)


def batch_invariant(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """`function` of a float64 tensor, entry by entry to the last bit.

    No entry's result depends on how many others there are.

    A vectorised loop treats the entries that are left over at its end by other code, whose last bit
    may differ. So the entries are given as vectors of a multiple of 16, too short for more than one
    thread. `function` may add leading axes.
    """
    flat = values.reshape(-1)
    n = flat.numel()
    if not n:
        return function(values)
    flat = torch.cat([flat, flat[-1:].expand(-n % 16)])
    result = torch.cat([function(part) for part in flat.split(16384)], -1)[..., :n]
    return result.reshape(*result.shape[:-1], *values.shape)


@lru_cache(maxsize=8)
def gauss_legendre(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the `n`-point Gauss-Legendre rule on `[0, 1]`.

    They are float64 and exact for polynomials of degree `2n - 1`.
    """
    nodes, weights = np.polynomial.legendre.leggauss(n)
    with torch.inference_mode(False):  # kept for all, whoever asks first
        return torch.from_numpy((nodes + 1.0) / 2.0), torch.from_numpy(weights / 2.0)


class _MonotoneRoot(torch.autograd.Function):
    """The root of `function(t) = value`, differentiable in `value`.

    Its derivative is `dt/dvalue = 1 / function'(t)`, by the implicit function theorem.
    """

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, function: Callable[[Tensor], Tensor], low: float, high: float
    ) -> Tensor:
        with torch.no_grad():
            root = _find_root(function, value, low, high)
        ctx.function = function
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (root,) = ctx.saved_tensors
        with torch.enable_grad():
            slope = derivative(ctx.function, root)
        return grad / slope, None, None, None


def _find_root(
    function: Callable[[Tensor], Tensor], value: Tensor, low: float, high: float
) -> Tensor:
    """The root of a monotone function, at every entry of `value` at once.

    It is found in float64, to float64 resolution.

    Inverse quadratic interpolation where it is safe, else halving (in the logarithm while the
    bracket is wide): some ten evaluations. Source: Chandrupatla, "A new hybrid quadratic/bisection
    algorithm" (1997).
    """
    target = value.double()
    ends = torch.tensor([low, high], dtype=torch.float64, device=target.device)
    at_low, at_high = function(ends).unbind()
    sign = 1.0 if bool(at_high > at_low) else -1.0
    x1, f1 = torch.full_like(target, high), sign * (at_high - target)
    x2, f2 = torch.full_like(target, low), sign * (at_low - target)
    below, beyond = ~(f2 < 0), ~(f1 > 0)
    root, done = torch.where(beyond & ~below, x1, x2), below | beyond
    fraction = torch.full_like(target, 0.5)
    for _ in range(200):
        x = x1 + fraction * (x2 - x1)
        wide = (fraction == 0.5) & (x1 * x2 > 0) & ((x1 > 4 * x2) | (x2 > 4 * x1))
        x = torch.where(wide, (x1 * x2).abs().sqrt(), x)
        f = sign * (function(x) - target)
        same = (f > 0) == (f1 > 0)
        x3, f3 = torch.where(same, x1, x2), torch.where(same, f1, f2)
        x2, f2 = torch.where(same, x2, x1), torch.where(same, f2, f1)
        x1, f1 = x, f
        least = 4e-16 * torch.maximum(x1.abs(), x2.abs()) / (x2 - x1).abs()
        found = ~done & ((f1 == 0) | (least > 0.5))
        nearer = torch.where(f1.abs() <= f2.abs(), x1, x2)
        root, done = torch.where(found, nearer, root), done | found
        if bool(done.all()):
            break
        xi, phi = (x1 - x2) / (x3 - x2), (f1 - f2) / (f3 - f2)
        inverse = f1 / (f2 - f1) * f3 / (f2 - f3) + (x3 - x1) / (x2 - x1) * f1 / (f3 - f1) * f2 / (
            f3 - f2
        )
        safe = (phi**2 < xi) & ((1 - phi) ** 2 < 1 - xi)
        fraction = torch.where(safe, inverse, 0.5).clamp(min=least, max=1 - least).nan_to_num(0.5)
    return root.to(value.dtype)


def monotone_root(
    function: Callable[[Tensor], Tensor], value: Tensor, low: float, high: float
) -> Tensor:
    """`t` in `[low, high]` with `function(t) = value`, for a monotone function.

    It is differentiable in `value`.

    Values outside the function's range give the nearer end of the interval.
    """
    return _MonotoneRoot.apply(value, function, low, high)


def exp(x: Scalar) -> Scalar:
    """`e^x` of a float or a tensor."""
    return torch.exp(x) if isinstance(x, Tensor) else math.exp(x)


def expm1(x: Scalar) -> Scalar:
    """`e^x - 1` of a float or a tensor."""
    return torch.expm1(x) if isinstance(x, Tensor) else math.expm1(x)


def log1p(x: Scalar) -> Scalar:
    """`log(1 + x)` of a float or a tensor."""
    return torch.log1p(x) if isinstance(x, Tensor) else math.log1p(x)
