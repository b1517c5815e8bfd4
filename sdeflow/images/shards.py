"""Folders of many images, in shards that are fixed by index.

Shard k holds the images k*size to (k+1)*size - 1.

Each shard is written completely or not at all, and is verified when it is read: it holds all of its
images, in order, and every one can be decoded. So a folder itself says what is still to be made.
`run.json` beside the shards says how the images are made.

    out/run.json
    out/shard-00000/00000000.png ...   png: a file an image, named by its index, its label inside
    out/shard-00000.npz                npz: images uint8 [k, H, W, C], labels and indices int64 [k]
    out/shard-00000.parquet            parquet: img.bytes (PNG), label, index, the layout of the
                                       `datasets` library
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdeflow._utils.checks import listed, whole_number
from sdeflow._utils.files import check_writable, write_atomically
from sdeflow.errors import SdeflowError, missing_extra
from sdeflow.images.render import FACTS, encode_png

RUN = "run.json"
NO_LABEL = -1
"""The label of an image without one."""

Format = Literal["png", "npz", "parquet"]
FORMATS: tuple[Format, ...] = get_args(Format)
Batch = tuple[Tensor, Tensor, Tensor]
"""Indices int64 [k], images uint8 [k, H, W, C], labels int64 [k]."""

_BUILT_IN = OSError, SyntaxError, ValueError, LookupError, EOFError, TypeError, RuntimeError
DAMAGE = (
    *(*_BUILT_IN, AssertionError, ArithmeticError, MemoryError),
    *(struct.error, zipfile.BadZipFile, zlib.error),
)
"""What the readers of images, zip files and parquet files raise on a damaged one."""


@dataclass(frozen=True)
class Shards:
    """`n` images of `shape` (H, W, C) in `folder`, `size` to a shard.

    A shard is missing, damaged or sound.

    Errors: `ValueError` for an unknown format and numbers below 1, `MissingExtraError` for parquet
    without pyarrow.
    """

    folder: Path
    kind: Format
    n: int
    size: int
    shape: tuple[int, int, int]
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in FORMATS:
            raise ValueError(f"format is one of {', '.join(FORMATS)}; got {self.kind!r}")
        whole_number("n", self.n)
        whole_number("shard_size", self.size)
        if len(self.shape) != 3 or self.shape[2] not in (1, 3):
            raise ValueError(
                f"images have 1 or 3 channels: shape (H, W, C) with C = 1 or 3; got {self.shape}"
            )
        if self.kind == "parquet":
            arrow(self.folder)

    def __len__(self) -> int:
        """How many shards there are, the last of which may be shorter."""
        return -(-self.n // self.size)

    def indices(self, k: int) -> range:
        """The images of shard `k`."""
        return range(k * self.size, min((k + 1) * self.size, self.n))

    def path(self, k: int) -> Path:
        """Where shard `k` is: a file, or for png a folder."""
        return self.folder / (f"shard-{k:05d}" + ("" if self.kind == "png" else f".{self.kind}"))

    def write(self, k: int, images: Tensor, labels: Tensor) -> Path:
        """Write shard `k`, completely or not at all.

        `images` is uint8 [k, H, W, C] and `labels` int64 [k], both on the CPU.

        Errors: `SdeflowError` where it cannot be written (a full disk, say); what was there is then
        unchanged.
        """
        indices = self.indices(k)
        if tuple(images.shape) != (len(indices), *self.shape) or images.dtype != torch.uint8:
            raise ValueError(
                f"shard {k} holds {len(indices)} images of shape {self.shape}, uint8; got"
                f" {images.dtype} {tuple(images.shape)}"
            )
        path, pixels, classes = self.path(k), images.numpy(), labels.tolist()
        if self.kind == "png":
            return _write_images(path, indices, pixels, classes)
        buffer = io.BytesIO()
        if self.kind == "npz":
            where = np.array(indices, dtype=np.int64)
            np.savez(buffer, images=pixels, labels=labels.numpy(), indices=where)
        else:
            _write_table(buffer, indices, pixels, classes, self.class_names)
        return write_atomically(path, buffer.getvalue(), "shard")

    def read(self, k: int) -> Batch:
        """Shard `k`, verified.

        Errors: `SdeflowError` where it is missing, damaged, or not what it should be.
        """
        path, indices = self.path(k), self.indices(k)
        try:
            if self.kind == "png":
                images, labels, found = _read_images(path, indices)
            elif self.kind == "npz":
                with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                    images, labels, found = arrays["images"], arrays["labels"], arrays["indices"]
            else:
                images, labels, found = _read_table(path)
            if not np.array_equal(found, np.array(indices)) or labels.shape != found.shape:
                raise ValueError(
                    f"it holds {len(found)} images, not the {len(indices)} from {indices[0]} on"
                )
            if images.shape != (len(indices), *self.shape) or images.dtype != np.uint8:
                raise ValueError(
                    f"its images are {images.dtype} {images.shape[1:]}, and those of the folder"
                    f" uint8 {self.shape}"
                )
        except DAMAGE as error:
            what = "is missing" if not path.exists() else f"is damaged ({reason(error)})"
            raise SdeflowError(
                f"shard {k} of {self.folder}, images {indices[0]} to {indices[-1]}, {what}; run"
                " sdeflow generate with the same options again: it makes what is missing or"
                " damaged, and keeps the rest"
            ) from error
        numbers, classes = torch.from_numpy(found), torch.from_numpy(labels)
        return numbers.long(), torch.from_numpy(images), classes.long()

    def is_sound(self, k: int, labels: Tensor | None = None) -> bool:
        """Whether shard `k` is there, undamaged, and has these labels."""
        if not self.path(k).exists():
            return False
        try:
            found = self.read(k)[2]
        except SdeflowError:
            return False
        return labels is None or torch.equal(found, labels)

    def sweep(self) -> None:
        """Remove what killed processes left unfinished."""
        for left in [*self.folder.glob(".shard-*.tmp"), *self.folder.glob(f".{RUN}.*.tmp")]:
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    left.unlink()


def read_settings(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """How the images of a folder that `sdeflow generate` wrote were made.

    Errors: `SdeflowError` if it does not say.
    """
    path = Path(folder) / RUN
    try:
        settings = json.loads(path.read_text())
        opened(folder, settings)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SdeflowError(
            f"{path} does not say how images were made ({reason(error)}): it is damaged or"
            " missing; generate into another folder"
        ) from error
    return settings


def write_settings(folder: str | os.PathLike[str], settings: Mapping[str, Any]) -> Path:
    """Write `run.json`, completely or not at all."""
    return write_atomically(
        Path(folder) / RUN, (json.dumps(dict(settings), indent=1) + "\n").encode(), "run file"
    )


def opened(folder: str | os.PathLike[str], settings: Mapping[str, Any]) -> Shards:
    """The shards that settings describe."""
    kind, n, size = (settings[name] for name in ("format", "n", "shard_size"))
    shape: Any = tuple(settings["shape"])
    return Shards(Path(folder), kind, n, size, shape, tuple(settings.get("class_names", ())))


def open_finished(folder: Path) -> tuple[Shards, dict[str, Any]]:
    """The shards of a folder, all of which must be there, and how its images were made."""
    settings = read_settings(folder)
    shards = opened(folder, settings)
    if missing := [k for k in range(len(shards)) if not shards.path(k).exists()]:
        raise SdeflowError(
            f"{folder} is not finished: {len(missing)} of its {len(shards)} shards are missing"
            f" (number {listed(missing)}); run sdeflow generate with the same options again"
        )
    return shards, settings


# ---------------------------------------------------------------------------- images, a file each


def _encode(pixels: np.ndarray, facts: Mapping[str, int] | None = None) -> bytes:
    """The PNG of an image [H, W, C]; `facts` travel in it."""
    return encode_png(Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels), facts)


def _decode(content: bytes) -> tuple[np.ndarray, dict[Any, Any]]:
    """An image of ours [H, W, C] and its facts, its checksums verified."""
    with Image.open(io.BytesIO(content)) as image:
        image.verify()  # reads the checksums, and leaves nothing to decode
    with Image.open(io.BytesIO(content)) as image:
        pixels = np.array(image)
        return pixels[:, :, None] if pixels.ndim == 2 else pixels, image.info


def _write_images(path: Path, indices: range, pixels: np.ndarray, labels: list[int]) -> Path:
    """A folder of images, made beside its place and moved there.

    Where there is one already, the images are moved file by file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
        try:
            for index, image, label in zip(indices, pixels, labels, strict=True):
                _image(made, index).write_bytes(_encode(image, {"index": index, "label": label}))
            made.chmod(0o755)
            if path.is_dir():
                for file in made.iterdir():
                    file.replace(path / file.name)
            else:
                made.rename(path)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        raise SdeflowError(
            f"could not save the shard {path} ({error.strerror or error}); nothing of it was left"
            " behind. Make room, or save somewhere else"
        ) from error
    return path


