"""The border: every parametrisation of an exact target gives that target's x0, on every path, at
every level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.overrides import TorchFunctionMode

from sdeflow.denoisers import Denoiser, Preconditioned, Prediction, as_denoiser
from sdeflow.process import EDM, VE, VP, Cosine, Process, RectifiedFlow, SubVP
from sdeflow.targets import Gaussian

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
PROCESSES = [VP(), SubVP(), Cosine(), VE(), EDM(), RectifiedFlow(), Process.from_betas(BETAS)]
PREDICTIONS = ["eps", "x0", "score", "v", "velocity"]
SHAPE = (3, 2, 2)

every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
every_prediction = pytest.mark.parametrize("predicts", PREDICTIONS)


def target(process: Process) -> Gaussian:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    return Gaussian(mean, std=0.2 + mean.abs() / 2, process=process)


def exact(predicts: str, process: Process) -> Callable[[Tensor, Tensor], Tensor]:
    """The network that predicts `predicts` of the target under `process` without error, for float64
    times.
    """
    known = target(process)

    def network(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (len(x),)
        t = t.double()
        x0 = known(x, t)
        match predicts:
            case "x0":
                return x0
            case "score":
                return known.score(x, t)
            case "eps":
                return process.eps_from_x0(x, x0, t)
            case "v":
                return process.v_from_x0(x, x0, t)
            case "velocity":
                return process.velocity_from_x0(x, x0, t)
        raise AssertionError(predicts)

    return network


class Exactly:
    """Networks are given their times in float32; here they look up the float64 time that it stands
    for.
    """

    def __init__(self, network: Callable[..., Tensor], times: Tensor):
        self.network, self.times = network, times

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.float32
        near = (t.double().unsqueeze(-1) - self.times).abs()
        assert bool((near.amin(-1) <= 1e-6 * t.double().abs() + 1e-12).all())
        return self.network(x, self.times[near.argmin(-1)])


def levels(process: Process, *nsrs: float) -> Tensor:
    return process.t_of_nsr(torch.tensor(nsrs, dtype=torch.float64))


NSRS = (0.02, 0.1, 0.5, 2.0, 10.0, 40.0)


def states(process: Process, times: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """A state a time, `[K, *SHAPE]`."""
    return target(process).sample(len(times), seed=1, t=times, dtype=dtype)


# --------------------------------------------------------------------------------- parametrisations


@every_prediction
@every_process
def test_every_prediction_gives_the_targets_x0_on_every_path(process, predicts):
    native = levels(process, *NSRS)
    denoiser = Prediction(
        Exactly(exact(predicts, process), native), predicts, process, time="continuous"
    )
    for path in PROCESSES:
        times = levels(path, *NSRS)
        moved = denoiser.under(path)
        x = states(path, times)
        torch.testing.assert_close(moved(x, times), target(path)(x, times), rtol=1e-9, atol=1e-9)
        assert moved.process == path
        assert moved.nsr_range == denoiser.nsr_range
        assert denoiser.process == process


@pytest.mark.parametrize("path", PROCESSES, ids=lambda p: type(p).__name__)
def test_edm_preconditioning_gives_the_targets_x0_on_every_path(path):
    sigma_data, known = 0.7, target(EDM())

    def network(x: Tensor, c_noise: Tensor) -> Tensor:
        assert c_noise.dtype == torch.float32
        assert c_noise.shape == (len(x),)
        near = torch.tensor(NSRS).log().div(4).sub(c_noise.unsqueeze(-1)).abs()
        assert float(near.amin(-1).max()) < 1e-6
        n = torch.tensor(NSRS, dtype=torch.float64)[near.argmin(-1)].reshape(-1, 1, 1, 1)
        r2 = n**2 + sigma_data**2
        noisy = x * r2.sqrt()
        return (
            (known(noisy, n.flatten()) - sigma_data**2 / r2 * noisy) * r2.sqrt() / (n * sigma_data)
        )

    denoiser = Preconditioned(network, sigma_data, shape=SHAPE)
    assert (denoiser.process, denoiser.nsr_range, denoiser.shape) == (EDM(), (0.002, 80.0), SHAPE)
    times = levels(path, *NSRS)
    x = states(path, times)
    torch.testing.assert_close(
        denoiser.under(path)(x, times), target(path)(x, times), rtol=1e-9, atol=1e-9
    )


@every_prediction
@every_process
def test_at_equals_call(process, predicts):
    """For one time, for one time a sample, and in every dtype of state: to rounding of that
    dtype.
    """
    plain = exact(predicts, process)
    path = RectifiedFlow() if process != RectifiedFlow() else VP()
    for denoiser in (
        d := Prediction(plain, predicts, process, time="continuous", nsr_range=(0.02, 30.0)),
        d.under(path),
    ):
        times = levels(denoiser.process, 0.02, 0.5, 40.0)
        for dtype in (torch.float32, torch.float64):
            x = states(denoiser.process, times, dtype)
            calls, each = denoiser.at(times, x), denoiser(x, times)
            assert len(calls) == len(times)
            for k, (call, t) in enumerate(zip(calls, times, strict=True)):
                prepared, called = call(x), denoiser(x, t)
                assert prepared.dtype == called.dtype == dtype
                atol = 40 * torch.finfo(dtype).eps * 40.0
                torch.testing.assert_close(prepared, called, rtol=0, atol=atol)
                torch.testing.assert_close(prepared[k], each[k], rtol=0, atol=atol)
            torch.testing.assert_close(denoiser(x, float(t)), called, rtol=0, atol=0)


# ------------------------------------------------------------------------------ the range of levels


class Recorder:
    """An x0-network that returns its input and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.asked.append((x, t))
        return x


