"""Images to train on: from the `datasets` library, parquet files, a folder, or any torch data set.

A data set is decoded once to bytes (uint8) and kept on the training device if it fits; otherwise
each batch is decoded when it is needed, one ahead. The order of training is a pure function of the
seed and the step: nothing needs to be remembered to go on.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from sdeflow._utils.distributed import Rank
from sdeflow.errors import missing_extra

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff"}


class Images(ABC):
    """A data set of images of one size: `count`, `labels` ([N] int64, or None), `class_names`, and
    `get`.
    """

    count: int
    size: int
    labels: Tensor | None
    class_names: tuple[str, ...]
    name: str

    @abstractmethod
    def get(self, indices: Tensor) -> Tensor:
        """The images at `indices` [B], uint8 [B, 3, size, size]."""

    @property
    def num_classes(self) -> int:
        """How many classes the labels tell apart; 0 without labels."""
        return 0 if self.labels is None else max(len(self.class_names), int(self.labels.max()) + 1)


@dataclass
class Decoded(Images):
    """Images in memory: `pixels` is uint8 [N, 3, S, S] on any device."""

    pixels: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    name: str = "images"

    def __post_init__(self) -> None:
        if self.pixels.dtype != torch.uint8 or self.pixels.ndim != 4:
            raise TypeError(
                f"pixels must be uint8 [N, C, H, W], got {self.pixels.dtype}"
                f" {tuple(self.pixels.shape)}"
            )
        if self.labels is not None and self.labels.shape != self.pixels.shape[:1]:
            raise ValueError(
                f"{len(self.pixels)} images need as many labels, got {tuple(self.labels.shape)}"
            )
        self.count, self.size = self.pixels.shape[0], self.pixels.shape[-1]

    def get(self, indices: Tensor) -> Tensor:
        """The images at `indices`."""
        return self.pixels[indices]

    def to(self, device: torch.device) -> Decoded:
        """The same images on `device`."""
        labels = None if self.labels is None else self.labels.to(device)
        return Decoded(self.pixels.to(device), labels, self.class_names, self.name)


@dataclass
class Encoded(Images):
    """Images that are read by `read(index)` when they are asked for."""

    read: Callable[[int], Image.Image]
    count: int
    size: int
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    name: str = "images"
    workers: int = 8
    _pool: ThreadPoolExecutor | None = field(default=None, repr=False)

    def get(self, indices: Tensor) -> Tensor:
        """The images at `indices`, decoded by several threads."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.workers)
        return torch.stack(list(self._pool.map(self._one, indices.tolist())))

    def _one(self, index: int) -> Tensor:
        return to_pixels(self.read(index), self.size)

    def decoded(self, progress: bool = True) -> Decoded:
        """All of it, decoded now."""
        pixels = torch.empty(self.count, 3, self.size, self.size, dtype=torch.uint8)
        with ThreadPoolExecutor(self.workers) as pool:
            done = pool.map(self._one, range(self.count))
            for i, image in enumerate(
                tqdm(done, "decoding", self.count, disable=not progress, unit="img", leave=False)
            ):
                pixels[i] = image
        return Decoded(pixels, self.labels, self.class_names, self.name)


