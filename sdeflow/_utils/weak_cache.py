"""A small table of results for objects, which does not keep the objects alive."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class WeakTable(Generic[Value]):
    """Values by (owner, key): at most `most`, those used last, and none whose owner is gone.

    Owners are distinguished by identity, whatever their `__eq__`. A value must not refer to its
    owner: else both stay until the value is the oldest.
    """

    def __init__(self, most: int):
        self.most = most
        self._held: OrderedDict[tuple[int, Hashable], tuple[weakref.ref[Any], Value]] = (
            OrderedDict()
        )
        # An owner may go, and call back, in the middle of a line of this thread.
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, owner: Any, key: Hashable) -> Value | None:
        """The value, or None where there is none."""
        with self._lock:
            found = self._held.get((id(owner), key))
            if found is None or found[0]() is not owner:
                return None
            self._held.move_to_end((id(owner), key))
            return found[1]

    def put(self, owner: Any, key: Hashable, value: Value) -> None:
        """Keep a value; the one used longest ago goes, if there are too many.

        `TypeError` for an owner without weak references.
        """
        number = id(owner)
        reference = weakref.ref(owner, lambda _: self._drop(number))
        with self._lock:
            self._held[number, key] = reference, value
            self._held.move_to_end((number, key))
            while len(self._held) > self.most:
                self._held.popitem(last=False)

    def forget(self, owner: Any = None) -> None:
        """Drop all that is held for an owner, or for all of them."""
        self._drop(None if owner is None else id(owner))

    def _drop(self, number: int | None) -> None:
        with self._lock:
            gone = [self._held.pop(key) for key in [*self._held] if number in (None, key[0])]
        del gone  # out of the lock
