"""The label of each image of a generated set, by the image's index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdeflow.errors import unknown
from sdeflow.images.shards import NO_LABEL


@dataclass(frozen=True)
class Labels:
    """The label of each picture, a function of its index: `turn`, over and over; none where that is
    empty.

    `null` is the network's own label for "no label", of a network that was trained with labels.
    """

    turn: tuple[int, ...]
    null: int | None = None

    @classmethod
    def of(cls, denoiser: Any, classes: Sequence[int | str] | str) -> Labels:
        """The labels that `classes` means: names or numbers, `"all"` or `"none"`.
        `UnknownNameError` for others.
        """
        count, names = (
            getattr(denoiser, "num_classes", 0),
            tuple(getattr(denoiser, "class_names", ())),
        )
        if not count:
            if classes not in ("all", "none"):
                raise ValueError(
                    "this model is unconditional: it knows no classes; leave classes out"
                )
            return cls(())
        if classes == "none":
            return cls((), count)
        if classes == "all":
            return cls(tuple(range(count)))
        numbers = {name.lower(): i for i, name in enumerate(names)} | {
            str(i): i for i in range(count)
        }
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
