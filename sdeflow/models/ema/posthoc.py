r"""Averages of a training's weights whose length is chosen after the training.

A training tracks two averages with power profiles (`PowerEMA`) and stores them as it goes. The
average of any other `std` is then the linear combination of the stored ones whose profile is
nearest to the one asked for, by least squares. The weights sum to 1, so that what does not change
in a training is reproduced exactly.

Source. Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models",
section 3.2 and appendix C.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from sdeflow._utils.checks import differing
from sdeflow.errors import CheckpointError
from sdeflow.models.checkpoint import (
    HEADER,
    Pretrained,
    about,
    finite,
    network_of,
    read_tensors,
    save_model,
    write_tensors,
)
from sdeflow.models.ema.power import WIDEST, Floats, PowerEMA, exponent, inner
from sdeflow.models.unet import UNet

FORMAT = "sdeflow-average-1"
NAME = re.compile(r"ema-[0-9.]+-([0-9]+)\.safetensors")
_WITHOUT = "move it out of the folder to do without it: the other averages may suffice"
SAME = ("config", "sigma_data", "nsr_range", "class_names", "training")
"""The facts that all averages of one training share."""

RIDGE = 1e-8
"""What a unit of squared weight costs in the fit: about the squared relative rounding of float16,
the coarsest storage.
"""

MAX_ERROR = 0.1
"""The relative error of a profile above which it is refused."""


@dataclass(frozen=True)
class Snapshot:
    """A stored average.

    It holds the file, its relative width, how many images the training had seen, and the facts in
    its header.
    """

    path: Path
    std: float
    images: int
    facts: Mapping[str, Any]


def model_facts(
    network: UNet,
    *,
    training: Mapping[str, Any],
    sigma_data: float = 0.5,
    nsr_range: tuple[float, float] = (0.002, 80.0),
    class_names: Sequence[str] = (),
    card: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a stored average must say so that a model can be made of it.

    These are the arguments of `save_model`, JSON-ready.

    `training` tells this training from any other (its seed, batch size, ...): averages whose
    `training` differs are never combined, so it must not change during a training.
    """
    facts = {
        "config": network.config.to_dict(),
        "sigma_data": sigma_data,
        "nsr_range": list(nsr_range),
        "class_names": list(class_names),
        "training": dict(training),
        "card": dict(card or {}),
    }
    return json.loads(json.dumps(facts))  # as it will be read


def write_snapshot(
    folder: str | os.PathLike[str],
    averages: Iterable[PowerEMA],
    images: int,
    facts: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
) -> list[Path]:
    """Store each of `averages` in a file of its own in `folder`; their paths.

    The averages have seen `images` images.

    `facts` is what `model_facts` gives. Each file is written completely or not at all. float16
    takes half the space and suffices where the model made of it is kept in half precision too.
    Raises `CheckpointError` if an average is not finite (in `dtype`) or its file cannot be written;
    those that are already written stay, and are good.
    """
    if missing := [name for name in (*SAME, "card") if name not in facts]:
        raise ValueError(f"facts lacks {', '.join(missing)}: use model_facts")
    paths = []
    for average in averages:
        std = np.format_float_positional(average.std, min_digits=3)
        path = Path(folder) / f"ema-{std}-{images:09d}.safetensors"
        own = {"format": FORMAT, "std": average.std, "images": int(images)}
        write_tensors(path, finite(average.state_dict(), dtype, path), {**facts, **own})
        paths.append(path)
    return paths


def drop_snapshots(folder: str | os.PathLike[str], after: int) -> int:
    """Remove the averages that were stored after image number `after`.

    Returns how many there were.

    For a training that continues from a state older than they are: it may take another path.
    """
    files = [(path, NAME.fullmatch(path.name)) for path in Path(folder).glob("ema-*")]
    old = [path for path, match in files if match and int(match[1]) > after]
    for path in old:
        path.unlink(missing_ok=True)
    return len(old)


