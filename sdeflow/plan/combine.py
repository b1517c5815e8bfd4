"""How linear combinations are computed: by torch's passes, by one CUDA kernel, or as new tensors
with gradients.

A backend takes a run of consecutive combinations, the registers (`held`) and the buffers that it
owns (`owned`). It sets the registers and returns nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sdeflow._utils.math import transformed
from sdeflow.plan.instructions import Combine

Held = list[Any]
Owned = dict[int, Tensor]
Backend = Callable[[Sequence[Combine], Held, Owned, Tensor], None]


def backend(x: Tensor) -> Backend:
    """The fastest backend for states like `x`."""
    if torch.is_grad_enabled() or transformed(x):
        return with_gradients
    return cuda_kernel if x.is_cuda and _jit(2) else torch_passes


def _buffer(register: int, owned: Owned, like: Tensor) -> Tensor:
    if register not in owned:
        owned[register] = torch.empty_like(like)
    return owned[register]


def torch_passes(run: Sequence[Combine], held: Held, owned: Owned, like: Tensor) -> None:
    """Into the register's own buffer, a pass a term; in place where the register is a term."""
    for i in run:
        terms = i.terms
        first, a = terms[0]
        x = held[first]
        out = _buffer(i.out, owned, like)
        begun = 1
        if (
            len(terms) > 1
            and abs(a + terms[1][1] - 1.0) < 1e-15
            and held[terms[1][0]].dtype == x.dtype
        ):
            torch.lerp(held[terms[1][0]], x, a, out=out)
            begun = 2
        elif out is x:
            out.mul_(a)
        else:
            torch.mul(x, a, out=out)
        # Not torch.addr, which takes one pass for two terms: it rounds the tail of a tensor
        # otherwise than its body, so that the bits of a sample would depend on its place in the
        # batch.
        for register, c in terms[begun:]:
            out.add_(held[register], alpha=c)
        held[i.out] = out


def cuda_kernel(run: Sequence[Combine], held: Held, owned: Owned, like: Tensor) -> None:
    """One CUDA kernel a combination, into a new tensor of the caching allocator."""
    for i in run:
        registers, coefficients = zip(*i.terms, strict=True)
        total: Tensor | None = None
        for at in range(0, len(registers), _WIDEST - 1):
            operands = [held[r] for r in registers[at : at + _WIDEST - 1]]
            factors = list(coefficients[at : at + _WIDEST - 1])
            if total is not None:
                operands, factors = [total, *operands], [1.0, *factors]
            if len(operands) == 1:
                total = operands[0] * factors[0]
            else:
                kernel = _jit(len(operands))
                assert kernel is not None
                total = kernel(*operands, **dict(zip(_NAMES, factors, strict=False)))
        assert total is not None
        held[i.out] = owned[i.out] = total if total.dtype == like.dtype else total.to(like.dtype)


_WIDEST = 8  # operands that a kernel of torch's jiterator takes
_NAMES = tuple(f"c{k}" for k in range(_WIDEST))


@cache
def _jit(terms: int) -> Callable[..., Tensor] | None:
    """`c0 x0 + c1 x1 + ...` as one elementwise CUDA kernel, compiled at its first use (a tenth of a
    second, kept on disk).

    None where this build of torch cannot; then every term takes a pass.
    """
    try:
        from torch.cuda.jiterator import _create_jit_fn

        names = [f"x{k}" for k in range(terms)]
        arguments = ", ".join(f"T {name}" for name in (*names, *_NAMES[:terms]))
        total = " + ".join(f"{c} * {x}" for c, x in zip(_NAMES, names, strict=False))
        code = f"template <typename T> T combine({arguments}) {{ return {total}; }}"
        return _create_jit_fn(code, **dict.fromkeys(_NAMES[:terms], 0.0))
    except (ImportError, RuntimeError, AttributeError):
        return None


def with_gradients(run: Sequence[Combine], held: Held, owned: Owned, like: Tensor) -> None:
    """New tensors, through which gradients flow to registers and coefficients."""
    for i in run:
        total: Tensor | None = None
        for register, c in i.terms:
            term = (
                held[register] * c
            )  # a 0-d tensor on the CPU: it is not copied, and its dtype does not spread
            total = term if total is None else total + term
        assert total is not None
        held[i.out] = total.to(like.dtype)
