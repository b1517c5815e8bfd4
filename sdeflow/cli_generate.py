"""The command `sdeflow generate`: many pictures into a folder, on as many processes as torchrun starts."""

from __future__ import annotations

import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from sdeflow import registry
from sdeflow.cli_sample import HOW, MACHINE, pick_batch_size, pick_device, pick_solver
from sdeflow.compiled import CompileWarning
from sdeflow.distributed import this_rank
from sdeflow.generate import SHARD_SIZE
from sdeflow.generate import generate as run
from sdeflow.models.checkpoint import load
from sdeflow.start import check_device

EPILOG = """
Examples:

    sdeflow generate --n 50000 --out pictures               50000 pictures of the bundled model, a PNG file each

    sdeflow generate --n 50000 --out pictures --solver heun --nfe 35 --format npz

    sdeflow generate --n 100 --out cats --classes cat --seed 7

    torchrun --nproc-per-node 2 -m sdeflow generate -n 50000 --out pictures          the same pictures, on two GPUs

The same command again makes what is missing or damaged, after a kill at any moment; with a larger --n it makes more.
"""


class Kind(StrEnum):
    """How the pictures are kept."""

    png = "png"
    npz = "npz"
    parquet = "parquet"


def generate(
    out: Annotated[Path, typer.Option(help="The folder for the pictures; new, or one that this command goes on with.")],
    n: Annotated[int, typer.Option("--n", "-n", help="How many pictures the folder is to hold.", min=1)] = 50_000,
    classes: Annotated[
        str,
        typer.Option(
            help="Names or numbers of classes, with commas; picture i takes its turn. 'all' of them, or 'none' for no label."
        ),
    ] = "all",
    format: Annotated[
        Kind, typer.Option(help="png: a file a picture; npz: arrays, a file a shard; parquet: as data sets are kept.")
    ] = Kind.png,
    solver: Annotated[str, typer.Option(help="A name from 'sdeflow info solvers'.", rich_help_panel=HOW)] = "auto",
    nfe: Annotated[
        int | None,
        typer.Option(help="Network calls, exactly (default: 35; not for adaptive solvers).", rich_help_panel=HOW),
    ] = None,
    process: Annotated[
        str | None,
        typer.Option(help="A name from 'sdeflow info processes' (default: the model's own).", rich_help_panel=HOW),
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            help="A name from 'sdeflow info grids' (default: what suits model and process).", rich_help_panel=HOW
        ),
    ] = None,
    rtol: Annotated[
        float | None, typer.Option(help="Tolerance of an adaptive solver (default: 1e-3).", rich_help_panel=HOW)
    ] = None,
    noise: Annotated[
        str, typer.Option(help="seeded, or brownian: the same path at every NFE.", rich_help_panel=HOW)
    ] = "seeded",
    seed: Annotated[int, typer.Option(help="Seed of picture 0; picture i has seed + i.", rich_help_panel=HOW)] = 0,
    model: Annotated[
        str, typer.Option(help="A bundled model or a file that 'sdeflow train' wrote.", rich_help_panel=MACHINE)
    ] = "cifar10",
    shard_size: Annotated[
        int,
        typer.Option(
            help="Pictures a shard: what is written at once, and lost by a kill.", min=1, rich_help_panel=MACHINE
        ),
    ] = SHARD_SIZE,
    batch_size: Annotated[
        str | None,
        typer.Option(
            help="At most so many at a time (default: 512 on a GPU, else 64); auto: what fits into memory.",
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
    compile: Annotated[
        bool, typer.Option("--compile", help="Run each batch as one CUDA graph.", rich_help_panel=MACHINE)
    ] = False,
    half: Annotated[bool, typer.Option("--half", help="Run the network in bfloat16.", rich_help_panel=MACHINE)] = False,
    max_seconds: Annotated[
        float | None, typer.Option(help="Stop after this long; the same command goes on.", rich_help_panel=MACHINE)
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No progress bar, no summary.", rich_help_panel=MACHINE)
    ] = False,
) -> None:
    """Write many pictures into a folder: the same ones on one process or many; stops and goes on at any moment."""
    method, size = pick_solver(solver, rtol), pick_batch_size(batch_size)
    along = None if process is None else registry.process(process)
    rank = this_rank()
    place = check_device(rank.device(pick_device(device)))
    denoiser = load(model, place, torch.bfloat16 if half else torch.float32)
    asked = classes if classes in ("all", "none") else [part.strip() for part in classes.split(",") if part.strip()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompileWarning)  # the summary says it
        made = run(
            denoiser, out, n=n, process=along, solver=method, nfe=nfe, grid=grid, noise=noise,  # type: ignore[arg-type]
            classes=asked, seed=seed, format=format.value, shard_size=shard_size, batch_size=size, compile=compile,
            device=place, max_seconds=max_seconds, model=model, progress=not quiet,
        )  # fmt: skip
    if rank.first and not quiet:
        typer.echo(str(made))