@pytest.mark.parametrize(
    "path",
    [VP(), Cosine(t_max=1.0), RectifiedFlow(), VE(sigma_max=1e4), Process.from_betas(BETAS)],
    ids=repr,
)
def test_outside_its_range_a_network_is_asked_at_the_nearest_level(path):
    """From the true end of every path; the state keeps its size in units of sqrt(s^2 + sigma^2),
    and no signal is fine.
    """
    network = Recorder()
    denoiser = Prediction(network, "x0", EDM(), nsr_range=(0.5, 20.0)).under(path)
    times = torch.cat(
        [torch.tensor([path.t_max, path.t_min], dtype=torch.float64), levels(path, 3.0)]
    )
    x = torch.ones(3, *SHAPE, dtype=torch.float64)
    out = denoiser(x, times)
    scaled, t = network.asked[0]
    torch.testing.assert_close(t, torch.tensor([20.0, 0.5, 3.0]))
    s, sigma = path.kernel(times)
    size = torch.sqrt(1 + t.double() ** 2) / torch.sqrt(s**2 + sigma**2)
    torch.testing.assert_close(scaled[:, 0, 0, 0], size, rtol=1e-6, atol=0)
    torch.testing.assert_close(out, scaled)
    assert float(scaled[2, 0, 0, 0]) == pytest.approx(1 / float(s[2]), rel=1e-6)
    assert all(bool(torch.isfinite(call(x)).all()) for call in denoiser.at(times, x))


def test_the_range_holds_on_the_networks_own_path_too():
    network = Recorder()
    denoiser = Prediction(network, "x0", EDM(), nsr_range=(0.5, 20.0))
    x = torch.ones(1, *SHAPE)
    for asked, nearest in [(80.0, 20.0), (0.1, 0.5), (7.0, 7.0)]:
        denoiser(x, asked)
        assert float(network.asked[-1][1]) == pytest.approx(nearest)
    assert torch.equal(network.asked[-1][0], x)  # inside the range nothing is rescaled


def test_an_undeclared_range_is_that_of_the_process():
    assert Prediction(Recorder(), "x0", VE(0.1, 30.0)).nsr_range == pytest.approx((0.1, 30.0))
    assert Prediction(Recorder(), "velocity", RectifiedFlow()).nsr_range[1] == math.inf
    assert Prediction(Recorder(), "eps", RectifiedFlow()).nsr_range[1] == 1e3


