"""The command `sdeflow train`; its options are the fields of the configurations."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from sdeflow._utils.distributed import this_rank
from sdeflow.models.unet import UNetConfig
from sdeflow.training.api import stored_config
from sdeflow.training.api import train as run_training
from sdeflow.training.config import LENGTH, TrainConfig

EPILOG = """
Examples:

    sdeflow train                                      CIFAR-10 from the hub, into runs/train

    sdeflow train --data photos/ --size 64 --out runs/photos

    sdeflow train --data train.parquet --images 5000000 --max-seconds 3000

    sdeflow train --data train.parquet --init cifar10 --images 5000000    begin from the bundled network

    sdeflow train --out runs/photos --resume           go on, exactly where it stopped

    torchrun --nproc-per-node 2 -m sdeflow train --data train.parquet
"""


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is not a list of whole numbers such as 1,2,2"
        ) from error


def train(
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the folder's state; options given replace its."),
    ] = False,
    export: Annotated[
        Path | None, typer.Option(help="Write the averaged network in half precision here too.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="The length of the training in steps.", rich_help_panel=LENGTH),
    ] = None,
    **given: Any,
) -> None:
    """Train a denoiser on images: EDM loss, mixed precision, moving average. A training can be
    stopped at any moment and resumed exactly.
    """
    given = {name: value for name, value in given.items() if value is not None}
    out = given.setdefault("out", TrainConfig.out)
    network = {f.name: given.pop(f.name) for f in fields(UNetConfig) if f.name in given}
    for name in {"multipliers", "attention"} & {*network}:
        network[name] = _numbers(network[name])
    stored = stored_config(out) if resume else None
    config = stored or TrainConfig()
    given.setdefault("max_seconds", None)  # a limit of one run, never taken over from the last
    if steps is not None:
        given["images"] = steps * given.get("batch_size", config.batch_size)
    if "size" in network:
        given["size"] = network["size"]
    elif stored is None:  # the data will tell; until then any size that can be halved
        network["size"] = 1 << max(5, len(network.get("multipliers", ())) - 1)
    config = replace(config, **given, model=replace(config.model, **network))
    result = run_training(config, resume=resume, export=export)
    if this_rank().first:
        typer.echo(
            f"{'finished' if result.finished else 'paused'} at {result.images} images, loss"
            f" {result.loss:.4f}; {result.out}"
        )


def _options() -> Iterator[inspect.Parameter]:
    """The options that the fields of the configurations are."""
    for config in (TrainConfig, UNetConfig):
        types = get_type_hints(config)
        for f in fields(config):
            if "help" in f.metadata:
                yield _option(f, types[f.name])


def _option(f: Field[Any], kind: Any) -> inspect.Parameter:
    name = f.name.replace("_", "-")
    switch = [f"--{name}/--no-{name}"] if kind in (bool, bool | None) else []
    shown = typer.Option(*switch, help=f.metadata["help"], rich_help_panel=f.metadata["panel"])
    value = str if kind == tuple[int, ...] else kind
    return inspect.Parameter(
        f.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[value | None, shown],
    )


def _signature() -> inspect.Signature:
    """What typer reads: the options of the configurations and those of `train` itself, by panel."""
    own = inspect.signature(train, eval_str=True).parameters.values()
    named = [p.replace(kind=p.KEYWORD_ONLY) for p in own if p.kind != p.VAR_KEYWORD]
    every = [*_options(), *named]
    panels = [p.annotation.__metadata__[0].rich_help_panel for p in every]
    order = sorted(
        range(len(every)), key=lambda i: (panels[i] is not None, panels.index(panels[i]))
    )
    return inspect.Signature([every[i] for i in order])


train.__signature__ = _signature()  # type: ignore[attr-defined]
