"""The variational bound on Gaussian data, where it is known in closed form: its terms are quadratic
in data and noise, so that an average over the points (+-c, +-1) is the expectation.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

import sdeflow
from sdeflow import (
    EDM,
    VP,
    Cosine,
    Gaussian,
    LearnedBetas,
    Noise,
    Optimal,
    Process,
    RectifiedFlow,
    betas,
    variational_bound,
)
from sdeflow._utils.gaussian import discretised_nll, divergence, gaussian_nll

F64 = torch.float64
Prediction = partial(sdeflow.Prediction, time="continuous")
C = 0.5
X0 = C * torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], dtype=F64)


class Signs(Noise):
    """The noise of the cubature rule: each of +-1 with each datum, at every draw."""

    def __init__(self) -> None:
        super().__init__(range(4), (1,), dtype=F64)

    def draw(self, nsr=None, nsr_next=None, *, out=None) -> Tensor:
        return torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=F64)


def target(process: Process, c: float = C) -> Gaussian:
    return Gaussian(torch.zeros(1, dtype=F64), std=torch.tensor(c, dtype=F64), process=process)


def moment(nsr: float) -> float:
    return nsr**2 / (nsr**2 + C**2)


def known(process: Process, t: float, prior_std: float) -> float:
    """Entropy of the data and KL(p(x_N) || N(0, prior_std^2))."""
    s, sigma = (float(c) for c in process.kernel(t))
    ratio = (s**2 * C**2 + sigma**2) / prior_std**2
    return 0.5 * math.log(2 * math.pi * math.e * C**2) + 0.5 * (ratio - 1 - math.log(ratio))


TABLES = [
    betas.linear(1, 0.5, 0.5),
    betas.linear(2, 0.1, 0.5),
    betas.linear(25, reference=1000),
    betas.cosine(60),
    betas.linear(1000),
]


@pytest.mark.parametrize("prior_std", [None, 1.0, 0.7])
@pytest.mark.parametrize("table", TABLES, ids=len)
def test_with_optimal_variances_the_total_is_known_at_any_number_of_steps(
    table: Tensor, prior_std: float | None
) -> None:
    process = Process.from_betas(table)
    bound = variational_bound(
        target(process),
        X0,
        variance=Optimal(moment),
        decoder="gaussian",
        prior_std=prior_std,
        noise=Signs(),
    )
    exact = known(process, 1.0, process.prior_std if prior_std is None else prior_std)
    assert float(bound.mean) == pytest.approx(exact, rel=1e-9, abs=1e-9)
    assert bound.terms.shape == (4, len(table) - 1)
    assert bound.bits_per_dim == pytest.approx(exact / math.log(2), rel=1e-9)


@pytest.mark.parametrize("process", [VP(), Cosine(), EDM(), RectifiedFlow(t_max=0.999)], ids=str)
def test_any_process_and_any_times(process: Process) -> None:
    times = torch.linspace(process.t_min, process.t_max, 7, dtype=F64)
    model = target(process)
    best = variational_bound(
        model, X0, times=times, variance=Optimal(moment), decoder="gaussian", noise=Signs()
    )
    assert float(best.mean) == pytest.approx(
        known(process, process.t_max, process.prior_std), rel=1e-9
    )
    for other in ("small", "large", Optimal(nsr=(1e-9, 1e9), error=(0.1, 0.1))):
        worse = variational_bound(
            model, X0, times=times, variance=other, decoder="gaussian", noise=Signs()
        )
        assert float(worse.mean) > float(best.mean)
        assert torch.equal(worse.prior, best.prior)


def test_terms_are_the_papers() -> None:
    """DDPM's weight beta^2 / (2 v alpha (1 - alpha_bar)) of |eps - eps_hat|^2, with v = beta tilde."""
    b = betas.linear(30, 1e-3, 0.2)
    kept = torch.cumprod(1 - b, 0)
    process = Process.from_betas(b)
    bound = variational_bound(
        target(process), X0, variance="small", decoder="gaussian", noise=Signs()
    )
    for k in range(29):
        i = 29 - k  # counted from 0
        tilde = (1 - kept[i - 1]) / (1 - kept[i]) * b[i]
        weight = b[i] ** 2 / (2 * tilde * (1 - b[i]) * (1 - kept[i]))
        wrong = kept[i] * C**2 / (kept[i] * C**2 + 1 - kept[i])  # of eps
        assert float(bound.terms[:, k].mean()) == pytest.approx(float(weight * wrong), rel=1e-9)
    # The decoder: mean x0_hat, variance beta tilde of the second entry.
    tilde = (1 - kept[0]) / (1 - kept[1]) * b[1]
    error = C**2 * (1 - kept[0]) / (kept[0] * C**2 + 1 - kept[0])
    exact = 0.5 * (error / tilde + torch.log(2 * math.pi * tilde))
    assert float(bound.decoder.mean()) == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize("process", [VP(), EDM(), RectifiedFlow(), Cosine()], ids=str)