@pytest.mark.parametrize("path", [RectifiedFlow(), Cosine(t_max=1.0)], ids=repr)
@every_prediction
def test_no_signal_is_exact_where_it_can_be_and_finite_elsewhere(path, predicts):
    """At s = 0 the target's x0 is its mean; eps and score do not determine it, and are asked at a
    lower level.
    """
    end = torch.tensor(path.t_max, dtype=torch.float64)
    denoiser = Prediction(exact(predicts, path), predicts, path)
    x = states(path, end.expand(4))
    for answer in (denoiser(x, end), denoiser.at(end.reshape(1), x)[0](x)):
        atol = 1e-9 if predicts in ("x0", "v", "velocity") else 0.05
        torch.testing.assert_close(answer, target(path).mean.expand(4, *SHAPE), rtol=0, atol=atol)


@pytest.mark.parametrize("predicts", ["eps", "score"])
def test_eps_and_score_without_signal_raise(predicts):
    denoiser = Prediction(
        exact(predicts, RectifiedFlow()), predicts, RectifiedFlow(), nsr_range=(0.0, math.inf)
    )
    x = torch.ones(2, *SHAPE)
    for call in (
        lambda t: denoiser(x, t),
        lambda t: denoiser.at(torch.tensor([0.5, t], dtype=torch.float64), x),
    ):
        with pytest.raises(
            ValueError, match=r"cannot say x0 at t=1, where no signal is left.*declare nsr_range"
        ):
            call(1.0)


# -------------------------------------------------------------------------- what networks are given


def test_time_index_is_the_nearest_entry_of_the_table():
    table, network = Process.from_betas(BETAS), Recorder()
    denoiser = Prediction(network, "eps", table, time="index")
    index = torch.tensor([0.0, 1.0, 499.0, 499.4, 499.6, 998.7, 999.0], dtype=torch.float64)
    x = torch.zeros(len(index), *SHAPE)
    denoiser(x, table.time(index))
    assert network.asked[-1][1].dtype == torch.int64
    assert network.asked[-1][1].tolist() == [0, 1, 499, 499, 500, 999, 999]
    for call in denoiser.at(table.time(index), x):
        call(x)
    assert [t.tolist() for _, t in network.asked[1:]] == [
        [i] * len(x) for i in (0, 1, 499, 499, 500, 999, 999)
    ]
    # Beyond the table on another path: its first and last entries.
    denoiser.under(EDM())(x[:2], torch.tensor([1e-4, 1e4]))
    assert network.asked[-1][1].tolist() == [0, 999]


def test_every_index_survives_the_round_trip_through_time():
    for n in (10, 1000, 4000):
        table, network = Process.from_betas(BETAS[:1].expand(n)), Recorder()
        denoiser = Prediction(network, "eps", table, time="index")
        times = table.time(torch.arange(n))
        denoiser(torch.zeros(n, 1), times)
        assert network.asked[-1][1].tolist() == list(range(n))
        denoiser.under(EDM())(torch.zeros(n, 1), EDM().t_of_lam(table.lam(times)))
        assert network.asked[-1][1].tolist() == list(range(n))


def test_time_may_be_a_function():
    network = Recorder()
    denoiser = Prediction(network, "v", VP(), time=lambda t: 999 * t)
    denoiser(torch.zeros(2, *SHAPE), 0.5)
    assert network.asked[-1][1].tolist() == [499.5, 499.5]
    denoiser.at(torch.tensor([0.25], dtype=torch.float64), torch.zeros(2, *SHAPE))[0](
        torch.zeros(2, *SHAPE)
    )
    assert network.asked[-1][1].tolist() == [249.75, 249.75]


