"""The command line: a thin layer over the library's functions.

Exit status: 0; 1 where something failed (a damaged checkpoint, a full disk, NaN from the network)
or was interrupted; 2 for an impossible request (an unknown name, a budget that cannot be spent).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from sdeflow._version import __version__
from sdeflow.cli import ema, evaluate, generate, info, plan, sample, train
from sdeflow.errors import BudgetError, GridError, SdeflowError, UnknownNameError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command(epilog=sample.EPILOG)(sample.sample)
app.command(epilog=train.EPILOG)(train.train)
app.command(epilog=generate.EPILOG)(generate.generate)
app.command(epilog=evaluate.EPILOG)(evaluate.evaluate)
app.command(epilog=ema.EPILOG)(ema.ema)
app.command(epilog=info.EPILOG)(info.info)
app.command(epilog=plan.EPILOG)(plan.plan)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sdeflow {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Say which version this is.", callback=_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Numerical SDE and ODE solvers for diffusion models: sample, train, evaluate, and list what
    there is.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an error is one line, without a traceback."""
    try:
        app(None if arguments is None else list(arguments))
    except (SdeflowError, ValueError, TypeError, OSError, MemoryError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2 if _is_usage(error) else 1)
    except RuntimeError as error:  # torch has no other class for exhausted memory
        if "memory" not in str(error):
            raise
        typer.echo(f"error: {str(error).splitlines()[0]}; try a smaller --batch-size", err=True)
        sys.exit(1)


def _is_usage(error: Exception) -> bool:
    """Whether the request itself is impossible, as opposed to a failure while it runs."""
    if isinstance(error, SdeflowError):
        return isinstance(error, UnknownNameError | BudgetError | GridError)
    return isinstance(error, ValueError | TypeError)
