"""How good pictures are, against a reference: Frechet distances, precision and recall, in a result
that says how it was made.

    samples --- one pass ---> statistics, features ---+
                                                      +--- scores ---> Evaluation (JSON)
    reference - measured once, then read from a file -+

Under torchrun the processes share the pictures, and all of them return the same result.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sdeflow._utils import distributed
from sdeflow._utils.distributed import Rank
from sdeflow._utils.files import write_atomically
from sdeflow._utils.run_control import machine
from sdeflow._version import __version__
from sdeflow.denoisers import Denoiser
from sdeflow.errors import SdeflowError, unknown
from sdeflow.evaluation.features.base import EXTRACTORS, Extractor, extractor
from sdeflow.evaluation.measure import (
    FeatureStatistics,
    ImageSource,
    measure,
    open_images,
    reference,
)
from sdeflow.evaluation.metrics.base import (
    ENOUGH,
    expected_bias,
    frechet_distance,
    precision_recall,
)
from sdeflow.evaluation.sampled import Sampling, drawn
from sdeflow.sampling.inputs import named_device

FORMAT = "sdeflow-evaluation-1"
METRICS = ("fid", "fd_cifar", "precision", "recall", "accuracy")
DEFAULT = ("fd_cifar", "precision", "recall")
PathLike = str | os.PathLike[str]


@dataclass
class Evaluation:
    """The scores of a set of pictures, and all that they depend on.

    - `metrics`: name to value; distances are better the smaller, the others the larger.
    - `n`, `reference_n`: how many pictures each distance is over.
    - `floor`: the same distances between the reference and other real pictures; no model is
      expected below it.
    - `samples`, `reference`: of each extractor's score, what was measured
      (`FeatureStatistics.facts`).
    - `how`: how the samples were made (seed, NFE, solver, classes, dtype, whether compiled), where
      that is known.
    - `bias`: about what a distance of 0 scores at these numbers, where features are Gaussian
      (`expected_bias`).
    - `warnings`: why a number should not be compared, or not with any other.
    """

    metrics: dict[str, float]
    n: int
    reference_n: int
    samples: dict[str, Any]
    reference: dict[str, Any]
    how: dict[str, Any] = field(default_factory=dict)
    floor: dict[str, Any] | None = None
    bias: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    version: str = __version__
    torch: str = str(torch.__version__)
    machine: str = ""
    date: str = ""

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON; `seed`, `nfe`, `solver` and `classes` also on top, null where
        they are unknown.
        """
        known = {key: self.how.get(key) for key in ("seed", "nfe", "solver", "classes")}
        return {"format": FORMAT, **asdict(self), **known}

    def save(self, path: PathLike) -> Path:
        """Write it as JSON, whole or not at all. Errors: `SdeflowError` if it cannot be written."""
        return write_atomically(
            path, (json.dumps(self.to_dict(), indent=1) + "\n").encode(), "result"
        )

    @classmethod
    def load(cls, path: PathLike) -> Evaluation:
        """What `save` wrote. Errors: `SdeflowError` if the file is missing or is no such result."""
        try:
            values = json.loads(Path(path).read_text())
            if values.pop("format") != FORMAT:
                raise ValueError("another format")
            return cls(**{key: values[key] for key in cls.__dataclass_fields__})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SdeflowError(f"{path} is not a result of sdeflow evaluate ({error})") from error

    def __str__(self) -> str:
        lines = []
        for name, value in self.metrics.items():
            under = self.floor["metrics"].get(name) if self.floor else None
            notes = (
                [f"floor {under:.4g}, of {self.floor['n']} real pictures"]
                if under is not None and self.floor
                else []
            )
            notes += (
                [f"about {self.bias[name]:.2g} of it is the bias of finite numbers"]
                if name in self.bias
                else []
            )
            lines.append(
                f"{name.upper().replace('_', '-') if name in EXTRACTORS else name:<10} {value:.4f}"
                + (f"  ({'; '.join(notes)})" if notes else "")
            )
        first = next(iter(self.reference.values()))
        lines.append(f"{'n':<10} {self.n} against {self.reference_n} of {first['source']}")
        if self.how.get("compiled", "no") != "no":
            lines.append(f"{'compiled':<10} {self.how['compiled']}")
        return "\n".join(lines + [f"warning: {text}" for text in self.warnings])