def find_snapshots(folder: str | os.PathLike[str]) -> list[Snapshot]:
    """The averages of a training that are stored in `folder`.

    They are sorted by image and width; only their headers are read.

    Raises `CheckpointError` if there is no such folder, none in it, one that is damaged, or
    averages of several trainings.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is {'a file' if folder.exists() else 'not there'}; name the folder of a"
            " training"
        )
    found = [_opened(path) for path in sorted(folder.glob("ema-*.safetensors"))]
    if not found:
        raise CheckpointError(
            f"{folder} holds no averages (ema-*.safetensors); a training stores them on"
            " request: sdeflow train --help"
        )
    _check_one_training(found)
    return sorted(found, key=lambda s: (s.images, s.std))


def _opened(path: Path) -> Snapshot:
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get(HEADER, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {_WITHOUT}") from error
    if facts.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a stored average, but"
            f" {facts.get('format', 'a file of something else')!r}; {_WITHOUT}"
        )
    try:
        return Snapshot(
            path, float(facts["std"]), int(facts["images"]), {n: facts[n] for n in (*SAME, "card")}
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: its header lacks {error}; {_WITHOUT}") from error


def _check_one_training(snapshots: Sequence[Snapshot]) -> None:
    groups = Counter(json.dumps([s.facts[n] for n in SAME], sort_keys=True) for s in snapshots)
    if len(groups) == 1:
        return
    common = json.loads(groups.most_common(1)[0][0])
    for snapshot in snapshots:
        for name, expected in zip(SAME, common, strict=True):
            value = snapshot.facts[name]
            if value == expected:
                continue
            if isinstance(value, dict):
                value, expected = differing(value, expected)
            raise CheckpointError(
                f"{snapshot.path} is of another training than most averages here: its {name} has"
                f" {value}, theirs {expected}; averages of one training only can be combined: move"
                " the others out of the folder"
            )


def fit(snapshots: Sequence[Snapshot], stds: Sequence[float], images: int) -> tuple[Floats, Floats]:
    r"""The weights of snapshots for the profiles of other lengths.

    For n snapshots and m `stds` up to `images`: the weights [n, m], and the profiles' relative
    errors [m].

    Minimises $\lVert p - \sum_i w_i p_i\rVert^2 + \lambda\,|w|^2$ under $\sum_i w_i = 1$, with time
    in units of `images` and $\lambda$ = `RIDGE`, in float64. The ridge keeps weights of opposite
    signs from growing where snapshots are nearly equal, at which they would amplify the rounding of
    what is stored. The error is $\lVert p - \sum_i w_i p_i\rVert / \lVert p\rVert$.
    """
    t = np.array([s.images for s in snapshots], float) / images
    gamma, target = (
        np.array([exponent(v) for v in values]) for values in ([s.std for s in snapshots], stds)
    )
    one = np.ones(len(target))
    gram = inner(t[:, None], gamma[:, None], t[None], gamma[None])
    right = inner(t[:, None], gamma[:, None], one[None], target[None])
    values, vectors = np.linalg.eigh(gram)
    scale = 1 / (np.maximum(values, 0) + RIDGE)
    free = vectors @ (scale[:, None] * (vectors.T @ right))
    slack = vectors @ (scale * vectors.sum(0))
    weights = free + slack[:, None] * ((1 - free.sum(0)) / slack.sum())
    norm = inner(one, target, one, target)
    square = norm - 2 * (weights * right).sum(0) + (weights * (gram @ weights)).sum(0)
    return weights, np.sqrt(np.maximum(square, 0) / norm)


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """An average made of stored ones: its float32 `parameters`, and how it was made.

    `std` is its relative width, `images` where its profile ends, `weights` those of `snapshots`,
    `error` the relative error of its profile, `facts` those of the last snapshot.
    """

    parameters: Mapping[str, Tensor]
    std: float
    images: int
    error: float
    weights: tuple[float, ...]
    snapshots: tuple[Snapshot, ...]
    facts: Mapping[str, Any]

    @property
    def card(self) -> dict[str, Any]:
        """The facts of the training, with those of the average."""
        average = {
            "profile": "power",
            "std": self.std,
            "images": self.images,
            "made_of": len(self.snapshots),
            "profile_error": float(f"{self.error:.2g}"),
        }
        return {**self.facts["card"], "average": average}

    def _network(self) -> UNet:
        return network_of(self.facts, self.parameters, self.snapshots[-1].path)

    def _about(self) -> dict[str, Any]:
        return about({**self.facts, "card": self.card})

    def denoiser(self, device: str | torch.device | None = None) -> Pretrained:
        """The averaged network as a denoiser in float32.

        `device=None` is PyTorch's default device.
        """
        place = torch.get_default_device() if device is None else torch.device(device)
        return Pretrained(self._network().to(place), **self._about())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it for inference in half precision, as `save_model` does."""
        save_model(path, self._network(), parameters=self.parameters, **self._about())


