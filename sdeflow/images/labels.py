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
    """The label of each image, a function of its index.

    The labels of `cycle` are taken in turn; there are none if it is empty.

    `null` is the label that means "no label" to a network that was trained with labels.
    """

    cycle: tuple[int, ...]
    null: int | None = None

    @classmethod
    def of(cls, denoiser: Any, classes: Sequence[int | str] | str) -> Labels:
        """The labels that `classes` means: names or numbers, `"all"` or `"none"`.
        `UnknownNameError` for others.
        """
        count, names = getattr(denoiser, "num_classes", 0), getattr(denoiser, "class_names", ())
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
    def recorded(self) -> tuple[int, ...]:
        """What `run.json` holds: the cycle, or -1 for no label."""
        return self.cycle or (NO_LABEL,)

    def numbers(self, rows: range) -> Tensor:
        """The labels of some images, int64, with -1 for none."""
        return torch.tensor([self.recorded[i % len(self.recorded)] for i in rows])

    def given(self, rows: range) -> Tensor | None:
        """The labels that the network gets for them."""
        if self.cycle:
            return self.numbers(rows)
        return None if self.null is None else torch.full((len(rows),), self.null)
