"""Many pictures into a folder, on as many processes as there are, stopped and gone on at any
moment.

Picture i has seed `seed + i` and a label that depends on i alone, so it is the same picture
whatever the batch size and the number of processes: its noise bit for bit, and all of it where the
network is exact row by row. The pictures are written in shards (`sdeflow.images.shards`). What is
there and sound is kept; the processes share what is missing, and need not talk meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sdeflow import registry
from sdeflow._utils import distributed
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
from sdeflow.sampling.api import solve
from sdeflow.sampling.batch_size import window
from sdeflow.sampling.cuda_graphs import Compile
from sdeflow.sampling.inputs import check_device, device_of
from sdeflow.solvers.base import Solver

FORMAT = "sdeflow-images-1"
SHARD_SIZE = 512
GROWS, TOLD = {"n"}, {"model", "class_names"}
"""Settings that may grow from one run to the next, and those that are told but determine
nothing.
"""


@dataclass(frozen=True)
class GenerationResult:
    """What `generate` did: `made` of the folder's `n` pictures, `there` of which were there before,
    over all processes.

    `network_calls` counts forwards of the network, `seconds` this run's time. `reason` says why it
    stopped before its end, `compiled` whether it ran as CUDA graphs, where that was asked for.
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
        """Whether all pictures are there."""
        return self.there + self.made >= self.n

    @property
    def images_per_second(self) -> float:
        """ImageSource made a second, over all processes."""
        return self.made / self.seconds if self.seconds > 0 else 0.0

    def __str__(self) -> str:
        lines = [
            (
                f"pictures  {self.there + self.made:,} of {self.n:,} ({self.made:,} made now,"
                f" {self.there:,} were there)"
            ),
            f"seconds   {self.seconds:.1f}",
            f"images/s  {self.images_per_second:.1f}",
            f"calls     {self.network_calls:,} forwards of the network",
            *([f"compiled  {self.compiled}"] if self.compiled else []),
            f"written   {self.out}",
            *([] if self.finished else [f"stopped   {self.reason}; the same command goes on"]),
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
    compile: Compile = False,
    device: str | torch.device | None = None,
    max_seconds: float | None = None,
    model: str = "",
    progress: bool = False,
) -> GenerationResult:
    """Write `n` pictures of a model into the folder `out`, in shards; called again it makes what is
    missing or damaged.

        generate(sdeflow.load("cifar10"), "pictures", n=50_000, nfe=35)

    - `score_fn`, `process`, `solver`, `nfe`, `grid`, `noise`, `shape`: as in `sample`; samples have
      shape (C, H, W), C = 1 or 3.
    - `classes`: numbers or names of classes, taken in turn: picture i has the label
      `classes[i % len(classes)]`. By default `"all"` that the model knows; `"none"` is no label.
    - `seed`: that of picture 0; picture i has `seed + i`.
    - `format`: `"png"`, `"npz"` or `"parquet"`. `shard_size`: pictures a shard.
    - `batch_size`: at most so many at a time, by default 512 on a GPU and 64 elsewhere; `"auto"` is
      what fits, up to a shard: no batch spans two. `compile`: as in `sample`; it and `"auto"`
      advance by whole shards.
    - `device`: by default the network's; under torchrun a bare `"cuda"` is the process's own GPU.
    - `max_seconds`: stop after this long, as on SIGTERM and Ctrl-C; the batch that runs is
      completed first.
    - `model`: its name, which `run.json` tells. `progress`: a progress bar, of the first process.

    Under torchrun each process calls it, and `out` is a folder that all of them see. `n` may grow
    from one call to the next, all else stays: `run.json` holds it.

    Errors: `ValueError` for a folder made with other settings (it names them) or holding other
    things; those of `sample`; `SdeflowError` where a shard cannot be written, `NonFiniteError` for
    NaN: both name the pictures. Finished shards stay.
    """
    began = time.perf_counter()
    rank = distributed.this_rank()
    stop = Stop(max_seconds)
    denoiser = as_denoiser(score_fn, None if process is None else registry.process(process))
    place = rank.device(device_of(denoiser) if device is None else check_device(device))
    shards = Shards(
        Path(out), format, n, shard_size, _picture_shape(denoiser, shape), _class_names(denoiser)
    )
    labels = Labels.of(denoiser, classes)
    SeededNoise((seed, seed + n - 1), (1,))  # refuses seeds that are none
    batch = _batch_size(batch_size, place)
    how = {"solver": solver, "nfe": nfe, "grid": grid, "noise": noise}
    settings = {
        "format": format, "shape": list(shards.shape), "shard_size": shard_size, "n": n, "seed": index(seed),
        "classes": list(labels.stored), "class_names": list(shards.class_names), "model": model,
        "model_sha256": model_sha256(denoiser), "dtype": dtype_of(denoiser), **sentence(denoiser, how),
        "version": __version__, "layout": FORMAT,
    }  # fmt: skip
    check_settings(shards.folder, settings)
    company = Coordinator(rank)
    if rank.first:
        shards.sweep()
        write_settings(shards.folder, settings)
    missing = missing_shards(shards, labels, company, progress and rank.first)
    there = n - sum(len(shards.indices(k)) for k in missing)
    bar = tqdm(
        total=n, initial=there, unit="img", desc=f"generating {n}", dynamic_ncols=True, smoothing=0.1,
        disable=not (progress and rank.first),
    )  # fmt: skip
    current = torch.cuda.device(place) if place.type == "cuda" else nullcontext()
    with bar, current, stop.listening(), company.leaving_announced():
        maker = Maker(
            denoiser, shards, labels, index(seed), how, batch, compile, place, stop, company, bar
        )
        maker.make(missing[rank.index :: rank.world])
        if rank.first:
            maker.wait(n - there)
    made, calls = company.read("images"), company.read("calls")
    return GenerationResult(
        shards.folder,
        n,
        there,
        made,
        time.perf_counter() - began,
        calls,
        stop.reason,
        maker.compiled,
    )


