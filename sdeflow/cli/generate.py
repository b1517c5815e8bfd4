"""The command `sdeflow generate`: many pictures into a folder, on as many processes as torchrun
starts.
"""

from __future__ import annotations

import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sdeflow import registry
from sdeflow._utils.distributed import this_rank
from sdeflow.cli.options import (
    HOW,
    MACHINE,
    CompileOption,
    GridOption,
    HalfOption,
    ModelOption,
    NfeOption,
    NoiseOption,
    ProcessOption,
    QuietOption,
    RtolOption,
    SolverOption,
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

    sdeflow generate --n 50000 --out pictures               50000 pictures of the bundled model, a PNG file each

    sdeflow generate --n 50000 --out pictures --solver heun --nfe 35 --format npz

    sdeflow generate --n 100 --out cats --classes cat --seed 7

    torchrun --nproc-per-node 2 -m sdeflow generate -n 50000 --out pictures          on two GPUs

The same command again makes what is missing or damaged, after a kill at any moment; with a larger --n it makes more.

Under torchrun write -n, not --n, which its own parser takes for one of its options.
"""


class Kind(StrEnum):
    """How the pictures are kept."""

    png = "png"
    npz = "npz"
    parquet = "parquet"


def generate(
    out: Annotated[
        Path,
        typer.Option(
            help="The folder for the pictures; new, or one that this command goes on with."
        ),
    ],
    n: Annotated[
        int, typer.Option("--n", "-n", help="How many pictures the folder is to hold.", min=1)
    ] = 50_000,
    classes: Annotated[
        str,
        typer.Option(
            help=(
                "Names or numbers of classes, with commas; picture i takes its turn. 'all' of them,"
                " or 'none' for no label."
            )
        ),
    ] = "all",
    format: Annotated[
        Kind,
        typer.Option(
            help=(
                "png: a file a picture; npz: arrays, a file a shard; parquet: as data sets are"
                " kept."
            )
        ),
    ] = Kind.png,
    solver: SolverOption = "auto",
    nfe: NfeOption = None,
    process: ProcessOption = None,
    grid: GridOption = None,
    rtol: RtolOption = None,
    noise: NoiseOption = "seeded",
    seed: Annotated[
        int, typer.Option(help="Seed of picture 0; picture i has seed + i.", rich_help_panel=HOW)
    ] = 0,
    model: ModelOption = "cifar10",
    shard_size: Annotated[
        int,
        typer.Option(
            help="ImageSource a shard: what is written at once, and lost by a kill.",
            min=1,
            rich_help_panel=MACHINE,
        ),
    ] = SHARD_SIZE,
    batch_size: Annotated[
        str | None,
        typer.Option(
            help=(
                "At most so many at a time (default: 512 on a GPU, else 64); auto: what fits into"
                " memory."
            ),
            rich_help_panel=MACHINE,
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help="cpu, cuda, cuda:1 ...; auto takes a GPU if there is one, each process its own.",
            rich_help_panel=MACHINE,
        ),
    ] = "auto",
    compile: CompileOption = False,
    half: HalfOption = False,
    max_seconds: Annotated[
        float | None,
        typer.Option(
            help="Stop after this long; the same command goes on.", rich_help_panel=MACHINE
        ),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Write many pictures into a folder: the same ones on one process or many; stops and goes on at
    any moment.
    """
    method, size = pick_solver(solver, rtol), pick_batch_size(batch_size)
    along = None if process is None else registry.process(process)
    rank = this_rank()
    place = check_device(rank.device(named_device(device)))
    denoiser = open_model(model, place, half, compile)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompileWarning)  # the summary says it
        made = run(
            denoiser, out, n=n, process=along, solver=method, nfe=nfe, grid=grid, noise=noise,  # type: ignore[arg-type]
            classes=pick_classes(classes), seed=seed, format=format.value, shard_size=shard_size, batch_size=size, compile=compile,
            device=place, max_seconds=max_seconds, model=model, progress=not quiet,
        )  # fmt: skip
    if rank.first and not quiet:
        typer.echo(str(made))
