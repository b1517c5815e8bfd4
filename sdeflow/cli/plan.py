"""The command `sdeflow plan`: a solver over a grid as a table of numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdeflow import registry
from sdeflow._utils.files import check_writable
from sdeflow.errors import BudgetError, SolverError
from sdeflow.plan.plan import Plan
from sdeflow.process import Process
from sdeflow.solvers.base import GridSolver

EPILOG = """
Examples:

    sdeflow plan                       the default under EDM at 9 calls, as a table

    sdeflow plan --solver adams3 --process vp --nfe 10 --check

    sdeflow plan --solver ddpm --process cosine --grid uniform_lam --nfe 20 --plot plan.png

    sdeflow plan --solver adams3 --process vp --nfe 10 --out adams.plan.safetensors --quiet

    sdeflow plan --file adams.plan.safetensors --check
"""


def plan(
    solver: Annotated[
        str, typer.Option(help="A name from 'sdeflow info solvers' that steps over a grid.")
    ] = "auto",
    process: Annotated[str, typer.Option(help="A name from 'sdeflow info processes'.")] = "edm",
    nfe: Annotated[int, typer.Option(help="Network calls, exactly.")] = 9,
    grid: Annotated[
        str | None,
        typer.Option(
            help="A name from 'sdeflow info grids' (default: what suits solver and process)."
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="Take the plan in this file instead; it brings its solver, process and grid."
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Say how consistent it is, and which polynomials its steps reproduce."
        ),
    ] = False,
    predicts: Annotated[
        str,
        typer.Option(
            "--predicts",
            "--frame",
            help="Predictions as x0, eps, v or flow, in the matrix and the figure.",
        ),
    ] = "x0",
    matrix: Annotated[
        bool,
        typer.Option(
            "--matrix", help="Print the unrolled matrix: every call's input in terms of the start."
        ),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Plot it into this PNG; needs matplotlib.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Save it here: as safetensors if it ends so, else as JSON.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Do not print the table.")] = False,
) -> None:
    """Show a solver as what is executed: a table of numbers."""
    for path in (plot, out):
        if path is not None:
            check_writable(path, "plan" if path is out else "plot")
    if file is not None:
        made, along = Plan.load(file), None
    else:
        along = registry.process(process)
        made = _trace(solver, along, nfe, grid)
    if not quiet:
        typer.echo(str(made))
    if matrix:
        typer.echo("\n" + str(made.unrolled(predicts)))
    if check:
        typer.echo("\n" * (not quiet) + str(made.check(along)))
    if plot is not None:
        made.plot(plot, predicts)
    if out is not None:
        made.save(out)
    if (plot or out) and not quiet:
        typer.echo(f"\nwritten  {', '.join(str(path) for path in (plot, out) if path is not None)}")


def _trace(name: str, process: Process, nfe: int, grid: str | None) -> Plan:
    """The plan of a solver's name with so many calls."""
    method = registry.solver(name)
    if not isinstance(method, GridSolver):
        raise ValueError(
            f"{name} chooses its steps by the state, and has no plan; sdeflow info solvers names"
            " those that have"
        )
    levels = method.levels(nfe)
    chosen = grid or method.default_grid or process.default_grid
    times = registry.grid_function(chosen)(process, levels)
    if len(times) != levels:
        raise BudgetError(
            f"the grid {chosen} has {len(times)} levels; {name} needs {levels} for nfe={nfe}"
        )
    try:
        return method.plan(process, times)
    except SolverError as error:  # a clock that is infinite at the end of time, say
        raise ValueError(str(error)) from error
