"""The one loop that executes plans: combinations and network calls."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from sdeflow._utils.math import transformed
from sdeflow.errors import SolverError
from sdeflow.noise import Noise
from sdeflow.plan.combine import backend
from sdeflow.plan.instructions import Call, Combine, Draw, Instruction, Record, reads

OnCall = Callable[[int, Call, Tensor, Tensor], None]
"""`on_call(k, call, x, x0)`, after the k-th network call. Both tensors may be kept; neither may be
changed.
"""


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
    """Run `steps` with `networks`, the denoisers of the calls, in order; returns the result and the
    recorded states.
    """
    run = steps(instructions, registers, result, x, noise, outlive, on_call)
    output: Any = None
    networks = iter(networks)
    while True:
        try:
            due = run.send(output)
        except StopIteration as end:
            return end.value
        output = next(networks)(due[2])


def steps(
    instructions: Sequence[Instruction],
    registers: int,
    result: int,
    x: Tensor,
    noise: Noise | None,
    outlive: frozenset[int],
    on_call: OnCall | None = None,
) -> Generator[tuple[int, Call, Tensor], Tensor, tuple[Tensor, list[Tensor]]]:
    """Run instructions on the state `x` (`[B, ...]`, left as it is), and stop at each call: yields
    its number, the call and its input, and takes the prediction; returns the result and the
    recorded states.

    On a device nothing here waits for it. Where gradients flow, combinations make new tensors
    instead of writing into buffers. A tensor that a network or `on_call` has seen is never written
    again, so that it is safe to keep. `outlive` are the calls whose outputs are read after the next
    call (`outliving`).
    """
    grad = torch.is_grad_enabled() or transformed(x)
    combine = backend(x)
    held: list[Any] = [None] * registers
    held[0] = x if grad else x.clone()
    owned: dict[int, Tensor] = {0: held[0]}
    drawn: dict[int, Tensor] = {}
    recorded: list[Tensor] = []
    # A network may return one tensor of its own at every call. Where an output must outlive the
    # next call, the first such tells: it is copied, and held until the next one shows whether it
    # came in the same place.
    lent: Tensor | None = None
    reuses: bool | None = None
    # Outputs that must outlive the next call, each with how often it had been written to.
    kept: dict[int, tuple[Tensor, int]] = {}
    number = 0
    for i in _in_runs(instructions):
        if type(i) is tuple:
            combine(i, held, owned, x)
        elif type(i) is Call:
            given = held[i.input]
            before = version(given)
            output = yield number, i, given
            if version(given) != before:
                raise SolverError(
                    "the network changed its input in place, and the solver needs it: let it work"
                    " on a clone"
                )
            if lent is not None:
                reuses, lent = _share(lent, output), None
            if reuses and number in outlive:
                output = output.clone()
            elif reuses is None and number in outlive and not grad:
                lent, output = output, output.clone()
            kept = {r: mark for r, mark in kept.items() if held[r] is mark[0]}
            if any(version(before_it) != count for before_it, count in kept.values()):
                raise SolverError(
                    "the network wrote into a tensor that it had returned at a call before, and the"
                    " solver still needs that: let it return a clone"
                )
            held[i.out] = output
            if number in outlive:
                kept[i.out] = output, version(output)
            owned.pop(i.input, None)  # the network may keep it: the next state is another tensor
            if on_call is not None:
                on_call(number, i, given, output)
                if version(given) != before:
                    raise SolverError(
                        "a callback changed the state in place: let it work on a clone"
                    )
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
    return out if grad or out is owned.get(result) else out.clone(), recorded


def _in_runs(instructions: Sequence[Instruction]) -> Iterator[Instruction | tuple[Combine, ...]]:
    """The instructions, combinations that follow one another as one."""
    for together, run in groupby(instructions, lambda i: type(i) is Combine):
        if together:
            yield tuple(run)  # type: ignore[arg-type]
        else:
            yield from run


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


def version(x: Tensor) -> int:
    """How often a tensor has been written to."""
    return 0 if x.is_inference() else x._version


def _share(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
