"""A plan that waits for its predictions is the plan that is executed, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import GRID_SOLVERS, LINEAR_BETAS, PROCESSES, from_the_start, warped
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sdeflow import (
    DDIM,
    DDPM,
    EDM,
    VP,
    BrownianNoise,
    Heun,
    Plan,
    Preconditioned,
    Prediction,
    Process,
    RectifiedFlow,
    SeededNoise,
    SolverError,
    grid,
    sample,
)
from sdeflow.denoisers.network import Network
from sdeflow.reverse import Reverse

SHAPE = (3, 2, 4)


def network(x: Tensor, t: Tensor) -> Tensor:
    """Any function that couples what is in a sample."""
    time = t.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    return torch.tanh(0.7 * x.roll(1, -1) - 0.2 * x + 0.1 * torch.cos(time))


def start_of(plan: Plan, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    return (x * max(plan.grid[0][2], 1.0)).to(dtype)


def driven(run: Any, denoiser: Any) -> Tensor:
    made = 0
    while not run.done:
        assert run.index == made
        run.send(denoiser(run.x, torch.tensor(run.t, dtype=torch.float64)))
        made += 1
    assert made == run.nfe == run.plan.nfe
    result: Tensor = run.result
    return result


@pytest.mark.parametrize("under", ["vp", "rectified_flow"])
@pytest.mark.parametrize("name", GRID_SOLVERS)
def test_every_plan_stepwise_is_the_plan_executed(name: str, under: str) -> None:
    process, solver = PROCESSES[under], GRID_SOLVERS[name]
    if under == "rectified_flow" and not from_the_start(solver, process):
        times = warped(process, 4, 20.0, 0.05)
    else:
        times = warped(process, 4, 20.0, 0.05)
    plan = solver.plan(process, times, record=True)
    model = Prediction(network, "x0", process)
    x = start_of(plan)
    for kind in (SeededNoise, BrownianNoise):
        noise = (kind(range(5, 8), SHAPE[1:]) for _ in range(2))
        with torch.no_grad():
            expected, recorded = plan.execute(Reverse(model), x, next(noise))
        seeds: Any = 5 if kind is SeededNoise else torch.tensor([5, 6, 7])
        word = "seeded" if kind is SeededNoise else "brownian"
        run = plan.start(x, seeds=seeds, noise=word)  # type: ignore[arg-type]
        assert torch.equal(driven(run, _as_called(model, plan, x)), expected)
        kept = run.trajectory
        assert kept is not None
        assert torch.equal(kept[: len(recorded)], torch.stack(recorded))


def _as_called(model: Network, plan: Plan, x: Tensor) -> Any:
    """The denoiser as an execution calls it."""
    calls = iter(Reverse(model).calls(plan.times, x))
    return lambda state, t: next(calls)(state)


MODELS: dict[str, Network] = {
    "x0": Prediction(network, "x0", VP()),
    "eps": Prediction(network, "eps", VP(), time=lambda t: 999 * t),
    "v": Prediction(network, "v", VP()),
    "score": Prediction(network, "score", VP()),
    "velocity": Prediction(network, "velocity", RectifiedFlow()),
    "velocity elsewhere": Prediction(network, "velocity", RectifiedFlow()).under(VP()),
    "a table": Prediction(network, "eps", Process.from_betas(LINEAR_BETAS), time="index").under(
        VP()
    ),
    "edm": Preconditioned(network),
}


@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m", "ddpm"])
@pytest.mark.parametrize("kind", MODELS)
def test_raw_outputs_make_the_samples_of_the_model(kind: str, solver: str) -> None:
    model = MODELS[kind]
    process = model.process
    levels = GRID_SOLVERS[solver].levels(9)
    plan = GRID_SOLVERS[solver].plan(process, grid.karras(process, levels))
    t = plan.grid[0][0]
    x = start_of(plan)
    expected = sample(model, solver=plan, x=x, t=t, seeds=range(3))
    run = plan.start(x, seeds=[0, 1, 2], model=model)
    while not run.done:
        assert run.time.shape == (3,)
        assert run.time.dtype == (torch.int64 if kind == "a table" else torch.float32)
        run.send(network(run.input, run.time))
    assert torch.equal(run.result, expected)


def test_a_half_precision_module_is_given_its_dtype() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((4,), 0.3, dtype=torch.bfloat16))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            assert x.dtype == torch.bfloat16
            return x * self.weight

    module = Half()
    model = Prediction(module, "eps", VP())
    plan = DDIM().plan(VP(), warped(VP(), 4))
    x = start_of(plan)
    run = plan.start(x, model=model)
    with torch.no_grad():
        while not run.done:
            run.send(module(run.input, run.time))
    assert torch.equal(run.result, sample(model, solver=plan, x=x, t=plan.grid[0][0]))


def test_states_and_inputs_may_be_kept() -> None:
    plan = Heun().plan(EDM(), grid.karras(EDM(), 4))
    x = start_of(plan)
    before, kept, copies = x.clone(), [], []
    run = plan.start(x)
    while not run.done:
        kept += [run.x, run.input]
        copies += [run.x.clone(), run.input.clone()]
        run.send(network(run.x, run.time))
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
    assert torch.equal(x, before)


def test_the_network_may_return_one_buffer_at_every_call() -> None:
    plan = GRID_SOLVERS["adams3"].plan(VP(), warped(VP(), 6))
    x, buffer = start_of(plan), torch.empty(SHAPE)
    results = []
    for out in (None, buffer):
        run = plan.start(x)
        while not run.done:
            made = network(run.x, run.time)
            run.send(made if out is None else out.copy_(made))
        results.append(run.result)
    assert torch.equal(*results)


def test_two_runs_of_one_plan_do_not_know_of_each_other() -> None:
    plan = DDPM().plan(VP(), warped(VP(), 5))
    x = start_of(plan)
    alone = driven(plan.start(x, seeds=3), network_x0)
    a, b = plan.start(x, seeds=3), plan.start(2 * x, seeds=30)
    while not a.done:
        for run in (a, b):
            run.send(network_x0(run.x, torch.tensor(run.t)))
    assert torch.equal(a.result, alone)
    assert not torch.equal(b.result, alone)


def network_x0(x: Tensor, t: Tensor) -> Tensor:
    return network(x, t.reshape(1).expand(len(x)))


def test_gradients_flow_where_they_are_asked_for() -> None:
    plan = Heun().plan(VP(), warped(VP(), 3))
    x = start_of(plan, torch.float64).requires_grad_()
    for model in (None, Prediction(network, "eps", VP())):
        run = plan.start(x, requires_grad=True, model=model)
        while not run.done:
            run.send(network(run.input, run.time))
        (gradient,) = torch.autograd.grad(run.result.sum(), x)
        assert bool(gradient.abs().sum() > 0)
    plain = plan.start(x)
    while not plain.done:
        plain.send(network(plain.x, plain.time))
    assert not plain.result.requires_grad


def test_a_plan_without_calls_is_done_at_once() -> None:
    plan = DDIM().plan(VP(), [0.7], finish=False)
    x = start_of(plan)
    run = plan.start(x)
    assert run.done
    assert torch.equal(run.result, x)


def test_what_cannot_be_is_said() -> None:
    plan = DDPM().plan(VP(), warped(VP(), 3))
    x = start_of(plan)
    with pytest.raises(ValueError, match="draws noise: give it seeds="):
        plan.start(x)
    with pytest.raises(ValueError, match="a seed a sample: 3 samples and 2 seeds"):
        plan.start(x, seeds=[1, 2])
    with pytest.raises(ValueError, match=r"noise is of 2 samples.*they must fit"):
        plan.start(x, noise=SeededNoise([1, 2], SHAPE[1:]))
    with pytest.raises(ValueError, match="'seeded' or 'brownian'; got 'pink'"):
        plan.start(x, seeds=1, noise="pink")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="floating-point tensor"):
        plan.start([1.0], seeds=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"traced under VP.*EDM.*differs at t="):
        plan.start(x, seeds=1, model=MODELS["edm"])
    with pytest.raises(TypeError, match="Prediction or a Preconditioned"):
        plan.start(x, seeds=1, model=network)  # type: ignore[arg-type]
    run = plan.start(x, seeds=1)
    with pytest.raises(SolverError, match="call 1 of 4 is due; send its prediction"):
        _ = run.result
    with pytest.raises(ValueError, match=r"state has shape \(3, 2, 4\), and the prediction \(3,\)"):
        run.send(torch.zeros(3))
    with pytest.raises(TypeError, match=r"got Output, whose tensor is its \.sample"):
        run.send(type("Output", (), {"sample": x})())
    assert run.index == 0  # a refused prediction changes nothing
    assert "call 1 of 4 is due" in repr(run)
    driven(run, network_x0)
    assert "done" in repr(run)
    with pytest.raises(SolverError, match="all 4 calls are made"):
        run.send(x)
    with pytest.raises(SolverError, match="take the result"):
        _ = run.x


class NoFloat64(TorchDispatchMode):
    """What a device without float64 does: no such tensor can be on it. `meta` stands for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, Tensor) and made.device.type == "meta":
                assert made.dtype != torch.float64, func
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GRID_SOLVERS)
def test_no_float64_reaches_a_device(name: str, dtype: torch.dtype) -> None:
    process = PROCESSES["vp"]
    plan = GRID_SOLVERS[name].plan(process, warped(process, 4, 20.0, 0.05))
    x = torch.empty(SHAPE, device="meta", dtype=dtype)
    for model in (
        Prediction(network, "eps", process, time=lambda t: 999 * t),
        Prediction(network, "velocity", RectifiedFlow()).under(process),
        Preconditioned(network).under(process),
    ):
        for kind in (SeededNoise, BrownianNoise):
            noise = kind(range(3), SHAPE[1:], device="meta", dtype=dtype)
            with torch.no_grad(), NoFloat64():
                out, _ = plan.execute(Reverse(model), x, noise)
            assert out.device.type == "meta"
            assert out.dtype == dtype


@pytest.mark.parametrize("buffers", [1, 2, 3])
@pytest.mark.parametrize("name", GRID_SOLVERS)
def test_a_network_with_buffers_of_its_own_is_served_or_refused(name: str, buffers: int) -> None:
    """One buffer at every call is copied in time; several in turn are, or the error says what to do:
    never another result.
    """
    plan = GRID_SOLVERS[name].plan(VP(), warped(VP(), 6, 20.0, 0.05))
    x, own, made = start_of(plan), [torch.empty(SHAPE) for _ in range(buffers)], 0

    def buffered(x: Tensor, t: Tensor) -> Tensor:
        nonlocal made
        made += 1
        return own[made % buffers].copy_(network(x, t))

    results = []
    for function in (network, buffered):
        noise = SeededNoise(range(3), SHAPE[1:])
        with torch.no_grad():
            try:
                results.append(plan.execute(Reverse(Prediction(function, "x0", VP())), x, noise)[0])
            except SolverError as error:
                if buffers == 1 or "let it return a clone" not in str(error):
                    raise
                return
    assert torch.equal(*results)
