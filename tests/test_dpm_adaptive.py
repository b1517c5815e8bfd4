"""DPM-Solver-12 and -23: tolerance, order, the controller, independence of batch mates, budgets and
what goes wrong.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from methods import exponential_step
from problems import PROCESSES, GaussianData, Mixture, Point, Problem, reference, slopes
from test_adaptive import at, ends, rms, rowwise, run, starts
from torch import Tensor

from sdeflow import registry
from sdeflow.denoisers import Prediction
from sdeflow.errors import BudgetError, GridError, NonFiniteError, SolverError
from sdeflow.process import EDM, VP, Cosine, Process, RectifiedFlow
from sdeflow.reverse import Reverse
from sdeflow.sampling.api import solve
from sdeflow.solvers.adaptive.dpm_solver import DPMAdaptive
from sdeflow.solvers.ode.dpm_solver import DPMSolver

PAIRS = [DPMAdaptive(p=p, predicts=predicts) for p in (2, 3) for predicts in ("eps", "x0")]  # type: ignore[arg-type]


def tight(solver: DPMAdaptive, tol: float) -> DPMAdaptive:
    return replace(solver, rtol=tol, atol=tol)


# ----------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("name", ["vp", "edm", "rectified_flow"])
@pytest.mark.parametrize("solver", PAIRS, ids=repr)
def test_error_follows_the_tolerance(name: str, solver: DPMAdaptive) -> None:
    process = PROCESSES[name]
    t, t_next = (float(process.t_of_nsr(nsr)) for nsr in (8.0, 0.05))
    x, exact = reference(process, t, t_next, n=12)
    for tol in (1e-2, 1e-3):
        solution = run(Mixture(process), x, at(t, t_next), tight(solver, tol))
        error = rms(solution.x - exact) / process.level(t_next).s
        assert 0.003 * tol < float(error.median()) < 3 * tol
        assert float(error.max()) < 10 * tol


@pytest.mark.parametrize("taylor", [False, True])
@pytest.mark.parametrize("solver", PAIRS, ids=repr)
def test_at_fixed_steps_it_is_the_single_step_method(solver: DPMAdaptive, taylor: bool) -> None:
    """With a tolerance that any step meets and no growth: the same states as `DPMSolver` of its
    order, and so its order.
    """
    process = EDM()
    t, t_next = 2.0, 0.3
    x, exact = reference(process, t, t_next, n=6)
    errors = []
    for n in (10, 20):
        method = replace(
            tight(solver, 1e6), first_step=math.log(t / t_next) / n, grow=1.0 + 1e-15, taylor=taylor
        )
        solution = run(Mixture(process), x, at(t, t_next), method)
        assert solution.statistics["accepted"].tolist() == [n] * 6
        assert solution.nfe == n * solver.p
        fixed = DPMSolver(solver.p, solver.predicts, taylor)
        times = process.t_of_lam(
            torch.linspace(-math.log(t), -math.log(t_next), n + 1, dtype=torch.float64)
        )
        same = fixed.integrate(Reverse(Mixture(process)), x, times, None, finish=False)
        torch.testing.assert_close(solution.x, same.x, rtol=1e-9, atol=1e-9)
        errors.append(float(rms(solution.x - exact).mean()))
    assert slopes(errors)[-1] > solver.p - 0.25


@pytest.mark.parametrize("solver", PAIRS, ids=repr)
def test_an_attempt_is_that_of_the_paper(solver: DPMAdaptive) -> None:
    """The pair, its error and the step that follows, computed here by the papers' formulas."""
    process, p = VP(), solver.p
    t, h = process.level(0.6), 0.3
    x = torch.randn(1, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    den, asked = Prediction(rowwise, "x0", process), []
    ratios = {2: (0.5,), 3: (1 / 3, 2 / 3)}[p]
    reverse = Reverse(den)
    t_next = process.level(float(process.t_of_lam(torch.tensor(t.lam + h, dtype=torch.float64))))
    x0 = reverse(x, t)
    high = exponential_step(reverse, x, x0, t, t_next, ratios, solver.predicts, taylor=False)
    low = exponential_step(
        reverse, x, x0, t, t_next, ratios[: p - 2], solver.predicts, taylor=False
    )
    delta = torch.maximum(torch.full_like(x, 0.0078), 0.05 * torch.maximum(low.abs(), x.abs()))
    error = float(((high - low) / delta).pow(2).mean().sqrt())
    factor = 0.9 * error ** (-1 / p)

    def watch(k: int, call: Any, x: Tensor, x0: Tensor) -> None:
        asked.append((process.level(float(call.t)).lam, x.clone()))

    run(den, x, ends(process).new_tensor([0.6, 0.01]), replace(solver, first_step=h), on_call=watch)
    assert asked[0][0] == pytest.approx(t.lam)
    assert [lam - t.lam for lam, _ in asked[1:p]] == pytest.approx([r * h for r in ratios])
    if (
        error <= 1.0
    ):  # the next question is at the end of the step, and the one after it a stage of the next
        torch.testing.assert_close(asked[p][1], high, rtol=1e-9, atol=1e-9)
        assert asked[p][0] - t.lam == pytest.approx(h)
        assert asked[p + 1][0] - asked[p][0] == pytest.approx(
            ratios[0] * h * min(factor, solver.grow)
        )
    else:  # it tries again from where it was, without asking for the prediction there anew
        assert asked[p][0] - t.lam == pytest.approx(ratios[0] * h * factor)


# ----------------------------------------------------------------------------------- the controller


def test_the_controller() -> None:
    solver = DPMAdaptive()
    assert solver.factor(0.0, 1e-4, False) == solver.grow
    assert solver.factor(1e-300, 1e-4, False) == solver.grow
    assert solver.factor(1e9, 1.0, False) == solver.shrink
    assert (
        solver.factor(math.nan, 1.0, False) == solver.factor(math.inf, 1.0, False) == solver.shrink
    )
    assert solver.factor(0.5, 1.0, True) == pytest.approx(0.9 * 0.5 ** (-1 / 3))
    assert DPMAdaptive(p=2).factor(2.0, 1.0, False) == pytest.approx(0.9 * 2**-0.5)


@pytest.mark.parametrize("solver", PAIRS, ids=repr)
@pytest.mark.parametrize("name", ["vp", "ve", "rectified_flow"])
def test_an_error_of_zero_grows_the_step_by_its_bound(name: str, solver: DPMAdaptive) -> None:
    """A prediction that never changes: steps of .05, .25, 1.25, 2, 2, ... in lam, none refused, and
    the exact end.
    """
    process = PROCESSES[name]
    point: Problem = Point(process)
    x = starts(process, 3, 2)
    solution = run(point, x, ends(process), solver, finish=True)
    assert torch.equal(solution.x, torch.full_like(x, Point.value))
    assert solution.statistics["rejected"].tolist() == [0, 0, 0]
    assert int(solution.statistics["accepted"].max()) <= 14
    level = process.level(process.t_min)
    state = run(point, x, ends(process), solver).x
    eps = (state - level.s * Point.value) / level.sigma
    start = process.level(process.t_max)
    torch.testing.assert_close(eps, (x - start.s * Point.value) / start.sigma, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------- batch mates and calls


@pytest.mark.parametrize(
    ("predicts", "solver", "dtype"),
    [
        ("x0", DPMAdaptive(), torch.float32),
        ("x0", DPMAdaptive(p=2, predicts="x0"), torch.float64),
        ("velocity", DPMAdaptive(), torch.float64),
        ("velocity", DPMAdaptive(p=2, predicts="x0"), torch.float32),
    ],
    ids=repr,
)
def test_rows_do_not_depend_on_their_batch_to_the_last_bit(
    predicts: Any, solver: DPMAdaptive, dtype: torch.dtype
) -> None:
    process = RectifiedFlow() if predicts == "velocity" else VP()
    network = Prediction(rowwise, predicts, process)
    x = starts(process, 19, 3, 7, dtype=dtype)
    gain = torch.linspace(0.1, 1.9, 19, dtype=dtype)
    solver = tight(solver, 1e-3)
    whole = run(network, x, ends(process, 0.4), solver, {"gain": gain}, record=True, finish=True)
    assert len(set(whole.statistics["nfe"].tolist())) > 1  # they take different steps
    assert int(whole.statistics["rejected"].sum()) > 0
    assert whole.trajectory is not None
    order = torch.randperm(19, generator=torch.Generator().manual_seed(1))
    for rows in (torch.tensor([3]), torch.tensor([18]), torch.tensor([2, 11, 5]), order):
        part = run(
            network,
            x[rows],
            ends(process, 0.4),
            solver,
            {"gain": gain[rows]},
            record=True,
            finish=True,
        )
        assert torch.equal(part.x, whole.x[rows])
        assert part.trajectory is not None
        assert torch.equal(part.trajectory, whole.trajectory[:, rows])
        for key in ("nfe", "accepted", "rejected"):
            assert torch.equal(part.statistics[key], whole.statistics[key][rows])


@pytest.mark.parametrize("finish", [False, True])
@pytest.mark.parametrize("solver", PAIRS, ids=repr)
def test_calls_are_counted_and_full(solver: DPMAdaptive, finish: bool) -> None:
    """No call is made for a sample that does not need it: as many forwards as the sample with most
    calls has.
    """
    sizes: list[int] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        sizes.append(len(x))
        assert t.shape == (len(x),)
        return rowwise(x, t)

    process, p = VP(), solver.p
    x = starts(process, 9, 4)
    x[4] *= 4.0
    reverse = Reverse(Prediction(network, "x0", process))
    solution = tight(solver, 1e-3).integrate(reverse, x, ends(process), None, finish=finish)
    nfe, accepted, rejected = (solution.statistics[key] for key in ("nfe", "accepted", "rejected"))
    assert solution.nfe == solution.network_calls == reverse.nfe == len(sizes) == int(nfe.max())
    assert sum(sizes) == int(nfe.sum())
    assert torch.equal(nfe, p * accepted + (p - 1) * rejected + int(finish))
    assert int(rejected.sum()) > 0


def test_every_process_is_the_same_problem() -> None:
    counts = set()
    for process in PROCESSES.values():
        times = at(*process.t_of_nsr(at(20.0, 0.05)).tolist())
        x = starts(EDM(), 4, 2) / 80.0 * torch.hypot(*process.kernel(times))[0]
        counts.add(tuple(run(Mixture(process), x, times, DPMAdaptive()).statistics["nfe"].tolist()))
    assert len(counts) == 1


def test_conditions_and_watchers_follow_their_samples() -> None:
    process = VP()
    network, x = Prediction(rowwise, "x0", process), starts(process, 6, 4)
    gain = torch.tensor([0.1, 0.9, 0.5, 1.3, 0.2, 1.0])
    seen: list[int] = []

    def watch(k: int, call: Any, x: Tensor, x0: Tensor) -> None:
        assert x.shape == x0.shape == (6, 4)
        seen.append(k)

    whole = run(network, x, ends(process), DPMAdaptive(), {"gain": gain}, on_call=watch)
    assert seen == list(range(whole.nfe))
    for i in range(6):
        alone = run(network, x[i : i + 1], ends(process), DPMAdaptive(), {"gain": gain[i : i + 1]})
        assert torch.equal(alone.x[0], whole.x[i])


# ----------------------------------------------------------------------------------------- the ends


@pytest.mark.parametrize("process", [RectifiedFlow(), Cosine(), Cosine(t_max=1.0)], ids=repr)
@pytest.mark.parametrize("solver", PAIRS, ids=repr)
def test_starts_where_no_signal_is_left(process: Process, solver: DPMAdaptive) -> None:
    data = GaussianData(process, mean=0.4, std=0.5)
    x = starts(process, 3, 5)
    for tol in (1e-2, 1e-3):
        solution = run(data, x, ends(process), tight(solver, tol))
        exact = data.transport(x, process.t_max, process.t_min)
        assert float((solution.x - exact).abs().max()) < 10 * tol


@pytest.mark.parametrize("process", [VP(), EDM(), RectifiedFlow()], ids=repr)
def test_there_and_back_again(process: Process) -> None:
    generator = torch.Generator().manual_seed(3)
    low = process.level(process.t_min)
    x = low.s * torch.randn(4, 2, generator=generator, dtype=torch.float64) * 0.5
    solver = tight(DPMAdaptive(), 1e-5)
    encoded = run(Mixture(process), x, ends(process).flip(0), solver).x
    assert torch.isfinite(encoded).all()
    torch.testing.assert_close(
        run(Mixture(process), encoded, ends(process), solver).x, x, rtol=0, atol=2e-3
    )
    with pytest.raises(GridError, match="finish=False"):
        run(Mixture(process), x, ends(process).flip(0), solver, finish=True)


@pytest.mark.parametrize("solver", [DPMAdaptive(), DPMAdaptive(p=2)], ids=repr)
def test_finish_is_the_prediction_and_one_level_will_do(solver: DPMAdaptive) -> None:
    process = VP()
    x = starts(process, 3, 2)
    stop, end = (
        run(Mixture(process), x, ends(process), solver, finish=finish) for finish in (False, True)
    )
    assert end.nfe == stop.nfe + 1
    torch.testing.assert_close(
        end.x, Mixture(process)(stop.x, process.t_min), rtol=1e-12, atol=1e-12
    )
    one = run(Mixture(process), x, at(process.t_max), solver, finish=True)
    assert one.nfe == 1
    torch.testing.assert_close(one.x, Mixture(process)(x, process.t_max), rtol=1e-12, atol=1e-12)
    none = run(Mixture(process), x, at(process.t_max), solver, finish=False)
    assert none.nfe == 0
    assert torch.equal(none.x, x)


@pytest.mark.parametrize("solver", PAIRS, ids=repr)
@pytest.mark.parametrize("upwards", [False, True])
def test_levels_between_are_read_off_without_shortening_steps(
    upwards: bool, solver: DPMAdaptive
) -> None:
    process, solver = VP(), tight(solver, 3e-4)
    times = process.t_of_nsr(at(8.0, 5.0, 1.0, 0.9, 0.2, 0.05))
    times = times.flip(0) if upwards else times
    x, _ = reference(process, float(times[0]), float(times[-1]))
    plain = run(Mixture(process), x, times[[0, -1]], solver)
    solution = run(Mixture(process), x, times, solver, record=True)
    assert torch.equal(solution.x, plain.x)
    assert solution.nfe == plain.nfe
    assert solution.trajectory is not None
    assert solution.trajectory.shape == (6, 6, 2)
    assert torch.equal(solution.trajectory[0], x)
    assert torch.equal(solution.trajectory[-1], solution.x)
    for t, state in zip(times.tolist()[1:], solution.trajectory[1:], strict=True):
        _, exact = reference(process, float(times[0]), t)
        torch.testing.assert_close(state, exact, rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_states(dtype: torch.dtype) -> None:
    process = EDM()
    x = starts(process, 4, 2, dtype=dtype)
    solution = run(Mixture(process), x, ends(process), tight(DPMAdaptive(), 1e-4), finish=True)
    exact = run(
        Mixture(process), x.double(), ends(process), tight(DPMAdaptive(), 1e-5), finish=True
    ).x
    assert solution.x.dtype == dtype
    assert float((solution.x.double() - exact).abs().max()) < (
        2e-3 if dtype == torch.float32 else 2e-2
    )


def test_gradients_flow_through_the_states() -> None:
    process = VP()
    data = GaussianData(process, mean=0.0, std=0.5)
    x = starts(process, 3, 3).requires_grad_()
    result = run(data, x, ends(process), tight(DPMAdaptive(), 1e-6), finish=False)
    (gradient,) = torch.autograd.grad(result.x.sum(), x)
    ratio = data.transport(torch.ones(1).double(), process.t_max, process.t_min)
    assert torch.allclose(gradient, ratio.expand_as(gradient), rtol=1e-3)


# ---------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("solver", [DPMAdaptive(), DPMAdaptive(p=2)], ids=repr)
def test_max_nfe_is_kept_and_what_was_reached_comes_back(solver: DPMAdaptive) -> None:
    process, solver = VP(), tight(solver, 3e-4)
    x = starts(process, 2, 2)
    full = run(Mixture(process), x, ends(process), solver)
    for budget in (1, 2, 7, full.nfe - 1):
        reverse = Reverse(Mixture(process))
        with pytest.raises(SolverError, match=f"max_nfe={budget}") as caught:
            replace(solver, max_nfe=budget).integrate(reverse, x, ends(process), None, finish=False)
        partial = caught.value.partial
        assert reverse.nfe == partial.nfe <= budget
        assert partial.x.shape == x.shape
        assert torch.isfinite(partial.x).all()
        there = partial.statistics["arrived"]
        assert torch.equal(partial.x[there], full.x[there])
        # A state at its own time is on the way: going on from it ends near the same place.
        for i in (~there).nonzero().flatten().tolist():
            rest = run(
                Mixture(process),
                partial.x[i : i + 1],
                at(float(partial.statistics["t"][i]), process.t_min),
                solver,
            )
            torch.testing.assert_close(rest.x[0], full.x[i], rtol=0, atol=5e-3)
    enough = replace(solver, max_nfe=full.nfe)
    assert torch.equal(run(Mixture(process), x, ends(process), enough).x, full.x)


def test_nan_is_told_from_stiffness() -> None:
    process = VP()

    def broken(x: Tensor, t: Tensor) -> Tensor:
        bad = (t < 0.5) & (x[:, 0] > x[:, 1])
        return torch.where(bad.unsqueeze(1), math.nan, rowwise(x, t))

    x = torch.tensor([[-1.0, 1.0], [1.0, -1.0], [-2.0, 0.5]], dtype=torch.float64)
    with pytest.raises(NonFiniteError, match=r"sample 1 at t=0\.[45]") as caught:
        run(Prediction(broken, "x0", process), x, ends(process), DPMAdaptive())
    assert torch.isfinite(caught.value.partial.x).all()
    with pytest.raises(NonFiniteError, match="sample 0 at t=1 "):
        run(Prediction(lambda x, t: x * math.inf, "x0", process), x, ends(process), DPMAdaptive())
    x[2] = math.nan
    with pytest.raises(NonFiniteError, match="sample 2 to start from"):
        run(Mixture(process), x, ends(process), DPMAdaptive())


def test_an_erratic_network_is_called_stiff_and_says_where() -> None:
    process = VP()

    def erratic(x: Tensor, t: Tensor) -> Tensor:
        return 5.0 * torch.sign(torch.sin(1e6 * t)).reshape(-1, 1).to(x) + 0.0 * x

    x = starts(process, 2, 1)
    with pytest.raises(SolverError, match=r"at t=.*below min_step=0\.01") as caught:
        run(
            Prediction(erratic, "x0", process),
            x,
            ends(process),
            replace(tight(DPMAdaptive(), 1e-4), min_step=0.01),
        )
    assert torch.isfinite(caught.value.partial.x).all()
    assert "in lam" in str(caught.value)


def test_budgets_and_parameters_are_checked() -> None:
    with pytest.raises(BudgetError, match="max_nfe"):
        DPMAdaptive().levels(35)
    for wrong in ({"rtol": -1.0}, {"atol": 0.0}, {"max_nfe": 0}, {"min_step": 0.0}, {"first_step": -1.0}, {"shrink": 1.5},
                  {"safety": 0.0}, {"grow": 1.0}, {"max_step": 0.0}, {"p": 1}, {"predicts": "v"}):  # fmt: skip
        with pytest.raises(ValueError, match=r"tolerances|max_nfe|steps|controller|p=2|predicts"):
            DPMAdaptive(**wrong)  # type: ignore[arg-type]


def test_it_is_known_by_its_names() -> None:
    assert (
        registry.solver("dpm_adaptive") == registry.solver("sample_dpm_adaptive") == DPMAdaptive()
    )
    assert registry.solver("dpm_solver_12") == DPMAdaptive(p=2)
    solution = solve(Mixture(VP()), solver="dpm_adaptive", n=3, seeds=0)
    assert solution.nfe == int(solution.statistics["nfe"].max())
    assert float(solution.x.abs().max()) < 4.0
