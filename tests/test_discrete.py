"""Discrete diffusion against known answers: matrices, Bayes' rule by enumeration, laws of whole
chains, and the bound of the heartbeat sequences.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from sdeflow import (
    BinaryEmpirical,
    BinomialProcess,
    CategoricalEmpirical,
    CategoricalProcess,
    harmonic_betas,
)

ROOT = Path(__file__).resolve().parent.parent


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


HEARTBEATS = torch.stack([(torch.arange(20) % 5 == phase).double() for phase in range(5)])
IDEAL = {  # bits of the ideal bound, by (rate, T)
    (0.5, 20): 2.580619,
    (0.5, 100): 2.371490,
    (0.5, 2000): 2.324382,
    (0.2, 20): 2.581335,
    (0.2, 100): 2.371789,
    (0.2, 2000): 2.324398,
}
BETAS = {
    "harmonic": harmonic_betas(7),
    "linear": torch.linspace(0.05, 0.6, 7, dtype=torch.float64),
    "cosine": 1 - f64([math.cos(math.pi / 2 * i / 8) ** 2 for i in range(1, 8)]),
}
WALK = f64(  # ordered categories that move to their neighbours
    [[0.7, 0.3, 0, 0], [0.2, 0.6, 0.2, 0], [0, 0.2, 0.6, 0.2], [0, 0, 0.3, 0.7]]
)
CHAINS = {
    "uniform": CategoricalProcess.resampling(harmonic_betas(5), [0.25] * 4),
    "skewed": CategoricalProcess.resampling([0.1, 0.2, 0.4, 0.6, 1.0], [0.1, 0.2, 0.3, 0.4]),
    "mask": CategoricalProcess.resampling(harmonic_betas(5), [0.0, 0.0, 0.0, 1.0]),
    "walk": CategoricalProcess(WALK.expand(5, 4, 4)),
}
WORDS = torch.tensor([[0, 1, 2], [2, 2, 0], [1, 0, 0]])
WEIGHTS = f64([0.5, 0.3, 0.2])


def close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0.0, atol=atol)


def all_states(k: int, dim: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(k), repeat=dim)))


def law_of(p: Tensor, states: Tensor) -> Tensor:
    """The probability of each of `states` `[S, dim]` under independent entries `[R, dim, K]`:
    `[R, S]`.
    """
    picked = p.unsqueeze(1).expand(-1, len(states), -1, -1)
    return picked.gather(-1, states.expand(len(p), -1, -1).unsqueeze(-1)).squeeze(-1).prod(-1)


def joint(process: CategoricalProcess, data: Tensor, weights: Tensor, t: int) -> Tensor:
    """P(datum, x_t) over all states, `[N, S]`, from the matrices alone."""
    power = torch.eye(process.states, dtype=torch.float64)
    for kernel in process.kernels[:t]:
        power = power @ kernel
    return weights[:, None] * law_of(power[data], all_states(process.states, data.shape[1]))


# ------------------------------------------------------------------------------ the forward process


@pytest.mark.parametrize("rate", [0.5, 0.2])
@pytest.mark.parametrize("name", sorted(BETAS))
def test_marginals_are_products_of_the_matrices(name: str, rate: float) -> None:
    betas = BETAS[name]
    process = BinomialProcess(betas, rate)
    bits = f64([[0.0], [1.0]])
    power, alpha_bar = torch.eye(2, dtype=torch.float64), 1.0
    for t, beta in enumerate(betas.tolist(), 1):
        flips = [[1 - beta * rate, beta * rate], [beta * (1 - rate), 1 - beta * (1 - rate)]]
        power = power @ torch.tensor(flips, dtype=torch.float64)
        alpha_bar *= 1 - beta
        close(process.marginal(bits, t)[:, 0], power[:, 1])
        close(process.marginal(bits, t), alpha_bar * bits + (1 - alpha_bar) * rate)
    close(process.marginal(bits, 0), bits)


def test_harmonic_betas_erase_evenly() -> None:
    process = BinomialProcess(harmonic_betas(2000), 0.2)
    t = torch.arange(2001)
    one, zero = torch.ones(2001, 1).double(), torch.zeros(2001, 1).double()
    kept = process.marginal(one, t) - process.marginal(zero, t)
    close(kept[:, 0], 1 - t.double() / 2000)
    close(process.marginal(one, 2000), torch.full_like(one, 0.2))  # nothing is left
    assert harmonic_betas(4).tolist() == [1 / 4, 1 / 3, 1 / 2, 1.0]


@pytest.mark.parametrize("name", sorted(CHAINS))
def test_transitions_compose(name: str) -> None:
    process = CHAINS[name]
    for t, later in itertools.combinations_with_replacement(range(6), 2):
        transition = process.transition(t, later)
        close(transition.sum(1), torch.ones(4).double())
        close(process.products[t] @ transition, process.products[later])


def test_a_stationary_rate_stays() -> None:
    process = CHAINS["skewed"]
    close(process.prior @ process.transition(1, 4), process.prior)
    rate = torch.full((3, 2), 0.2, dtype=torch.float64)
    close(BinomialProcess(BETAS["linear"], 0.2).marginal(rate, 5), rate)


@pytest.mark.parametrize("name", sorted(CHAINS))
def test_the_posterior_is_bayes_rule(name: str) -> None:
    """Over every x_0, x_t' and x_t, at every pair of times."""
    process = CHAINS[name]
    for t_next, t in itertools.combinations(range(6), 2):
        for a, k in itertools.product(range(4), repeat=2):
            path = process.products[t_next][a] * process.transition(t_next, t)[:, k]
            if path.sum() > 0:
                got = process.posterior(torch.tensor([[k]]), torch.tensor([[a]]), t, t_next)
                close(got[0, 0], path / path.sum())


