"""`sample`, `solve` and `encode`: a sentence over process, denoiser, solver, grid and noise."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time as clock
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import index
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sdeflow import registry
from sdeflow._version import __version__
from sdeflow.denoiser import Denoiser, as_denoiser
from sdeflow.errors import BudgetError, GridError, NonFiniteError, SolverError
from sdeflow.grid import GridFunction
from sdeflow.instructions import Call, Record
from sdeflow.noise import BrownianNoise, Noise, SeededNoise
from sdeflow.plan import Plan
from sdeflow.process import Process
from sdeflow.reverse import Reverse
from sdeflow.solvers.base import GridSolver, OnCall, Solution, Solver, check_times, run_plan

DEFAULT_SOLVER = "auto"
DEFAULT_NFE = 35


@dataclass(frozen=True)
class Step:
    """What a callback sees after a network call; it may keep the tensors only as clones.

    `samples` is the slice of the whole set that this batch is.
    """

    index: int
    nfe: int
    t: float
    nsr: float
    x: Tensor
    x0: Tensor
    samples: slice


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
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    callback: Callable[[Step], Any] | None = None,
    requires_grad: bool = False,
) -> Tensor:
    """Samples of the model, `[n, *shape]`: noise taken to data by a solver in `nfe` network calls.

        sdeflow.sample(score_fn, process=VP(), nfe=20, shape=(3, 32, 32), n=4)

    - `score_fn`: a `Denoiser` (a loaded model, `Prediction(...)`, a target), or a plain function `score_fn(x, t)`, the score
      of `process` at `x` of shape `[B, *shape]` and `t` of shape `[B]`.
    - `process`: the path along which to sample, by default the denoiser's own.
    - `solver`, `nfe`: a name or a `Solver`, and its exact number of network calls; by default `"auto"` with 35. A saved `Plan`
      serves as a solver too. Adaptive solvers take tolerances of their own instead of `nfe`.
    - `grid`: a name, a function `grid(process, n, t_min=, t_max=)`, or the times themselves, honoured exactly.
    - `shape`: of ONE sample, without the batch; needed where the denoiser does not know it. `n`: how many samples.
    - `seeds`: one a sample, or the first of `n` consecutive ones; by default fresh ones, kept in `Solution.seeds`. Row i
      depends on its own seed alone, not on `n`, `batch_size`, the device or the dtype.
    - `condition`: keyword arguments for the network; tensors with one row a sample are cut along with the batch.
    - `x`, `t`: start from the state `x` at time `t`; or `x0`, `t`: from the data `x0` noised to `t` (the higher, the less is
      left of it).
    - `finish`: whether to end with the step to zero noise; without it the state at the last level is returned.
    - `noise`: `"seeded"`; `"brownian"` for a path that is the same at every number of steps; or a `Noise` of your own.
    - `batch_size`: at most so many samples at a time. `device`, `dtype`: of the state, by default the network's and float32.
    - `progress`: a progress bar. `callback`: called with a `Step` after each network call.
    - `requires_grad`: let gradients flow through the solve.

    Errors: `UnknownNameError`, `BudgetError`, `GridError`, `TypeError`/`ValueError` for what cannot be, before any network call;
    `NonFiniteError` where the network returned NaN; all of them say what to do.
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
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    callback: Callable[[Step], Any] | None = None,
    requires_grad: bool = False,
    trajectory: bool = False,
    x0s: bool = False,
) -> Solution:
    """As `sample`, but returns a `Solution`: the samples and everything about how they were made.

    `trajectory=True` keeps the state at every grid level (and the result) in `Solution.trajectory`, `x0s=True` the prediction
    at each call in `Solution.x0s`; both are stacked along a new first axis.
    """
    began = clock.perf_counter()
    chosen = None if process is None else registry.process(process)
    denoiser = as_denoiser(score_fn, chosen)
    path = denoiser.process
    method = solver if isinstance(solver, Plan) else registry.solver(DEFAULT_SOLVER if solver is None else solver)
    start = _Start(denoiser, shape, n, seeds, x, x0, t, device, dtype)
    if grid is None and not isinstance(method, Plan):
        grid = _own_grid(method, denoiser, finish)
    times, grid_name = _times(method, path, nfe, grid, t, finish)
    conditions = _Conditions(condition, start.n, start.device)
    size = start.n if batch_size is None else _positive("batch_size", batch_size)
    if isinstance(noise, Noise) and seeds is not None and start.seeds != tuple(noise.seeds):
        raise ValueError("a noise of your own brings its seeds: leave seeds out")
    if isinstance(noise, Noise) and size < start.n:
        raise ValueError(
            f"a noise of your own serves one batch: it cannot be cut into batches of {size}; leave batch_size out"
        )
    if batch_size is not None and size < start.n and getattr(method, "dense", False):
        raise ValueError("a dense solution is one batch: leave batch_size out, or dense=False")
    if callback is not None and not callable(callback):
        raise TypeError(f"a callback is a function of a Step; got {callback!r}")
    if x is None and x0 is None:
        _check_start(path, times)
    _warn_training(denoiser)

    parts: list[Solution] = []
    with (
        torch.enable_grad() if requires_grad else torch.no_grad(),
        _bar(progress, method, times, finish, start.n, size) as bar,
    ):
        for first in range(0, start.n, size):
            rows = slice(first, min(first + size, start.n))
            source = _noise(noise, start.seeds[rows], start.shape, start.device, start.dtype)
            state = start.state(path, float(times[0].detach()), rows, source)
            reverse = Reverse(denoiser, conditions.rows(rows))
            collected: list[Tensor] = []
            watch = _watcher(bar, callback, collected if x0s else None, rows)
            try:
                part = _integrate(method, reverse, state, times, source, finish, trajectory, watch)
                if not torch.isfinite(part.x).all():
                    _find_nonfinite(method, reverse, start, path, times, finish, rows, noise, part)
            except (SolverError, NonFiniteError) as error:
                error.finished = _join(parts) if parts else None  # what is done is not lost
                raise
            part.network_calls = part.network_calls or reverse.nfe
            part.x0s = torch.stack(collected) if collected else None
            parts.append(part)
    whole = _join(parts)
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
    batch_size: int | None = None,
    progress: bool = False,
    requires_grad: bool = False,
) -> Tensor:
    """Data taken to noise along the probability-flow ODE: the state at `t_max`, from which `sample(x=..., t=t_max)` returns.

    `x0` is taken for the state at `t_min`. `nfe` counts network calls; a grid of given times must increase.
    """
    denoiser = as_denoiser(score_fn, None if process is None else registry.process(process))
    if isinstance(grid, str) or grid is None or callable(grid):
        method = registry.solver(DEFAULT_SOLVER if solver is None else solver)
        if nfe is not None:
            count = method.levels(nfe, finish=False)
        else:
            count = 2 if method.adaptive else _default_levels(method, finish=False)
        own = _own_grid(method, denoiser, finish=False)
        grid = _lay(denoiser.process, own if grid is None else grid, count, None).flip(0)
        nfe = None
    else:
        grid = check_times(grid)
        if grid[-1] < grid[0]:
            raise GridError("encoding runs from data to noise: give times that increase")
    return sample(
        denoiser,
        solver=solver,
        nfe=nfe,
        grid=grid,
        condition=condition,
        x=x0,
        t=float(torch.as_tensor(grid)[0]),
        finish=False,
        batch_size=batch_size,
        progress=progress,
        requires_grad=requires_grad,
    )


