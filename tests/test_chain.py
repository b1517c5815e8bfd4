"""The chain: tables of betas, transitions and posteriors, the variances of DDPM, free noise of DDIM."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor

import sdeflow
from sdeflow import (
    DDIM,
    DDPM,
    EDM,
    VE,
    VP,
    Clip,
    Cosine,
    Gaussian,
    GridError,
    Langevin,
    Optimal,
    Process,
    Projected,
    RectifiedFlow,
    SolverError,
    SubVP,
    betas,
)
from sdeflow.noise import SeededNoise
from sdeflow.reverse import Reverse
from sdeflow.sampling.cuda_graphs import is_planned

PROCESSES = [
    VP(),
    SubVP(),
    VE(),
    EDM(),
    Cosine(),
    RectifiedFlow(),
    Process.from_betas(betas.linear(50, reference=1000)),
]
F64 = torch.float64
Prediction = partial(sdeflow.Prediction, time="continuous")


# ---------------------------------------------------------------------------------- tables of betas


@pytest.mark.parametrize("T", [1, 2, 7, 1000, 4000])
@pytest.mark.parametrize(
    "table",
    [
        betas.linear,
        betas.scaled_linear,
        betas.quadratic,
        betas.sigmoid,
        betas.cosine,
        betas.constant,
    ],
)
def test_a_table_has_any_length(table, T: int) -> None:
    b = table(T)
    assert b.shape == (T,)
    assert b.dtype == F64
    assert bool(((b > 0) & (b < 1)).all())
    process = Process.from_betas(b)
    kept = torch.cumprod(1 - b, 0)
    t = torch.arange(1, T + 1, dtype=F64) / T
    assert torch.allclose(process.s(t) ** 2, kept, rtol=1e-10, atol=1e-15)


def test_the_tables_are_the_published_ones() -> None:
    assert torch.equal(betas.linear(), torch.linspace(1e-4, 0.02, 1000, dtype=F64))
    assert torch.allclose(
        betas.quadratic(), torch.linspace(1e-2, 0.02**0.5, 1000, dtype=F64) ** 2, rtol=1e-13
    )
    assert float(betas.scaled_linear()[0]) == pytest.approx(0.00085, rel=1e-12)
    assert float(betas.scaled_linear()[-1]) == pytest.approx(0.012, rel=1e-12)
    half = betas.linear(500, reference=1000)
    assert float(half.sum()) == pytest.approx(float(betas.linear().sum()), rel=1e-12)

    def h(u: Tensor) -> Tensor:
        return torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    T = 1000
    u = torch.arange(T + 1, dtype=F64) / T
    plain = 1 - h(u[1:]) / h(u[:-1])
    assert torch.allclose(betas.cosine(T), plain.clamp(max=0.999), rtol=1e-8)
    assert float(betas.cosine(T)[-1]) == 0.999
    kept = torch.cumprod(1 - betas.cosine(T), 0)
    assert torch.allclose(kept[:-1], (h(u) / h(u[:1]))[1:-1], rtol=1e-9)


def test_a_table_that_is_too_short_says_so() -> None:
    with pytest.raises(ValueError, match="T above 20"):
        betas.linear(10, reference=1000)
    with pytest.raises(ValueError, match="T is a whole number"):
        betas.cosine(0)
    with pytest.raises(ValueError, match="cap"):
        betas.cosine(10, cap=1.0)


# ---------------------------------------------------------------------- transitions and posteriors


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_transitions_compose_and_reach_the_kernel(process: Process) -> None:
    a, b, c = (process.t_min + u * (process.t_max - process.t_min) for u in (0.1, 0.5, 1.0))
    s, sigma = process.kernel(a)
    scale, std = process.transition(a, b)
    s_b, sigma_b = process.kernel(b)
    assert float(scale * s) == pytest.approx(float(s_b), rel=1e-12)
    assert float((scale * sigma) ** 2 + std**2) == pytest.approx(float(sigma_b**2), rel=1e-12)
    scale2, std2 = process.transition(b, c)
    direct_scale, direct_std = process.transition(a, c)
    assert float(scale * scale2) == pytest.approx(float(direct_scale), rel=1e-10, abs=1e-15)
    both = (scale2 * std) ** 2 + std2**2
    assert float(both) == pytest.approx(float(direct_std**2), rel=1e-12)
    stay = process.transition(b, b)
    assert (float(stay[0]), float(stay[1])) == (1.0, 0.0)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_the_posterior_is_bayes_rule(process: Process) -> None:
    """The joint law of x(t_next) and x(t) given x0 is Gaussian: condition it."""
    times = [process.t_min + u * (process.t_max - process.t_min) for u in (0.2, 0.6, 1.0)]
    x, x0 = torch.tensor([[0.7, -1.3]], dtype=F64), torch.tensor([[0.2, 0.9]], dtype=F64)
    for t_next, t in [(times[0], times[1]), (times[1], times[2]), (times[0], times[2])]:
        scale, std = process.transition(t_next, t)
        s, sigma = process.kernel(t_next)
        variance = scale**2 * sigma**2 + std**2
        gain = scale * sigma**2 / variance
        mean = s * x0 + gain * (x - scale * s * x0)
        got, got_std = process.posterior(x, x0, t, t_next)
        assert torch.allclose(got, mean, rtol=1e-11, atol=1e-12)
        assert float(got_std**2) == pytest.approx(float(sigma**2 * std**2 / variance), rel=1e-11)
    same, zero = process.posterior(x, x0, times[1], times[1])
    assert torch.equal(same, x)
    assert float(zero) == 0.0


def test_on_a_table_they_are_the_papers() -> None:
    b = betas.linear(20, 1e-4, 0.3)
    process, kept = Process.from_betas(b), torch.cumprod(1 - b, 0)
    t = torch.arange(1, 21, dtype=F64) / 20
    scale, std = process.transition(t[:-1], t[1:])
    assert torch.allclose(scale, (1 - b[1:]).sqrt(), rtol=1e-12)
    assert torch.allclose(std**2, b[1:], rtol=1e-10)
    x, x0 = torch.randn(19, 3, dtype=F64), torch.randn(19, 3, dtype=F64)
    mean, std = process.posterior(x, x0, t[1:], t[:-1])
    before, now = kept[:-1], kept[1:]
    tilde = (1 - before) / (1 - now) * b[1:]
    first = before.sqrt() * b[1:] / (1 - now)
    second = (1 - b[1:]).sqrt() * (1 - before) / (1 - now)
    assert torch.allclose(mean, first[:, None] * x0 + second[:, None] * x, rtol=1e-10, atol=1e-12)
    assert torch.allclose(std**2, tilde, rtol=1e-10)
    # From x_1 to x_0 the posterior is x0 itself.
    mean, std = process.posterior(x, x0, t[0], 0.0)
    assert torch.equal(mean, x0)
    assert float(std) == 0.0


def test_the_wrong_way_is_an_error() -> None:
    with pytest.raises(ValueError, match="noisier"):
        VP().transition(0.5, 0.4)
    with pytest.raises(ValueError, match="transition"):
        VP().posterior(torch.zeros(1, 1), torch.zeros(1, 1), 0.4, 0.5)
    with pytest.raises(ValueError, match="no signal"):
        RectifiedFlow(t_max=1.0).transition(1.0, 1.5)


# ------------------------------------------------------------------------------- DDPM's variances


def result_variance(plan: sdeflow.Plan, process: Process, c: float) -> float:
    """The exact variance of a plan's result for data N(0, c^2), from the exact law at its start."""
    return float(plan.unrolled().spread(c)[-1]) ** 2