class Conditional(nn.Module):
    """A module that records dtypes and its training flag."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.scale = nn.Parameter(torch.full((), 0.3, dtype=dtype))
        self.seen: list[Any] = []

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        self.seen.append((x.dtype, t.dtype, self.training, label))
        return x * self.scale


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("state", [torch.float32, torch.float64])
def test_modules_get_their_own_dtype_and_states_keep_theirs(weights, state):
    network = Conditional(weights)
    for training in (True, False):
        network.train(training)
        for denoiser in (
            Prediction(network, "eps", VP()),
            Prediction(network, "x0", VP()),
            Preconditioned(network).under(VP()),
        ):
            x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=state)
            t = torch.tensor(0.4, dtype=torch.float64)
            called, prepared = denoiser(x, t), denoiser.at(t.reshape(1), x)[0](x)
            assert called.dtype == prepared.dtype == state
            # The network's output is rounded to its dtype; what is made of it is not.
            torch.testing.assert_close(
                called,
                prepared,
                rtol=4 * torch.finfo(state).eps,
                atol=1e-6 if state == torch.float32 else 1e-14,
            )
            assert network.seen[-1] == (weights, torch.float32, training, None)
            assert network.training is training


class NoFloat64(TorchFunctionMode):
    """Stands for a device without float64: no function may take or give a float64 tensor."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in (*args, out):
            assert not (isinstance(value, Tensor) and value.dtype == torch.float64), func
        return out


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_no_float64_is_touched_in_a_solve_in_float32(weights):
    times = torch.linspace(0.9, 0.01, 5, dtype=torch.float64)
    x = torch.randn(2, *SHAPE)
    network = Conditional(weights)
    flow = RectifiedFlow()
    denoisers: Sequence[Denoiser] = [
        *(Prediction(network, predicts, flow) for predicts in PREDICTIONS),
        Prediction(network, "eps", VP()).under(flow),
        Preconditioned(network).under(flow),
        target(flow),
    ]
    for denoiser in denoisers:
        calls = denoiser.at(times, x)
        with NoFloat64():
            assert all(call(x).dtype == torch.float32 for call in calls)
    called = Prediction(
        lambda x, t: x if {x.dtype, t.dtype} == {torch.float32} else None, "eps", flow
    )
    assert called(x, times[0]).dtype == called(x, times[:2]).dtype == torch.float32


# --------------------------------------------------------------------------------------- conditions


def test_conditions_reach_the_network():
    network, labels = Conditional(torch.float32), torch.tensor([1, 2])
    denoiser = Prediction(network, "eps", VP())
    x, t = torch.zeros(2, *SHAPE), torch.tensor([0.5], dtype=torch.float64)
    denoiser(x, 0.5, label=labels)
    denoiser.under(EDM()).at(t, x, label=labels)[0](x)
    assert all(seen[-1] is labels for seen in network.seen)


def test_unknown_conditions_are_explained():
    x, t = torch.zeros(2, *SHAPE), torch.tensor([0.5], dtype=torch.float64)
    denoiser = Prediction(Conditional(torch.float32), "eps", VP())
    with pytest.raises(TypeError, match=r"takes no condition 'class_label'; it takes 'label'"):
        denoiser.at(t, x, class_label=1)
    with pytest.raises(TypeError, match="class_label"):
        denoiser(x, 0.5, class_label=1)
    plain = Prediction(lambda x, t: x, "eps", VP())
    with pytest.raises(TypeError, match=r"takes no condition 'label'; it takes none"):
        plain.at(t, x, label=1)
    anything = Prediction(lambda x, t, **condition: condition["scale"] * x, "x0", VP())
    assert torch.equal(anything.at(t, x + 1, scale=3)[0](x + 1), 3 * (x + 1))


# -------------------------------------------------------------------------------- outputs and input


