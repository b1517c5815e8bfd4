"""Processes under torchrun: this one's rank and share, and the few sums that training needs.

Without torchrun there is one process of rank 0 and every function here is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Rank:
    """This process among `world` processes.

    `local` is its number on its own machine, which picks its GPU.
    """

    index: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.index == 0

    def share(self, total: int) -> range:
        """Which of `total` things are this process's.

        Shares are contiguous and disjoint; their sizes differ by one at most.
        """
        return range(self.index * total // self.world, (self.index + 1) * total // self.world)

    def device(self, device: torch.device) -> torch.device:
        """The device of this process: under torchrun a bare "cuda" becomes its own GPU."""
        bare = device.type == "cuda" and device.index is None
        return torch.device("cuda", self.local) if bare else device


def this_rank() -> Rank:
    """The rank in torchrun's environment variables; without them, that of the only process."""
    read = os.environ.get
    return Rank(int(read("RANK", "0")), int(read("WORLD_SIZE", "1")), int(read("LOCAL_RANK", "0")))


@contextmanager
def joined(rank: Rank, device: torch.device) -> Iterator[None]:
    """A process group for the block, if there is more than one process.

    It is NCCL's for GPUs, Gloo's otherwise.
    """
    if rank.world == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def mean_(tensor: Tensor) -> Tensor:
    """The mean of `tensor` over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def anyone(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on any process; all get the same answer, and wait for each other."""
    if not dist.is_initialized():
        return flag
    tensor = torch.tensor(int(flag), device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return bool(tensor.item())


def all_gather(tensor: Tensor) -> Tensor:
    """The tensors of all processes, on every process.

    They are concatenated by rank along dimension 0; sizes may differ.
    """
    if not dist.is_initialized():
        return tensor
    size = torch.tensor(tensor.shape[0], device=tensor.device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    largest = max(int(s) for s in sizes)
    padded = tensor.new_zeros(largest, *tensor.shape[1:])
    padded[: tensor.shape[0]] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(s)] for part, s in zip(parts, sizes, strict=True)])


def barrier() -> None:
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()
