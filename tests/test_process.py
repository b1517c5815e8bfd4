"""Processes: what is derived from s(t) and sigma(t), against closed forms, simulation, and round
trips.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from sdeflow._utils.math import derivative
from sdeflow.process import EDM, VE, VP, Cosine, FromBetas, Level, Process, RectifiedFlow, SubVP

steadily = settings(derandomize=True, deadline=None, max_examples=40)

Function = Callable[[Tensor], Tensor]


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def linspace(low: float, high: float, n: int = 101) -> Tensor:
    return torch.linspace(low, high, n, dtype=torch.float64)


def inner_times(process: Process, n: int = 101) -> Tensor:
    """Times within the process, ends included, denser at the start."""
    return process.t_min + (process.t_max - process.t_min) * linspace(0, 1, n) ** 2


def close(actual: Tensor, expected: Tensor | float, rtol: float, atol: float = 0.0) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected.expand_as(actual), rtol=rtol, atol=atol)


# ------------------------------------------------------------- processes with closed forms, by hand


@dataclass(frozen=True)
class Known:
    """A process with its f and g2, worked out by hand."""

    process: Process
    f: Function
    g2: Function


unit = st.floats(0.0, 1.0)


@st.composite
def vp_like(draw: st.DrawFn) -> Known:
    low = 0.01 + draw(unit)
    high = low + 30 * draw(unit)

    def beta(t: Tensor) -> Tensor:
        return low + t * (high - low)

    def integral(t: Tensor) -> Tensor:
        return low * t + (high - low) * t**2 / 2

    if draw(st.booleans()):
        return Known(VP(low, high), lambda t: -beta(t) / 2, beta)
    # sigma = 1 - e^-B: (sigma^2)' = 2 sigma beta e^-B and -2 f sigma^2 = beta sigma^2 sum to beta
    # sigma (1 + e^-B).
    return Known(
        SubVP(low, high), lambda t: -beta(t) / 2, lambda t: -beta(t) * torch.expm1(-2 * integral(t))
    )


@st.composite
def named(draw: st.DrawFn) -> Known:
    match draw(st.integers(0, 3)):
        case 0:
            offset = 0.001 + 0.1 * draw(unit)
            rate = math.pi / 2 / (1 + offset)

            def tangent(t: Tensor) -> Tensor:
                return rate * torch.tan(rate * (t + offset))

            return Known(Cosine(offset), lambda t: -tangent(t), lambda t: 2 * tangent(t))
        case 1:
            low = 10 ** (-3 + 2 * draw(unit))
            high = low * 10 ** (1 + 3 * draw(unit))

            def growth(t: Tensor) -> Tensor:
                return 2 * low**2 * (high / low) ** (2 * t) * math.log(high / low)

            return Known(VE(low, high), torch.zeros_like, growth)
        case 2:
            return Known(EDM(), torch.zeros_like, lambda t: 2 * t)
        case _:
            return Known(
                RectifiedFlow(t_max=0.999), lambda t: -1 / (1 - t), lambda t: 2 * t / (1 - t)
            )


class Custom(Process):
    """A user's process, from its log s and its nsr^2."""

    def __init__(self, log_s: Function, nsr2: Function, t_min: float = 0.01, t_max: float = 2.0):
        self.log_s, self.nsr2, self.t_min, self.t_max = log_s, nsr2, t_min, t_max

    def s(self, t: Tensor) -> Tensor:
        return torch.exp(self.log_s(t))

    def sigma(self, t: Tensor) -> Tensor:
        return self.s(t) * self.nsr2(t).sqrt()


@st.composite
def custom(draw: st.DrawFn) -> Known:
    """s and nsr^2 drawn from three families each; f = (log s)' and g2 = s^2 (nsr^2)' by hand."""
    a, b, c, k, m = (0.1 + 2.4 * draw(unit) for _ in range(5))
    log_s, f = [
        (lambda t: -a * t - b * torch.sin(c * t), lambda t: -a - b * c * torch.cos(c * t)),
        (lambda t: -b * torch.log1p(a * t**2), lambda t: -2 * a * b * t / (1 + a * t**2)),
        (lambda t: c + a * torch.tanh(b * t), lambda t: a * b / torch.cosh(b * t) ** 2),
    ][draw(st.integers(0, 2))]
    nsr2, slope = [
        (lambda t: torch.expm1(k * t) + m * t, lambda t: k * torch.exp(k * t) + m),
        (lambda t: m * t ** (1 + k), lambda t: m * (1 + k) * t**k),
        (lambda t: torch.sinh(k * t) ** 2 + m, lambda t: k * torch.sinh(2 * k * t)),
    ][draw(st.integers(0, 2))]
    return Known(Custom(log_s, nsr2), f, lambda t: torch.exp(2 * log_s(t)) * slope(t))