@dataclass
class Maker:
    """Makes shards: the network on the next one while a thread writes the last."""

    denoiser: Denoiser
    shards: Shards
    labels: Labels
    seed: int
    how: Mapping[str, Any]
    batch: int | Literal["auto"]
    compile: Compile
    device: torch.device
    stop: Stop
    company: Coordinator
    bar: Any
    compiled: str = ""

    def make(self, shards: Sequence[int]) -> None:
        """Make these; ends early where it is asked to stop. What was finished is written, whatever
        happens.
        """
        with ThreadPoolExecutor(1) as writer:
            writing: Future[None] | None = None
            for k in shards:
                images = self.images(k)
                if images is None:
                    break
                if writing is not None:
                    writing.result()
                writing = writer.submit(self.write, k, images)
            if writing is not None:
                writing.result()

    def images(self, k: int) -> Tensor | None:
        """The pictures of a shard, uint8 [k, H, W, C] on the CPU; None where it is asked to
        stop.
        """
        parts = []
        indices = self.shards.indices(k)
        # A solve that finds its batch or replays a graph does better with all of the shard at once.
        step = len(indices) if self.batch == "auto" or self.compile else self.batch
        for first in range(indices.start, indices.stop, step):
            if self.stop.asked:
                return None
            stop = min(first + step, indices.stop)
            rows = range(first, stop)
            if (
                self.compile and self.batch != "auto"
            ):  # a last, smaller shard would be compiled anew
                rows = range(
                    window(slice(first, stop), min(self.batch, self.shards.size)).start, stop
                )
            label = self.labels.given(rows)
            height, width, channels = self.shards.shape
            try:
                denoiser = self.denoiser.rows(torch.arange(rows.start, rows.stop))
                solution = solve(
                    denoiser, **self.how, shape=(channels, height, width), n=len(rows), seeds=self.seed + rows.start,
                    condition=None if label is None else {"label": label}, batch_size=self.batch, compile=self.compile,
                    device=self.device,
                )  # fmt: skip
            except (NonFiniteError, SolverError) as error:
                raise _named(error, rows, self.seed, k) from error
            parts.append(to_uint8(solution.x[first - rows.start :]).permute(0, 2, 3, 1).cpu())
            self.company.add("calls", solution.network_calls)
            self.compiled = str(solution.statistics.get("compiled", ""))
            self.company.add("shown", stop - first)
            self.show()
        return torch.cat(parts).contiguous()

    def write(self, k: int, images: Tensor) -> None:
        """Write a shard, and count it."""
        try:
            self.shards.write(k, images, self.labels.told(self.shards.indices(k)))
        except SdeflowError as error:
            raise SdeflowError(
                f"{error}. The shards that are finished stay: the same command goes on from there"
            ) from error
        self.company.add("images", len(images))

    def show(self) -> None:
        """Bring the progress bar, which is that of all processes, up to date."""
        if not self.bar.disable:
            self.bar.update(self.bar.initial + self.company.read("shown") - self.bar.n)

    def wait(self, wanted: int) -> None:
        """Until the other processes have made their part, or have left; not for long where a signal
        ends all of them.
        """
        until = None
        while (
            self.company.read("images") < wanted and self.company.read("left") < self.company.others
        ):
            if self.stop.asked and self.stop.reason.startswith("SIG"):
                until = until or time.monotonic() + 5.0
                if time.monotonic() >= until:
                    return
            time.sleep(0.05)
            self.show()