def select(
    snapshots: str | os.PathLike[str] | Sequence[Snapshot], images: int | None = None
) -> tuple[list[Snapshot], int]:
    """The snapshots up to `images`, and `images`.

    `snapshots` are in a folder, or given; by default `images` is that of the last one.
    """
    if isinstance(snapshots, str | os.PathLike):
        snapshots = find_snapshots(snapshots)
    found = list(snapshots)
    if not found:
        raise ValueError("there are no averages to combine: snapshots is empty")
    _check_one_training(found)
    last = max(s.images for s in found)
    images = last if images is None else int(images)
    chosen = [s for s in found if s.images <= images]
    if not chosen:
        raise ValueError(
            f"no average is as old as images={images}: the first was stored after"
            f" {min(s.images for s in found)} images, the last after {last}"
        )
    return chosen, images


def reconstruct(
    snapshots: str | os.PathLike[str] | Sequence[Snapshot],
    std: float,
    images: int | None = None,
    *,
    max_error: float = MAX_ERROR,
    progress: bool = False,
) -> Reconstruction:
    """The average of relative width `std` over a training up to `images`.

    It is made of the training's stored averages.

    `snapshots` is the training's folder, or what `find_snapshots` gave. By default `images` is that
    of the last snapshot; later ones are left out. The files are read one at a time. Raises
    `ValueError` if `std` is out of range or the profile's relative error would be above
    `max_error`, and `CheckpointError` where `find_snapshots` or `read_tensors` does.
    """
    exponent(std)
    chosen, images = select(snapshots, images)
    weights, errors = fit(chosen, [std], images)
    error = float(errors[0])
    if not error <= max_error:
        raise ValueError(_out_of_reach(chosen, std, images, error, max_error))
    total: dict[str, Tensor] = {}
    used = tuple(weights[:, 0].tolist())
    bar = tqdm(chosen, unit="file", disable=not progress, leave=False)
    for weight, snapshot in zip(used, bar, strict=True):
        _add(total, snapshot, weight)
    latest = max(chosen, key=lambda s: s.images)
    parameters = {name: value.float() for name, value in total.items()}
    return Reconstruction(parameters, float(std), images, error, used, tuple(chosen), latest.facts)


def _add(total: dict[str, Tensor], snapshot: Snapshot, weight: float) -> None:
    """Add `weight` times a snapshot to `total`, in float64.

    The file's tensors are gone when this returns.
    """
    try:
        tensors, _ = read_tensors(snapshot.path)
    except CheckpointError as fault:
        raise CheckpointError(f"{fault}; {_WITHOUT}") from fault
    if not total:
        total.update({n: torch.zeros(v.shape, dtype=torch.float64) for n, v in tensors.items()})
    if {n: v.shape for n, v in tensors.items()} != {n: v.shape for n, v in total.items()}:
        raise CheckpointError(f"{snapshot.path} holds another network's tensors; {_WITHOUT}")
    for name, value in tensors.items():
        total[name].add_(value, alpha=weight)


def _out_of_reach(
    snapshots: Sequence[Snapshot], std: float, images: int, error: float, limit: float
) -> str:
    """Why the average of `std` is refused, with the nearest that is not."""
    grid = np.geomspace(0.005, WIDEST, 120)
    good = grid[fit(snapshots, grid.tolist(), images)[1] <= limit]
    near, last = "", max(s.images for s in snapshots)
    if last < images:
        near = f"; the last average before is of {last} images: ask for images={last}"
    elif len(good):
        nearest = good[np.abs(np.log(good / std)).argmin()]
        near = f"; the nearest std within it is {nearest:.3f}"
    stored = ", ".join(f"{v:g}" for v in sorted({s.std for s in snapshots}))
    return (
        f"std={std:g} after {images} images cannot be made of the {len(snapshots)} averages stored"
        f" by then (std {stored}): its profile would be off by {error:.1%}, the limit is"
        f" {limit:.1%}{near}"
    )
