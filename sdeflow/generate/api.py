"""Many images into a folder, on any number of processes.

It can be stopped and continued at any moment.

Image i has seed `seed + i` and a label that depends on i alone. So it is the same image whatever
the batch size and the number of processes: its noise bit for bit, and all of it where the network
is exact row by row. The images are written in shards (`sdeflow.images.shards`). Shards that are
there and sound are kept. The processes share the missing ones and work independently.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sdeflow import registry
from sdeflow._utils import distributed
from sdeflow._utils.checks import listed, whole_number
from sdeflow._utils.lock import locked
from sdeflow._utils.math import not_finite
from sdeflow._utils.run_control import Stop
from sdeflow._version import __version__
from sdeflow.denoisers import Denoiser, as_denoiser
from sdeflow.denoisers.fingerprint import model_sha256
from sdeflow.denoisers.wrapper import Prepared, Wrapper
from sdeflow.errors import NonFiniteError, SdeflowError, SolverError
from sdeflow.generate.coordination import Coordinator
from sdeflow.grid import GridFunction
from sdeflow.images.labels import Labels
from sdeflow.images.render import to_uint8
from sdeflow.images.shards import RUN, Format, Shards, check_folder, read_settings, write_settings
from sdeflow.noise import SeededNoise
from sdeflow.plan.plan import Plan
from sdeflow.process import Process
from sdeflow.sampling.api import run
from sdeflow.sampling.batch_size import window
from sdeflow.sampling.inputs import check_device, device_of
from sdeflow.sampling.request import GraphMode, Request
from sdeflow.solvers.base import Solver

FORMAT = "sdeflow-images-1"
SHARD_SIZE = 512
GROWS, INFORMATIVE = {"n"}, {"model", "class_names"}
"""Settings that may grow from one run to the next, and those that determine nothing."""


@dataclass(frozen=True)
class GenerationResult:
    """What `generate` did, over all processes.

    The folder holds `n` images; `there` were there before, `made` are new. `network_calls` counts
    forwards of the network, `seconds` is this run's time. `reason` says why it stopped early,
    `compiled` whether it ran as CUDA graphs, where that was asked for.
    """

    out: Path
    n: int
    there: int
    made: int
    seconds: float
    network_calls: int
    reason: str = ""
    compiled: str = ""

    @property
    def finished(self) -> bool:
        """Whether all images are there."""
        return self.there + self.made >= self.n

    @property
    def images_per_second(self) -> float:
        """Images made a second, over all processes."""
        return self.made / self.seconds if self.seconds > 0 else 0.0

    def __str__(self) -> str:
        lines = [
            f"images    {self.there + self.made:,} of {self.n:,} ({self.made:,} made now,"
            f" {self.there:,} were there)",
            f"seconds   {self.seconds:.1f}",
            f"images/s  {self.images_per_second:.1f}",
            f"calls     {self.network_calls:,} forwards of the network",
            *([f"compiled  {self.compiled}"] if self.compiled else []),
            f"written   {self.out}",
            *([] if self.finished else [f"stopped   {self.reason}; the same command continues"]),
        ]
        return "\n".join(lines)


def generate(
    score_fn: Denoiser | Callable[..., Tensor],
    out: str | os.PathLike[str],
    *,
    n: int,
    process: Process | str | None = None,
    solver: str | Solver | Plan | None = None,
    nfe: int | None = None,
    grid: str | GridFunction | Tensor | Sequence[float] | None = None,
    noise: Literal["seeded", "brownian"] = "seeded",
    classes: Sequence[int | str] | Literal["all", "none"] = "all",
    seed: int = 0,
    shape: Sequence[int] | None = None,
    format: Format = "png",
    shard_size: int = SHARD_SIZE,
    batch_size: int | Literal["auto"] | None = None,
    compile: GraphMode = False,
    device: str | torch.device | None = None,
    max_seconds: float | None = None,
    model: str = "",
    progress: bool = False,
) -> GenerationResult:
    """Write `n` images of a model into the folder `out`, in shards.

    Called again it makes what is missing or damaged.

        generate(sdeflow.load("cifar10"), "images", n=50_000, nfe=35)

    - `score_fn`, `process`, `solver`, `nfe`, `grid`, `noise`, `shape`: as in `sample`; samples have
      shape (C, H, W), C = 1 or 3.
    - `classes`: numbers or names of classes, taken in turn: image i has the label
      `classes[i % len(classes)]`. By default `"all"` that the model knows; `"none"` is no label.
    - `seed`: that of image 0; image i has `seed + i`.
    - `format`: `"png"`, `"npz"` or `"parquet"`. `shard_size`: images a shard.
    - `batch_size`: at most so many at a time, by default 512 on a GPU and 64 elsewhere; `"auto"` is
      what fits, up to a shard: no batch spans two. `compile`: as in `sample`. With it, or with
      `"auto"`, the work advances by whole shards.
    - `device`: by default the network's; under torchrun a bare `"cuda"` is the process's own GPU.
    - `max_seconds`: stop after this long, as on SIGTERM and Ctrl-C; the batch that runs is
      completed first.
    - `model`: its name, which is written to `run.json`. `progress`: a progress bar, of the first
      process.

    Under torchrun each process calls it, and `out` is a folder that all of them see. `n` may grow
    from one call to the next. All else stays: `run.json` holds it.

    Errors: `ValueError` for a folder made with other settings (it names them) or holding other
    things; those of `sample`; `SdeflowError` where a shard cannot be written, `NonFiniteError` for
    NaN: both name the images; `SdeflowError` where another run is writing into `out` (the lock ends
    with its process). Finished shards stay.
    """
    began = time.perf_counter()
    rank = distributed.this_rank()
    stop = Stop(max_seconds)
    denoiser = as_denoiser(score_fn, None if process is None else registry.process(process))
    place = rank.device(device_of(denoiser) if device is None else check_device(device))
    names = tuple(getattr(denoiser, "class_names", ()))
    shards = Shards(Path(out), format, n, shard_size, _image_shape(denoiser, shape), names)
    labels = Labels.of(denoiser, classes)
    SeededNoise((seed, seed + n - 1), (1,))  # refuses seeds out of range
    batch = _batch_size(batch_size, place)
    request = Request(
        score_fn=denoiser,
        solver=solver,
        nfe=nfe,
        grid=grid,
        noise=noise,
        batch_size=batch,
        compile=compile,
        device=place,
    )
    settings = {
        "format": format,
        "shape": list(shards.shape),
        "shard_size": shard_size,
        "n": n,
        "seed": index(seed),
        "classes": list(labels.recorded),
        "class_names": list(shards.class_names),
        "model": model,
        "model_sha256": model_sha256(denoiser),
        "dtype": dtype_of(denoiser),
        **sentence(request),
        "version": __version__,
        "layout": FORMAT,
    }
    check_settings(shards.folder, settings)
    coordinator = Coordinator(rank)
    shown = progress and rank.first
    current = torch.cuda.device(place) if place.type == "cuda" else nullcontext()
    with locked(shards.folder, "sdeflow generate", rank.first), current, stop.listening():
        if rank.first:
            check_settings(shards.folder, settings)  # of a run that held the lock until now
            shards.sweep()
            write_settings(shards.folder, settings)
        missing = missing_shards(shards, labels, coordinator, shown)
        there = n - sum(len(shards.indices(k)) for k in missing)
        title = f"generating {n}"
        bar = tqdm(total=n, initial=there, unit="img", desc=title, smoothing=0.1, disable=not shown)
        with bar, coordinator.leaving_announced():
            maker = Maker(request, shards, labels, index(seed), stop, coordinator, bar)
            maker.make(missing[rank.index :: rank.world])
            if rank.first:
                maker.wait(n - there)
    made, calls = coordinator.read("images"), coordinator.read("calls")
    seconds = time.perf_counter() - began
    return GenerationResult(
        shards.folder, n, there, made, seconds, calls, stop.reason, maker.compiled
    )


@dataclass
class Maker:
    """Makes shards: the network on the next one while a thread writes the last."""

    request: Request
    shards: Shards
    labels: Labels
    seed: int
    stop: Stop
    coordinator: Coordinator
    bar: Any
    compiled: str = ""

    def make(self, shards: Sequence[int]) -> None:
        """Make these, until it is asked to stop. What was finished is written in any case."""
        with ThreadPoolExecutor(1) as writer:
            writing: Future[None] = Future()
            writing.set_result(None)  # there is nothing to wait for yet
            for k in shards:
                images = self.images(k)
                if images is None:
                    break
                writing.result()
                writing = writer.submit(self.write, k, images)
            writing.result()

    def images(self, k: int) -> Tensor | None:
        """The images of a shard, uint8 [k, H, W, C] on the CPU; None if it is asked to stop."""
        parts, indices = [], self.shards.indices(k)
        batch, compiled = self.request.batch_size, self.request.compile
        height, width, channels = self.shards.shape
        # A solve that finds its batch size, or replays a graph, works best on the whole shard.
        step = batch if isinstance(batch, int) and not compiled else len(indices)
        for first in range(indices.start, indices.stop, step):
            if self.stop.asked:
                return None
            rows = range(first, min(first + step, indices.stop))
            if compiled and isinstance(batch, int):
                # A last, smaller shard would be captured again: fill its batch up.
                wide = window(slice(rows.start, rows.stop), min(batch, self.shards.size))
                rows = range(wide.start, rows.stop)
            label = self.labels.given(rows)
            denoiser = as_denoiser(self.request.score_fn, None)
            request = replace(
                self.request,
                score_fn=denoiser.rows(torch.arange(rows.start, rows.stop)),
                shape=(channels, height, width),
                n=len(rows),
                seeds=self.seed + rows.start,
                condition=None if label is None else {"label": label},
            )
            try:
                solution = run(request)
            except (NonFiniteError, SolverError) as error:
                raise _named(error, rows, self.seed, k) from error
            parts.append(to_uint8(solution.x[first - rows.start :]).permute(0, 2, 3, 1).cpu())
            self.coordinator.add("calls", solution.network_calls)
            self.compiled = str(solution.statistics.get("compiled", ""))
            self.coordinator.add("shown", rows.stop - first)
            self.show()
        return torch.cat(parts).contiguous()

    def write(self, k: int, images: Tensor) -> None:
        """Write a shard, and count it."""
        try:
            self.shards.write(k, images, self.labels.numbers(self.shards.indices(k)))
        except SdeflowError as error:
            raise SdeflowError(
                f"{error}. The shards that are finished stay: the same command continues from there"
            ) from error
        self.coordinator.add("images", len(images))

    def show(self) -> None:
        """Bring the progress bar, which is that of all processes, up to date."""
        if not self.bar.disable:
            self.bar.update(self.bar.initial + self.coordinator.read("shown") - self.bar.n)

    def wait(self, wanted: int) -> None:
        """Wait until the other processes have made their part, or have left.

        If a signal ends all of them, wait 5 s at most.
        """
        until, read = None, self.coordinator.read
        while read("images") < wanted and read("left") < self.coordinator.others:
            if self.stop.asked and self.stop.reason.startswith("SIG"):
                until = until or time.monotonic() + 5.0
                if time.monotonic() >= until:
                    return
            time.sleep(0.05)
            self.show()


# ---------------------------------------------------------------------------- what is there already


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to continue in a folder that was made with other settings, and name them."""
    check_folder(folder)
    if not (folder / RUN).exists():
        return
    stored, asked = read_settings(folder), json.loads(json.dumps(dict(settings)))
    if stored["n"] > asked["n"]:
        raise ValueError(
            f"{folder} is of {stored['n']} images, and n={asked['n']} is fewer: n may grow but"
            " not shrink; choose another folder"
        )
    fixed = [name for name in asked if name not in GROWS | INFORMATIVE]
    names = [name for name in fixed if stored.get(name) != asked[name]]
    if len(names) > 1:
        # Another budget or solver has other times, another dtype another hash: those say more.
        follows = {"times", *(["model_sha256"] if "dtype" in names else [])}
        names = [name for name in names if name not in follows]
    if names:
        old, new = (", ".join(f"{n}={_short(of.get(n))}" for n in names) for of in (stored, asked))
        raise ValueError(
            f"{folder} was made with {old}, not with {new}: continuing would mix two sets of"
            " images. Take the same settings, or another folder"
        )


