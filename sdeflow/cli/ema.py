"""The command `sdeflow ema`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdeflow._utils.files import check_writable, write_atomically
from sdeflow.models.ema.posthoc import MAX_ERROR, fit, reconstruct, select
from sdeflow.training.api import card_markdown

STDS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25)
EPILOG = """
Examples:

    sdeflow ema runs/photos                        what can be made of it

    sdeflow ema runs/photos --std 0.08 --export model.safetensors

    sdeflow ema runs/photos --std 0.1 --images 5000000 --export 5m.safetensors
"""


def ema(
    folder: Annotated[
        Path, typer.Argument(help="The folder of a training that stored averages of its weights.")
    ],
    std: Annotated[
        float | None,
        typer.Option(
            help=(
                "The average's length: the standard deviation of its profile over the training's"
                " length."
            )
        ),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(help="Where in the training it ends (default: the last stored average)."),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(help="Write the network with this average, in half precision, here."),
    ] = None,
    max_error: Annotated[
        float,
        typer.Option(help="Refuse an average whose profile is off by more than this fraction."),
    ] = MAX_ERROR,
) -> None:
    """Choose the length of the average of a training's weights after the training."""
    if std is None:
        if export is not None:
            raise ValueError(
                "say with --std how long the average is to be, 0.05 to 0.15 for instance"
            )
        typer.echo(_listing(folder, images))
        return
    if export is None:
        raise ValueError(
            "say with --export where to write the network, model.safetensors for instance"
        )
    check_writable(export, "model")
    made = reconstruct(folder, std, images, max_error=max_error, progress=True)
    made.save(export)
    write_atomically(export.with_suffix(".md"), card_markdown(made.card).encode(), "model card")
    typer.echo(
        f"std {std:g} after {made.images} images, of {len(made.snapshots)} stored averages; its"
        f" profile is off by {made.error:.2g}\n{export}"
    )


def _listing(folder: Path, images: int | None) -> str:
    """What is stored in `folder`, and how well the averages of other lengths can be made of it."""
    found, images = select(folder, images)
    size = sum(s.path.stat().st_size for s in found)
    lines = [
        f"{len(found)} averages in {folder}, {size / 1e6:.1f} MB",
        "",
        "   std    stored   from image     to image",
    ]
    for std in sorted({s.std for s in found}):
        seen = [s.images for s in found if s.std == std]
        lines.append(f"{std:6.4f}  {len(seen):8}  {min(seen):11}  {max(seen):11}")
    lines += ["", f"what can be made of them after {images} images", "   std  profile off by"]
    for std, error in zip(STDS, fit(found, STDS, images)[1].tolist(), strict=True):
        lines.append(f"{std:6.4f}  {error:7.1e}{'' if error <= MAX_ERROR else '  too much'}")
    return "\n".join(lines)
