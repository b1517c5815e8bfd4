"""What a long computation needs: a way to stop it, a log, and that a full disk does not end it."""

from __future__ import annotations

import json
import platform
import signal
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from sdeflow.errors import NonFiniteError, SdeflowError


class Stop:
    """Asks a computation to end.

    On SIGTERM, on Ctrl-C (a second one interrupts at once), or when its time is over.
    """

    def __init__(self, seconds: float | None) -> None:
        self.reason = ""
        self.deadline = None if seconds is None else time.monotonic() + seconds

    @property
    def asked(self) -> bool:
        """Whether it is time to end."""
        if not self.reason and self.deadline is not None and time.monotonic() >= self.deadline:
            self.reason = "time limit"
        return bool(self.reason)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.reason.startswith("SIG"):
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals within the block, where this thread may."""
        old: dict[int, Any] = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                old[number] = signal.signal(number, self._handle)
            except ValueError:  # not in the main thread
                break
        try:
            yield
        finally:
            for n, handler in old.items():
                signal.signal(n, handler)


class Log:
    """A file of JSON lines; the lines of steps that a resumed training repeats are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        kept = []
        if path.is_file():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line).get("step", 0) <= step:
                        kept.append(line)
                except json.JSONDecodeError:  # cut off by a kill
                    continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(line + "\n" for line in kept))
        self.path = path

    def write(self, values: Mapping[str, Any]) -> None:
        """Append a line."""
        with attempted("write to the log"), self.path.open("a") as file:
            file.write(json.dumps(dict(values)) + "\n")


@contextmanager
def attempted(what: str) -> Iterator[None]:
    """Continue with a warning if `what` fails for lack of disk or permission.

    Hours of work are worth more than one file.
    """
    try:
        yield
    except NonFiniteError:
        raise
    except (OSError, SdeflowError) as error:
        warnings.warn(f"could not {what}: {error}", RuntimeWarning, stacklevel=3)


def machine(device: torch.device, world: int) -> str:
    """The machine in words."""
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    )
    return f"{world} x {name}" if world > 1 else name