def to_pixels(image: Image.Image | Tensor | np.ndarray, size: int) -> Tensor:
    """A picture as uint8 [3, size, size]: RGB, centre-cropped to a square and resized if it has
    another size.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3:
            raise TypeError(
                f"an image is a PIL image or a uint8 tensor [C, H, W], got {image.dtype}"
                f" {tuple(image.shape)}; torchvision's PILToTensor() gives such tensors (a float"
                " tensor's range would be a guess)"
            )
        image = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().cpu().numpy())
    image = image.convert("RGB")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def load_images(
    source: str | Path | Sequence[Any] | Any,
    *,
    split: str = "train",
    size: int | None = None,
    memory_gb: float = 4.0,
    progress: bool = True,
) -> Images:
    """The images that `source` means, of `size` x `size` pixels (by default the first image's
    shorter side).

    `source` is a folder of pictures (its subfolders are the classes), a parquet file or a folder of
    them (columns `img` or `image` and, optionally, `label`), the name of a data set on the Hugging
    Face hub (`uoft-cs/cifar10`, with its `split`), or a torch data set of PIL images or uint8
    tensors, alone or as `(image, label)`. What needs less than `memory_gb` is decoded at once.
    Raises `MissingExtraError` without the packages that a source needs, `ValueError` if nothing is
    there.
    """
    if isinstance(source, Images):
        return source
    if not isinstance(source, str | Path):
        images = _from_dataset(source, size)
    elif Path(source).suffix == ".parquet" or (
        Path(source).is_dir() and list(Path(source).glob("*.parquet"))
    ):
        images = _from_parquet(Path(source), split, size)
    elif Path(source).is_dir():
        images = _from_folder(Path(source), size)
    else:
        images = _from_hub(str(source), split, size)
    small = images.count * 3 * images.size**2 <= memory_gb * 1e9
    return images.decoded(progress) if small else images


def _from_folder(folder: Path, size: int | None) -> Encoded:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(
            f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))}) and no parquet files"
        )
    flat = any(p.parent == folder for p in files)
    classes = [] if flat else sorted({p.relative_to(folder).parts[0] for p in files})
    labels = (
        torch.tensor([classes.index(p.relative_to(folder).parts[0]) for p in files])
        if classes
        else None
    )

    def read(index: int) -> Image.Image:
        try:
            with Image.open(files[index]) as image:
                return image.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{files[index]} cannot be read as a picture: {error}") from error

    return Encoded(read, len(files), size or min(read(0).size), labels, tuple(classes), str(folder))


def _from_parquet(path: Path, split: str, size: int | None) -> Encoded:
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise missing_extra("pyarrow (with datasets)", "train", f"reading {path}") from error
    files = [path] if path.suffix == ".parquet" else sorted(path.glob("*.parquet"))
    if len(files) > 1:  # a folder of several splits: take the asked one
        files = [f for f in files if f.name.startswith(split)] or files
    if missing := [str(f) for f in files if not f.is_file()]:
        raise ValueError(f"there is no parquet file {missing[0]}")
    schema = pq.read_schema(files[0])
    column = next((name for name in ("img", "image") if name in schema.names), None)
    if column is None:
        raise ValueError(
            f"{files[0]} has columns {', '.join(schema.names)}; one must be img or image (encoded"
            " pictures)"
        )
    columns = [column, *(["label"] if "label" in schema.names else [])]
    tables = [pq.read_table(f, columns=columns) for f in files]
    rows = [value for table in tables for value in table[column].to_pylist()]
    labels = (
        torch.tensor([v for table in tables for v in table["label"].to_pylist()])
        if len(columns) == 2
        else None
    )

    def read(index: int) -> Image.Image:
        value = rows[index]
        return Image.open(io.BytesIO(value["bytes"] if isinstance(value, dict) else value))

    return Encoded(
        read, len(rows), size or min(read(0).size), labels, _class_names(schema.metadata), str(path)
    )


def _class_names(metadata: dict[bytes, bytes] | None) -> tuple[str, ...]:
    """The names that the Hugging Face library keeps in a parquet file's header."""
    import json

    features = (
        json.loads((metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    )
    return tuple(features.get("label", {}).get("names", ()))


def _from_hub(name: str, split: str, size: int | None) -> Encoded:
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(
            f"{name!r} is neither a folder of pictures, nor a parquet file, nor the name of a data"
            " set on the hub (owner/name)"
        )
    try:
        import datasets
    except ImportError as error:
        raise missing_extra("datasets", "train", f"the data set {name}") from error
    try:
        table = datasets.load_dataset(name, split=split)
    except Exception as error:
        raise ValueError(
            f"the data set {name!r} (split {split!r}) could not be loaded: {error}. Check the name"
            " and the connection, or give a parquet file or a folder of pictures"
        ) from error
    column = next(
        (c for c, kind in table.features.items() if isinstance(kind, datasets.Image)), None
    )
    if column is None:
        raise ValueError(
            f"the data set {name!r} has no column of images; it has {', '.join(table.features)}"
        )
    label = next(
        (c for c, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)), None
    )
    names = tuple(table.features[label].names) if label else ()
    labels = torch.tensor(table[label][:]) if label else None

    def read(index: int) -> Image.Image:
        return table[index][column]

    # The library's readers are not made for threads that share one table.
    return Encoded(
        read, len(table), size or min(read(0).size), labels, names, f"{name} [{split}]", workers=1
    )


def _from_dataset(dataset: Any, size: int | None) -> Encoded:
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"a data set needs __len__ and __getitem__; {type(dataset).__name__} has not both"
        )
    if len(dataset) == 0:
        raise ValueError("the data set is empty")
    first = dataset[0]
    paired = isinstance(first, tuple | list)
    image = first[0] if paired else first
    side = min(image.shape[-2:]) if isinstance(image, Tensor) else min(getattr(image, "size", (0,)))
    labels = None
    if paired and len(first) > 1:
        targets = getattr(
            dataset, "targets", None
        )  # torchvision's list, which spares decoding every image for its label
        labels = torch.as_tensor(
            targets if targets is not None else [int(dataset[i][1]) for i in range(len(dataset))]
        )

    def read(index: int) -> Any:
        item = dataset[index]
        return item[0] if paired else item

    names = tuple(getattr(dataset, "classes", ()))
    return Encoded(
        read, len(dataset), size or int(side), labels, names, type(dataset).__name__, workers=1
    )


