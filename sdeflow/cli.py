"""The command line: a thin shell over the library's functions.

Exit status: 0; 1 where something failed (a damaged checkpoint, a full disk, NaN from the network); 2 where it was asked
for what cannot be (an unknown name, an impossible budget); 130 after Ctrl-C.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any

import typer

from sdeflow import cli_info, cli_sample, cli_train
from sdeflow._version import __version__
from sdeflow.errors import BudgetError, GridError, SdeflowError, UnknownNameError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _friendly(command: Callable[..., None]) -> Callable[..., None]:
    """The command with errors told in a line instead of a traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except (SdeflowError, ValueError, TypeError, OSError, MemoryError) as error:
            typer.echo(f"error: {error}", err=True)
            asked = isinstance(error, UnknownNameError | BudgetError | GridError)
            usage = asked or (isinstance(error, ValueError | TypeError) and not isinstance(error, SdeflowError))
            raise typer.Exit(2 if usage else 1) from error

    return run


app.command(epilog=cli_sample.EPILOG)(_friendly(cli_sample.sample))
app.command(epilog=cli_train.EPILOG)(_friendly(cli_train.train))
app.command(epilog=cli_info.EPILOG)(_friendly(cli_info.info))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sdeflow {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Say which version this is.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Numerical SDE and ODE solvers for diffusion models: draw samples, train, and see what there is."""


def main() -> None:
    """Run the command line."""
    app()
