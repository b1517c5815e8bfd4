"""Likelihood along the ODE against the exact value of the same estimator: on Gaussians the flow has
a closed form, on mixtures a tight adaptive solve stands for it.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sdeflow import (
    DDPM,
    EDM,
    RK45,
    VE,
    VP,
    Cosine,
    Denoiser,
    Gaussian,
    GaussianMixture,
    Process,
    RectifiedFlow,
    encode,
    log_likelihood,
)
from sdeflow.likelihood.ode import Augmented, truncated_normal_entropy

F64 = torch.float64
STD = torch.tensor([0.5, 0.8], dtype=F64)
TIGHT = RK45(rtol=1e-9, atol=1e-10)
PROCESSES = [VP(), EDM(), VE(), RectifiedFlow(), Cosine()]


def gaussian(process: Process) -> Gaussian:
    return Gaussian(torch.tensor([0.3, -0.2], dtype=F64), std=STD, process=process)


def estimator(model: Gaussian, x0: Tensor) -> Tensor:
    """The exact value: the flow in closed form, and the Gaussian prior that the model has."""
    process = model.process
    (s0, sigma0), (s1, sigma1) = (
        [float(c) for c in process.kernel(t)] for t in (process.t_min, process.t_max)
    )
    latent = model.transport(s0 * x0, process.t_min, process.t_max)
    prior = -0.5 * (latent / sigma1).square().sum(1) - 2 * math.log(sigma1) - math.log(2 * math.pi)
    stretch = 0.5 * torch.log((s1**2 * STD**2 + sigma1**2) / (s0**2 * STD**2 + sigma0**2)).sum()
    return prior + stretch + 2 * math.log(s0)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_a_tight_solve_is_the_exact_value(process: Process) -> None:
    model = gaussian(process)
    x0 = model.sample(5, 0, dtype=F64)
    exact = estimator(model, x0)
    found = log_likelihood(model, x0, solver=TIGHT)
    assert torch.allclose(found.value, exact, rtol=0, atol=1e-6)
    assert torch.allclose(
        found.x, encode(model, process.kernel(process.t_min)[0] * x0, solver=TIGHT), atol=1e-6
    )
    assert "density" in found.of
    # The gap to the density of x0 + nsr eps is that of the prior.
    s0 = float(process.kernel(process.t_min)[0])
    true = model.log_prob(s0 * x0, process.t_min) + 2 * math.log(s0)
    assert float((exact - true).abs().max()) < 0.02
    s1, sigma1 = (float(c) for c in process.kernel(process.t_max))
    spread, mean = s1**2 * STD**2 + sigma1**2, s1 * model.mean
    ratio = spread / sigma1**2
    divergence = 0.5 * float((ratio - 1 - ratio.log() + mean**2 / sigma1**2).sum())
    assert divergence <= found.prior_gap + 1e-12 or found.prior_gap == pytest.approx(
        divergence, rel=3
    )


@pytest.mark.parametrize(
    "solver", ["heun", "rk4", "adams3", "unipc_3", "dpmpp_2m", "ipndm", "deis", "ddim"]
)
def test_plans_converge_to_it(solver: str) -> None:
    """Whatever the method: the density is one more coordinate of its state."""
    model = gaussian(VP())
    x0 = model.sample(4, 1, dtype=F64)
    exact = estimator(model, x0)
    # 24 and 96 calls, a factor of 4: first order gains 4, higher orders more.
    errors = [
        float(
            (log_likelihood(model, x0, solver=solver, nfe=nfe, grid="uniform_lam").value - exact)
            .abs()
            .max()
        )
        for nfe in (24, 96)
    ]
    assert errors[1] < errors[0] / 2.5
    assert errors[1] < 0.15
    found = log_likelihood(model, x0, solver=solver, nfe=24)
    assert (found.nfe, found.network_gradients) == (24, 48)


def test_the_reference_leaves_nothing_where_it_is_the_data() -> None:
    """On N(0, c^2 I) with reference_std = c the trace is exact: what is left is the latent's error."""
    model = Gaussian(torch.zeros(2, dtype=F64), std=torch.tensor(0.7, dtype=F64), process=VP())
    x0 = torch.zeros(1, 2, dtype=F64)  # whose path is zero under every solver
    found = log_likelihood(model, x0, solver="heun", nfe=4, reference_std=0.7)
    s0, sigma0 = (float(c) for c in VP().kernel(1e-3))
    s1, sigma1 = (float(c) for c in VP().kernel(1.0))
    stretch = math.log((s1**2 * 0.49 + sigma1**2) / (s0**2 * 0.49 + sigma0**2))
    exact = stretch - math.log(2 * math.pi) - 2 * math.log(sigma1) + 2 * math.log(s0)
    assert float(found.value) == pytest.approx(exact, abs=1e-9)


