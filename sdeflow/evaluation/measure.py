"""What is known of a set of images through an extractor: measured once, stored with where it
comes from, checked when read.

Samples and references are measured alike, by one pass that any number of extractors and processes
share.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sdeflow._utils import distributed
from sdeflow._utils.distributed import Rank
from sdeflow._utils.run_control import machine
from sdeflow._version import __version__
from sdeflow.errors import CheckpointError, SdeflowError
from sdeflow.evaluation.features.base import Extractor
from sdeflow.evaluation.metrics.statistics import Statistics
from sdeflow.images.datasets import Images, load_images
from sdeflow.models.checkpoint import read_tensors, write_tensors

FORMAT = "sdeflow-statistics-1"

Batch = tuple[Tensor, Tensor | None]
"""Images uint8 `[B, C, H, W]`, and labels int64 `[B]` (-1 for none) or None."""


@dataclass
class ImageSource:
    """A set of images to be read once: this process's share of it, in batches, and what the set
    is called.

    `total` is how many there are over all processes, where that is known; `how` says how they were
    made, where that is.
    """

    name: str
    batches: Iterable[Batch]
    total: int | None = None
    class_names: tuple[str, ...] = ()
    how: dict[str, Any] = field(default_factory=dict)


def open_images(
    source: Any,
    *,
    split: str = "train",
    n: int | None = None,
    batch_size: int = 256,
    rank: Rank | None = None,
) -> ImageSource:
    """The images that `source` means; the first `n` of them, if given.

    `source` is a folder that `sdeflow generate` wrote; an npz file or a folder of them; anything
    that `load_images` takes (a parquet file, a folder of images, a data set's name with its
    `split`, a torch data set); a uint8 tensor `[N, C, H, W]`; or an iterable of such batches, or of
    pairs with labels. Of an iterable each process reads its own: it brings its share. Errors:
    `ValueError` where nothing is there, and those of the readers.
    """
    rank = rank or Rank()
    if n is not None and n < 2:
        raise ValueError(f"n is how many images are measured, 2 at least; got {n}")
    if isinstance(source, ImageSource):
        return source
    if isinstance(source, str | Path):
        path = Path(source)
        if path.is_file() and path.suffix not in (".parquet", ".npz"):
            raise ValueError(
                f"{path} holds no images: they are read from a folder, an npz file or a parquet"
                " file"
            )
    total = n
    if isinstance(source, Tensor):
        if rank.world == 1:
            total = min(len(source), len(source) if n is None else n)
        source = [source]
    if _is_batches(source):
        return ImageSource("an iterable", _cut(source, n, rank), total)
    images = load_images(source, split=split, memory_gb=0.0, progress=False)
    total = images.count if n is None else min(n, images.count)
    batches = images.batches(batch_size, n, rank)
    return ImageSource(images.name, batches, total, images.class_names, images.how)


def _is_batches(source: Any) -> bool:
    """Whether `source` gives batches; a torch data set gives images one by one."""
    if isinstance(source, str | Path | Images) or not hasattr(source, "__iter__"):
        return False
    if not hasattr(source, "__getitem__"):
        return True
    first = source[0] if len(source) else None
    first = first[0] if isinstance(first, tuple | list) and first else first
    return isinstance(first, Tensor | np.ndarray) and first.ndim == 4


def _cut(batches: Iterable[Any], n: int | None, rank: Rank) -> Iterator[Batch]:
    """The batches of an iterable, checked, until this process's share of `n` is reached."""
    left = None if n is None else len(rank.share(n))
    for item in batches:
        pixels, labels = item if isinstance(item, tuple | list) else (item, None)
        pixels = torch.as_tensor(pixels)
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
            raise TypeError(
                f"a batch of images is uint8 [B, C, H, W] with C = 1 or 3; got {pixels.dtype}"
                f" {tuple(pixels.shape)} (sdeflow.images.render.to_uint8 turns images in [-1, 1]"
                " into it)"
            )
        labels = None if labels is None else torch.as_tensor(labels)
        if labels is not None and labels.shape != pixels.shape[:1]:
            raise ValueError(f"{len(pixels)} images need as many labels; got {tuple(labels.shape)}")
        if left is not None:
            pixels, labels = pixels[:left], None if labels is None else labels[:left]
            left -= len(pixels)
        if len(pixels):
            yield pixels, labels
        if left == 0:
            return


