"""Conditions of a network, and how they are cut along with the samples.

What has rows has one a sample: a tensor, an array or a list has `n` of them (or one for all), and
is cut where a batch, or the samples of an adaptive solver that are still under way, are fewer.
Numbers, strings, None and objects are shared. A dict, and a list of tensors of `n` rows each, are
cut leaf by leaf. `Shared(value)` is handed on whole; `PerSample(values)` is cut whatever it looks
like.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PerSample:
    """A condition with one entry a sample: a tensor or array of `n` rows, or a list of `n` entries
    of any kind.
    """

    value: Any


@dataclass(frozen=True, eq=False)
class Shared:
    """A condition that all samples share. Every call of the network gets it whole."""

    value: Any


@dataclass(frozen=True, eq=False)
class _Each:
    """A list whose entries are cut each along its own rows."""

    nodes: tuple[Any, ...]


def prepared(name: str, value: Any, n: int, device: torch.device) -> Any:
    """A condition as a tree of `PerSample`, `Shared`, dicts and lists, its tensors on `device`.

    Errors: `ValueError` for another number of rows, `TypeError` for what cannot be cut.
    """
    if isinstance(value, Shared):
        return Shared(_placed(name, value.value, device))
    if isinstance(value, PerSample):
        return _rows(name, _as_torch(name, value.value), n, device)
    value = _as_torch(name, value)
    if isinstance(value, Mapping):
        return {key: prepared(f"{name}.{key}", v, n, device) for key, v in value.items()}
    if isinstance(value, Tensor):
        return _rows(name, value, n, device) if value.ndim else Shared(value.to(device))
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        if isinstance(value, Iterator) or (
            hasattr(value, "__len__")
            and hasattr(value, "__getitem__")
            and not isinstance(value, str | bytes)
        ):
            raise TypeError(
                f"condition {name!r} is a {type(value).__name__}, and it is not known how to cut it"
                " along with the samples: give a tensor, an array or a list with one entry a"
                " sample, or sdeflow.Shared(value) for one that all samples share"
            )
        return Shared(value)
    if not len(value):
        return Shared(value)
    each = [_as_torch(name, entry) for entry in value]
    whole = [isinstance(e, Tensor) and e.ndim > 0 and len(e) == n for e in each]
    if all(whole):
        if len(each) != n or n == 1:
            return _Each(tuple(prepared(f"{name}[{i}]", e, n, device) for i, e in enumerate(each)))
        raise ValueError(
            f"condition {name!r} is a list of {n} tensors of {n} rows, for {n} samples: is it one"
            " tensor a sample, or a row of each tensor a sample? Give"
            " sdeflow.PerSample(list) for the first, a dict of the tensors for the second, or"
            " sdeflow.Shared(list) if all samples share it"
        )
    return _rows(name, value, n, device)


def plain(node: Any) -> Any:
    """A prepared condition as the network gets it."""
    if isinstance(node, PerSample | Shared):
        return node.value
    if isinstance(node, _Each):
        return [plain(n) for n in node.nodes]
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items()}
    return node


def cut(node: Any, rows: slice | Tensor) -> Any:
    """A prepared condition of some samples: a slice of them, or their numbers, int64."""
    if isinstance(node, PerSample):
        value = node.value
        if isinstance(rows, slice):
            return PerSample(value[rows])
        if isinstance(value, Tensor):
            return PerSample(value.index_select(0, rows.to(value.device)))
        return PerSample([value[i] for i in rows.tolist()])
    if isinstance(node, _Each):
        return _Each(tuple(cut(n, rows) for n in node.nodes))
    if isinstance(node, dict):
        return {key: cut(value, rows) for key, value in node.items()}
    return node


def _rows(name: str, value: Any, n: int, device: torch.device) -> PerSample:
    """What has one row a sample, or one for all."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        if (numbers := _numbers(value)) is not None:
            value = numbers
    elif not isinstance(value, Tensor) or not value.ndim:
        raise TypeError(
            f"condition {name!r} is said to be one a sample, and a {type(value).__name__} has no"
            f" rows: give a tensor, an array or a list of {n} entries"
        )
    if len(value) not in (1, n):
        kind = f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "list"
        raise ValueError(
            f"condition {name!r} has {len(value)} rows for {n} samples (it is a {kind}): give one"
            " row a sample, or one for all, or sdeflow.Shared(value) if all samples share the"
            " whole of it"
        )
    if isinstance(value, Tensor):
        return PerSample(_here(value, device).expand(n, *value.shape[1:]))
    entries = [_placed(name, entry, device) for entry in value]
    return PerSample(entries * n if len(entries) == 1 else entries)


def _as_torch(name: str, value: Any) -> Any:
    """Arrays as tensors (those of strings as lists), numpy's numbers as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, np.ndarray):
        if isinstance(value, Tensor) and (value.is_nested or value.layout != torch.strided):
            raise TypeError(
                f"condition {name!r} is a nested or sparse tensor, which cannot be cut along with"
                " the samples: give a dense one, a list with one entry a sample, or"
                " sdeflow.Shared(value)"
            )
        return value
    if value.dtype.kind in "USO":
        if value.ndim < 2:
            return value.tolist()
    else:
        try:
            return torch.from_numpy(np.ascontiguousarray(value).reshape(value.shape))
        except (TypeError, ValueError):
            pass
    raise TypeError(
        f"condition {name!r} is an array of {value.dtype} of shape {value.shape}, of which torch"
        " makes no tensor: give numbers, or a list with one entry a sample"
    )


def _numbers(value: Sequence[Any]) -> Tensor | None:
    """A tensor of a list of numbers, or of lists of numbers of one length; else None."""
    entries = [v.item() if isinstance(v, np.generic) else v for v in value]
    if all(isinstance(v, int | float | complex) for v in entries):
        return torch.tensor(entries)
    if all(isinstance(v, Tensor) and v.ndim == 0 for v in entries):
        return torch.stack(entries)
    if all(isinstance(v, list | tuple) and len(v) > 0 for v in entries):
        inner = [_numbers(v) for v in entries]
        if all(i is not None and i.shape == inner[0].shape for i in inner):  # type: ignore[union-attr]
            return torch.stack(inner)  # type: ignore[arg-type]
    return None


def _placed(name: str, value: Any, device: torch.device) -> Any:
    """A value whose tensors are on `device`."""
    value = _as_torch(name, value)
    if isinstance(value, Tensor):
        return _here(value, device)
    if isinstance(value, dict):
        return {key: _placed(f"{name}.{key}", v, device) for key, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_placed(name, v, device) for v in value)
    return value


def _here(value: Tensor, device: torch.device) -> Tensor:
    """A tensor on `device`, outside inference mode."""
    value = value.to(device)
    return value.clone() if value.is_inference() else value