@pytest.mark.parametrize("rate", [0.5, 0.2])
def test_the_posterior_of_bits(rate: float) -> None:
    """By enumeration, and affine in x0; times may differ within a batch."""
    process = BinomialProcess(BETAS["linear"], rate)
    cases = list(itertools.product([0.0, 1.0], [0.0, 1.0], range(7), range(1, 8)))
    cases = [case for case in cases if case[2] < case[3]]
    x0, x, t_next, t = (torch.tensor(column) for column in zip(*cases, strict=True))
    got = process.posterior(x.double()[:, None], x0.double()[:, None], t, t_next)[:, 0]
    for row, (a, b, s, u) in zip(got, cases, strict=True):
        prior = process.marginal(f64([[a]]), s)[0, 0]
        up, down = process.transition(s, u)[1, int(b)], process.transition(s, u)[0, int(b)]
        close(row, prior * up / (prior * up + (1 - prior) * down))
    p = torch.full((1, 1), 0.3, dtype=torch.float64)
    one, ends = torch.ones(1, 1).double(), [torch.zeros(1, 1).double(), torch.ones(1, 1).double()]
    low, high = (process.posterior(one, end, 5, 2) for end in ends)
    close(process.posterior(one, p, 5, 2), 0.7 * low + 0.3 * high)


# ------------------------------------------------------------------------------- the exact denoiser


@pytest.mark.parametrize("name", sorted(CHAINS))
def test_the_exact_denoiser_is_bayes_rule(name: str) -> None:
    process = CHAINS[name]
    target = CategoricalEmpirical(WORDS, process, WEIGHTS)
    states, one_hot = all_states(4, 3), torch.nn.functional.one_hot(WORDS, 4).double()
    for t in range(1, 6):
        both = joint(process, WORDS, WEIGHTS, t)
        reached = both.sum(0) > 0
        expected = torch.einsum("ns,nda->sda", both / both.sum(0), one_hot)
        close(target(states, t)[reached], expected[reached])
        assert bool(torch.isfinite(target(states, t)).all())


