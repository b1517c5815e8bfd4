"""Samples side by side in one image, PNG files with facts, GIFs.

Pillow alone is needed.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from sdeflow._utils.checks import listed, one_of, whole_number
from sdeflow._utils.files import write_atomically
from sdeflow._utils.math import not_finite
from sdeflow.errors import NonFiniteError, SdeflowError

CELL = 128
"""About how many pixels wide an image is shown where no zoom is given."""

FONT_SIZE, LINE = 15, 20
PAPER, INK = (255, 255, 255), (32, 32, 32)
FACTS = "sdeflow"

Resample = Literal["lanczos", "nearest"]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def to_uint8(x: Tensor) -> Tensor:
    """Pixels of images in [-1, 1]: `round(127.5 (x + 1))`, cut off at 0 and 255.

    The result has the same shape and is on the same device.

    Errors: `TypeError` unless `x` is floating-point, `NonFiniteError` where it holds NaN or
    infinity.
    """
    if not x.is_floating_point():
        raise TypeError(f"to_uint8 takes floating-point images in [-1, 1]; got {x.dtype}")
    if not bool(torch.isfinite(x).all()):
        bad = not_finite(x if x.ndim > 3 else x[None])
        raise NonFiniteError(
            f"NaN or infinity in {len(bad)} of the images (number {listed(bad)}): they have no"
            " pixels"
        )
    return ((x.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def grid(
    images: Tensor,
    columns: int | None = None,
    *,
    labels: Sequence[str] | None = None,
    row_labels: Sequence[str] | None = None,
    caption: str | None = None,
    zoom: int | None = None,
    resample: Resample = "lanczos",
    gap: int = 4,
) -> Image.Image:
    """One image of many, in rows of `columns`.

    `images` has shape `[B, C, H, W]`, float in [-1, 1] or uint8, with C = 1 or 3.

    - `columns`: by default as many as make the grid square.
    - `labels`: a text for each image, written above it; above the first row only, where all rows
      have the same ones.
    - `row_labels`: a text for each row, at its left. `caption`: a line under everything.
    - `zoom`: how many pixels wide a pixel is shown, by default so that an image is about 128 wide;
      `resample` how: `"lanczos"` is easier to recognise, `"nearest"` shows the pixels as they are.
    - `gap`: pixels between the images.

    Errors: `ValueError` for shapes and numbers that do not fit, and those of `to_uint8`.
    """
    tiles = _tiles(images, zoom, resample)
    n = len(tiles)
    columns = math.ceil(math.sqrt(n)) if columns is None else min(columns, n)
    if columns < 1:
        raise ValueError(f"a grid has at least one column; got {columns}")
    rows = -(-n // columns)
    for name, texts, count in (("labels", labels, n), ("row_labels", row_labels, rows)):
        if texts is not None and len(texts) != count:
            raise ValueError(
                f"{name} has {len(texts)} texts for {count}"
                f" {'images' if name == 'labels' else 'rows'}"
            )
    font = _font()
    width, height = tiles[0].size
    texts = labels or ()
    repeated = bool(texts) and all(text == texts[i % columns] for i, text in enumerate(texts))
    top, left = gap + (LINE if repeated else 0), gap
    if row_labels is not None:
        left += math.ceil(max(map(font.getlength, row_labels))) + 2 * gap
    pitch = height + gap + (LINE if labels is not None and not repeated else 0)
    size = (left + columns * (width + gap), top + rows * pitch + (0 if caption is None else LINE))

    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, tile in enumerate(tiles):
        x, y = left + i % columns * (width + gap), top + i // columns * pitch
        if labels is not None and not (repeated and i >= columns):
            text = _fit(labels[i], font, width)
            centre = x + (width - font.getlength(text)) / 2
            draw.text((centre, gap if repeated else y), text, fill=INK, font=font)
        sheet.paste(tile, (x, y if repeated else y + pitch - height - gap))
    for row, text in enumerate(row_labels or ()):
        middle = top + row * pitch + pitch - gap - height / 2
        draw.text((gap, middle - FONT_SIZE / 2), text, fill=INK, font=font)
    if caption is not None:
        draw.text((left, size[1] - LINE), _fit(caption, font, size[0] - left), fill=INK, font=font)
    return sheet


def _tiles(images: Tensor, zoom: int | None, resample: Resample) -> list[Image.Image]:
    """Each image at the size at which it is shown."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            f"images have shape [B, C, H, W] with C = 1 or 3 and B >= 1; got {tuple(images.shape)}"
        )
    method = Image.Resampling[one_of("resample", resample, ("lanczos", "nearest")).upper()]
    height, width = images.shape[2:]
    zoom = max(1, round(CELL / width)) if zoom is None else zoom
    whole_number("zoom", zoom, of="pixels")
    pixels = images if images.dtype == torch.uint8 else to_uint8(images)
    arrays = pixels.detach().cpu().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
    size = (width * zoom, height * zoom)
    return [Image.fromarray(array).resize(size, method) for array in arrays]


def _font() -> Font:
    """Pillow's built-in font; in its one small size where Pillow was built without FreeType."""
    try:
        return ImageFont.load_default(FONT_SIZE)
    except (ImportError, OSError):
        return ImageFont.load_default()


def _fit(text: str, font: Font, width: float) -> str:
    """`text`, cut so that it is at most `width` wide."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "..") > width:
        text = text[:-1]
    return text + ".." if text else ""


# -------------------------------------------------------------------------------------------- files


def save_png(
    path: str | os.PathLike[str],
    image: Image.Image | Tensor,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write an image (or the `grid` of a batch) as PNG; `facts`, JSON-ready, are kept in the file.

    `read_facts` reads them again. The same image and facts make the same bytes. Errors:
    `SdeflowError` if the file cannot be written (a full disk, no permission); one that was there
    before stays as it was.
    """
    image = image if isinstance(image, Image.Image) else grid(image)
    return write_atomically(path, encode_png(image, facts), "image")


def encode_png(image: Image.Image, facts: Mapping[str, Any] | None = None) -> bytes:
    """The PNG of an image, with its `facts`."""
    text = PngImagePlugin.PngInfo()
    if facts is not None:
        text.add_text(FACTS, json.dumps(dict(facts)))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


def read_facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The facts that `save_png` put into a file; `SdeflowError` if it holds none."""
    try:
        with Image.open(path) as image:
            return json.loads(image.info[FACTS])
    except (OSError, UnidentifiedImageError, KeyError, ValueError) as error:
        raise SdeflowError(
            f"{path} is not an image that sdeflow wrote: it does not say how it was made"
        ) from error


def save_gif(
    path: str | os.PathLike[str],
    frames: Sequence[Image.Image],
    *,
    seconds: float = 0.1,
    hold: float = 2.0,
) -> Path:
    """Write `frames`, of one size, as an endless animation.

    Each frame is shown for `seconds`, the last for `hold`, and has its own 256 colours. A frame
    that looks exactly like the one before makes that one stay longer instead. Errors: `ValueError`
    without frames or with unequal sizes, `SdeflowError` if the file cannot be written.
    """
    if not frames or len({frame.size for frame in frames}) > 1:
        sizes = sorted({frame.size for frame in frames})
        raise ValueError(f"an animation has at least one frame, all of one size; got sizes {sizes}")
    colours = (frame.convert("RGB") for frame in frames)
    first, *rest = [frame.quantize(256, Image.Quantize.MEDIANCUT) for frame in colours]
    times = [round(1000 * seconds)] * len(rest) + [round(1000 * hold)]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=times, loop=0)
    return write_atomically(path, buffer.getvalue(), "animation")
