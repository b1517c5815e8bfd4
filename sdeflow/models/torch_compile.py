"""`torch.compile` of a network, with a message while it takes its time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sdeflow._utils.distributed import this_rank


def say(text: str) -> None:
    """A line on standard error, above any progress bar; from the first process alone."""
    if this_rank().first:
        tqdm.write(text, file=sys.stderr)


def compile_network(network: nn.Module, report: Callable[[str], None] = say) -> None:
    """Compile `network` in place, for each shape of its inputs.

    That happens at the first call with the shape; `report` is called with a line before and after.

    One program for all shapes is a fifth slower and takes twice as long to compile. PyTorch
    compiles eight shapes, and runs further ones without compilation, with a warning. It keeps what
    it compiled, so that the next process has it in seconds.
    """
    compiled = torch.compile(network._call_impl, dynamic=False)
    seen: set[Hashable] = set()

    def call(*args: Any, **condition: Any) -> Any:
        tensors = [value for value in (*args, *condition.values()) if isinstance(value, Tensor)]
        key = tuple((tuple(t.shape), t.dtype, t.device) for t in tensors)
        if key in seen or torch.compiler.is_compiling():
            return compiled(*args, **condition)
        seen.add(key)
        shape = " x ".join(map(str, tensors[0].shape))
        report(f"compiling the network for {shape}: up to a minute, and seconds the next time ...")
        began = time.monotonic()
        out = compiled(*args, **condition)
        report(f"compiled for {shape} in {time.monotonic() - began:.0f} s")
        return out

    network._compiled_call_impl = call