@pytest.mark.parametrize("rate", [0.5, 0.2])
def test_the_exact_denoiser_of_bits_is_the_expectation(rate: float) -> None:
    process = BinomialProcess(harmonic_betas(6), rate)
    data = f64([[0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    states = all_states(2, 4)
    target = BinaryEmpirical(data, process, WEIGHTS)
    for t in range(1, 7):
        both = joint(process, data.long(), WEIGHTS, t)
        close(target(states.double(), t), (both / both.sum(0)).mT @ data)
    t = torch.arange(16) % 6 + 1
    rows = torch.cat([target(states[i : i + 1].double(), int(t[i])) for i in range(16)])
    close(target(states.double(), t), rows)
    other = target.under(BinomialProcess(harmonic_betas(3), rate))
    close(other(states.double(), 2), target(states.double(), 4))


# ------------------------------------------------------------------------------- the whole chain


def reverse_law(
    process: CategoricalProcess, target: CategoricalEmpirical, nfe: int | None = None
) -> Tensor:
    """The law of the reverse process's samples over all states, by enumeration."""
    dim, bits = target.data.shape[1], isinstance(process, BinomialProcess)
    states = all_states(process.states, dim)
    law = law_of(process.prior.expand(1, dim, -1), states)[0]
    x = states.double() if bits else states
    times = process.times(nfe)
    for t, t_next in itertools.pairwise(times):
        q = process.posterior(x, target(x, t), t, t_next)
        law = law @ law_of(torch.stack([1 - q, q], -1) if bits else q, states)
    return law


def data_law(target: CategoricalEmpirical) -> Tensor:
    states = all_states(target.process.states, target.data.shape[1])
    same = (states[None] == target.data.long()[:, None]).all(-1).double()
    return target.weights @ same


def test_one_entry_is_reversed_exactly() -> None:
    """With one entry nothing is lost: the reverse process returns the data law to rounding."""
    for process in CHAINS.values():
        if process is not CHAINS["walk"]:  # its noise still knows the data
            target = CategoricalEmpirical(torch.tensor([[0], [1], [2]]), process, WEIGHTS)
            for nfe in (1, 2, 5):
                close(reverse_law(process, target, nfe), data_law(target))
    bits = BinomialProcess(harmonic_betas(9), 0.2)
    target = BinaryEmpirical(torch.tensor([[0.0], [1.0], [1.0]]), bits, WEIGHTS)
    close(reverse_law(bits, target, 4), f64([0.5, 0.5]))


@pytest.mark.parametrize("kind", ["binary", "uniform", "mask"])
def test_the_reverse_process_tends_to_the_data_law(kind: str) -> None:
    """Entries that change in the same step lose their dependence: total variation falls with T, and
    halves when T doubles.
    """

    def distance(steps: int) -> float:
        betas = harmonic_betas(steps)
        if kind == "binary":
            bits = BinomialProcess(betas, 0.2)
            data = f64([[0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
            target: CategoricalEmpirical = BinaryEmpirical(data, bits, WEIGHTS)
        else:
            rates = [0.25] * 4 if kind == "uniform" else [0.0, 0.0, 0.0, 1.0]
            target = CategoricalEmpirical(
                WORDS, CategoricalProcess.resampling(betas, rates), WEIGHTS
            )
        law = reverse_law(target.process, target)
        close(law.sum(), f64(1.0))
        return float((law - data_law(target)).abs().sum() / 2)

    coarse, middle, fine = distance(10), distance(100), distance(200)
    assert fine < middle < coarse
    assert 1.8 < middle / fine < 2.2


def test_one_step_loses_the_dependence() -> None:
    """A single step draws every entry by itself: the product of the marginals."""
    target = CategoricalEmpirical(WORDS, CHAINS["uniform"], WEIGHTS)
    means = torch.einsum("n,nda->da", WEIGHTS, torch.nn.functional.one_hot(WORDS, 4).double())
    close(reverse_law(CHAINS["uniform"], target, 1), law_of(means[None], all_states(4, 3))[0])


@pytest.mark.parametrize("name", ["uniform", "skewed", "walk"])
def test_the_reverse_step_has_the_exact_marginals(name: str) -> None:
    """q(x_t'_i | x_t) by enumeration, for every state and entry. Austin et al. 2021, equation 4,
    leaves out the division by q(x_t | x_0): with P(x_0 | x_t) in it, it is another distribution.
    """
    process, states = CHAINS[name], all_states(4, 3)
    target = CategoricalEmpirical(WORDS, process, WEIGHTS)
    t, t_next = 4, 2
    both = joint(process, WORDS, WEIGHTS, t_next)  # datum, x_t'
    later = law_of(process.transition(t_next, t)[states], states)  # x_t', x_t
    given = both.sum(0)[:, None] * later
    given = given / given.sum(0)
    one_hot = torch.nn.functional.one_hot(states, 4).double()
    expected = torch.einsum("jk,jda->kda", given, one_hot)
    p = target(states, t)
    close(process.posterior(states, p, t, t_next), expected)
    theirs = process.transition(t_next, t).mT[states] * (p @ process.products[t_next])
    theirs = theirs / theirs.sum(-1, keepdim=True)
    assert float((theirs - expected).abs().sum(-1).max() / 2) > 0.1


# ------------------------------------------------------------------------------------- the bound


def exact_bound(process: CategoricalProcess, target: CategoricalEmpirical) -> float:
    """The bound over all states and data, in bits: KL of q(x_{t-1} | x_t, x_0) by enumeration."""
    dim = target.data.shape[1]
    states, total = all_states(process.states, dim), 0.0
    for t in range(1, process.steps + 1):
        both = joint(process, target.data.long(), target.weights, t)
        p = process.posterior(states, target(states, t), t, t - 1)
        for datum, mass in zip(target.data, both, strict=True):
            q = process.posterior(states, datum.expand(len(states), -1), t, t - 1)
            terms = torch.where(q > 0, q * (q / p).log(), 0.0).flatten(1).sum(1)
            total += float((mass * torch.where(mass > 0, terms, 0.0)).sum())
    return total / math.log(2)


def entropy(weights: Tensor) -> float:
    return float(-(weights * weights.log2()).sum())


@pytest.mark.parametrize("name", ["uniform", "mask", "skewed"])
def test_the_bound_of_categories(name: str) -> None:
    """Monte Carlo and enumeration agree within 4 standard errors, and lie above the entropy."""
    process = CHAINS[name]
    target = CategoricalEmpirical(WORDS, process, WEIGHTS)
    expected = exact_bound(process, target)
    assert expected > entropy(WEIGHTS) + 0.05
    x0 = WORDS[torch.tensor([0] * 10 + [1] * 6 + [2] * 4)].repeat(400, 1)
    bound = process.bound(target, x0)
    assert bound.terms.shape == (8000, 5)
    assert abs(bound.mean - expected) < 4 * bound.standard_error < 0.2
    some = process.bound(target, x0, draws=2, seeds=range(9000, 17000))
    assert some.terms.shape == (8000, 2)
    assert abs(some.mean - expected) < 4 * some.standard_error < 0.2
    close(bound.prior, torch.zeros(8000).double())


@pytest.mark.parametrize("name", ["uniform", "mask", "skewed"])
def test_where_the_ideal_bound_is_lost(name: str) -> None:
    """The ideal bound is the entropy, and what the entries of x_{t-1} know of each other given x_t.
    The likelihood of its samples lies between.
    """
    process, states = CHAINS[name], all_states(4, 3)
    target = CategoricalEmpirical(WORDS, process, WEIGHTS)
    lost = 0.0
    for t in range(1, 6):
        both = joint(process, WORDS, WEIGHTS, t - 1).sum(0)[:, None] * law_of(
            process.kernels[t - 1][states], states
        )
        reached = both.sum(0) > 0
        given = (both[:, reached] / both[:, reached].sum(0)).mT  # x_t, x_{t-1}
        one_hot = torch.nn.functional.one_hot(states, 4).double()
        alone = law_of(torch.einsum("kj,jda->kda", given, one_hot), states)
        information = torch.xlogy(given, given) - torch.xlogy(given, alone)
        lost += float(both.sum(0)[reached] @ information.sum(1)) / math.log(2)
    bound = exact_bound(process, target)
    assert bound == pytest.approx(entropy(WEIGHTS) + lost, abs=1e-9)
    law = reverse_law(process, target)
    place = (WORDS * torch.tensor([16, 4, 1])).sum(1)
    likelihood = float(-(WEIGHTS * law[place].log2()).sum())
    assert entropy(WEIGHTS) + 0.05 < likelihood < bound - 0.1
    if name == "uniform":  # as docs/theory/discrete.md says
        assert [f"{bits:.4f}" for bits in (bound, likelihood)] == ["2.0487", "1.7067"]


def test_signal_at_the_end_is_paid_for() -> None:
    process = BinomialProcess(BETAS["linear"], 0.3)
    x0 = f64([[0.0, 1.0]])
    p = process.marginal(x0, 7)[0]
    rate = f64([0.3, 0.3])
    kl = p * (p / rate).log2() + (1 - p) * ((1 - p) / (1 - rate)).log2()
    prior = process.bound(BinaryEmpirical(x0, process), x0).prior
    close(prior, kl.sum()[None])


def ideal_bits(process: BinomialProcess, last: int = 0) -> float:
    """The ideal bound of the heartbeats, exactly; with `last`, its terms up to this time alone.

    The posterior over the five phases knows x_t only by the number of ones in each residue class
    of the bins modulo 5, so 5^5 states stand for 2^20; the phases are alike, so one datum does.
    """
    target = BinaryEmpirical(HEARTBEATS, process)
    counts = all_states(5, 5)
    # One representative each: class g has its ones first. Bin i is in class i % 5.
    x = (torch.arange(20) // 5 < counts[:, torch.arange(20) % 5]).double()
    x0, total = HEARTBEATS[:1].expand(len(x), -1), 0.0
    ways = f64([math.comb(4, c) for c in range(5)]).log()[counts].sum(1)
    for t in range(1, (last or process.steps) + 1):
        one = process.marginal(x0[:1], t)
        mass = (ways + (x * one.log() + (1 - x) * (1 - one).log()).sum(1)).exp()
        assert abs(float(mass.sum()) - 1) < 1e-9
        q, p = (process.posterior(x, v, t, t - 1) for v in (x0, target(x, t)))
        p = p.clamp(1e-300, 1.0)
        rest = (1 - p).clamp_min(1e-300)
        kl = torch.xlogy(q, q / p) + torch.xlogy(1 - q, (1 - q) / rest)
        total += float(mass @ kl.sum(1))
    return total / math.log(2)


@pytest.mark.parametrize("rate", [0.5, 0.2])
@pytest.mark.parametrize("steps", [20, 100])
def test_the_ideal_bound_of_the_heartbeats(steps: int, rate: float) -> None:
    process = BinomialProcess(harmonic_betas(steps), rate)
    assert ideal_bits(process) == pytest.approx(IDEAL[rate, steps], abs=1e-6)


def test_the_table_of_betas_matters() -> None:
    """Ideal bounds at T = 20 and rate 0.5; the constant table also pays for its prior."""
    assert ideal_bits(BinomialProcess(harmonic_betas(20)), last=1) == pytest.approx(
        0.00096, abs=1e-5
    )
    kept = f64([math.cos(math.pi * t / 40) for t in range(20)] + [0.0])
    for alpha_bar, bits in ((kept, 2.6500), (kept**2, 2.7031)):
        process = BinomialProcess(1 - alpha_bar[1:] / alpha_bar[:-1])
        assert ideal_bits(process) == pytest.approx(bits, abs=1e-4)
    process = BinomialProcess([0.2] * 20)
    prior = process.bound(BinaryEmpirical(HEARTBEATS, process), HEARTBEATS, draws=1).prior
    assert float(prior.mean()) == pytest.approx(0.0019, abs=1e-4)
    assert ideal_bits(process) + float(prior.mean()) == pytest.approx(3.1308, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.5, 0.2])
def test_the_ideal_bound_of_the_papers_chain(rate: float) -> None:
    process = BinomialProcess(harmonic_betas(2000), rate)
    assert ideal_bits(process) == pytest.approx(IDEAL[rate, 2000], abs=1e-6)


def test_the_bound_of_the_heartbeats() -> None:
    """`bound` finds the exact number, at T = 100 and on 20 times of the long chain."""
    x0 = HEARTBEATS.repeat(200, 1)
    process = BinomialProcess(harmonic_betas(100))
    bound = process.bound(BinaryEmpirical(HEARTBEATS, process), x0)
    assert abs(bound.mean - IDEAL[0.5, 100]) < 4 * bound.standard_error < 0.2
    process = BinomialProcess(harmonic_betas(2000), 0.2)
    bound = process.bound(BinaryEmpirical(HEARTBEATS, process), x0, nfe=20)
    assert abs(bound.mean - IDEAL[0.2, 20]) < 4 * bound.standard_error < 0.2


def test_a_worse_denoiser_costs_the_divergence() -> None:
    """A denoiser that knows the marginals alone pays the entropy of 20 independent bits: the chain
    then is a code of each bit by itself.
    """
    process = BinomialProcess(harmonic_betas(50))

    def alone(x: Tensor, t: Tensor) -> Tensor:
        kept = (1 - t.double() / 50)[:, None]
        one = 0.2 * torch.where(x == 1, (1 + kept) / 2, (1 - kept) / 2)
        zero = 0.8 * torch.where(x == 1, (1 - kept) / 2, (1 + kept) / 2)
        return one / (one + zero)

    bound = process.bound(alone, HEARTBEATS.repeat(200, 1))
    bits = 20 * entropy(f64([0.2, 0.8]))
    assert abs(bound.mean - bits) < 4 * bound.standard_error < 0.4


def test_the_loss_is_the_bound_at_a_random_time() -> None:
    process = BinomialProcess(harmonic_betas(30), 0.2)
    target = BinaryEmpirical(HEARTBEATS, process)
    x0 = HEARTBEATS.repeat(2000, 1)
    loss = process.loss(target, x0, generator=torch.Generator().manual_seed(0))
    expected = ideal_bits(process)
    error = float(loss.std() / 100)
    assert abs(float(loss.mean()) - expected) < 4 * error < 0.3
    # At T every phase is as likely: the cross-entropy is that of the marginals.
    t = torch.full((5,), 30)
    both, plain = (
        process.loss(target, HEARTBEATS, t, torch.Generator().manual_seed(1), auxiliary=weight)
        for weight in (2.0, 0.0)
    )
    bits = 20 * entropy(f64([0.2, 0.8]))
    close(both - plain, torch.full((5,), 2 * bits, dtype=torch.float64))


def test_the_loss_is_least_at_the_exact_denoiser() -> None:
    """The gradient with respect to the logits of a table vanishes at Bayes' rule."""
    process = BinomialProcess(harmonic_betas(4), 0.3)
    data = f64([[0.0, 1.0], [1.0, 1.0]])
    target = BinaryEmpirical(data, process)
    states = all_states(2, 2)
    total = torch.zeros((), dtype=torch.float64)
    t = 2
    p = target(states.double(), t).clamp(1e-12, 1 - 1e-12)
    logits = (p.log() - (1 - p).log()).requires_grad_()
    both = joint(process, data.long(), f64([0.5, 0.5]), t)
    step = process.transition(t - 1, t)[None]
    now, later = torch.tensor([t]), torch.tensor([t - 1])
    for datum, mass in zip(data, both, strict=True):
        truth = process._probabilities(datum.expand(4, -1))
        guess = process._probabilities(torch.sigmoid(logits))
        total = total + mass @ process._term(states.double(), truth, guess, step, now, later)
    (gradient,) = torch.autograd.grad(total, logits)
    close(gradient, torch.zeros_like(gradient), atol=1e-10)


def test_a_saturated_network_is_trained_and_finite() -> None:
    process = BinomialProcess(harmonic_betas(10))
    logits = torch.full((20,), 40.0, requires_grad=True)
    network = lambda x, t: torch.sigmoid(logits).expand_as(x)  # noqa: E731
    loss = process.loss(network, HEARTBEATS, torch.tensor([1, 2, 5, 9, 10])).sum()
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())


# ------------------------------------------------------------------------------------ sampling


def test_samples_are_heartbeats() -> None:
    process = BinomialProcess(harmonic_betas(2000))
    target = BinaryEmpirical(HEARTBEATS, process)
    x = process.sample(target, n=250, nfe=400)
    assert x.shape == (250, 20)
    assert x.dtype == torch.float32
    match = (x.double()[:, None] == HEARTBEATS).all(-1)
    # 400 steps: the law's mass off the data is below 0.07 (it is bounded by the gap of the bound).
    assert float(match.any(1).double().mean()) > 0.9
    phases = match.double().mean(0)
    assert float((phases - 0.2).abs().max()) < 4 * math.sqrt(0.2 * 0.8 / 250)


def test_categories_are_sampled_by_their_law() -> None:
    process = CHAINS["uniform"]
    target = CategoricalEmpirical(WORDS, process, WEIGHTS)
    x = process.sample(target, n=4000, seeds=7)
    assert x.dtype == torch.int64
    place = (x * torch.tensor([16, 4, 1])).sum(1)
    found = torch.bincount(place, minlength=64).double() / 4000
    law = reverse_law(process, target)
    assert float(((found - law) / (law * (1 - law) / 4000).sqrt().clamp_min(1e-4)).abs().max()) < 5


def test_a_row_depends_on_its_seed_alone() -> None:
    process = BinomialProcess(harmonic_betas(40), 0.2)
    target = BinaryEmpirical(HEARTBEATS, process)
    whole = process.sample(target, seeds=[3, 1, 4, 15], trajectory=True)
    assert whole.shape == (41, 4, 20)
    assert torch.equal(process.sample(target, seeds=[15, 1]), whole[-1, [3, 1]])
    x0 = HEARTBEATS[:4]
    noisy = process.perturb(x0, 20, seeds=[3, 1, 4, 15])
    assert torch.equal(noisy[2:3], process.perturb(x0[2:3], 20, seeds=4))
    bound = process.bound(target, x0, draws=7, seeds=[3, 1, 4, 15]).total
    close(bound[2:3], process.bound(target, x0[2:3], draws=7, seeds=[4]).total)


def test_perturb_draws_the_marginal() -> None:
    process = BinomialProcess(harmonic_betas(10), 0.2)
    x0 = torch.tensor([[0.0, 1.0]]).expand(20000, 2)
    for draw in (
        process.perturb(x0, 4, seeds=0),
        process.perturb(x0, 4, generator=torch.Generator().manual_seed(0)),
    ):
        assert draw.dtype == torch.float32
        found, p = draw.double().mean(0), process.marginal(x0[:1], 4)[0]
        assert float(((found - p) / (p * (1 - p) / 20000).sqrt()).abs().max()) < 4
    words = CHAINS["walk"].perturb(WORDS, torch.tensor([0, 0, 5]), seeds=1)
    assert torch.equal(words[:2], WORDS[:2])
    assert words.dtype == torch.int64


def test_a_condition_reaches_the_denoiser() -> None:
    """With the phase given, the ideal denoiser is the datum, and nothing is left to pay."""
    process = BinomialProcess(harmonic_betas(12))

    def told(x: Tensor, t: Tensor, phase: Tensor) -> Tensor:
        return HEARTBEATS[phase]

    phase = torch.tensor([4, 0, 2])
    x = process.sample(told, n=3, shape=(20,), phase=phase)
    assert torch.equal(x.double(), HEARTBEATS[phase])
    close(process.bound(told, HEARTBEATS[phase], phase=phase).total, torch.zeros(3).double())


# ------------------------------------------------------------------------------ a trained network


@pytest.fixture(scope="module")
def heartbeat(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("quality.heartbeat")


def test_the_measured_bound_is_between_the_ideal_and_the_papers() -> None:
    """The committed result of `benchmarks/quality/heartbeat.py`."""
    measured = json.loads((ROOT / "benchmarks/results/heartbeat.json").read_text())
    assert measured["settings"]["steps"] == 2000
    assert "heartbeat" in measured["provenance"]["command"]
    assert [result["rate"] for result in measured["results"]] == [0.5, 0.2]
    for result in measured["results"]:
        error = result["standard_error"]
        assert 0 < error < 0.005
        assert IDEAL[result["rate"], 2000] < result["bits"] < 2.414 - 2 * error
        assert result["heartbeats"] > 0.95
        assert 0.1 < result["rarest_phase"] <= result["commonest_phase"] < 0.3


def test_a_network_learns(heartbeat: ModuleType) -> None:
    """On a short chain, in a second: better than independent bits, which cost 14.4."""
    process = BinomialProcess(harmonic_betas(50))
    network = heartbeat.train(process, 150)
    bound = process.bound(network, HEARTBEATS.float().repeat(40, 1), draws=25)
    assert bound.mean + 4 * bound.standard_error < 10.0


@pytest.mark.slow
def test_a_trained_network_beats_the_papers_bound(heartbeat: ModuleType) -> None:
    process = BinomialProcess(harmonic_betas(2000))
    result = heartbeat.judge(process, heartbeat.train(process, 3000), 700, 100)
    assert result["standard_error"] < 0.005
    assert IDEAL[0.5, 2000] - 3 * result["standard_error"] < result["bits"] < 2.414
    assert result["heartbeats"] > 0.9


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda p: BinomialProcess([0.1, 1.5]), "betas are probabilities"),
        (lambda p: BinomialProcess([0.1], rate=1.0), "probability of a 1"),
        (lambda p: CategoricalProcess(torch.ones(2, 3, 3)), "must be distributions"),
        (lambda p: CategoricalProcess(torch.eye(2)), "kernels has shape"),
        (lambda p: CategoricalProcess(torch.eye(2)[None], [1.0]), "prior has shape"),
        (lambda p: harmonic_betas(0), "at least 1"),
        (lambda p: p.marginal(HEARTBEATS, 11), "integers from 0"),
        (lambda p: p.marginal(HEARTBEATS, 0.5), "integers from 0"),
        (lambda p: p.marginal(2 * HEARTBEATS - 1, 1), "bits are 0 or 1"),
        (lambda p: p.transition(3, 2), "noisier"),
        (lambda p: p.perturb(HEARTBEATS, 1), "seeds"),
        (lambda p: p.times(11), "from 1 to 10"),
        (lambda p: p.sample(lambda x, t: x, n=2), "shape"),
        (lambda p: p.sample(lambda x, t: x, n=2, seeds=[1], shape=(20,)), "1 seeds for 2"),
        (lambda p: p.bound(lambda x, t: x[:, :3], HEARTBEATS), "returned probabilities"),
        (lambda p: p.bound(lambda x, t: x, HEARTBEATS, draws=0), "draws"),
        (lambda p: p.loss(lambda x, t: x, HEARTBEATS, torch.tensor([0])), "from 1 to 10"),
        (lambda p: BinaryEmpirical(torch.ones(0, 3), p), "at least 1"),
        (lambda p: BinaryEmpirical(HEARTBEATS / 2, p), "not probabilities"),
        (lambda p: BinaryEmpirical(HEARTBEATS, p, [1.0]), "weights"),
        (lambda p: CHAINS["mask"].marginal(torch.tensor([[4]]), 1), "integers from 0 to 3"),
        (lambda p: CHAINS["mask"].marginal(torch.rand(2, 3), 1), "last axis of 4"),
    ],
)
def test_bad_input_is_refused(call: Callable[[BinomialProcess], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call(BinomialProcess(harmonic_betas(10)))


def test_wrong_kinds_are_refused() -> None:
    with pytest.raises(TypeError, match="BinomialProcess"):
        BinaryEmpirical(HEARTBEATS, CHAINS["mask"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="data are states"):
        CHAINS["mask"].perturb(torch.full((2, 3, 4), 0.25), 1, seeds=0)
    assert repr(BinomialProcess([0.5, 1.0], 0.2)) == "BinomialProcess(steps=2, rate=0.2)"
    assert repr(CHAINS["mask"]) == "CategoricalProcess(steps=5, states=4)"