def mix(*numbers: int) -> int:
    """A seed of 63 bits from whole numbers, each of which changes all of it (SplitMix64)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


class Stream:
    """The batches of a training run: step k's batch is a pure function of (seed, k, rank).

    Each pass over the data is a fresh permutation of it. A batch of `batch` images over all ranks
    is a window of `batch` places of that endless sequence, of which each rank takes its share; a
    window may span two passes.
    """

    def __init__(
        self,
        images: Images,
        batch: int,
        seed: int,
        rank: Rank | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.images, self.batch, self.seed, self.rank = images, batch, seed, rank or Rank()
        if batch % self.rank.world:
            raise ValueError(
                f"batch size {batch} must be a multiple of the {self.rank.world} processes"
            )
        self.device = torch.device(device)
        if isinstance(images, Decoded):
            self.images = images.to(self.device)
        self._orders: dict[int, Tensor] = {}
        self._ahead: tuple[int, Future[Tensor]] | None = None
        self._pool = ThreadPoolExecutor(1) if isinstance(images, Encoded) else None

    def indices(self, step: int) -> Tensor:
        """Which images this rank sees at `step`."""
        share = self.rank.share(self.batch)
        place, stop = step * self.batch + share.start, step * self.batch + share.stop
        parts = []
        while place < stop:
            epoch, offset = divmod(place, self.images.count)
            taken = min(stop - place, self.images.count - offset)
            parts.append(self._order(epoch)[offset : offset + taken])
            place += taken
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(mix(self.seed, 1, epoch))
            order = torch.randperm(self.images.count, generator=generator)
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1}
            self._orders[epoch] = (
                order.to(self.device) if isinstance(self.images, Decoded) else order
            )
        return self._orders[epoch]

    def pixels(self, step: int) -> tuple[Tensor, Tensor | None]:
        """The images (uint8) and labels of `step`, on the device."""
        indices = self.indices(step)
        labels = None if self.images.labels is None else self.images.labels[indices].to(self.device)
        if self._pool is None:
            return self.images.get(indices), labels
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = (step, self._pool.submit(self.images.get, indices))
        pixels = self._ahead[1].result()
        self._ahead = (step + 1, self._pool.submit(self.images.get, self.indices(step + 1)))
        return pixels.to(self.device, non_blocking=True), labels

    def __call__(
        self, step: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The batch of `step`: `x0` float32 [b, 3, S, S] in [-1, 1] and labels; `generator` flips
        half of it left to right.
        """
        pixels, labels = self.pixels(step)
        return prepared(pixels, generator), labels


def prepared(pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """uint8 images as float32 in [-1, 1]; `generator` flips half of them left to right."""
    x0 = pixels.float().div_(127.5).sub_(1)
    if generator is not None:
        flip = torch.rand(len(x0), 1, 1, 1, device=x0.device, generator=generator) < 0.5
        x0 = torch.where(flip, x0.flip(3), x0)
    return x0