def _read_images(path: Path, indices: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    read = [_decode(_image(path, index).read_bytes()) for index in indices]
    facts = [json.loads(info[FACTS]) for _, info in read]
    labels, found = (np.array([f[n] for f in facts], dtype=np.int64) for n in ("label", "index"))
    return np.stack([pixels for pixels, _ in read]), labels, found


def _image(folder: Path, index: int) -> Path:
    return folder / f"{index:08d}.png"


# ------------------------------------------------------------------------------------------ parquet


def arrow(what: object) -> Any:
    """The module `pyarrow`, or an error that says how to install it."""
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        raise missing_extra("pyarrow (with datasets)", "train", f"parquet ({what})") from error
    return pa


def _write_table(
    buffer: io.BytesIO,
    indices: range,
    pixels: np.ndarray,
    labels: list[int],
    class_names: tuple[str, ...],
) -> None:
    pa = arrow("a shard")
    number = {"dtype": "int64", "_type": "Value"}
    label = {"names": list(class_names), "_type": "ClassLabel"} if class_names else number
    features = {"img": {"_type": "Image"}, "label": label, "index": number}
    rows = zip(indices, pixels, strict=True)
    images = [{"bytes": _encode(p), "path": f"{i:08d}.png"} for i, p in rows]
    encoded = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        "img": pa.array(images, encoded),
        "label": pa.array(labels, pa.int64()),
        "index": pa.array(indices, pa.int64()),
    }
    header = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table(columns).replace_schema_metadata(header)
    pa.parquet.write_table(table, buffer, write_page_checksum=True)


def _read_table(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    pa = arrow(path)
    columns = ["img", "label", "index"]
    table = pa.parquet.read_table(path, columns=columns, page_checksum_verification=True)
    images = [_decode(value["bytes"])[0] for value in table["img"].to_pylist()]
    labels, found = (table[name].to_numpy().astype(np.int64) for name in columns[1:])
    return np.stack(images), labels, found


def reason(error: BaseException) -> str:
    """The first line of what an error says."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]


def check_folder(folder: Path) -> None:
    """Refuse a folder for shards that holds other things, or cannot be written into."""
    check_writable(folder / RUN, "run file")
    if not folder.is_dir() or (folder / RUN).exists():
        return
    # What another process has there for a moment, to see whether it can write, is gone at the
    # second look.
    there = sorted(
        path.name for path in folder.iterdir() if not path.name.startswith(".") and path.exists()
    )
    if there:
        raise ValueError(
            f"{folder} holds other things already"
            f" ({listed(there, 3)}) and no {RUN}; choose an empty or a new folder"
        )
