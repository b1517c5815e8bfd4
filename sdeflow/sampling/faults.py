"""NaN and infinity in the middle of a solve: found as it goes, once, and named by call, time and
sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sdeflow.errors import NonFiniteError
from sdeflow.plan.instructions import Call

CAUSES = (
    "The usual causes: half precision overflows, an eps-prediction far outside its training"
    " range, a score of the wrong scale."
)


class Fault(NamedTuple):
    """The first call of a batch that returned NaN or infinity."""

    call: int
    t: float
    sound: bool
    """Whether the state that the network was given was finite."""

    def __str__(self) -> str:
        why = "the network returned it" if self.sound else "its input was not finite"
        return f" first at call {self.call + 1} (t={self.t:.6g}): {why}."


class Stopped(Exception):
    """No sample of the batch is finite any more: its states, and the calls that were made."""

    def __init__(self, x: Tensor, nfe: int):
        super().__init__()
        self.x, self.nfe = x, nfe


class Faults:
    """Watches the predictions of a batch for NaN and infinity.

    On the CPU each prediction is read once, as a sum. On an accelerator two numbers a sample stay
    on the device; they come over at the calls 1, 2, 4, 8, ... without waiting for them. A batch
    goes on while a sample of it is finite, and raises `Stopped` where none is.
    """

    def __init__(self, device: torch.device):
        self.first: Fault | None = None
        self._bad: Tensor | None = None
        self._on_cpu = device.type == "cpu"
        self._seen: list[tuple[int, float, Tensor]] = []  # call, time, [2, B]: largest |x|, |x0|
        self._coming: tuple[Sequence[tuple[int, float, Tensor]], Tensor, torch.cuda.Event] | None
        self._coming = None
        self._next = 1

    @torch.no_grad()
    def see(self, index: int, call: Call, x: Tensor, x0: Tensor) -> None:
        """Look at a call's prediction."""
        if self._on_cpu:
            # A sum is finite where all is, unless it overflows: then each entry is looked at.
            if not math.isfinite(float(x0.sum())):
                self._note(index, float(call.t), _finite(x), _finite(x0), x)
            return
        self._seen.append((index, float(call.t), torch.stack([_largest(x), _largest(x0)])))
        if self._coming is not None and self._coming[2].query():
            self._read(x, index)
        if self._coming is None and len(self._seen) >= self._next and x.is_cuda:
            self._fetch()

    def _fetch(self) -> None:
        """Begin to copy what has been seen to the CPU."""
        some, self._seen = self._seen, []
        self._next *= 2
        stacked = torch.stack([numbers for _, _, numbers in some])
        place = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
        place.copy_(stacked, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(stacked.device))
        self._coming = (some, place, event)

    def _read(self, x: Tensor | None, index: int) -> None:
        """Take note of numbers that have arrived; `x` is the state of the call `index`."""
        assert self._coming is not None
        (some, numbers, _), self._coming = self._coming, None
        finite = torch.isfinite(numbers)
        for (number, t, _), (of_x, of_x0) in zip(some, finite, strict=True):
            if not bool(of_x0.all()):
                self._note(number, t, of_x, of_x0, x, index)

    def _note(
        self,
        index: int,
        t: float,
        of_x: Tensor,
        of_x0: Tensor,
        x: Tensor | None,
        now: int | None = None,
    ) -> None:
        bad = ~of_x0
        if not bool(bad.any()):
            return
        if self.first is None:
            self.first = Fault(index, t, bool(of_x[bad].all()))
        self._bad = bad if self._bad is None else self._bad | bad
        if x is not None and bool(self._bad.all()):
            raise Stopped(x, (index if now is None else now) + 1)

    def settle(self) -> None:
        """Wait for what has not come over, and take note of it."""
        if self._coming is not None:
            self._coming[2].synchronize()
            self._read(None, 0)
        for index, t, (of_x, of_x0) in self._seen:
            self._note(index, t, torch.isfinite(of_x).cpu(), torch.isfinite(of_x0).cpu(), None)
        self._seen = []

    def error(self, x: Tensor, start: int) -> NonFiniteError:
        """The error for a batch whose first sample is number `start`, with its states at the
        end.
        """
        self.settle()
        bad = (~_finite(x)).cpu()
        if self._bad is not None and bool(self._bad.all()):
            bad = self._bad
        numbers = bad.nonzero().flatten().tolist()
        names = ", ".join(str(start + i) for i in numbers[:5])
        names += ", ..." if len(numbers) > 5 else ""
        where = (
            " The predictions were finite, so that a state overflowed after the last of them."
            if self.first is None
            else str(self.first)
        )
        return NonFiniteError(
            f"NaN or infinity in {len(numbers)} of {len(x)} samples (number {names}).{where}"
            f" {CAUSES}"
        )


def _finite(x: Tensor) -> Tensor:
    """Whether each row is finite, `[B]`."""
    return torch.isfinite(x).reshape(len(x), -1).all(1)


def _largest(x: Tensor) -> Tensor:
    """The largest magnitude of each row, `[B]` float32; NaN where there is one."""
    return torch.linalg.vector_norm(x.reshape(len(x), -1), torch.inf, dim=1).to(torch.float32)
