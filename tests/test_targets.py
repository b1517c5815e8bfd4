"""Targets: exact denoisers against autograd, brute force, Monte Carlo, and the invariances they
must have.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from sdeflow.process import EDM, VE, VP, Cosine, Process, RectifiedFlow, SubVP
from sdeflow.targets import Empirical, Gaussian, GaussianMixture, Target

PROCESSES = [VP(), SubVP(), Cosine(), VE(), EDM(), RectifiedFlow()]
D = 5


def rand(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spd(*batch: int, seed: int = 0) -> Tensor:
    root = rand(*batch, D, D, seed=seed)
    return root @ root.mT / D + 0.01 * torch.eye(D, dtype=torch.float64)


def make(name: str, process: Process | None = None) -> Target:
    """One target of every kind, of dimension 5; covariances differ between components."""
    means, weights = 2 * rand(3, D, seed=1), [0.2, 0.3, 0.5]
    match name:
        case "scalar":
            return GaussianMixture(weights, means, std=0.3, process=process)
        case "per component":
            return GaussianMixture(weights, means, std=[0.3, 1.0, 0.05], process=process)
        case "diagonal":
            return GaussianMixture(weights, means, std=rand(3, D, seed=2).abs(), process=process)
        case "full":
            return GaussianMixture(weights, means, cov=spd(3), process=process)
        case "shared":
            return GaussianMixture(weights, means, cov=spd(), process=process)
        case "low-rank":
            diag = 0.02 + rand(3, D, seed=4).abs() / 10
            return GaussianMixture(
                weights, means, factor=rand(3, D, 2, seed=3), diag=diag, process=process
            )
        case "gaussian":
            return Gaussian(means[0], cov=spd(seed=5), process=process)
        case "gaussian low-rank":
            return Gaussian(means[0], factor=rand(D, 2, seed=3), diag=0.01, process=process)
        case "empirical":
            return Empirical(rand(40, D, seed=6), 0.2, process=process, chunk=7)
    raise AssertionError(name)


NAMES = [
    *("scalar", "per component", "diagonal", "full", "shared", "low-rank"),
    *("gaussian", "gaussian low-rank", "empirical"),
]


def components(target: Target) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, flattened means and covariance matrices, as plain as can be."""
    if isinstance(target, GaussianMixture):
        return target.weights, target.means.flatten(1), target.covariances()
    assert isinstance(target, Empirical)
    n, data = len(target.data), target.data.double().flatten(1)
    return (
        torch.full((n,), 1.0 / n, dtype=torch.float64),
        data,
        target.bandwidth**2 * torch.eye(D).double().expand(n, D, D),
    )


