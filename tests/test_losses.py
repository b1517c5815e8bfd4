"""Losses on Gaussian data, without Monte Carlo: they are quadratic in data and noise, so that their
expectation is an average over the four points (+-c, +-1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import sdeflow
from sdeflow import (
    EDM,
    VP,
    Cosine,
    Gaussian,
    Optimal,
    Preconditioned,
    Process,
    RectifiedFlow,
    betas,
)
from sdeflow.losses import (
    DSM,
    ESM,
    P2,
    SSM,
    EDMLoss,
    FlowMatching,
    Hybrid,
    InputPerturbation,
    LabelDropout,
    Loss,
    MinSNR,
    Simple,
)
from sdeflow.training.config import LOSSES, TrainConfig

F64 = torch.float64
Prediction = partial(sdeflow.Prediction, time="continuous")
C = 0.6
X0 = C * torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], dtype=F64)
EPS = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=F64)
PROCESSES = [
    VP(),
    Cosine(),
    EDM(),
    RectifiedFlow(),
    Process.from_betas(betas.linear(40, 1e-3, 0.3)),
]


class Linear(nn.Module):
    """`k x` at every time."""

    def __init__(self, k: float, heads: int = 1):
        super().__init__()
        self.k = nn.Parameter(torch.tensor(k, dtype=F64))
        self.w = nn.Parameter(torch.tensor(0.0, dtype=F64))
        self.heads = heads

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        y = self.k * x
        return y if self.heads == 1 else torch.cat([y, self.w.expand_as(y)], 1)


def best(process: Process, t: float, predicts: str) -> float:
    """The linear prediction of Gaussian data."""
    s, sigma = (float(c) for c in process.kernel(t))
    x0 = s * C**2 / (s**2 * C**2 + sigma**2)
    one = torch.ones(1, 1, dtype=F64)
    if predicts == "x0":
        return x0
    convert = getattr(process, f"{predicts}_from_x0")
    return float(convert(one, x0 * one, t))


def least(process: Process, t: float) -> float:
    """E|x0 - E[x0|x]|^2."""
    s, sigma = (float(c) for c in process.kernel(t))
    return C**2 * sigma**2 / (s**2 * C**2 + sigma**2)


def optimum(
    loss: Loss, model: sdeflow.Prediction, network: Linear, t: float, **given
) -> tuple[float, float]:
    """The expectation of the loss and its slope in k."""
    value = loss(model, X0, t, EPS, **given).mean()
    (slope,) = torch.autograd.grad(value, network.k)
    return float(value.detach()), float(slope)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("predicts", ["x0", "eps", "v", "velocity", "score"])
@pytest.mark.parametrize("network_predicts", ["x0", "eps", "v"])
def test_simple_losses_meet_their_optimum(
    process: Process, predicts: str, network_predicts: str
) -> None:
    for share in (0.1, 0.5, 0.9):
        t = process.t_min + share * (process.t_max - process.t_min)
        if predicts == "velocity" and isinstance(process, EDM):
            continue  # it is eps
        s, sigma, ds, dsigma = (
            float(getattr(process, n)(torch.tensor(t, dtype=F64)))
            for n in ("s", "sigma", "ds", "dsigma")
        )
        weight = {
            "x0": 1.0,
            "eps": (s / sigma) ** 2,
            "v": (s**2 + sigma**2) / sigma**2,
            "velocity": (ds - s * dsigma / sigma) ** 2,
            "score": (s / sigma**2) ** 2,
        }[predicts]
        network = Linear(best(process, t, network_predicts))
        model = Prediction(network, network_predicts, process)
        value, slope = optimum(Simple(predicts), model, network, t)
        assert value == pytest.approx(weight * least(process, t), rel=1e-9)
        scale = weight * float(model.affine(torch.tensor(t, dtype=F64)).out) ** 2
        assert abs(slope) < 1e-10 * scale


def test_a_denoiser_that_is_no_network_is_measured_too() -> None:
    target = Gaussian(torch.zeros(1), std=torch.tensor(C, dtype=F64), process=VP())
    for t in (0.1, 0.6):
        assert float(Simple("x0")(target, X0, t, EPS).mean()) == pytest.approx(
            least(VP(), t), rel=1e-9
        )


def test_weights_are_the_published_ones() -> None:
    process, t = VP(), 0.3
    s, sigma = (float(c) for c in process.kernel(t))
    snr = (s / sigma) ** 2
    network = Linear(0.1)
    model = Prediction(network, "eps", process)
    plain = Simple("eps")(model, X0, t, EPS)
    for loss, factor in [
        (Simple(weight=MinSNR(5.0)), min(snr, 5.0) / snr),
        (Simple(weight=MinSNR(0.01)), 0.01 / snr),
        (Simple(weight=P2()), 1 / (1 + snr)),
        (Simple(weight=P2(0.5, 2.0)), (2 + snr) ** -0.5),
        (DSM(), 1.0),
        (DSM("one"), sigma**-2),
        (DSM("g2"), float(process.g2(t)) / sigma**2),
    ]:
        assert torch.allclose(loss(model, X0, t, EPS), factor * plain, rtol=1e-9), loss
    v = Prediction(network, "v", process)
    v_loss = Simple("v")(v, X0, t, EPS)
    assert torch.allclose(
        Simple(weight=MinSNR(5.0))(v, X0, t, EPS), min(snr, 5) / (snr + 1) * v_loss
    )
    flow = Prediction(network, "velocity", RectifiedFlow())
    wrong = 0.1 * (0.7 * X0 + 0.3 * EPS) - (EPS - X0)
    assert torch.allclose(FlowMatching()(flow, X0, t, EPS), wrong.square().mean(1), rtol=1e-12)
    edm = Preconditioned(network, 0.4)
    n = 0.7
    error = edm(X0 + n * EPS, n) - X0
    expected = (n**2 + 0.16) / (n * 0.4) ** 2 * error.square().mean(1)
    assert torch.allclose(EDMLoss(sigma_data=0.4)(edm, X0, n, EPS), expected, rtol=1e-12)
    # A path: the same loss in the units of another process.
    nsr = float(process.nsr(t))
    there = Simple("eps", path=process)(Preconditioned(network, 0.4), X0, nsr, EPS)
    here = Simple("eps")(Preconditioned(network, 0.4), X0, nsr, EPS)
    assert torch.allclose(there, here, rtol=1e-9)  # the error of eps does not depend on the path


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_score_matching_meets_its_optimum(process: Process) -> None:
    target = Gaussian(torch.zeros(1), std=torch.tensor(C, dtype=F64), process=process)
    for share in (0.2, 0.7):
        t = process.t_min + share * (process.t_max - process.t_min)
        s, sigma = (float(c) for c in process.kernel(t))
        spread = s**2 * C**2 + sigma**2
        network = Linear(-1 / spread)
        model = Prediction(network, "score", process)
        value, slope = optimum(ESM(target), model, network, t)
        assert value < 1e-18 * sigma**2
        assert abs(slope) < 1e-9
        for weight, factor in (("sigma2", sigma**2), ("one", 1.0), ("g2", float(process.g2(t)))):
            value, slope = optimum(SSM(2, weight), model, network, t)
            assert value == pytest.approx(-factor / spread, rel=1e-9)
            assert abs(slope) < 1e-9 * factor * max(spread, 1.0)
        # Away from the optimum, denoising, exact and sliced matching differ by constants alone.
        off = Prediction(Linear(-2 / spread), "score", process)
        with torch.no_grad():
            gaps = [
                float((loss(off, X0, t, EPS) - loss(model, X0, t, EPS)).mean())
                for loss in (DSM(), ESM(target), SSM())
            ]
        assert gaps == pytest.approx([gaps[0]] * 3, rel=1e-8)
        assert gaps[0] == pytest.approx(sigma**2 / spread, rel=1e-8)


def test_sliced_matching_differentiates_through_its_products() -> None:
    """The gradient in a nonlinear network's weights is that of the trace, found by differences."""

    class Cubic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor(0.7, dtype=F64))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return -self.a * x - self.a**2 * x**3

    network = Cubic()
    model = Prediction(network, "score", VP())
    loss = SSM(3)

    def value() -> Tensor:
        return loss(model, X0, 0.4, EPS).mean()

    (slope,) = torch.autograd.grad(value(), network.a)
    step = 1e-5
    with torch.no_grad():
        network.a += step
        up = float(value().detach())
        network.a -= 2 * step
        down = float(value().detach())
    assert float(slope) == pytest.approx((up - down) / (2 * step), rel=1e-7)
    with torch.no_grad():
        assert not value().requires_grad
    s, sigma = VP().kernel(0.4)
    x = s * X0 + sigma * EPS
    a = network.a.detach() + step
    with torch.no_grad():
        network.a += step
        exact = (a * x + a**2 * x**3) ** 2 + 2 * (-a - 3 * a**2 * x**2)
        assert torch.allclose(loss(model, X0, 0.4, EPS), (sigma**2 * exact).mean(1), rtol=1e-12)


