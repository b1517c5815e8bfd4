"""What images are compared by: networks whose activations stand for an image.

An extractor is a value with a name, a dimension, the SHA-256 of its weights' file, the rule by
which images are resized, and the range of pixels that it takes. Two scores can be compared only
where all of these are the same.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class Extractor(ABC):
    """A feature network: images uint8 `[B, 3, H, W]` (or one channel) to features float32
    `[B, dim]`.

    `name` is its own, `score` that of its Frechet distance, `sha256` that of its weights' file,
    `resize` and `input_range` say what is done to pixels first. `num_classes` is 0 without a
    classifier.
    """

    name: str
    score: str
    dim: int
    sha256: str
    resize: str
    input_range: str = "uint8, 0 to 255"
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    device: torch.device

    @abstractmethod
    def _features(self, pixels: Tensor) -> Tensor: ...

    def logits(self, features: Tensor) -> Tensor:
        """The classifier on top, `[B, classes]`. Errors: `ValueError` for an extractor that has
        none.
        """
        raise ValueError(
            f"{self.name} has no classes of its own; accuracy is that of the network of fd_cifar"
        )

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """The features of images. Errors: `TypeError` unless they are uint8, `ValueError` for
        other shapes.
        """
        if pixels.dtype != torch.uint8:
            raise TypeError(
                f"{self.name} takes uint8 images, 0 to 255; got {pixels.dtype}"
                " (sdeflow.images.render.to_uint8 makes them)"
            )
        if pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
            raise ValueError(f"{self.name} takes images [B, 3, H, W]; got {tuple(pixels.shape)}")
        pixels = pixels.to(self.device, non_blocking=True).expand(-1, 3, -1, -1)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            return self._features(pixels).float()

    def describe(self) -> dict[str, Any]:
        """What must be the same where two scores are compared, ready for JSON."""
        facts = {"name": self.name, "score": self.score, "dim": self.dim, "sha256": self.sha256}
        return {**facts, "resize": self.resize, "input_range": self.input_range}


def file_sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, as `sha256sum` says it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