class Trigonometric(Process):
    """The docstring's example, four lines."""

    def s(self, t):
        return torch.cos(t * torch.pi / 2)

    def sigma(self, t):
        return torch.sin(t * torch.pi / 2)


def linear_betas(n: int = 1000) -> Tensor:
    return torch.linspace(1e-4, 0.02, n, dtype=torch.float64)


FIXED: list[Process] = [
    *(VP(), SubVP(), Cosine(), VE(), EDM(), RectifiedFlow()),
    Process.from_betas(linear_betas()),
    Process.from_sde(lambda t: -0.5 * (0.1 + 19.9 * t), lambda t: 0.1 + 19.9 * t),
    Trigonometric(),
]


def ids(process: Process) -> str:
    return type(process).__name__


every_process = pytest.mark.parametrize("process", FIXED, ids=ids)


# ----------------------------------------------------------------------------------------- f and g2


@steadily
@given(st.one_of(vp_like(), named(), custom()))
def test_f_and_g2_agree_with_closed_forms(known: Known):
    t = inner_times(known.process)
    close(known.process.f(t), known.f(t), rtol=1e-10, atol=1e-14)
    close(known.process.g2(t), known.g2(t), rtol=1e-10)
    close(known.process.g(t) ** 2, known.g2(t), rtol=1e-10)


@steadily
@given(st.one_of(vp_like(), named(), custom()))
def test_velocity_is_the_probability_flow_ode(known: Known):
    """s' x0 + sigma' eps = f x - g2/2 score, with the score of the kernel, -eps/sigma."""
    process, t = known.process, inner_times(known.process, 31)
    x0, eps = torch.linspace(-2, 2, 31, dtype=torch.float64).unsqueeze(1), f64(1.7)
    x = process.perturb(x0, t, eps)
    score = -eps / process.sigma(t).unsqueeze(1)
    expected = process.drift(x, t) - 0.5 * known.g2(t).unsqueeze(1) * score
    close(
        process.velocity(x0, eps, t), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max())
    )
    reverse = process.drift(x, t) - known.g2(t).unsqueeze(1) * score
    close(
        process.reverse_drift(x, t, score),
        reverse,
        rtol=1e-10,
        atol=1e-10 * float(reverse.abs().max()),
    )


@every_process
def test_mean_and_variance_of_the_sde_are_s_and_sigma(process):
    """m' = f m and v' = 2 f v + g2, integrated by the classical Runge-Kutta method over half of the
    span.
    """
    n = 4000
    start, end = (
        process.t_min + 0.01 * (process.t_max - process.t_min),
        process.t_min + 0.5 * process.t_max,
    )
    h = (end - start) / n
    at = start + h * torch.arange(2 * n + 1, dtype=torch.float64) / 2
    f, g2 = process.f(at).tolist(), process.g2(at).tolist()
    s, sigma = (c.tolist() for c in process.kernel(f64(start, end)))
    m, v = s[0], sigma[0] ** 2
    for i in range(0, 2 * n, 2):
        dm, dv = [f[i] * m], [2 * f[i] * v + g2[i]]
        for j, step in ((i + 1, h / 2), (i + 1, h / 2), (i + 2, h)):
            dm, dv = (
                [*dm, f[j] * (m + step * dm[-1])],
                [*dv, 2 * f[j] * (v + step * dv[-1]) + g2[j]],
            )
        m += h / 6 * (dm[0] + 2 * dm[1] + 2 * dm[2] + dm[3])
        v += h / 6 * (dv[0] + 2 * dv[1] + 2 * dv[2] + dv[3])
    assert m == pytest.approx(s[1], rel=1e-9)
    assert v == pytest.approx(sigma[1] ** 2, rel=1e-9)