def evaluate(
    samples: Any,
    reference: Any = None,
    metrics: Sequence[str] = DEFAULT,
    *,
    sampling: Sampling | None = None,
    floor: Any = None,
    statistics: PathLike | None = None,
    split: str = "train",
    floor_split: str = "test",
    n: int | None = None,
    reference_n: int | None = None,
    k: int = 3,
    weights: PathLike | None = None,
    cifar_weights: PathLike | None = None,
    batch_size: int = 256,
    device: str | torch.device = "auto",
    progress: bool = False,
) -> Evaluation:
    """Score `samples` against `reference`.

        evaluate("pictures", "train.parquet", ("fd_cifar", "precision", "recall"), floor="test.parquet")

    - `samples`: a folder that `generate` wrote, or other pictures that `open_images` takes, or a
      `Denoiser`, drawn from as `sampling` says. The first `n` of them.
    - `reference`: pictures (of those the first `reference_n`, of `split`), stored statistics, or a
      `FeatureStatistics`. `statistics` is a folder in which those of pictures are kept, so that
      they are computed once.
    - `metrics`: `fid` (Inception, extra `fid`), `fd_cifar` (the bundled network), `precision`,
      `recall` (in the features of the first of those two that is asked for, `k` nearest neighbours)
      and `accuracy` (how often the network of `fd_cifar` agrees with a sample's label).
    - `floor`: other real pictures, whose distances to the reference stand beside those of the
      samples.
    - `split`, `floor_split`: of a reference and a floor that have splits.
    - `weights`: the file of Inception's; `cifar_weights`: another feature network in place of the
      bundled one.
    - `device`: "auto" is a GPU where there is one. Under torchrun each process measures its share;
      an iterable of batches is the process's own share.

    Errors: `UnknownNameError` for a metric, `ValueError` for arguments that do not fit,
    `CheckpointError` for missing or damaged weights and statistics, or those of another extractor,
    `SdeflowError` for pictures that cannot be read.
    """
    names = check_metrics(metrics)
    rank = distributed.this_rank()
    place = rank.device(named_device(device))
    with distributed.joined(rank, place):
        extractors = open_extractors(names, weights, cifar_weights, place, rank)
        scores = [e.score for e in extractors]
        kept = [_manifold(names)] if {"precision", "recall"} & set(names) else []
        if isinstance(samples, Denoiser):
            if sampling is not None and n not in (None, sampling.n):
                raise ValueError(f"n={n}, and sampling says n={sampling.n}: say it once")
            pictures = drawn(samples, sampling or Sampling(n=n or ENOUGH), rank)
        elif sampling is not None:
            raise ValueError(
                "sampling says how to draw from a Denoiser; these samples are there already"
            )
        else:
            pictures = open_images(samples, n=n, batch_size=batch_size, rank=rank)
        real = _reference(
            reference, extractors, statistics, kept, split, reference_n, batch_size, rank, progress
        )
        under = None
        if floor is not None:
            under = _reference(
                floor, extractors, None, [], floor_split, None, batch_size, rank, progress
            )
        if kept:
            _check_neighbours(
                k, {"reference pictures": real[0].statistics.n, "samples": pictures.total}
            )
        found = measure(pictures, extractors, features=kept, rank=rank, progress=progress)
        values = _distances(names, scores, real, found)
        if "accuracy" in names:
            values["accuracy"] = _accuracy(found[scores.index("fd_cifar")])
        if kept:
            i = scores.index(kept[0])
            values |= _manifolds(real[i], found[i], k, rank)
    result = _result(names, scores, real, found, values, pictures, machine(place, rank.world))
    result.floor = _floor(names, scores, real, under)
    for what, wanted, there in (
        ("samples", n, result.n),
        ("reference", reference_n, result.reference_n),
    ):
        if wanted not in (None, there):
            result.warnings.append(
                f"{what}: the first {wanted} were asked for, and these are {there}"
            )
    result.settings = {
        "k": k,
        "split": split,
        "precision_recall_features": kept[0] if kept else None,
    }
    return result


def _check_neighbours(k: int, numbers: Mapping[str, int | None]) -> None:
    """Refuse numbers of pictures that are too small for precision and recall, where they are known
    beforehand.
    """
    for what, n in numbers.items():
        if n is not None and n <= k:
            raise ValueError(
                f"precision and recall look at the {k} nearest neighbours of each picture, and"
                f" there are only {n} {what}: take more, a smaller k, or the metrics without them"
            )


