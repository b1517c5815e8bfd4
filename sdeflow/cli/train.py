"""The command `sdeflow train`; its options are the fields of the configurations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from sdeflow._utils.distributed import this_rank
from sdeflow.cli.options import leave
from sdeflow.models.unet import UNetConfig
from sdeflow.training.api import stored_config
from sdeflow.training.api import train as run_training
from sdeflow.training.config import LENGTH, TrainConfig

EPILOG = """
Examples:

    sdeflow train                                      CIFAR-10 from the hub, into runs/train

    sdeflow train --data photos/ --size 64 --out runs/photos

    sdeflow train --data train.parquet --images 5000000 --max-seconds 3000

    sdeflow train --data train.parquet --init cifar10 --images 5000000    from the bundled network

    sdeflow train --out runs/photos --resume           continue exactly where it stopped

    torchrun --nproc-per-node 2 -m sdeflow train --data train.parquet
"""


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is not a list of whole numbers such as 1,2,2"
        ) from error


def _train(options: Any) -> None:
    """Train a denoiser on images: EDM loss, mixed precision, moving average. A training can be
    stopped at any moment and resumed exactly.
    """
    given = {name: value for name, value in vars(options).items() if value is not None}
    resume, export, steps = (given.pop(name, None) for name in ("resume", "export", "steps"))
    out = given["out"] = str(given.get("out", TrainConfig.out))
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
    result = run_training(config, resume=bool(resume), export=export)
    if this_rank().first:
        typer.echo(
            f"{'finished' if result.finished else 'paused'} at {result.images} images, loss"
            f" {result.loss:.4f}; {result.out}"
        )
    leave(result.reason)


def _options() -> Iterator[tuple[str, Any, Any]]:
    """Name, annotated type and default of every option: those of the configurations, and three."""
    for config in (UNetConfig, TrainConfig):
        types = get_type_hints(config)
        for f in fields(config):
            if "help" in f.metadata:
                name, kind = f.name.replace("_", "-"), types[f.name]
                switch = [f"--{name}/--no-{name}"] if kind in (bool, bool | None) else []
                panel = f.metadata["panel"]
                shown = typer.Option(*switch, help=f.metadata["help"], rich_help_panel=panel)
                value = str if kind == tuple[int, ...] else kind
                yield f.name, Annotated[value | None, shown], None
    resume = "Go on from the folder's state, if it has one; options given replace the stored ones."
    export = "Write the averaged network in half precision here too."
    yield "resume", Annotated[bool, typer.Option("--resume", help=resume)], False
    yield "export", Annotated[Path | None, typer.Option(help=export)], None
    steps = typer.Option(help="The length of the training in steps.", rich_help_panel=LENGTH)
    yield "steps", Annotated[int | None, steps], None


_EVERY: list[tuple[str, Any, Any]] = sorted(
    _options(), key=lambda option: option[1].__metadata__[0].rich_help_panel or ""
)
# Only a class can get its arguments from a list; typer calls it as it calls a function.
train = make_dataclass(
    "train",
    _EVERY,
    kw_only=True,
    namespace={"__post_init__": _train, "__doc__": _train.__doc__},
)