# ------------------------------------------------------------------------------------------------- parts of the sentence


class _Start:
    """Where the solve starts: shape, number, seeds, device and dtype, and the states themselves."""

    def __init__(
        self,
        denoiser: Denoiser,
        shape: Sequence[int] | None,
        n: int | None,
        seeds: int | Sequence[int] | None,
        x: Tensor | None,
        x0: Tensor | None,
        t: float | None,
        device: str | torch.device | None,
        dtype: torch.dtype | None,
    ):
        given = x if x is not None else x0
        if x is not None and x0 is not None:
            raise ValueError("start from a state x or from data x0, not from both")
        if x0 is not None and t is None:
            raise ValueError(
                "x0= starts from data noised to a time: say which, t=0.5 (its noise level is the strength)"
            )
        if t is not None and given is None:
            raise ValueError("t= is the time of a state x= (or of data x0= noised to it): give one of them")
        if given is not None and (not isinstance(given, Tensor) or given.ndim < 1 or not given.is_floating_point()):
            raise TypeError("x and x0 are floating-point tensors of shape [n, *shape]")
        if given is not None and not bool(torch.isfinite(given).all()):
            raise NonFiniteError("the state to start from holds NaN or infinity")
        if given is not None and denoiser.shape not in (None, tuple(given.shape[1:])):
            raise ValueError(
                f"samples of this model have the shape {denoiser.shape}; x and x0 add a batch in front: got {tuple(given.shape)}"
            )
        if t is not None and not isinstance(t, int | float) and not (isinstance(t, Tensor) and t.ndim == 0):
            raise TypeError(f"t is one number for all samples; got {t!r}")
        known = tuple(given.shape[1:]) if given is not None else denoiser.shape
        if shape is not None:
            asked = tuple(_positive("shape", size) for size in ([shape] if isinstance(shape, int) else shape))
            if known is not None and asked != known:
                raise ValueError(
                    f"shape is that of one sample, without the batch: {known} here, not {asked}; n= says how many"
                )
            known = asked
        if known is None:
            raise ValueError(
                "this model does not know its shape: pass shape= of one sample, without the batch, such as shape=(3, 32, 32)"
            )
        if isinstance(seeds, Tensor):
            seeds = seeds.tolist()
        if seeds is not None and not hasattr(seeds, "__len__"):
            try:
                seeds = index(seeds)  # whatever kind of integer it is
            except TypeError as error:
                raise TypeError(f"seeds are integers, one a sample, or the first of n; got {seeds!r}") from error
        self.shape, self.x, self.x0 = known, x, x0
        self.n = _count(n, seeds, given)
        self.seeds = _seeds(seeds, self.n)
        self.device = (
            check_device(device) if device is not None else given.device if given is not None else device_of(denoiser)
        )
        self.dtype = dtype or (given.dtype if given is not None else torch.float32)
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise TypeError(f"dtype is that of the state, a floating one such as torch.float32; got {self.dtype!r}")

    def state(self, process: Process, t: float, rows: slice, noise: Noise) -> Tensor:
        """The states of some rows at the time where the solve begins."""
        if self.x is not None:
            return self.x[rows].to(self.device, self.dtype)
        eps = noise.start().to(self.device, self.dtype)
        if self.x0 is not None:
            return process.perturb(self.x0[rows].to(self.device, self.dtype), t, eps)
        return eps * process.level(t).sigma


