"""The memory of a device.

Whether an error says that there is none left, releasing what is cached, and what a solve took.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch

_SPENT = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
"""What the messages of CUDA, MPS, cuBLAS, cuDNN and the allocator of the CPU have in common."""


@dataclass(frozen=True)
class Memory:
    """What a solve took, in bytes; None for what is not known.

    - `peak`: on CUDA, the most that torch's allocator had given out on the device at a time, what
      was there before (the weights) included. Taking it resets `torch.cuda.max_memory_allocated`.
    - `buffers`: the states that the plan of a batch holds at once.
    - `graph`: on CUDA, what captured graphs keep reserved for themselves.
    """

    peak: int | None = None
    buffers: int | None = None
    graph: int | None = None

    def __str__(self) -> str:
        known = ((name, size) for name, size in vars(self).items() if size is not None)
        return ", ".join(f"{name} {_readable(size)}" for name, size in known)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is exhausted, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _SPENT)


def release(device: torch.device) -> None:
    """Release what garbage and torch's cache hold on a device."""
    gc.collect()
    empty = getattr(getattr(torch, device.type, None), "empty_cache", None)
    if empty is not None:
        empty()


def available(device: torch.device) -> int | None:
    """The bytes that could still be given out on a CUDA device; None elsewhere.

    Those that torch has cached are included.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def begin_peak(device: torch.device) -> None:
    """Begin to record the peak of a solve."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    """The peak since `begin_peak`; None where it is not known."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _readable(size: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024  # type: ignore[assignment]
    return f"{size:.4g} GiB"
