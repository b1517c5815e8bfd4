"""`sample`, `solve` and `encode`: a sentence over process, denoiser, solver, grid and noise."""

from __future__ import annotations

import time as clock
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sdeflow import registry
from sdeflow._utils.checks import one_of
from sdeflow._utils.math import transformed, vectorised
from sdeflow._version import __version__
from sdeflow.denoisers import Denoiser, as_denoiser
from sdeflow.denoisers.network import HALF
from sdeflow.errors import GridError
from sdeflow.grid import GridFunction
from sdeflow.noise import Noise
from sdeflow.plan.plan import Plan
from sdeflow.process import Process
from sdeflow.sampling.batch_size import BatchSize
from sdeflow.sampling.batches import Loop, ProgressBar
from sdeflow.sampling.cuda_graphs import GraphCache, is_planned, refusal
from sdeflow.sampling.encoding import check_encoding
from sdeflow.sampling.inputs import Conditions, Inputs
from sdeflow.sampling.request import CallInfo, GraphMode, Request
from sdeflow.sampling.times import times_of
from sdeflow.solvers.base import GridSolver, Provenance, Solution, Solver
from sdeflow.solvers.external.base import External

Step = CallInfo
"""What a callback gets: the name of `CallInfo` at the top of the package."""

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
    compile: GraphMode = False,
    progress: bool = False,
    callback: Callable[[CallInfo], Any] | None = None,
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
    - `condition`: keyword arguments for the network. Tensors, arrays and lists have one row a
      sample (or one for all) and are cut along with the batch; `Shared(value)` is handed on whole,
      `PerSample(values)` is cut.
    - `x`, `t`: start from the state `x` at time `t`; or `x0`, `t`: from the data `x0` noised to `t`
      (the higher, the less is left of it).
    - `finish`: whether to end with the step to zero noise; without it the state at the last level
      is returned.
    - `noise`: `"seeded"`; `"brownian"` for a path that is the same at every number of steps; or a
      `Noise` of your own.
    - `batch_size`: at most so many samples at a time, or `"auto"`: what fits, and half of it if
      memory runs out.
    - `compile`: on CUDA, run network and solver as one CUDA graph, which is kept for later calls;
      where that is impossible, it runs without, with a `CompileWarning` that says why. `"require"`
      makes that an error.
    - `device`, `dtype`: of the result, by default the network's and float32. In half precision
      (`dtype`, or that of `x` and `x0`) the solve itself is computed in float32, and the result is
      cast. A module is given its weights' dtype, a plain function the half precision asked for.
    - `progress`: a progress bar. `callback`: called with a `CallInfo` after each network call.
    - `requires_grad`: let gradients flow through the solve. `torch.func.grad`, `jvp` and `vmap` go
      through it too; within a function under `torch.compile` it is a break in the graph.

    An exception that ends a solve between its batches, Ctrl-C too, holds the finished ones as its
    `finished`, a `Solution`.

    Errors: `UnknownNameError`, `BudgetError`, `GridError`, `TypeError`/`ValueError` for impossible
    requests, before any network call; `NonFiniteError` where the network returned NaN, at which
    call and for which samples. All of them say what to do.
    """
    return run(Request(**locals())).x


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
    compile: GraphMode = False,
    progress: bool = False,
    callback: Callable[[CallInfo], Any] | None = None,
    requires_grad: bool = False,
    trajectory: bool = False,
    x0s: bool = False,
) -> Solution:
    """As `sample`, but returns a `Solution`: the samples and everything about how they were made.

    `trajectory=True` keeps the state at every grid level (and the result) in `Solution.trajectory`,
    `x0s=True` the prediction at each call in `Solution.x0s`; both are stacked along a new first
    axis.
    """
    return run(Request(**locals()))


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
    compile: GraphMode = False,
    progress: bool = False,
    requires_grad: bool = False,
) -> Tensor:
    """Data taken to noise along the probability-flow ODE: the state at `t_max`.

    `sample(x=..., t=t_max)` takes it back to data.

    `x0` is taken for the state at `t_min`. `nfe` counts network calls; a grid of given times must
    increase. A solver that errs on Gaussian data by more than a quarter, and by more than three
    times what DDIM does, is refused (`SolverError`): methods that extrapolate in `nsr`, such as
    `lms`, do not encode on most grids.
    """
    request = Request(**locals())
    if torch.compiler.is_compiling():
        return torch.compiler.disable(_encoded)(request)
    return _encoded(request)


def _encoded(request: Request) -> Tensor:
    """What `encode` returns."""
    score_fn, x0, process = request.score_fn, request.x0, request.process
    solver, grid = request.solver or DEFAULT_SOLVER, request.grid
    request = replace(request, x0=None, finish=False)
    denoiser = as_denoiser(score_fn, None if process is None else registry.process(process))
    if isinstance(solver, Plan):
        raise TypeError(
            "encode takes a solver; run a plan towards noise with solve(x=, solver=plan)"
        )
    method = registry.solver(solver).for_denoiser(denoiser)
    times, _ = times_of(method, denoiser, request)
    if grid is None or isinstance(grid, str) or callable(grid):
        times = times.flip(0)
    elif times[-1] < times[0]:
        raise GridError("encoding runs from data to noise: give times that increase")
    return run(replace(request, x=x0, t=float(times[0]), grid=times, nfe=None)).x


def run(request: Request) -> Solution:
    """The solution of a request: what `sample` and `solve` call."""
    if torch.compiler.is_compiling():
        # Within a function under torch.compile a solve is a break in its graph, run as it is.
        return torch.compiler.disable(run)(request)
    if torch.is_inference_mode_enabled():
        # A network that differentiates could not in inference mode, whatever it asks for.
        with torch.inference_mode(False), torch.no_grad():
            return run(request)
    began = clock.perf_counter()
    one_of("compile", request.compile, (True, False, "require"))
    chosen = None if request.process is None else registry.process(request.process)
    denoiser = as_denoiser(request.score_fn, chosen)
    denoiser.process.check()
    method = request.solver
    if not isinstance(method, Plan):
        method = registry.solver(DEFAULT_SOLVER if method is None else method)
        method = method.for_denoiser(denoiser)
    inputs = Inputs(denoiser, request)
    times, grid_name = times_of(method, denoiser, request)
    conditions = Conditions(request.condition, inputs.n, inputs.device)
    size = _batch_size(request, inputs, method)
    if request.callback is not None and not callable(request.callback):
        raise TypeError(f"a callback is a function of a Step; got {request.callback!r}")
    if request.x is None and request.x0 is None:
        _check_start(denoiser, times)
    upward = len(times) > 1 and bool(times[-1] > times[0])
    if request.x is not None and transformed(request.x):
        _check_transform(method, request.x)
    if request.x is not None and not upward and not transformed(request.x):
        _check_state(denoiser.process, times, request.x)
    if upward and isinstance(method, Plan):
        check_encoding(method, method.solver)
    elif upward and isinstance(method, GridSolver) and is_planned(method):
        plan = method.plan(denoiser.process, times, finish=False)
        check_encoding(plan, type(method).__name__)
    _warn_training(denoiser)

    def how(solution: Solution) -> Solution:
        """The solution, of all samples or of the first ones, that says how it was made."""
        noise = request.noise
        seeds = tuple(noise.seeds) if isinstance(noise, Noise) else inputs.seeds
        provenance = Provenance(
            times=times,
            solver=None if isinstance(method, Plan) else method,
            process=denoiser.process,
            grid=grid_name,
            seeds=seeds[: len(solution.x)],
            noise=type(noise).__name__ if isinstance(noise, Noise) else noise,
            condition=dict(request.condition or {}),
            device=str(inputs.device),
            dtype=str(solution.x.dtype).removeprefix("torch."),
            computed_in=str(inputs.computed_in).removeprefix("torch."),
            seconds=clock.perf_counter() - began,
            version=__version__,
        )
        return replace(solution, provenance=provenance)

    half = HALF.set(None if inputs.dtype == inputs.computed_in else inputs.dtype)
    bar = ProgressBar(request.progress, inputs.n, _calls(method, times, request.finish))
    try:
        graphs = GraphCache(request, denoiser, chosen, bar.saying)
        graphs.refuse(refusal(method, inputs.device, request, conditions.values))
        loop = Loop(request, method, denoiser, inputs, times, conditions, size, graphs, bar)
        with torch.enable_grad() if request.requires_grad else torch.no_grad():
            return how(loop.run())
    except BaseException as error:
        finished = getattr(error, "finished", None)
        if isinstance(finished, Solution):
            error.finished = how(finished)  # type: ignore[attr-defined]
        raise
    finally:
        bar.close()
        HALF.reset(half)


def _batch_size(request: Request, inputs: Inputs, method: Solver | Plan) -> BatchSize:
    """How many samples at a time; an error if the solve cannot be cut into batches."""
    noise, dense = request.noise, getattr(method, "dense", False)
    own = isinstance(noise, Noise)
    key = (inputs.shape, inputs.dtype, inputs.device, bool(request.compile))
    size = BatchSize(request.batch_size, inputs.n, request.score_fn, key, whole=own or dense)
    if isinstance(noise, Noise):
        if request.seeds is not None and inputs.seeds != tuple(noise.seeds):
            raise ValueError("a noise of your own brings its seeds: leave seeds out")
        if size.now < inputs.n:
            raise ValueError(
                "a noise of your own serves one batch: it cannot be cut into batches of"
                f" {size.now}; leave batch_size out"
            )
    if dense and size.now < inputs.n:
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


def _check_transform(method: Solver | Plan, x: Tensor) -> None:
    """Refuse a transform of `torch.func` that cannot go through a solver."""
    if isinstance(method, Plan) or is_planned(method):
        return
    name = type(method).__name__
    if vectorised(x):
        raise TypeError(
            f"{name} looks at the state to choose its steps, which torch.func.vmap does not show:"
            " pass all states as one batch x, or take a solver with a plan, such as 'heun'"
        )
    if isinstance(method, External):
        raise TypeError(
            f"the transforms of torch.func do not go through {method.library}: take 'rk45' or a"
            " solver with a plan, such as 'heun', or torch.autograd with requires_grad=True"
        )


def _check_state(process: Process, times: Tensor, x: Tensor) -> None:
    """Warn of a state that cannot be one at the first time: `x(t) = s x0 + sigma eps` has at least
    the size of its noise, and no more than that where no signal is left.

    Only states of many entries tell: their root mean square is known to a few percent.
    """
    level = process.level(float(times[0].detach()))
    size = x.detach().to("cpu", torch.float64).square()
    rms = size.mean().sqrt()
    if x.numel() >= _MANY and x.numel() // len(x) >= _MANY:
        each = size.reshape(len(x), -1).mean(1).sqrt()
        rms = each.min() if float(each.min()) < 0.5 * level.sigma else each.max()
    elif x.numel() < _MANY:
        return
    found = float(rms)
    most = 3.0 * level.sigma + 1e3 * level.s
    if not 0.5 * level.sigma <= found <= most:
        warnings.warn(
            f"x= holds a state of size {found:.3g} (root mean square); a state at"
            f" t={float(times[0].detach()):g} of {type(process).__name__} has"
            f" {'at least' if found < level.sigma else 'about'} {level.sigma:.3g}, the size of its"
            " noise. For pure noise pass x = sigma * torch.randn(...), with sigma ="
            " process.level(t).sigma, or leave x= out; for a state at another time pass its t=",
            stacklevel=4,
        )


_MANY = 32  # entries of noise whose root mean square is not below half of sigma by chance (1e-6)


def _check_start(denoiser: Denoiser, times: Tensor) -> None:
    """Refuse a solve from pure noise that runs towards noise; warn of one that begins where much
    signal should be left, or ends where data of this scale are still covered by noise.
    """
    process, std = denoiser.process, denoiser.data_std
    if len(times) > 1 and times[-1] > times[0]:
        raise GridError(
            "a solve towards noise starts from a state: pass x= and finish=False, or use encode"
        )
    last = min(process.t_min, float(times[-1].detach()))
    levels = process.levels([float(times[0].detach()), last])
    nsr, end = (float(level.nsr) for level in levels)
    if 0.0 <= nsr < 5.0 * min(1.0, std or 1.0):
        warnings.warn(
            f"the grid starts at t={levels[0].t:g}, where the noise is only {nsr:.3g} times the"
            " signal, from noise alone: pass x= (or x0= and t=) to start from a state there",
            stacklevel=4,
        )
    elif std and not (nsr >= 5.0 * std and end <= 0.2 * std):
        warnings.warn(
            f"the data have a standard deviation of {std:.3g} (data_std), which does not suit the"
            f" noise of {type(process).__name__}: sigma / s runs from {nsr:.3g} down to {end:.3g},"
            f" and should reach from {5.0 * std:.3g} or more to {0.2 * std:.3g} or less. Scale the"
            f" data to a standard deviation near 1, or sample with solver=Auto(data_std={std:.3g})"
            f" under process=EDM(t_min={0.004 * std:.3g}, t_max={160.0 * std:.3g})",
            stacklevel=4,
        )