@pytest.mark.parametrize("process", [VP(), SubVP(), VE(), RectifiedFlow()], ids=ids)
def test_simulated_paths_have_mean_s_and_variance_sigma2(process):
    """Euler-Maruyama, 20 000 paths, 1000 steps: within 5 deviations of the sample (6e-7 each) and a
    step's bias.
    """
    n, steps, x0, end = 20_000, 1000, 2.0, min(process.t_max, 0.8)
    t = linspace(0.0, end, steps + 1)
    f, g = process.f(t).tolist(), process.g2(t).sqrt().tolist()
    s, sigma = (c.tolist() for c in process.kernel(t))
    generator = torch.Generator().manual_seed(0)
    x, h = s[0] * x0 + sigma[0] * torch.randn(n, generator=generator), end / steps
    for k in range(steps):
        x.mul_(1 + f[k] * h).add_(torch.randn(n, generator=generator), alpha=g[k] * math.sqrt(h))
    assert float(x.mean()) == pytest.approx(
        s[-1] * x0, abs=5 * sigma[-1] / math.sqrt(n) + 0.02 * s[-1] * x0
    )
    assert float(x.var()) == pytest.approx(sigma[-1] ** 2, rel=5 * math.sqrt(2 / n) + 0.02)


# --------------------------------------------------------------------------------------- from_betas


@pytest.mark.parametrize("n", [1, 2, 3, 10, 1000, 4000])
def test_from_betas_is_exact_at_its_nodes(n):
    betas = (
        linear_betas(n) * (1000 / n) if n > 10 else 0.05 + 0.8 * torch.rand(n, dtype=torch.float64)
    )
    process = Process.from_betas(betas)
    index = torch.arange(n)
    t = process.time(index)
    close(process.index(t), index.double(), rtol=0, atol=1e-9)
    close(process.s(t) ** 2, (1 - betas).cumprod(0), rtol=1e-13 * max(1, n / 1000), atol=1e-14)
    close(process.variance(t), -torch.expm1(torch.log1p(-betas).cumsum(0)), rtol=1e-12, atol=1e-14)
    assert float(process.s(f64(0.0))) == 1.0
    assert process.t_max == float(t[-1]) == 1.0


@settings(steadily, max_examples=20)
@given(st.lists(st.floats(1e-5, 0.9), min_size=2, max_size=12))
def test_from_betas_is_smooth_and_monotone_between_its_nodes(betas):
    process = Process.from_betas(betas)
    t = linspace(0.0, 1.0, 40 * len(betas) + 1)
    assert bool((process.s(t).diff() < 0).all())
    # Derivatives against central differences, inside the pieces; and equal from both sides of a
    # node.
    h = 1e-6
    t = (torch.arange(len(betas)) + torch.tensor([[0.3], [0.77]])).flatten().double() / len(betas)
    log_s = process.s(t + h).log() - process.s(t - h).log()
    close(process.f(t), log_s / (2 * h), rtol=1e-6, atol=1e-8)
    close(process.g2(t), -2 * process.f(t), rtol=1e-9, atol=1e-12)  # variance preserving
    nodes = torch.arange(1, len(betas)).double() / len(betas)
    close(process.f(nodes - 1e-9), process.f(nodes + 1e-9), rtol=1e-5, atol=1e-5)


def test_from_betas_approaches_vp():
    n = 1000
    process, vp = Process.from_betas((0.1 + 19.9 * (torch.arange(n) + 0.5) / n) / n), VP()
    t = linspace(0.05, 1.0)
    close(process.lam(t), vp.lam(t), rtol=0, atol=6e-2)
    close(process.g2(t), vp.g2(t), rtol=1.1e-2)


# ----------------------------------------------------------------------------------------- from_sde


@steadily
@given(vp_like())
def test_from_sde_gives_back_vp_and_sub_vp(known: Known):
    process = Process.from_sde(known.f, known.g2)
    t = linspace(0.0, 1.0)
    close(process.s(t), known.process.s(t), rtol=1e-8)
    close(process.sigma(t), known.process.sigma(t), rtol=1e-8)