def brute_force(target: Target, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """`(x0, log p)` from inverses and torch's own multivariate normal, in float64."""
    weights, means, covariances = components(target)
    s, sigma = (float(c) for c in target.process.kernel(t))
    x = x.double().flatten(1)
    spread = s**2 * covariances + sigma**2 * torch.eye(D, dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal(s * means, spread)
    log_joint = weights.log() + normal.log_prob(x.unsqueeze(1))
    gain = s * covariances @ torch.linalg.inv(spread)
    x0 = means + torch.einsum("kij,bkj->bki", gain, x.unsqueeze(1) - s * means)
    return torch.einsum("bk,bki->bi", log_joint.softmax(-1), x0), log_joint.logsumexp(-1)


def times_of(process: Process, *nsrs: float) -> list[float]:
    return [float(process.t_of_nsr(nsr)) for nsr in nsrs]


# ------------------------------------------------------------------------------ against brute force


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_denoiser_and_density_agree_with_brute_force(name, process):
    target = make(name, process)
    for t in times_of(process, 0.05, 0.4, 3.0, 30.0):
        x = target.sample(16, seed=1, t=t, dtype=torch.float64)
        x0, log_p = brute_force(target, x, t)
        torch.testing.assert_close(target(x, t), x0, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(target.log_prob(x, t), log_p, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_the_score_is_the_gradient_of_the_density_and_obeys_tweedie(name):
    for process in (VP(), EDM(), RectifiedFlow()):
        target = make(name, process)
        for t in times_of(process, 0.05, 1.0, 20.0):
            x = target.sample(8, seed=2, t=t, dtype=torch.float64).requires_grad_()
            (gradient,) = torch.autograd.grad(target.log_prob(x, t).sum(), x)
            score = target.score(x, t)
            torch.testing.assert_close(score, gradient, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(
                process.x0_from_score(x, score, t), target(x, t), rtol=1e-9, atol=1e-9
            )


@pytest.mark.parametrize("name", NAMES)
def test_the_density_of_the_data_integrates_against_its_samples(name):
    """E[p / m] = 1 for samples of m = (p + q)/2, q a normal: within 5.5 deviations (false alarm
    4e-8).
    """
    target = make(name)
    wide = Gaussian(target.mean, cov=target.covariance() + torch.eye(D))
    x = torch.cat([each.sample(20_000, seed=3, dtype=torch.float64) for each in (target, wide)])
    p, q = target.log_prob(x), wide.log_prob(x)
    ratio = 2.0 * torch.sigmoid(p - q)
    assert abs(float(ratio.mean()) - 1) < 5.5 * float(ratio.std()) / 200
    assert float(ratio.std()) > 0.1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("t", [None, 0.3])
def test_samples_have_the_stated_moments(name, t):
    """40 000 whitened samples: n |mean|^2 ~ chi^2(5), and second moments within 6 of their own
    deviations.
    """
    target = make(name, VP())
    n = 40_000
    mean, covariance = target.moments(t)
    x = target.sample(n, seed=7, t=t, dtype=torch.float64)
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (x - mean).mT, upper=False)
    assert float(n * z.mean(1).square().sum()) < 45  # chi^2(5): 2e-8
    products = z.unsqueeze(0) * z.unsqueeze(1)
    assert (
        float(((products.mean(-1) - torch.eye(D)).abs() / (products.std(-1) / math.sqrt(n))).max())
        < 6
    )


def test_moments_agree_with_the_components():
    for name in NAMES:
        target = make(name)
        weights, means, covariances = components(target)
        mean = torch.einsum("k,ki->i", weights, means)
        second = torch.einsum(
            "k,kij->ij", weights, covariances + means.unsqueeze(-1) * means.unsqueeze(-2)
        )
        torch.testing.assert_close(target.mean, mean)
        torch.testing.assert_close(target.covariance(), second - mean.outer(mean))


# ---------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_float32_agrees_with_float64_at_every_level(name, process):
    """From nsr 1e-4 to the end of time; x0 to a few roundings of the data's size, the score to a
    few of its own.
    """
    target = make(name, process)
    for t in [*times_of(process, 1e-4, 1e-3, 0.02, 1.0, 30.0), process.t_max]:
        x = target.sample(32, seed=4, t=t)
        x0, score = target(x, t), target.score(x, t)
        assert x0.dtype == score.dtype == torch.float32
        torch.testing.assert_close(x0.double(), target(x.double(), t), rtol=0, atol=2e-5)
        s, sigma = (float(c) for c in process.kernel(t))
        # The float32 state itself is only known to eps |x|, of which the score is a multiple of up
        # to 1/a.
        atol = 3e-5 / max(sigma, 1e-3 * s) ** 2
        torch.testing.assert_close(
            score.double(), target.score(x.double(), t), rtol=1e-4, atol=atol
        )


@pytest.mark.parametrize("name", NAMES)
def test_no_signal_gives_the_mean_and_no_noise_the_state(name):
    flow = make(name, RectifiedFlow())
    x = rand(4, D)
    torch.testing.assert_close(flow(x, 1.0), flow.mean.expand(4, D))
    torch.testing.assert_close(flow.score(x, 1.0), -x)
    x = flow.sample(4, dtype=torch.float64)
    torch.testing.assert_close(flow(x, 0.0), x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(flow(x.float(), 0.0), x.float(), rtol=0, atol=1e-5)


def test_singular_covariances_are_projections_at_small_noise():
    """Data on a plane: the denoiser projects on it, in float32 too, and the density says that there
    is none.
    """
    plane = rand(D, 2, seed=8)
    basis, _ = torch.linalg.qr(plane)
    x = rand(6, D, seed=9)
    for target in (
        Gaussian(torch.zeros(D), factor=plane),
        Gaussian(torch.zeros(D), factor=torch.cat([plane, plane], 1)),  # of deficient rank
        Gaussian(torch.zeros(D), cov=plane @ plane.mT),
    ):
        for t in (0.0, 1e-6, 1e-4):
            torch.testing.assert_close(target(x, t), x @ basis @ basis.mT, rtol=0, atol=1e-6)
            torch.testing.assert_close(
                target(x.float(), t).double(), x @ basis @ basis.mT, rtol=0, atol=5e-6
            )
        with pytest.raises(ValueError, match="no density"):
            target.log_prob(x)


def test_half_precision_is_computed_in_single():
    for name in NAMES:
        target = make(name)
        x = target.sample(4, t=0.5, dtype=torch.bfloat16)
        assert x.dtype == target(x, 0.5).dtype == torch.bfloat16
        assert torch.equal(target(x, 0.5), target(x.float(), 0.5).bfloat16())


# -------------------------------------------------------------------------- the denoiser's contract


@pytest.mark.parametrize("name", NAMES)
def test_the_same_level_on_another_path_is_the_same_answer(name):
    target = make(name)
    for nsr in (0.01, 0.5, 5.0, 100.0):
        x = target.sample(8, seed=5, t=nsr, dtype=torch.float64)
        x0, log_p, score = target(x, nsr), target.log_prob(x, nsr), target.score(x, nsr)
        for process in PROCESSES:
            other = target.under(process)
            assert type(other) is type(target)
            assert other.process == process
            assert target.process == EDM()
            t = process.t_of_nsr(nsr)
            s = float(process.s(t))
            torch.testing.assert_close(other(s * x, t), x0, rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(other.score(s * x, t) * s, score, rtol=1e-7, atol=1e-7)
            torch.testing.assert_close(
                other.log_prob(s * x, t) + D * math.log(s), log_p, rtol=1e-7, atol=1e-7
            )


@pytest.mark.parametrize("name", NAMES)
def test_at_equals_call_and_times_may_differ_between_samples(name):
    target = make(name, RectifiedFlow())
    times = torch.tensor([1.0, 0.9, 0.5, 0.1, 1e-3, 0.0], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        x = rand(len(times), D).to(dtype)
        calls = target.at(times, x)
        assert all(torch.equal(call(x), target(x, t)) for call, t in zip(calls, times, strict=True))
        per_sample = [
            torch.cat([f(x[i : i + 1], t) for i, t in enumerate(times)])
            for f in (target, target.score)
        ]
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(target(x, times), per_sample[0], rtol=0, atol=tolerance)
        torch.testing.assert_close(
            target.score(x, times), per_sample[1], rtol=tolerance, atol=tolerance
        )


def test_images_keep_their_shape():
    shape = (3, 4, 4)
    mean, factor = rand(*shape), rand(*shape, 2)
    data = rand(20, *shape, seed=2)
    targets: list[Target] = [
        Gaussian(mean, std=0.5),
        Gaussian(mean, std=rand(*shape).abs()),
        Gaussian(mean, factor=factor, diag=0.1),
        Gaussian(mean, cov=torch.eye(48)),
        GaussianMixture(None, data[:2], std=rand(2, *shape).abs()),
        GaussianMixture(
            None, data[:2], factor=torch.stack([factor, factor]), diag=rand(2, *shape).square()
        ),
        Empirical(data, 0.1),
    ]
    for target in targets:
        assert target.shape == shape
        assert target.mean.shape == shape
        assert target.covariance().shape == (48, 48)
        x = target.sample(5, t=0.3)
        assert x.shape == target(x, 0.3).shape == target.score(x, 0.3).shape == (5, *shape)
        assert target.log_prob(x, 0.3).shape == (5,)
    flat = Gaussian(mean.flatten(), factor=factor.reshape(48, 2), diag=0.1)
    x = rand(2, *shape, seed=3)
    torch.testing.assert_close(targets[2](x, 0.3).flatten(1), flat(x.flatten(1), 0.3))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_to_the_state(name):
    target = make(name, VP())
    x = target.sample(2, t=0.4, dtype=torch.float64).requires_grad_()
    assert gradcheck(lambda x: target(x, 0.4), x)
    assert gradcheck(lambda x: target.score(x, 0.4), x)
    times = torch.tensor([0.4, 0.7], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda t: target(x.detach(), t), times)


def test_gradients_flow_to_the_parameters():
    x = rand(3, D)
    mean, std, weights, factor = (
        rand(2, D),
        torch.rand(2, D).double() + 0.5,
        torch.rand(2).double(),
        rand(2, D, 2),
    )

    def diagonal(w, m, c):
        return GaussianMixture(w, m, std=c)(x, 0.7)

    def low_rank(m, f, d):
        return GaussianMixture(None, m, factor=f, diag=d).log_prob(x, 0.7)

    def full(c):
        return Gaussian(mean[0], cov=c @ c.mT)(x, 0.7)

    assert gradcheck(diagonal, [p.requires_grad_() for p in (weights, mean, std)])
    assert gradcheck(low_rank, [p.requires_grad_() for p in (mean, factor, std)])
    assert gradcheck(full, rand(D, D, seed=4).requires_grad_())


def test_the_same_seed_gives_the_same_samples():
    for name in NAMES:
        target = make(name)
        assert torch.equal(
            target.sample(6, seed=3), target.sample(6, seed=torch.Generator().manual_seed(3))
        )
        assert not torch.equal(target.sample(6, seed=3), target.sample(6, seed=4))


# ------------------------------------------------------------------------------------ one at a time


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("name", ["gaussian", "gaussian low-rank", "std"])
def test_transport_solves_the_probability_flow_ode(process, name):
    target = (
        Gaussian(rand(D, seed=1), std=[0.0, 0.2, 0.5, 1.0, 2.0], process=process)
        if name == "std"
        else make(name, process)
    )
    assert isinstance(target, Gaussian)
    start, end = process.t_max, process.t_min
    x = target.sample(3, seed=6, t=start, dtype=torch.float64)
    torch.testing.assert_close(target.transport(x, start, start), x)
    middle = times_of(process, 0.7)[0]
    through = target.transport(target.transport(x, start, middle), middle, end)
    torch.testing.assert_close(target.transport(x, start, end), through)
    torch.testing.assert_close(
        target.transport(target.transport(x, start, middle), middle, start), x
    )
    # It satisfies the ODE: its derivative in time is the velocity (central difference, error h^2).
    x, h = target.transport(x, start, middle), 1e-5 * middle
    slope = (target.transport(x, middle, middle + h) - target.transport(x, middle, middle - h)) / (
        2 * h
    )
    velocity = process.velocity_from_x0(x, target(x, middle), middle)
    torch.testing.assert_close(slope, velocity, rtol=1e-6, atol=1e-6)
    # And it carries the marginal at one time to that at the other.
    a, covariance = (
        torch.stack(
            [
                target.transport(e, start, end) - target.transport(0 * e, start, end)
                for e in torch.eye(D).double().unsqueeze(1)
            ]
        ),
        target.moments(start)[1],
    )
    a = a.squeeze(1).mT
    torch.testing.assert_close(a @ covariance @ a.mT, target.moments(end)[1], rtol=1e-8, atol=1e-8)


def test_low_rank_equals_full():
    factor, diag = rand(2, D, 3), 0.1 + rand(2, D).abs()
    means = rand(2, D, seed=3)
    low = GaussianMixture([1.0, 3.0], means, factor=factor, diag=diag)
    full = GaussianMixture([1.0, 3.0], means, cov=low.covariances())
    torch.testing.assert_close(low.covariances(), factor @ factor.mT + torch.diag_embed(diag))
    x = low.sample(9, t=0.3, dtype=torch.float64)
    for t in (0.0, 1e-3, 0.3, 50.0):
        torch.testing.assert_close(low(x, t), full(x, t), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(low.log_prob(x, t), full.log_prob(x, t))


def test_weights_are_normalised_and_may_be_zero():
    means = rand(3, D)
    torch.testing.assert_close(
        GaussianMixture([2.0, 3.0, 5.0], means, std=1.0).weights,
        torch.tensor([0.2, 0.3, 0.5]).double(),
    )
    without = GaussianMixture([1.0, 0.0, 1.0], means, std=1.0)
    x = rand(4, D, seed=2)
    torch.testing.assert_close(
        without(x, 1.0), GaussianMixture(None, means[[0, 2]], std=1.0)(x, 1.0)
    )


def test_one_component_is_a_gaussian():
    mean, cov, x = rand(D), spd(), rand(4, D, seed=2)
    torch.testing.assert_close(
        GaussianMixture([7.0], mean[None], cov=cov)(x, 0.5), Gaussian(mean, cov=cov)(x, 0.5)
    )


def test_a_data_set_without_a_kernel_gives_the_nearest_datum():
    data = rand(100, 3, 4, seed=1).float()
    target = Empirical(data, process=VP(), chunk=9)
    for t in (0.0, 1e-6, 1e-4):
        x = target.sample(10, seed=2, t=t)
        nearest = data[torch.cdist(x.flatten(1), data.flatten(1)).argmin(1)]
        torch.testing.assert_close(target(x, t), nearest, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        target(1e3 * rand(2, 3, 4).float(), 1.0), target(torch.zeros(2, 3, 4), 1.0), rtol=0, atol=30
    )
    with pytest.raises(ValueError, match="no density without noise"):
        target.log_prob(data[:2])


def test_a_data_set_is_the_mixture_of_its_kernels():
    data, x = rand(30, D), rand(6, D, seed=1)
    mixture = GaussianMixture(None, data, std=0.3, process=VP())
    for chunk in (1, 7, 30, 1000, None):
        target = Empirical(data, 0.3, process=VP(), chunk=chunk)
        for t in (0.0, 0.01, 0.3, 1.0):
            torch.testing.assert_close(target(x, t), mixture(x, t))
            torch.testing.assert_close(target.log_prob(x, t), mixture.log_prob(x, t))


def test_close_data_are_told_apart_in_float32():
    """Two images 0.01 apart in one of 3072 entries, at nsr 1e-3: float32 matrix products would lose
    them.
    """
    image = rand(1, 3, 32, 32).float()
    data = image.repeat(2, 1, 1, 1)
    data[1, 0, 0, 0] += 0.01
    target = Empirical(data)
    x = data + 1e-3 * rand(2, 3, 32, 32, seed=1).float()
    torch.testing.assert_close(target(x, 1e-3)[:, 0, 0, 0], data[:, 0, 0, 0], rtol=0, atol=1e-6)


def test_other_devices_sum_distances_entry_by_entry(monkeypatch):
    data, x = rand(50, D).float(), rand(6, D, seed=1).float()
    exact = Empirical(data, 0.1, process=RectifiedFlow(), chunk=11)
    monkeypatch.setattr(Empirical, "_precision", staticmethod(lambda x: x.dtype))
    other = Empirical(data, 0.1, process=RectifiedFlow(), chunk=11)
    for t in (1e-3, 0.3, 1.0, torch.linspace(0.01, 1, 6)):
        assert other(x, t).dtype == torch.float32
        torch.testing.assert_close(other(x, t), exact(x, t), rtol=0, atol=3e-6)
        torch.testing.assert_close(other.log_prob(x, t), exact.log_prob(x, t), rtol=1e-5, atol=1e-4)


def test_integer_data_are_numbers():
    data = torch.tensor([[0, 0], [255, 255]], dtype=torch.uint8)
    torch.testing.assert_close(
        Empirical(data)(torch.tensor([[10.0, 10.0]]), 1.0), torch.zeros(1, 2)
    )


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: GaussianMixture([1.0, -1.0], rand(2, 3), std=1.0), ValueError, "non-negative"),
        (lambda: GaussianMixture([0.0, 0.0], rand(2, 3), std=1.0), ValueError, "not all zero"),
        (
            lambda: GaussianMixture([1.0], rand(2, 3), std=1.0),
            ValueError,
            r"one entry a component, shape \[2\]",
        ),
        (
            lambda: GaussianMixture(None, rand(3), std=1.0),
            ValueError,
            r"means has shape \[K, \*shape\]",
        ),
        (lambda: GaussianMixture(None, rand(2, 3)), TypeError, "one form of covariance"),
        (
            lambda: GaussianMixture(None, rand(2, 3), std=1.0, cov=torch.eye(3)),
            TypeError,
            "one form of covariance",
        ),
        (
            lambda: GaussianMixture(None, rand(2, 3), std=1.0, diag=1.0),
            TypeError,
            "one form of covariance",
        ),
        (lambda: GaussianMixture(None, rand(2, 3), std=-1.0), ValueError, "std is non-negative"),
        (
            lambda: GaussianMixture(None, rand(2, 3), std=[1.0, 1.0, 1.0]),
            ValueError,
            r"of shape \[2\] or \[2, 3\]",
        ),
        (
            lambda: GaussianMixture(None, rand(2, 3), cov=torch.eye(2)),
            ValueError,
            r"cov has shape \[3, 3\]",
        ),
        (lambda: Gaussian(rand(2), cov=[[1.0, 2.0], [2.0, 1.0]]), ValueError, "eigenvalue -1"),
        (lambda: Gaussian(rand(2), cov=[[1.0, 0.5], [0.0, 1.0]]), ValueError, "not symmetric"),
        (lambda: Gaussian(rand(2), factor=rand(3, 1)), ValueError, "factor has shape"),
        (
            lambda: Gaussian(rand(2), std=[1.0, math.nan]),
            ValueError,
            "std has entries that are not finite",
        ),
        (lambda: Gaussian(rand(2), std=[1.0]), ValueError, r"std is a number, or of shape \[2\]"),
        (lambda: Gaussian(0.0, std=1.0), ValueError, "mean has the shape of one sample"),
        (lambda: Gaussian(rand(2), std=1.0, process=VP), TypeError, "process is the path"),
        (lambda: Empirical(rand(0, 3)), ValueError, "N at least 1"),
        (lambda: Empirical(rand(3)), ValueError, "N at least 1"),
        (lambda: Empirical(rand(3, 2), -0.1), ValueError, "bandwidth"),
        (lambda: Empirical(rand(3, 2) / 0, 0.1), ValueError, "not finite"),
        (lambda: Empirical(rand(3, 2), chunk=0), ValueError, "chunk"),
    ],
)
def test_bad_parameters_are_explained(build, error, match):
    with pytest.raises(error, match=match):
        build()


def test_bad_states_are_explained():
    target = Gaussian(torch.zeros(3), std=1.0)
    for x in (torch.zeros(2, 4), torch.zeros(3), torch.zeros(2, 3, 1)):
        for call in (
            target,
            target.score,
            target.log_prob,
            lambda x, t: target.at(torch.ones(1).double(), x),
        ):
            with pytest.raises(ValueError, match=r"has shape \('B', 3\)"):
                call(x, 1.0)
    with pytest.raises(TypeError, match="floating"):
        target(torch.zeros(2, 3, dtype=torch.int64), 1.0)
    with pytest.raises(TypeError, match="takes no 'label'"):
        target(torch.zeros(2, 3), 1.0, label=torch.zeros(2))
    with pytest.raises(ValueError, match="5 times for a batch of 2"):
        target(torch.zeros(2, 3), torch.ones(5))
    with pytest.raises(ValueError, match="one time or one a sample"):
        target(torch.zeros(2, 3), torch.ones(2, 1))
