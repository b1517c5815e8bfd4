"""Solvers that hold a solver: churn, ancestral noise, restarts, Langevin moves; and projections of
the prediction.

On Gaussian data the law of each is exact (`problems.law`); on a mixture samples are compared at a
stated significance.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from peers import k_sampling
from problems import PROCESSES, FixedNoise, GaussianData, Mixture, law, warped
from torch import Tensor

from sdeflow import grid, registry
from sdeflow.denoisers import Prediction
from sdeflow.denoisers.thresholding import Clip, DynamicThreshold, Projected
from sdeflow.errors import BudgetError, GridError
from sdeflow.plan.instructions import Call, Combine
from sdeflow.process import EDM, VE, VP, Process, RectifiedFlow
from sdeflow.reverse import Reverse
from sdeflow.sampling.api import sample, solve
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.adams import ExponentialAdams
from sdeflow.solvers.ode.ddim import DDIM
from sdeflow.solvers.ode.dpm_solver import DPMSolver
from sdeflow.solvers.ode.runge_kutta import RK4, Euler, Heun, Midpoint
from sdeflow.solvers.sde.classic import DDPM, EulerMaruyama
from sdeflow.solvers.wrappers.ancestral import Ancestral
from sdeflow.solvers.wrappers.churn import LIMIT, Churn
from sdeflow.solvers.wrappers.langevin import Langevin
from sdeflow.solvers.wrappers.restart import Restart

INNER = [
    DDIM(),
    Heun(),
    Heun("nsr"),
    Midpoint("lam"),
    RK4("t"),
    ExponentialAdams(),
    ExponentialAdams(4, start_up="singlestep"),
]
UNDER = ("vp", "edm", "rectified_flow")


def law_errors(
    solver: GridSolver, process: Process, times: Tensor, mean: float = 0.7, std: float = 0.5
) -> tuple[float, float]:
    """Errors of mean and variance at the last level, on Gaussian data."""
    plan = solver.plan(process, times, finish=False)
    _, s, sigma = plan.grid[-1]
    m, d = law(plan, mean, std)
    return abs(m - s * mean), abs(d**2 - (s**2 * std**2 + sigma**2))


# --------------------------------------------------------------------------------- nothing is added


@pytest.mark.parametrize("inner", INNER, ids=str)
@pytest.mark.parametrize(
    "outer",
    [
        lambda s: Churn(s, s_churn=0.0),
        lambda s: Ancestral(s, eta=0.0),
        lambda s: Restart(s, intervals=((2, 0, 0.1, 0.4),)),
    ],
    ids=["churn", "ancestral", "restart"],
)
def test_without_noise_a_wrapper_is_the_solver_within_bit_for_bit(
    outer: Any, inner: GridSolver
) -> None:
    solver = outer(inner)
    times = grid.karras(VP(), 9)
    assert not solver.stochastic
    assert solver.order == inner.order
    assert solver.reversible == inner.reversible
    assert [solver.calls(n) for n in range(1, 12)] == [inner.calls(n) for n in range(1, 12)]
    plan, alone = solver.plan(VP(), times), inner.plan(VP(), times)
    assert plan.instructions == alone.instructions
    assert torch.equal(
        sample(Mixture(VP()), solver=solver, nfe=inner.calls(9), seeds=range(4)),
        sample(Mixture(VP()), solver=inner, nfe=inner.calls(9), seeds=range(4)),
    )
    if inner.reversible:
        up = solver.plan(VP(), times.flip(0), finish=False)
        assert up.instructions == inner.plan(VP(), times.flip(0), finish=False).instructions


# ------------------------------------------------------------------------------------------ budgets


@pytest.mark.parametrize("under", [*UNDER, "from_betas"])
@pytest.mark.parametrize(
    "inner", [*INNER, DPMSolver(2, "x0", stages="inner"), Euler("nsr")], ids=str
)
@pytest.mark.parametrize("outer", [Churn, Ancestral, Restart, Langevin])
def test_planned_is_counted_from_the_end_of_time(outer: Any, inner: GridSolver, under: str) -> None:
    process = PROCESSES[under]
    if outer is Restart and "singlestep" in str(inner):
        pytest.skip("its steps differ in cost: see the next test")
    if (
        outer is Langevin
        and under == "rectified_flow"
        and (getattr(inner, "clock", None) in ("nsr", "lam") or "DPM" in str(inner))
    ):
        pytest.skip("the solver within cannot leave a level without signal")
    solver = outer(inner)
    for levels, finish in itertools.product((1, 2, 3, 8), (True, False)):
        if levels == 1 and not finish:
            continue
        nfe = solver.calls(levels, finish=finish)
        solution = solve(Mixture(process), solver=solver, nfe=nfe, finish=finish, seeds=0)
        assert solution.plan is not None
        assert solution.nfe == solution.plan.nfe == nfe == solution.network_calls
        assert bool(torch.isfinite(solution.x).all())


def test_restart_says_what_it_cannot_spend() -> None:
    """The passes are 8 calls of Heun: one call makes none, and nothing lies between."""
    assert Restart().levels(1) == 1
    assert Restart().levels(43) == 18  # the paper's count for CIFAR-10: 35 and 2 passes of 2 steps
    with pytest.raises(
        BudgetError, match=r"Restart cannot spend nfe=9; the nearest it can are 1 and 11"
    ):
        Restart().levels(9)
    with pytest.raises(BudgetError, match=r"nearest it can is 10"):
        Restart().levels(3, finish=False)
    with pytest.raises(ValueError, match="all cost the same"):
        Restart(ExponentialAdams(4, start_up="singlestep"))


# -------------------------------------------------------------------------------------------- churn


def test_churn_is_edms_algorithm_2() -> None:
    """Written out as the paper has it, s = 1; N counts the levels."""
    process, s_churn, s_noise = EDM(), 3.0, 1.003
    times = grid.karras(process, 8)
    data, noise = Mixture(process), FixedNoise(4, (2,))
    x = 80.0 * torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    solver = Churn(s_churn=s_churn, s_tmin=0.05, s_tmax=50.0, s_noise=s_noise)
    with torch.no_grad():
        got = solver.integrate(Reverse(data), x, times, FixedNoise(4, (2,))).x
        levels = [*times.tolist(), 0.0]
        for n, n_next in itertools.pairwise(levels):
            gamma = min(s_churn / 8, math.sqrt(2) - 1) if 0.05 <= n <= 50.0 else 0.0
            hat = n * (1.0 + gamma)
            if gamma:
                x = x + math.sqrt(hat**2 - n**2) * s_noise * noise.draw()
            d = (x - data(x, hat)) / hat
            y = x + (n_next - hat) * d
            if n_next:
                y = x + (n_next - hat) * 0.5 * (d + (y - data(y, n_next)) / n_next)
            x = y
    torch.testing.assert_close(got, x, rtol=1e-12, atol=1e-12)
    assert noise.drawn == solver.plan(process, times).draws == 5


def test_churn_is_limited_and_stays_inside_of_the_process() -> None:
    for process in (
        VP(),
        EDM(),
        RectifiedFlow(),
        RectifiedFlow(t_max=0.9),
        PROCESSES["from_betas"],
        PROCESSES["from_sde"],
    ):
        solver = Churn(DDIM(), s_churn=1e3, s_tmin=0.0, s_tmax=math.inf)
        plan = solver.plan(process, grid.uniform_sqrt_t(process, 6))
        assert max(call.t for call in plan.calls) <= process.t_max
        for (_, s, sigma), call in zip(plan.grid, plan.calls, strict=True):
            if s:
                assert call.sigma / call.s <= (1.0 + LIMIT) * sigma / s * (1 + 1e-9)
        assert plan.calls[0].t == process.t_max  # from there it cannot go up
        if plan.grid[0][1]:
            assert (
                plan.consistency()["noise"] < 1e-9
            )  # noise is added as the forward process adds it
        assert plan.draws == 5


def test_churn_is_the_same_under_every_process() -> None:
    """In units of the signal: the same levels of nsr give the same samples."""
    ends = []
    for process in (EDM(), VP(), RectifiedFlow(), VE()):
        times = warped(process, 7)
        level = process.level(float(times[0]))
        x = (
            level.s
            * 8.0
            * torch.randn(16, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        )
        with torch.no_grad():
            ends.append(
                Churn().integrate(Reverse(Mixture(process)), x, times, FixedNoise(16, (2,))).x
            )
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-9, atol=1e-9)


def test_churn_forgets_errors_and_has_the_order_of_its_solver() -> None:
    process = VP()
    for inner, order in (
        (DDIM(), 1),
        (Heun("nsr"), 2),
        (ExponentialAdams(3), 1),
        (DPMSolver(3, "x0", stages="inner"), 3),
    ):
        solver = Churn(inner, s_churn=4.0)
        assert solver.order == order
        coarse, fine = (law_errors(solver, process, warped(process, n))[1] for n in (96, 192))
        assert abs(math.log2(coarse / fine) - order) < 0.25
    # More noise than the forward process adds is a bias that stays.
    biased = Churn(s_noise=1.01)
    assert biased.order == 0
    coarse, fine = (law_errors(biased, process, warped(process, n))[1] for n in (96, 192))
    assert fine > 0.6 * coarse > 0.003


# ---------------------------------------------------------------------------------------- ancestral


@pytest.mark.parametrize("under", sorted(PROCESSES))
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ancestral_ddim_is_ddim_with_eta_and_ddpm(under: str, eta: float) -> None:
    """Down with DDIM and up with noise is one step of DDIM(eta), also where the process ends above
    `down`, and from pure noise.
    """
    process = PROCESSES[under]
    for times in (
        warped(process, 9),
        grid.uniform_sqrt_t(process, 6),
        torch.tensor([process.t_max, process.t_min]),
    ):
        plan = Ancestral(eta=eta).plan(process, times)
        assert plan.allclose(DDIM(eta).plan(process, times), rtol=1e-9, atol=1e-11)
        if eta == 1.0:
            assert plan.allclose(DDPM().plan(process, times), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("under", UNDER)
@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize(
    ("inner", "order"),
    [
        (Heun("nsr"), 2),
        (Midpoint("lam"), 2),
        (DPMSolver(2, "x0", stages="inner"), 2),
        (ExponentialAdams(3), 1),
    ],
    ids=str,
)
def test_ancestral_has_the_weak_order_of_its_solver(
    inner: GridSolver, order: int, eta: float, under: str
) -> None:
    """Down is exact in the limit and up is exact: the law of a second-order solver's samples
    converges at order 2.
    """
    solver, process = Ancestral(inner, eta=eta), PROCESSES[under]
    assert solver.order == order
    coarse, fine = (law_errors(solver, process, warped(process, n)) for n in (96, 192))
    assert abs(math.log2(coarse[1] / fine[1]) - order) < 0.25
    assert max(fine) < 0.01


def test_ancestral_adds_what_was_taken_too_much_where_the_process_ends() -> None:
    """A solver that asks the network at the end of its step is not sent below `t_min`: it goes less
    far, and less is added.
    """
    process = PROCESSES["from_betas"]
    times = torch.tensor([0.02, process.t_min], dtype=torch.float64)
    last = Ancestral(Heun("t")).plan(process, times, finish=False)
    assert last.draws == 0  # there is no way down from the end: the ODE's step
    assert Ancestral(Heun("nsr")).plan(process, times, finish=False).draws == 1
    for solver in (
        Ancestral(Heun("t")),
        Ancestral(Heun("nsr")),
        Ancestral(DPMSolver(2, "x0", stages="inner")),
    ):
        assert law_errors(solver, process, grid.uniform_lam(process, 100))[1] < 5e-3


def test_ancestral_noise_is_that_of_the_interval() -> None:
    """One Brownian path: 20 and 40 steps end near each other, where unrelated noise does not."""
    gaps = {}
    for noise in ("brownian", "seeded"):
        ends = [
            sample(
                Mixture(EDM()),
                solver=Ancestral(Heun()),
                grid=warped(EDM(), n, 20.0, 0.05),
                seeds=range(200),
                noise=noise,
            )  # type: ignore[arg-type]
            for n in (20, 40)
        ]
        gaps[noise] = float((ends[0] - ends[1]).norm(dim=1).median())
    assert gaps["brownian"] < gaps["seeded"] / 3


# ------------------------------------------------------------------------------------------ restart


@pytest.mark.parametrize("inner", [Heun("nsr"), DDIM(), ExponentialAdams()], ids=str)
def test_restart_is_the_paper_s_algorithm(inner: GridSolver) -> None:
    """By hand: down to the level nearest to nsr_min, twice up and down on a grid of its own, and on
    from there.
    """
    process, steps, repeats, high = EDM(), 3, 2, 1.1
    times = grid.karras(process, 10)
    k = int((times - 0.4).abs().argmin())
    x = 80.0 * torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    solver = Restart(inner, intervals=((steps, repeats, 0.4, high),), rho=7.0, s_noise=1.01)
    noise, data = FixedNoise(4, (2,)), Mixture(process)
    with torch.no_grad():
        got = solver.integrate(Reverse(data), x, times, FixedNoise(4, (2,))).x
        x = inner.integrate(Reverse(data), x, times[: k + 1], None, finish=False).x
        down = grid.karras(process, steps + 1, nsr_max=high, nsr_min=float(times[k]))
        for _ in range(repeats - 1):
            x = x + 1.01 * math.sqrt(high**2 - float(times[k]) ** 2) * noise.draw()
            x = inner.integrate(Reverse(data), x, down, None, finish=False).x
        x = x + 1.01 * math.sqrt(high**2 - float(times[k]) ** 2) * noise.draw()
        # The last pass and what is left of the grid are one solve: a multistep method keeps its
        # predictions.
        x = inner.integrate(Reverse(data), x, torch.cat([down[:-1], times[k:]]), None).x
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-9)
    plan = solver.plan(process, times)
    assert plan.draws == repeats
    assert plan.nfe == inner.calls(10) + repeats * inner.calls(steps + 1, finish=False)


def test_restarts_wash_out_what_went_wrong_above() -> None:
    """The point of it: the share of an error at the start that is left falls with every pass; a
    right marginal stays right.
    """
    process, std = EDM(), 0.5
    times = grid.karras(process, 18)
    shares, spreads = [], []
    for repeats in (0, 1, 4):
        plan = Restart(intervals=((8, repeats, 0.14, 0.6),)).plan(process, times)
        assert plan.consistency()["noise"] < 1e-12
        values = {0: 1.0}
        for i in plan.instructions:
            if isinstance(i, Combine):
                values[i.out] = sum(float(c) * values.get(r, 0.0) for r, c in i.terms)
            elif isinstance(i, Call):
                values[i.out] = (
                    float(i.s)
                    * std**2
                    / (float(i.s) ** 2 * std**2 + float(i.sigma) ** 2)
                    * values[i.input]
                )
            elif hasattr(i, "nsr"):
                values[i.out] = 0.0
        shares.append(abs(values[plan.result]))
        spreads.append(abs(law(plan, 0.3, std)[1] / std - 1.0))
    assert shares[0] > 1.3 * shares[1] > 2.0 * shares[2]
    assert (
        spreads[2] < 0.5 * spreads[0]
    )  # Heun's own error at 18 levels, of which restarts forget most


def test_the_bias_of_restarts_falls_with_their_steps() -> None:
    """What order 0 stands for: on a fine grid only the error of the passes is left, and it falls at
    Heun's order.
    """
    errors = [
        law_errors(Restart(intervals=((steps, 2, 0.14, 0.30),)), VP(), warped(VP(), 400))[1]
        for steps in (2, 4, 8)
    ]
    assert errors[0] < 0.01
    for a, b in itertools.pairwise(errors):
        assert math.log2(a / b) > 1.5


def test_several_intervals_and_levels_that_share_them() -> None:
    process = VP()
    solver = Restart(DDIM(), intervals=((2, 1, 0.05, 0.3), (3, 2, 1.0, 4.0), (1, 1, 0.3, 0.9)))
    for levels in (2, 3, 5, 18, 60):
        plan = solver.plan(process, grid.uniform_sqrt_t(process, levels))
        assert plan.nfe == solver.calls(levels) == levels + 2 + 6 + 1
        assert plan.draws == 4
        assert plan.consistency()["noise"] < 1e-9
    assert Restart(DDIM(), intervals=[[2, 1, 0.05, 0.3]]) == Restart(
        DDIM(), intervals=((2, 1, 0.05, 0.3),)
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("interval", "nsr", "match"),
    [
        ((2, 2, 0.14, 0.3), (0.1, 0.01), "begins above nsr=0.1"),
        ((2, 2, 0.14, 0.3), (8.0, 0.4), "ends at nsr=0.4, above"),
        ((2, 2, 0.14, 300.0), (8.0, 0.1), "beyond the end of EDM"),
    ],
)
def test_intervals_that_a_grid_does_not_pass_are_explained(
    interval: Any, nsr: tuple[float, float], match: str
) -> None:
    process = EDM() if interval[3] > 1 else VP()
    with pytest.raises(GridError, match=match):
        Restart(intervals=(interval,)).plan(process, warped(process, 6, *nsr))


# ----------------------------------------------------------------------------------------- langevin


@pytest.mark.parametrize(
    "inner",
    [
        ExponentialAdams(),
        ExponentialAdams(2, corrector=True),
        ExponentialAdams(3, start_up="orders"),
    ],
    ids=str,
)
def test_langevin_moves_between_the_steps_of_a_multistep_method(inner: GridSolver) -> None:
    """The predictions kept are those at the moved states; the law stays near the truth, and moves
    make it forget the start.
    """
    process = EDM()
    plan = Langevin(inner, steps=1, snr=0.1).plan(
        process, warped(process, 40, 8.0, 0.1), finish=False
    )
    _, s, sigma = plan.grid[-1]
    mean, std = law(plan, 0.7, 0.5)
    assert mean == pytest.approx(s * 0.7, rel=0.02)
    assert std == pytest.approx(math.hypot(s * 0.5, sigma), rel=0.03)
    assert plan.nfe == inner.calls(41, finish=False) + 40


# ------------------------------------------------------------------------------ names and bad input


@pytest.mark.parametrize(
    ("name", "solver"),
    [
        ("churn:ddim", Churn(DDIM())),
        ("edm_stochastic:rk4", Churn(RK4())),
        ("langevin:adams3", Langevin(ExponentialAdams(3))),
        ("euler_a:heun", Ancestral(Heun())),
        ("restart:langevin:ddim", Restart(Langevin(DDIM()))),
        ("euler_a", Ancestral()),
        ("EulerAncestralDiscreteScheduler", Ancestral(DDIM(), eta=1.0)),
    ],
)
def test_names_say_what_is_held(name: str, solver: GridSolver) -> None:
    assert registry.solver(name) == solver


@pytest.mark.parametrize("outer", [Churn, Ancestral, Restart, Langevin])
@pytest.mark.parametrize("what", ["heun", Heun, 3, None, registry.solver("rk45")])
def test_what_is_held_must_step_over_a_grid(outer: Any, what: Any) -> None:
    with pytest.raises(TypeError, match=rf"{outer.__name__}\(Heun\(\)\).*:heun"):
        outer(what)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Churn(s_churn=-1.0), "s_churn >= 0"),
        (lambda: Churn(s_tmin=2.0, s_tmax=1.0), "s_tmin <= s_tmax"),
        (lambda: Churn(s_churn=math.nan), "s_churn"),
        (lambda: Ancestral(eta=1.5), "0 <= eta <= 1"),
        (lambda: Ancestral(DDPM()), "solver of the ODE"),
        (lambda: Restart(intervals=((2, 2, 0.3, 0.1),)), "nsr_min < nsr_max"),
        (lambda: Restart(intervals=((2.0, 2, 0.1, 0.3),)), "whole numbers first"),  # type: ignore[arg-type]
        (lambda: Restart(intervals=((0, 2, 0.1, 0.3),)), "steps >= 1"),
        (lambda: Restart(rho=0.0), "rho > 0"),
    ],
)
def test_parameters_are_checked_where_they_are_made(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_a_solver_that_draws_may_be_churned_and_restarted() -> None:
    """Its noise is drawn anew for every pass: a path would give the same again."""
    for solver in (
        Churn(EulerMaruyama(), s_churn=4.0),
        Restart(DDPM(), intervals=((8, 2, 0.14, 0.30),)),
    ):
        for noise in ("seeded", "brownian"):
            x = sample(
                GaussianData(VP(), 0.4, 0.5),
                solver=solver,
                grid=grid.uniform_lam(VP(), 60),
                shape=(4096,),
                seeds=1,
                noise=noise,  # type: ignore[arg-type]
            )
            assert float(x.std()) == pytest.approx(0.5, rel=0.03 + 4.5 / math.sqrt(2 * 4096))
            assert float(x.mean()) == pytest.approx(0.4, abs=0.02 + 4.5 * 0.5 / math.sqrt(4096))


# ------------------------------------------------------------------------------------- distribution


@pytest.mark.parametrize("under", ["vp"])
@pytest.mark.parametrize(
    "name", ["churn", "restart", "euler_ancestral", "dpmpp_2s_ancestral", "dpm2_ancestral"]
)
def test_samples_of_a_mixture_are_near_it_in_sliced_distance(name: str, under: str) -> None:
    """Sliced W2 of 2048 samples to 2048 of the data, below the 1 - 1e-3 quantile of that of two
    sets of data (bootstrapped).
    """
    n, process = 2048, PROCESSES[under]
    angles = np.linspace(0.0, np.pi, 16, endpoint=False)
    directions = np.stack([np.cos(angles), np.sin(angles)])

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(
            np.sqrt(((np.sort(a @ directions, 0) - np.sort(b @ directions, 0)) ** 2).mean())
        )

    null = [distance(Mixture.draw(n, 2 * k + 100), Mixture.draw(n, 2 * k + 101)) for k in range(40)]
    limit = np.mean(null) + 4.0 * np.std(null)  # 1e-3 with room: the null is skewed
    x = (
        sample(Mixture(process), solver=name, grid=grid.uniform_lam(process, 60), seeds=range(n))
        .double()
        .numpy()
    )
    assert distance(x, Mixture.draw(n, 7)) < limit + 0.01  # what 60 levels are allowed


# ------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize(
    ("peer", "solver", "arguments"),
    [
        ("sample_euler_ancestral", Ancestral(), {}),
        ("sample_euler_ancestral", Ancestral(eta=0.4, s_noise=1.01), {"eta": 0.4, "s_noise": 1.01}),
        ("sample_dpmpp_2s_ancestral", registry.solver("dpmpp_2s_ancestral"), {}),
        (
            "sample_dpmpp_2s_ancestral",
            Ancestral(DPMSolver(2, "x0", stages="inner"), eta=0.4),
            {"eta": 0.4},
        ),
        ("sample_dpm_2_ancestral", registry.solver("dpm2_ancestral"), {}),
        (
            "sample_heun",
            Churn(s_churn=4.0, s_noise=1.01),
            {"s_churn": 4.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.01},
        ),
        ("sample_heun", Churn(s_churn=1e3), {"s_churn": 1e3, "s_tmin": 0.05, "s_tmax": 50.0}),
        ("sample_euler", Churn(DDIM(), s_churn=4.0, s_tmin=0.0), {"s_churn": 4.0, "s_tmax": 50.0}),
        (
            "sample_dpm_2",
            Churn(DPMSolver(2, stages="inner"), s_churn=4.0),
            {"s_churn": 4.0, "s_tmin": 0.05, "s_tmax": 50.0},
        ),
    ],
)
def test_parity_with_k_diffusion(
    peer: str, solver: GridSolver, arguments: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = k_sampling()
    process = EDM()
    times = grid.karras(process, 10)
    data = Mixture(process)
    x = 80.0 * torch.randn(4, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with torch.no_grad():
        got = solver.integrate(Reverse(data), x, times, FixedNoise(4, (2,))).x
        noise = FixedNoise(4, (2,))
        if "ancestral" in peer:
            arguments = {**arguments, "noise_sampler": lambda *levels: noise.draw()}  # type: ignore[dict-item]
        else:  # it draws at every step, whether it churns or not
            churned = iter(
                [arguments.get("s_tmin", 0.0) <= n <= arguments["s_tmax"] for n in times.tolist()]
            )
            monkeypatch.setattr(
                torch,
                "randn_like",
                lambda x: noise.draw() if next(churned) else torch.zeros_like(x),
            )
        sigmas = torch.cat([times, times.new_zeros(1)])
        want = getattr(sampling, peer)(
            lambda x, s: data(x, s), x, sigmas, disable=True, **arguments
        )
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


# --------------------------------------------------------------------------------------- projection


def test_clip_and_dynamic_thresholding() -> None:
    x0 = torch.linspace(-3.0, 3.0, 101).repeat(3, 1) * torch.tensor([[0.2], [1.0], [2.0]])
    assert torch.equal(Clip()(x0), x0.clamp(-1, 1))
    got = DynamicThreshold(0.9)(x0)
    assert torch.equal(got[0], x0[0])  # within bounds: as it is
    for row in (1, 2):
        r = torch.quantile(x0[row].abs(), 0.9)
        torch.testing.assert_close(got[row], x0[row].clamp(-r, r) / r)
    assert torch.equal(DynamicThreshold(0.9, limit=1.0)(x0), Clip()(x0))
    assert torch.allclose(DynamicThreshold(1.0)(x0)[2], x0[2] / 6.0)
    assert torch.equal(got[1:2], DynamicThreshold(0.9)(x0[1:2]))  # each sample has its own
    torch.testing.assert_close(DynamicThreshold(0.9, bound=2.0)(2 * x0), 2 * got)


def test_projected_predictions_reach_the_solver_and_leave_plans_alone() -> None:
    def wild(x: Tensor, t: Tensor, scale: float = 3.0) -> Tensor:
        return scale * torch.tanh(x)

    model = Prediction(wild, "x0", VP(), shape=(5,))
    for projection in (Clip(), DynamicThreshold(), lambda x0: x0.clamp(-0.5, 0.5)):
        projected = Projected(model, projection)
        for name in ("heun", "ddpm", "adams3", "churn", "rk45"):
            budget = {} if name == "rk45" else {"nfe": 21}
            one = solve(
                projected,
                solver=name,
                seeds=range(4),
                condition={"scale": 2.0},
                x0s=name != "rk45",
                **budget,
            )  # type: ignore[arg-type]
            assert float(one.x.abs().max()) <= 1.0 + 1e-6
            if one.x0s is not None:
                assert float(one.x0s.abs().max()) <= 1.0 + 1e-6
                plain = solve(model, solver=name, seeds=range(4), **budget)  # type: ignore[arg-type]
                assert plain.plan == one.plan
            batched = solve(
                projected,
                solver=name,
                seeds=range(4),
                batch_size=3,
                condition={"scale": 2.0},
                **budget,
            )  # type: ignore[arg-type]
            assert torch.equal(batched.x, one.x)
    with pytest.raises(TypeError, match="scael"):
        sample(Projected(model, Clip()), nfe=3, solver="ddim", condition={"scael": 1.0})


def test_a_projection_that_changes_nothing_is_not_there() -> None:
    """Data within [-1, 1] have predictions within: clipping an exact denoiser changes no bit. Under
    any process.
    """
    data = Prediction(lambda x, t: torch.tanh(x), "x0", EDM(), shape=(3,))
    for process in (EDM(), VP(), RectifiedFlow()):
        assert Projected(data, Clip()).under(process).process == process
        a = sample(Projected(data, Clip()), process, solver="ddpm", nfe=9, seeds=range(3))
        assert torch.equal(a, sample(data, process, solver="ddpm", nfe=9, seeds=range(3)))


def test_projections_are_checked() -> None:
    model = Prediction(lambda x, t: x, "x0", VP(), shape=(3,))
    for bad in (Clip, 3, "clip"):
        with pytest.raises(TypeError, match="DynamicThreshold"):
            Projected(model, bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Denoiser"):
        Projected(torch.nn.Identity(), Clip())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep the shape"):
        sample(Projected(model, lambda x0: x0[:, :2]), solver="ddim", nfe=2, seeds=0)
    for make in (
        lambda: Clip(1.0, -1.0),
        lambda: DynamicThreshold(0.0),
        lambda: DynamicThreshold(limit=0.5),
    ):
        with pytest.raises(ValueError, match="needs"):
            make()
