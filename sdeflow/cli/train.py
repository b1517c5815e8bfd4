"""The command `sdeflow train`."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sdeflow._utils.distributed import this_rank
from sdeflow.models.unet import UNetConfig
from sdeflow.training.api import stored_config
from sdeflow.training.api import train as run_training
from sdeflow.training.config import TrainConfig

LENGTH, MODEL, MACHINE = "Length and optimizer", "Network", "Machine and files"
EPILOG = """
Examples:

    sdeflow train                                      CIFAR-10 from the hub, into runs/train

    sdeflow train --data photos/ --size 64 --out runs/photos

    sdeflow train --data train.parquet --images 5000000 --max-seconds 3000

    sdeflow train --data train.parquet --init cifar10 --images 5000000    begin from the bundled network

    sdeflow train --out runs/photos --resume           go on, exactly where it stopped

    torchrun --nproc-per-node 2 -m sdeflow train --data train.parquet
"""


def _numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is not a list of whole numbers such as 1,2,2"
        ) from error


def train(
    data: Annotated[
        str | None,
        typer.Option(
            help=(
                "A folder of pictures, a parquet file or folder, or a hub name (default:"
                " uoft-cs/cifar10)."
            )
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(help="The folder for state, log, grids of samples and the trained model."),
    ] = Path("runs/train"),
    init: Annotated[
        str | None,
        typer.Option(
            help=(
                "Begin from the weights of a bundled model or a file, and its network (not with"
                " --resume)."
            )
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help=(
                "Go on from the folder's state, if it has one; options given replace the stored"
                " ones."
            ),
        ),
    ] = False,
    export: Annotated[
        Path | None, typer.Option(help="Write the averaged network in half precision here too.")
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(
            help="Train on this many images in total (default: 20000000).", rich_help_panel=LENGTH
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="The same, as a number of steps.", rich_help_panel=LENGTH)
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Images a step, over all processes (default: 512).", rich_help_panel=LENGTH
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate of Adam (default: 0.001).", rich_help_panel=LENGTH),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="Decay after the warm-up: cosine, linear or constant (default: cosine).",
            rich_help_panel=LENGTH,
        ),
    ] = None,
    warmup: Annotated[
        int | None,
        typer.Option(
            help="Images over which the learning rate rises (default: 200000).",
            rich_help_panel=LENGTH,
        ),
    ] = None,
    grad_clip: Annotated[
        float | None,
        typer.Option(help="Largest norm of the gradients (default: 1).", rich_help_panel=LENGTH),
    ] = None,
    ema: Annotated[
        int | None,
        typer.Option(
            help="Half-life of the average, in images (default: 500000).", rich_help_panel=LENGTH
        ),
    ] = None,
    label_dropout: Annotated[
        float | None,
        typer.Option(
            help="Probability of training without the label (default: 0.1).", rich_help_panel=LENGTH
        ),
    ] = None,
    flip: Annotated[
        bool | None,
        typer.Option(
            "--flip/--no-flip",
            help="Mirror half of the images (default: flip).",
            rich_help_panel=LENGTH,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of everything random (default: 0).", rich_help_panel=LENGTH),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            help="Crop and resize pictures to this many pixels (default: the first one's).",
            rich_help_panel=MODEL,
        ),
    ] = None,
    channels: Annotated[
        int | None,
        typer.Option(help="Channels of the finest level (default: 96).", rich_help_panel=MODEL),
    ] = None,
    multipliers: Annotated[
        str | None,
        typer.Option(
            help="Channels of each level over those of the finest (default: 1,2,2).",
            rich_help_panel=MODEL,
        ),
    ] = None,
    blocks: Annotated[
        int | None,
        typer.Option(help="Residual blocks a level (default: 2).", rich_help_panel=MODEL),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(help="Resolutions with attention (default: 16).", rich_help_panel=MODEL),
    ] = None,
    embedding: Annotated[
        int | None,
        typer.Option(
            help="Width of the embedding of noise level and class (default: 192).",
            rich_help_panel=MODEL,
        ),
    ] = None,
    head_channels: Annotated[
        int | None,
        typer.Option(help="Channels of an attention head (default: 64).", rich_help_panel=MODEL),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Channels that are normalised together (default: 16).", rich_help_panel=MODEL
        ),
    ] = None,
    dropout: Annotated[
        float | None,
        typer.Option(help="Dropout inside the blocks (default: 0).", rich_help_panel=MODEL),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="auto, cpu, cuda, cuda:1 (default: auto).", rich_help_panel=MACHINE),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="bf16, float32 or auto (bf16 on a GPU) (default: auto).", rich_help_panel=MACHINE
        ),
    ] = None,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="torch.compile (default: on a GPU).",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    graphs: Annotated[
        bool | None,
        typer.Option(
            "--graphs/--no-graphs",
            help="A step as one CUDA graph (default: on a GPU).",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    max_seconds: Annotated[
        float | None,
        typer.Option(
            help="Save and stop after this long; go on with --resume.", rich_help_panel=MACHINE
        ),
    ] = None,
    save_seconds: Annotated[
        float | None,
        typer.Option(help="Save the state this often (default: 600).", rich_help_panel=MACHINE),
    ] = None,
    sample_images: Annotated[
        int | None,
        typer.Option(
            help="Draw a grid every so many images; 0 is only at the end (default: 2000000).",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    snapshot_images: Annotated[
        int | None,
        typer.Option(
            help="Store averages for 'sdeflow ema' every so many images; 0 is never (default: 0).",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    log_steps: Annotated[
        int | None,
        typer.Option(
            help="Write a line to the log every so many steps (default: 100).",
            rich_help_panel=MACHINE,
        ),
    ] = None,
) -> None:
    """Train a denoiser on images: EDM loss, mixed precision, moving average; stops and resumes
    exactly.
    """
    given: dict[str, Any] = {k: v for k, v in locals().items() if v is not None}
    given["out"] = str(out)
    network: dict[str, Any] = {
        f.name: given[f.name] for f in fields(UNetConfig) if f.name in given and f.name != "size"
    }
    for name in ("multipliers", "attention"):
        if name in network:
            network[name] = _numbers(network[name])
    stored = stored_config(out) if resume else None
    config = stored or TrainConfig()
    # A time limit is of one invocation: it is never taken over from the one before.
    changes = {
        f.name: given[f.name] for f in fields(TrainConfig) if f.name in given and f.name != "model"
    } | {"max_seconds": max_seconds}
    if steps is not None:
        changes["images"] = steps * (batch_size or config.batch_size)
    if (
        size is not None or stored is None
    ):  # without --size the data will tell; until then any size that can be halved
        network["size"] = size or 1 << max(5, len(network.get("multipliers", ())) - 1)
    config = replace(config, **changes, model=replace(config.model, **network))
    result = run_training(config, resume=resume, export=export)
    if this_rank().first:
        typer.echo(
            f"{'finished' if result.finished else 'paused'} at {result.images} images, loss"
            f" {result.loss:.4f}; {result.out}"
        )