def mixture(dim: int, process: Process, seed: int = 0) -> GaussianMixture:
    means = torch.randn(3, dim, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return GaussianMixture(
        [0.2, 0.3, 0.5], means, std=torch.tensor(0.5, dtype=F64), process=process
    )


@pytest.mark.parametrize("process", [VP(), EDM()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("seed", [1, 2])
def test_few_calls_on_smooth_mixtures(process: Process, seed: int) -> None:
    """What the page says, on mixtures that the plan was not chosen on."""
    model = mixture(4, process, seed)
    x0 = model.sample(60, seed + 10, dtype=F64)
    exact = log_likelihood(model, x0, solver=RK45(rtol=1e-7, atol=1e-8)).value
    found = log_likelihood(model, x0, nfe=20)
    bits = (found.value - exact) / (4 * math.log(2))
    assert found.nfe == 20
    assert float(bits.mean().abs()) < 0.001
    assert float(bits.abs().mean()) < 0.003


def test_probes_estimate_the_trace() -> None:
    """Exact for Rademacher probes where the Jacobian is diagonal; unbiased where it is not."""
    model = gaussian(VP())
    x0 = model.sample(3, 2, dtype=F64)
    exact = log_likelihood(model, x0, solver="heun", nfe=10).value
    one = log_likelihood(model, x0, solver="heun", nfe=10, divergence="hutchinson")
    assert torch.allclose(one.value, exact, rtol=1e-10)
    assert one.network_gradients == 10
    cov = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=F64)
    tilted = Gaussian(torch.zeros(2, dtype=F64), cov=cov, process=VP())
    exact = log_likelihood(tilted, x0, solver="heun", nfe=10).value
    several = log_likelihood(tilted, x0, solver="heun", nfe=10, divergence="hutchinson", probes=8)
    assert several.probe_error is not None
    assert bool((several.probe_error > 0).all())
    assert bool(((several.value - exact).abs() < 5 * several.probe_error).all())

    # The two pairs of directions have opposite errors: their average is exact.
    class Pairs(Augmented):
        pass

    inner = Pairs(
        tilted, (2,), "hutchinson", torch.tensor([[[1.0, 1.0], [1.0, -1.0]]], dtype=F64), 0.0
    )
    whole = Augmented(tilted, (2,), "exact", None, 0.0)
    state = torch.randn(1, 2, dtype=F64)
    both = inner(torch.cat([state, state.new_zeros(1, 2)], 1), 0.4)[:, 2:].mean()
    alone = whole(torch.cat([state, state.new_zeros(1, 1)], 1), 0.4)[:, 2]
    assert float(both) == pytest.approx(float(alone), rel=1e-12)
    # Hutch++ with a basis of all directions is exact.
    plus = log_likelihood(tilted, x0, solver="heun", nfe=10, divergence="hutch++", probes=6)
    assert torch.allclose(plus.value, exact, rtol=1e-9)
    for wrong in ({"probes": 2}, {"divergence": "hutch++", "probes": 4}):
        with pytest.raises(ValueError, match="probes"):
            log_likelihood(tilted, x0, **wrong)


def test_rows_do_not_depend_on_their_batch() -> None:
    model = mixture(3, VP())
    x0 = model.sample(5, 3, dtype=F64)
    for given in ({"solver": "heun", "nfe": 8}, {"solver": RK45(rtol=1e-4, atol=1e-4)}):
        whole = log_likelihood(model, x0, divergence="hutchinson", seeds=7, **given)
        parts = log_likelihood(model, x0, divergence="hutchinson", seeds=7, batch_size=2, **given)
        alone = log_likelihood(model, x0[3:4], divergence="hutchinson", seeds=[10], **given)
        assert torch.allclose(whole.value, parts.value, rtol=1e-9)
        assert float(whole.value[3]) == pytest.approx(float(alone.value), rel=1e-9)


def test_dequantisation_is_what_it_says() -> None:
    model = Gaussian(torch.zeros(3, dtype=F64), std=torch.tensor(0.4, dtype=F64), process=EDM())
    x0 = (
        torch.randint(60, 190, (400, 3), generator=torch.Generator().manual_seed(0)) / 127.5 - 1
    ).double()
    spacing = 2 / 255
    # The exact log-probability of the cells.
    normal = torch.distributions.Normal(torch.zeros((), dtype=F64), torch.tensor(0.4, dtype=F64))
    exact = (normal.cdf(x0 + spacing / 2) - normal.cdf(x0 - spacing / 2)).log().sum(1)
    plain = log_likelihood(model, x0, solver=RK45(rtol=1e-7, atol=1e-7))
    for kind in ("uniform", "truncated_normal"):
        found = log_likelihood(model, x0, solver=RK45(rtol=1e-7, atol=1e-7), dequantise=kind)
        assert float((found.point - x0).abs().max()) <= spacing / 2 + 1e-12
        gap = (exact - found.value).double()
        # The density is flat over a cell, so that what is lost is the share of the noise alone.
        lost = 0.0
        if kind == "truncated_normal":
            lost = 3 * (truncated_normal_entropy(0.002, spacing / 0.004) + math.log(spacing))
        assert float(gap.mean()) == pytest.approx(lost, abs=2e-3)
        assert "lower bound" in found.of
        bits = (lost - float(exact.mean())) / (3 * math.log(2))
        assert found.bits_per_dim == pytest.approx(bits, abs=1e-3)
        assert 0 < found.bits_standard_error < 0.2
    assert "density" in plain.of
    with pytest.raises(ValueError, match="-1 to 1"):
        log_likelihood(model, 3 * torch.ones(1, 3), dequantise="uniform")


def test_the_truncated_normal_has_its_entropy() -> None:
    for std, reach in ((0.002, 1.96), (0.01, 0.39), (0.0005, 7.8)):
        z = torch.linspace(-reach, reach, 200_001, dtype=F64)
        log_q = (
            -0.5 * z**2
            - 0.5 * math.log(2 * math.pi)
            - math.log(std)
            - math.log(math.erf(reach / math.sqrt(2)))
        )
        density = (log_q + math.log(std)).exp()
        integral = torch.trapezoid(density * log_q, z)
        assert truncated_normal_entropy(std, reach) == pytest.approx(float(integral), rel=1e-7)


def lost_bits(nsr: float, kind: str) -> float:
    """What dequantisation loses on a perfect model of equally likely values: bits per entry."""
    spacing = 2 / 255
    reach = spacing / (2 * nsr)
    z = torch.linspace(-reach, reach, 100_001, dtype=F64)
    peaks = -0.5 * (z.unsqueeze(1) + torch.arange(-8, 9) * 2 * reach) ** 2
    log_p = peaks.logsumexp(1) - 0.5 * math.log(2 * math.pi) - math.log(nsr)
    log_q = torch.full_like(z, -math.log(spacing))
    if kind == "truncated_normal":
        log_q = -0.5 * z**2 - 0.5 * math.log(2 * math.pi) - math.log(nsr)
        log_q = log_q - math.log(math.erf(reach / math.sqrt(2)))
    return float(torch.trapezoid(log_q.exp() * (log_q - log_p), z * nsr)) / math.log(2)


@pytest.mark.parametrize(
    ("nsr", "uniform", "truncated"),
    [
        (0.001, 2.0135, 0.0000),
        (0.002, 0.1245, 0.0088),
        (0.003, 0.0045, 0.0194),
        (0.005, 0.0000, 0.0058),
    ],
)
def test_the_table_of_the_page(nsr: float, uniform: float, truncated: float) -> None:
    assert lost_bits(nsr, "uniform") == pytest.approx(uniform, abs=6e-5)
    assert lost_bits(nsr, "truncated_normal") == pytest.approx(truncated, abs=6e-5)


def test_a_model_of_discrete_data_loses_what_the_table_says() -> None:
    """The exact denoiser of a lattice of values, from nsr = 0.002 on."""
    centres = torch.linspace(-1, 1, 256, dtype=F64).reshape(-1, 1)
    model = GaussianMixture(None, centres, std=0.0, process=EDM())
    x0 = centres[20:236:4]
    for kind in ("uniform", "truncated_normal"):
        means = []
        for seed in (0, 1000):
            found = log_likelihood(model, x0, dequantise=kind, seeds=seed)
            means.append(found.bits_per_dim - 8.0)
        error = found.bits_standard_error
        assert sum(means) / 2 == pytest.approx(lost_bits(0.002, kind), abs=4 * error + 1e-3)


def test_the_gradient_count_and_errors() -> None:
    class Constant(Denoiser):
        process, shape = VP(), (2,)

        def __call__(self, x, t, /, **condition):
            return torch.zeros_like(x)

    found = log_likelihood(
        Constant(), torch.ones(2, 2, dtype=F64), solver="ddim", nfe=5, reference_std=0.0
    )
    (s0, sigma0), (_, sigma1) = ([float(c) for c in VP().kernel(t)] for t in (1e-3, 1.0))
    # x0 = 0 always: x / sigma is constant.
    latent = s0 / sigma0
    exact = -(latent**2) - math.log(2 * math.pi) - 2 * math.log(sigma0) + 2 * math.log(s0)
    assert torch.allclose(found.value, torch.full((2,), exact, dtype=F64), rtol=1e-10)
    assert sigma1 > 0
    with pytest.raises(ValueError, match="solver of the ODE"):
        log_likelihood(gaussian(VP()), torch.zeros(1, 2), solver=DDPM(), nfe=5)
    with pytest.raises(ValueError, match="increase"):
        log_likelihood(gaussian(VP()), torch.zeros(1, 2), solver="heun", grid=[1.0, 0.5])
    with pytest.raises(ValueError, match="divergence"):
        log_likelihood(gaussian(VP()), torch.zeros(1, 2), divergence="skilling")  # type: ignore[arg-type]