def test_input_perturbation_moves_the_optimum_as_stated() -> None:
    """All that is random is a sign: the average over the eight points is the expectation."""
    process, t, gamma = VP(), 0.3, 0.5
    s, sigma = (float(c) for c in process.kernel(t))
    network = Linear(sigma / (s**2 * C**2 + (1 + gamma**2) * sigma**2))
    model = Prediction(network, "eps", process)
    x0, eps = X0.repeat(2, 1), EPS.repeat(2, 1)
    xi = torch.ones(8, 1, dtype=F64)
    xi[4:] = -1
    value = (
        Simple()
        .at_noise(model, x0, torch.full((8,), t, dtype=F64), eps, eps + gamma * xi, {})
        .mean()
    )
    (slope,) = torch.autograd.grad(value, network.k)
    assert abs(float(slope)) < 1e-12
    generator = torch.Generator().manual_seed(0)
    drawn = InputPerturbation(Simple(), gamma)(model, x0, t, eps, generator)
    assert drawn.shape == (8,)
    assert not torch.allclose(drawn, Simple()(model, x0, t, eps))
    with pytest.raises(TypeError, match="regression"):
        InputPerturbation(SSM())  # type: ignore[arg-type]


def test_the_hybrid_loss_trains_the_variance_to_the_optimal_one() -> None:
    b = betas.linear(40, 1e-3, 0.3)
    process = Process.from_betas(b)
    optimal = Optimal(lambda n: n**2 / (n**2 + C**2))
    for i in (1, 2, 20, 40):
        t = i / 40
        network = Linear(best(process, t, "eps"), heads=2)
        model = Prediction(network, "eps", process, learned_variance=True)
        s, sigma = (float(c) for c in process.kernel(t))
        if i > 1:
            r = float(process.nsr((i - 1) / 40)) * s / sigma
            s_next, sigma_next = (float(c) for c in process.kernel((i - 1) / 40))
            small, large = sigma_next**2 * (1 - r**2), sigma**2 * (1 - r**2)
            v = small + (s_next * (1 - r**2)) ** 2 * optimal.mean_squared_error(sigma / s)
        else:
            v = optimal.mean_squared_error(sigma / s)
            r = sigma / s / float(process.nsr(2 / 40))
            small, large = sigma**2 * (1 - r**2), sigma**2
        fraction = math.log(v / small) / math.log(large / small)
        with torch.no_grad():
            network.w.fill_(2 * fraction - 1)
        loss = Hybrid(1e-3, decoder="gaussian")
        value = loss(model, X0, t, EPS).mean()
        slope_k, slope_w = torch.autograd.grad(value, [network.k, network.w])
        assert abs(float(slope_w)) < 1e-12
        assert abs(float(slope_k)) < 1e-10  # the mean is trained by L_simple alone
        simple = least(process, t) * (s / sigma) ** 2
        nats = 0.5 * math.log(v / small) if i > 1 else 0.5 * math.log(2 * math.pi * math.e * v)
        assert float(value.detach()) == pytest.approx(
            simple + 1e-3 * 40 * nats / math.log(2), rel=1e-9
        )
    with pytest.raises(TypeError, match="learned_variance"):
        Hybrid()(Prediction(Linear(0.1), "eps", process), X0)
    with pytest.raises(ValueError, match="table"):
        Hybrid()(Prediction(Linear(0.1, 2), "eps", VP(), learned_variance=True), X0)
    picture = (torch.randint(256, (4, 1)) / 127.5 - 1).double()
    network = Linear(0.1, 2)
    model = Prediction(network, "eps", process, learned_variance=True)
    assert bool(
        Hybrid()(model, picture, generator=torch.Generator().manual_seed(0)).isfinite().all()
    )


