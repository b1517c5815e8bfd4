"""The options that several commands have, word for word, and what they mean."""

from __future__ import annotations

import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from sdeflow import registry
from sdeflow.models.checkpoint import Pretrained, load
from sdeflow.plan.files import SUFFIX
from sdeflow.plan.plan import Plan
from sdeflow.solvers.adaptive.step_size import PerSample
from sdeflow.solvers.base import Solver

HOW, MACHINE = "How", "Machine and files"
how, machine = (partial(typer.Option, rich_help_panel=panel) for panel in (HOW, MACHINE))

ClassesOption = Annotated[
    str,
    typer.Option(
        help="Names or numbers of classes, with commas; image i takes its turn. 'all' of them, or"
        " 'none' for no label."
    ),
]
SeedOption = Annotated[int, how(help="Seed of image 0; image i has seed + i.")]
SolverOption = Annotated[
    str,
    how(help="A name from 'sdeflow info solvers', or the file of a plan that was saved."),
]
NfeOption = Annotated[
    int | None, how(help="Network calls, exactly (default: 35; not for adaptive solvers).")
]
ProcessOption = Annotated[
    str | None, how(help="A name from 'sdeflow info processes' (default: the model's own).")
]
GridOption = Annotated[
    str | None,
    how(help="A name from 'sdeflow info grids' (default: what suits model and process)."),
]
RtolOption = Annotated[float | None, how(help="Tolerance of an adaptive solver (default: 1e-3).")]
NoiseOption = Annotated[str, how(help="seeded, or brownian: the same path at every NFE.")]
ModelOption = Annotated[str, machine(help="A bundled model or a file that 'sdeflow train' wrote.")]
DeviceOption = Annotated[
    str,
    machine(help="cpu, cuda, cuda:1 ...; auto takes a GPU if there is one, each process its own."),
]
CompileOption = Annotated[
    bool,
    machine(
        "--compile",
        help="Compile the network (a minute or so) and run each batch as one CUDA graph.",
    ),
]
HalfOption = Annotated[bool, machine("--half", help="Run the network in bfloat16.")]
QuietOption = Annotated[bool, machine("--quiet", help="No progress bar, no summary.")]


def pick_solver(name: str, rtol: float | None, nfe: int | None = None) -> Solver | Plan:
    """The solver of a name, with a tolerance where one is given, or the plan in a file;
    `ValueError` for one that takes no tolerance, or no budget.
    """
    if Path(name).suffix in (".json", SUFFIX) or Path(name).is_file():
        if rtol is not None:
            raise ValueError(f"--rtol is the tolerance of an adaptive solver; {name} is a plan")
        return Plan.load(name)
    method = registry.solver(name)
    if nfe is not None and method.adaptive:
        remedy = (
            "set its accuracy with --rtol" if isinstance(method, PerSample) else "it takes neither"
        )
        raise ValueError(
            f"{name} is adaptive and chooses its own number of network calls: leave --nfe out, and"
            f" {remedy}; or take a solver of exactly --nfe calls, such as heun or auto"
        )
    if rtol is None:
        return method
    if not isinstance(method, PerSample):
        raise ValueError(
            f"--rtol is the tolerance of an adaptive solver, such as rk45; {name} takes --nfe"
        )
    return replace(method, rtol=rtol, atol=rtol)


def leave(reason: str) -> None:
    """End the command with the status that goes with why it stopped early: 130 after Ctrl-C, 143
    after SIGTERM, as shells have it, so that `generate && evaluate` does not go on with a half.
    """
    if reason.startswith("SIG"):
        raise typer.Exit(128 + signal.Signals[reason].value)


def pick_batch_size(text: str | None) -> int | Literal["auto"] | None:
    """The batch size that an option means; `ValueError` for what is none."""
    if text is None or text == "auto":
        return text  # type: ignore[return-value]
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--batch-size is a whole number, at least 1, or auto; got {text!r}")
    return int(text)


def pick_names(text: str) -> list[str]:
    """The names in an option that takes several, with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def pick_classes(text: str) -> Literal["all", "none"] | list[str]:
    """The classes that an option means, as `generate` takes them."""
    return text if text in ("all", "none") else pick_names(text)  # type: ignore[return-value]


def open_model(name: str, device: torch.device, half: bool, compile: bool) -> Pretrained:
    """The model of a name or a file, in float32 or bfloat16.

    It is compiled where that serves: on a GPU.
    """
    dtype = torch.bfloat16 if half else torch.float32
    return load(name, device, dtype, compile=compile and device.type == "cuda")
