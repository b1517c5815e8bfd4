"""Plans: a trace is the textbook, in either precision; tables print, save, check and differentiate;
networks may misbehave.
"""

from __future__ import annotations

import json
import math
import threading
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from methods import UniPC
from problems import (
    GRID_SOLVERS,
    PROCESSES,
    FixedNoise,
    GaussianData,
    Mixture,
    Point,
    each,
    from_the_start,
    observed_order,
    reference,
    thinned,
    warped,
)
from torch import Tensor, nn

from sdeflow import grid
from sdeflow.denoisers import Denoiser, Prediction
from sdeflow.errors import GridError, SolverError
from sdeflow.noise import SeededNoise
from sdeflow.plan.instructions import Call, Combine, Draw
from sdeflow.plan.plan import Plan
from sdeflow.plan.trace import Operand
from sdeflow.process import EDM, VP, Level, Process, RectifiedFlow
from sdeflow.reverse import Reverse
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.ddim import DDIM
from sdeflow.solvers.ode.runge_kutta import RK4, Euler, Heun, Midpoint
from sdeflow.solvers.sde.classic import DDPM, AnnealedLangevin, EulerMaruyama
from sdeflow.solvers.wrappers.churn import Churn
from sdeflow.solvers.wrappers.restart import Restart

DAY_ONE: dict[str, GridSolver] = {
    "unipc3": UniPC(3),
    "unipc3-rk4": UniPC(3, "rk4"),
}
EVERY = {**GRID_SOLVERS, **DAY_ONE}


def start(process: Process, t: float, n: int = 5) -> Tensor:
    level = process.level(t)
    rng = torch.Generator().manual_seed(0)
    x0, eps = (
        torch.from_numpy(Mixture.draw(n, 0)),
        torch.randn(n, 2, generator=rng, dtype=torch.float64),
    )
    return level.s * x0 + level.sigma * eps


def both(
    solver: GridSolver, denoiser: Denoiser, x: Tensor, times: Tensor, *, finish: bool = True
) -> tuple[Tensor, Tensor, int, int]:
    """Plan and textbook on the same noise, and the calls each made."""
    plan_reverse, text_reverse = Reverse(denoiser), Reverse(denoiser)
    with torch.no_grad():
        a = solver.integrate(
            plan_reverse, x, times, FixedNoise(len(x), x.shape[1:], x.dtype), finish=finish
        ).x
        b = solver.textbook(
            text_reverse, x, times, FixedNoise(len(x), x.shape[1:], x.dtype), finish=finish
        )
    return a, b, plan_reverse.nfe, text_reverse.nfe


# ------------------------------------------------------------------------ the table is the textbook


