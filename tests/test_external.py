"""torchdiffeq and torchsde behind the solver protocol: orders, counts, seeds, ends of time and
errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import PROCESSES, GaussianData, Mixture, Point, reference, slopes, warped
from torch import Tensor

from sdeflow.denoisers import Denoiser, Prediction
from sdeflow.errors import BudgetError, GridError, NonFiniteError, SolverError, UnknownNameError
from sdeflow.noise import BrownianNoise, Noise, SeededNoise
from sdeflow.process import EDM, VP, Process, RectifiedFlow
from sdeflow.reverse import Reverse
from sdeflow.solvers.base import Solution, Solver
from sdeflow.solvers.external.torchdiffeq import _ADAMS, _ODE_METHODS, TorchDiffEq
from sdeflow.solvers.external.torchsde import _SDE_METHODS, TorchSDE
from sdeflow.solvers.ode.runge_kutta import Euler, Midpoint
from sdeflow.solvers.sde.classic import EulerMaruyama

FIXED = [name for name, method in _ODE_METHODS.items() if method.calls and name not in _ADAMS]
ADAPTIVE = [name for name in _ODE_METHODS if name not in FIXED and name not in _ADAMS]


def at(*times: float) -> Tensor:
    return torch.tensor(times, dtype=torch.float64)


def ends(process: Process) -> Tensor:
    return at(process.t_max, process.t_min)


def run(
    solver: Solver,
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    noise: Noise | None = None,
    **how: Any,
) -> Solution:
    how.setdefault("finish", False)
    reverse = Reverse(denoiser)
    solution = solver.integrate(reverse, x, times, noise, **how)
    assert solution.nfe == solution.network_calls == reverse.nfe
    return solution


def starts(process: Process, n: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(n, *shape, generator=generator, dtype=torch.float64).to(dtype)
        * process.prior_std
    )


def uniform(process: Process, clock: str, n: int) -> Tensor:
    """`n` equal steps of a clock between two noise-to-signal ratios."""
    reading: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
        "t": (lambda t: t, lambda q: q),
        "nsr": (process.nsr, process.t_of_nsr),
        "lam": (process.lam, process.t_of_lam),
        "asinh": (
            lambda t: torch.asinh(1 / process.nsr(t)),
            lambda q: process.t_of_nsr(1 / torch.sinh(q)),
        ),
    }
    there, back = reading[clock]
    first, last = process.t_of_nsr(at(4.0, 0.2))
    times = back(
        there(first)
        + torch.linspace(0, 1, n + 1, dtype=torch.float64) * (there(last) - there(first))
    )
    times[0], times[-1] = first, last
    return times


# -------------------------------------------------------------------------------------- torchdiffeq


@pytest.mark.parametrize("clock", ["t", "lam", "asinh"])
@pytest.mark.parametrize("method", FIXED)
def test_fixed_methods_step_the_grid_at_their_order(method: str, clock: str) -> None:
    process = VP()
    solver = TorchDiffEq(method, clock=clock)  # type: ignore[arg-type]
    errors = []
    for n in (48, 96):
        times = warped(process, n)
        x, exact = reference(process, float(times[0]), float(times[-1]))
        solution = run(solver, Mixture(process), x, times)
        assert solution.nfe == solver.calls(n + 1, finish=False)
        errors.append(float((solution.x - exact).abs().mean()))
    assert slopes(errors)[-1] == pytest.approx(solver.order, abs=0.25)


@pytest.mark.parametrize("clock", ["t", "lam"])
@pytest.mark.parametrize("method", _ADAMS)
def test_adams_has_its_order_on_equal_steps_and_refuses_others(method: str, clock: str) -> None:
    process = VP()
    solver = TorchDiffEq(method, clock=clock, rtol=1e-10, atol=1e-10)  # type: ignore[arg-type]
    errors = []
    for n in (24, 96):
        times = uniform(process, clock, n)
        x, exact = reference(process, float(times[0]), float(times[-1]))
        solution = run(solver, Mixture(process), x, times)
        errors.append(float((solution.x - exact).abs().mean()))
        if method == "explicit_adams":
            assert solution.nfe == solver.calls(n + 1, finish=False)
    assert slopes(errors)[-1] / 2 > 3.6
    with pytest.raises(GridError, match="equal steps"):
        run(solver, Mixture(process), x, warped(process, 8))


@pytest.mark.parametrize(
    ("method", "clock"),
    [(m, "asinh") for m in ADAPTIVE] + [("dopri5", clock) for clock in ("t", "nsr", "lam")],
)
def test_adaptive_methods_meet_their_tolerance(method: str, clock: str) -> None:
    process = VP()
    tol = 1e-4 if method in ("fehlberg2", "adaptive_heun") else 1e-6
    bound = (3000 if method == "fehlberg2" else 300) * tol
    t, t_next = process.t_of_nsr(at(8.0, 0.1)).tolist()
    x, exact = reference(process, t, t_next)
    times = at(t, 0.5 * (t + t_next), t_next)
    solver = TorchDiffEq(method, rtol=tol, atol=tol, clock=clock)  # type: ignore[arg-type]
    plain = run(solver, Mixture(process), x, times)
    assert float((plain.x - exact).abs().max()) < bound
    recorded = run(solver, Mixture(process), x, times, record=True, finish=True).trajectory
    assert recorded is not None
    assert recorded.shape == (4, *x.shape)
    _, between = reference(process, t, float(times[1]))
    assert float((recorded[1] - between).abs().max()) < bound
    assert torch.allclose(recorded[2], plain.x, rtol=0, atol=bound)
    assert torch.allclose(recorded[3], Mixture(process)(recorded[2], t_next))


@pytest.mark.parametrize(
    ("name", "clock"),
    [(n, "asinh") for n in sorted(PROCESSES) if n != "from_sde"]
    + [(n, "t") for n in ("vp", "edm", "rectified_flow")],
)
def test_every_process_from_its_true_end_and_back(name: str, clock: str) -> None:
    process = PROCESSES[name]
    data = GaussianData(process, mean=0.3, std=0.5)
    x = starts(process, 2, 3)
    solver = TorchDiffEq("dopri5", rtol=1e-6, atol=1e-6, clock=clock)  # type: ignore[arg-type]
    there = run(solver, data, x, ends(process)).x
    assert torch.allclose(
        there, data.transport(x, process.t_max, process.t_min), rtol=1e-4, atol=1e-4
    )
    assert torch.allclose(
        run(solver, data, there, ends(process).flip(0)).x,
        x,
        rtol=1e-3,
        atol=1e-3 * process.prior_std,
    )
    with pytest.raises(GridError, match="finish=False"):
        run(solver, data, there, ends(process).flip(0), finish=True)


def test_parity_with_our_own_fixed_methods() -> None:
    process = VP()
    times = warped(process, 7)
    x, _ = reference(process, float(times[0]), float(times[-1]))
    for theirs, ours in (("euler", Euler), ("midpoint", Midpoint)):
        for clock in ("t", "nsr", "lam"):
            a = run(TorchDiffEq(theirs, clock=clock), Mixture(process), x, times, finish=True)
            b = run_plan_of(ours(clock), process, x, times)
            assert a.nfe == b.nfe
            assert torch.allclose(a.x, b.x, rtol=1e-12, atol=1e-13)


def run_plan_of(solver: Solver, process: Process, x: Tensor, times: Tensor) -> Solution:
    return solver.integrate(Reverse(Mixture(process)), x, times, None, finish=True)


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("finish", [True, False])
def test_budgets_of_fixed_methods(method: str, finish: bool) -> None:
    solver = TorchDiffEq(method)
    process = EDM()
    for nfe in range(1, 14):
        try:
            levels = solver.levels(nfe, finish=finish)
        except BudgetError as error:
            assert "nearest" in str(error)  # noqa: PT017
            continue
        times = process.t_of_nsr(torch.logspace(0, -1, levels, dtype=torch.float64))
        assert run(solver, Mixture(process), starts(process, 1, 2), times, finish=finish).nfe == nfe


def test_methods_without_a_budget_say_why() -> None:
    with pytest.raises(BudgetError, match="dopri8 takes no nfe, as it is adaptive"):
        TorchDiffEq("dopri8").levels(30)
    with pytest.raises(BudgetError, match="implicit_adams takes no nfe, as it iterates"):
        TorchDiffEq("implicit_adams").levels(30)
    assert TorchDiffEq("dopri8").adaptive
    assert not TorchDiffEq("rk4").adaptive
    assert TorchDiffEq("rk4").order == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_narrow_states_of_any_shape(method: str, dtype: torch.dtype) -> None:
    process = VP()
    data = GaussianData(process, std=0.5)
    x = starts(process, 2, 3, 4, 5, dtype=dtype)
    times = process.t_of_nsr(torch.logspace(2, -2, 60, dtype=torch.float64))
    solution = run(TorchDiffEq(method), data, x, times)
    exact = data.transport(x.double(), float(times[0]), float(times[-1]))
    assert solution.x.dtype == dtype
    assert torch.allclose(
        solution.x.double(), exact, rtol=2e-3 if dtype == torch.float32 else 2e-2, atol=2e-3
    )


def test_fixed_methods_ask_at_exactly_the_given_times() -> None:
    """Even where torchdiffeq rounds them to the float32 of the state."""
    process = VP()
    times = at(1.0, 0.7, 0.3, 0.1, 0.001)
    asked: list[float] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * x

    run(
        TorchDiffEq("euler"),
        Prediction(network, "x0", process),
        starts(process, 1, 2, dtype=torch.float32),
        times,
        finish=True,
        on_call=lambda k, call, x, x0: asked.append(float(call.t)),
    )
    assert asked == times.tolist()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(
    "solver",
    [TorchDiffEq("dopri5"), TorchDiffEq("rk4"), TorchSDE("srk"), TorchSDE("euler")],
    ids=repr,
)
def test_on_a_gpu_in_float32(solver: Solver) -> None:
    process = VP()
    x = starts(process, 3, 2, dtype=torch.float32)
    times = process.t_of_nsr(torch.logspace(1, -1, 12, dtype=torch.float64))
    cpu, gpu = (
        run(
            solver,
            Mixture(process),
            x.to(device),
            times,
            SeededNoise(range(3), (2,), device=device),
            finish=True,
        ).x
        for device in ("cpu", "cuda")
    )
    assert gpu.is_cuda
    assert gpu.dtype == torch.float32
    assert torch.allclose(gpu.cpu(), cpu, atol=1e-3)


def test_gradients_flow_through_torchdiffeq() -> None:
    process = VP()
    data = GaussianData(process, std=0.5)
    x = starts(process, 2, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(
        run(TorchDiffEq("dopri5", rtol=1e-8, atol=1e-8), data, x, ends(process)).x.sum(), x
    )
    assert torch.allclose(
        gradient, data.transport(torch.ones_like(x), process.t_max, process.t_min), rtol=2e-3
    )


def test_what_goes_wrong_in_torchdiffeq() -> None:
    process = VP()
    x = starts(process, 3, 2)
    with pytest.raises(UnknownNameError, match="dopri5"):
        TorchDiffEq("dopri55")
    with pytest.raises(UnknownNameError, match="clock"):
        TorchDiffEq("rk4", clock="lamb")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tolerances"):
        TorchDiffEq(rtol=-1.0)
    with pytest.raises(SolverError, match="max_nfe=20"):
        run(
            TorchDiffEq("dopri5", rtol=1e-9, atol=1e-9, max_nfe=20),
            Mixture(process),
            x,
            ends(process),
        )

    def broken(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(
            (t < 0.5).unsqueeze(1) & (torch.arange(3) == 1).unsqueeze(1), math.nan, 0.5 * x
        )

    with pytest.raises(NonFiniteError, match="sample 1"):
        run(TorchDiffEq("dopri5"), Prediction(broken, "x0", process), x, ends(process))

    with pytest.raises(SolverError, match=r"stopped at t=.* max_num_steps"):
        run(TorchDiffEq("dopri5", options={"max_num_steps": 2}), Mixture(process), x, ends(process))
    with pytest.raises(GridError, match="lam is infinite at t=1"):
        run(TorchDiffEq("dopri5", clock="lam"), Mixture(RectifiedFlow()), x, ends(RectifiedFlow()))
    with pytest.raises(GridError, match="no noise is left"):
        run(TorchDiffEq("dopri5", clock="asinh"), Mixture(RectifiedFlow()), x, at(1.0, 0.0))


# ----------------------------------------------------------------------------------------- torchsde


class Impulse(Noise):
    """Row k is the response to the k-th draw alone: the sum of squares over rows is the exact
    variance of a linear sampler.
    """

    def __init__(self, rows: int):
        super().__init__(range(rows), (1,), dtype=torch.float64)
        self.drawn = 0

    def draw(
        self, nsr: float | None = None, nsr_next: float | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        self.drawn += 1
        z = torch.zeros(len(self.seeds), 1, dtype=torch.float64)
        z[self.drawn] = 1.0
        return z


def variance_error(solver: TorchSDE, process: Process, n: int) -> float:
    """Relative error of the variance, on Gaussian data from the true marginal at the first level;
    exact.
    """
    times = warped(process, n)
    a, b = process.level(float(times[0])), process.level(float(times[-1]))
    rows = 1 + 2 * n
    x = torch.zeros(rows, 1, dtype=torch.float64)
    x[0] = math.hypot(a.s * 0.5, a.sigma)
    solution = run(solver, GaussianData(process, std=0.5), x, times, Impulse(rows))
    return abs(float((solution.x**2).sum()) / (b.s**2 * 0.25 + b.sigma**2) - 1.0)


@pytest.mark.parametrize("clock", ["t", "nsr", "lam"])
@pytest.mark.parametrize("method", _SDE_METHODS)
def test_weak_order_and_calls(method: str, clock: str) -> None:
    solver = TorchSDE(method, clock)  # type: ignore[arg-type]
    order = slopes([variance_error(solver, VP(), n) for n in (40, 80)])[-1]
    assert order > solver.order - 0.25


@pytest.mark.parametrize(
    "process", [VP(), EDM(), RectifiedFlow()], ids=["vp", "edm", "rectified_flow"]
)
def test_srk_is_of_strong_order_above_one_and_uses_its_second_integral(process: Process) -> None:
    """Against the exact solution for one point of data, where the SDE is linear: the error of SRK
    falls faster than Euler's.
    """
    order = slopes([variance_error(TorchSDE("srk"), process, n) for n in (40, 80)])[-1]
    assert order == pytest.approx(2.0, abs=0.25)
    rows = 1 + 2 * 10
    noise = Impulse(rows)
    solution = run(
        TorchSDE("srk"),
        GaussianData(process),
        torch.zeros(rows, 1).double(),
        warped(process, 10),
        noise,
    )
    assert noise.drawn == 20
    assert bool((solution.x[2::2].abs() > 1e-9).all())  # the draws of the Levy area matter


def test_euler_is_our_euler_maruyama() -> None:
    for process in (VP(), EDM()):
        times = warped(process, 9)
        x, _ = reference(process, float(times[0]), float(times[-1]))
        a = run(
            TorchSDE("euler"),
            Mixture(process),
            x,
            times,
            SeededNoise(range(6), (2,), dtype=torch.float64),
            finish=True,
        )
        noise = SeededNoise(range(6), (2,), dtype=torch.float64)
        b = EulerMaruyama().integrate(Reverse(Mixture(process)), x, times, noise, finish=True)
        assert a.nfe == b.nfe == 10
        assert torch.allclose(a.x, b.x, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method", _SDE_METHODS)
def test_budgets_of_torchsde_and_no_call_is_wasted(method: str) -> None:
    solver = TorchSDE(method)
    for process in (EDM(), RectifiedFlow()):
        for finish in (True, False):
            for nfe in range(2, 9):
                try:
                    levels = solver.levels(nfe, finish=finish)
                except BudgetError:
                    continue
                times = torch.linspace(1, 0.05, levels, dtype=torch.float64) * process.t_max
                noise = SeededNoise([1, 2], (2,), dtype=torch.float64)
                solution = run(
                    solver, Mixture(process), starts(process, 2, 2), times, noise, finish=finish
                )
                assert solution.nfe == nfe
                assert torch.isfinite(solution.x).all()


def rowwise(x: Tensor, t: Tensor) -> Tensor:
    return x / (1.0 + x * x)


@pytest.mark.parametrize("kind", [SeededNoise, BrownianNoise])
@pytest.mark.parametrize("method", ["srk", "euler", "reversible_heun"])
def test_rows_do_not_depend_on_their_batch(method: str, kind: type[Noise]) -> None:
    process = VP()
    network = Prediction(rowwise, "x0", process)
    times = process.t_of_nsr(torch.logspace(1, -1, 8, dtype=torch.float64))
    seeds = [3, 7, 1, 12]
    shape = (3, 5)

    def solve(seeds: list[int]) -> Tensor:
        noise = kind(seeds, shape)
        return run(TorchSDE(method), network, noise.start() * 2.0, times, noise, finish=True).x

    whole = solve(seeds)
    assert whole.dtype == torch.float32
    assert whole.shape == (4, *shape)
    for i, seed in enumerate(seeds):
        assert torch.equal(solve([seed])[0], whole[i])
    assert torch.equal(solve(seeds[::-1]).flip(0), whole)


def test_a_brownian_path_is_the_same_at_twenty_and_at_forty_steps() -> None:
    process = EDM()
    data = Mixture(process)
    x = starts(process, 8, 2)

    def solve(n: int, kind: type[Noise]) -> Tensor:
        times = torch.logspace(math.log10(80), math.log10(0.05), n + 1, dtype=torch.float64)
        return run(
            TorchSDE("euler", "nsr"),
            data,
            x,
            times,
            kind(range(8), (2,), dtype=torch.float64),
            finish=True,
        ).x

    same = float((solve(100, BrownianNoise) - solve(200, BrownianNoise)).pow(2).mean())
    other = float((solve(100, SeededNoise) - solve(200, SeededNoise)).pow(2).mean())
    assert same < 0.2 * other


def test_torchs_global_generator_is_left_alone() -> None:
    process = VP()
    before = torch.get_rng_state()
    run(
        TorchSDE("srk"),
        Mixture(process),
        starts(process, 2, 2),
        at(1.0, 0.5, 0.1),
        SeededNoise([0, 1], (2,), dtype=torch.float64),
    )
    assert torch.equal(before, torch.get_rng_state())


def test_a_point_is_reached_and_a_trajectory_recorded() -> None:
    for process in (VP(), RectifiedFlow()):
        times = process.t_of_nsr(torch.logspace(1, -2, 30, dtype=torch.float64))
        noise = SeededNoise([0, 1], (3,), dtype=torch.float64)
        solution = run(
            TorchSDE("srk"),
            Point(process),
            starts(process, 2, 3),
            times,
            noise,
            finish=True,
            record=True,
        )
        assert torch.allclose(solution.x, torch.full((2, 3), Point.value, dtype=torch.float64))
        assert solution.trajectory is not None
        assert solution.trajectory.shape == (31, 2, 3)


def test_what_goes_wrong_in_torchsde() -> None:
    process = VP()
    x = starts(process, 2, 2)
    with pytest.raises(UnknownNameError, match="srk"):
        TorchSDE("srkk")
    with pytest.raises(UnknownNameError, match="clock"):
        TorchSDE("srk", "asinh")  # type: ignore[arg-type]
    with pytest.raises(SolverError, match="draws noise"):
        run(TorchSDE("srk"), Mixture(process), x, ends(process))
    with pytest.raises(GridError, match="encode"):
        run(TorchSDE("srk"), Mixture(process), x, ends(process).flip(0), SeededNoise([0, 1], (2,)))
    with pytest.raises(BudgetError, match="are 3 and 5"):
        TorchSDE("srk").levels(4)
