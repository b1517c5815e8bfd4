"""Adaptive solvers: tolerance, order, independence of batch mates, dense output, budgets and what
goes wrong.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from problems import PROCESSES, GaussianData, Mixture, reference, slopes
from torch import Tensor

from sdeflow._utils.math import batch_invariant
from sdeflow.denoisers import Denoiser, Prediction
from sdeflow.errors import BudgetError, GridError, NonFiniteError, SolverError
from sdeflow.process import EDM, VP, Cosine, Process, RectifiedFlow
from sdeflow.process.clock import Clock, ClockRange
from sdeflow.reverse import Reverse
from sdeflow.solvers.adaptive.runge_kutta import RK23, RK45, Adaptive
from sdeflow.solvers.base import Solution
from sdeflow.solvers.ode import tableaus
from sdeflow.targets import GaussianMixture


def at(*times: float) -> Tensor:
    return torch.tensor(times, dtype=torch.float64)


def ends(process: Process, *between: float) -> Tensor:
    return at(process.t_max, *between, process.t_min)


def run(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    solver: Adaptive,
    condition: dict[str, Any] | None = None,
    **how: Any,
) -> Solution:
    how.setdefault("finish", False)
    return solver.integrate(Reverse(denoiser, condition), x, times, None, **how)


def starts(
    process: Process, n: int, *shape: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, *shape, generator=generator, dtype=torch.float64).to(dtype)
        * process.prior_std
    )


def rowwise(x: Tensor, t: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    """A network whose rows are exact: each operation has one rounding, wherever the row stands."""
    t = t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    gain = gain.reshape(t.shape).to(x.dtype) if isinstance(gain, Tensor) else gain
    return gain * (x / (0.3 + x * x) + 0.2 * x) * (1.5 - t)


def rms(x: Tensor) -> Tensor:
    return x.flatten(1).pow(2).mean(1).sqrt()


# ---------------------------------------------------------------------------- the ODE and its clock


def test_the_equation_in_the_clock_is_that_of_the_process(process: Process) -> None:
    """`du/da = x0 - tanh(a) u` is `dx/dt = s' x0 + sigma' eps`, rewritten."""
    t = torch.linspace(process.t_min, process.t_max, 7, dtype=torch.float64)[1:-1]
    x, x0 = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def clock(t: Tensor) -> Tensor:
        return torch.asinh(process.s(t) / process.sigma(t))

    def scale(t: Tensor) -> Tensor:
        return torch.hypot(*process.kernel(t))

    one = torch.ones_like(t)
    r, dr = torch.func.jvp(scale, (t,), (one,))
    a, da = torch.func.jvp(clock, (t,), (one,))
    velocity = process.velocity(x0, process.eps_from_x0(x, x0, t), t)
    slope = (velocity - x * dr / r) / r / da
    assert torch.allclose(slope, x0 - torch.tanh(a) * x / r, rtol=1e-9, atol=1e-9)


def test_the_clock_meets_given_times_exactly_and_inverts_elsewhere(process: Process) -> None:
    times = ends(process)
    clock = ClockRange(Clock("asinh"), process, times)
    assert clock.time(clock.levels).tolist() == times.tolist()
    a = torch.linspace(float(clock.levels[0]), float(clock.levels[-1]), 33, dtype=torch.float64)
    t, scale, tanh = clock.read(a, lambda a, t, s, sigma: (t, torch.hypot(s, sigma), torch.tanh(a)))
    s, sigma = process.kernel(t)
    assert torch.allclose(torch.asinh(s / sigma), a, rtol=1e-9, atol=1e-12)
    assert torch.allclose(scale * tanh, s, rtol=1e-9, atol=1e-12)


def test_no_entry_depends_on_how_many_there_are() -> None:
    def function(v: Tensor) -> Tensor:
        return torch.stack(
            [
                torch.sigmoid(v),
                torch.logaddexp(v * 0, -2 * v),
                torch.atan2(v, v * 0.3 + 1),
                torch.sinh(v),
            ]
        )

    values = torch.linspace(-3, 5, 83, dtype=torch.float64)
    whole = batch_invariant(function, values)
    for first, count in ((0, 1), (3, 5), (17, 16), (80, 3)):
        assert torch.equal(
            batch_invariant(function, values[first : first + count]),
            whole[:, first : first + count],
        )
    assert batch_invariant(function, values[:0]).shape == (4, 0)
    assert batch_invariant(function, values[:12].reshape(3, 4)).shape == (4, 3, 4)


# ------------------------------------------------------------------------------------- the tableaus


@pytest.mark.parametrize("tableau", [tableaus.DORMAND_PRINCE, tableaus.BOGACKI_SHAMPINE])
def test_tableau_and_interpolant_meet_their_order_conditions(tableau: tableaus.Tableau) -> None:
    """Every rooted tree of up to four nodes, for `b`, `b_low` and the interpolant's weights at any
    `theta`.
    """
    size = tableau.stages
    a = [[*row, *[0.0] * (size - len(row))] for row in tableau.a]
    c = tableau.c

    def through(v: list[float]) -> list[float]:
        return [sum(w * x for w, x in zip(row, v, strict=True)) for row in a]

    square = [x * x for x in c]
    trees = [  # (order, density, stage values)
        (1, 1, [1.0] * size),
        (2, 2, list(c)),
        (3, 3, square),
        (3, 6, through(list(c))),
        (4, 4, [x**3 for x in c]),
        (4, 8, [x * y for x, y in zip(c, through(list(c)), strict=True)]),
        (4, 12, through(square)),
        (4, 24, through(through(list(c)))),
    ]

    def defect(weights: list[float], order: int, theta: float = 1.0) -> float:
        return max(
            abs(sum(w * v for w, v in zip(weights, values, strict=True)) - theta**p / density)
            for p, density, values in trees
            if p <= order
        )

    assert [sum(row) for row in a] == pytest.approx(c, abs=1e-14)
    assert tableau.a[-1] == tableau.b[:-1]
    assert tableau.c[-1] == 1.0
    assert tableau.b_low is not None
    assert defect(list(tableau.b), min(tableau.order, 4)) < 1e-14
    assert defect(list(tableau.b_low), tableau.order - 1) < 1e-14
    if tableau.order == 5:
        assert sum(b * x**4 for b, x in zip(tableau.b, c, strict=True)) == pytest.approx(
            float(Fraction(1, 5)), abs=1e-14
        )
    unit = [[float(i == j) for j in range(size)] for i in range(size)]
    for theta in (0.1, 0.37, 0.5, 0.8):
        # the nested form of `_Segment`, with each slope alone as input
        weights = []
        for i, e in enumerate(unit):
            chord = tableau.b[i]
            bend = e[0] - chord
            inner = bend + theta * (chord - e[-1] - bend)
            if tableau.dense is not None:
                inner += theta * (1 - theta) * tableau.dense[i]
            weights.append(theta * (chord + (1 - theta) * inner))
        assert defect(weights, min(tableau.order, 4), theta) < 1e-13


# ----------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("name", ["vp", "edm", "rectified_flow", "cosine", "ve", "from_betas"])
@pytest.mark.parametrize("solver", [RK45, RK23])
def test_error_follows_the_tolerance(name: str, solver: type[Adaptive]) -> None:
    process = PROCESSES[name]
    t, t_next = (float(process.t_of_nsr(nsr)) for nsr in (8.0, 0.05))
    x, exact = reference(process, t, t_next, n=12)
    for tol in (1e-3, 1e-5) if solver is RK23 else (1e-3, 1e-5, 1e-8):
        solution = run(Mixture(process), x, at(t, t_next), solver(rtol=tol, atol=tol))
        error = rms(solution.x - exact) / process.level(t_next).s
        assert 0.003 * tol < float(error.median()) < 5 * tol
        assert float(error.max()) < 25 * tol


@pytest.mark.parametrize("solver", [RK45, RK23])
def test_order_at_fixed_steps(solver: type[Adaptive]) -> None:
    """With a tolerance that any step meets and no growth, the pair is a fixed-step method of its
    order.
    """
    process = EDM()
    t, t_next = 2.0, 0.3
    x, exact = reference(process, t, t_next, n=6)
    clock = ClockRange(Clock("asinh"), process, at(t, t_next))
    span = float(clock.levels[-1] - clock.levels[0])
    errors = []
    for n in (6, 12, 24):
        method = solver(rtol=1e6, atol=1e6, first_step=span / n, grow=1.0 + 1e-15)
        solution = run(Mixture(process), x, clock.times, method)
        assert solution.statistics["accepted"].tolist() == [n] * 6
        errors.append(float(rms(solution.x - exact).mean()))
    assert slopes(errors)[-1] > solver.order - 0.25


def anisotropic(process: Process, dim: int = 64, k: int = 50) -> GaussianMixture:
    generator = torch.Generator().manual_seed(0)
    std = torch.exp(
        torch.empty(k, dim, dtype=torch.float64).uniform_(
            math.log(0.03), math.log(0.9), generator=generator
        )
    )
    basis = torch.linalg.qr(torch.randn(k, dim, dim, dtype=torch.float64, generator=generator))[0]
    means = 0.8 * torch.randn(k, dim, dtype=torch.float64, generator=generator)
    return GaussianMixture(
        None, means, cov=(basis * std.unsqueeze(1) ** 2) @ basis.mT, process=process
    )


@pytest.mark.parametrize(
    "process", [VP(), EDM(), RectifiedFlow()], ids=["vp", "edm", "rectified_flow"]
)
def test_sixty_four_dimensions_meet_the_tolerance(process: Process) -> None:
    """The mixture of the benchmark, from the process's true end of time: medians within 10
    tolerances, all within 50.
    """
    target = anisotropic(process)
    x = starts(process, 12, 64)
    exact = run(target, x, ends(process), RK45(rtol=1e-9, atol=1e-9)).x
    for tol in (1e-3, 1e-5):
        error = rms(run(target, x, ends(process), RK45(rtol=tol, atol=tol)).x - exact)
        assert float(error.median()) < 5 * tol
        assert float(error.max()) < 50 * tol


@pytest.mark.slow
@pytest.mark.parametrize(
    "process", [VP(), EDM(), RectifiedFlow()], ids=["vp", "edm", "rectified_flow"]
)
def test_sixty_four_dimensions_meet_tight_tolerances(process: Process) -> None:
    target = anisotropic(process)
    x = starts(process, 64, 64)
    exact = run(target, x, ends(process), RK45(rtol=1e-11, atol=1e-11)).x
    for tol in (1e-3, 1e-5, 1e-7):
        error = rms(run(target, x, ends(process), RK45(rtol=tol, atol=tol)).x - exact)
        assert float(error.median()) < 10 * tol
        assert float(error.quantile(0.99)) < 50 * tol


def test_every_process_is_the_same_problem() -> None:
    """Between the same noise-to-signal ratios the steps, and so the calls, are the same under every
    process.
    """
    counts = set()
    for process in PROCESSES.values():
        times = at(*process.t_of_nsr(at(20.0, 0.05)).tolist())
        x = starts(EDM(), 4, 2) / 80.0 * torch.hypot(*process.kernel(times))[0]
        counts.add(
            tuple(
                run(Mixture(process), x, times, RK45(rtol=1e-4, atol=1e-4))
                .statistics["nfe"]
                .tolist()
            )
        )
    assert len(counts) == 1


@pytest.mark.parametrize("process", [RectifiedFlow(), Cosine(), Cosine(t_max=1.0)], ids=repr)
def test_starts_where_no_signal_is_left(process: Process) -> None:
    data = GaussianData(process, mean=0.4, std=0.5)
    x = starts(process, 3, 5)
    solution = run(data, x, ends(process), RK45(rtol=1e-8, atol=1e-8))
    assert torch.allclose(
        solution.x, data.transport(x, process.t_max, process.t_min), rtol=1e-5, atol=1e-6
    )


def test_there_and_back_again(process: Process) -> None:
    generator = torch.Generator().manual_seed(3)
    low = process.level(process.t_min)
    x = low.s * torch.randn(4, 2, generator=generator, dtype=torch.float64) * 0.5
    solver = RK45(rtol=1e-9, atol=1e-9)
    encoded = run(Mixture(process), x, ends(process).flip(0), solver).x
    assert torch.isfinite(encoded).all()
    assert torch.allclose(
        run(Mixture(process), encoded, ends(process), solver).x, x, rtol=1e-5, atol=1e-6
    )
    with pytest.raises(GridError, match="finish=False"):
        run(Mixture(process), x, ends(process).flip(0), solver, finish=True)


def test_finish_costs_nothing_and_is_the_prediction() -> None:
    process = VP()
    x = starts(process, 3, 2)
    stop, end = (
        run(Mixture(process), x, ends(process), RK45(), finish=finish) for finish in (False, True)
    )
    assert stop.nfe == end.nfe
    assert torch.allclose(end.x, Mixture(process)(stop.x, process.t_min), rtol=1e-12, atol=1e-12)
    one = run(Mixture(process), x, at(process.t_max), RK45(), finish=True)
    assert one.nfe == 1
    assert torch.allclose(one.x, Mixture(process)(x, process.t_max), rtol=1e-12, atol=1e-12)
    none = run(Mixture(process), x, at(process.t_max), RK45(), finish=False)
    assert none.nfe == 0
    assert torch.allclose(none.x, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_states(dtype: torch.dtype) -> None:
    process = EDM()
    x = starts(process, 4, 2, dtype=dtype)
    solution = run(Mixture(process), x, ends(process), RK45(rtol=1e-5, atol=1e-5), finish=True)
    exact = run(
        Mixture(process), x.double(), ends(process), RK45(rtol=1e-9, atol=1e-9), finish=True
    ).x
    assert solution.x.dtype == dtype
    assert (solution.x.double() - exact).abs().max() < (5e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_in_float32() -> None:
    process = RectifiedFlow()
    x = starts(process, 9, 2, dtype=torch.float32)
    solver = RK45(rtol=1e-4, atol=1e-4, dense=True)
    cpu = run(Mixture(process), x, ends(process, 0.5), solver, record=True)
    gpu = run(Mixture(process), x.cuda(), ends(process, 0.5), solver, record=True)
    assert gpu.x.is_cuda
    assert torch.allclose(gpu.x.cpu(), cpu.x, atol=1e-3)
    assert gpu.trajectory is not None
    assert gpu.interpolant is not None
    assert cpu.trajectory is not None
    assert torch.allclose(gpu.trajectory.cpu(), cpu.trajectory, atol=1e-3)
    assert torch.allclose(gpu.interpolant(0.5), gpu.trajectory[1], atol=1e-5)


# ---------------------------------------------------------------------------- batch mates and calls


NETWORKS = {
    "x0 under VP": Prediction(rowwise, "x0", VP()),
    "velocity of a flow under VP": Prediction(rowwise, "velocity", RectifiedFlow()).under(VP()),
    "v under a flow": Prediction(rowwise, "v", RectifiedFlow()),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_do_not_depend_on_their_batch_to_the_last_bit(name: str, dtype: torch.dtype) -> None:
    network = NETWORKS[name]
    process = network.process
    x = starts(process, 19, 3, 7, dtype=dtype)
    gain = torch.linspace(0.1, 1.9, 19, dtype=dtype)
    solver = RK45(rtol=1e-4, atol=1e-4, dense=True)
    whole = run(network, x, ends(process, 0.4), solver, {"gain": gain}, record=True)
    assert len(set(whole.statistics["nfe"].tolist())) > 1  # they take different steps
    assert whole.trajectory is not None
    assert whole.interpolant is not None
    order = torch.randperm(19, generator=torch.Generator().manual_seed(1))
    for rows in (torch.tensor([3]), torch.tensor([18]), torch.tensor([2, 11, 5]), order):
        part = run(network, x[rows], ends(process, 0.4), solver, {"gain": gain[rows]}, record=True)
        assert torch.equal(part.x, whole.x[rows])
        assert part.trajectory is not None
        assert part.interpolant is not None
        assert torch.equal(part.trajectory, whole.trajectory[:, rows])
        assert torch.equal(part.interpolant(0.3), whole.interpolant(0.3)[rows])
        for key in ("nfe", "accepted", "rejected"):
            assert torch.equal(part.statistics[key], whole.statistics[key][rows])


def test_calls_are_counted_and_compacted() -> None:
    sizes: list[int] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        sizes.append(len(x))
        assert t.shape == (len(x),)
        return rowwise(x, t)

    process = VP()
    x = starts(process, 9, 4)
    x[4] *= 4.0
    reverse = Reverse(Prediction(network, "x0", process))
    solution = RK45(rtol=1e-5, atol=1e-5).integrate(reverse, x, ends(process), None)
    assert (
        solution.nfe
        == solution.network_calls
        == reverse.nfe
        == len(sizes)
        == int(solution.statistics["nfe"].max())
    )
    assert sum(sizes) == int(solution.statistics["nfe"].sum())
    assert sizes[0] == 9
    assert sizes[-1] < 9
    attempts = solution.statistics["accepted"] + solution.statistics["rejected"]
    assert torch.equal(solution.statistics["nfe"], 1 + 6 * attempts)


def test_conditions_follow_their_samples() -> None:
    process = VP()
    network = Prediction(rowwise, "x0", process)
    x = starts(process, 6, 4)
    gain = torch.tensor([0.1, 0.9, 0.5, 1.3, 0.2, 1.0])
    solver = RK45(rtol=1e-5, atol=1e-5)
    whole = run(network, x, ends(process), solver, {"gain": gain})
    assert len(set(whole.statistics["nfe"].tolist())) > 2
    for i in range(6):
        assert torch.equal(
            run(network, x[i : i + 1], ends(process), solver, {"gain": gain[i : i + 1]}).x[0],
            whole.x[i],
        )
    assert torch.equal(run(network, x, ends(process), solver, {"gain": 0.5}).x[2], whole.x[2])


def test_denoisers_that_hold_something_for_each_sample_are_cut_along() -> None:
    class Offset(Denoiser):
        def __init__(self, offset: Tensor):
            self.offset, self.process = offset, VP()

        def __call__(self, x: Tensor, t: float | Tensor, /, **condition: Any) -> Tensor:
            return 0.5 * x + self.offset

        def rows(self, index: Tensor) -> Denoiser:
            return Offset(self.offset[index])

    offset = torch.tensor([[0.0], [1.0], [20.0]], dtype=torch.float64)
    x = starts(VP(), 3, 4)
    for under in (VP(), RectifiedFlow()):
        times = at(under.t_max, under.t_min)
        whole = run(Offset(offset).under(under), x, times, RK45(rtol=1e-5, atol=1e-5))
        for i in range(3):
            alone = run(
                Offset(offset[i : i + 1]).under(under),
                x[i : i + 1],
                times,
                RK45(rtol=1e-5, atol=1e-5),
            )
            assert torch.allclose(alone.x[0], whole.x[i], rtol=1e-13)


def test_on_call_sees_the_whole_batch() -> None:
    process = VP()
    x = starts(process, 5, 2)
    x[1] *= 5.0
    seen: list[tuple[int, float, Tensor, Tensor]] = []
    solution = run(
        Mixture(process),
        x,
        ends(process),
        RK45(),
        on_call=lambda k, call, x, x0: seen.append((k, float(call.t), x.clone(), x0.clone())),
    )
    assert [k for k, *_ in seen] == list(range(solution.nfe))
    assert all(x.shape == x0.shape == (5, 2) for _, _, x, x0 in seen)
    assert torch.allclose(seen[0][2], x)
    assert seen[0][1] == process.t_max


def test_gradients_flow_through_the_states() -> None:
    process = VP()
    data = GaussianData(process, mean=0.0, std=0.5)
    x = starts(process, 2, 3).requires_grad_()
    result = run(data, x, ends(process, 0.5), RK45(rtol=1e-8, atol=1e-8), finish=False, record=True)
    (gradient,) = torch.autograd.grad(result.x.sum(), x, retain_graph=True)
    ratio = data.transport(torch.ones(1).double(), process.t_max, process.t_min)
    assert torch.allclose(gradient, ratio.expand_as(gradient), rtol=1e-4)
    assert result.trajectory is not None
    (gradient,) = torch.autograd.grad(result.trajectory[1].sum(), x)
    assert torch.allclose(
        gradient,
        data.transport(torch.ones(1).double(), process.t_max, 0.5).expand_as(gradient),
        rtol=1e-4,
    )


# ------------------------------------------------------------------------------------- dense output


@pytest.mark.parametrize("name", ["vp", "rectified_flow"])
@pytest.mark.parametrize("upwards", [False, True])
def test_levels_between_are_read_off_without_shortening_steps(name: str, upwards: bool) -> None:
    process = PROCESSES[name]
    times = process.t_of_nsr(at(8.0, 5.0, 1.0, 0.9, 0.2, 0.05))
    times = times.flip(0) if upwards else times
    x, _ = reference(process, float(times[0]), float(times[-1]))
    solver = RK45(rtol=1e-6, atol=1e-6, dense=True)
    plain = run(Mixture(process), x, times[[0, -1]], solver)
    solution = run(Mixture(process), x, times, solver, record=True)
    assert torch.equal(solution.x, plain.x)
    assert solution.nfe == plain.nfe
    assert solution.trajectory is not None
    assert solution.interpolant is not None
    assert solution.trajectory.shape == (6, 6, 2)
    assert torch.equal(solution.trajectory[0], x)
    assert torch.equal(solution.trajectory[-1], solution.x)
    for t, state in zip(times.tolist(), solution.trajectory, strict=True):
        _, exact = reference(process, float(times[0]), t) if t != float(times[0]) else (x, x)
        assert torch.allclose(state, exact, atol=3e-5)
        assert torch.allclose(solution.interpolant(t), state, atol=1e-12)


def test_finished_trajectories_end_with_the_result() -> None:
    process = VP()
    solution = run(
        Mixture(process),
        starts(process, 2, 2),
        ends(process, 0.5),
        RK45(),
        finish=True,
        record=True,
    )
    assert solution.trajectory is not None
    assert solution.trajectory.shape == (4, 2, 2)
    assert torch.equal(solution.trajectory[-1], solution.x)


@pytest.mark.parametrize(("solver", "order"), [(RK45, 4), (RK23, 3)])
def test_interpolant_has_its_order_within_a_step(solver: type[Adaptive], order: int) -> None:
    process = EDM()
    t, t_next = 2.0, 0.3
    x, _ = reference(process, t, t_next)
    clock = ClockRange(Clock("asinh"), process, at(t, t_next))
    span = float(clock.levels[-1] - clock.levels[0])
    _, exact = reference(process, t, 0.71)
    errors = []
    for n in (9, 18, 36):  # the point falls at .18, .35 and .71 of a step
        method = solver(rtol=1e6, atol=1e6, first_step=span / n, grow=1.0 + 1e-15, dense=True)
        solution = run(Mixture(process), x, clock.times, method)
        assert solution.interpolant is not None
        errors.append(float(rms(solution.interpolant(0.71) - exact).mean()))
    assert math.log2(errors[0] / errors[-1]) / 2 > order - 0.35


def test_interpolant_takes_a_time_a_sample_and_refuses_others() -> None:
    process = VP()
    x = starts(process, 3, 2)
    solution = run(Mixture(process), x, ends(process), RK45(rtol=1e-6, atol=1e-6, dense=True))
    assert solution.interpolant is not None
    t = at(0.2, 0.5, 0.9)
    each = solution.interpolant(t)  # type: ignore[arg-type]
    for i in range(3):
        assert torch.equal(each[i], solution.interpolant(float(t[i]))[i])
    assert torch.allclose(solution.interpolant(process.t_max), x)
    assert torch.allclose(solution.interpolant(process.t_min), solution.x)
    with pytest.raises(ValueError, match="ran between"):
        solution.interpolant(1.5)
    assert run(Mixture(process), x, ends(process), RK45()).interpolant is None


# ---------------------------------------------------------------------------------- what goes wrong


def test_max_nfe_is_kept_and_what_was_reached_comes_back() -> None:
    process = VP()
    x = starts(process, 4, 2)
    full = run(Mixture(process), x, ends(process), RK45(rtol=1e-7, atol=1e-7, dense=True))
    for budget in (1, 6, 7, 50, 97):
        reverse = Reverse(Mixture(process))
        with pytest.raises(SolverError, match=f"max_nfe={budget}") as caught:
            RK45(rtol=1e-7, atol=1e-7, max_nfe=budget).integrate(reverse, x, ends(process), None)
        partial = caught.value.partial
        assert reverse.nfe == partial.nfe <= budget
        assert partial.x.shape == x.shape
        assert not partial.statistics["arrived"].any()
        assert full.interpolant is not None
        assert torch.allclose(full.interpolant(partial.statistics["t"]), partial.x, atol=1e-5)
    some = int(full.statistics["nfe"].min())
    if some < full.nfe:
        with pytest.raises(SolverError) as caught:
            run(Mixture(process), x, ends(process), RK45(rtol=1e-7, atol=1e-7, max_nfe=some))
        there = caught.value.partial.statistics["arrived"]
        assert there.any()
        assert torch.equal(caught.value.partial.x[there], full.x[there])


def test_max_nfe_that_suffices_changes_nothing() -> None:
    process = VP()
    x = starts(process, 4, 2)
    full = run(Mixture(process), x, ends(process), RK45(), finish=True)
    assert torch.equal(
        run(Mixture(process), x, ends(process), RK45(max_nfe=full.nfe), finish=True).x, full.x
    )


def test_nan_is_told_from_stiffness() -> None:
    process = VP()
    x = starts(process, 3, 2)

    def broken(x: Tensor, t: Tensor) -> Tensor:
        bad = (t < 0.5) & (x[:, 0] > x[:, 1])
        return torch.where(bad.unsqueeze(1), math.nan, rowwise(x, t))

    x[0], x[1], x[2] = (
        torch.tensor([-1.0, 1.0]),
        torch.tensor([1.0, -1.0]),
        torch.tensor([-2.0, 0.5]),
    )
    with pytest.raises(NonFiniteError, match=r"sample 1 at t=0\.5") as caught:
        run(Prediction(broken, "x0", process), x, ends(process), RK45())
    assert torch.isfinite(caught.value.partial.x).all()
    assert caught.value.partial.nfe < 250
    with pytest.raises(NonFiniteError, match="sample 0 at t=1 "):
        run(Prediction(lambda x, t: x * math.inf, "x0", process), x, ends(process), RK45())
    x[2] = math.nan
    with pytest.raises(NonFiniteError, match="sample 2 to start from"):
        run(Mixture(process), x, ends(process), RK45())


def test_a_network_that_overflows_on_a_step_too_long_is_asked_again_nearer() -> None:
    process = EDM()

    def touchy(x: Tensor, t: Tensor) -> Tensor:
        return torch.where((x.abs() > 200).any(1, keepdim=True), math.nan, rowwise(x, t / 80))

    x = torch.full((1, 2), 100.0, dtype=torch.float64)
    network = Prediction(lambda x, t: touchy(x, t), "x0", process)
    solution = run(network, x, ends(process), RK45(rtol=1e-4, atol=1e-4, first_step=4.0))
    assert torch.isfinite(solution.x).all()


def test_a_jump_is_called_stiff_and_says_where() -> None:
    process = VP()

    def jump(x: Tensor, t: Tensor) -> Tensor:
        return 5.0 * torch.sign(t - 0.4).reshape(-1, 1).to(x) + 0.0 * x

    x = starts(process, 2, 1)
    with pytest.raises(SolverError, match=r"t=0\.4.*below min_step=0\.01") as caught:
        run(
            Prediction(jump, "x0", process),
            x,
            ends(process),
            RK45(rtol=1e-8, atol=1e-8, min_step=0.01),
        )
    assert caught.value.partial is not None
    assert torch.isfinite(caught.value.partial.x).all()
    # With steps as short as it takes, the solver gets across.
    assert torch.isfinite(
        run(Prediction(jump, "x0", process), x, ends(process), RK45(rtol=1e-4, atol=1e-4)).x
    ).all()


def test_budgets_and_parameters_are_checked() -> None:
    with pytest.raises(BudgetError, match="max_nfe"):
        RK45().levels(35)
    for wrong in (
        {"rtol": -1.0},
        {"atol": 0.0},
        {"max_nfe": 0},
        {"max_nfe": 2.5},
        {"min_step": 0.0},
        {"first_step": -1.0},
        {"shrink": 1.5},
    ):
        with pytest.raises(ValueError, match=r"tolerances|max_nfe|steps|controller"):
            RK45(**wrong)  # type: ignore[arg-type]
    with pytest.raises(GridError, match="no noise is left"):
        run(Mixture(EDM()), starts(EDM(), 1, 2), at(80.0, 0.0), RK45())


def test_solvers_are_values() -> None:
    assert RK45() == RK45() != RK45(rtol=1e-4)
    assert hash(RK45()) == hash(RK45())
    assert RK45.order == 5
    assert RK45.adaptive
    assert not RK45.stochastic


def test_the_controller() -> None:
    solver = RK45()
    assert solver.factor(0.0, 1e-4, False) == solver.grow
    assert solver.factor(0.0, 1e-4, True) == 1.0
    assert solver.factor(1e9, 1.0, False) == solver.shrink
    assert solver.factor(math.nan, 1.0, False) == 0.1
    assert solver.factor(math.inf, 1.0, False) == 0.1
    assert solver.factor(2.0, 1.0, False) == pytest.approx(0.9 * 2**-0.2)
    assert solver.factor(0.5, 0.5, False) == pytest.approx(0.9 * 0.5**-0.17 * 0.5**0.04)