@pytest.mark.parametrize(
    ("name", "under"), thinned(each(EVERY, sorted(PROCESSES), once=("vp", "from_betas")))
)
def test_plan_is_the_textbook_in_float64(name: str, under: str) -> None:
    solver, process = EVERY[name], PROCESSES[under]
    times = warped(process, 4, 20.0, 0.05)
    x = start(process, float(times[0]))
    for finish in (True, False):
        plan, textbook, calls, expected = both(solver, Mixture(process), x, times, finish=finish)
        assert calls == expected == solver.calls(len(times), finish=finish)
        torch.testing.assert_close(plan, textbook, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["euler", "heun", "ddim", "ddpm", "euler_maruyama", "annealed_langevin", "langevin"]
)
@pytest.mark.parametrize("under", ["rectified_flow", "vp", "cosine"])
def test_plan_is_the_textbook_from_the_end_of_time(name: str, under: str) -> None:
    solver, process = EVERY[name], PROCESSES[under]
    times = grid.uniform_t(process, 6)
    plan, textbook, *_ = both(solver, Mixture(process), start(process, process.t_max), times)
    torch.testing.assert_close(plan, textbook, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_float32_agrees_with_float64_at_small_noise(name: str) -> None:
    """Down to nsr 0.002, the state itself (no last denoising step): float32 rounds at 6e-8, and the
    plan adds no cancellation.
    """
    solver, process = EVERY[name], EDM()
    times = grid.karras(process, 12)
    x = start(process, 80.0, 32)
    exact, _, _, _ = both(solver, Mixture(process), x, times, finish=False)
    plan, textbook, _, _ = both(solver, Mixture(process), x.float(), times, finish=False)
    scale = max(1.0, float(exact.abs().max()))
    assert float((plan - exact).abs().max()) / scale < 1e-5
    # The table is about as exact as the steps as written.
    assert (
        float((plan - exact).abs().median())
        < 3 * float((textbook - exact).abs().median()) + 1e-7 * scale
    )


@pytest.mark.parametrize("under", ["vp", "edm", "rectified_flow"])
def test_small_steps_at_small_noise_do_not_cancel_in_float32(under: str) -> None:
    """40 steps from nsr 0.01 to 0.002: eps = (x - s x0) / sigma, taken naively, loses 5 digits
    here.
    """
    process = PROCESSES[under]
    times = warped(process, 40, 0.01, 0.002)
    x = start(process, float(times[0]), 64)
    for solver in (DDIM(), Heun(), Heun("nsr"), UniPC(3), Churn(s_tmin=0.0)):
        exact, _, _, _ = both(solver, Mixture(process), x, times, finish=False)
        plan, _, _, _ = both(solver, Mixture(process), x.float(), times, finish=False)
        assert float((plan - exact).abs().max()) < 5e-6, solver


# -------------------------------------------------------- day one: methods that are not shipped yet


@pytest.mark.parametrize("warm_up", ["orders", "rk4"])
@pytest.mark.parametrize("p", [2, 3])
@pytest.mark.parametrize("under", ["vp", "edm", "rectified_flow"])
def test_unipc_converges_past_its_predictor(under: str, p: int, warm_up: str) -> None:
    process, solver = PROCESSES[under], UniPC(p, warm_up)

    def error(n: int) -> float:
        times = warped(process, n)
        x, exact = reference(process, float(times[0]), float(times[-1]))
        with torch.no_grad():
            return float(
                (
                    solver.integrate(Reverse(Mixture(process)), x, times, None, finish=False).x
                    - exact
                ).norm()
            )

    assert observed_order(error, (64, 128)) > p - 0.25


@pytest.mark.parametrize(
    ("name", "levels", "nfe", "draws", "buffers"),
    # EDM's churn at 18 levels spends 35; Restart's [m, K] = [3, 2] on it 43. A buffer is a state
    # that a combination writes.
    [
        ("unipc3", 10, 10, 0, 2),
        ("unipc3-rk4", 10, 16, 0, 4),
        ("churn", 18, 35, 13, 4),
        ("restart", 18, 43, 2, 3),
    ],
)
def test_cost_of_the_methods_of_day_one(
    name: str, levels: int, nfe: int, draws: int, buffers: int
) -> None:
    solver = EVERY[name]
    plan = solver.plan(EDM(), grid.karras(EDM(), levels))
    assert plan.nfe == nfe == solver.calls(levels)
    assert solver.levels(nfe) == levels
    assert plan.draws == draws
    assert plan.buffers <= buffers
    assert max(len(i.terms) for i in plan.instructions if isinstance(i, Combine)) <= 9


def test_restart_restores_the_marginal() -> None:
    """Noise added on the way up is that of the forward process: a consistent table, in which only
    Heun's inner stages are off.
    """
    plan = Restart().plan(EDM(), grid.karras(EDM(), 18))
    assert plan.consistency()["signal"] < 1e-12
    assert plan.consistency()["noise"] < 1e-12


# ---------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize(("name", "under"), each(EVERY, sorted(PROCESSES)))
def test_consistency(name: str, under: str) -> None:
    """A single point is exact in every plan; ancestral and ODE steps in x0 keep the variance
    too.
    """
    solver, process = EVERY[name], PROCESSES[under]
    report = solver.plan(process, warped(process, 7, 20.0, 0.02)).consistency()
    exact_signal = name not in ("euler_maruyama", "langevin", "langevin-heun") and getattr(
        solver, "clock", "nsr"
    ) in (
        "nsr",
        "lam",
    )
    if exact_signal:
        assert report["signal"] < 1e-12
        assert report["result"] < 1e-12
    if name in ("ddim", "ddpm", "ddim-eta=0.5", "ddim-eta=1", "euler-nsr", "heun-nsr", "unipc3"):
        assert report["noise"] < 1e-12
    assert report["result"] < 1e-12  # the last step is the denoised prediction


def test_consistency_sees_a_wrong_table() -> None:
    plan = DDIM().plan(VP(), grid.uniform_t(VP(), 5))
    wrong = plan.with_numbers(coefficients=plan.coefficients * 1.01)
    assert plan.consistency()["signal"] < 1e-14
    assert wrong.consistency()["signal"] > 1e-3
    assert wrong.consistency()["noise"] > 1e-3


@pytest.mark.parametrize("name", EVERY)
def test_a_plan_survives_its_file_exactly(name: str, tmp_path: Any) -> None:
    solver, process = EVERY[name], VP()
    plan = solver.plan(process, warped(process, 4), record=True)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.coefficients.tolist() == plan.coefficients.tolist()
    assert loaded.allclose(plan)
    x = start(process, plan.grid[0][0])
    with torch.no_grad():
        a, recorded = plan.execute(Reverse(Mixture(process)), x, FixedNoise(5, (2,)))
        b, again = loaded.execute(Reverse(Mixture(process)), x, FixedNoise(5, (2,)))
    assert torch.equal(a, b)
    assert len(recorded) == len(again) == 5
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_from_where_no_signal_is_left_survives_its_file(tmp_path: Any) -> None:
    plan = DDPM().plan(RectifiedFlow(), grid.uniform_t(RectifiedFlow(), 4))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[]",
        '{"format": "sdeflow-plan-1"}',
        "not json",
        '{"format": "sdeflow-plan-1", "instructions": [["jump"]], "grid": []}',
    ],
)
def test_a_file_that_is_no_plan_says_so(content: str, tmp_path: Any) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ValueError, match="not a plan saved by sdeflow"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("name", EVERY)
def test_a_plan_prints_a_row_a_call(name: str) -> None:
    plan = EVERY[name].plan(EDM(), grid.karras(EDM(), 5))
    lines = str(plan).splitlines()
    assert f"NFE {plan.nfe}" in lines[0]
    assert f"{plan.draws} draws" in lines[0]
    assert "zero noise" in lines[0]
    rows = lines[2:-1]
    assert [int(row.split()[0]) for row in rows] == list(range(plan.nfe))
    assert [float(row.split()[1]) for row in rows] == pytest.approx(plan.times.tolist(), rel=1e-4)
    assert lines[-1].split()[0] == "end"