def test_outputs_of_another_shape_are_explained():
    x = torch.zeros(2, 3, 8, 8)
    double = Prediction(lambda x, t: torch.cat([x, x], 1), "eps", VP())
    with pytest.raises(
        ValueError, match=r"\(2, 6, 8, 8\).*twice the channels is a learned variance"
    ):
        double(x, 0.5)
    with pytest.raises(ValueError, match="learned variance"):
        double.at(torch.tensor([0.5], dtype=torch.float64), x)[0](x)
    with pytest.raises(
        ValueError,
        match=(
            r"returned shape \(2, 3\) for a state of shape \(2, 3, 8, 8\); it must return the same"
        ),
    ):
        Prediction(lambda x, t: x[..., 0, 0], "eps", VP())(x, 0.5)
    with pytest.raises(ValueError, match="returned tuple"):
        Prediction(lambda x, t: (x, x), "eps", VP())(x, 0.5)


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (
            lambda: Prediction(Recorder(), "epsi", VP()),
            ValueError,
            r"unknown prediction 'epsi'; did you mean 'eps'",
        ),
        (
            lambda: Prediction(Recorder(), "eps", VP),
            TypeError,
            "the process that the network was trained under",
        ),
        (
            lambda: Prediction(Recorder(), "eps", "vp"),
            TypeError,
            "the process that the network was trained under",
        ),
        (lambda: Prediction(torch.zeros(2), "eps", VP()), TypeError, "a network is called as"),
        (lambda: Prediction(Recorder(), "eps", VP(), time="index"), ValueError, "from_betas"),
        (
            lambda: Prediction(Recorder(), "eps", VP(), time="step"),
            ValueError,
            'time is "continuous", "index"',
        ),
        (
            lambda: Prediction(Recorder(), "eps", VP(), nsr_range=(2.0, 1.0)),
            ValueError,
            "0 <= low < high",
        ),
        (
            lambda: Prediction(Recorder(), "eps", VP(), nsr_range=(-1.0, 1.0)),
            ValueError,
            "0 <= low < high",
        ),
        (lambda: Preconditioned(Recorder(), sigma_data=0.0), ValueError, "sigma_data"),
        (
            lambda: as_denoiser(nn.Linear(2, 2), VP()),
            TypeError,
            r"what does Linear predict\? Say so: Prediction\(",
        ),
        (lambda: as_denoiser(3, VP()), TypeError, "a Denoiser or a score function"),
        (lambda: as_denoiser(lambda x, t: x, None), TypeError, "needs the process"),
    ],
)
def test_what_is_ambiguous_is_an_error(build, error, match):
    with pytest.raises(error, match=match):
        build()


def test_a_plain_function_is_a_score():
    known = target(VP())
    denoiser = as_denoiser(lambda x, t: known.score(x, t), VP())
    x = states(VP(), levels(VP(), 1.0))
    torch.testing.assert_close(
        denoiser(x, levels(VP(), 1.0)), known(x, levels(VP(), 1.0)), rtol=1e-5, atol=1e-5
    )
    assert as_denoiser(known, None) is known
    assert as_denoiser(known, VP()) is known
    assert as_denoiser(known, EDM()).process == EDM()


# --------------------------------------------------------------------------- denoisers of one's own


class Mine(Denoiser):
    """The least that a user writes: a process and a call."""

    process = VP()
    nsr_range = (0.01, 100.0)

    def __call__(self, x, t, **condition):
        return target(self.process)(x, t) * condition.get("scale", 1.0)


def test_a_users_denoiser_runs_on_every_path():
    mine = Mine()
    for path in PROCESSES:
        times, moved = levels(path, *NSRS), mine.under(path)
        x = states(path, times)
        expected = target(path)(x, times)
        torch.testing.assert_close(moved(x, times), expected, rtol=1e-8, atol=1e-8)
        for k, call in enumerate(moved.at(times, x)):
            torch.testing.assert_close(call(x)[k], expected[k], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(moved(x, times, scale=2.0), 2 * expected, rtol=1e-8, atol=1e-8)
    assert mine.under(VP()) is mine
    assert mine.under(EDM()).under(VP()) is mine
    # From an end of time without signal: asked at nsr 100, the nearest level it knows.
    x = torch.ones(1, *SHAPE, dtype=torch.float64)
    torch.testing.assert_close(
        mine.under(RectifiedFlow())(x, 1.0),
        mine(
            x
            / math.hypot(*map(float, RectifiedFlow().kernel(1.0)))
            * math.hypot(*map(float, VP().kernel(levels(VP(), 100.0)[0]))),
            levels(VP(), 100.0),
        ),
    )


def test_gradients_flow_to_the_state_the_time_and_the_process():
    flow = RectifiedFlow()
    denoiser = Prediction(exact("v", VP()), "v", VP(), time=lambda t: t).under(flow)
    x = torch.randn(2, *SHAPE, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: denoiser(x, 0.4), x)
    simple = Prediction(lambda x, t: 0.5 * x, "eps", VP()).under(flow)
    t = torch.tensor([0.3, 0.6], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda t: simple(x.detach(), t), t)
    assert gradcheck(lambda t: torch.stack([call(x.detach()) for call in simple.at(t, x)]), t)
