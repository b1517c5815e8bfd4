"""The command `sdeflow generate`.

It writes many images into a folder, on as many processes as torchrun starts.
"""

from __future__ import annotations

import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sdeflow._utils.distributed import this_rank
from sdeflow.cli import options
from sdeflow.cli.options import (
    leave,
    machine,
    open_model,
    pick_batch_size,
    pick_classes,
    pick_solver,
)
from sdeflow.generate.api import SHARD_SIZE
from sdeflow.generate.api import generate as run
from sdeflow.sampling.cuda_graphs import CompileWarning
from sdeflow.sampling.inputs import check_device, named_device

EPILOG = """
Examples:

    sdeflow generate --n 50000 --out images          images of the bundled model, a PNG file each

    sdeflow generate --n 50000 --out images --solver heun --nfe 35 --format npz

    sdeflow generate --n 100 --out cats --classes cat --seed 7

    torchrun --nproc-per-node 2 -m sdeflow generate -n 50000 --out images            on two GPUs

The same command again makes what is missing or damaged, after a kill at any moment. With a larger
--n it makes more.

Under torchrun write -n, not --n, which its own parser takes for one of its options.
"""


class Kind(StrEnum):
    """How the images are kept."""

    png = "png"
    npz = "npz"
    parquet = "parquet"


def generate(
    out: Annotated[
        Path,
        typer.Option(help="The folder for the images; new, or one that this command continues."),
    ],
    n: Annotated[
        int, typer.Option("--n", "-n", help="How many images the folder is to hold.", min=1)
    ] = 50_000,
    classes: options.ClassesOption = "all",
    format: Annotated[
        Kind,
        typer.Option(
            help=(
                "png: a file an image; npz: arrays, a file a shard; parquet: as data sets are kept."
            )
        ),
    ] = Kind.png,
    solver: options.SolverOption = "auto",
    nfe: options.NfeOption = None,
    process: options.ProcessOption = None,
    grid: options.GridOption = None,
    rtol: options.RtolOption = None,
    noise: options.NoiseOption = "seeded",
    seed: options.SeedOption = 0,
    model: options.ModelOption = "cifar10",
    shard_size: Annotated[
        int, machine(help="Images a shard: what is written at once, and lost by a kill.", min=1)
    ] = SHARD_SIZE,
    batch_size: Annotated[
        str | None,
        machine(
            help=(
                "At most so many at a time (default: 512 on a GPU, else 64); auto: what fits into"
                " memory."
            )
        ),
    ] = None,
    device: options.DeviceOption = "auto",
    compile: options.CompileOption = False,
    half: options.HalfOption = False,
    max_seconds: Annotated[
        float | None, machine(help="Stop after this long; the same command continues.")
    ] = None,
    quiet: options.QuietOption = False,
) -> None:
    """Write many images into a folder: the same ones on one process or on many. It can be stopped
    and continued at any moment.
    """
    method, at_once = pick_solver(solver, rtol, nfe), pick_batch_size(batch_size)
    rank = this_rank()
    place = check_device(rank.device(named_device(device)))
    denoiser = open_model(model, place, half, compile)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompileWarning)  # the summary says it
        made = run(
            denoiser,
            out,
            n=n,
            process=process,
            solver=method,
            nfe=nfe,
            grid=grid,
            noise=noise,  # type: ignore[arg-type]
            classes=pick_classes(classes),
            seed=seed,
            format=format.value,
            shard_size=shard_size,
            batch_size=at_once,
            compile=compile,
            device=place,
            max_seconds=max_seconds,
            model=model,
            progress=not quiet,
        )
    if rank.first and not quiet:
        typer.echo(str(made))
    leave(made.reason)