def test_plans_of_equal_solvers_are_one_object_and_of_unequal_ones_are_not() -> None:
    times = grid.uniform_t(VP(), 5)
    assert Heun().plan(VP(), times) is Heun().plan(VP(), times.clone())
    assert Heun().plan(VP(), times) is not Heun("nsr").plan(VP(), times)
    assert DDIM(0.5).plan(VP(), times) is not DDIM(0.25).plan(VP(), times)
    assert Heun().plan(VP(), times) is not Heun().plan(VP(beta_max=19.0), times)
    assert Heun().plan(VP(), times) is not Heun().plan(VP(), times, finish=False)


def test_a_process_that_learns_is_traced_anew() -> None:
    @dataclass(frozen=True)
    class Learned(Process):
        log_rate: nn.Parameter

        def s(self, t: Tensor) -> Tensor:
            return torch.exp(-t * self.log_rate.exp())

        def sigma(self, t: Tensor) -> Tensor:
            return torch.sqrt(-torch.expm1(-2 * t * self.log_rate.exp()))

    process = Learned(nn.Parameter(torch.tensor(1.0, dtype=torch.float64)))
    times = grid.uniform_t(process, 4)
    with torch.no_grad():
        before = DDIM().plan(process, times).coefficients
        process.log_rate.add_(0.5)
        after = DDIM().plan(process, times).coefficients
    assert not torch.allclose(before, after)


