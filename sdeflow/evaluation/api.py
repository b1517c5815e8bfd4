"""How good images are, against a reference; the result says how it was made.

    samples --- one pass ---> statistics, features ---+
                                                      +--- metrics ---> Evaluation (JSON)
    reference - measured once, then read from a file -+

Under torchrun the processes share the images, and all of them return the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sdeflow._utils import distributed
from sdeflow._utils.distributed import Rank
from sdeflow._utils.run_control import machine
from sdeflow.denoisers import Denoiser
from sdeflow.errors import unknown
from sdeflow.evaluation.features import EXTRACTORS, Extractor, extractor, imagenet_file
from sdeflow.evaluation.measure import (
    FeatureStatistics,
    measure,
    open_images,
    reference,
)
from sdeflow.evaluation.metrics import ENOUGH, METRICS, Context, Metric
from sdeflow.evaluation.result import Evaluation, PathLike, disagreement
from sdeflow.evaluation.sampled import Sampling, samples_of
from sdeflow.sampling.inputs import named_device


@dataclass(frozen=True)
class Weights:
    """The files of the extractors' weights; None takes the usual one of each."""

    fid: PathLike | None = None
    fd_cifar: PathLike | None = None
    fd_in: PathLike | None = None


def default_metrics(source: Any = None) -> tuple[str, ...]:
    """What is measured where nothing is asked for: both judges, precision and recall.

    `fd_in` is left out where the extra `judges` is not installed. Stored statistics as a reference
    serve the one extractor that measured them.
    """
    stored = _stored(source)
    if stored is not None:
        return (stored.facts["extractor"]["score"], "precision", "recall")
    judges = ("fd_cifar",) if imagenet_file() is None else ("fd_cifar", "fd_in")
    return (*judges, "precision", "recall")


def evaluate(
    samples: Any,
    reference: Any = None,
    metrics: Sequence[str] | None = None,
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
    imagenet_weights: PathLike | None = None,
    batch_size: int = 256,
    device: str | torch.device = "auto",
    progress: bool = False,
) -> Evaluation:
    """Score `samples` against `reference`.

        evaluate("images", "train.parquet", ("fd_cifar", "fd_in"), floor="test.parquet")

    - `samples`: a folder that `generate` wrote, or other images that `open_images` takes, or a
      `Denoiser`, which is sampled as `sampling` says. The first `n` of them.
    - `reference`: images (of those the first `reference_n`, of `split`), stored statistics, or a
      `FeatureStatistics`. `statistics` is a folder in which those of images are kept, so that they
      are computed once.
    - `metrics`: names from `sdeflow.evaluation.metrics.METRICS`; None takes `default_metrics()`.
      `k` is the number of nearest neighbours of precision and recall.
    - `floor`: other real images, as many of them as there are samples. Their distances stand beside
      those of the samples, and the differences are the `excess`.
    - `split`, `floor_split`: of a reference and a floor that have splits.
    - `weights`, `cifar_weights`, `imagenet_weights`: files in place of the usual weights of `fid`,
      `fd_cifar` and `fd_in`.
    - `device`: "auto" is a GPU where there is one. Under torchrun each process measures its share;
      an iterable of batches is the process's own share.

    Errors: `UnknownNameError` for a metric, `ValueError` for arguments that do not fit,
    `MissingExtraError` for an extractor that is not installed, `CheckpointError` for missing or
    damaged weights and statistics, or those of another extractor, `SdeflowError` for images that
    cannot be read.
    """
    names = check_metrics(default_metrics(reference) if metrics is None else metrics)
    chosen = bound(names)
    files = Weights(weights, cifar_weights, imagenet_weights)
    rank = distributed.this_rank()
    place = rank.device(named_device(device))
    context = Context(k, rank)
    with distributed.joined(rank, place):
        extractors = open_extractors(chosen, files, place, rank)
        kept = [m.score for m in chosen if m.needs_features and m.score is not None]
        if isinstance(samples, Denoiser):
            if sampling is not None and n not in (None, sampling.n):
                raise ValueError(f"n={n}, and sampling says n={sampling.n}: say it once")
            images = samples_of(samples, sampling or Sampling(n=n or ENOUGH), rank)
        elif sampling is not None:
            raise ValueError("sampling is for a Denoiser; these samples are there already")
        else:
            images = open_images(samples, n=n, batch_size=batch_size, rank=rank)
        how: dict[str, Any] = {"batch_size": batch_size, "rank": rank, "progress": progress}
        real = _reference(
            reference, extractors, features=kept, statistics=statistics, split=split,
            n=reference_n, **how,
        )  # fmt: skip
        under = None
        if floor is not None:
            under = _reference(floor, extractors, split=floor_split, n=images.total, **how)
        for metric in chosen:
            metric.check(real[0].statistics.n, images.total, context)
        found = measure(images, extractors, features=kept, rank=rank, progress=progress)
        result = _result(chosen, extractors, real, found, context, machine(place, rank.world))
    _add_floor(result, chosen, extractors, real, under)
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
        "precision_recall_features": next((m.score for m in chosen if m.name in MANIFOLD), None),
    }
    return result


MANIFOLD = ("precision", "recall")


