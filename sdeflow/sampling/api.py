"""`sample`, `solve` and `encode`: a sentence over process, denoiser, solver, grid and noise."""

from __future__ import annotations

import dataclasses
import time as clock
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sdeflow import registry
from sdeflow._version import __version__
from sdeflow.denoisers import Denoiser, as_denoiser
from sdeflow.errors import GridError
from sdeflow.grid import GridFunction
from sdeflow.noise import Noise
from sdeflow.plan.plan import Plan
from sdeflow.process import Process
from sdeflow.sampling.batch_size import BatchSize
from sdeflow.sampling.batches import Loop, ProgressBar, Step
from sdeflow.sampling.cuda_graphs import Compile, GraphCache, refusal
from sdeflow.sampling.inputs import Conditions, Inputs, check_device, device_of
from sdeflow.sampling.times import DEFAULT_NFE, chosen_grid, default_levels, lay, times_of
from sdeflow.solvers.base import GridSolver, Solution, Solver, check_times

__all__ = [
    "DEFAULT_NFE",
    "DEFAULT_SOLVER",
    "Step",
    "check_device",
    "device_of",
    "encode",
    "sample",
    "solve",
]

DEFAULT_SOLVER = "auto"


def sample(
    score_fn: Denoiser | Callable[..., Tensor],
    process: Process | str | None = None,
    *,
    solver: str | Solver | Plan | None = None,
    nfe: int | None = None,
    grid: str | GridFunction | Tensor | Sequence[float] | None = None,
    shape: Sequence[int] | None = None,
    n: int | None = None,
    seeds: int | Sequence[int] | None = None,
    condition: Mapping[str, Any] | None = None,
    x: Tensor | None = None,
    x0: Tensor | None = None,
    t: float | None = None,
    finish: bool = True,
    noise: Literal["seeded", "brownian"] | Noise = "seeded",
    batch_size: int | Literal["auto"] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    compile: Compile = False,
    progress: bool = False,
    callback: Callable[[Step], Any] | None = None,
    requires_grad: bool = False,
) -> Tensor:
    """Samples of the model, `[n, *shape]`: noise taken to data by a solver in `nfe` network calls.

        sdeflow.sample(score_fn, process=VP(), nfe=20, shape=(3, 32, 32), n=4)

    - `score_fn`: a `Denoiser` (a loaded model, `Prediction(...)`, a target), or a plain function
      `score_fn(x, t)`, the score of `process` at `x` of shape `[B, *shape]` and `t` of shape `[B]`.
    - `process`: the path along which to sample, by default the denoiser's own.
    - `solver`, `nfe`: a name or a `Solver`, and its exact number of network calls; by default
      `"auto"` with 35. A saved `Plan` serves as a solver too. Adaptive solvers take tolerances of
      their own instead of `nfe`.
    - `grid`: a name, a function `grid(process, n, t_min=, t_max=)`, or the times themselves,
      honoured exactly.
    - `shape`: of ONE sample, without the batch; needed where the denoiser does not know it. `n`:
      how many samples.
    - `seeds`: one a sample, or the first of `n` consecutive ones; by default fresh ones, kept in
      `Solution.seeds`. Row i depends on its own seed alone, not on `n`, `batch_size`, the device or
      the dtype.
    - `condition`: keyword arguments for the network; tensors with one row a sample are cut along
      with the batch.
    - `x`, `t`: start from the state `x` at time `t`; or `x0`, `t`: from the data `x0` noised to `t`
      (the higher, the less is left of it).
    - `finish`: whether to end with the step to zero noise; without it the state at the last level
      is returned.
    - `noise`: `"seeded"`; `"brownian"` for a path that is the same at every number of steps; or a
      `Noise` of your own.
    - `batch_size`: at most so many samples at a time, or `"auto"`: what fits, and half of it where
      memory is spent after all.
    - `compile`: on CUDA, run network and solver as one CUDA graph, which is kept for later calls;
      where that cannot be, it runs as ever, with a `CompileWarning` that says why. `"require"`
      makes that an error.
    - `device`, `dtype`: of the state, by default the network's and float32.
    - `progress`: a progress bar. `callback`: called with a `Step` after each network call.
    - `requires_grad`: let gradients flow through the solve.

    Errors: `UnknownNameError`, `BudgetError`, `GridError`, `TypeError`/`ValueError` for what cannot
    be, before any network call; `NonFiniteError` where the network returned NaN; all of them say
    what to do.
    """
    return solve(
        score_fn,
        process,
        solver=solver,
        nfe=nfe,
        grid=grid,
        shape=shape,
        n=n,
        seeds=seeds,
        condition=condition,
        x=x,
        x0=x0,
        t=t,
        finish=finish,
        noise=noise,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        compile=compile,
        progress=progress,
        callback=callback,
        requires_grad=requires_grad,
    ).x