def test_times_are_drawn_as_stated() -> None:
    process = Process.from_betas(betas.linear(10, 1e-3, 0.3))
    x0 = torch.zeros(1000, 1)
    model = Prediction(Linear(1.0), "eps", process)
    t = Simple(stratified=True).times(model, x0, None, torch.Generator().manual_seed(0))
    assert torch.equal(
        torch.bincount((t * 10).round().long())[1:],
        torch.full((10,), 100),
    )
    t = Simple().times(
        Prediction(Linear(1.0), "eps", VP()), x0, None, torch.Generator().manual_seed(0)
    )
    assert float(t.min()) >= 1e-3
    assert float(t.mean()) == pytest.approx(0.5, abs=0.03)
    flow = Prediction(Linear(1.0), "velocity", RectifiedFlow())
    t = FlowMatching(0.3, 0.8, stratified=True).times(
        flow, x0, None, torch.Generator().manual_seed(0)
    )
    assert float(torch.logit(t).mean()) == pytest.approx(0.3, abs=1e-2)
    assert float(torch.logit(t).std()) == pytest.approx(0.8, rel=1e-2)
    edm = Preconditioned(Linear(1.0))
    n = Simple(path=VP()).times(edm, x0, None, torch.Generator().manual_seed(0))
    assert float(VP().t_of_nsr(n).mean()) == pytest.approx(0.5, abs=0.05)
    assert 0.002 <= float(n.min()) <= float(n.max()) <= 80


