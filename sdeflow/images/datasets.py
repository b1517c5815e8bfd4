"""Sets of images, from whatever holds them, and the order in which a training sees them.

`load_images` reads every source. To train, a set is decoded once to bytes (uint8) and kept on the
training device if it fits; otherwise each batch is decoded when it is needed, one ahead. The order
of training is a function of the seed and the step alone, so a resumed training needs no record of
it.
"""

from __future__ import annotations

import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from sdeflow._utils.checks import whole_number
from sdeflow._utils.distributed import Rank
from sdeflow.errors import ImageError, missing_extra
from sdeflow.images.shards import DAMAGE, NO_LABEL, RUN, Batch, arrow, open_finished, reason

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff"}

Part = tuple[Tensor, Tensor | None]
"""Images uint8 [B, C, H, W] and their labels int64 [B], if there are any."""


class Images(ABC):
    """A set of images: `count`, `labels` ([N] int64, or None), `class_names`, and `get`.

    `size` is the width and height that a training gets; `how` says how the images were made, where
    that is known.
    """

    count: int
    size: int
    labels: Tensor | None
    class_names: tuple[str, ...]
    name: str
    how: dict[str, Any]

    @abstractmethod
    def get(self, indices: Tensor) -> Tensor:
        """The images at `indices` [B], uint8 [B, C, size, size]."""

    def batches(self, batch: int, n: int | None = None, rank: Rank | None = None) -> Iterator[Part]:
        """This process's share of the first `n` images, in order, at most `batch` at a time."""
        share = (rank or Rank()).share(self.count if n is None else min(n, self.count))
        for start in range(share.start, share.stop, batch):
            rows = torch.arange(start, min(start + batch, share.stop))
            yield self.get(rows), None if self.labels is None else self.labels[rows]

    def decoded(self, progress: bool = True) -> Decoded:
        """All of it in memory."""
        pixels, labels, done = None, [], 0
        shown = {"desc": "decoding", "unit": "img", "leave": False, "disable": not progress}
        with tqdm(total=self.count, **shown) as bar:
            for part, label in self.batches(256):
                pixels = part.new_empty(self.count, *part.shape[1:]) if pixels is None else pixels
                pixels[done : done + len(part)] = part
                labels += [] if label is None else [label]
                done += len(part)
                bar.update(len(part))
        if pixels is None:
            raise ValueError(f"{self.name} holds no images")
        found = _known(torch.cat(labels)) if labels else None
        return Decoded(pixels, found, self.class_names, self.name, self.how)

    @property
    def num_classes(self) -> int:
        """How many classes the labels distinguish; 0 without labels."""
        return 0 if self.labels is None else max(len(self.class_names), int(self.labels.max()) + 1)


@dataclass
class Decoded(Images):
    """Images in memory: `pixels` is uint8 [N, 3, S, S] on any device."""

    pixels: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    name: str = "images"
    how: dict[str, Any] = field(default_factory=dict)

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

    def decoded(self, progress: bool = True) -> Decoded:
        """The set itself."""
        return self

    def to(self, device: torch.device) -> Decoded:
        """The same images on `device`."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, pixels=self.pixels.to(device), labels=labels)


@dataclass
class Encoded(Images):
    """Images that are read by `read(index)` when they are needed.

    With `crop` they are cropped and resized to `size`; without it they must all have one size.
    """

    read: Callable[[int], Any]
    count: int
    size: int
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    name: str = "images"
    workers: int = 8
    crop: bool = True
    how: dict[str, Any] = field(default_factory=dict)
    _pool: ThreadPoolExecutor | None = field(default=None, repr=False)

    def get(self, indices: Tensor) -> Tensor:
        """The images at `indices`, decoded by several threads."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.workers)
        return torch.stack(list(self._pool.map(self._one, indices.tolist())))

    def _one(self, index: int) -> Tensor:
        image = self.read(index)
        if self.crop:
            return to_pixels(image, self.size)
        if image.size != self._first_size:
            (w0, h0), (w, h) = self._first_size, image.size
            raise ImageError(
                f"the images differ in size: number 0 is {w0} x {h0} pixels, number {index} is"
                f" {w} x {h}; bring them to one size first"
            )
        return _tensor(image)

    @cached_property
    def _first_size(self) -> tuple[int, int]:
        return self.read(0).size


