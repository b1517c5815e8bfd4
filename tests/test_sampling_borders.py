"""The borders of `sample` and `solve`: names, numbers and grids of everyday code, half precision,
states that are kept, faults in the middle of a solve.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sdeflow import (
    EDM,
    RK45,
    VE,
    VP,
    Cosine,
    Prediction,
    RectifiedFlow,
    SubVP,
    encode,
    registry,
    sample,
    solve,
)
from sdeflow.errors import BudgetError, NonFiniteError, SolverError, UnknownNameError
from sdeflow.grid import karras
from sdeflow.reverse import Reverse
from sdeflow.sampling.faults import Faults, Stopped
from sdeflow.solvers.external.torchdiffeq import TorchDiffEq
from sdeflow.solvers.ode.ddim import DDIM
from sdeflow.solvers.ode.runge_kutta import Heun
from sdeflow.targets import Gaussian


def gaussian(process: Any = None, std: float = 0.5) -> Gaussian:
    return Gaussian(torch.full((3,), 0.3), std=std, process=process or VP())


# ------------------------------------------------------------------------- everyday numbers and grids


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8])
def test_integers_of_numpy_are_whole_numbers(kind: Any) -> None:
    model = gaussian()
    plain = sample(model, solver="heun", nfe=9, n=4, seeds=3, batch_size=2)
    other = sample(model, solver="heun", nfe=kind(9), n=kind(4), seeds=kind(3), batch_size=kind(2))
    assert torch.equal(plain, other)
    shaped = sample(lambda x, t: -x, VP(), shape=(kind(2), kind(3)), nfe=kind(2), n=kind(1))
    assert shaped.shape == (1, 2, 3)


@pytest.mark.parametrize("t", [0.7, np.float32(0.7), np.float64(0.7), torch.tensor(0.7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_agree_to_float32(t: Any, dtype: torch.dtype) -> None:
    x = torch.ones(2, 3)
    grid = torch.linspace(0.7, 0.01, 10, dtype=dtype)
    found = sample(gaussian(), solver="ddim", x=x, t=t, grid=grid)
    exact = sample(
        gaussian(), solver="ddim", x=x, t=0.7, grid=torch.linspace(0.7, 0.01, 10).double()
    )
    assert torch.allclose(found, exact, atol=1e-5)
    plan = DDIM().plan(VP(), grid)
    assert torch.allclose(sample(gaussian(), solver=plan, x=x, t=t), exact, atol=1e-5)


@pytest.mark.parametrize("end", ["t_min", "t_max"])
@pytest.mark.parametrize("process", [VP(), EDM(), RectifiedFlow()])
def test_the_ends_of_time_may_be_rounded_to_float32(process: Any, end: str) -> None:
    t = getattr(process, end)
    x = t * torch.ones(1, 3)
    for given in (np.float32(t), torch.tensor(t, dtype=torch.float32)):
        found = sample(
            gaussian(process), solver="heun", nfe=1 if end == "t_min" else 5, x=x, t=given
        )
        same = sample(gaussian(process), solver="heun", nfe=1 if end == "t_min" else 5, x=x, t=t)
        assert torch.equal(found, same)


def test_a_state_at_another_time_than_the_grid_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"starts at t=0\.7, the state at t=0\.70001: .*leave t= out"
    ):
        sample(gaussian(), x=torch.ones(1, 3), t=0.70001, grid=[0.7, 0.1], solver="ddim")


@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp_2m", "euler_ancestral", "rk45", "auto"])
@pytest.mark.parametrize("process", [VP(), EDM(), RectifiedFlow()])
def test_a_trailing_zero_is_the_step_to_zero_noise(process: Any, name: str) -> None:
    model = gaussian(process)
    times = karras(process, 6) if isinstance(process, EDM) else torch.linspace(0.9, 0.05, 6)
    x = process.level(float(times[0])).sigma * torch.ones(2, 3)
    given = {"solver": name, "x": x, "seeds": 0, "n": 2}
    ends = sample(model, grid=times, **given)
    zero = sample(model, grid=torch.cat([times, torch.zeros(1)]), **given)
    assert torch.equal(ends, zero)
    with pytest.raises(ValueError, match="no noise is left there"):
        sample(model, grid=[*times.tolist(), 0.0], finish=False, **given)


def test_a_trailing_zero_is_no_level_of_the_budget() -> None:
    assert solve(gaussian(EDM()), solver="ddim", nfe=5, grid=[80, 20, 5, 1, 0.1, 0.0]).nfe == 5


# ------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "same", "grid"),
    [
        ("DPM++ 2M Karras", "dpmpp_2m", "karras"),
        ("DPM++ 2M SDE Heun Karras", "dpmpp_2m_sde_heun", "karras"),
        ("DPM++ 3M SDE Exponential", "dpmpp_3m_sde", "uniform_lam"),
        ("DPM++ 2M SGM Uniform", "dpmpp_2m", "sgm_uniform"),
        ("DPM++ 2S a Karras", "dpmpp_2s_ancestral", "karras"),
        ("DPM2 a Karras", "dpm2_ancestral", "karras"),
        ("LMS Karras", "lms", "karras"),
        ("heun-karras", "heun", "karras"),
        ("EDMDPMSolverMultistepScheduler", "dpmpp_2m", "karras"),
        ("DPM++ SDE", "dpmpp_sde", None),
        ("Euler a", "euler_ancestral", None),
        ("DPM2", "dpm_solver_2", None),
        ("DPM fast", "dpm_solver_fast", None),
        ("DPM adaptive", "dpm_adaptive_23", None),
        ("sample_euler", "ddim", None),
        ("DDIMScheduler", "ddim", None),
        ("EulerDiscreteScheduler", "ddim", None),
        ("DDPMScheduler", "ddpm", None),
    ],
)
def test_names_of_other_libraries(name: str, same: str, grid: str | None) -> None:
    solver = registry.solver(name)
    assert solver == registry.solver(same)
    assert solver.default_grid == grid
    assert registry.solver(same).default_grid is None
    if grid is not None:
        model = gaussian(EDM())
        found = solve(model, solver=name, nfe=9, seeds=0)
        assert found.grid == grid
        assert torch.equal(found.x, sample(model, solver=same, grid=grid, nfe=9, seeds=0))
        other = solve(model, solver=name, nfe=9, seeds=0, grid="uniform_lam")  # grid= overrides
        assert other.grid == "uniform_lam"


@pytest.mark.parametrize("name", ["sample_heun", "HeunDiscreteScheduler"])
def test_published_heun_steps_in_nsr(name: str) -> None:
    assert registry.solver(name) == Heun("nsr")


@pytest.mark.parametrize("name", registry.SOLVERS)
def test_a_name_with_a_space_reaches_every_solver(name: str) -> None:
    assert registry.solver(name.replace("_", " ").title()) == registry.solver(name)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("huen", "heun"),
        ("dpmp_2m", "dpmpp_2m"),
        ("DPM++ 2N", "dpm++_2m"),
        ("DDIMSchedular", "ddim"),
    ],
)
def test_a_near_miss_does_not_list_every_name(name: str, meant: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        registry.solver(name)
    said = str(caught.value)
    assert "did you mean" in said
    assert meant in said
    assert "sdeflow info" in said
    assert len(said) < 200


@pytest.mark.parametrize(
    ("word", "predicts"),
    [
        ("epsilon", "eps"),
        ("noise", "eps"),
        ("sample", "x0"),
        ("x_start", "x0"),
        ("v_prediction", "v"),
        ("flow_prediction", "velocity"),
    ],
)
def test_predictions_have_other_words(word: str, predicts: Any) -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * x

    with_word = Prediction(network, word, VP(), shape=(3,))  # type: ignore[arg-type]
    assert with_word.predicts == predicts
    assert torch.equal(
        sample(with_word, nfe=3, seeds=0),
        sample(Prediction(network, predicts, VP(), shape=(3,)), nfe=3, seeds=0),
    )
    with pytest.raises(UnknownNameError, match=f"did you mean.*'{word}'"):
        Prediction(network, word + "s", VP())  # type: ignore[arg-type]


# ------------------------------------------------------- what a network or a callback keeps is its own


class Keeps:
    """An x0-network that keeps its input and its output, and returns one tensor of its own."""

    def __init__(self, reuse: bool):
        self.reuse, self.own = reuse, torch.empty(0)
        self.kept: list[Tensor] = []
        self.copies: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.kept.append(x)
        self.copies.append(x.clone())
        out = 0.5 * torch.tanh(x)
        if not self.reuse:
            return out
        if self.own.shape != x.shape:
            self.own = torch.empty_like(x)
        return self.own.copy_(out)


def runs_vp(name: str) -> Any:
    """A solver by name, and arguments for a short solve of it."""
    method = registry.solver(name)
    if method.adaptive:
        return {"solver": name}
    for nfe in range(5, 60):
        try:
            method.levels(nfe)
        except ValueError:
            continue
        return {"solver": name, "nfe": nfe}
    raise AssertionError(name)


@pytest.mark.parametrize("reuse", [False, True], ids=["fresh", "reused"])
@pytest.mark.parametrize("name", registry.SOLVERS)
def test_states_that_are_kept_stay_as_they_were(name: str, reuse: bool) -> None:
    network, steps, copies = Keeps(reuse), [], []

    def callback(step: Any) -> None:
        steps.append(step)
        copies.append((step.x.clone(), step.x0.clone()))

    found = solve(
        Prediction(network, "x0", VP(), shape=(3,)),
        n=2,
        seeds=0,
        callback=callback,
        x0s=True,
        **runs_vp(name),
    )
    for kept, copied in zip(network.kept, network.copies, strict=True):
        assert torch.equal(kept, copied)
    for step, (x, x0) in zip(steps, copies, strict=True):
        assert torch.equal(step.x, x)
        assert torch.equal(step.x0, x0)
    assert found.x0s is not None
    assert torch.equal(found.x0s, torch.stack([x0 for _, x0 in copies]))
    plain = Prediction(lambda x, t: 0.5 * torch.tanh(x), "x0", VP(), shape=(3,))
    assert torch.equal(found.x, sample(plain, n=2, seeds=0, **runs_vp(name)))


@pytest.mark.parametrize("name", ["heun", "rk45", "torchdiffeq", "torchsde", "adaptive_sde"])
@pytest.mark.parametrize("what", ["x", "x0"])
def test_a_callback_that_writes_is_told(name: str, what: str) -> None:
    with pytest.raises(SolverError, match="in place: let it work on a clone"):
        sample(
            gaussian(), seeds=0, callback=lambda step: getattr(step, what).zero_(), **runs_vp(name)
        )


# ------------------------------------------------------------------- faults in the middle of a solve


class Breaks:
    """An x0-network that returns NaN from its call `first` on, for the samples in `rows`."""

    def __init__(self, first: int, rows: list[int], value: float = float("nan")):
        self.first, self.rows, self.value, self.calls = first, rows, value, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        out = 0.5 * x
        if self.calls >= self.first:
            out[self.rows] = self.value
        return out


PLANNED = [name for name in registry.SOLVERS if not registry.solver(name).adaptive]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", PLANNED)
def test_a_fault_is_found_in_the_first_solve(name: str, value: float) -> None:
    how = runs_vp(name)
    network = Breaks(3, [1], value)
    with pytest.raises(
        NonFiniteError,
        match=r"in 1 of 3 samples \(number 1\)\. first at call 3 \(t=.*\): the network returned it",
    ) as caught:
        sample(Prediction(network, "x0", VP(), shape=(4,)), n=3, seeds=0, **how)
    assert network.calls == how["nfe"]  # the sound samples are finished, and nothing is done twice
    assert bool(torch.isfinite(caught.value.partial.x[[0, 2]]).all())


@pytest.mark.parametrize("name", PLANNED)
def test_a_batch_without_a_finite_sample_stops(name: str) -> None:
    network = Breaks(3, [0, 1])
    model = Prediction(
        lambda x, t, row: network(x, t) if bool(row[0] == 2) else 0.5 * x,
        "x0",
        VP(),
        shape=(4,),
    )
    how = {**runs_vp(name), "condition": {"row": torch.arange(6)}}
    said = r"in 2 of 2 samples \(number 2, 3\)\. first at call 3"
    with pytest.raises(NonFiniteError, match=said) as caught:
        sample(model, n=6, seeds=0, batch_size=2, **how)
    assert network.calls == 3
    assert caught.value.partial.nfe == 3
    assert caught.value.finished.x.shape == (2, 4)


def test_large_predictions_are_no_fault() -> None:
    huge = torch.finfo(torch.float32).max / 2
    model = Prediction(lambda x, t: torch.full_like(x, huge), "x0", VP(), shape=(64,))
    assert torch.equal(sample(model, solver="ddim", nfe=3), torch.full((1, 64), huge))


def test_an_adaptive_solver_numbers_samples_in_the_whole() -> None:
    def network(x: Tensor, t: Tensor, row: Tensor) -> Tensor:
        return torch.where((row == 3).unsqueeze(-1), torch.full_like(x, torch.nan), 0.1 * x)

    model = Prediction(network, "x0", VP(), shape=(2,))
    with pytest.raises(NonFiniteError, match="sample 1 at") as caught:
        sample(model, solver="rk45", n=6, batch_size=2, condition={"row": torch.arange(6)})
    assert "Sample 0 of this batch is number 2" in "".join(caught.value.__notes__)
    assert caught.value.finished.x.shape == (2, 2)


class OnADevice(Faults):
    """The branch of accelerators, with copies that arrive `delay` calls later."""

    def __init__(self, delay: int):
        super().__init__(torch.device("meta"))
        self.delay = delay

    def see(self, index: int, call: Any, x: Tensor, x0: Tensor) -> None:
        self.now = index
        super().see(index, call, x, x0)
        if self._coming is None and len(self._seen) >= self._next:
            some, self._seen = self._seen, []
            self._next *= 2
            due = index + self.delay
            event = SimpleNamespace(query=lambda: self.now >= due, synchronize=lambda: None)
            self._coming = (some, torch.stack([n for _, _, n in some]), event)  # type: ignore


@pytest.mark.parametrize("delay", [1, 3, 100])
@pytest.mark.parametrize("first", [1, 2, 5, 12])
@pytest.mark.parametrize("rows", [[1], [0, 1, 2]])
def test_faults_on_a_device_are_named_as_on_the_cpu(
    delay: int, first: int, rows: list[int]
) -> None:
    said = []
    for faults in (OnADevice(delay), Faults(torch.device("cpu"))):
        plan, model = DDIM().plan(VP(), torch.linspace(1, 0.1, 12)), Breaks(first, rows)
        network = Prediction(model, "x0", VP())
        try:
            x, _ = plan.execute(Reverse(network), torch.ones(3, 4), None, faults.see)
        except Stopped as stopped:
            x = stopped.x
        said.append(str(faults.error(x, 0)))
    assert said[0] == said[1]
    assert f"first at call {first} " in said[0]


# -------------------------------------------------------------------------- what is finished is kept


@pytest.mark.parametrize("name", ["heun", "rk45", "torchdiffeq", "torchsde", "adaptive_sde"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError, SystemExit, ZeroDivisionError])
def test_finished_batches_survive_every_exception(name: str, kind: type[BaseException]) -> None:
    def network(x: Tensor, t: Tensor, row: Tensor) -> Tensor:
        if int(row[0]) == 4:
            raise kind("stop")
        return 0.5 * torch.tanh(x)

    model, how = Prediction(network, "x0", VP(), shape=(3,)), runs_vp(name)
    rows = torch.arange(6)
    with pytest.raises(kind, match="stop") as caught:
        sample(model, n=6, seeds=5, batch_size=2, condition={"row": rows}, **how)
    finished = caught.value.finished  # type: ignore[attr-defined]
    assert "4 of 6 samples were finished" in "".join(caught.value.__notes__)
    alone = sample(model, n=4, seeds=5, batch_size=2, condition={"row": rows[:4]}, **how)
    assert torch.equal(finished.x, alone)
    assert finished.seeds == (5, 6, 7, 8)
    assert finished.solver == registry.solver(name)
    with pytest.raises(kind) as caught:  # nothing is finished: the exception is as it was
        sample(model, n=2, condition={"row": torch.tensor([4, 5])}, **how)
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize("name", [n for n in registry.SOLVERS if registry.solver(n).adaptive])
def test_predictions_of_batches_with_different_calls_are_joined(name: str) -> None:
    model = Gaussian(torch.zeros(3), std=0.1, process=VP())
    x = torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.3, 0.2], [9.0, -9.0, 20.0], [3.0, 2.0, 1.0]])
    how = {"solver": name, "x": x, "seeds": 0, "x0s": True, "trajectory": True}
    found = solve(model, batch_size=2, **how)
    first, last = (solve(model, **{**how, "x": x[i : i + 2], "seeds": i}) for i in (0, 2))
    assert found.x0s is not None
    assert len(found.x0s) == found.nfe == max(first.nfe, last.nfe)
    for k, part in enumerate((first, last)):
        rows = slice(2 * k, 2 * k + 2)
        assert part.x0s is not None
        assert torch.equal(found.x0s[: part.nfe, rows], part.x0s)
        assert torch.equal(found.x0s[-1, rows], part.x0s[-1])
        assert torch.equal(found.x[rows], part.x)


# ------------------------------------------------------------------------------------ half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", registry.SOLVERS)
def test_half_precision_is_float32_cast_at_the_end(name: str, dtype: torch.dtype) -> None:
    how = {"n": 3, "seeds": 1, "x0s": True, "trajectory": True, **runs_vp(name)}
    whole, half = (solve(gaussian(), dtype=kind, **how) for kind in (torch.float32, dtype))
    for kind in ("x", "x0s", "trajectory"):
        assert torch.equal(getattr(half, kind), getattr(whole, kind).to(dtype)), kind
    assert (half.dtype, half.provenance.computed_in) == (str(dtype)[6:], "float32")
    assert f"{str(dtype)[6:]} (computed in float32)" in str(half)
    assert "computed in" not in str(whole)
    # A state in half precision is rounded once, as it comes.
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = sample(gaussian(), x=x, seeds=1, **runs_vp(name))
    exact = sample(gaussian(), x=x.float(), seeds=1, **runs_vp(name))
    assert found.dtype == dtype
    assert torch.equal(found, exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_are_given_the_half_precision_that_they_want(dtype: torch.dtype) -> None:
    weight, seen = torch.eye(3, dtype=dtype), []

    def function(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x.dtype, t.dtype))
        return x @ weight

    module = torch.nn.Linear(3, 3).to(dtype)

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            seen.append((x.dtype, t.dtype))
            return self.inner(x)

    for network in (function, Module()):
        for name in ("heun", "rk45", "torchdiffeq", "dpmpp_2m_sde"):
            model = Prediction(network, "eps", VP(), shape=(3,))
            assert sample(model, dtype=dtype, **runs_vp(name)).dtype == dtype
    assert set(seen) == {(dtype, torch.float32)}
    seen.clear()
    sample(Prediction(lambda x, t: (seen.append(x.dtype), x)[1], "eps", VP(), shape=(3,)), nfe=2)
    assert set(seen) == {torch.float32}  # nothing is left of the solve before


# ------------------------------------------------------------- encodings, gradients, states that fit


@pytest.mark.parametrize("process", [VP(), EDM(), Cosine(), RectifiedFlow()])
@pytest.mark.parametrize("name", [n for n in PLANNED if registry.solver(n).reversible])
def test_an_encoding_is_near_the_known_one_or_refused(name: str, process: Any) -> None:
    model = Gaussian(torch.zeros(1, dtype=torch.float64), std=0.5, process=process)
    for nfe in (24, 60):
        try:
            z = encode(model, torch.ones(1, 1, dtype=torch.float64), solver=name, nfe=nfe)
        except BudgetError:
            continue
        except SolverError as error:
            assert "does not encode on this grid" in str(error)  # noqa: PT017
            assert registry.solver(name).order > 1  # one-step methods of order 1 always do
            continue
        data, noise = process.level(process.t_min), process.level(process.t_max)
        exact = ((noise.s**2 / 4 + noise.sigma**2) / (data.s**2 / 4 + data.sigma**2)) ** 0.5
        assert float(z) == pytest.approx(exact, rel=0.3)


@pytest.mark.parametrize("name", ["lms", "deis_rho3", "ipndm_v"])
def test_extrapolation_over_growing_steps_is_refused_before_any_call(name: str) -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("called")

    model = Prediction(network, "x0", Cosine(), shape=(1,))
    with pytest.raises(SolverError, match=r"does not encode.*off by.*Take 'auto'"):
        encode(model, torch.ones(1, 1), solver=name, nfe=100)
    times = torch.linspace(0.01, 0.99, 8)
    plan = registry.solver(name).plan(Cosine(), times, finish=False)  # type: ignore[attr-defined]
    for solver, grid in ((name, times), (plan, None)):
        with pytest.raises(SolverError, match="does not encode"):
            solve(model, solver=solver, grid=grid, x=torch.ones(1, 1), t=0.01, finish=False)


def network_with_weight() -> tuple[Any, Tensor]:
    mix = torch.tensor([[0.3, -0.5, 0.1], [0.2, 0.4, -0.3], [-0.6, 0.1, 0.5]], dtype=torch.float64)
    weight = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    return Prediction(lambda x, t: torch.tanh(x @ mix) * weight, "x0", VP(), shape=(3,)), weight


def derivatives(solver: Any, **how: Any) -> tuple[Tensor, Tensor]:
    """Of the squared size of a sample, by its start and by a weight of the network."""
    model, weight = network_with_weight()
    x = torch.tensor([[0.5, -1.0, 0.3], [1.5, 0.2, -0.7]], dtype=torch.float64, requires_grad=True)
    y = sample(model, solver=solver, x=x, seeds=0, requires_grad=True, **how)
    return torch.autograd.grad(y.square().sum(), (x, weight))  # type: ignore[return-value]


@pytest.mark.parametrize("clock", ["t", "asinh"])
@pytest.mark.parametrize("method", ["dopri8", "dopri5", "bosh3", "adaptive_heun"])
def test_gradients_through_torchdiffeq_are_those_of_the_ode(method: str, clock: Any) -> None:
    exact = derivatives(RK45(1e-9, 1e-9))
    found = derivatives(TorchDiffEq(method, 1e-6, 1e-6, clock))
    for a, b in zip(found, exact, strict=True):
        assert torch.allclose(a, b, rtol=2e-4, atol=2e-5)


def test_a_norm_of_ones_own_and_scipy() -> None:
    def norm(x: Tensor) -> Tensor:
        return x.abs().max()

    exact = derivatives(RK45(1e-9, 1e-9))
    found = derivatives(TorchDiffEq("dopri5", 1e-7, 1e-7, options={"norm": norm}))
    for a, b in zip(found, exact, strict=True):
        assert torch.allclose(a, b, rtol=2e-4, atol=2e-5)
    with pytest.raises(SolverError, match="no gradient flows through it"):
        derivatives(TorchDiffEq("scipy_solver"))
    assert sample(gaussian(), solver="torchdiffeq:scipy_solver").shape == (1, 3)


@pytest.mark.parametrize("name", PLANNED)
def test_gradients_through_plans_are_those_of_differences(name: str) -> None:
    how = runs_vp(name)
    solver = how.pop("solver")
    model, weight = network_with_weight()
    x = torch.tensor([[0.5, -1.0, 0.3], [1.5, 0.2, -0.7]], dtype=torch.float64)
    direction = torch.tensor([[1.0, 0.5, -0.2], [0.1, -0.4, 0.8]], dtype=torch.float64)
    by_x, by_weight = derivatives(solver, **how)

    def size(x: Tensor) -> float:
        return float(sample(model, solver=solver, x=x, seeds=0, **how).square().sum())

    small = 1e-5
    change = (size(x + small * direction) - size(x - small * direction)) / (2 * small)
    assert float((by_x * direction).sum()) == pytest.approx(change, rel=1e-5, abs=1e-7)
    sizes = []
    for shift in (small, -small):
        with torch.no_grad():
            weight.fill_(0.3 + shift)
        sizes.append(size(x))
    assert float(by_weight) == pytest.approx((sizes[0] - sizes[1]) / (2 * small), rel=1e-5)


@pytest.mark.parametrize(
    ("process", "scale"), [(EDM(), 1.0), (EDM(), 1e4), (VP(), 0.1), (VP(), 80.0), (VE(), 1.0)]
)
def test_a_state_that_cannot_be_there_is_named(process: Any, scale: float) -> None:
    noise = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    model = Gaussian(torch.zeros(64), std=0.5, process=process)
    with pytest.warns(UserWarning, match=r"x= holds a state of size .*process.level\(t\).sigma"):
        sample(model, solver="ddim", nfe=2, x=scale * noise)
    some = noise * process.level(process.t_max).sigma
    some[2] *= 0.01 if scale == 1.0 else 1e3
    with pytest.warns(UserWarning, match="x= holds a state of size"):  # one of several
        sample(model, solver="ddim", nfe=2, x=some)


@pytest.mark.parametrize("process", [VP(), EDM(), Cosine(), RectifiedFlow(), VE(), SubVP()])
@pytest.mark.parametrize("std", [0.001, 1.0, 200.0])
def test_states_that_belong_pass(process: Any, std: float) -> None:
    model = Gaussian(torch.zeros(40), std=std, process=process)
    for part in (0.0, 0.3, 0.7, 1.0):
        t = process.t_min + part * (process.t_max - process.t_min)
        x = process.perturb(std * torch.randn(2, 40), t, torch.randn(2, 40))
        leg = solve(model, solver="dpmpp_2m", nfe=4 if part else 1, x=x, t=t)
        assert leg.x.shape == (2, 40)
    start = process.level(process.t_max).sigma * torch.randn(2, 40)
    whole = solve(model, solver="ddim", nfe=9, x=start, trajectory=True)
    middle = float(whole.times[4])
    sample(model, solver="ddim", nfe=3, x=whole.trajectory[4], t=middle)


# ------------------------------------------------------------- transforms of torch, and torch.compile


@pytest.mark.parametrize("name", [n for n in registry.SOLVERS if not n.startswith("torch")])
def test_the_transforms_of_torch_go_through_a_solve(name: str) -> None:
    model, _ = network_with_weight()
    how = {**runs_vp(name), "seeds": 0, "requires_grad": True}
    x = torch.tensor([[0.5, -1.0, 0.3]], dtype=torch.float64)

    def solved(x: Tensor) -> Tensor:
        return sample(model, x=x, **how)

    by_autograd = torch.autograd.functional.jacobian(solved, x)
    assert torch.allclose(torch.func.jacrev(solved)(x), by_autograd, rtol=1e-6, atol=1e-9)
    _, along = torch.func.jvp(solved, (x,), (torch.ones_like(x),))
    assert torch.allclose(along, by_autograd.sum((2, 3)), rtol=1e-6, atol=1e-9)
    both = torch.stack([x, 2 * x])
    over = torch.func.vmap(solved, randomness="same")
    if registry.solver(name).adaptive:
        with pytest.raises(TypeError, match=r"torch.func.vmap does not show: pass all states"):
            over(both)
    else:
        assert torch.allclose(over(both), torch.stack([solved(x), solved(2 * x)]), atol=1e-12)


@pytest.mark.parametrize("name", ["torchdiffeq", "torchsde"])
def test_transforms_through_other_libraries_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"do not go through {name}: take 'rk45'"):
        torch.func.grad(
            lambda x: sample(gaussian(), x=x, requires_grad=True, **runs_vp(name)).sum()
        )(torch.ones(1, 3))


def test_a_solve_within_a_compiled_function() -> None:
    model = gaussian()

    def sampled(x: Tensor) -> Tensor:
        return sample(model, x=2 * x, solver="heun", nfe=5) + 1

    def solved(x: Tensor) -> Tensor:
        return solve(model, n=2, seeds=0, solver="rk45").x + x

    def encoded(x: Tensor) -> Tensor:
        return encode(model, x, solver="heun", nfe=4) + 1

    x = torch.tensor([[0.3, 0.2, -1.0], [0.1, 0.5, 0.2]])
    for function in (sampled, solved, encoded):
        assert torch.equal(torch.compile(function, backend="eager")(x), function(x))
