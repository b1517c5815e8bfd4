"""Samples of a denoiser for an evaluation: the same images as those of `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sdeflow._utils.distributed import Rank
from sdeflow.denoisers import Denoiser
from sdeflow.denoisers.fingerprint import model_sha256
from sdeflow.evaluation.measure import Batch, ImageSource
from sdeflow.evaluation.metrics import ENOUGH
from sdeflow.generate.api import dtype_of, sentence
from sdeflow.images.labels import Labels
from sdeflow.images.render import to_uint8
from sdeflow.sampling.api import solve
from sdeflow.sampling.batch_size import window
from sdeflow.sampling.inputs import device_of
from sdeflow.sampling.request import GraphMode, Request
from sdeflow.solvers.base import Solver


@dataclass(frozen=True)
class Sampling:
    """How a denoiser that is evaluated is sampled: `n` of them, image i with seed
    `seed + i`.

    `solver`, `nfe`, `grid`, `noise` and `compile` are those of `sample`; `classes` those of
    `generate`, taken in turn. Image i is the same whatever `batch_size` and the number of
    processes, as with `generate`. `model` is its name, which the result tells.
    """

    n: int = ENOUGH
    solver: str | Solver | None = None
    nfe: int | None = None
    grid: str | None = None
    noise: Literal["seeded", "brownian"] = "seeded"
    classes: Sequence[int | str] | Literal["all", "none"] = "all"
    seed: int = 0
    batch_size: int = 256
    compile: GraphMode = False
    model: str = ""

    def __post_init__(self) -> None:
        for name, least in (("n", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"Sampling: {name} is a whole number, at least {least}; got"
                    f" {getattr(self, name)}"
                )


def samples_of(denoiser: Denoiser, sampling: Sampling, rank: Rank) -> ImageSource:
    """Samples of a denoiser on its device, made as they are needed: this process's share of them.
    Nothing is written.
    """
    labels = Labels.of(denoiser, sampling.classes)
    names = tuple(getattr(denoiser, "class_names", ()))
    asked: dict[str, Any] = {
        "solver": sampling.solver,
        "nfe": sampling.nfe,
        "grid": sampling.grid,
        "noise": sampling.noise,
    }
    how: dict[str, Any] = {
        "model": sampling.model, "n": sampling.n, "seed": sampling.seed,
        "classes": list(labels.recorded), "class_names": list(names),
        "model_sha256": model_sha256(denoiser), **sentence(Request(score_fn=denoiser, **asked)),
        "batch_size": sampling.batch_size, "dtype": dtype_of(denoiser),
        "network_compiled": _compiled(denoiser), "compiled": "no",
    }  # fmt: skip

    def batches() -> Iterator[Batch]:
        share = rank.share(sampling.n)
        for first in range(share.start, share.stop, sampling.batch_size):
            stop = min(first + sampling.batch_size, share.stop)
            # A last, smaller batch would be compiled anew: it is filled with images before it,
            # which are dropped.
            start = (
                window(slice(first, stop), sampling.batch_size).start if sampling.compile else first
            )
            label = labels.given(range(start, stop))
            mine = denoiser.rows(torch.arange(start, stop))
            solution = solve(
                mine, **asked, n=stop - start, seeds=sampling.seed + start,
                compile=sampling.compile,
                condition=None if label is None else {"label": label}, device=device_of(denoiser),
            )  # fmt: skip
            how["compiled"] = str(solution.statistics.get("compiled", "no"))
            yield to_uint8(solution.x[first - start :]), labels.numbers(range(first, stop))

    return ImageSource(sampling.model or "a denoiser", batches(), sampling.n, names, how)


def _compiled(denoiser: Denoiser) -> bool:
    """Whether torch.compile has the network."""
    return any(
        hasattr(network, "_orig_mod") or network._compiled_call_impl is not None
        for network in denoiser.networks
    )
