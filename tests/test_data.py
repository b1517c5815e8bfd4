"""Data: every source gives the same pictures, and the order of training is a pure function of seed,
step and rank.
"""

from __future__ import annotations

import builtins
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdeflow._utils.distributed import Rank
from sdeflow.errors import MissingExtraError
from sdeflow.images import shards
from sdeflow.images.datasets import Decoded, Encoded, Images, Stream, load_images, mix, to_pixels


def picture(i: int, size: int = 8) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)
    )


def folder(path: Path, count: int = 6, classes: int = 2) -> Path:
    for i in range(count):
        inside = path / f"class{i % classes}" if classes else path
        inside.mkdir(parents=True, exist_ok=True)
        picture(i).save(inside / f"{i}.png")
    return path


def numbered(count: int) -> Decoded:
    return Decoded(
        torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2),
        torch.arange(count),
    )


def test_folder_with_classes(tmp_path: Path) -> None:
    images = load_images(folder(tmp_path), progress=False)
    assert (images.count, images.size, images.class_names, images.num_classes) == (
        6,
        8,
        ("class0", "class1"),
        2,
    )
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(images.get(torch.tensor([1]))[0], to_pixels(picture(2), 8))


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    images = load_images(folder(tmp_path, classes=0), progress=False)
    assert (images.count, images.labels, images.num_classes) == (6, None, 0)


