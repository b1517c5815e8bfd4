"""Arguments of constructors that were renamed: the old names keep working for one release."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def renamed(
    names: Mapping[str, str], values: Mapping[str, Mapping[Any, Any]] | None = None
) -> Callable[[type[T]], type[T]]:
    """A class decorator for renamed arguments of a constructor.

    With `names = {"old": "new"}` the constructor takes its argument `new` as `old` too, with a
    `DeprecationWarning`.

    `values` maps old values of arguments to new ones, likewise, by the name of the argument.
    """

    def decorate(kind: type[T]) -> type[T]:
        init: Any = kind.__init__
        order: tuple[str, ...] = vars(kind).get("__match_args__", ())

        def translated(args: tuple[Any, ...], given: dict[str, Any]) -> dict[str, Any]:
            if len(args) > len(order):
                raise TypeError(f"{kind.__name__} takes up to {len(order)} arguments")
            taken = dict(zip(order, args, strict=False))
            for name, value in given.items():
                new = names.get(name, name)
                if new != name:
                    _warn(f"{kind.__name__}({name}=...) is now {kind.__name__}({new}=...)")
                if new in taken:
                    raise TypeError(f"{kind.__name__} got its argument {new} twice")
                taken[new] = value
            for name, changed in (values or {}).items():
                value = taken.get(name)
                if isinstance(value, str) and value in changed:
                    _warn(f"{name}={value!r} of {kind.__name__} is now {name}={changed[value]!r}")
                    taken[name] = changed[value]
            return taken

        # The constructor itself refuses arguments that it does not have.
        kind.__init__ = functools.wraps(init)(  # type: ignore[method-assign]
            lambda self, *args, **given: init(self, **translated(args, given))
        )
        return kind

    return decorate


def _warn(what: str) -> None:
    warnings.warn(f"{what}; the old name goes in 0.7", DeprecationWarning, stacklevel=4)
