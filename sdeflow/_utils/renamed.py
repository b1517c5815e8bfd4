"""Arguments of constructors that were renamed: the old names keep working for one release."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def renamed(
    values: Mapping[str, Mapping[Any, Any]] | None = None, **names: str
) -> Callable[[type[T]], type[T]]:
    """A class decorator: `renamed(old="new")` hands the argument `old` on as `new`, with a
    `DeprecationWarning`. `values` maps old values of the new arguments to new ones, likewise.
    """

    def decorate(kind: type[T]) -> type[T]:
        init: Any = kind.__init__
        order = list(kind.__dict__.get("__match_args__", ()))

        @functools.wraps(init)
        def __init__(self: T, *args: Any, **given: Any) -> None:
            for old in given.keys() & names.keys():
                if names[old] in given:
                    raise TypeError(f"{kind.__name__} got both {old}= and {names[old]}=")
                _warn(f"{kind.__name__}({old}=...) is now {kind.__name__}({names[old]}=...)")
                given[names[old]] = given.pop(old)
            for name, changed in (values or {}).items():
                at = order.index(name)
                value = args[at] if at < len(args) else given.get(name)
                if isinstance(value, str) and value in changed:
                    _warn(f"{name}={value!r} of {kind.__name__} is now {changed[value]!r}")
                    if at < len(args):
                        args = (*args[:at], changed[value], *args[at + 1 :])
                    else:
                        given[name] = changed[value]
            init(self, *args, **given)

        kind.__init__ = __init__  # type: ignore[method-assign, assignment]
        return kind

    return decorate


def _warn(what: str) -> None:
    warnings.warn(f"{what}; the old name goes in 0.7", DeprecationWarning, stacklevel=3)