class Generated(Images):
    """A folder that `sdeflow generate` wrote: each shard is verified when it is read."""

    def __init__(self, folder: Path) -> None:
        self.shards, self.how = open_finished(folder)
        self.count, self.size = self.shards.n, min(self.shards.shape[:2])
        self.class_names, self.name = self.shards.class_names, str(folder)

    @cached_property
    def labels(self) -> Tensor | None:  # type: ignore[override]
        """The labels of all images; None if they have none."""
        return _known(torch.cat([self.shards.read(k)[2] for k in range(len(self.shards))]))

    def get(self, indices: Tensor) -> Tensor:
        """The images at `indices`; the shards that hold them are read whole."""
        size, rows = self.shards.size, indices.tolist()
        held = {k: self.shards.read(k)[1] for k in {row // size for row in rows}}
        return torch.stack([held[row // size][row % size] for row in rows]).permute(0, 3, 1, 2)

    def batches(self, batch: int, n: int | None = None, rank: Rank | None = None) -> Iterator[Part]:
        """As for any set; a process has whole shards, so that none is read twice."""
        total = self.count if n is None else min(n, self.count)
        for k in (rank or Rank()).share(-(-total // self.shards.size)):
            indices, pixels, labels = self.shards.read(k)
            kept = int((indices < total).sum())
            images = pixels[:kept].permute(0, 3, 1, 2)
            yield from zip(images.split(batch), labels[:kept].split(batch), strict=True)


def _known(labels: Tensor) -> Tensor | None:
    """`labels`, or None if no image has one."""
    return None if bool((labels == NO_LABEL).all()) else labels


def _tensor(image: Image.Image) -> Tensor:
    """An image as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def to_pixels(image: Image.Image | Tensor | np.ndarray, size: int) -> Tensor:
    """An image as uint8 [3, size, size], RGB.

    It is cropped to a square at its centre and resized if it has another size.
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
    return _tensor(image)


def load_images(
    source: str | Path | Sequence[Any] | Any,
    *,
    split: str = "train",
    size: int | None = None,
    memory_gb: float = 4.0,
    progress: bool = True,
) -> Images:
    """The images that `source` means, of `size` x `size` pixels.

    By default `size` is the first image's shorter side.

    `source` is one of

    - a folder of images, whose subfolders are the classes;
    - a parquet file (columns `img` or `image` and, optionally, `label`), an npz file (arrays
      `images` or `arr_0`, uint8 [N, H, W, C], and optionally `labels` or `arr_1`), or a folder of
      either;
    - a folder that `sdeflow generate` wrote;
    - the name of a data set on the Hugging Face hub (`uoft-cs/cifar10`), with its `split`;
    - a torch data set of PIL images or uint8 tensors, alone or as `(image, label)`.

    What needs less than `memory_gb` is decoded at once. Raises `MissingExtraError` without the
    packages that a source needs, `ValueError` if nothing is there, `ImageError` (which is a
    `ValueError` too) for what cannot be read.
    """
    if isinstance(source, Images):
        return source
    images: Images
    if isinstance(source, str | Path):
        images = _open_path(Path(source), split, size) or _from_hub(str(source), split, size)
    else:
        images = _from_dataset(source, size)
    if (memory_gb or size) and not isinstance(images, Encoded):
        images = _resized(images, size or images.size)  # to train: square, of three channels
    small = images.count * 3 * images.size**2 <= memory_gb * 1e9
    if memory_gb and not small and isinstance(images, Generated):  # read one by one, not by shard
        plain = _open_files(Path(str(source)), split, size)
        images = replace(plain, labels=images.labels, class_names=images.class_names)
    return images.decoded(progress) if small else images


def read_images(path: str | os.PathLike[str], *, batch: int = 256) -> Iterator[Batch]:
    """The images at `path`, at most `batch` at a time.

    Each batch is (indices int64 [k], uint8 [k, H, W, C], labels int64 [k]).

    `path` is a folder or a file that `load_images` takes. Nothing is cropped or resized: all images
    must have one size. The shards of a folder that `sdeflow generate` wrote are verified as they
    are read. A label of -1 is none.

    Errors: `ValueError` where there are no images; `SdeflowError` where some are missing, cannot be
    read, or differ in size; `MissingExtraError` for parquet without pyarrow.
    """
    path = Path(path)
    whole_number("batch", batch)
    if not path.exists():
        raise ValueError(f"{path} is not there")
    images = _open_path(path, "", None, crop=False)
    if images is None:
        raise ValueError(f"{path} is no folder, npz file or parquet file")
    return _numbered(images, batch)


def _numbered(images: Images, batch: int) -> Iterator[Batch]:
    first = 0
    for pixels, labels in images.batches(batch):
        indices = torch.arange(first, first + len(pixels))
        labels = torch.full_like(indices, NO_LABEL) if labels is None else labels
        yield indices, pixels.permute(0, 2, 3, 1), labels
        first += len(pixels)


def _open_path(path: Path, split: str, size: int | None, crop: bool = True) -> Images | None:
    """The images in a folder or a file; None for what is neither."""
    return Generated(path) if (path / RUN).is_file() else _open_files(path, split, size, crop)


def _open_files(path: Path, split: str, size: int | None, crop: bool = True) -> Any:
    """As `_open_path`, whoever made the files."""
    for suffix, reader in ((".npz", _from_npz), (".parquet", _from_parquet)):
        files = sorted(path.glob(f"*{suffix}")) if path.is_dir() else [path]
        if files and files[0].suffix == suffix:
            if len(files) > 1:  # a folder of several splits: take the asked one
                files = [f for f in files if f.name.startswith(split)] or files
            if not files[0].is_file():
                raise ValueError(f"there is no {suffix[1:]} file {files[0]}")
            return reader(files, str(path), size, crop)
    return _from_folder(path, size, crop) if path.is_dir() else None


def _resized(images: Images, size: int) -> Images:
    """`images` as RGB squares of `size` pixels."""
    if images.get(torch.tensor([0])).shape[1:] == (3, size, size):
        return images

    def read(index: int) -> Tensor:
        return images.get(torch.tensor([index]))[0]

    about = {name: getattr(images, name) for name in ("labels", "class_names", "name", "how")}
    return Encoded(read, images.count, size, **about)


def _opened(source: Path | io.BytesIO, name: object) -> Image.Image:
    """An image as RGB, or an error that names it."""
    try:
        with Image.open(source) as image:
            return image.convert("RGB")
    except DAMAGE as error:
        raise ImageError(
            f"{name} cannot be read as an image ({reason(error)}); remove it or make it again"
        ) from error


def _from_folder(folder: Path, size: int | None, crop: bool) -> Encoded:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise ValueError(
            f"{folder} holds no images ({', '.join(sorted(SUFFIXES))}), and no npz or parquet files"
        )
    flat = any(p.parent == folder for p in files)
    names = [p.relative_to(folder).parts[0] for p in files]
    classes = [] if flat else sorted({*names})
    labels = torch.tensor([classes.index(name) for name in names]) if classes else None

    def read(index: int) -> Image.Image:
        return _opened(files[index], files[index])

    size = size or min(read(0).size)
    return Encoded(read, len(files), size, labels, tuple(classes), str(folder), crop=crop)


def _from_npz(files: list[Path], name: str, size: int | None, crop: bool) -> Images:
    parts: list[np.ndarray] = []
    labelled: list[np.ndarray] = []
    for file in files:
        try:
            with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
                array = arrays["images" if "images" in arrays else "arr_0"]
                key = next((key for key in ("labels", "arr_1") if key in arrays), None)
                labels = np.full(len(array), NO_LABEL) if key is None else arrays[key]
            if array.dtype != np.uint8 or array.ndim != 4 or labels.shape != array.shape[:1]:
                raise ValueError(
                    "images are uint8 [n, H, W, C] with a label each; it has"
                    f" {array.dtype} {array.shape}"
                )
            if parts and array.shape[1:] != parts[0].shape[1:]:
                raise ValueError(
                    f"its images are {array.shape[1:]}, and {parts[0].shape[1:]} before"
                )
        except DAMAGE as error:
            raise ImageError(
                f"{file} cannot be read as an npz file of images ({reason(error)})"
            ) from error
        parts.append(array)
        labelled.append(labels.astype(np.int64))
    pixels = torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2)
    return Decoded(pixels, _known(torch.from_numpy(np.concatenate(labelled))), name=name)


def _from_parquet(files: list[Path], name: str, size: int | None, crop: bool) -> Encoded:
    pa = arrow(f"reading {name}")
    try:
        schema = pa.parquet.read_schema(files[0])
        column = next((c for c in ("img", "image") if c in schema.names), None)
        if column is None:
            raise ValueError(
                f"it has the columns {', '.join(schema.names)}; one must be img or image"
            )
        columns = [column, *(["label"] if "label" in schema.names else [])]
        tables = [pa.parquet.read_table(f, columns=columns) for f in files]
    except DAMAGE as error:
        raise ImageError(
            f"{files[0]} cannot be read as a parquet file of images ({reason(error)})"
        ) from error
    rows = [value for table in tables for value in table[column].to_pylist()]
    labels = None
    if len(columns) == 2:
        labels = torch.tensor([v for table in tables for v in table["label"].to_pylist()])

    def read(index: int) -> Image.Image:
        value = rows[index]
        content = value["bytes"] if isinstance(value, dict) else value
        return _opened(io.BytesIO(content), f"image {index} of {name}")

    size = size or min(read(0).size)
    return Encoded(read, len(rows), size, labels, _class_names(schema.metadata), name, crop=crop)


def _class_names(metadata: dict[bytes, bytes] | None) -> tuple[str, ...]:
    """The names that the Hugging Face library keeps in a parquet file's header."""
    facts = json.loads((metadata or {}).get(b"huggingface", b"{}"))
    return tuple(facts.get("info", {}).get("features", {}).get("label", {}).get("names", ()))


def _from_hub(name: str, split: str, size: int | None) -> Encoded:
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(
            f"{name!r} is neither a folder of images, nor a parquet file, nor the name of a data"
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
            " and the connection, or give a parquet file or a folder of images"
        ) from error

    def first(kind: type) -> str | None:
        return next((c for c, found in table.features.items() if isinstance(found, kind)), None)

    column, label = first(datasets.Image), first(datasets.ClassLabel)
    if column is None:
        raise ValueError(
            f"the data set {name!r} has no column of images; it has {', '.join(table.features)}"
        )
    names = tuple(table.features[label].names) if label else ()
    labels = torch.tensor(table[label][:]) if label else None

    def read(index: int) -> Image.Image:
        return table[index][column]

    size = size or min(read(0).size)
    # The library's readers are not made for threads that share one table.
    return Encoded(read, len(table), size, labels, names, f"{name} [{split}]", workers=1)


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
        # torchvision's list spares decoding every image for its label.
        targets = getattr(dataset, "targets", None)
        if targets is None:
            targets = [int(dataset[i][1]) for i in range(len(dataset))]
        labels = torch.as_tensor(targets)

    def read(index: int) -> Any:
        item = dataset[index]
        return item[0] if paired else item

    size, names, name = size or int(side), getattr(dataset, "classes", ()), type(dataset).__name__
    return Encoded(read, len(dataset), size, labels, tuple(names), name, workers=1)


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
        self._order = lru_cache(maxsize=2)(self._permutation)  # a batch may span two passes
        self._ahead: tuple[int, Future[Tensor]] | None = None
        self._pool = ThreadPoolExecutor(1) if isinstance(images, Encoded) else None

    def indices(self, step: int) -> Tensor:
        """Which images this rank sees at `step`."""
        share, count = self.rank.share(self.batch), self.images.count
        start, stop = (step * self.batch + place for place in (share.start, share.stop))
        passes = range(start // count, (stop - 1) // count + 1)
        places = [slice(max(start - k * count, 0), stop - k * count) for k in passes]
        return torch.cat([self._order(k)[part] for k, part in zip(passes, places, strict=True)])

    def _permutation(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(mix(self.seed, 1, epoch))
        order = torch.randperm(self.images.count, generator=generator)
        return order.to(self.device) if isinstance(self.images, Decoded) else order

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
        """The batch of `step`: `x0` float32 [b, 3, S, S] in [-1, 1] and labels.

        `generator` flips half of it left to right.
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
