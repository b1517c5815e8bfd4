"""The C kernel of linear combinations on the CPU (`kernel.c`): compiled at its first use, where the machine has a compiler.

torch has no elementwise operation of more than two scaled terms, so that it takes a pass over memory for each term, and on the
CPU memory is what a solver costs. Where there is no compiler, or `SDEFLOW_KERNEL=0` is set, torch's passes do the work.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

Run = Sequence[tuple[Tensor, Sequence[Tensor], Sequence[float]]]
"""Combinations to do in order: output, operands, coefficients. The output may be the first operand."""

# Not fused multiply-adds, which would round by the machine. OpenMP's library is torch's own: named once more at the link, it would
# be a second pool of threads.
_COMPILE = ("-O3", "-ffp-contract=off", "-fPIC")
_THREADS = ("-fopenmp",)
_NAMES = {torch.float32: "combine_float", torch.float64: "combine_double"}


@cache
def cpu_kernel(dtype: torch.dtype) -> Callable[[Run, int], None] | None:
    """`combine(run, n)` over tensors of `n` elements each, all laid out alike; None where there is none."""
    library = _library() if dtype in _NAMES else None
    if library is None:
        return None
    function = getattr(library, _NAMES[dtype])
    function.argtypes = (ctypes.c_long, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_long)
    function.restype = None

    def combine(run: Run, n: int) -> None:
        terms: list[int] = []
        arrays: list[int] = []
        factors: list[float] = []
        for out, operands, coefficients in run:
            terms.append(len(operands))
            arrays.append(out.data_ptr())
            arrays += [x.data_ptr() for x in operands]
            factors += coefficients
        packed = struct.pack(f"{len(terms)}l", *terms), struct.pack(f"{len(arrays)}P", *arrays)
        function(len(terms), *packed, struct.pack(f"{len(factors)}d", *factors), n)

    return combine


@cache
def _library() -> ctypes.CDLL | None:
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if os.environ.get("SDEFLOW_KERNEL") == "0" or compiler is None:
        return None
    source = resources.files("sdeflow.execution").joinpath("kernel.c").read_bytes()
    for flags in ((*_COMPILE, *_THREADS), _COMPILE):
        try:
            return ctypes.CDLL(str(_compiled(source, compiler, flags)))
        except (OSError, subprocess.SubprocessError):
            continue
    return None


def _compiled(source: bytes, compiler: str, flags: Sequence[str]) -> Path:
    """The library, made anew unless it is in the user's cache."""
    key = hashlib.sha256(source + " ".join((compiler, *flags, torch.__version__)).encode()).hexdigest()[:16]
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdeflow" / f"kernel-{key}.so"
    if cached.is_file():
        return cached
    folder = Path(tempfile.mkdtemp(prefix="sdeflow-kernel-"))
    run = {"check": True, "capture_output": True, "timeout": 60}
    subprocess.run([compiler, *flags, "-c", "-x", "c", "-", "-o", folder / "kernel.o"], input=source, **run)  # type: ignore[call-overload]
    subprocess.run([compiler, "-shared", folder / "kernel.o", "-o", folder / "kernel.so"], **run)  # type: ignore[call-overload]
    try:  # whole or not at all: another process may be looking
        cached.parent.mkdir(parents=True, exist_ok=True)
        beside = cached.with_suffix(f".{os.getpid()}")
        shutil.copy(folder / "kernel.so", beside)
        os.replace(beside, cached)
    except OSError:  # no such folder can be had: for this process alone
        return folder / "kernel.so"
    shutil.rmtree(folder, ignore_errors=True)
    return cached