def gaussian_moment(c: float):
    return lambda nsr: nsr**2 / (nsr**2 + c**2)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("steps", [3, 10, 40])
def test_optimal_variance_is_exact_on_gaussians(process: Process, steps: int) -> None:
    """Every marginal is exact, at any step count."""
    for c in (0.3, 1.0, 2.0):
        times = torch.linspace(process.t_max, process.t_min, steps, dtype=F64)
        solver = DDPM(Optimal(gaussian_moment(c)))
        rows = solver.plan(process, times).unrolled()
        exact = (rows.s**2 * c**2 + rows.sigma**2).sqrt()
        # Where no signal is left, the moment says only the variance at nsr = 1e4.
        assert torch.allclose(rows.spread(c)[:-1], exact[:-1], rtol=1e-7)


def test_large_is_nearer_than_small_on_gaussians() -> None:
    """In every case from 10 to 1000 steps, with exact scores: what the docstring says."""
    process, c = Process.from_betas(betas.linear()), 0.5
    for steps in (10, 20, 50, 100, 250, 1000):
        index = torch.linspace(1000, 1, steps, dtype=F64).round()
        wrong = {
            kind: abs(
                result_variance(DDPM(kind).plan(process, index / 1000, finish=False), process, c)
                - _law(process, c)
            )
            for kind in ("small", "large")
        }
        assert wrong["large"] < wrong["small"], (steps, wrong)


def _law(process: Process, c: float) -> float:
    s, sigma = process.kernel(process.t_min)
    return float(s**2 * c**2 + sigma**2)


