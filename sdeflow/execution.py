"""The one loop that executes plans: a combination and a network call, over and over.

On the CPU a combination is written into a preallocated buffer, a pass a term; on CUDA it is one kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sdeflow.errors import SolverError
from sdeflow.instructions import Call, Combine, Draw, Instruction, Record, reads
from sdeflow.noise import Noise

OnCall = Callable[[int, Call, Tensor, Tensor], None]
"""`on_call(k, call, x, x0)`, after the k-th network call; what it keeps, it must clone."""


def execute(
    instructions: Sequence[Instruction],
    registers: int,
    result: int,
    networks: Iterable[Callable[[Tensor], Tensor]],
    x: Tensor,
    noise: Noise | None,
    outlive: frozenset[int],
    on_call: OnCall | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Run instructions on the state `x` (`[B, ...]`, left as it is); returns the result and the recorded states.

    `networks` are the denoisers of the calls, in order. On a device nothing here waits for it. Where gradients flow,
    combinations make new tensors instead of writing into buffers. `outlive` are the calls whose outputs are read after
    the next call (`outliving`).
    """
    calls = iter(networks)
    grad = torch.is_grad_enabled()
    combine = _combine_new if grad else _combine_fused if x.is_cuda and _fused_kernel(2) else _combine_into
    held: list[Any] = [None] * registers
    held[0] = x if grad else x.clone()
    owned: dict[int, Tensor] = {0: held[0]}
    drawn: dict[int, Tensor] = {}
    copies: dict[int, Tensor] | None = None if grad else {}
    recorded: list[Tensor] = []
    # A network may return one tensor of its own at every call. Where an output must outlive the next call, the first
    # such tells: it is copied, and held until the next one shows whether it came in the same place.
    lent: Tensor | None = None
    reuses: bool | None = None
    number = 0
    for i in instructions:
        if type(i) is Combine:
            held[i.out] = combine(i, held, owned, x)
        elif type(i) is Call:
            given = held[i.input]
            before = _version(given)
            output = next(calls)(given)
            if _version(given) != before:
                raise SolverError(
                    "the network changed its input in place, and the solver needs it: let it work on a clone"
                )
            if lent is not None:
                reuses, lent = _share(lent, output), None
            # Or it may hand back its own input; the buffer behind it will be written again.
            if _share(given, output) or (reuses and number in outlive):
                output = _copy(output, i.out, copies)
            elif reuses is None and number in outlive and not grad:
                lent, output = output, _copy(output, i.out, copies)
            held[i.out] = output
            if on_call is not None:
                on_call(number, i, given, output)
                if _version(given) != before:
                    raise SolverError("a callback changed the state in place: let it work on a clone")
            number += 1
        elif type(i) is Draw:
            assert noise is not None
            if not noise.in_place or grad:
                held[i.out] = noise.draw(i.nsr, i.nsr_next).to(x)
                continue
            if i.out not in drawn:
                drawn[i.out] = torch.empty_like(x)
            held[i.out] = noise.draw(i.nsr, i.nsr_next, out=drawn[i.out])
        elif type(i) is Record:
            recorded.append(held[i.input].clone())
    out = held[result]
    # What a network returned may be its own; the result is the caller's.
    return out if result in owned or grad else out.clone(), recorded


def outliving(instructions: Sequence[Instruction]) -> frozenset[int]:
    """The calls whose outputs are read after the next call."""
    holds: dict[int, int] = {}  # register -> number of the call whose output it holds
    kept: set[int] = set()
    number = 0
    for i in instructions:
        kept.update(holds[r] for r in reads(i) if r in holds and holds[r] < number - 1)
        if not isinstance(i, Record):
            holds.pop(i.out, None)
        if isinstance(i, Call):
            holds[i.out] = number
            number += 1
    return frozenset(kept)


def _version(x: Tensor) -> int:
    """How often a tensor has been written to."""
    return 0 if x.is_inference() else x._version


def _share(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _copy(output: Tensor, register: int, copies: dict[int, Tensor] | None) -> Tensor:
    """A copy of a network's output, in the register's own buffer where no gradient needs it later."""
    if copies is None:
        return output.clone()
    held = copies.get(register)
    if held is None or held.shape != output.shape or held.dtype != output.dtype:
        held = copies[register] = torch.empty_like(output)
    return held.copy_(output)


def _combine_into(i: Combine, held: list[Any], owned: dict[int, Tensor], like: Tensor) -> Tensor:
    """A linear combination written into the register's own buffer, a pass a term; in place where the register is a term."""
    terms = i.terms
    first, a = terms[0]
    x = held[first]
    out = owned.get(i.out)
    if out is None:
        out = owned[i.out] = torch.empty_like(like)
    begun = 1
    if len(terms) > 1 and abs(a + terms[1][1] - 1.0) < 1e-15 and held[terms[1][0]].dtype == x.dtype:
        torch.lerp(held[terms[1][0]], x, a, out=out)
        begun = 2
    elif out is x:
        out.mul_(a)
    else:
        torch.mul(x, a, out=out)
    # Not torch.addr, which takes one pass for two terms: it rounds the tail of a tensor otherwise than its body, so that the
    # bits of a sample would depend on its place in the batch.
    for register, c in terms[begun:]:
        out.add_(held[register], alpha=c)
    return out


def _combine_fused(i: Combine, held: list[Any], owned: dict[int, Tensor], like: Tensor) -> Tensor:
    """A linear combination in one kernel, as a new tensor of the caching allocator."""
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
            kernel = _fused_kernel(len(operands))
            assert kernel is not None
            total = kernel(*operands, **dict(zip(_NAMES, factors, strict=False)))
    assert total is not None
    owned[i.out] = total if total.dtype == like.dtype else total.to(like.dtype)
    return owned[i.out]


_WIDEST = 8  # operands that a kernel of torch's jiterator takes
_NAMES = tuple(f"c{k}" for k in range(_WIDEST))


@cache
def _fused_kernel(terms: int) -> Callable[..., Tensor] | None:
    """`c0 x0 + c1 x1 + ...` as one elementwise CUDA kernel, compiled at its first use (a tenth of a second, kept on disk).

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


def _combine_new(i: Combine, held: list[Any], owned: dict[int, Tensor], like: Tensor) -> Tensor:
    """A linear combination as a new tensor, through which gradients flow to registers and coefficients."""
    total: Tensor | None = None
    for register, c in i.terms:
        term = held[register] * c  # a 0-d tensor on the CPU: it is not copied, and its dtype does not spread
        total = term if total is None else total + term
    assert total is not None
    return total.to(like.dtype)