def test_from_sde_gives_back_rectified_flow():
    flow = RectifiedFlow(t_max=0.999)
    process = Process.from_sde(lambda t: -1 / (1 - t), lambda t: 2 * t / (1 - t), t_max=0.999)
    t = torch.cat([linspace(0.0, 0.999), 1 - torch.logspace(-3, 0, 50, dtype=torch.float64)])
    close(process.s(t), flow.s(t), rtol=1e-8)
    close(process.sigma(t), flow.sigma(t), rtol=1e-8, atol=1e-12)


@given(custom(), st.floats(0.1, 3.0), st.floats(0.0, 2.0))
@settings(steadily, max_examples=15)
def test_from_sde_gives_back_random_processes(known: Known, s0: float, sigma0: float):
    """s and sigma from any start are the given ones up to s0 and sigma0; f and g2 derived again are
    those given.
    """
    assert isinstance(known.process, Custom)
    process = Process.from_sde(known.f, known.g2, s0=s0, sigma0=sigma0, t_min=0.01, t_max=2.0)
    t, zero = linspace(0.0, 2.0)[1:], f64(0.0)
    s = s0 * torch.exp(known.process.log_s(t) - known.process.log_s(zero))
    # g2 = S^2 (N)' with the process's own S = (s / s0) S(0): nsr^2 = sigma0^2/s0^2 + (N(t) - N(0))
    # S(0)^2 / s0^2.
    grown = (known.process.nsr2(t) - known.process.nsr2(zero)) * torch.exp(
        2 * known.process.log_s(zero)
    )
    close(process.s(t), s, rtol=1e-8)
    close(process.sigma(t), s * (sigma0**2 + grown).sqrt() / s0, rtol=1e-8, atol=1e-12)
    close(derivative(process.s, t) / process.s(t), known.f(t), rtol=1e-8, atol=1e-8)
    g2 = derivative(process.variance, t) - 2 * known.f(t) * process.variance(t)
    close(g2, known.g2(t), rtol=1e-8, atol=1e-8 * float(process.variance(t).max()))
    close(process.f(t), known.f(t), rtol=0)
    close(process.g2(t), known.g2(t), rtol=0)


def test_from_sde_takes_constants_and_kinks():
    brownian = Process.from_sde(lambda t: 0.0, lambda t: 4.0, sigma0=0.5)
    close(brownian.sigma(f64(0.0, 1.0)), f64(0.5, math.sqrt(4.25)), rtol=1e-14)
    kinked = Process.from_sde(lambda t: -torch.relu(t - 0.3), lambda t: torch.ones_like(t))
    close(kinked.s(f64(0.3, 1.0)), f64(1.0, math.exp(-0.245)), rtol=1e-9)


@pytest.mark.parametrize(
    ("f", "g2", "match"),
    [
        (
            lambda t: -1 / (1 - t),
            lambda t: 2 * t / (1 - t),
            r"f\(1\) = -inf: from_sde needs finite f and g2",
        ),
        (lambda t: -t, lambda t: t - 0.5, r"g2\(0\) = -0.5"),
        (lambda t: -t, lambda t: t / t, r"g2\(0\) = nan"),
    ],
)
def test_from_sde_explains_what_it_cannot_integrate(f, g2, match):
    with pytest.raises(ValueError, match=match):
        Process.from_sde(f, g2)


# --------------------------------------------------------------------------- inverses and gradients


@every_process
def test_time_and_lam_are_inverse(process):
    t = inner_times(process)
    t = t[torch.isfinite(process.lam(t))]
    close(process.t_of_lam(process.lam(t)), t, rtol=1e-12, atol=1e-12)
    close(process.t_of_nsr(process.nsr(t)), t, rtol=1e-12, atol=1e-12)
    # Up to nsr = 1000: beyond it, t near 1 cannot tell its neighbours in lam apart.
    lam = linspace(
        max(float(process.lam(t[-1])), -math.log(1e3)), float(process.lam(process.t_min))
    )[1:-1]
    close(process.lam(process.t_of_lam(lam)), lam, rtol=1e-12, atol=2e-12)
    close(process.angle(t), process.nsr(t).atan(), rtol=1e-14)
    assert process.t_of_lam(lam.reshape(3, 33)).shape == (3, 33)
    assert process.t_of_lam(float(lam[3])).shape == ()


@steadily
@given(st.one_of(vp_like(), named(), custom()))
def test_time_and_lam_are_inverse_for_random_processes(known: Known):
    t = inner_times(known.process, 21)
    close(known.process.t_of_lam(known.process.lam(t)), t, rtol=1e-12, atol=1e-12)


