"""The command `sdeflow sample`."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor

from sdeflow import images, registry
from sdeflow._files import check_writable
from sdeflow.compiled import CompileWarning
from sdeflow.errors import unknown
from sdeflow.models.checkpoint import Pretrained, load
from sdeflow.sampling import check_device, solve
from sdeflow.solvers.base import Solution, Solver
from sdeflow.solvers.control import PerSample

HOW, MACHINE = "How", "Machine and files"
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
            help="Names or numbers of classes, with commas; taken in turn. All of them by default; 'none' for no label."
        ),
    ] = None,
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
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the others follow.", rich_help_panel=HOW)] = 0,
    model: Annotated[
        str, typer.Option(help="A bundled model or a file that 'sdeflow train' wrote.", rich_help_panel=MACHINE)
    ] = "cifar10",
    out: Annotated[Path, typer.Option(help="The picture to write, PNG.", rich_help_panel=MACHINE)] = Path(
        "samples.png"
    ),
    gif: Annotated[
        Path | None,
        typer.Option(help="Write the predictions of x0 over time here too, as GIF.", rich_help_panel=MACHINE),
    ] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(help="At most so many at a time; auto: what fits into memory.", rich_help_panel=MACHINE),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.", rich_help_panel=MACHINE)
    ] = "auto",
    compile: Annotated[
        bool, typer.Option("--compile", help="Run each batch as one CUDA graph.", rich_help_panel=MACHINE)
    ] = False,
    half: Annotated[bool, typer.Option("--half", help="Run the network in bfloat16.", rich_help_panel=MACHINE)] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No progress bar, no summary.", rich_help_panel=MACHINE)
    ] = False,
) -> None:
    """Draw samples from a model into a labelled picture."""
    for picture_path in (out, gif):
        if picture_path is not None:
            check_writable(picture_path, "picture")
    method, size = pick_solver(solver, rtol), pick_batch_size(batch_size)
    along = None if process is None else registry.process(process)
    place = pick_device(device)
    denoiser = load(model, place, torch.bfloat16 if half else torch.float32)
    labels, names, columns = _classes(classes, n, denoiser)
    if not quiet:
        typer.echo(f"{model}: {n} pictures of {'x'.join(map(str, denoiser.shape or ()))} on {place}", err=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompileWarning)  # the summary says it
        solution = solve(
            denoiser, along, solver=method, nfe=nfe, grid=grid, n=n, seeds=seed, noise=noise,  # type: ignore[arg-type]
            condition=None if labels is None else {"label": labels}, batch_size=size, compile=compile,
            progress=not quiet, x0s=gif is not None,
        )  # fmt: skip
    picture = images.grid(solution.x.cpu(), columns, labels=names, caption=_caption(solution))
    images.save_png(out, picture, facts=_facts(solution, model, denoiser))
    if gif is not None:
        assert solution.x0s is not None
        frames = [images.grid(x0.float().cpu(), columns, labels=names, caption=f"call {k + 1} of {len(solution.x0s)}")
                  for k, x0 in enumerate(solution.x0s)]  # fmt: skip
        images.save_gif(gif, frames)
    if not quiet:
        typer.echo(str(solution))
        typer.echo(f"written  {out}" + (f", {gif}" if gif is not None else ""))


def pick_device(name: str) -> torch.device:
    """The device of a name; `auto` is a GPU where there is one. `ValueError` for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return check_device(name)


def pick_solver(name: str, rtol: float | None) -> Solver:
    """The solver of a name, with a tolerance where one is given; `ValueError` for one that takes none."""
    method = registry.solver(name)
    if rtol is None:
        return method
    if not isinstance(method, PerSample):
        raise ValueError(f"--rtol is the tolerance of an adaptive solver, such as rk45; {name} takes --nfe")
    return replace(method, rtol=rtol, atol=rtol)


def pick_batch_size(text: str | None) -> int | Literal["auto"] | None:
    """The batch size that an option means; `ValueError` for what is none."""
    if text is None or text == "auto":
        return text  # type: ignore[return-value]
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--batch-size is a whole number, at least 1, or auto; got {text!r}")
    return int(text)


def _classes(classes: str | None, n: int, denoiser: Pretrained) -> tuple[Tensor | None, list[str] | None, int | None]:
    """The label of every picture, its name, and the columns of the picture."""
    if not denoiser.num_classes:
        if classes not in (None, "none"):
            raise ValueError("this model is unconditional: it knows no classes; leave --classes out")
        return None, None, None
    known = [*denoiser.class_names, *map(str, range(len(denoiser.class_names), denoiser.num_classes))]
    numbers = {name.lower(): i for i, name in enumerate(known)} | {str(i): i for i in range(denoiser.num_classes)}
    if classes == "none":
        return torch.full((n,), denoiser.num_classes), None, None
    asked = [part.strip() for part in classes.split(",") if part.strip()] if classes else known
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
    return f"{name}, {process}, NFE {solution.nfe}, seeds {solution.seeds[0]} to {solution.seeds[-1]}"


def _facts(solution: Solution, model: str, denoiser: Pretrained) -> dict[str, Any]:
    """How the pictures were made, to travel in the file; nothing that differs between two equal runs."""
    return {
        "model": model, "solver": repr(solution.solver), "process": repr(solution.process), "grid": solution.grid,
        "nfe": solution.nfe, "seeds": list(solution.seeds), "noise": solution.noise, "version": solution.version,
        "class_names": list(denoiser.class_names),
        "labels": solution.condition["label"].tolist() if "label" in solution.condition else None,
    }  # fmt: skip