# ---------------------------------------------------------------------------- what is there already


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to go on in a folder that was made with other settings, naming them."""
    check_folder(folder)
    if not (folder / RUN).exists():
        return
    stored, asked = read_settings(folder), json.loads(json.dumps(dict(settings)))
    if stored["n"] > asked["n"]:
        raise ValueError(
            f"{folder} is of {stored['n']} pictures, and n={asked['n']} is fewer: n may grow but"
            " not shrink; choose another folder"
        )
    names = [name for name in asked if name not in GROWS | TOLD and stored.get(name) != asked[name]]
    if (
        len(names) > 1
    ):  # other times come of another budget or solver, another hash of another dtype: those say more
        names = [
            name
            for name in names
            if name != "times" and not (name == "model_sha256" and "dtype" in names)
        ]
    if names:
        old, new = (
            ", ".join(f"{name}={_short(of.get(name))}" for name in names) for of in (stored, asked)
        )
        raise ValueError(
            f"{folder} was made with {old}, not with {new}: going on would mix two sets of"
            " pictures. Take the same settings, or another folder"
        )


def missing_shards(
    shards: Shards, labels: Labels, company: Coordinator, progress: bool
) -> list[int]:
    """The shards that are missing or damaged; each process verifies its part, and all get the same
    answer.
    """
    there = [k for k in range(len(shards)) if shards.path(k).exists()]
    mine = [k for k in there if k % company.rank.world == company.rank.index]
    bar = tqdm(mine, "verifying", unit="shard", leave=False, disable=not (progress and mine))
    whole = [k for k in bar if shards.whole(k, labels.told(shards.indices(k)))]
    known = {k for part in company.tell("whole", whole) for k in part}
    return [k for k in range(len(shards)) if k not in known]


# ------------------------------------------------------------------------ what determines a picture


class _StandIn(Wrapper):
    """Stands for a denoiser where only the sentence around it is asked for: process, grid and
    budget. It takes samples of any shape and calls no network.
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


def sentence(denoiser: Denoiser, how: Mapping[str, Any]) -> dict[str, Any]:
    """Solver, process, times and budget, from a solve of a free model; raises what `sample` raises
    for what cannot be.
    """
    if not isinstance(how["noise"], str):
        raise TypeError("noise is 'seeded' or 'brownian': a noise of your own serves one batch")
    solution = solve(_StandIn(denoiser), **how, shape=(1,), n=1, seeds=0)
    method = solution.solver
    return {
        "solver": (
            repr(method)
            if method is not None
            else f"plan {_sha256(json.dumps(how['solver'].to_dict()))}"
        ),
        "process": repr(solution.process),
        "nfe": None if method is not None and method.adaptive else solution.nfe,
        "grid": solution.grid,
        "times": [] if solution.times is None else solution.times.tolist(),
        "noise": solution.noise,
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def dtype_of(denoiser: Denoiser) -> str:
    """The dtype of the network's parameters, or of the states."""
    parameters = (p for network in denoiser.networks for p in network.parameters())
    first = next(parameters, None)
    return str(torch.float32 if first is None else first.dtype).removeprefix("torch.")


def _class_names(denoiser: Denoiser) -> tuple[str, ...]:
    return tuple(getattr(denoiser, "class_names", ()))


def _picture_shape(denoiser: Denoiser, shape: Sequence[int] | None) -> tuple[int, int, int]:
    known = denoiser.shape if shape is None else tuple(shape)
    if known is None:
        raise ValueError(
            "this model does not know its shape: pass shape=(C, H, W), such as shape=(3, 32, 32)"
        )
    if len(known) != 3 or known[0] not in (1, 3):
        raise ValueError(
            f"pictures have shape (C, H, W) with C = 1 or 3; samples of this model have {known}"
        )
    channels, height, width = known
    return height, width, channels


def _batch_size(asked: int | Literal["auto"] | None, device: torch.device) -> int | Literal["auto"]:
    if asked is None:
        return 512 if device.type == "cuda" else 64
    if asked != "auto" and (isinstance(asked, bool) or not isinstance(asked, int) or asked < 1):
        raise ValueError(f"batch_size is a whole number, at least 1, or 'auto'; got {asked!r}")
    return asked


def _named(error: NonFiniteError | SolverError, rows: range, seed: int, shard: int) -> SdeflowError:
    """The error of a batch, told with the numbers of the pictures."""
    bad: Sequence[int] = rows
    if error.partial is not None:
        wrong = (
            (~error.partial.x.isfinite())
            .reshape(len(error.partial.x), -1)
            .any(1)
            .nonzero()
            .flatten()
            .tolist()
        )
        before = rows.start if error.finished is None else rows.start + len(error.finished.x)
        bad = [before + i for i in wrong] or rows
    which = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
    told = type(error)(
        f"{'picture' if len(bad) == 1 else 'pictures'} {which} (seed {seed} + number) failed, and"
        f" nothing was written of shard {shard}; the shards that are finished stay. In the batch"
        f" that begins with picture {rows.start}: {error}"
    )
    told.partial = error.partial
    return told


def _short(value: Any, most: int = 60) -> str:
    text = repr(value) if not isinstance(value, str) else value
    return text if len(text) <= most else f"{text[:most]}..."