def test_the_ends_of_the_optimal_variance() -> None:
    """Moment 1 (nothing is unknown) is "small"; moment 0 is DDPM's upper bound, beta / alpha."""
    process = Process.from_betas(betas.linear(30, reference=1000))
    times = torch.arange(30, 0, -1, dtype=F64) / 30
    small, one = (DDPM(v).plan(process, times) for v in ("small", Optimal(lambda nsr: 1.0)))
    assert one.compare(small).close()
    zero = DDPM(Optimal(lambda nsr: 0.0)).plan(process, times).unrolled().draws
    large = DDPM("large").plan(process, times).unrolled().draws
    b = betas.linear(30, reference=1000)
    share = (
        zero[torch.arange(1, 30), torch.arange(29)] / large[torch.arange(1, 30), torch.arange(29)]
    )
    assert torch.allclose(share, (1 - b[1:].flip(0)).rsqrt(), rtol=1e-10)


def test_the_optimal_variance_is_estimated_from_data() -> None:
    """On the points of a cubature rule the estimate of a linear denoiser's error is exact."""

    class Half(sdeflow.Denoiser):
        process, shape = EDM(), (1,)

        def __call__(self, x, t, /, **condition):
            return 0.5 * x

    n = 4000
    x0 = torch.tensor([[0.6], [-0.6]], dtype=F64).repeat(n // 2, 1)
    optimal = Optimal.estimate(Half(), x0, nsr=(0.1, 1.0, 10.0))
    for nsr in (0.1, 1.0, 10.0):  # E (x0 - (x0 + n eps) / 2)^2 = (0.36 + n^2) / 4
        assert optimal.mean_squared_error(nsr) == pytest.approx((0.36 + nsr**2) / 4, rel=0.1)
    middle = optimal.mean_squared_error(10**-0.5)
    assert middle == pytest.approx((optimal.error[0] * optimal.error[1]) ** 0.5, rel=1e-12)
    assert optimal.mean_squared_error(1e9) == optimal.error[-1]
    assert optimal.mean_squared_error(1e-9) == optimal.error[0]
    split = Optimal.estimate(Half(), x0, nsr=(0.1, 1.0, 10.0), batch_size=7)
    assert split.error == pytest.approx(optimal.error, rel=1e-6)
    with pytest.raises(ValueError, match="moment"):
        Optimal()
    with pytest.raises(ValueError, match="rises"):
        Optimal(nsr=(1.0, 0.5), error=(1.0, 1.0))


# -------------------------------------------------------------------------------- learned variances


class TwoHeads(torch.nn.Module):
    """eps of N(0, c^2) data, and the fraction of the optimal variance on a table."""

    def __init__(self, process: Process, c: float, w: float):
        super().__init__()
        self.process, self.c, self.w = process, c, w

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        s, sigma = (k.reshape(-1, 1) for k in self.process.kernel(t.double()))
        eps = sigma * x / (s**2 * self.c**2 + sigma**2)
        return torch.cat([eps, torch.full_like(eps, self.w)], 1).to(x.dtype)


@pytest.mark.parametrize(("w", "name"), [(-1.0, "small"), (1.0, "large")])
def test_the_ends_of_the_learned_variance(w: float, name: str) -> None:
    process = Process.from_betas(betas.linear(20, 1e-3, 0.4))
    model = Prediction(TwoHeads(process, 0.5, w), "eps", process, shape=(3,), learned_variance=True)
    assert model.outputs == ("x0", "fraction")
    given = {"n": 5, "seeds": 3, "dtype": F64, "grid": torch.arange(20, 0, -1, dtype=F64) / 20}
    learned = sdeflow.sample(model, solver=DDPM("learned"), **given)
    assert torch.allclose(learned, sdeflow.sample(model, solver=DDPM(name), **given), atol=1e-12)
    # Under another process: the same solve in other units.
    edm = [float(process.nsr(t)) for t in given["grid"]]
    there = sdeflow.solve(
        model,
        EDM(t_min=1e-3, t_max=1e3),
        solver=DDPM("learned"),
        **given | {"grid": edm},
        trajectory=True,
    )
    here = sdeflow.solve(model, solver=DDPM("learned"), **given, trajectory=True)
    s = process.s(given["grid"]).reshape(-1, 1, 1)
    first = there.trajectory[0] * s[0] / here.trajectory[0]
    assert torch.allclose(first, torch.ones_like(first), rtol=1e-9)
    assert torch.allclose(there.trajectory[:-1] * s, here.trajectory[:-1], rtol=1e-7, atol=1e-9)
    assert here.trajectory.shape == (21, 5, 3)
    assert here.nfe == here.network_calls == 20


def test_a_learned_variance_lies_between_and_has_no_plan() -> None:
    process = Process.from_betas(betas.linear(20, 1e-3, 0.4))
    model = Prediction(
        TwoHeads(process, 0.5, 0.2), "eps", process, shape=(3,), learned_variance=True
    )
    x, t = torch.randn(2, 3, dtype=F64), torch.tensor([0.5, 0.7], dtype=F64)
    x0, fraction = model.predict(x, t)
    assert torch.equal(x0, model(x, t))
    assert torch.allclose(fraction, torch.full_like(x, 0.6))
    clipped = Projected(model, Clip()).predict(4 * x, t)
    assert float(clipped[0].abs().max()) <= 1.0
    assert torch.equal(clipped[1], fraction)
    solver = DDPM("learned")
    assert not is_planned(solver)
    assert is_planned(DDPM("large"))
    with pytest.raises(SolverError, match="learned"):
        solver.plan(process, [1.0, 0.5])
    with pytest.raises(SolverError, match="learned"):
        sdeflow.sample(model, solver=solver, nfe=5, n=1, compile="require")
    with pytest.raises(SolverError, match="learned variance"):
        sdeflow.sample(model, solver=Langevin(solver=solver), grid=[1.0, 0.5], n=1)
    with pytest.raises(ValueError, match="learned_variance=True"):
        sdeflow.sample(Gaussian(torch.zeros(2), std=0.5, process=process), solver=solver, nfe=5)
    with pytest.raises(ValueError, match="twice the channels"):
        Prediction(lambda x, t: x, "eps", process, learned_variance=True)(x, 0.5)
    with pytest.raises(ValueError, match="variance"):
        DDPM("middle")
    seen = []
    sdeflow.sample(
        model, solver=solver, nfe=5, n=2, callback=lambda c: seen.append((c.nfe, tuple(c.x0.shape)))
    )
    assert seen == [(k, (2, 3)) for k in range(1, 6)]
    times = torch.arange(20, 0, -4, dtype=F64) / 20
    state = process.prior_std * torch.randn(2, 3, dtype=F64)
    book = solver.textbook(Reverse(model), state, times, SeededNoise([1, 2], (3,), dtype=F64))
    run = solver.integrate(Reverse(model), state, times, SeededNoise([1, 2], (3,), dtype=F64))
    assert torch.equal(book, run.x)


# ------------------------------------------------------------------------------------ DDIM's noise


def marginal_error(solver: sdeflow.GridSolver, process: Process, times: Tensor) -> float:
    """How far the noise at each level is from sigma, for data of a single point."""
    return solver.plan(process, times).consistency()["noise"]


def test_any_noise_of_ddim_keeps_the_marginals_of_a_point() -> None:
    process = Process.from_betas(betas.linear(100, reference=1000))
    times = torch.tensor([100, 83, 40, 17, 3, 1], dtype=F64) / 100
    least = min(
        float(1 - (process.nsr(b) / process.nsr(a)) ** 2) for a, b in itertools.pairwise(times)
    )
    for solver in (
        DDIM(),
        DDIM(0.3),
        DDIM(1.0),
        DDIM(std=(0.1, 0.2, 0.0, 0.05, 0.01)),
        DDIM(std=lambda t, t_next: 0.9 * t_next.sigma),
    ):
        assert marginal_error(solver, process, times) < 1e-12
    fine = torch.tensor([100, 99, 98, 97], dtype=F64) / 100
    widest = max(
        float(1 - (process.nsr(b) / process.nsr(a)) ** 2) for a, b in itertools.pairwise(fine)
    )
    assert marginal_error(DDIM(widest**-0.5 * 0.999), process, fine) < 1e-9
    assert least > 0.5


def test_the_papers_sigma_is_the_free_one() -> None:
    process = Process.from_betas(betas.linear(100, reference=1000))
    times = torch.tensor([100, 60, 20, 1], dtype=F64) / 100
    for eta in (0.0, 0.4, 1.0):
        kept = process.s(times) ** 2
        a, a_next = kept[:-1], kept[1:]
        sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)).sqrt()
        free = DDIM(std=tuple(sigma.tolist())).plan(process, times)
        named = DDIM(eta).plan(process, times)
        if eta:
            assert free.compare(named).close(1e-11)
        else:
            assert torch.allclose(free.matrix(), named.matrix(), rtol=1e-12, atol=1e-14)
            assert not DDIM(std=(0.0, 0.0)).stochastic


def test_more_noise_than_there_is_is_an_error() -> None:
    process = Process.from_betas(betas.linear(100, reference=1000))
    times = torch.tensor([100, 60, 20, 1], dtype=F64) / 100
    with pytest.raises(GridError, match="more than the whole noise"):
        DDIM(std=(0.1, 0.99, 0.01)).plan(process, times)
    with pytest.raises(GridError, match="eta is at most 1"):
        DDIM(1.5).plan(process, times)
    with pytest.raises(ValueError, match="3 steps"):
        DDIM(std=(0.1, 0.1)).plan(process, times)
    with pytest.raises(ValueError, match="not both"):
        DDIM(0.5, std=(0.1,))
    with pytest.raises(ValueError, match="eta"):
        DDIM(-0.1)