def test_the_continuous_form_is_exact_where_its_proposal_is(process: Process) -> None:
    """For the data's own standard deviation the integrand does not vary: any draw gives the limit."""
    model = target(process)
    for draws in (1, 3):
        bound = variational_bound(
            model,
            X0,
            times="continuous",
            variance=Optimal(moment),
            decoder="gaussian",
            proposal_std=C,
            draws=draws,
            noise=Signs(),
        )
        s, _sigma = (float(c) for c in process.kernel(process.t_max))
        exact = known(process, process.t_max, process.prior_std)
        # Where no signal is left the integral starts at nsr = 1e4.
        assert float(bound.mean) == pytest.approx(exact, abs=2e-8 if s else 1e-7)
    many = variational_bound(
        model,
        X0,
        times=process.t_of_nsr(torch.logspace(-2.5, 1.5, 3000, dtype=F64)),
        decoder="gaussian",
        variance="small",
        noise=Signs(),
    )
    ends = process.t_of_nsr(torch.tensor([10**-2.5, 10**1.5], dtype=F64)).tolist()
    inner = type(process)(t_min=ends[0], t_max=ends[1])
    limit = variational_bound(
        target(inner), X0, times="continuous", proposal_std=C, decoder="gaussian", noise=Signs()
    )
    assert float(many.terms.sum(1).mean()) == pytest.approx(
        float(limit.terms.sum(1).mean()), rel=1e-2
    )


def test_a_wrong_proposal_has_no_bias_but_a_standard_error() -> None:
    model, n = target(VP()), 4000
    x0 = torch.randn(n, 1, dtype=F64, generator=torch.Generator().manual_seed(0)) * C
    first = variational_bound(
        model, x0, times="continuous", proposal_std=C, decoder="gaussian", variance="large"
    )
    for std, draws in ((2.0, 1), (None, 2)):
        other = variational_bound(
            model,
            x0,
            times="continuous",
            proposal_std=std,
            draws=draws,
            decoder="gaussian",
            variance="large",
            seeds=10_000,
        )
        error = math.hypot(first.standard_error, other.standard_error)
        assert abs(first.bits_per_dim - other.bits_per_dim) < 4 * error
        assert other.standard_error > first.standard_error
        assert other.terms.shape == (n, draws)


def test_a_selection_of_terms_has_no_bias() -> None:
    """Averaged over all positions of the random start the selection is the sum of all terms."""
    process = Process.from_betas(betas.linear(40, 1e-3, 0.3))
    model = target(process)
    whole = variational_bound(model, X0, decoder="gaussian", noise=Signs())

    class Placed(Signs):
        place = 0.0
        first = True

        def draw(self, nsr=None, nsr_next=None, *, out=None):
            if self.first:
                self.first = False
                return torch.special.ndtri(torch.full((4, 1), self.place, dtype=F64))
            return super().draw()

    totals = []
    for k in range(10):
        noise = Placed()
        noise.place = (k + 0.5) / 10
        some = variational_bound(model, X0, decoder="gaussian", noise=noise, draws=4)
        assert some.terms.shape == (4, 4)
        totals.append(some.terms.sum(1).mean())
    # 39 terms over 4 x 10 places: the last place of each stretch repeats a term.
    assert float(torch.stack(totals).mean()) == pytest.approx(
        float(whole.terms.sum(1).mean()), rel=0.05
    )
    with pytest.raises(ValueError, match="1 to 39"):
        variational_bound(model, X0, draws=40)


