"""Checks of arguments: each returns its value, or raises an error that says what is possible."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


def is_whole(value: Any, least: float = 1, most: float = math.inf) -> bool:
    """Whether `value` is a whole number from `least` to `most`; `True` and `False` are not."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def whole_number(
    name: str,
    value: Any,
    least: int = 1,
    *,
    of: str = "",
    error: type[Exception] = ValueError,
) -> int:
    """`value`, a whole number of at least `least`; `of` says what it counts, in the error."""
    if not is_whole(value, least):
        raise error(
            f"{name} is a whole number{of and f' of {of}'}, at least {least}; got {value!r}"
        )
    return value


def is_number(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    """Whether `value` is a finite number from `least` to `most`; `True` and `False` are not."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and least <= value <= most


def positive_number(name: str, value: Any, *, error: type[Exception] = ValueError) -> float:
    """`value`, a finite number above 0."""
    if not (value > 0 and math.isfinite(value)):
        raise error(f"{name} is a positive, finite number; got {value!r}")
    return value


def fraction(name: str, value: Any, *, error: type[Exception] = ValueError) -> float:
    """`value`, a number from 0 to 1."""
    if not 0 <= value <= 1:
        raise error(f"{name} is a number from 0 to 1; got {value!r}")
    return value


def one_of(
    name: str, value: Any, choices: Iterable[Any], *, error: type[Exception] = ValueError
) -> Any:
    """`value`, one of `choices`."""
    *others, last = choices
    if value not in (*others, last):
        raise error(f"{name} is {', '.join(map(repr, others))} or {last!r}; got {value!r}")
    return value