def test_beyond_the_range_a_root_is_the_nearer_end():
    process = Trigonometric()
    close(
        process.t_of_lam(f64(1e3, math.inf, -math.inf)),
        f64(process.t_min, process.t_min, process.t_max),
        rtol=1e-12,
    )
    for endless in (VP(), SubVP(), Cosine(), VE(), RectifiedFlow()):
        s, sigma = endless.kernel(endless.t_of_nsr(math.inf))
        assert float(sigma / s) > 1e15  # no NaN, whatever the end of time is


@every_process
def test_the_inverse_is_differentiable(process):
    lam = process.lam(linspace(process.t_min, process.t_max, 7)[1:-1]).detach().requires_grad_()
    assert gradcheck(process.t_of_lam, lam, eps=1e-6, atol=1e-6)
    (slope,) = torch.autograd.grad(process.t_of_lam(lam).sum(), lam)
    close(slope, 1 / derivative(process.lam, process.t_of_lam(lam.detach())), rtol=1e-9)


@every_process
def test_derived_functions_are_differentiable_in_time(process):
    if isinstance(process, FromBetas):
        t = f64(0.2003, 0.5004, 0.7007)  # inside its pieces
    else:
        t = linspace(process.t_min, process.t_max, 5)[1:-1]
    for function in (process.s, process.sigma, process.f, process.g2, process.lam):
        assert gradcheck(
            lambda t, function=function: function(t) + 0 * t,
            t.requires_grad_(),
            atol=1e-4,
            rtol=1e-4,
        )


def test_parameters_of_an_sde_and_of_a_users_process_get_gradients():
    t = f64(0.1, 0.5, 1.0)

    def by_quadrature(rate, strength):
        process = Process.from_sde(
            lambda t: -rate * (1 + t), lambda t: strength * t.exp(), s0=1.5, sigma0=0.3
        )
        return process.s(t), process.sigma(t)

    def by_hand(rate, strength):
        process = Custom(lambda t: -rate * t, lambda t: strength * t**2)
        return torch.stack(
            [
                torch.stack([level.s, level.sigma, level.ds, level.dsigma])
                for level in process.levels(t)
            ]
        )

    parameters = [f64(0.7).requires_grad_(), f64(1.3).requires_grad_()]
    assert gradcheck(by_quadrature, parameters)
    assert gradcheck(by_hand, parameters)


# -------------------------------------------------------------------------------------- conversions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nsr", [1e-4, 1e-3, 0.03, 0.5, 1.0, 7.0, 100.0, 1e3, 1e4])
@pytest.mark.parametrize(
    "process", [VP(), SubVP(), Cosine(), VE(), EDM(), RectifiedFlow(), Trigonometric()], ids=ids
)
def test_conversions_round_trip(process, nsr, dtype):
    """x0 -> eps, score, v, velocity -> x0, to 32 eps max(nsr, 1/nsr) of the largest entry."""
    if isinstance(process, Trigonometric):
        process.t_min = 1e-5  # found by a root: within its range only
    t = process.t_of_nsr(nsr)
    assert float(process.nsr(t)) == pytest.approx(nsr, rel=1e-9)
    generator = torch.Generator().manual_seed(1)
    x0, eps = (torch.randn(64, 3, generator=generator, dtype=dtype) for _ in range(2))
    x = process.perturb(x0, t, eps)
    assert x.dtype == dtype
    tolerance = 32 * torch.finfo(dtype).eps * max(nsr, 1 / nsr)
    trips = {
        "eps": process.x0_from_eps(x, process.eps_from_x0(x, x0, t), t),
        "score": process.x0_from_score(x, process.score_from_x0(x, x0, t), t),
        "v": process.x0_from_v(x, process.v_from_x0(x, x0, t), t),
        "velocity": process.x0_from_velocity(x, process.velocity_from_x0(x, x0, t), t),
    }
    for name, back in trips.items():
        assert back.dtype == dtype, name
        assert float((back - x0).abs().max()) <= tolerance * float(x0.abs().max()), name
    # And each is what it says: the eps that was put in, and combinations of it.
    s, sigma = (float(c) for c in process.kernel(t))
    ds, dsigma = float(process.ds(t)), float(process.dsigma(t))
    r = math.hypot(s, sigma)
    close(process.eps_from_x0(x, x0, t), eps, rtol=0, atol=4 * tolerance)
    close(process.score_from_x0(x, x0, t) * sigma, -eps, rtol=0, atol=4 * tolerance)
    close(process.v_from_x0(x, x0, t), (s * eps - sigma * x0) / r, rtol=0, atol=4 * tolerance)
    scale = abs(ds) + abs(dsigma)
    close(
        process.velocity_from_x0(x, x0, t),
        ds * x0 + dsigma * eps,
        rtol=0,
        atol=4 * tolerance * scale,
    )


