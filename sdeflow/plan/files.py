"""Plans as files: JSON to read, or safetensors to lie beside a checkpoint; written whole or not at
all, read with care.

Both hold the same dictionary (`Plan.to_dict`) and a SHA-256 of it. A JSON file without one, as
0.5 wrote them, is read too. In the safetensors form the numbers are float64
tensors, `coefficients`, `times`, `levels`, `draws` and `grid`, and the header holds the rest: the
instructions without their numbers, solver, process and version. Nothing in either is executable.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save as serialise
from torch import Tensor

from sdeflow._utils.files import write_atomically
from sdeflow.errors import CheckpointError, SdeflowError

FORMAT = "sdeflow-plan-1"
HEADER = "sdeflow"
SUFFIX = ".safetensors"
DIGEST = "sha256"
DAMAGE = KeyError, TypeError, IndexError, ValueError, ArithmeticError, StopIteration
"""What reading a damaged dictionary raises."""
LARGEST = 2**28
"""Bytes of the largest file that is read: a plan of a thousand calls takes less than a megabyte."""


def write_plan(path: str | os.PathLike[str], data: dict[str, Any]) -> Path:
    """Write a plan's dictionary to `path`: safetensors where that is its ending, else JSON; whole
    or not at all.
    """
    if Path(path).suffix == SUFFIX:
        content = _to_tensors(data)
    else:
        whole = {**data, DIGEST: _digest({}, data)}
        content = (json.dumps(whole, indent=1) + "\n").encode()
    try:
        return write_atomically(path, content, "plan")
    except SdeflowError as error:
        raise CheckpointError(str(error)) from error


def read_plan(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The dictionary in a file that `write_plan` wrote, of either form, whatever its name.

    `CheckpointError` if the file is missing, damaged, or something else.
    """
    path = Path(path)
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise CheckpointError(
                f"{path} is not a plan: it has {size:,} bytes, and a plan at most {LARGEST:,}"
            )
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read the plan {path} ({error.strerror or error})") from error
    try:
        # A safetensors file begins with the length of its header, eight bytes, the last of which
        # are zero.
        return _from_tensors(content) if content[6:9] == b"\0\0{" else json.loads(content)
    except (SafetensorError, RecursionError, AttributeError, *DAMAGE) as error:
        reason = str(error) or type(error).__name__
        raise CheckpointError(
            f"{path} is not a plan saved by sdeflow, or damaged: {reason}"
        ) from error


def verified(data: dict[str, Any]) -> dict[str, Any]:
    """A plan's dictionary without its checksum; `ValueError` where it has one that differs."""
    facts = {key: value for key, value in data.items() if key != DIGEST}
    if DIGEST in data and data[DIGEST] != (found := _digest({}, facts)):
        raise ValueError(
            f"its content has SHA-256 {found[:12]}..., and its entry {DIGEST!r} says"
            f" {str(data[DIGEST])[:12]}...; take a sound copy (whoever changed it on purpose"
            " deletes that entry)"
        )
    return facts


def _to_tensors(data: dict[str, Any]) -> bytes:
    """The dictionary as a safetensors file."""
    coefficients: list[float] = []
    calls: list[list[float]] = []
    draws: list[list[float]] = []
    rows: list[list[Any]] = []
    for row in data["instructions"]:
        match row[0]:
            case "combine":
                rows.append([row[0], row[1], [register for register, _ in row[2]]])
                coefficients += [c for _, c in row[2]]
            case "call":
                rows.append(row[:3])
                calls.append(row[3:])
            case "draw":
                rows.append(row[:2])
                draws.append([math.nan if number is None else number for number in row[2:]])
            case _:
                rows.append(row)
    levels = torch.tensor(calls, dtype=torch.float64).reshape(-1, 3)
    tensors = {
        "coefficients": torch.tensor(coefficients, dtype=torch.float64),
        "times": levels[:, 0].contiguous(),
        "levels": levels[:, 1:].contiguous(),
        "draws": torch.tensor(draws, dtype=torch.float64).reshape(-1, 2),
        "grid": torch.tensor(data["grid"], dtype=torch.float64).reshape(-1, 3),
    }
    facts = {**{key: value for key, value in data.items() if key != "grid"}, "instructions": rows}
    header = json.dumps({**facts, DIGEST: _digest(tensors, facts)})
    return serialise(tensors, {HEADER: header})


def _from_tensors(content: bytes) -> dict[str, Any]:
    """The dictionary in a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    facts = json.loads(header.get(HEADER, "{}"))
    if facts.get("format") != FORMAT:
        raise ValueError(
            f"a safetensors file that holds {facts.get('format', 'something else')!r}, not"
            f" {FORMAT!r}"
        )
    tensors = parse(content)
    stated = facts.pop(DIGEST, "")
    if stated != (found := _digest(tensors, facts)):
        raise ValueError(
            f"its content has SHA-256 {found[:12]}..., its header says {stated[:12]}..."
        )
    coefficients = iter(tensors["coefficients"].tolist())
    calls = iter(torch.cat([tensors["times"].unsqueeze(1), tensors["levels"]], 1).tolist())
    draws = iter(tensors["draws"].tolist())
    rows: list[list[Any]] = []
    for row in facts["instructions"]:
        match row[0]:
            case "combine":
                rows.append(
                    [row[0], row[1], [[register, next(coefficients)] for register in row[2]]]
                )
            case "call":
                rows.append([*row, *next(calls)])
            case "draw":
                rows.append(
                    [*row, *(None if math.isnan(number) else number for number in next(draws))]
                )
            case _:
                rows.append(row)
    return {**facts, "grid": tensors["grid"].tolist(), "instructions": rows}


def _digest(tensors: dict[str, Tensor], facts: dict[str, Any]) -> str:
    total = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        total.update(f"{name}:{tuple(tensors[name].shape)};".encode())
        total.update(tensors[name].contiguous().numpy().tobytes())
    return total.hexdigest()