# --------------------------------------------------------------------------------- what is measured


@dataclass
class FeatureStatistics:
    """A set of images as one extractor sees it: `statistics`, `features` `[N, dim]` if they were
    kept, and `facts`.

    The facts are JSON-ready: `source`, its `images_sha256` (the sum modulo 2^256 of the SHA-256
    of each image's bytes: the same for the same images in any order), `n`, `shape`, `extractor`
    (name, SHA-256 of its weights, resize, ...), `accuracy` of the extractor's classifier and
    `labelled` (over how many images) where labels are known, `how` the images were made,
    version, machine and date.
    """

    statistics: Statistics
    facts: dict[str, Any]
    features: Tensor | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as safetensors, whole or not at all. Errors: `CheckpointError` if it cannot be
        written.
        """
        tensors = {"mean": self.statistics.mean, "scatter": self.statistics.scatter}
        if self.features is not None:
            tensors["features"] = self.features
        write_tensors(path, tensors, {"format": FORMAT, **self.facts})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FeatureStatistics:
        """What `save` wrote. Errors: `CheckpointError` if the file is missing, damaged, or
        something else.
        """
        if not Path(path).is_file():
            raise CheckpointError(
                f"there are no statistics at {path}; sdeflow evaluate --statistics FOLDER computes"
                " and keeps them"
            )
        tensors, facts = read_tensors(path)
        if "pictures_sha256" in facts:  # up to 0.5
            facts["images_sha256"] = facts.pop("pictures_sha256")
        if facts.pop("format", None) != FORMAT or not {"mean", "scatter"} <= set(tensors):
            raise CheckpointError(
                f"{path} holds no statistics of images ({FORMAT}), but something else that"
                " sdeflow wrote"
            )
        statistics = Statistics(len(tensors["mean"]))
        statistics.mean, statistics.scatter, statistics.n = (
            tensors["mean"],
            tensors["scatter"],
            int(facts["n"]),
        )
        return cls(statistics, facts, tensors.get("features"))

    def check(self, extractor: Extractor | dict[str, Any], where: object) -> None:
        """Raise `CheckpointError` unless this was measured by `extractor`, with the same weights
        and resizing.
        """
        wanted = extractor.describe() if isinstance(extractor, Extractor) else extractor
        mine = self.facts["extractor"]
        for key in ("name", "sha256", "dim", "resize", "input_range"):
            if mine.get(key) != wanted[key]:
                raise CheckpointError(
                    f"the statistics {where} were measured with another extractor ({key}"
                    f" {mine.get(key)!r}, not {wanted[key]!r}): their distance would mean nothing."
                    " Compute them again, from the images"
                )


class _FeatureAccumulator:
    """What one extractor sees of a set, batch by batch: statistics, features if they are kept,
    right answers.
    """

    def __init__(self, extractor: Extractor, keep: bool) -> None:
        self.extractor, self.keep = extractor, keep
        self.place = extractor.device if extractor.device.type == "cuda" else torch.device("cpu")
        self.statistics = Statistics(extractor.dim, self.place)
        self.features = [torch.zeros(0, extractor.dim, device=self.place)]
        self.right = torch.zeros(1, dtype=torch.int64, device=self.place)
        self.foreign = False

    def add(self, pixels: Tensor, labels: Tensor | None) -> None:
        found = self.extractor(pixels)
        self.statistics.update(found)
        if self.keep:
            self.features.append(found.to(self.place))
        if labels is None or not self.extractor.num_classes:
            return
        if int(labels.max()) >= self.extractor.num_classes:  # other classes than the network's
            self.foreign = True
        self.right += (
            self.extractor.logits(found).argmax(1).to(self.place) == labels.to(self.place)
        ).sum()

    def result(self, facts: dict[str, Any], labelled: int) -> FeatureStatistics:
        """What all processes have seen; each of them calls it."""
        self.statistics.all_reduce()
        if self.statistics.n < 2:
            raise ValueError(
                f"{facts['source']} holds {self.statistics.n} images; two at least have statistics"
            )
        facts = {"n": self.statistics.n, "extractor": self.extractor.describe(), **facts}
        right = int(distributed.all_gather(self.right).sum())
        if (
            not distributed.anyone(self.foreign, self.place)
            and labelled
            and self.extractor.num_classes
        ):
            facts |= {"accuracy": right / labelled, "labelled": labelled}
            facts["class_names"] = list(self.extractor.class_names)
        return FeatureStatistics(
            self.statistics,
            facts,
            distributed.all_gather(torch.cat(self.features)) if self.keep else None,
        )


def measure(
    images: ImageSource,
    extractors: Sequence[Extractor],
    *,
    features: Sequence[str] = (),
    rank: Rank | None = None,
    progress: bool = False,
) -> list[FeatureStatistics]:
    """One pass over `images`, through each of `extractors`; under torchrun the same result on
    every process.

    `features` names the scores of the extractors whose features are kept (precision and recall need
    them). An image of one channel counts as grey. Errors: `ValueError` for fewer than two images
    or images of several sizes, those of the reader.
    """
    rank = rank or Rank()
    accumulators = [_FeatureAccumulator(e, e.score in features) for e in extractors]
    digest, labelled, shape = 0, 0, None
    hidden = not (progress and rank.first)
    with tqdm(
        total=images.total,
        desc=f"measuring {images.name}",
        unit="img",
        disable=hidden,
        leave=False,
    ) as bar:
        for pixels, labels in images.batches:
            shape = shape or tuple(pixels.shape[1:])
            if tuple(pixels.shape[1:]) != shape:
                raise ValueError(
                    f"the images of {images.name} differ in shape: {shape} and"
                    f" {tuple(pixels.shape[1:])}"
                )
            digest += _digest(pixels)
            labelled += 0 if labels is None else int((labels >= 0).sum())
            for accumulator in accumulators:
                accumulator.add(pixels, labels)
            bar.update(min(len(pixels) * rank.world, (bar.total or 1 << 62) - bar.n))
    digest, labelled = (
        _summed(number % (1 << 256), accumulators[0].place) for number in (digest, labelled)
    )
    shape = _one_shape(shape, images.name, accumulators[0].place)
    facts = {
        "source": images.name, "images_sha256": f"{digest:064x}", "shape": list(shape),
        "how": images.how,
        "source_classes": list(images.class_names),
        "version": __version__, "torch": str(torch.__version__),
        "machine": machine(extractors[0].device, rank.world),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    return [accumulator.result(facts, labelled) for accumulator in accumulators]


def _digest(pixels: Tensor) -> int:
    """The sum of the SHA-256 of each image: its shape [H, W, C], then its bytes."""
    total = 0
    for image in pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy():
        total += int.from_bytes(
            hashlib.sha256(str(image.shape).encode() + image.tobytes()).digest(), "big"
        )
    return total


def _one_shape(shape: tuple[int, ...] | None, name: str, device: torch.device) -> tuple[int, ...]:
    """The shape of the images of all processes, some of which may have seen none."""
    table = distributed.all_gather(torch.tensor([shape or (0, 0, 0)], device=device)).tolist()
    seen = sorted({tuple(row) for row in table if any(row)})
    if len(seen) > 1:
        raise ValueError(f"the images of {name} differ in shape: {seen[0]} and {seen[1]}")
    return seen[0] if seen else ()


def _summed(number: int, device: torch.device) -> int:
    """The sum over all processes of a whole number of 256 bits, modulo 2^256."""
    words = [(number >> (32 * i)) & 0xFFFFFFFF for i in range(8)]
    table = distributed.all_gather(torch.tensor([words], device=device)).sum(0).tolist()
    return sum(word << (32 * i) for i, word in enumerate(table)) % (1 << 256)


def reference(
    source: Any,
    extractors: Sequence[Extractor],
    *,
    statistics: str | os.PathLike[str] | None = None,
    features: Sequence[str] = (),
    split: str = "train",
    n: int | None = None,
    batch_size: int = 256,
    rank: Rank | None = None,
    progress: bool = False,
) -> list[FeatureStatistics]:
    """The reference that `source` means, one for each extractor: read from a file if it was
    measured before, else measured.

    `source` is what `open_images` takes, a `FeatureStatistics`, or a file that
    `FeatureStatistics.save` wrote. `statistics` is a folder with a file for each extractor: those
    that are there are read and checked, the others are measured and kept there, with their features
    if asked for; `source` is then a path or a name, or None where they must be there. Errors:
    `CheckpointError` for a damaged file, one of another extractor or source, or one without the
    features asked for.
    """
    rank = rank or Rank()
    if isinstance(source, FeatureStatistics) or (
        isinstance(source, str | Path) and Path(source).suffix == ".safetensors"
    ):
        found = source if isinstance(source, FeatureStatistics) else FeatureStatistics.load(source)
        where = "given" if isinstance(source, FeatureStatistics) else source
        if len(extractors) > 1:
            raise ValueError(
                f"one file of statistics serves one extractor, but {len(extractors)} are asked for;"
                " name the images"
            )
        for extractor in extractors:
            found.check(extractor, where)
            _check_features(found, extractor, features, where)
        return [found] * len(extractors)
    if statistics is not None and source is not None and not isinstance(source, str | Path):
        raise ValueError(
            "a folder of statistics serves images with a path or a name, by which they are known"
            " again"
        )
    files = [
        None if statistics is None else Path(statistics) / f"{e.name}.safetensors"
        for e in extractors
    ]
    results: list[FeatureStatistics | None] = [None] * len(extractors)
    for i, (extractor, file) in enumerate(zip(extractors, files, strict=True)):
        if file is not None and (file.exists() or source is None):
            found = FeatureStatistics.load(file)
            found.check(extractor, file)
            _check_source(found, source, split, n, file)
            if found.features is not None or extractor.score not in features or source is None:
                _check_features(found, extractor, features, file)
                results[i] = found
    missing = [i for i, found in enumerate(results) if found is None]
    distributed.barrier()  # nobody looks for a file that another process is about to write
    if missing:
        if source is None:
            raise ValueError(
                "a reference is needed: a data set, a folder of images, or stored statistics"
            )
        images = open_images(source, split=split, n=n, batch_size=batch_size, rank=rank)
        measured = measure(
            images,
            [extractors[i] for i in missing],
            features=features,
            rank=rank,
            progress=progress,
        )
        for i, found in zip(missing, measured, strict=True):
            found.facts |= {"split": split, "asked": n}
            results[i], file = found, files[i]
            if rank.first and file is not None:
                found.save(file)
    return [found for found in results if found is not None]


def _check_features(
    found: FeatureStatistics, extractor: Extractor, features: Sequence[str], where: object
) -> None:
    if extractor.score in features and found.features is None:
        raise CheckpointError(
            f"the statistics {where} hold no features, which precision and recall need; measure the"
            " images again with those metrics, or leave them out"
        )


def _check_source(
    found: FeatureStatistics, source: Any, split: str, n: int | None, file: Path
) -> None:
    """Stored statistics stand for a source by its name, split and number; the images are not read
    again.
    """
    if source is None:
        return
    mine, asked = {k: found.facts.get(k) for k in ("split", "asked")}, {"split": split, "asked": n}
    name = str(found.facts["source"])
    if Path(name.removesuffix(f" [{split}]")).resolve() != Path(source).resolve() or mine != asked:
        raise SdeflowError(
            f"{file} holds the statistics of {name} (split {mine['split']!r}, n"
            f" {mine['asked'] or 'all'}), not of {source} (split {split!r}, n {n or 'all'}); name"
            " another folder with --statistics, or remove the file"
        )
