"""The command `sdeflow info`: what there is, as tables from the registry."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from sdeflow import registry
from sdeflow.models.checkpoint import BUNDLED, load
from sdeflow.registry import Entry

EPILOG = """
Examples:

    sdeflow info                    everything

    sdeflow info solvers

    sdeflow info checkpoints        the bundled models and how they were trained
"""


class Topic(StrEnum):
    """What `sdeflow info` can list."""

    processes = "processes"
    solvers = "solvers"
    grids = "grids"
    checkpoints = "checkpoints"


def info(
    topic: Annotated[Topic | None, typer.Argument(help="One of them; all by default.")] = None,
) -> None:
    """List what there is: processes, solvers, grids and checkpoints."""
    tables = {
        Topic.processes: _processes,
        Topic.solvers: _solvers,
        Topic.grids: _grids,
        Topic.checkpoints: _checkpoints,
    }
    for name, table in tables.items():
        if topic in (None, name):
            typer.echo(f"{name.value}\n{'-' * len(name.value)}\n{table()}\n")


def _processes() -> str:
    rows = []
    for entry in registry.PROCESSES.values():
        process = entry.make()
        rows.append([*_names(entry), repr(process), process.default_grid, entry.summary])
    return _align(["name", "also", "with its defaults", "grid", "what it is"], rows)


def _solvers() -> str:
    rows = []
    for entry in registry.SOLVERS.values():
        solver = entry.make()
        kind = "stochastic" if solver.stochastic else "deterministic"
        kind = "adaptive" if solver.adaptive else kind
        rows.append([*_names(entry), str(solver.order), kind, solver.cost, solver.source])
    table = _align(["name", "also", "order", "kind", "calls", "source"], rows)
    return (
        f"{table}\n\ntorchdiffeq:METHOD and torchsde:METHOD reach every method of those libraries,"
        " as in torchdiffeq:dopri8"
    )


def _grids() -> str:
    rows = [[*_names(entry), entry.summary] for entry in registry.GRIDS.values()]
    return _align(["name", "also", "what it is"], rows)


def _checkpoints() -> str:
    parts = []
    for name in BUNDLED:
        denoiser = load(name)
        network: Any = denoiser.network
        parameters = sum(p.numel() for p in network.parameters())
        low, high = denoiser.nsr_range
        facts: dict[str, Any] = {
            "parameters": f"{parameters:,}",
            "shape": denoiser.shape,
            "nsr": f"{low:g} to {high:g}",
            "classes": ", ".join(denoiser.class_names),
            **{k: v for k, v in denoiser.card.items() if isinstance(v, str | int | float)},
        }
        parts.append("\n".join([name, *(f"  {key:<22} {value}" for key, value in facts.items())]))
    return "\n\n".join(parts)


def _names(entry: Entry) -> list[str]:
    return [entry.name, ", ".join(entry.aliases)]


def _align(head: list[str], rows: list[list[str]]) -> str:
    """A table in columns of even width; the last is left as long as it is."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head) - 1)]
    lines = []
    for row in [head, *rows]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return "\n".join(lines)
