"""What every benchmark writes beside its figures: the command, the machine, the versions and the
date.
"""

from __future__ import annotations

import json
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import sdeflow

RESULTS = Path(__file__).parent / "results"


def provenance() -> dict[str, Any]:
    """How the figures were made."""
    cuda = torch.cuda.is_available()
    return {
        "command": " ".join(["python", *_module(), *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": torch.cuda.get_device_name()
        if cuda
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sdeflow": sdeflow.__version__,
    }


def _module() -> list[str]:
    """How this process was started: `-m benchmarks.ROOM.FILE`, or the file itself."""
    path = Path(sys.argv[0]).resolve()
    try:
        inside = path.relative_to(RESULTS.parents[1])
    except ValueError:
        return [path.name]
    return ["-m", ".".join(inside.with_suffix("").parts)]


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def write(
    name: str,
    results: dict[str, Any],
    markdown: str,
    out: str | Path | None = None,
    about: dict[str, Any] | None = None,
) -> None:
    """Print the table, and write `NAME.json` and `NAME.md`, with their provenance: `about`, or that
    of this process.
    """
    about = provenance() if about is None else about
    folder = Path(out).parent if out else RESULTS
    name = Path(out).stem if out else name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(
        json.dumps({"provenance": about, **results}, indent=1) + "\n"
    )
    note = f"`{about['command']}` on {about['machine']}, torch {about['torch']}, {about['date']}"
    (folder / f"{name}.md").write_text(f"{markdown}\n\n*{note}*\n")
    print(markdown, f"\n{note}", sep="\n")