def test_a_learned_variance_meets_the_optimal_one() -> None:
    b = betas.linear(30, 1e-3, 0.2)
    process, optimal = Process.from_betas(b), Optimal(moment)

    def network(x: Tensor, t: Tensor) -> Tensor:
        i = int((t[0] * 30).round())
        s, sigma = (float(c) for c in process.kernel(i / 30))
        eps = sigma * x / (s**2 * C**2 + sigma**2)
        j = max(i, 2)
        s_j, sigma_j = (float(c) for c in process.kernel(j / 30))
        s_n, sigma_n = (float(c) for c in process.kernel((j - 1) / 30))
        lost = 1 - (sigma_n * s_j / (s_n * sigma_j)) ** 2
        small = sigma_n**2 * lost
        large = sigma_j**2 * lost if i > 1 else sigma**2
        error = optimal.mean_squared_error(sigma / s)
        v = small + (s_n * lost) ** 2 * error if i > 1 else error
        w = 2 * math.log(v / small) / math.log(large / small) - 1
        return torch.cat([eps, torch.full_like(eps, w)], 1)

    model = Prediction(network, "eps", process, learned_variance=True, shape=(1,))
    learned = variational_bound(model, X0, variance="learned", decoder="gaussian", noise=Signs())
    assert float(learned.mean) == pytest.approx(known(process, 1.0, process.prior_std), rel=1e-6)
    with pytest.raises(ValueError, match="learned_variance"):
        variational_bound(target(process), X0, variance="learned")


def test_betas_are_learned_by_the_bound() -> None:
    class Ideal(Gaussian):
        """Exact on a process whose table is trained: gradients flow through its numbers."""

        def __call__(self, x, t, /, **condition):
            s, sigma = self.process.kernel(torch.as_tensor(t, dtype=F64))
            return s * C**2 / (s**2 * C**2 + sigma**2) * x

    process = LearnedBetas(betas.linear(6, 0.05, 0.6))
    assert torch.allclose(process.betas, betas.linear(6, 0.05, 0.6))
    t = torch.arange(1, 7, dtype=F64) / 6
    assert torch.allclose(process.s(t), process.frozen().s(t), rtol=1e-12)
    model = Ideal(torch.zeros(1, dtype=F64), std=torch.tensor(C, dtype=F64), process=process)

    def total() -> Tensor:
        return variational_bound(
            model,
            X0,
            decoder="gaussian",
            variance="large",
            prior_std=1.0,
            noise=Signs(),
            requires_grad=True,
        ).mean

    (slope,) = torch.autograd.grad(total(), process.logits)
    for i in (0, 3, 5):
        step = torch.zeros(6, dtype=F64)
        step[i] = 1e-5
        with torch.no_grad():
            process.logits += step
            up = float(total().detach())
            process.logits -= 2 * step
            down = float(total().detach())
            process.logits += step
        assert float(slope[i]) == pytest.approx((up - down) / 2e-5, rel=1e-5)
    before = float(total().detach())
    optimiser = torch.optim.Adam([process.logits], 0.1)
    for _ in range(150):
        optimiser.zero_grad()
        total().backward()
        optimiser.step()
    after = float(total().detach())
    entropy = 0.5 * math.log(2 * math.pi * math.e * C**2)
    assert entropy < after < before - 1e-3
    frozen = variational_bound(
        target(process.frozen()),
        X0,
        decoder="gaussian",
        variance="large",
        prior_std=1.0,
        noise=Signs(),
    )
    assert float(frozen.mean) == pytest.approx(after, rel=1e-9)


def test_the_decoder_is_a_distribution() -> None:
    values = torch.linspace(-1, 1, 256, dtype=F64)
    for mean, log_variance in ((0.0, -3.0), (0.97, -6.0), (-3.0, -1.0), (0.3, -14.0)):
        mass = torch.exp(
            -discretised_nll(values, torch.full((256,), mean, dtype=F64), log_variance)
        )
        assert float(mass.sum()) == pytest.approx(1.0, abs=1e-8)
    wide = discretised_nll(values[100], torch.tensor(0.0, dtype=F64), 2.0)
    density = gaussian_nll(values[100], torch.tensor(0.0, dtype=F64), 2.0)
    assert float(wide) == pytest.approx(float(density) - math.log(2 / 255), rel=1e-6)
    same = divergence(torch.zeros(1, dtype=F64), 0.3, 0.3)
    assert float(same) == 0.0
    bound = variational_bound(
        target(Process.from_betas(TABLES[2]), 0.5), (values[::32].reshape(-1, 1)), seeds=1
    )
    assert bound.decoder.shape == (8,)
    assert bound.standard_error > 0
    assert "bits/dim" in str(bound)


def test_what_is_missing_is_told() -> None:
    with pytest.raises(ValueError, match="continuous"):
        variational_bound(target(VP()), X0)
    with pytest.raises(ValueError, match="decoder"):
        variational_bound(target(VP()), X0, times=[1.0, 0.5], decoder="normal")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="variance"):
        variational_bound(target(VP()), X0, times=[1.0, 0.5], variance="middle")  # type: ignore[arg-type]
