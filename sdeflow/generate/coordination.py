"""Processes that share independent work: they count together and exchange what they found."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from sdeflow._utils.distributed import Rank


class Coordinator:
    """The processes of one call of `generate`, connected by torchrun's store.

    There is no process group: no process waits for another while images are made. One call can
    follow another.
    """

    def __init__(self, rank: Rank) -> None:
        self.rank, self.others = rank, rank.world - 1
        self._store: dist.Store = dist.HashStore()
        if rank.world > 1:
            read = os.environ.get
            elsewhere = read("TORCHELASTIC_USE_AGENT_STORE") == "True" or dist.is_initialized()
            store = dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=rank.first and not elsewhere,
                wait_for_workers=False,
                timeout=timedelta(days=1),
            )
            start = dist.PrefixStore(f"sdeflow-{read('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            # No process arrives a second time before all have arrived once, so the count of
            # arrivals numbers the calls.
            call = (start.add("arrived", 1) - 1) // rank.world
            self._store = dist.PrefixStore(str(call), start)

    def add(self, name: str, count: int) -> int:
        """Add to a count, and return what it has become."""
        return self._store.add(name, count)

    def read(self, name: str) -> int:
        """A count as it is now."""
        return self.add(name, 0)

    def all_gather(self, name: str, value: list[int]) -> list[list[int]]:
        """The values of all processes, by rank; waits until all have called it."""
        self._store.set(f"{name}-{self.rank.index}", json.dumps(value))
        return [json.loads(self._store.get(f"{name}-{i}")) for i in range(self.rank.world)]

    @contextmanager
    def leaving_announced(self) -> Iterator[None]:
        """Tell the first process at the end of the block, even by an error, that this one has left.

        The first process then waits for it no longer.
        """
        try:
            yield
        finally:
            if not self.rank.first:
                self.add("left", 1)