def compare(
    a: Any,
    b: Any,
    score: str = "fd_cifar",
    *,
    weights: PathLike | None = None,
    cifar_weights: PathLike | None = None,
    imagenet_weights: PathLike | None = None,
    split: str = "train",
    device: str | torch.device = "auto",
    progress: bool = False,
) -> Evaluation:
    """The Frechet distance of two sets: stored statistics, `FeatureStatistics`, or images (which
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
        files = Weights(weights, cifar_weights, imagenet_weights)
        with distributed.joined(rank, place):
            extractors = open_extractors(bound(check_metrics([score])), files, place, rank)
            first, second = (
                _reference(
                    s, extractors, split=split, batch_size=256, rank=rank, progress=progress
                )[0]
                for s in (a, b)
            )
    metric = METRICS[score]
    return _result(
        [metric], [score], [second], [first], Context(rank=rank), machine(place, rank.world)
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


def bound(names: Sequence[str]) -> list[Metric]:
    """The metrics of these names, each with an extractor: those that take any are given that of the
    first distance asked for, and else that of `fd_cifar`.
    """
    first = next((name for name in names if name in EXTRACTORS), "fd_cifar")
    return [m if m.score else replace(m, score=first) for m in (METRICS[name] for name in names)]


def open_extractors(
    metrics: Sequence[Metric], files: Weights, device: torch.device, rank: Rank
) -> list[Extractor]:
    """The extractors that metrics need, in the order of the metrics; one process of a machine
    fetches what is not there.
    """
    scores = list(dict.fromkeys(m.score for m in metrics if m.score is not None))
    for option, score in (
        ("weights", "fid"),
        ("cifar_weights", "fd_cifar"),
        ("imagenet_weights", "fd_in"),
    ):
        if getattr(files, score) is not None and score not in scores:
            raise ValueError(
                f"{option} is for {score}, which the metrics"
                f" {', '.join(m.name for m in metrics)} do not need"
            )
    opened = [extractor(s, getattr(files, s), device) for s in scores] if rank.local == 0 else []
    distributed.barrier()
    return opened or [extractor(s, getattr(files, s), device) for s in scores]


def _stored(source: Any) -> FeatureStatistics | None:
    if isinstance(source, FeatureStatistics):
        return source
    if isinstance(source, str | Path) and Path(source).suffix == ".safetensors":
        return FeatureStatistics.load(source)
    return None


_reference = reference  # `evaluate` has an argument of this name


def _result(
    metrics: Sequence[Metric],
    extractors: Sequence[Extractor] | Sequence[str],
    real: Sequence[FeatureStatistics],
    found: Sequence[FeatureStatistics],
    context: Context,
    where: str,
) -> Evaluation:
    """The values of the metrics with all that was measured on the way."""
    scores = _scores(extractors)
    result = Evaluation(
        metrics={},
        n=found[0].statistics.n,
        reference_n=real[0].statistics.n,
        samples={
            s: {k: v for k, v in f.facts.items() if k != "how"}
            for s, f in zip(scores, found, strict=True)
        },
        reference={score: r.facts for score, r in zip(scores, real, strict=True)},
        how=found[0].facts["how"],
        machine=where,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    texts: list[str] = []
    for metric in metrics:
        i = scores.index(metric.score or "")
        value = metric.value(real[i], found[i], context)
        result.metrics[metric.name] = value.value
        if value.error is not None:
            result.errors[metric.name] = value.error
        if (bias := metric.bias(real[i], found[i])) is not None:
            result.bias[metric.name] = bias
        texts += metric.warnings(real[i], found[i])
    result.warnings = [*dict.fromkeys(texts), *_warnings(real[0], found[0])]
    return result


def _scores(extractors: Sequence[Extractor] | Sequence[str]) -> list[str]:
    return [e if isinstance(e, str) else e.score for e in extractors]


def _add_floor(
    result: Evaluation,
    metrics: Sequence[Metric],
    extractors: Sequence[Extractor],
    real: Sequence[FeatureStatistics],
    under: Sequence[FeatureStatistics] | None,
) -> None:
    """What other real images score, the excess of the samples over them, and where judges
    disagree. Metrics that need features or other classes are left out.
    """
    if under is None:
        return
    scores, values = _scores(extractors), {}
    for metric in metrics:
        i = scores.index(metric.score or "")
        if metric.needs_features or (metric.needs_labels and "accuracy" not in under[i].facts):
            continue
        values[metric.name] = metric.value(real[i], under[i], Context()).value
    facts = under[0].facts
    kept = {key: facts[key] for key in ("source", "n", "images_sha256")}
    result.floor = {"metrics": values, **kept}
    distances = {name: value for name, value in values.items() if name in result.bias}
    if facts["n"] != result.n:
        if distances:
            result.warnings.append(
                f"the floor has {facts['n']} images and there are {result.n} samples, so no excess"
                " is given: take as many samples as there are real images"
            )
        return
    result.excess = {name: result.metrics[name] - value for name, value in distances.items()}
    if (text := disagreement(result.excess, distances)) is not None:
        result.warnings.append(text)


def _warnings(real: FeatureStatistics, found: FeatureStatistics) -> list[str]:
    """Why numbers should not be compared, whatever the metric."""
    texts = []
    shapes = found.facts["shape"], real.facts["shape"]
    if all(shapes) and shapes[0] != shapes[1]:  # a process without images knows of no shape
        texts.append(
            f"samples have shape {shapes[0]}, the reference {shapes[1]}: resizing alone makes a"
            " distance"
        )
    if found.facts["images_sha256"] == real.facts["images_sha256"]:
        texts.append("the samples are the very images of the reference")
    return texts
