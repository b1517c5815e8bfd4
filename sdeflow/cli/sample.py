"""The command `sdeflow sample`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from sdeflow import images, registry
from sdeflow._utils.files import check_writable
from sdeflow.cli.options import (
    HOW,
    MACHINE,
    CompileOption,
    DeviceOption,
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
    pick_names,
    pick_solver,
)
from sdeflow.errors import unknown
from sdeflow.models.checkpoint import Pretrained
from sdeflow.sampling.api import solve
from sdeflow.sampling.cuda_graphs import CompileWarning
from sdeflow.sampling.inputs import named_device
from sdeflow.solvers.base import Solution

EPILOG = """
Examples:

    sdeflow sample                                          20 pictures from the bundled model, into samples.png

    sdeflow sample --classes cat,dog,ship --n 9 --seed 7

    sdeflow sample --process rectified_flow --solver ddim --nfe 10

    sdeflow sample --solver rk45 --rtol 1e-4

    sdeflow sample --solver euler_maruyama --process vp --nfe 100 --gif samples.gif

    sdeflow sample --model runs/photos/model.safetensors --out photos.png
"""


def sample(
    n: Annotated[int, typer.Option(help="How many pictures.", min=1)] = 20,
    classes: Annotated[
        str | None,
        typer.Option(
            help=(
                "Names or numbers of classes, with commas; taken in turn. All of them by default;"
                " 'none' for no label."
            )
        ),
    ] = None,
    solver: SolverOption = "auto",
    nfe: NfeOption = None,
    process: ProcessOption = None,
    grid: GridOption = None,
    rtol: RtolOption = None,
    noise: NoiseOption = "seeded",
    seed: Annotated[
        int, typer.Option(help="Seed of the first picture; the others follow.", rich_help_panel=HOW)
    ] = 0,
    model: ModelOption = "cifar10",
    out: Annotated[
        Path, typer.Option(help="The picture to write, PNG.", rich_help_panel=MACHINE)
    ] = Path("samples.png"),
    gif: Annotated[
        Path | None,
        typer.Option(
            help="Write the predictions of x0 over time here too, as GIF.", rich_help_panel=MACHINE
        ),
    ] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(
            help="At most so many at a time; auto: what fits into memory.", rich_help_panel=MACHINE
        ),
    ] = None,
    device: DeviceOption = "auto",
    compile: CompileOption = False,
    half: HalfOption = False,
    quiet: QuietOption = False,
) -> None:
    """Draw samples from a model into a labelled picture."""
    for option, suffix, path in (("--out", ".png", out), ("--gif", ".gif", gif)):
        if path is not None:
            if path.suffix.lower() not in ("", suffix):
                raise ValueError(
                    f"{option} is written as {suffix[1:].upper()}: call it"
                    f" {path.with_suffix(suffix)}, not {path}"
                )
            check_writable(path, "picture")
    method, size = pick_solver(solver, rtol), pick_batch_size(batch_size)
    along = None if process is None else registry.process(process)
    place = named_device(device)
    denoiser = open_model(model, place, half, compile)
    labels, names, columns = _classes(classes, n, denoiser)
    if not quiet:
        typer.echo(
            f"{model}: {n} pictures of {'x'.join(map(str, denoiser.shape or ()))} on {place}",
            err=True,
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompileWarning)  # the summary says it
        solution = solve(
            denoiser, along, solver=method, nfe=nfe, grid=grid, n=n, seeds=seed, noise=noise,  # type: ignore[arg-type]
            condition=None if labels is None else {"label": labels}, batch_size=size, compile=compile,
            progress=not quiet, x0s=gif is not None,
        )  # fmt: skip
    picture = images.grid(solution.x.cpu(), columns, labels=names, caption=_caption(solution))
    images.save_png(out, picture, facts=_facts(solution, model, denoiser, half))
    if gif is not None:
        assert solution.x0s is not None
        frames = [images.grid(x0.float().cpu(), columns, labels=names, caption=f"call {k + 1} of {len(solution.x0s)}")
                  for k, x0 in enumerate(solution.x0s)]  # fmt: skip
        images.save_gif(gif, frames)
    if not quiet:
        typer.echo(str(solution))
        typer.echo(f"written  {out}" + (f", {gif}" if gif is not None else ""))


def _classes(
    classes: str | None, n: int, denoiser: Pretrained
) -> tuple[Tensor | None, list[str] | None, int | None]:
    """The label of every picture, its name, and the columns of the picture."""
    if not denoiser.num_classes:
        if classes not in (None, "none"):
            raise ValueError(
                "this model is unconditional: it knows no classes; leave --classes out"
            )
        return None, None, None
    known = [
        *denoiser.class_names,
        *map(str, range(len(denoiser.class_names), denoiser.num_classes)),
    ]
    numbers = {name.lower(): i for i, name in enumerate(known)} | {
        str(i): i for i in range(denoiser.num_classes)
    }
    if classes == "none":
        return torch.full((n,), denoiser.num_classes), None, None
    asked = known if classes is None or classes == "all" else pick_names(classes)
    chosen = []
    for name in asked or known:
        if name.lower() not in numbers:
            raise unknown("class", name, numbers)
        chosen.append(numbers[name.lower()])
    labels = torch.tensor([chosen[i % len(chosen)] for i in range(n)])
    columns = len(chosen) if 1 < len(chosen) <= 12 else None
    return labels, [known[i] for i in labels.tolist()], columns


def _caption(solution: Solution) -> str:
    name, process = type(solution.solver).__name__, type(solution.process).__name__
    return (
        f"{name}, {process}, NFE {solution.nfe}, seeds {solution.seeds[0]} to {solution.seeds[-1]}"
    )


def _facts(solution: Solution, model: str, denoiser: Pretrained, half: bool) -> dict[str, Any]:
    """How the pictures were made, to travel in the file; nothing that differs between two equal
    runs.
    """
    return {
        "model": model, "solver": repr(solution.solver), "process": repr(solution.process), "grid": solution.grid,
        "nfe": solution.nfe, "seeds": list(solution.seeds), "noise": solution.noise, "version": solution.version,
        "dtype": "bfloat16" if half else "float32", "class_names": list(denoiser.class_names),
        "labels": solution.condition["label"].tolist() if "label" in solution.condition else None,
    }  # fmt: skip