def missing_shards(
    shards: Shards, labels: Labels, coordinator: Coordinator, progress: bool
) -> list[int]:
    """The shards that are missing or damaged.

    Each process verifies its part; all get the same answer.
    """
    there = [k for k in range(len(shards)) if shards.path(k).exists()]
    mine = [k for k in there if k % coordinator.rank.world == coordinator.rank.index]
    bar = tqdm(mine, "verifying", unit="shard", leave=False, disable=not (progress and mine))
    sound = [k for k in bar if shards.is_sound(k, labels.numbers(shards.indices(k)))]
    known = {k for part in coordinator.all_gather("sound", sound) for k in part}
    return [k for k in range(len(shards)) if k not in known]


# ------------------------------------------------------------------------ what determines an image


class _StandIn(Wrapper):
    """Stands for a denoiser where only process, grid and budget are asked for.

    It takes samples of any shape and calls no network.
    """

    def __init__(self, denoiser: Denoiser):
        super().__init__(denoiser)
        self.shape, self.known_density = None, denoiser.known_density

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """None: it runs on the CPU."""
        return ()

    def inner_calls(self, condition: Mapping[str, Any]) -> list[Any]:
        return []

    def combine(self, calls: Sequence[Prepared], x: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(x)


def sentence(request: Request) -> dict[str, Any]:
    """Solver, process, times and budget of a request.

    They are those of a solve that costs no network call. Raises what `sample` raises.
    """
    if not isinstance(request.noise, str):
        raise TypeError("noise is 'seeded' or 'brownian': a noise of your own serves one batch")
    free = _StandIn(as_denoiser(request.score_fn, None))
    asked = {f: getattr(request, f) for f in ("solver", "nfe", "grid", "noise")}
    how = run(Request(score_fn=free, **asked, shape=(1,), n=1, seeds=0))
    method, plan, name = how.solver, request.solver, repr(how.solver)
    if isinstance(plan, Plan):
        name = f"plan {hashlib.sha256(json.dumps(plan.to_dict()).encode()).hexdigest()}"
    return {
        "solver": name,
        "process": repr(how.process),
        "nfe": None if method is not None and method.adaptive else how.nfe,
        "grid": how.grid,
        "times": [] if how.times is None else how.times.tolist(),
        "noise": how.noise,
    }


def dtype_of(denoiser: Denoiser) -> str:
    """The dtype of the network's parameters, or of the states."""
    parameters = (p for network in denoiser.networks for p in network.parameters())
    first = next(parameters, None)
    return str(torch.float32 if first is None else first.dtype).removeprefix("torch.")


def _image_shape(denoiser: Denoiser, shape: Sequence[int] | None) -> tuple[int, int, int]:
    known = denoiser.shape if shape is None else tuple(shape)
    if known is None:
        raise ValueError(
            "this model does not know its shape: pass shape=(C, H, W), such as shape=(3, 32, 32)"
        )
    if len(known) != 3 or known[0] not in (1, 3):
        raise ValueError(
            f"images have shape (C, H, W) with C = 1 or 3; samples of this model have {known}"
        )
    channels, height, width = known
    return height, width, channels


def _batch_size(asked: int | Literal["auto"] | None, device: torch.device) -> int | Literal["auto"]:
    if asked is None:
        return 512 if device.type == "cuda" else 64
    return asked if asked == "auto" else whole_number("batch_size", asked)


def _named(error: NonFiniteError | SolverError, rows: range, seed: int, shard: int) -> SdeflowError:
    """The error of a batch, with the numbers of the images."""
    bad: Sequence[int] = rows
    if error.partial is not None:
        before = rows.start if error.finished is None else rows.start + len(error.finished.x)
        bad = [before + i for i in not_finite(error.partial.x)] or rows
    named = type(error)(
        f"{'image' if len(bad) == 1 else 'images'} {listed(bad)} (seed {seed} + number) failed, and"
        f" nothing was written of shard {shard}; the shards that are finished stay. In the batch"
        f" that begins with image {rows.start}: {error}"
    )
    named.partial = error.partial
    return named


def _short(value: Any, most: int = 60) -> str:
    text = repr(value) if not isinstance(value, str) else value
    return text if len(text) <= most else f"{text[:most]}..."
