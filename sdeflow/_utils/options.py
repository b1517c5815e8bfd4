"""Fields of a configuration that are options of the command line too."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, help: str, panel: str | None = None, *, shown: str = "") -> Any:
    """A field of a dataclass that knows its help, and under which heading the help stands.

    `shown` says the default in words, where the value does not.
    """
    if not shown and default is not None:
        parts = default if isinstance(default, tuple) else (default,)
        shown = ",".join(f"{part:g}" if isinstance(part, float) else str(part) for part in parts)
    text = f"{help} (default: {shown})." if shown else f"{help}."
    return field(default=default, metadata={"help": text, "panel": panel})