def test_wrong_models_are_told() -> None:
    with pytest.raises(TypeError, match="Denoiser"):
        Simple()(Linear(0.1), X0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="own process"):
        Simple()(Prediction(Linear(0.1), "eps", VP()).under(EDM()), X0)
    with pytest.raises(ValueError, match="prediction"):
        Simple("noise")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight"):
        DSM("sigma")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="network's own output"):
        InputPerturbation(Simple())(Gaussian(torch.zeros(1), std=1.0, process=VP()), X0)
    with pytest.raises(TypeError, match="score"):
        ESM(3.0)
    with pytest.raises(ValueError, match="loss"):
        TrainConfig(loss="hinge")


def test_labels_are_dropped_for_any_loss() -> None:
    seen = []

    class Seen(nn.Module):
        def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            seen.append(label)
            return x

    loss = LabelDropout(Simple(), 9, 0.25)
    model = Prediction(Seen(), "eps", VP())
    x0 = torch.zeros(4000, 1)
    loss(
        model,
        x0,
        generator=torch.Generator().manual_seed(0),
        label=torch.zeros(4000, dtype=torch.int64),
    )
    assert float((seen[0] == 9).double().mean()) == pytest.approx(0.25, abs=0.03)
    assert "label dropout" in loss.describe()


# ----------------------------------------------------------------------- each trains a small model