@every_process
def test_times_may_differ_between_samples(process):
    t = inner_times(process, 4)[:-1]
    x, y = torch.randn(
        2, 3, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    ).unbind()
    for function in (
        *(process.perturb, process.velocity),
        *(
            lambda x, t, y, g=g: g(x, y, t)
            for g in (process.x0_from_eps, process.eps_from_x0, process.x0_from_score)
        ),
        *(
            lambda x, t, y, g=g: g(x, y, t)
            for g in (process.score_from_x0, process.x0_from_v, process.v_from_x0)
        ),
        *(
            lambda x, t, y, g=g: g(x, y, t)
            for g in (process.x0_from_velocity, process.velocity_from_x0)
        ),
        process.reverse_drift,
    ):
        order = (x, y, t) if function == process.velocity else (x, t, y)
        single = [
            function(*(a[i : i + 1] if a is not t else t[i] for a in order)) for i in range(3)
        ]
        close(function(*order), torch.cat(single), rtol=1e-13)
    with pytest.raises(ValueError, match="4 times for a batch of 3"):
        process.perturb(x, torch.ones(4), y)
    with pytest.raises(ValueError, match="one entry a sample"):
        process.perturb(x, torch.ones(3, 1), y)


# ------------------------------------------------------------------------------------- ends of time


@every_process
def test_both_ends_of_time_are_finite(process):
    ends = f64(process.t_min, process.t_max)
    for function in (
        process.s,
        process.sigma,
        process.ds,
        process.dsigma,
        process.variance,
        process.angle,
    ):
        assert bool(torch.isfinite(function(ends)).all())
    x0, eps = torch.ones(2, 3), torch.ones(2, 3)
    assert bool(torch.isfinite(process.velocity(x0, eps, ends)).all())
    assert 0 < process.prior_std < math.inf
    assert float(process.nsr(process.t_min)) < 0.15
    assert float(process.nsr(process.t_max)) > 40


def test_known_values_at_the_ends():
    flow, x0, eps = RectifiedFlow(), torch.randn(4), torch.randn(4)
    close(flow.velocity(x0, eps, 1.0), eps - x0, rtol=1e-6)
    assert float(flow.nsr(1.0)) == math.inf
    assert float(flow.angle(1.0)) == math.pi / 2
    assert float(flow.g2(0.0)) == 0.0
    assert float(VP().g2(0.0)) == pytest.approx(0.1, rel=1e-14)
    assert float(SubVP().g2(0.0)) == 0.0
    assert float(VP().nsr(1.0)) == pytest.approx(152, rel=0.01)
    assert float(Cosine().nsr(Cosine().t_max)) == pytest.approx(1000, rel=1e-3)
    assert VE().prior_std == pytest.approx(50)
    for process in (VP(), SubVP(), Cosine(), RectifiedFlow()):
        s, sigma = process.kernel(0.0)
        assert (float(s), float(sigma)) == (1.0, 0.0)
    # Near zero, sigma is good to rounding: the naive sqrt(1 - s^2) has no digit left at t = 1e-15.
    assert float(VP().variance(f64(1e-15))) == pytest.approx(1e-16, rel=1e-12)
    assert float(SubVP().sigma(f64(1e-15))) == pytest.approx(1e-16, rel=1e-12)
    rate = math.pi / 2 / 1.008
    assert float(Cosine().variance(f64(1e-15))) == pytest.approx(
        2e-15 * rate * math.tan(0.008 * rate), rel=1e-9
    )


# ------------------------------------------------------------------------------------------- levels


