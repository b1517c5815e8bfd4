"""Images: pixels, grids, and files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from sdeflow import images
from sdeflow.errors import NonFiniteError, SdeflowError


def test_pixels_are_rounded_and_cut_off() -> None:
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, -1.0 + 0.6 / 127.5])
    assert images.to_uint8(x).tolist() == [0, 0, 128, 255, 255, 1]
    with pytest.raises(NonFiniteError, match="NaN"):
        images.to_uint8(torch.tensor([[[[float("nan")]]]]))
    with pytest.raises(TypeError, match="floating"):
        images.to_uint8(torch.zeros(1, dtype=torch.int64))


def test_a_grid_holds_every_image_in_its_place() -> None:
    colours = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1], [1, -1, 1]])
    batch = colours[:, :, None, None].expand(5, 3, 4, 4)
    picture = images.grid(batch, 3, zoom=1, gap=2, resample="nearest")
    assert picture.size == (2 + 3 * 6, 2 + 2 * 6)
    for i, colour in enumerate(colours):
        x, y = 2 + i % 3 * 6, 2 + i // 3 * 6
        expected = tuple(images.to_uint8(colour).tolist())
        assert {picture.getpixel((x + dx, y + dy)) for dx in (0, 3) for dy in (0, 3)} == {expected}
    assert images.grid(torch.zeros(1, 1, 8, 8)).mode == "RGB"


def test_labels_take_room_and_must_fit() -> None:
    batch = torch.zeros(4, 3, 8, 8)
    plain = images.grid(batch, 2)
    above = images.grid(batch, 2, labels=["cat", "dog"] * 2)
    each = images.grid(
        batch, 2, labels=["cat", "dog", "ship", "truck"], row_labels=["one", "two"], caption="four"
    )
    assert plain.height < above.height < each.height
    assert each.width > plain.width
    with pytest.raises(ValueError, match="3 texts for 4 images"):
        images.grid(batch, 2, labels=["a", "b", "c"])
    with pytest.raises(ValueError, match="shape"):
        images.grid(torch.zeros(4, 2, 8, 8))


def test_files_are_readable_and_carry_their_facts(tmp_path: Path) -> None:
    path = images.save_png(tmp_path / "a.png", torch.zeros(2, 3, 8, 8), facts={"seeds": [1, 2]})
    assert images.read_facts(path) == {"seeds": [1, 2]}
    frames = [images.grid(torch.full((1, 3, 8, 8), v)) for v in (-1.0, 0.0, 0.0, 1.0)]
    with Image.open(images.save_gif(tmp_path / "a.gif", frames)) as film:
        assert film.n_frames == 3  # equal frames stay longer instead
    with pytest.raises(SdeflowError, match="not an image that sdeflow wrote"):
        images.read_facts(tmp_path / "a.gif")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = images.save_png(tmp_path / "a.png", torch.zeros(1, 3, 8, 8))
    old = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SdeflowError, match="No space left"):
        images.save_png(path, torch.ones(1, 3, 8, 8))
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
