"""How many samples at a time: `batch_size="auto"`, and what is done when memory runs out.

A sample depends on its own seed alone, so rows whose batch did not fit are solved again in smaller
batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable
from typing import Any, Literal

import torch

from sdeflow._utils import memory as _memory
from sdeflow._utils.checks import whole_number
from sdeflow._utils.weak_cache import WeakTable
from sdeflow.errors import OutOfMemoryError

MOST = 4096
"""The largest batch that `"auto"` tries: larger ones are no faster, and many kernels count in 32
bits.
"""

_PROBE = 8  # rows of the call that measures how much a row takes
_SHARE = 0.85  # of the free memory; fragments and the libraries themselves need the rest
_ON_CPU = 2**18  # entries of a state: enough to keep the cores busy, at some MB a state

_WORKED: WeakTable[int] = WeakTable(64)


class BatchSize:
    """How many samples at a time: a whole number, all of them (None), or `"auto"`.

    `"auto"` remembers what it found for `owner` and `key`. `whole` says that the solve cannot be
    cut into batches.
    """

    def __init__(
        self,
        asked: int | Literal["auto"] | None,
        n: int,
        owner: Any,
        key: Hashable,
        whole: bool = False,
    ):
        if isinstance(asked, str) and asked != "auto":
            raise ValueError(f"batch_size is a whole number, at least 1, or 'auto'; got {asked!r}")
        self.auto = asked == "auto" and not whole
        self.n, self.whole = n, whole
        self._owner, self._key = owner, key
        self._known_to_fit = False  # whether the limit says more than how many samples there are
        self.limit = n if asked is None or asked == "auto" else whole_number("batch_size", asked)

    @property
    def now(self) -> int:
        """The size of the next batch."""
        return min(self.limit, self.n)

    @property
    def batches(self) -> int:
        """How many batches that makes of all samples."""
        return -(-self.n // self.now)

    def find(self, device: torch.device, entries: int, bytes_a_row: Callable[[int], int]) -> None:
        """Choose where `"auto"` begins: what worked before, or what should fit.

        `bytes_a_row(rows)` measures that, on CUDA alone.
        """
        if not self.auto:
            return
        known = _WORKED.get(self._owner, self._key)
        if known is None and device.type != "cuda":
            known = _power(_ON_CPU // max(entries, 1))
        elif known is None and self.n > _PROBE:
            known = fitting(device, bytes_a_row)
        if known is not None:
            self.limit, self._known_to_fit = known, True

    def remember(self) -> None:
        """Remember what has worked, for the next call."""
        if self.auto and self._known_to_fit:
            with contextlib.suppress(TypeError):  # an owner without weak references
                _WORKED.put(self._owner, self._key, self.limit)

    def shrink(self, error: BaseException, rows: slice) -> None:
        """Halve the size after an out-of-memory `error` for some rows.

        Where that is not possible, raise an error that says what to do.
        """
        tried = rows.stop - rows.start
        if self.auto and tried > 1:
            self.limit, self._known_to_fit = _power(tried // 2), True
            return
        if self.whole:
            advice = (
                "this solve is one batch (its noise is your own, or its solution dense): ask for"
                " fewer samples"
            )
        elif tried > 1:
            half = _power(tried // 2)
            advice = f"pass batch_size={half}, or batch_size='auto', which finds what fits"
        else:
            advice = (
                "a single sample does not fit: a network in half precision, or a smaller shape,"
                " takes less"
            )
        raise OutOfMemoryError(
            f"memory is exhausted at a batch of {tried} of {self.n} samples ({_first_line(error)}):"
            f" {advice}. Gradients, trajectory= and x0s= take memory too; each sample depends on"
            " its seed alone, so that batches change no result"
        ) from error


def in_batches(size: BatchSize, run: Callable[[slice], None], release: Callable[[], None]) -> None:
    """Call `run` with the rows of one batch after the other.

    If a batch does not fit, call `release()` and take its rows in smaller batches; other errors are
    raised.
    """
    first = 0
    while first < size.n:
        rows = slice(first, min(first + size.now, size.n))
        try:
            run(rows)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, OutOfMemoryError) or not _memory.out_of_memory(error):
                raise
            size.shrink(error, rows)
        else:
            first = rows.stop
            continue
        release()  # outside the handler, whose error holds the tensors of the batch
    size.remember()


def fitting(device: torch.device, bytes_a_row: Callable[[int], int]) -> int:
    """The rows that should fit into what a device has free: a power of two, at most `MOST`."""
    rows = _PROBE
    while True:
        try:
            each = max(bytes_a_row(rows), 1)
            break
        except (MemoryError, RuntimeError) as error:
            if not _memory.out_of_memory(error):
                raise
        _memory.release(device)
        if rows == 1:
            return 1  # the solve itself will say so
        rows //= 2
    _memory.release(device)
    return max(1, min(MOST, _power(int(_SHARE * (_memory.available(device) or 0)) // each)))


def window(rows: slice, size: int) -> slice:
    """The batch of `size` rows that ends where `rows` do.

    A captured solve pads a last, smaller batch with the rows before it.
    """
    return slice(max(min(rows.start, rows.stop - size), 0), rows.stop)


def _power(number: int) -> int:
    """The largest power of two up to `number`, at least 1."""
    return 1 << max(number.bit_length() - 1, 0)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