def solve(
    score_fn: Denoiser | Callable[..., Tensor],
    process: Process | str | None = None,
    *,
    solver: str | Solver | Plan | None = None,
    nfe: int | None = None,
    grid: str | GridFunction | Tensor | Sequence[float] | None = None,
    shape: Sequence[int] | None = None,
    n: int | None = None,
    seeds: int | Sequence[int] | None = None,
    condition: Mapping[str, Any] | None = None,
    x: Tensor | None = None,
    x0: Tensor | None = None,
    t: float | None = None,
    finish: bool = True,
    noise: Literal["seeded", "brownian"] | Noise = "seeded",
    batch_size: int | Literal["auto"] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    compile: Compile = False,
    progress: bool = False,
    callback: Callable[[Step], Any] | None = None,
    requires_grad: bool = False,
    trajectory: bool = False,
    x0s: bool = False,
) -> Solution:
    """As `sample`, but returns a `Solution`: the samples and everything about how they were made.

    `trajectory=True` keeps the state at every grid level (and the result) in `Solution.trajectory`,
    `x0s=True` the prediction at each call in `Solution.x0s`; both are stacked along a new first
    axis.
    """
    began = clock.perf_counter()
    chosen = None if process is None else registry.process(process)
    denoiser = as_denoiser(score_fn, chosen)
    path = denoiser.process
    method = (
        solver
        if isinstance(solver, Plan)
        else registry.solver(DEFAULT_SOLVER if solver is None else solver)
    )
    if isinstance(method, Solver):
        method = method.for_denoiser(denoiser)
    start = Inputs(denoiser, shape, n, seeds, x, x0, t, device, dtype)
    if not isinstance(method, Plan):
        grid = chosen_grid(grid, method, denoiser, finish)
    times, grid_name = times_of(method, path, nfe, grid, t, finish)
    conditions = Conditions(condition, start.n, start.device)
    size = _batch_size(batch_size, score_fn, start, noise, seeds, method, compile)
    if callback is not None and not callable(callback):
        raise TypeError(f"a callback is a function of a Step; got {callback!r}")
    if x is None and x0 is None:
        _check_start(path, times)
    _warn_training(denoiser)

    bar = ProgressBar(progress, start.n, _calls(method, times, finish))
    try:
        graphs = GraphCache(compile, score_fn, denoiser, chosen, bar.saying, x0s)
        graphs.refuse(
            refusal(method, start.device, callback is not None, requires_grad, conditions.whole)
        )
        loop = Loop(
            method,
            denoiser,
            path,
            start,
            times,
            finish,
            conditions,
            noise,
            trajectory,
            x0s,
            callback,
            size,
            graphs,
            bar,
        )
        with torch.enable_grad() if requires_grad else torch.no_grad():
            whole = loop.run()
    finally:
        bar.close()
    return dataclasses.replace(
        whole,
        times=times,
        solver=method if isinstance(method, Solver) else None,
        process=path,
        grid=grid_name,
        seeds=tuple(noise.seeds) if isinstance(noise, Noise) else start.seeds,
        noise=noise if isinstance(noise, str) else type(noise).__name__,
        condition=dict(condition or {}),
        device=str(start.device),
        dtype=str(whole.x.dtype).removeprefix("torch."),
        seconds=clock.perf_counter() - began,
        version=__version__,
    )


