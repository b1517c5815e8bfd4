"""Everything that the docstrings of `sample`, `solve` and `encode` promise."""

from __future__ import annotations

import dataclasses
import inspect
import math
import threading
import warnings
from typing import Any

import pytest
import torch
from problems import (
    DETERMINISTIC,
    PROCESSES,
    SOLVERS,
    FixedNoise,
    Mixture,
    observed_order,
    reference,
    warped,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import sdeflow
from sdeflow import grid, registry
from sdeflow.denoisers import Preconditioned, Prediction
from sdeflow.noise import SeededNoise
from sdeflow.plan.plan import Plan
from sdeflow.process import EDM, VP, RectifiedFlow
from sdeflow.reverse import Reverse
from sdeflow.sampling.api import Step, encode, sample, solve
from sdeflow.sampling.request import Request
from sdeflow.solvers.auto.grid import auto as auto_grid
from sdeflow.solvers.auto.solver import Auto
from sdeflow.solvers.ode.runge_kutta import Heun
from sdeflow.solvers.sde.classic import DDPM


class Net(nn.Module):
    """A small conditional network in pictures."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.mix = nn.Conv2d(3, 3, 1, dtype=dtype)
        self.embed = nn.Embedding(5, 3, dtype=dtype)
        self.seen: list[dict[str, Any]] = []

    def forward(
        self, x: Tensor, t: Tensor, label: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        self.seen.append(
            {"x": x.shape, "dtype": x.dtype, "t": t.dtype, "label": label, "grad": x.requires_grad}
        )
        out = torch.tanh(self.mix(x)) * torch.cos(t).to(x.dtype).reshape(-1, 1, 1, 1) * scale
        return out if label is None else out + self.embed(label)[:, :, None, None]


def net(**how: Any) -> tuple[Net, Prediction]:
    torch.manual_seed(0)
    network = Net(**how).eval()
    return network, Prediction(network, "x0", VP(), shape=(3, 4, 4))


# ------------------------------------------------------------------------------------------- shapes


def test_the_line_of_the_issue_works_as_it_stands() -> None:
    def score_fn(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (len(x),)
        return -x  # of unit normal data under VP, at every t

    x = sdeflow.sample(score_fn, process=VP(), solver="heun", nfe=35, shape=(3, 8, 8), n=4)
    assert x.shape == (4, 3, 8, 8)
    assert x.dtype == torch.float32
    assert 0.8 < float(x.std()) < 1.2
    assert torch.equal(
        sdeflow.sample(score_fn, process="vp", solver="heun", nfe=35, shape=(3, 8, 8), seeds=[1]),
        sdeflow.sample(score_fn, process=VP, solver=Heun, nfe=35, shape=[3, 8, 8], seeds=[1]),  # type: ignore[arg-type]
    )


def test_shapes_are_known_given_or_taken_from_the_start() -> None:
    assert sample(Mixture(VP()), nfe=1).shape == (1, 2)
    assert sample(Mixture(VP()), nfe=1, n=3).shape == (3, 2)
    assert sample(Mixture(VP()), nfe=1, seeds=[1, 2]).shape == (2, 2)
    denoiser = Prediction(lambda x, t: 0 * x, "x0", VP())
    assert sample(denoiser, nfe=1, shape=(4, 5), n=2).shape == (2, 4, 5)
    assert sample(denoiser, nfe=1, shape=7, n=2).shape == (2, 7)  # type: ignore[arg-type]
    assert sample(denoiser, nfe=1, shape=(), n=2).shape == (2,)
    assert sample(denoiser, nfe=1, x=torch.zeros(3, 6)).shape == (3, 6)
    assert sample(denoiser, nfe=1, x0=torch.zeros(3, 6), t=0.5).shape == (3, 6)


@pytest.mark.parametrize("name", [name for name in SOLVERS if not name.startswith("torchsde")])
def test_every_registered_name_samples(name: str) -> None:
    x = sample(Mixture(VP()), solver=SOLVERS[name], n=2, seeds=0)
    assert x.shape == (2, 2)
    assert bool(torch.isfinite(x).all())


# --------------------------------------------------------------------------------------- conditions


@pytest.mark.parametrize("batch_size", [None, 1, 2, 5])
def test_conditions_are_cut_along_with_the_batch(batch_size: int | None) -> None:
    network, denoiser = net()
    labels = torch.tensor([4, 0, 3, 1, 2])
    whole = sample(
        denoiser,
        solver="ddim",
        nfe=3,
        seeds=range(5),
        condition={"label": labels, "scale": 0.5},
        batch_size=batch_size,
    )
    assert all(len(call["label"]) == call["x"][0] for call in network.seen)
    for row in range(5):
        one = sample(
            denoiser,
            solver="ddim",
            nfe=3,
            seeds=[row],
            condition={"label": labels[row : row + 1], "scale": 0.5},
        )
        torch.testing.assert_close(one[0], whole[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", ["x", "x0"])
@pytest.mark.parametrize("solver", ["heun", "ddpm", "rk45"])
def test_starts_are_cut_along_with_the_batch(solver: str, start: str) -> None:
    given = torch.from_numpy(Mixture.draw(5, 0)).float()
    whole = sample(Mixture(VP()), solver=solver, t=0.4, seeds=range(5), **{start: given})
    parts = sample(
        Mixture(VP()), solver=solver, t=0.4, seeds=range(5), batch_size=2, **{start: given}
    )
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


def test_one_condition_serves_all_and_lists_are_tensors() -> None:
    _, denoiser = net()
    one = sample(
        denoiser,
        solver="ddim",
        nfe=3,
        seeds=range(4),
        condition={"label": torch.tensor([2])},
        batch_size=3,
    )
    listed = sample(
        denoiser, solver="ddim", nfe=3, seeds=range(4), condition={"label": [2, 2, 2, 2]}
    )
    torch.testing.assert_close(one, listed, rtol=1e-5, atol=1e-5)
    assert torch.equal(
        sample(denoiser, solver="ddim", nfe=3, seeds=range(4), condition={"label": None}),
        sample(denoiser, solver="ddim", nfe=3, seeds=range(4)),
    )


# -------------------------------------------------------------------------- what happens on the way


@pytest.mark.parametrize("finish", [True, False])
@pytest.mark.parametrize("name", ["heun", "ddim", "ddpm", "annealed_langevin"])
def test_trajectories_hold_the_state_at_every_level(name: str, finish: bool) -> None:
    denoiser = Mixture(VP())
    times = grid.uniform_t(VP(), 6)
    solution = solve(
        denoiser,
        solver=name,
        grid=times,
        n=5,
        seeds=0,
        finish=finish,
        trajectory=True,
        batch_size=2,
    )
    assert solution.trajectory is not None
    assert solution.trajectory.shape == (6 + finish, 5, 2)
    assert torch.equal(solution.trajectory[-1], solution.x)
    start = SeededNoise(range(5), (2,)).start() * VP().level(1.0).sigma
    assert torch.equal(solution.trajectory[0], start)
    for k in range(1, 6):
        part = sample(denoiser, solver=name, grid=times[: k + 1], n=5, seeds=0, finish=False)
        torch.testing.assert_close(solution.trajectory[k], part, rtol=1e-5, atol=1e-5)


def test_x0s_and_callbacks_see_every_call() -> None:
    steps: list[Step] = []

    def callback(step: Step) -> str:
        steps.append(
            Step(
                step.index,
                step.nfe,
                step.t,
                step.nsr,
                step.x.clone(),
                step.x0.clone(),
                step.samples,
            )
        )
        return "ignored"

    denoiser = Mixture(VP())
    solution = solve(
        denoiser, solver="heun", nfe=7, n=5, seeds=0, batch_size=3, x0s=True, callback=callback
    )
    assert solution.x0s is not None
    assert solution.x0s.shape == (7, 5, 2)
    assert torch.equal(solution.x0s[-1], solution.x)
    assert [step.index for step in steps] == [*range(7), *range(7)]
    assert [step.nfe for step in steps] == [*range(1, 8), *range(1, 8)]
    assert [step.samples for step in steps] == [slice(0, 3)] * 7 + [slice(3, 5)] * 7
    assert solution.plan is not None
    assert [step.t for step in steps[:7]] == solution.plan.times.tolist()
    for step in steps:
        assert step.nsr == pytest.approx(float(VP().nsr(step.t)))
        torch.testing.assert_close(step.x0, denoiser(step.x, step.t), rtol=1e-5, atol=1e-5)
        assert torch.equal(step.x0, solution.x0s[step.index, step.samples])
    # Watching changes nothing.
    assert torch.equal(
        sample(denoiser, solver="heun", nfe=7, n=5, seeds=0, batch_size=3), solution.x
    )


def test_a_callback_may_stop_a_solve() -> None:
    class Enough(Exception):
        pass

    def callback(step: Step) -> None:
        if step.nfe == 3:
            raise Enough

    with pytest.raises(Enough):
        sample(Mixture(VP()), nfe=7, callback=callback)


@pytest.mark.parametrize("solver", ["heun", "ddpm", "rk45", "plan"])
def test_the_progress_bar_counts_calls(solver: str, capsys: pytest.CaptureFixture[str]) -> None:
    chosen: Any = Heun().plan(VP(), grid.uniform_t(VP(), 3)) if solver == "plan" else solver
    how = {"nfe": 5} if solver in ("heun", "ddpm") else {}
    quiet = sample(Mixture(VP()), solver=chosen, n=4, seeds=0, batch_size=2, **how)
    assert capsys.readouterr().err == ""
    shown = sample(Mixture(VP()), solver=chosen, n=4, seeds=0, batch_size=2, progress=True, **how)
    err = capsys.readouterr().err
    assert "sampling 4" in err
    if solver != "rk45":
        assert "10/10" in err
    assert torch.equal(quiet, shown)


def test_infinite_nsr_reaches_a_callback() -> None:
    seen: list[float] = []
    sample(
        Mixture(RectifiedFlow()), solver="ddim", nfe=3, callback=lambda step: seen.append(step.nsr)
    )
    assert seen[0] == math.inf


# ----------------------------------------------------------------------- devices, dtypes, gradients


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("state", [None, torch.float32, torch.float64, torch.float16])
def test_states_keep_their_dtype_and_networks_theirs(
    state: torch.dtype | None, weights: torch.dtype
) -> None:
    network, denoiser = net(dtype=weights)
    for solver in ("heun", "ddpm"):
        x = sample(denoiser, solver=solver, nfe=3, n=2, seeds=0, dtype=state)
        assert x.dtype == (state or torch.float32)
    assert {call["dtype"] for call in network.seen} == {weights}
    assert {call["t"] for call in network.seen} == {torch.float32}


class Single(TorchFunctionMode):
    """Remembers whether any tensor of a state's size was float64."""

    def __init__(self) -> None:
        super().__init__()
        self.wide: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float64 and out.numel() >= 3 * 32 * 32:
            self.wide.add(getattr(func, "__name__", str(func)))
        return out


@pytest.mark.parametrize("predicts", ["x0", "eps", "v", "velocity", "edm"])
@pytest.mark.parametrize(
    "solver", ["heun", "rk4", "ddim", "ddpm", "euler_maruyama", "langevin", "rk45"]
)
def test_no_float64_state_ever_exists(solver: str, predicts: str) -> None:
    """Accelerators without float64 run everything: states, outputs and noise stay float32; only
    times and coefficients are wide.
    """

    def network(x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        assert t.dtype == torch.float32
        return 0.1 * x

    denoiser = Preconditioned(network) if predicts == "edm" else Prediction(network, predicts, VP())  # type: ignore[arg-type]
    for noise in ("seeded", "brownian"):
        with Single() as watch:
            x = sample(
                denoiser,
                solver=solver,
                shape=(3, 32, 32),
                n=2,
                seeds=0,
                noise=noise,
                callback=lambda step: None,
            )  # type: ignore[arg-type]
        assert x.dtype == torch.float32
        assert not watch.wide


@pytest.mark.parametrize("solver", sorted(DETERMINISTIC))
def test_gradients_flow_on_request(solver: str) -> None:
    denoiser = Mixture(VP())
    times = warped(VP(), 2, 5.0, 0.3)
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return sample(denoiser, solver=DETERMINISTIC[solver], grid=times, x=x, requires_grad=True)

    assert torch.autograd.gradcheck(run, [x], atol=1e-6)
    assert not sample(denoiser, solver=DETERMINISTIC[solver], grid=times, x=x).requires_grad


def test_gradients_reach_parameters_conditions_data_and_times() -> None:
    network, denoiser = net()
    strength = torch.tensor(1.0, requires_grad=True)
    x0 = torch.zeros(2, 3, 4, 4, requires_grad=True)
    for solver in ("heun", "ddpm"):
        network.zero_grad()
        sample(
            denoiser,
            solver=solver,
            nfe=3,
            x0=x0,
            t=0.5,
            seeds=0,
            condition={"scale": strength},
            requires_grad=True,
        ).square().sum().backward()
        assert network.mix.weight.grad is not None
        assert float(network.mix.weight.grad.abs().sum()) > 0
        assert strength.grad is not None
        assert float(strength.grad.abs()) > 0
        assert x0.grad is not None
        assert float(x0.grad.abs().sum()) > 0
    times = torch.tensor([1.0, 0.6, 0.2], dtype=torch.float64, requires_grad=True)
    sample(
        Mixture(VP()), solver="ddim", grid=times, seeds=0, requires_grad=True
    ).square().sum().backward()
    assert times.grad is not None
    assert bool((times.grad.abs() > 0).all())


def test_without_gradients_nothing_is_recorded() -> None:
    network, denoiser = net()
    x = sample(denoiser, solver="heun", nfe=3, n=2)
    assert not x.requires_grad
    assert not any(call["grad"] for call in network.seen)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_stays(training: bool) -> None:
    network, denoiser = net()
    network.train(training)
    network.embed.train(not training)
    sample(denoiser, nfe=3)
    assert network.training is training
    assert network.embed.training is not training


def test_dropout_in_training_mode_is_warned_of() -> None:
    network = nn.Sequential(nn.Dropout(0.5))
    denoiser = Prediction(lambda x, t: network(x), "x0", VP(), shape=(2,))

    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.drop(x)

    module = Drops()
    with pytest.warns(UserWarning, match=r"eval\(\)"):
        sample(Prediction(module, "x0", VP(), shape=(2,)), nfe=1)
    module.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(Prediction(module, "x0", VP(), shape=(2,)), nfe=1)
        sample(denoiser, nfe=1)


# -------------------------------------------------------------------------------------- up and down


@pytest.mark.parametrize("under", ["vp", "edm", "rectified_flow"])
@pytest.mark.parametrize("name", ["ddim", "heun", "rk4"])
def test_encoding_and_decoding_meet_at_the_solvers_order(name: str, under: str) -> None:
    process, solver = PROCESSES[under], DETERMINISTIC[name]
    x, _ = reference(process, float(process.t_of_nsr(0.1)), float(process.t_of_nsr(8.0)), n=8)

    def error(n: int) -> float:
        times = warped(process, n)
        up = encode(Mixture(process), x, solver=solver, grid=times.flip(0))
        down = sample(Mixture(process), solver=solver, grid=times, x=up, finish=False)
        return float((down - x).norm())

    n = 48 if solver.order < 4 else 24
    assert observed_order(error, (n, 2 * n)) > solver.order - 0.25


def test_encode_ends_where_sampling_starts() -> None:
    process = VP()
    x0 = torch.from_numpy(Mixture.draw(200, 0))
    z = encode(Mixture(process), x0, nfe=200)
    assert z.shape == x0.shape
    assert z.dtype == x0.dtype
    assert abs(float(z.std()) - 1.0) < 0.15
    back = sample(Mixture(process), solver="heun", nfe=201, x=z, t=process.t_max)
    assert float((back - x0).norm(dim=1).median()) < 0.02
    assert encode(Mixture(process), x0, batch_size=64).shape == x0.shape
    assert encode(Mixture(process), x0, solver="rk45").shape == x0.shape
    assert encode(Mixture(EDM()), x0, "vp").shape == x0.shape


def test_encode_counts_its_calls() -> None:
    calls = []
    denoiser = Prediction(lambda x, t: (calls.append(1), 0.1 * x)[1], "x0", VP())
    encode(denoiser, torch.zeros(1, 2), solver="heun", nfe=8)
    assert len(calls) == 8


# ---------------------------------------------------------------------------------------- solutions


def test_a_solution_says_how_it_was_made() -> None:
    _, denoiser = net()
    labels = torch.tensor([1, 2, 3])
    solution = solve(
        denoiser,
        solver="ddpm",
        nfe=6,
        seeds=[9, 8, 7],
        condition={"label": labels},
        noise="brownian",
        batch_size=2,
    )
    assert solution.solver == DDPM()
    assert solution.process == VP()
    assert solution.nfe == 6
    assert solution.network_calls == 12
    assert solution.plan is not None
    assert solution.plan.nfe == 6
    assert solution.statistics["draws"] == 5
    assert solution.seeds == (9, 8, 7)
    assert solution.noise == "brownian"
    assert solution.grid == VP().default_grid
    assert solution.times is not None
    assert len(solution.times) == 6
    assert torch.equal(solution.condition["label"], labels)
    assert solution.device == "cpu"
    assert solution.dtype == "float32"
    assert solution.seconds > 0
    assert solution.version == sdeflow.__version__
    assert solution.trajectory is None
    assert solution.x0s is None
    text = str(solution)
    for word in (
        "DDPM",
        "VP",
        "NFE      6 (12 network calls)",
        "6 levels",
        "seeds 9, 8, 7",
        "brownian",
        "float32",
        "cpu",
    ):
        assert word in text
    # Enough to make it again.
    again = sample(
        denoiser,
        solution.process,
        solver=solution.solver,
        grid=solution.times,
        seeds=solution.seeds,
        condition=solution.condition,
        noise=solution.noise,
        batch_size=2,  # type: ignore[arg-type]
    )
    assert torch.equal(again, solution.x)


def test_a_saved_plan_samples(tmp_path: Any) -> None:
    process = VP()
    plan = Heun().plan(process, grid.uniform_t(process, 4))
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert torch.equal(
        sample(Mixture(process), solver=loaded, n=3, seeds=0),
        sample(Mixture(process), solver="heun", grid=grid.uniform_t(process, 4), n=3, seeds=0),
    )
    with pytest.raises(ValueError, match="process="):
        sample(Mixture(EDM()), solver=loaded, n=3)
    assert sample(Mixture(EDM()), process, solver=loaded, n=3).shape == (3, 2)
    with pytest.raises(ValueError, match="finish=True"):
        sample(Mixture(process), solver=loaded, finish=False)
    with pytest.raises(ValueError, match="starts at t=1"):
        sample(Mixture(process), solver=loaded, x=torch.zeros(1, 2), t=0.5)


def test_a_denoiser_goes_under_another_process() -> None:
    """The same ODE on another path: the same samples, up to what two solvers differ."""
    here = sample(
        Mixture(EDM()),
        solver="heun",
        grid=grid.karras(EDM(), 200, nsr_max=50.0, nsr_min=0.002),
        seeds=range(64),
        dtype=torch.float64,
    )
    times = grid.karras(VP(), 200, nsr_max=50.0, nsr_min=0.01)
    there = sample(
        Mixture(EDM()), VP(), solver="heun", grid=times, seeds=range(64), dtype=torch.float64
    )
    assert float((here - there).norm(dim=1).median()) < 0.02


def test_own_noise_is_used_and_must_fit() -> None:
    noise = FixedNoise(3, (2,), torch.float32)
    solution = solve(Mixture(VP()), solver="ddpm", nfe=4, n=3, noise=noise)
    assert noise.drawn == 3
    assert solution.noise == "FixedNoise"
    with pytest.raises((ValueError, RuntimeError), match=r"noise|shape|size"):
        sample(Mixture(VP()), solver="ddpm", nfe=4, n=5, noise=FixedNoise(3, (2,), torch.float32))
    with pytest.raises(ValueError, match=r"noise|batch"):
        sample(
            Mixture(VP()),
            solver="ddpm",
            nfe=4,
            n=4,
            batch_size=2,
            noise=FixedNoise(4, (2,), torch.float32),
        )


def test_two_threads_share_solvers_denoisers_and_processes() -> None:
    denoiser = Mixture(VP())
    jobs = [(name, n) for name in ("heun", "ddpm", "midpoint", "euler_maruyama") for n in (1, 3)]
    expected = {job: sample(denoiser, solver=job[0], n=job[1], seeds=0) for job in jobs}
    failures: list[BaseException] = []

    def work(shift: int) -> None:
        try:
            for k in range(16):
                job = jobs[(k + shift) % len(jobs)]
                assert torch.equal(
                    sample(denoiser, solver=job[0], n=job[1], seeds=0), expected[job]
                )
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(shift,)) for shift in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_strided_states_are_taken_as_they_are(layout: str) -> None:
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    strided = {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "sliced": torch.cat([x, x], 2)[:, :, :4],
        "expanded": x[:1].expand(2, 3, 4, 4),
    }[layout]
    keep = strided.clone()
    for solver in ("heun", "ddim", "ddpm", "rk4"):
        got = sample(
            Prediction(lambda x, t: torch.tanh(x), "x0", VP()),
            solver=solver,
            nfe=9,
            x=strided,
            seeds=[1, 2],
        )
        want = sample(
            Prediction(lambda x, t: torch.tanh(x), "x0", VP()),
            solver=solver,
            nfe=9,
            x=strided.contiguous(),
            seeds=[1, 2],
        )
        torch.testing.assert_close(got, want)
    assert torch.equal(strided, keep)


def test_sampling_is_what_the_solver_integrates() -> None:
    process = VP()
    start = SeededNoise([4], (2,)).start() * process.level(1.0).sigma
    with torch.no_grad():
        by_hand = (
            Auto(table="density")
            .integrate(
                Reverse(Mixture(process)), start, auto_grid(process, 35, table="density"), None
            )
            .x
        )
        heun = (
            Heun()
            .integrate(Reverse(Mixture(process)), start, grid.uniform_sqrt_t(process, 18), None)
            .x
        )
    assert torch.equal(sample(Mixture(process), seeds=[4]), by_hand)
    assert torch.equal(sample(Mixture(process), solver="heun", seeds=[4]), heun)
    assert registry.solver("heun") == Heun()


def test_a_request_has_the_arguments_of_solve_with_their_defaults() -> None:
    fields = {f.name: f.default for f in dataclasses.fields(Request)}
    for function in (sample, solve):
        for parameter in inspect.signature(function).parameters.values():
            default = parameter.default
            missing = default is inspect.Parameter.empty
            assert fields[parameter.name] == (dataclasses.MISSING if missing else default)
    assert set(inspect.signature(solve).parameters) == set(fields)


def test_a_solution_says_how_it_was_made_beside_its_result() -> None:
    solution = solve(Mixture(VP()), solver="heun", nfe=9, grid="karras", seeds=[3, 1])
    how = solution.provenance
    assert (how.seeds, how.grid, how.noise, how.device) == ((3, 1), "karras", "seeded", "cpu")
    for name in (f.name for f in dataclasses.fields(how)):
        assert getattr(solution, name) is getattr(how, name)
