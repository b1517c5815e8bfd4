"""What is asked of a solve: the arguments of `sample`, `solve` and `encode` as one value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sdeflow.denoisers import Denoiser
from sdeflow.grid import GridFunction
from sdeflow.noise import Noise
from sdeflow.plan.plan import Plan
from sdeflow.process import Process
from sdeflow.solvers.base import Solver

GraphMode = bool | Literal["require"]
"""The argument `compile`: whether batches run as CUDA graphs. With `"require"` it is an error if
they cannot.
"""


@dataclass(frozen=True)
class CallInfo:
    """What a callback gets after a network call. Its tensors may be kept, and not be changed.

    `samples` is the slice of all samples that this batch is.
    """

    index: int
    nfe: int
    t: float
    nsr: float
    x: Tensor
    x0: Tensor
    samples: slice


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """The arguments of a solve, as the user gave them; `sdeflow.sample` says what each means."""

    score_fn: Denoiser | Callable[..., Tensor]
    process: Process | str | None = None
    solver: str | Solver | Plan | None = None
    nfe: int | None = None
    grid: str | GridFunction | Tensor | Sequence[float] | None = None
    shape: Sequence[int] | None = None
    n: int | None = None
    seeds: int | Sequence[int] | None = None
    condition: Mapping[str, Any] | None = None
    x: Tensor | None = None
    x0: Tensor | None = None
    t: float | None = None
    finish: bool = True
    noise: Literal["seeded", "brownian"] | Noise = "seeded"
    batch_size: int | Literal["auto"] | None = None
    device: str | torch.device | None = None
    dtype: torch.dtype | None = None
    compile: GraphMode = False
    progress: bool = False
    callback: Callable[[CallInfo], Any] | None = None
    requires_grad: bool = False
    trajectory: bool = False
    x0s: bool = False
