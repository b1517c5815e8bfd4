"""Which model and which picture: the hash of all that a denoiser holds, and the label of a picture by its index."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdeflow.denoiser import Denoiser
from sdeflow.errors import unknown
from sdeflow.generate.shards import NO_LABEL
from sdeflow.process import Process


@dataclass(frozen=True)
class Labels:
    """The label of each picture, a function of its index: `turn`, over and over; none where that is empty.

    `null` is the network's own label for "no label", of a network that was trained with labels.
    """

    turn: tuple[int, ...]
    null: int | None = None

    @classmethod
    def of(cls, denoiser: Denoiser, classes: Sequence[int | str] | str) -> Labels:
        """The labels that `classes` means: names or numbers, `"all"` or `"none"`. `UnknownNameError` for others."""
        count, names = getattr(denoiser, "num_classes", 0), tuple(getattr(denoiser, "class_names", ()))
        if not count:
            if classes not in ("all", "none"):
                raise ValueError("this model is unconditional: it knows no classes; leave classes out")
            return cls(())
        if classes == "none":
            return cls((), count)
        if classes == "all":
            return cls(tuple(range(count)))
        numbers = {name.lower(): i for i, name in enumerate(names)} | {str(i): i for i in range(count)}
        asked = [classes] if isinstance(classes, str) else list(classes)
        for name in asked:
            if str(name).lower() not in numbers:
                raise unknown("class", name, numbers)
        if not asked:
            raise ValueError("classes names at least one class, or is 'all' or 'none'")
        return cls(tuple(numbers[str(name).lower()] for name in asked))

    @property
    def stored(self) -> tuple[int, ...]:
        """As `run.json` tells it."""
        return self.turn or (NO_LABEL,)

    def told(self, rows: range) -> Tensor:
        """The labels of some pictures, int64, with -1 for none."""
        return torch.tensor([self.stored[i % len(self.stored)] for i in rows])

    def given(self, rows: range) -> Tensor | None:
        """What the network gets for them."""
        if self.turn:
            return self.told(rows)
        return None if self.null is None else torch.full((len(rows),), self.null)


def fingerprint(denoiser: Denoiser) -> str:
    """SHA-256 of all that a denoiser holds: the tensors of its network, and the numbers and tensors beside them.

    A function is known by its name alone: one that was rewritten under the same name is not told from before.
    """
    total = hashlib.sha256()

    def add(value: Any, depth: int = 0) -> None:
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous()
            total.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            total.update(plain.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, nn.Module):
            value = getattr(value, "_orig_mod", value)  # what torch.compile wraps
            add([type(value).__name__, repr(getattr(value, "config", "")), dict(value.state_dict())], depth)
        elif isinstance(value, Mapping):
            for key in sorted(value, key=str):
                add([str(key), value[key]], depth)
        elif isinstance(value, list | tuple):
            total.update(f"[{len(value)}".encode())
            for item in value:
                add(item, depth)
        elif value is None or isinstance(value, str | int | float | bool | Process | torch.dtype):
            total.update(repr(value).encode() + b";")
        elif isinstance(value, types.FunctionType | types.MethodType | type) or depth > 8:
            total.update(getattr(value, "__qualname__", type(value).__name__).encode())
        elif hasattr(value, "__dict__"):
            add(
                [type(value).__name__, {k: v for k, v in vars(value).items() if k not in ("card", "class_names")}],
                depth + 1,
            )
        else:
            total.update(type(value).__name__.encode())

    add(denoiser)
    return total.hexdigest()
