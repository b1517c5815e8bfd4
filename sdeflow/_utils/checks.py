"""Checks of arguments: each returns its value, or raises an error that says what is possible."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sdeflow.errors import unknown


def is_whole(value: Any, least: float = 1, most: float = math.inf) -> bool:
    """Whether `value` is a whole number from `least` to `most`, an integer of numpy too; `True` and
    `False` are not.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return whole and least <= int(value) <= most


def whole_number(
    name: str, value: Any, least: int = 1, *, of: str = "", error: type[Exception] = ValueError
) -> int:
    """`value` as an `int`, a whole number of at least `least`; `of` says what it counts, in the
    error.
    """
    if not is_whole(value, least):
        raise error(
            f"{name} is a whole number{of and f' of {of}'}, at least {least}; got {value!r}"
        )
    return int(value)


def is_number(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    """Whether `value` is a finite number from `least` to `most`; `True` and `False` are not."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    return number and math.isfinite(value) and least <= value <= most


def positive_number(name: str, value: Any, *, error: type[Exception] = ValueError) -> float:
    """`value`, a finite number above 0."""
    if not (value > 0 and math.isfinite(value)):
        raise error(f"{name} > 0 is needed, a positive finite number; got {value!r}")
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


def listed(values: Sequence[Any], most: int = 5) -> str:
    """The first of `values` for a message, with commas, and "..." if there are more."""
    return ", ".join(map(str, values[:most])) + (", ..." if len(values) > most else "")


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entries of two mappings that differ, for an error that names them.

    An entry is None where a mapping lacks the name.
    """
    names = [name for name in sorted({*a, *b}) if a.get(name) != b.get(name)]
    return {name: a.get(name) for name in names}, {name: b.get(name) for name in names}


def check_choices(value: Any) -> None:
    """Check the fields of a dataclass that are of a `Literal` type.

    `UnknownNameError` where one holds something else.
    """
    for name, known in _choices(type(value)):  # type: ignore[arg-type]
        if getattr(value, name) not in known:
            raise unknown(name, getattr(value, name), (k for k in known if k is not None))


@cache
def _choices(kind: Hashable) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    """The fields of a dataclass that are of a `Literal` type, perhaps or None, and their values."""
    try:
        hints = get_type_hints(kind)
    except NameError:  # a user's class, of types that are known to its own function only
        return ()
    found = []
    for field in fields(kind):  # type: ignore[arg-type]
        hint = hints[field.name]
        parts = (hint,) if get_origin(hint) is Literal else get_args(hint)
        if any(get_origin(part) is Literal for part in parts):
            values = (get_args(part) if get_origin(part) is Literal else (None,) for part in parts)
            found.append((field.name, tuple(value for some in values for value in some)))
    return tuple(found)