def _distances(
    names: Sequence[str],
    scores: list[str],
    real: list[FeatureStatistics],
    found: list[FeatureStatistics],
) -> dict[str, float]:
    return {
        score: frechet_distance(r.statistics, f.statistics)
        for score, r, f in zip(scores, real, found, strict=True)
        if score in names
    }


def _manifolds(
    real: FeatureStatistics, found: FeatureStatistics, k: int, rank: Rank
) -> dict[str, float]:
    a, b = real.features, found.features
    assert a is not None
    assert b is not None
    precision, recall = precision_recall(a.to(b.device), b, k=k, rank=rank)
    return {"precision": precision, "recall": recall}


def _result(
    names: Sequence[str],
    scores: list[str],
    real: list[FeatureStatistics],
    found: list[FeatureStatistics],
    values: Mapping[str, float],
    pictures: ImageSource,
    where: str,
) -> Evaluation:
    """The values with all that was measured on the way."""
    bias = {
        score: expected_bias(r.statistics, f.statistics.n, r.statistics.n)
        for score, r, f in zip(scores, real, found, strict=True)
        if score in names
    }
    return Evaluation(
        metrics={name: values[name] for name in names},
        n=found[0].statistics.n,
        reference_n=real[0].statistics.n,
        samples={
            s: {k: v for k, v in f.facts.items() if k != "how"}
            for s, f in zip(scores, found, strict=True)
        },
        reference={score: r.facts for score, r in zip(scores, real, strict=True)},
        how=pictures.how,
        bias=bias,
        warnings=_warnings(names, scores, real, found, pictures, bias),
        machine=where,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def compare(
    a: Any,
    b: Any,
    score: str = "fd_cifar",
    *,
    cifar_weights: PathLike | None = None,
    weights: PathLike | None = None,
    split: str = "train",
    device: str | torch.device = "auto",
    progress: bool = False,
) -> Evaluation:
    """The Frechet distance of two sets: stored statistics, `FeatureStatistics`, or pictures (which
    are measured for it).

    Two stored sets need no network; their extractors must be the same. The result has `a` for
    samples and `b` for reference. Errors: those of `evaluate`.
    """
    rank = distributed.this_rank()
    place = rank.device(named_device(device))
    first, second = _stored(a), _stored(b)
    if first is not None and second is not None:
        first.check(second.facts["extractor"], a if isinstance(a, str | Path) else "given first")
        score = first.facts["extractor"]["score"]
    else:
        with distributed.joined(rank, place):
            extractors = open_extractors(
                check_metrics([score]), weights, cifar_weights, place, rank
            )
            first, second = (
                _reference(s, extractors, None, [], split, None, 256, rank, progress)[0]
                for s in (a, b)
            )
    pictures = ImageSource(first.facts["source"], (), how=first.facts["how"])
    values = _distances([score], [score], [second], [first])
    return _result(
        [score], [score], [second], [first], values, pictures, machine(place, rank.world)
    )


def check_metrics(metrics: Sequence[str]) -> tuple[str, ...]:
    """The metrics asked for, each once. Errors: `UnknownNameError`, `ValueError` for none or for a
    bare string.
    """
    if isinstance(metrics, str):
        raise ValueError(f"metrics is a sequence of names, such as ({metrics!r},)")
    names = tuple(dict.fromkeys(metrics))
    if not names:
        raise ValueError(f"metrics names at least one of {', '.join(METRICS)}")
    for name in names:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
    return names


def open_extractors(
    names: Sequence[str],
    weights: PathLike | None,
    cifar_weights: PathLike | None,
    device: torch.device,
    rank: Rank,
) -> list[Extractor]:
    """The extractors that metrics need, in the order of the metrics; one process of a machine
    fetches what is not there.
    """
    scores = [name for name in names if name in EXTRACTORS]
    if (
        "accuracy" in names or not scores
    ):  # precision and recall alone take the features of fd_cifar
        scores += ["fd_cifar"]
    scores = list(dict.fromkeys(scores))
    files = {"fid": weights, "fd_cifar": cifar_weights}
    for option, score in (("weights", "fid"), ("cifar_weights", "fd_cifar")):
        if files[score] is not None and score not in scores:
            raise ValueError(
                f"{option} is for {score}, which the metrics {', '.join(names)} do not need"
            )
    opened = [extractor(s, files[s], device) for s in scores] if rank.local == 0 else []
    distributed.barrier()
    return opened or [extractor(s, files[s], device) for s in scores]


def _manifold(names: Sequence[str]) -> str:
    """Whose features precision and recall are taken in: those of the first distance that is asked
    for.
    """
    return next((name for name in names if name in EXTRACTORS), "fd_cifar")


def _stored(source: Any) -> FeatureStatistics | None:
    if isinstance(source, FeatureStatistics):
        return source
    return (
        FeatureStatistics.load(source)
        if isinstance(source, str | Path) and Path(source).suffix == ".safetensors"
        else None
    )


def _reference(
    source: Any,
    extractors: Sequence[Extractor],
    statistics: PathLike | None,
    features: Sequence[str],
    split: str,
    n: int | None,
    batch_size: int,
    rank: Rank,
    progress: bool,
) -> list[FeatureStatistics]:
    return reference(
        source,
        extractors,
        statistics=statistics,
        features=features,
        split=split,
        n=n,
        batch_size=batch_size,
        rank=rank,
        progress=progress,
    )


def _accuracy(found: FeatureStatistics) -> float:
    if "accuracy" not in found.facts:
        raise ValueError(
            "accuracy compares the network's classes with labels, and those of"
            f" {found.facts['source']} are unknown or of other classes; leave that metric out"
        )
    return float(found.facts["accuracy"])


def _floor(
    names: Sequence[str],
    scores: list[str],
    real: list[FeatureStatistics],
    under: list[FeatureStatistics] | None,
) -> dict[str, Any] | None:
    """What other real pictures score; of a classifier, its accuracy on them."""
    if under is None:
        return None
    values = {
        s: frechet_distance(r.statistics, u.statistics)
        for s, r, u in zip(scores, real, under, strict=True)
        if s in names
    }
    if "accuracy" in names and "accuracy" in under[scores.index("fd_cifar")].facts:
        values["accuracy"] = under[scores.index("fd_cifar")].facts["accuracy"]
    facts = under[0].facts
    return {"metrics": values, **{key: facts[key] for key in ("source", "n", "pictures_sha256")}}


def _warnings(
    names: Sequence[str],
    scores: list[str],
    real: list[FeatureStatistics],
    found: list[FeatureStatistics],
    pictures: ImageSource,
    bias: Mapping[str, float],
) -> list[str]:
    """Why numbers should not be compared."""
    told = []
    for score, r, f in zip(scores, real, found, strict=True):
        if score in names and (few := min(r.statistics.n, f.statistics.n)) < ENOUGH:
            told.append(
                f"{score} over {f.statistics.n} samples and {r.statistics.n} reference pictures is"
                f" biased upwards, by about {bias[score]:.2g} here; compare it only with results of"
                f" the same numbers ({ENOUGH} is usual)"
                + (
                    f", and {few} are not even more than the {r.statistics.dim} dimensions"
                    if few <= r.statistics.dim
                    else ""
                )
            )
    kinds = [name for name in names if name in ("precision", "recall")]
    numbers = found[0].statistics.n, real[0].statistics.n
    if kinds and min(numbers) < ENOUGH:
        told.append(
            f"{' and '.join(kinds)} depend on how many samples ({numbers[0]}) and reference"
            f" pictures ({numbers[1]}) there are; compare them only at the same numbers"
        )
    shapes = found[0].facts["shape"], real[0].facts["shape"]
    if (
        all(shapes) and shapes[0] != shapes[1]
    ):  # a process that has seen no picture knows of no shape
        told.append(
            f"samples have shape {shapes[0]}, the reference {shapes[1]}: resizing alone makes a"
            " distance"
        )
    if found[0].facts["pictures_sha256"] == real[0].facts["pictures_sha256"]:
        told.append("the samples are the very pictures of the reference")
    classes, known = pictures.class_names, found[-1].facts.get("class_names")
    if "accuracy" in names and classes and known and list(classes) != list(known):
        told.append(
            f"the samples' classes ({', '.join(classes)}) are not those of the network: accuracy"
            " may mean nothing"
        )
    return told
