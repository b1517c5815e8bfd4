"""Files that are written completely or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from sdeflow.errors import SdeflowError


def write_atomically(
    path: str | os.PathLike[str], content: bytes, what: str = "file", keep: Path | None = None
) -> Path:
    """Write `content` to `path` so that afterwards the file is the old one or the new one, whatever
    happens between.

    The bytes go to a temporary file in the same folder, which is flushed to the disk and renamed;
    missing folders are made. If that fails (a full disk, say), the old file is unchanged, the
    temporary one is removed and an `SdeflowError` says why. The file that was there before stays
    as `keep`, a path in the same folder, if that is given.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            if keep is not None and path.is_file():
                _keep(path, keep)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        old = "the file that was there is untouched"
        kept = old if path.is_file() else "nothing was left behind"
        raise SdeflowError(
            f"could not save the {what} {path} ({error.strerror or error}); {kept}. Make room, or"
            " save somewhere else"
        ) from error
    return path


def _keep(path: Path, kept: Path) -> None:
    """The file `path` under the name `kept` too, in one step."""
    handle, name = tempfile.mkstemp(dir=kept.parent, prefix=f".{kept.name}.", suffix=".tmp")
    os.close(handle)
    try:
        os.unlink(name)
        try:
            os.link(path, name)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, name)
        os.replace(name, kept)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)


def check_writable(path: str | os.PathLike[str], what: str = "file") -> Path:
    """`path`, if a file can be written there; else an `SdeflowError`.

    To be called before long work whose result the file is to hold.
    """
    path = Path(path)
    folder = path.parent
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = error.strerror or error
        raise SdeflowError(
            f"cannot write the {what} {path} ({why}); name a file in a folder of yours"
        ) from error
    return path