def test_a_solver_that_changes_is_traced_anew() -> None:
    class Damped(GridSolver):
        order: ClassVar[int] = 1
        source: ClassVar[str] = "a user"

        def __init__(self, damp: float):
            self.damp = damp

        def step(
            self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
        ) -> tuple[Any, Any]:
            return x * self.damp + (1.0 - self.damp) * reverse(x, t), state

    solver, times = Damped(0.5), grid.uniform_t(VP(), 4)
    before = solver.plan(VP(), times).coefficients
    solver.damp = 0.25
    assert not torch.allclose(before, solver.plan(VP(), times).coefficients)


# ---------------------------------------------------------------------------------------- gradients


def test_gradients_flow_through_coefficients_and_times() -> None:
    process = VP()
    plan = Heun().plan(process, warped(process, 2))
    x = start(process, plan.grid[0][0], 2)

    def run(coefficients: Tensor, times: Tensor, x: Tensor) -> Tensor:
        return plan.with_numbers(coefficients, times).execute(Reverse(Mixture(process)), x, None)[0]

    inputs = [tensor.clone().requires_grad_() for tensor in (plan.coefficients, plan.times, x)]
    assert torch.autograd.gradcheck(run, inputs, atol=1e-6)


@pytest.mark.parametrize(
    "solver",
    [
        DDIM(),
        Euler("lam"),
        Heun("nsr"),
        Midpoint("lam"),
        Midpoint("nsr"),
        RK4("t"),
        EulerMaruyama(),
        DDPM(),
    ],
    ids=str,
)
@pytest.mark.parametrize("under", ["vp", "edm", "rectified_flow", "from_betas"])
def test_gradients_flow_through_the_grid(solver: GridSolver, under: str) -> None:
    """The coefficients themselves depend on the times, through the process; noise is the same in
    every evaluation.
    """
    process = PROCESSES[under]
    times = warped(process, 3, 3.0, 0.3)
    x = start(process, float(times[0]), 2)

    def run(times: Tensor) -> Tensor:
        return solver.integrate(Reverse(Mixture(process)), x, times, FixedNoise(2, (2,))).x

    assert torch.autograd.gradcheck(
        run, [times.clone().requires_grad_()], eps=1e-7, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize(
    "solver",
    [DDIM(), DDIM(0.5), Euler(), Heun(), EulerMaruyama(), DDPM(), AnnealedLangevin(1)],
    ids=str,
)
def test_gradients_flow_through_a_grid_from_where_no_signal_is_left(solver: GridSolver) -> None:
    """The start at s = 0 stays where it is (beyond it there is no process); the times after it
    move.
    """
    process = RectifiedFlow()
    x = torch.randn(2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def run(later: Tensor) -> Tensor:
        times = torch.cat([torch.ones(1, dtype=torch.float64), later])
        return solver.integrate(Reverse(Mixture(process)), x, times, FixedNoise(2, (2,))).x

    later = torch.tensor([0.6, 0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, [later], eps=1e-7, atol=1e-5, rtol=1e-4)
    ends = torch.tensor([1.0, 0.6, 0.3], dtype=torch.float64, requires_grad=True)
    solver.integrate(Reverse(Mixture(process)), x, ends, FixedNoise(2, (2,))).x.sum().backward()
    assert ends.grad is not None
    assert bool(torch.isfinite(ends.grad[1:]).all())


@pytest.mark.parametrize(
    "solver", [DDIM(), Heun(), Heun("nsr"), RK4("lam"), EulerMaruyama()], ids=str
)
def test_numbers_that_require_grad_run_without_gradients_too(solver: GridSolver) -> None:
    process = VP()
    plan = solver.plan(process, warped(process, 3))
    tuned = plan.with_numbers(
        plan.coefficients.clone().requires_grad_(), plan.times.clone().requires_grad_()
    )
    assert tuned.differentiable
    for dtype in (torch.float32, torch.float64):
        x = start(process, plan.grid[0][0]).to(dtype)
        with torch.no_grad():
            a = plan.execute(Reverse(Mixture(process)), x, FixedNoise(5, (2,), dtype))[0]
            b = tuned.execute(Reverse(Mixture(process)), x, FixedNoise(5, (2,), dtype))[0]
        assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_tuned_plan_saves_its_numbers(tmp_path: Any) -> None:
    plan = DDIM().plan(VP(), warped(VP(), 3))
    tuned = plan.with_numbers(plan.coefficients.clone().requires_grad_())
    tuned.save(tmp_path / "plan.json")
    assert not Plan.load(tmp_path / "plan.json").differentiable
    assert Plan.load(tmp_path / "plan.json") == plan
    assert str(tuned) == str(plan)


def test_with_numbers_checks_their_count() -> None:
    plan = DDIM().plan(VP(), warped(VP(), 3))
    with pytest.raises(ValueError, match="coefficients"):
        plan.with_numbers(torch.zeros(3))
    with pytest.raises(ValueError, match="4 calls"):
        plan.with_numbers(times=torch.zeros(3))


# -------------------------------------------------------------------------- what a plan cannot hold


class Custom(GridSolver):
    order: ClassVar[int] = 1
    source: ClassVar[str] = "a test"


def test_a_step_that_multiplies_states_is_refused() -> None:
    class Squares(Custom):
        def step(
            self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
        ) -> tuple[Any, Any]:
            return x * reverse(x, t), state

    with pytest.raises(SolverError, match=r"multiplied two states.*integrate"):
        Squares().plan(VP(), grid.uniform_t(VP(), 3))


def test_a_step_that_branches_on_a_state_is_refused() -> None:
    class Clips(Custom):
        def step(
            self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
        ) -> tuple[Any, Any]:
            return (x if x else -x), state

    with pytest.raises(SolverError, match="value of a state"):
        Clips().plan(VP(), grid.uniform_t(VP(), 3))


def test_a_step_that_adds_a_number_is_refused() -> None:
    class Shifts(Custom):
        def step(
            self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
        ) -> tuple[Any, Any]:
            return reverse(x, t) + 1.0, state

    with pytest.raises(TypeError):
        Shifts().plan(VP(), grid.uniform_t(VP(), 3))


def test_a_step_without_meaning_on_its_grid_is_refused() -> None:
    class Divides(Custom):
        def step(
            self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
        ) -> tuple[Any, Any]:
            return reverse(x, t) * math.inf, state

    with pytest.raises(SolverError, match="coefficient of inf"):
        Divides().plan(VP(), grid.uniform_t(VP(), 3))


@pytest.mark.parametrize("times", [[1.0, 0.5, 0.0], [0.0]])
@pytest.mark.parametrize("solver", [DDIM(), Heun(), EulerMaruyama(), DDPM()], ids=str)
def test_a_grid_that_reaches_zero_noise_is_explained(
    solver: GridSolver, times: list[float]
) -> None:
    with pytest.raises(GridError, match=r"(?s)zero noise|t=0"):
        solver.plan(VP(), times)


def test_operands_are_linear() -> None:
    x, y = Operand({0: 1.0}), Operand({1: 1.0})
    z = 2.0 * (x - y) / 4.0 + -x
    assert z.terms == {0: -0.5, 1: -0.5}
    assert (x * 3 + x).terms == {0: 4.0}


def test_zero_weights_draw_nothing_and_call_what_the_budget_counts() -> None:
    class Wasteful(Custom):
        def step(
            self, reverse: Reverse, x: Any, t: Level, t_next: Level, noise: Any, state: Any
        ) -> tuple[Any, Any]:
            unused = reverse(x, t)
            return reverse(x + 0.0 * unused + 0.0 * noise(t, t_next), t) + 0.0 * noise(), state

    plan = Wasteful().plan(VP(), grid.uniform_t(VP(), 3))
    assert plan.draws == 0
    assert plan.nfe == 5
    assert all(c != 0.0 for i in plan.instructions if isinstance(i, Combine) for _, c in i.terms)


# -------------------------------------------------------------------------- networks that misbehave


class Buffered(nn.Module):
    """Returns the same tensor at every call, as a captured CUDA graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.out: Tensor | None = None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.out is None or self.out.shape != x.shape:
            self.out = torch.empty_like(x)
        return (
            torch.tanh(x + t.unsqueeze(-1), out=self.out)
            if not x.requires_grad
            else torch.tanh(x + t.unsqueeze(-1))
        )


class Fresh(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x + t.unsqueeze(-1))


class Identity(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x


class IdentityCopy(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x.clone()


class View(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x.flip(-1).flip(-1) if x.requires_grad else x.view(-1).view(x.shape)


class Keeps(nn.Module):
    """Keeps what it returns, and gives it back changed by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        self.copies: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out = torch.tanh(x + t.unsqueeze(-1))
        self.kept.append(out)
        self.copies.append(out.clone())
        return out


def run(
    network: nn.Module, solver: GridSolver, predicts: str = "x0", batch_size: int = 6
) -> list[Tensor]:
    denoiser = Prediction(network, predicts, VP())  # type: ignore[arg-type]
    times = grid.uniform_t(VP(), 5)
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    ends = []
    with torch.no_grad():
        for part in x.split(batch_size):
            ends.append(
                solver.integrate(
                    Reverse(denoiser), part, times, FixedNoise(len(part), (2,), torch.float32)
                ).x
            )
    return ends


@pytest.mark.parametrize(
    "solver", [Euler(), Heun(), RK4(), DDIM(), EulerMaruyama(), UniPC(3)], ids=str
)
@pytest.mark.parametrize("predicts", ["x0", "eps", "v"])
def test_a_network_may_return_one_tensor_every_call(solver: GridSolver, predicts: str) -> None:
    expected = torch.cat(run(Fresh(), solver, predicts, 3))
    got = torch.cat(run(Buffered(), solver, predicts, 3))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("network", [Identity, View])
@pytest.mark.parametrize(
    "solver", [Euler(), Heun(), RK4(), DDIM(), EulerMaruyama(), UniPC(3)], ids=str
)
def test_a_network_may_return_its_input(solver: GridSolver, network: type[nn.Module]) -> None:
    torch.testing.assert_close(run(network(), solver)[0], run(IdentityCopy(), solver)[0])


@pytest.mark.parametrize("solver", [Heun(), RK4(), DDIM(), EulerMaruyama()], ids=str)
def test_a_network_may_keep_its_outputs(solver: GridSolver) -> None:
    network = Keeps()
    (result,) = run(network, solver)
    assert all(torch.equal(a, b) for a, b in zip(network.kept, network.copies, strict=True))
    result.zero_()  # the result is the caller's own
    assert all(torch.equal(a, b) for a, b in zip(network.kept, network.copies, strict=True))


def test_the_state_given_is_left_alone() -> None:
    x = torch.randn(3, 2, dtype=torch.float64)
    copy = x.clone()
    for solver in GRID_SOLVERS.values():
        for finish in (True, False):
            with torch.no_grad():
                out = solver.integrate(
                    Reverse(Mixture(VP())), x, warped(VP(), 3), FixedNoise(3, (2,)), finish=finish
                ).x
            out.add_(1.0)
            assert torch.equal(x, copy), solver


def test_one_level_is_one_call_or_none() -> None:
    for name, solver in GRID_SOLVERS.items():
        x = torch.randn(3, 2, dtype=torch.float64)
        with torch.no_grad():
            one = solver.integrate(
                Reverse(Mixture(VP())), x, torch.tensor([0.5]), FixedNoise(3, (2,))
            )
            none = solver.integrate(
                Reverse(Mixture(VP())), x, torch.tensor([0.5]), FixedNoise(3, (2,)), finish=False
            )
        assert one.nfe == solver.calls(1), name
        assert none.nfe == 0, name
        assert torch.equal(none.x, x), name


def test_two_threads_share_one_solver() -> None:
    solver, process, x = Heun(), VP(), torch.randn(4, 2, dtype=torch.float64)
    expected = {}
    failures: list[BaseException] = []

    def solve(n: int) -> Tensor:
        with torch.no_grad():
            return solver.integrate(
                Reverse(Mixture(process)), x, grid.uniform_t(process, n), None
            ).x

    for n in range(2, 8):
        expected[n] = solve(n)

    def work(offset: int) -> None:
        try:
            for k in range(60):
                n = 2 + (k + offset) % 6
                assert torch.equal(solve(n), expected[n])
                Heun().plan(
                    VP(beta_max=20.0 + k + offset / 7), grid.uniform_t(process, n)
                )  # pushes others out of the cache
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_instructions_are_plain() -> None:
    plan = DDPM().plan(VP(), grid.uniform_t(VP(), 3), record=True)
    assert json.dumps(plan.to_dict())
    kinds = [type(i).__name__ for i in plan.instructions]
    assert kinds.count("Call") == plan.nfe == 3
    assert kinds.count("Draw") == plan.draws == 2
    assert kinds.count("Record") == 3
    draws = [i for i in plan.instructions if isinstance(i, Draw)]
    assert all(d.nsr is not None and d.nsr_next is not None and d.nsr > d.nsr_next for d in draws)
    assert all(isinstance(i.t, float) for i in plan.instructions if isinstance(i, Call))


@pytest.mark.parametrize("solver", [DDIM(), Heun(), DDPM()], ids=str)
def test_point_and_gaussian_are_exact_in_a_plan(solver: GridSolver) -> None:
    process = VP()
    x = torch.randn(4, 1, dtype=torch.float64)
    with torch.no_grad():
        end = solver.integrate(
            Reverse(Point(process)), x, grid.uniform_t(process, 4), FixedNoise(4, (1,))
        ).x
        assert torch.equal(end, torch.full_like(end, Point.value))
        unit = solver.integrate(
            Reverse(GaussianData(process, 0.0, 1.0)),
            x,
            grid.uniform_t(process, 4),
            FixedNoise(4, (1,)),
        ).x
    assert torch.isfinite(unit).all()


# ------------------------------------------------------------------------------------- accelerators


@pytest.mark.cuda
@pytest.mark.parametrize("name", GRID_SOLVERS)
def test_the_loop_never_waits_for_the_device(name: str) -> None:
    solver = GRID_SOLVERS[name]
    times = grid.uniform_t(VP(), 6)
    denoiser = Prediction(lambda x, t: x * 0.5, "x0", VP())
    x = torch.randn(4, 3, 8, 8, device="cuda")
    noise = SeededNoise(range(4), (3, 8, 8), device="cuda")
    with torch.no_grad():
        solver.integrate(Reverse(denoiser), x, times, noise)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            solver.integrate(Reverse(denoiser), x, times, noise)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_device_and_cpu_agree() -> None:
    process = VP()
    times = grid.uniform_t(process, 6)
    x = start(process, 1.0).float()
    with torch.no_grad():
        for solver in (DDIM(), Heun(), RK4()):
            cpu = solver.integrate(
                Reverse(Prediction(lambda x, t: torch.tanh(x), "x0", process)), x, times, None
            ).x
            device = solver.integrate(
                Reverse(Prediction(lambda x, t: torch.tanh(x), "x0", process)),
                x.cuda(),
                times,
                None,
            ).x
            torch.testing.assert_close(device.cpu(), cpu, rtol=1e-5, atol=1e-5)


def test_every_solver_is_here() -> None:
    assert set(GRID_SOLVERS) <= set(EVERY)
    assert all(from_the_start(solver, VP()) for solver in EVERY.values())
