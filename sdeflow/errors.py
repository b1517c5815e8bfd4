"""The errors of sdeflow: each says what was asked, what is possible and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class SdeflowError(Exception):
    """Base class of every error that sdeflow raises on purpose."""


class UnknownNameError(SdeflowError, ValueError):
    """A name that no registry knows."""


class BudgetError(SdeflowError, ValueError):
    """A number of function evaluations that a solver cannot spend exactly."""


class GridError(SdeflowError, ValueError):
    """A time grid that no solver can run on."""


class SolverError(SdeflowError, RuntimeError):
    """A solve that could not go on; says at which time, which step size and which sample.

    `partial` is the `Solution` of the batch as far as it was reached, where there is one;
    `finished` that of the batches before it. Every other exception that ends a solve between its
    batches, `KeyboardInterrupt` too, is given a `finished` of this kind, and a note that says so.
    """

    partial: Any = None
    finished: Any = None


class NonFiniteError(SdeflowError, ArithmeticError):
    """A network returned NaN or infinity; `partial` and `finished` are those of `SolverError`.

    A batch goes on while one of its samples is finite, so that `partial` holds the sound samples,
    and stops at the call that spoils the last of them.
    """

    partial: Any = None
    finished: Any = None


class OutOfMemoryError(SolverError, MemoryError):
    """A batch that does not fit into memory, on whatever device; `finished` is that of
    `SolverError`.
    """


class CheckpointError(SdeflowError, ValueError):
    """A checkpoint that is missing, corrupt, or could not be written."""


class ImageError(SdeflowError, ValueError):
    """An image, or a file of images, that is missing, damaged, or unlike the others."""


class MissingExtraError(SdeflowError, ImportError):
    """A feature whose optional packages are not installed."""


def unknown(
    kind: str, name: object, known: Iterable[str], aliases: Iterable[str] = ()
) -> UnknownNameError:
    """The error for `name`, which is no `kind` we know, with the nearest names or aliases that we
    do; with all names where they are few, or none is near.
    """
    names = sorted(known)
    plain = "_".join(str(name).lower().replace("-", " ").split())
    near = get_close_matches(plain, [*names, *aliases], n=3, cutoff=0.5)
    near = near or get_close_matches(str(name), names, n=3, cutoff=0.5)  # of names in capitals
    hint = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    if near and len(names) > _FEW:
        hint += f" `sdeflow info` lists all {len(names)}"
    else:
        hint += f"{' k' if near else 'k'}nown: {', '.join(names)}"
    return UnknownNameError(f"unknown {kind} {name!r}; {hint}")


_FEW = 12  # names that an error lists beside the nearest ones


def missing_extra(package: str, extra: str, purpose: str) -> MissingExtraError:
    """The error for an optional `package` that is not installed."""
    return MissingExtraError(
        f"{purpose} needs {package}, which is not installed; run: pip install 'sdeflow[{extra}]'"
    )