def test_sizes_and_modes_are_made_alike(tmp_path: Path) -> None:
    Image.new("L", (20, 10), 7).save(tmp_path / "a.png")
    Image.new("RGBA", (9, 30), (1, 2, 3, 255)).save(tmp_path / "b.png")
    images = load_images(tmp_path, size=4, progress=False)
    assert images.get(torch.tensor([0, 1])).shape == (2, 3, 4, 4)
    assert images.get(torch.tensor([1]))[0, :, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("column", ["img", "image"])
def test_parquet_in_the_hub_layout(tmp_path: Path, column: str) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    rows = []
    for i in range(5):
        buffer = io.BytesIO()
        picture(i).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    names = '{"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}'
    table = pa.table({column: rows, "label": [0, 1, 0, 1, 1]}).replace_schema_metadata(
        {"huggingface": names}
    )
    pq.write_table(table, tmp_path / "train-0.parquet")
    pq.write_table(table.slice(0, 1), tmp_path / "test-0.parquet")
    for source in (tmp_path / "train-0.parquet", tmp_path):  # a folder: the split's files
        images = load_images(source, progress=False)
        assert (images.count, images.class_names) == (5, ("cat", "dog"))
        assert images.labels is not None
        assert images.labels.tolist() == [0, 1, 0, 1, 1]
        assert torch.equal(images.get(torch.tensor([3]))[0], to_pixels(picture(3), 8))


def test_parquet_without_pictures_is_told(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pa.table({"x": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="img or image"):
        load_images(tmp_path / "a.parquet")


def test_torch_data_set_of_pictures_or_bytes() -> None:
    pixels = [to_pixels(picture(i), 8) for i in range(3)]
    for items in ([(picture(i), i) for i in range(3)], [(pixels[i], i) for i in range(3)]):
        images = load_images(items, progress=False)
        assert images.labels is not None
        assert images.labels.tolist() == [0, 1, 2]
        assert torch.equal(images.get(torch.tensor([2]))[0], pixels[2])
    assert load_images([picture(0)], progress=False).labels is None


def test_a_float_tensor_is_not_guessed_at() -> None:
    with pytest.raises(TypeError, match="PILToTensor"):
        load_images([(torch.rand(3, 8, 8), 0)], progress=False)


@pytest.mark.parametrize("source", ["nowhere", "./nowhere", "/no/such/folder"])
def test_missing_sources_are_told(source: str) -> None:
    with pytest.raises(ValueError, match="neither a folder of images, nor a parquet file"):
        load_images(source)


def test_empty_and_broken_sources_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no images"):
        load_images(tmp_path)
    (tmp_path / "a.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"a\.png cannot be read"):
        load_images(tmp_path)
    with pytest.raises(ValueError, match="empty"):
        load_images([])
    with pytest.raises(ValueError, match="no parquet file"):
        load_images(tmp_path / "a.parquet")
    with pytest.raises(TypeError, match="__len__ and __getitem__"):
        load_images(7)


def test_missing_packages_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *rest: Any, **named: Any) -> Any:
        if name.split(".")[0] in ("datasets", "pyarrow"):
            raise ImportError(name)
        return original(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    (tmp_path / "a.parquet").write_bytes(b"")
    for source in ("owner/name", tmp_path / "a.parquet"):
        with pytest.raises(MissingExtraError, match=r"pip install 'sdeflow\[train\]'"):
            load_images(source)


# ---------------------------------------------------------------------------------------- the order


def order(stream: Stream, steps: range) -> list[int]:
    return [int(i) for step in steps for i in stream.indices(step)]


def test_each_pass_sees_each_image_once_in_a_new_order() -> None:
    stream = Stream(numbered(10), 4, seed=3)
    seen = order(stream, range(5))  # 20 places: two passes; the third batch spans them
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert seen != order(Stream(numbered(10), 4, seed=4), range(5))


def test_any_step_can_be_asked_for_first() -> None:
    whole = order(Stream(numbered(10), 4, seed=3), range(8))
    assert order(Stream(numbered(10), 4, seed=3), range(5, 8)) == whole[20:]
    assert order(Stream(numbered(3), 8, seed=3), range(2)) == order(
        Stream(numbered(3), 4, seed=3), range(4)
    )


def test_ranks_share_the_batch() -> None:
    whole = order(Stream(numbered(10), 4, seed=3), range(5))
    parts = [Stream(numbered(10), 4, seed=3, rank=Rank(i, 2)) for i in range(2)]
    assert [
        i for step in range(5) for part in parts for i in order(part, range(step, step + 1))
    ] == whole
    with pytest.raises(ValueError, match="multiple of the 3 processes"):
        Stream(numbered(10), 4, seed=0, rank=Rank(0, 3))


def test_shares_are_disjoint_and_even() -> None:
    parts = [Rank(i, 3).share(10) for i in range(3)]
    assert [i for part in parts for i in part] == list(range(10))
    assert {len(part) for part in parts} == {3, 4}


def test_batches_are_images_in_minus_one_to_one_and_flips_are_repeatable() -> None:
    ramp = torch.tensor([0, 255], dtype=torch.uint8).expand(1, 3, 2, 2)
    stream = Stream(Decoded(ramp, torch.tensor([5])), 64, seed=0)
    x0, label = stream(0)
    assert x0[0, 0].tolist() == [[-1, 1], [-1, 1]]
    assert label is not None
    assert label.tolist() == [5] * 64
    once, again = (stream(0, torch.Generator().manual_seed(1))[0] for _ in range(2))
    assert torch.equal(once, again)
    assert 16 < int((once[:, 0, 0, 0] == 1).sum()) < 48


def test_large_sets_are_decoded_as_they_are_needed(tmp_path: Path) -> None:
    small, large = (
        load_images(folder(tmp_path), memory_gb=gb, progress=False) for gb in (1.0, 0.0)
    )
    assert isinstance(small, Decoded)
    assert isinstance(large, Encoded)

    def batches(images: Images) -> list[torch.Tensor]:
        stream = Stream(images, 4, seed=1)
        return [stream(step)[0] for step in (0, 1, 2, 7)]

    for a, b in zip(batches(small), batches(large), strict=True):
        assert torch.equal(a, b)


def test_seeds_differ_in_every_number() -> None:
    seeds = {mix(a, b, c) for a in range(8) for b in range(8) for c in range(8)}
    assert len(seeds) == 512
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mix(1, 2) != mix(2, 1)


@pytest.mark.parametrize("kind", ["png", "npz", "parquet"])
def test_a_generated_folder_is_read_to_train_on_whatever_its_format(
    tmp_path: Path, kind: shards.Format
) -> None:
    x = torch.randint(0, 256, (10, 8, 8, 3), dtype=torch.uint8)
    labels = torch.arange(10) % 3
    settings = {"format": kind, "n": 10, "shard_size": 4, "shape": [8, 8, 3]}
    settings["class_names"] = ["ant", "bee", "cat"]
    shards.write_settings(tmp_path, settings)
    opened = shards.opened(tmp_path, settings)
    for k in range(len(opened)):
        rows = opened.indices(k)
        part = slice(rows.start, rows.stop)
        opened.write(k, x[part].contiguous(), labels[part])
    for memory_gb in (1.0, 1e-9, 0.0):  # decoded at once, one by one, shard by shard
        images = load_images(tmp_path, memory_gb=memory_gb, progress=False)
        assert torch.equal(images.get(torch.arange(10)).permute(0, 2, 3, 1), x)
        assert images.labels is not None
        assert images.labels.tolist() == labels.tolist()
        assert images.class_names == ("ant", "bee", "cat")
        parts = [pixels for pixels, _ in images.batches(3, n=7)]
        assert torch.equal(torch.cat(parts).permute(0, 2, 3, 1), x[:7])
    assert load_images(tmp_path, size=4, progress=False).get(torch.tensor([9])).shape[2:] == (4, 4)


def test_grey_arrays_are_squares_of_three_channels_to_train_on(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", np.full((3, 6, 4, 1), 7, np.uint8))
    images = load_images(tmp_path / "a.npz", progress=False)
    assert images.labels is None
    assert torch.equal(images.get(torch.tensor([2])), torch.full((1, 3, 4, 4), 7).byte())
    as_it_is = load_images(tmp_path / "a.npz", memory_gb=0.0)
    assert as_it_is.get(torch.tensor([2])).shape == (1, 1, 6, 4)