@every_process
def test_levels_agree_with_the_functions(process):
    times = inner_times(process, 9)
    levels = process.levels(times)
    assert all(
        type(getattr(level, entry.name)) is float for level in levels for entry in fields(Level)
    )
    assert process.levels(times.tolist()) == levels
    for name in ("s", "sigma", "ds", "dsigma"):
        # A signal below rounding, cos(pi/2), is 0 in a level.
        close(
            f64(*(getattr(level, name) for level in levels)),
            getattr(process, name)(times),
            rtol=0,
            atol=1e-16,
        )
    for t, level in list(zip(times, levels, strict=True))[:-1]:
        for name in ("nsr", "lam", "f"):
            assert getattr(level, name) == pytest.approx(
                float(getattr(process, name)(t)), rel=1e-8, abs=1e-12
            ), name
        assert level.g2 == pytest.approx(float(process.g2(t)), rel=1e-8)
    assert process.level(float(times[3])) == levels[3]


def test_levels_where_no_signal_is_left():
    level = RectifiedFlow().level(1.0)
    assert (level.s, level.sigma, level.ds, level.dsigma) == (0.0, 1.0, -1.0, 1.0)
    assert (level.nsr, level.lam, level.f, level.g2) == (math.inf, -math.inf, -math.inf, math.inf)


def test_levels_keep_gradients_unless_told_not_to():
    t = f64(0.2, 0.7).requires_grad_()
    levels = VP().levels(t)
    assert all(isinstance(level.sigma, Tensor) and level.sigma.shape == () for level in levels)
    (slope,) = torch.autograd.grad(levels[0].s + levels[1].s, t)
    close(slope, VP().ds(t.detach()), rtol=1e-14)
    with torch.no_grad():
        assert type(VP().levels(t)[0].s) is float


# ----------------------------------------------------------------------------------- bad parameters


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: VP(beta_min=0.0), "0 < beta_min <= beta_max"),
        (lambda: VP(beta_min=2.0, beta_max=1.0), "0 < beta_min <= beta_max"),
        (lambda: SubVP(beta_min=-1.0), "0 < beta_min <= beta_max"),
        (lambda: VP(t_min=1.0), "from t_min to a larger t_max"),
        (lambda: EDM(t_min=80.0, t_max=0.002), "from t_min to a larger t_max"),
        (lambda: Cosine(t_max=1.5), "t_max <= 1"),
        (lambda: Cosine(offset=-0.1), "0 < offset < 1"),
        (lambda: VE(sigma_min=0.0), "0 < sigma_min < sigma_max"),
        (lambda: VE(sigma_min=2.0, sigma_max=1.0), "0 < sigma_min < sigma_max"),
        (lambda: RectifiedFlow(t_max=1.1), "ends at t = 1"),
        (lambda: Process.from_betas([]), "every entry inside"),
        (lambda: Process.from_betas([0.1, 0.0]), "every entry inside"),
        (lambda: Process.from_betas([0.1, math.nan]), "every entry inside"),
        (lambda: Process.from_betas([1.0, 0.1]), "zero-terminal SNR.*entry 0 is 1"),
        (lambda: Process.from_sde(torch.zeros_like, torch.ones_like, s0=0.0), "s0 > 0"),
        (lambda: Process.from_sde(torch.zeros_like, torch.ones_like, sigma0=-1.0), "sigma0 >= 0"),
        (lambda: Process.from_sde(torch.zeros_like, torch.ones_like, t_min=2.0), "larger t_max"),
    ],
)
def test_bad_parameters_are_explained(build, match):
    with pytest.raises(ValueError, match=match):
        build()


def test_a_process_needs_both_functions():
    class Half(Process):
        def s(self, t):
            return t

    with pytest.raises(TypeError, match="sigma"):
        Half()


def test_processes_are_values():
    assert VP() == VP(0.1, 20.0)
    assert VP() != VP(t_max=0.9)
    assert hash(Process.from_betas([0.1, 0.2])) == hash(Process.from_betas(f64(0.1, 0.2)))
    assert Process.from_betas([0.1, 0.2]) == Process.from_betas([0.1, 0.2])
    assert replace(EDM(), t_max=10.0).t_max == 10.0
    with pytest.raises(AttributeError):
        VP().beta_min = 1.0  # type: ignore[misc]
