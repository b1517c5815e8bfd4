"""The command line: a thin layer over the library's functions.

Exit status: 0; 1 where something failed (a damaged checkpoint, a full disk, NaN from the network);
2 for an impossible request (an unknown name, a budget that cannot be spent); 130 after Ctrl-C and
143 after SIGTERM, also where what was done until then is kept.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any

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
    given = sys.argv[1:] if arguments is None else list(arguments)
    if (hint := _foreign(given)) is not None:
        typer.echo(f"error: {hint}", err=True)
        sys.exit(2)
    try:
        app(given)
    except KeyboardInterrupt:
        sys.exit(130)
    except (SdeflowError, ValueError, TypeError, OSError, MemoryError) as error:
        typer.echo(f"error: {_in_options(str(error), given)}", err=True)
        sys.exit(2 if _is_usage(error) else 1)
    except RuntimeError as error:  # torch has no other class for exhausted memory
        if "memory" not in str(error):
            raise
        typer.echo(f"error: {str(error).splitlines()[0]}; try a smaller --batch-size", err=True)
        sys.exit(1)


ELSEWHERE = {
    **dict.fromkeys(
        ("--steps", "--num-steps", "--num-inference-steps", "--num_inference_steps"),
        "--nfe, the number of network calls, which is what a solve costs",
    ),
    **dict.fromkeys(("--sampler", "--scheduler", "--method"), "--solver"),
    **dict.fromkeys(("--num-images", "--num-samples", "--num_samples"), "--n"),
    **dict.fromkeys(("--schedule", "--sigmas", "--timesteps"), "--grid"),
    **dict.fromkeys(("--checkpoint", "--ckpt", "--network"), "--model"),
    **dict.fromkeys(("--output", "--outdir", "--out-dir"), "--out"),
    **dict.fromkeys(("--tol", "--tolerance"), "--rtol"),
    **dict.fromkeys(("--class", "--labels"), "--classes"),
    **dict.fromkeys(("--seeds",), "--seed, that of the first image"),
    **dict.fromkeys(("--batch",), "--batch-size"),
}
"""Options of other projects, and what they are called here."""


def _foreign(arguments: Sequence[str]) -> str | None:
    """What an option of another project is called here, if the first that the command does not know
    is one.
    """
    known = _options(arguments)
    for argument in arguments[1:]:
        name = argument.partition("=")[0]
        ours = ELSEWHERE.get(name, "")
        if name not in known and ours.partition(",")[0] in known:
            return f"{arguments[0]} has no {name}: it is called {ours}"
    return None


def _in_options(said: str, arguments: Sequence[str]) -> str:
    """What an error says, with the library's arguments (`nfe=`) as the command's options
    (`--nfe`).
    """
    for option in _options(arguments):
        said = re.sub(rf"\b{option[2:].replace('-', '_')}=(?![\w.'(\[-])", option, said)
    return said


def _options(arguments: Sequence[str]) -> set[str]:
    """The long options of the command that is called; none for an unknown one."""
    commands: Any = typer.main.get_command(app)
    command = commands.commands.get(arguments[0]) if arguments else None
    names = (name for option in getattr(command, "params", ()) for name in option.opts)
    return {name for name in names if name.startswith("--")}


def _is_usage(error: Exception) -> bool:
    """Whether the request itself is impossible, as opposed to a failure while it runs."""
    if isinstance(error, SdeflowError):
        return isinstance(error, UnknownNameError | BudgetError | GridError)
    return isinstance(error, ValueError | TypeError)