class _Conditions:
    """The network's keyword arguments, cut along with the batch."""

    def __init__(self, condition: Mapping[str, Any] | None, n: int, device: torch.device):
        if condition is not None and not isinstance(condition, Mapping):
            raise TypeError(
                f"condition is a mapping of names to values, such as {{'label': labels}}; got {type(condition).__name__}"
            )
        self.n = n
        self.whole: dict[str, Any] = {}
        for name, value in (condition or {}).items():
            if isinstance(value, np.ndarray):
                value = torch.from_numpy(value)
            if isinstance(value, list | tuple) and value and all(isinstance(v, int | float) for v in value):
                value = torch.tensor(value)
            if isinstance(value, Tensor):
                if value.ndim and value.shape[0] not in (1, n):
                    raise ValueError(
                        f"condition {name!r} has {value.shape[0]} rows for {n} samples: give one row a sample, or one for all"
                    )
                value = value.to(device)
                value = value.expand(n, *value.shape[1:]) if value.ndim else value
            self.whole[name] = value

    def rows(self, rows: slice) -> dict[str, Any]:
        """The condition of some rows; lists with one entry a sample are cut too."""

        def cut(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[rows] if value.ndim else value
            return value[rows] if isinstance(value, list | tuple) and len(value) == self.n else value

        return {name: cut(value) for name, value in self.whole.items()}


def _times(
    method: Solver | Plan,
    process: Process,
    nfe: int | None,
    grid: str | GridFunction | Tensor | Sequence[float] | None,
    t: float | None,
    finish: bool,
) -> tuple[Tensor, str]:
    """The times of the solve and the name of their grid."""
    if isinstance(method, Plan):
        if grid is not None or nfe not in (None, method.nfe):
            raise ValueError(
                f"a plan brings its own grid and budget (NFE {method.nfe}): pass neither grid= nor another nfe="
            )
        levels = process.levels([t for t, _, _ in method.grid])
        for mine, (time, s, sigma) in zip(levels, method.grid, strict=True):
            if abs(mine.s - s) > 1e-9 * (1 + abs(s)) or abs(mine.sigma - sigma) > 1e-9 * (1 + abs(sigma)):
                raise ValueError(
                    f"this plan was traced under {method.process}, and {process!r} differs from it at t={time:g}: pass process="
                )
        if t is not None and t != method.grid[0][0]:
            raise ValueError(f"this plan starts at t={method.grid[0][0]:g}, not at t={t:g}")
        if finish != method.finished:
            raise ValueError(f"this plan was traced with finish={method.finished}")
        return torch.tensor([time for time, _, _ in method.grid], dtype=torch.float64), "the plan's own"
    levels_asked = None if nfe is None else method.levels(nfe, finish=finish)  # adaptive solvers refuse
    if grid is not None and not isinstance(grid, str) and not callable(grid):
        times = check_times(grid)
        if levels_asked not in (None, len(times)):
            raise BudgetError(
                f"the grid has {len(times)} levels; {type(method).__name__} needs {levels_asked} for nfe={nfe}"
            )
        if t is not None and float(times[0]) != t:
            raise GridError(f"the grid starts at t={float(times[0]):g}, the state at t={t:g}: they must be the same")
        return times, "given"
    count = levels_asked or (2 if method.adaptive else _default_levels(method, finish))
    name = (
        grid if isinstance(grid, str) else process.default_grid if grid is None else getattr(grid, "__name__", "given")
    )
    times = _lay(process, grid, count, t)
    if nfe is not None and len(times) != count:
        raise BudgetError(
            f"the grid {name} laid {len(times)} levels from t={float(times[0]):g}; "
            f"{type(method).__name__} needs {count} for nfe={nfe}"
        )
    return times, name


def _default_levels(method: Solver, finish: bool) -> int:
    """Levels for the default budget, or for the next below it that the solver can spend."""
    for budget in range(DEFAULT_NFE, 0, -1):
        with contextlib.suppress(BudgetError):
            return method.levels(budget, finish=finish)
    return method.levels(DEFAULT_NFE, finish=finish)


def _own_grid(method: Solver, denoiser: Denoiser, finish: bool) -> str | GridFunction | None:
    """The grid that goes with a solver, or else with the model."""
    if method.default_grid is None:
        return denoiser.default_grid
    if finish:
        return method.default_grid
    # It may end above t_min, where the step to zero noise takes over; without that step the end is wanted.
    whole = partial(registry.grid_function(method.default_grid), t_min=denoiser.process.t_min)
    whole.__name__ = method.default_grid if isinstance(method.default_grid, str) else "given"  # type: ignore[attr-defined]
    return whole


def _lay(process: Process, grid: str | GridFunction | None, levels: int, t: float | None) -> Tensor:
    """A grid of so many levels from `t` (or the end of time) down."""
    function = registry.grid_function(process.default_grid if grid is None else grid)
    if t is not None and not process.t_min <= t <= process.t_max:
        raise GridError(f"{type(process).__name__} runs from t={process.t_min:g} to t={process.t_max:g}; got t={t:g}")
    if t is not None and t == process.t_min:
        return torch.tensor([t], dtype=torch.float64)
    if t is None:
        return check_times(function(process, levels))
    times = check_times(function(process, levels, t_max=t)).clone()
    times[0] = t  # exactly, whatever rounding or a table made of it
    return check_times(times)


def _integrate(
    method: Solver | Plan,
    reverse: Reverse,
    x: Tensor,
    times: Tensor,
    noise: Noise,
    finish: bool,
    record: bool,
    watch: OnCall | None,
) -> Solution:
    if isinstance(method, Plan):
        if record and not any(isinstance(i, Record) for i in method.instructions):
            raise ValueError("this plan was traced without record=True, so it keeps no trajectory: trace it with it")
        return run_plan(method, reverse, x, noise, watch)
    return method.integrate(reverse, x, times, noise, finish=finish, record=record, on_call=watch)


def _noise(
    noise: str | Noise, seeds: tuple[int, ...], shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Noise:
    if isinstance(noise, Noise):
        if (len(noise.seeds), tuple(noise.shape)) != (len(seeds), shape):
            raise ValueError(
                f"the noise is made for {len(noise.seeds)} samples of shape {tuple(noise.shape)}, and a batch here has "
                f"{len(seeds)} of shape {shape}: a noise of your own serves one batch of n samples"
            )
        return noise
    kinds = {"seeded": SeededNoise, "brownian": BrownianNoise}
    if noise not in kinds:
        raise ValueError(f"noise is 'seeded', 'brownian' or a Noise; got {noise!r}")
    return kinds[noise](seeds, shape, device=device, dtype=dtype)


def _watcher(
    bar: tqdm[Any] | None, callback: Callable[[Step], Any] | None, x0s: list[Tensor] | None, rows: slice
) -> OnCall | None:
    """What is done after each network call, or None where nothing is."""
    if bar is None and callback is None and x0s is None:
        return None

    def watch(index: int, call: Call, x: Tensor, x0: Tensor) -> None:
        if x0s is not None:
            x0s.append(x0.clone())
        if callback is not None:
            s = float(call.s)
            callback(Step(index, index + 1, float(call.t), float(call.sigma) / s if s else float("inf"), x, x0, rows))
        if bar is not None:
            bar.update()

    return watch


@contextlib.contextmanager
def _bar(
    progress: bool, method: Solver | Plan, times: Tensor, finish: bool, n: int, size: int
) -> Iterator[tqdm[Any] | None]:
    if not progress:
        yield None
        return
    batches = -(-n // size)
    total = None
    if isinstance(method, Plan):
        total = method.nfe * batches
    elif isinstance(method, GridSolver):
        total = method.calls(len(times), finish=finish) * batches
    with tqdm(total=total, unit="call", desc=f"sampling {n}", dynamic_ncols=True) as bar:
        yield bar


def _find_nonfinite(
    method: Solver | Plan,
    reverse: Reverse,
    start: _Start,
    process: Process,
    times: Tensor,
    finish: bool,
    rows: slice,
    noise: str | Noise,
    part: Solution,
) -> None:
    """Raise the error for a result that is not finite, having run the batch again to find the first call at fault."""
    bad = (~torch.isfinite(part.x).reshape(len(part.x), -1).all(1)).nonzero().flatten().tolist()
    names = ", ".join(str(rows.start + i) for i in bad[:5]) + (", ..." if len(bad) > 5 else "")
    where = ""
    if isinstance(noise, str):  # the same seeds make the same solve

        def check(index: int, call: Call, x: Tensor, x0: Tensor) -> None:
            if not bool(torch.isfinite(x0).all()):
                whose = "the network returned it" if bool(torch.isfinite(x).all()) else "its input was not finite"
                raise _Found(f" first at call {index + 1} (t={float(call.t):.6g}): {whose}.")

        source = _noise(noise, start.seeds[rows], start.shape, start.device, start.dtype)
        state = start.state(process, float(times[0].detach()), rows, source)
        try:
            _integrate(method, reverse, state, times, source, finish, False, check)
        except _Found as found:
            where = str(found)
    error = NonFiniteError(
        f"NaN or infinity in {len(bad)} of {len(part.x)} samples (number {names}).{where} "
        "The usual causes: half precision overflows, an eps-prediction far outside its training range, a score of the wrong scale."
    )
    error.partial = part
    raise error


class _Found(Exception):
    pass


def _join(parts: list[Solution]) -> Solution:
    if len(parts) == 1:
        return parts[0]
    first = parts[0]

    def cat(tensors: list[Tensor | None], dim: int) -> Tensor | None:
        return torch.cat([tensor for tensor in tensors if tensor is not None], dim) if tensors[0] is not None else None

    statistics = {
        key: torch.cat([part.statistics[key] for part in parts]) if isinstance(value, Tensor) and value.ndim else value
        for key, value in first.statistics.items()
    }
    return dataclasses.replace(
        first,
        x=torch.cat([part.x for part in parts]),
        nfe=max(part.nfe for part in parts),
        network_calls=sum(part.network_calls for part in parts),
        statistics=statistics,
        trajectory=cat([part.trajectory for part in parts], 1),
        x0s=cat([part.x0s for part in parts], 1),
        interpolant=None,
    )


def check_device(name: str | torch.device) -> torch.device:
    """The device of a name; `ValueError` for one that is not on this machine."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"no device {str(name)!r} on this machine ({str(error).splitlines()[0]}); 'cpu' always is"
        ) from error
    return device


def device_of(denoiser: Denoiser) -> torch.device:
    """The device of the network's first parameter; the CPU where there is none."""
    network = getattr(denoiser, "network", None)
    if isinstance(network, nn.Module):
        for parameter in network.parameters():
            return parameter.device
    return torch.device("cpu")


def _warn_training(denoiser: Denoiser) -> None:
    network = getattr(denoiser, "network", None)
    if isinstance(network, nn.Module) and any(
        m.training and isinstance(m, nn.Dropout | nn.modules.batchnorm._BatchNorm) for m in network.modules()
    ):
        warnings.warn(
            "the network is in training mode, so dropout or batch norm will disturb the samples: call network.eval() first",
            stacklevel=4,
        )


def _check_start(process: Process, times: Tensor) -> None:
    """Refuse a solve from pure noise that runs towards noise; warn of one that begins where much signal should be left."""
    if len(times) > 1 and times[-1] > times[0]:
        raise GridError("a solve towards noise starts from a state: pass x= and finish=False, or use encode")
    nsr = process.level(float(times[0].detach())).nsr
    if 0.0 <= nsr < 5.0:
        warnings.warn(
            f"the grid starts at t={float(times[0].detach()):g}, where the noise is only {nsr:.3g} times the signal, from noise "
            "alone: pass x= (or x0= and t=) to start from a state there",
            stacklevel=4,
        )


def _positive(name: str, value: int, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is a whole number, at least {least}; got {value!r}")
    return value


def _count(n: int | None, seeds: int | Sequence[int] | None, given: Tensor | None) -> int:
    counts = {}
    if n is not None:
        counts["n"] = _positive("n", n)
    if seeds is not None and not isinstance(seeds, int):
        counts["seeds"] = len(seeds)
    if given is not None:
        counts["the starting state"] = len(given)
    if len(set(counts.values())) > 1:
        raise ValueError("how many samples? " + ", ".join(f"{name} says {count}" for name, count in counts.items()))
    count = next(iter(counts.values()), 1)
    return _positive("the number of samples", count)


def _seeds(seeds: int | Sequence[int] | None, n: int) -> tuple[int, ...]:
    if seeds is None:
        # Fresh, and independent of torch's global generator, which a sampler has no business to move.
        first = int.from_bytes(os.urandom(4), "little")
        return tuple(range(first, first + n))
    if isinstance(seeds, int):
        return tuple(range(seeds, seeds + n))
    return tuple(index(seed) for seed in seeds)