class Small(nn.Module):
    """A prediction that is linear in x, with a coefficient for each of 40 entries of a table."""

    def __init__(self, process: Process, heads: int = 1):
        super().__init__()
        self.process, self.heads = process, heads
        self.k, self.w = (nn.Parameter(torch.zeros(40)) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        i = (t * 40).round().long().clamp(1, 40) - 1
        y = self.k[i].reshape(-1, 1) * x
        return y if self.heads == 1 else torch.cat([y, self.w[i].reshape(-1, 1).expand_as(x)], 1)


CHAIN = Process.from_betas(betas.linear(40, 1e-3, 0.3))
TRAINED: list[tuple[str, Callable[[], Loss], str, int]] = [
    ("eps", Simple, "eps", 1),
    ("x0", lambda: Simple("x0"), "x0", 1),
    ("v", lambda: Simple("v"), "v", 1),
    ("velocity", FlowMatching, "v", 1),
    ("min_snr", lambda: Simple(weight=MinSNR()), "v", 1),
    ("p2", lambda: Simple(weight=P2()), "eps", 1),
    ("dsm", DSM, "eps", 1),
    ("ssm", lambda: SSM(1), "eps", 1),
    ("esm", lambda: ESM(Gaussian(torch.zeros(4), std=0.5, process=CHAIN)), "eps", 1),
    ("edm", lambda: EDMLoss(-0.5, 1.5), "v", 1),
    ("ddpm_ip", lambda: InputPerturbation(Simple(), 0.1), "eps", 1),
    ("hybrid", lambda: Hybrid(0.01, decoder="gaussian"), "eps", 2),
]


@pytest.mark.parametrize(
    ("name", "make", "predicts", "heads"), TRAINED, ids=[row[0] for row in TRAINED]
)
def test_each_loss_trains_a_model_that_samples_rightly(
    name: str, make: Callable[[], Loss], predicts: str, heads: int
) -> None:
    """Data N(0, 0.25 I): the variance of samples follows exactly from the trained coefficients."""
    torch.manual_seed(0)
    network = Small(CHAIN, heads)
    model = Prediction(network, predicts, CHAIN, shape=(4,), learned_variance=heads == 2)  # type: ignore[arg-type]
    loss, generator = make(), torch.Generator().manual_seed(1)
    optimiser = torch.optim.Adam(network.parameters(), 0.05)
    steps = 250
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        x0 = 0.5 * torch.randn(512, 4, generator=generator)
        optimiser.zero_grad()
        loss(model, x0, generator=generator).mean().backward()
        optimiser.step()
        rate.step()
    grid = torch.arange(40, 0, -1, dtype=F64) / 40
    x = sdeflow.sample(model, solver="ddim", grid=grid, n=2000, seeds=0, dtype=F64)
    exact = sdeflow.sample(
        Gaussian(torch.zeros(4), std=0.5, process=CHAIN),
        solver="ddim",
        grid=grid,
        n=2000,
        seeds=0,
        dtype=F64,
    )
    assert float(x.std()) == pytest.approx(float(exact.std()), rel=0.08)
    if heads == 2:
        learned = sdeflow.sample(model, solver=sdeflow.DDPM("learned"), grid=grid, n=2000, seeds=0)
        assert float(learned.std()) == pytest.approx(0.5, rel=0.08)


@pytest.mark.parametrize("name", LOSSES)
def test_the_losses_of_the_command_line_give_edm_networks_a_gradient(name: str) -> None:
    network = Linear(0.3).float()
    model = Preconditioned(network)
    generator = torch.Generator().manual_seed(0)
    config = TrainConfig(loss=name)
    value = config.objective(model, torch.randn(64, 3, 4, 4), generator=generator)
    assert value.shape == (64,)
    assert bool(value.isfinite().all())
    value.mean().backward()
    assert network.k.grad is not None
    assert bool(network.k.grad.isfinite().all())
