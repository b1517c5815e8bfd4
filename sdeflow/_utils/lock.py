"""A folder that one process at a time writes into."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from sdeflow.errors import SdeflowError

LOCK = ".lock"


@contextmanager
def locked(folder: str | os.PathLike[str], what: str, wanted: bool = True) -> Iterator[None]:
    """Hold the lock of `folder` within the block, for `what` ("sdeflow generate"); nothing happens
    unless it is `wanted`.

    The lock is the operating system's, on the file `.lock`: it ends with its process, whatever ends
    that, so a `.lock` that a killed process leaves behind locks nothing. Where a file system has no
    locks, nothing is locked.

    Errors: `SdeflowError` if another process holds it; it names the process.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        wanted = False
    if not wanted:
        yield
        return
    path = Path(folder) / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _holder(handle)
            os.close(handle)
            raise SdeflowError(
                f"{holder} is writing into {folder}: wait until it is done, or choose another"
                " folder. The lock ends with that process, whatever ends it"
            ) from error
        except OSError:  # a file system without locks
            os.close(handle)
            with contextlib.suppress(OSError):
                path.unlink()
            yield
            return
        # Whoever held it may have removed the file between these two lines.
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            break
        os.close(handle)
    try:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        facts = {"what": what, "process": os.getpid(), "host": socket.gethostname(), "since": now}
        os.truncate(handle, 0)
        os.write(handle, json.dumps(facts).encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(handle)


def _holder(handle: int) -> str:
    """Who holds a lock, in words."""
    try:
        facts = json.loads(os.read(handle, 1000))
        return "{what} (process {process} on {host}, since {since})".format(**facts)
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
