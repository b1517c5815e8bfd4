"""The command `sdeflow sample`."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from sdeflow import images
from sdeflow._utils.files import check_writable
from sdeflow.cli import options
from sdeflow.cli.options import machine, open_model, pick_batch_size, pick_classes, pick_solver
from sdeflow.images.labels import Labels
from sdeflow.models.checkpoint import Pretrained
from sdeflow.sampling.api import run
from sdeflow.sampling.cuda_graphs import CompileWarning
from sdeflow.sampling.inputs import named_device
from sdeflow.sampling.request import Request
from sdeflow.solvers.base import Solution

EPILOG = """
Examples:

    sdeflow sample                           20 images from the bundled model, into samples.png

    sdeflow sample --classes cat,dog,ship --n 9 --seed 7

    sdeflow sample --process rectified_flow --solver ddim --nfe 10

    sdeflow sample --solver rk45 --rtol 1e-4

    sdeflow sample --solver euler_maruyama --process vp --nfe 100 --gif samples.gif

    sdeflow sample --model runs/photos/model.safetensors --out photos.png
"""


def sample(
    n: Annotated[int, typer.Option(help="How many images.", min=1)] = 20,
    classes: options.ClassesOption = "all",
    solver: options.SolverOption = "auto",
    nfe: options.NfeOption = None,
    process: options.ProcessOption = None,
    grid: options.GridOption = None,
    rtol: options.RtolOption = None,
    noise: options.NoiseOption = "seeded",
    seed: options.SeedOption = 0,
    model: options.ModelOption = "cifar10",
    out: Annotated[Path, machine(help="The image to write, PNG.")] = Path("samples.png"),
    gif: Annotated[
        Path | None, machine(help="Write the predictions of x0 over time here too, as GIF.")
    ] = None,
    batch_size: Annotated[
        str | None, machine(help="At most so many at a time; auto: what fits into memory.")
    ] = None,
    device: options.DeviceOption = "auto",
    compile: options.CompileOption = False,
    half: options.HalfOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Sample images from a model, into one labelled PNG file."""
    for option, suffix, path in (("--out", ".png", out), ("--gif", ".gif", gif)):
        if path is not None:
            if path.suffix.lower() not in ("", suffix):
                raise ValueError(
                    f"{option} is written as {suffix[1:].upper()}: call it"
                    f" {path.with_suffix(suffix)}, not {path}"
                )
            check_writable(path, "image")
    method, at_once = pick_solver(solver, rtol, nfe), pick_batch_size(batch_size)
    place = named_device(device)
    denoiser = open_model(model, place, half, compile)
    labels = Labels.of(denoiser, pick_classes(classes))
    label, names, columns = labels.given(range(n)), _names(labels, n, denoiser), len(labels.cycle)
    if not quiet:
        size = "x".join(map(str, denoiser.shape or ()))
        typer.echo(f"{model}: {n} images of {size} on {place}", err=True)
    request = Request(
        score_fn=denoiser,
        process=process,
        solver=method,
        nfe=nfe,
        grid=grid,
        noise=noise,  # type: ignore[arg-type]
        batch_size=at_once,
        compile=compile,
        n=n,
        seeds=seed,
        condition=None if label is None else {"label": label},
        progress=not quiet,
        x0s=gif is not None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompileWarning)  # the summary says it
        solution, stopped = _run(request)
    names = None if names is None else names[: len(solution.x)]
    sheet = partial(images.grid, columns=columns if 1 < columns <= 12 else None, labels=names)
    facts = _facts(solution, model, denoiser, half)
    images.save_png(out, sheet(solution.x.cpu(), caption=_caption(solution)), facts=facts)
    if gif is not None:
        assert solution.x0s is not None
        x0s, calls = solution.x0s.cpu().float(), len(solution.x0s)
        frames = [sheet(x0, caption=f"call {k} of {calls}") for k, x0 in enumerate(x0s, 1)]
        images.save_gif(gif, frames)
    if not quiet:
        typer.echo(str(solution))
        typer.echo(f"written  {out}" + (f", {gif}" if gif is not None else ""))
    if stopped:
        typer.echo(f"stopped with {len(solution.x)} of {n} images finished: {out}", err=True)
        raise typer.Exit(130)


def _run(request: Request) -> tuple[Solution, bool]:
    """The solution, and whether Ctrl-C stopped it: then it is that of the finished batches."""
    try:
        return run(request), False
    except KeyboardInterrupt as error:
        finished = getattr(error, "finished", None)
        if finished is None:
            raise
        return finished, True


def _names(labels: Labels, n: int, denoiser: Pretrained) -> list[str] | None:
    """The name of each image's class; None without labels."""
    if not labels.cycle:
        return None
    known = dict(enumerate(denoiser.class_names))
    return [known.get(i, str(i)) for i in labels.numbers(range(n)).tolist()]


def _caption(solution: Solution) -> str:
    name, process = _solver(solution).partition("(")[0], type(solution.process).__name__
    first, last = solution.seeds[0], solution.seeds[-1]
    return f"{name}, {process}, NFE {solution.nfe}, seeds {first} to {last}"


def _solver(solution: Solution) -> str:
    """The solver in words, whether it came by name or as a saved plan."""
    if solution.solver is None and solution.plan is not None:
        return solution.plan.solver
    return repr(solution.solver)


def _facts(solution: Solution, model: str, denoiser: Pretrained, half: bool) -> dict[str, Any]:
    """How the images were made, to be kept in the file; equal for two equal runs."""
    how = solution.provenance
    label = how.condition.get("label")
    return {
        "model": model,
        "solver": _solver(solution),
        "process": repr(how.process),
        "grid": how.grid,
        "nfe": solution.nfe,
        "seeds": list(how.seeds),
        "noise": how.noise,
        "version": how.version,
        "dtype": "bfloat16" if half else "float32",
        "class_names": list(denoiser.class_names),
        "labels": None if label is None else label.tolist()[: len(solution.x)],
    }