def encode(
    score_fn: Denoiser | Callable[..., Tensor],
    x0: Tensor,
    process: Process | str | None = None,
    *,
    solver: str | Solver | None = None,
    nfe: int | None = None,
    grid: str | GridFunction | Tensor | Sequence[float] | None = None,
    condition: Mapping[str, Any] | None = None,
    batch_size: int | Literal["auto"] | None = None,
    compile: Compile = False,
    progress: bool = False,
    requires_grad: bool = False,
) -> Tensor:
    """Data taken to noise along the probability-flow ODE: the state at `t_max`, from which
    `sample(x=..., t=t_max)` returns.

    `x0` is taken for the state at `t_min`. `nfe` counts network calls; a grid of given times must
    increase.
    """
    denoiser = as_denoiser(score_fn, None if process is None else registry.process(process))
    if isinstance(grid, str) or grid is None or callable(grid):
        method = registry.solver(DEFAULT_SOLVER if solver is None else solver).for_denoiser(
            denoiser
        )
        if nfe is not None:
            count = method.levels(nfe, finish=False)
        else:
            count = 2 if method.adaptive else default_levels(method, finish=False)
        grid = lay(
            denoiser.process, chosen_grid(grid, method, denoiser, finish=False), count, None
        ).flip(0)
        nfe = None
    else:
        grid = check_times(grid)
        if grid[-1] < grid[0]:
            raise GridError("encoding runs from data to noise: give times that increase")
    return sample(
        score_fn,
        process,
        solver=solver,
        nfe=nfe,
        grid=grid,
        condition=condition,
        x=x0,
        t=float(torch.as_tensor(grid)[0]),
        finish=False,
        batch_size=batch_size,
        compile=compile,
        progress=progress,
        requires_grad=requires_grad,
    )


def _batch_size(
    asked: int | Literal["auto"] | None,
    score_fn: Any,
    start: Inputs,
    noise: str | Noise,
    seeds: int | Sequence[int] | None,
    method: Solver | Plan,
    compile: Compile,
) -> BatchSize:
    """How many samples at a time; an error where the solve cannot be cut so."""
    own, dense = isinstance(noise, Noise), getattr(method, "dense", False)
    key = (start.shape, start.dtype, start.device, bool(compile))
    size = BatchSize(asked, start.n, score_fn, key, whole=own or dense)
    if isinstance(noise, Noise) and seeds is not None and start.seeds != tuple(noise.seeds):
        raise ValueError("a noise of your own brings its seeds: leave seeds out")
    if own and size.now < start.n:
        raise ValueError(
            f"a noise of your own serves one batch: it cannot be cut into batches of {size.now};"
            " leave batch_size out"
        )
    if dense and size.now < start.n:
        raise ValueError("a dense solution is one batch: leave batch_size out, or dense=False")
    return size


def _calls(method: Solver | Plan, times: Tensor, finish: bool) -> int | None:
    """The network calls of a batch, where they are known."""
    if isinstance(method, Plan):
        return method.nfe
    return method.calls(len(times), finish=finish) if isinstance(method, GridSolver) else None


def _warn_training(denoiser: Denoiser) -> None:
    if any(
        m.training and isinstance(m, nn.Dropout | nn.modules.batchnorm._BatchNorm)
        for network in denoiser.networks
        for m in network.modules()
    ):
        warnings.warn(
            "the network is in training mode, so dropout or batch norm will disturb the samples:"
            " call network.eval() first",
            stacklevel=4,
        )


def _check_start(process: Process, times: Tensor) -> None:
    """Refuse a solve from pure noise that runs towards noise; warn of one that begins where much
    signal should be left.
    """
    if len(times) > 1 and times[-1] > times[0]:
        raise GridError(
            "a solve towards noise starts from a state: pass x= and finish=False, or use encode"
        )
    nsr = process.level(float(times[0].detach())).nsr
    if 0.0 <= nsr < 5.0:
        warnings.warn(
            f"the grid starts at t={float(times[0].detach()):g}, where the noise is only {nsr:.3g}"
            " times the signal, from noise alone: pass x= (or x0= and t=) to start from a state"
            " there",
            stacklevel=4,
        )
