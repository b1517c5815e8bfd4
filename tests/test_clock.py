"""Clocks: their values, the way back to time, and the ODE of the state that belongs to them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sdeflow.errors import GridError, UnknownNameError
from sdeflow.process import EDM, VE, VP, Cosine, Level, Process, RectifiedFlow, SubVP
from sdeflow.process.clock import CLOCKS, Clock, ClockRange

PROCESSES = [
    VP(),
    SubVP(),
    Cosine(),
    VE(),
    EDM(),
    RectifiedFlow(t_max=0.999),
    Process.from_betas(torch.linspace(1e-4, 0.02, 50, dtype=torch.float64)),
]
SCALED = ("angle", "flow", "bounded_lam")
CASES = [Clock(name) for name in CLOCKS] + [Clock(name, 0.3) for name in SCALED]


def some_times(process: Process, n: int = 9) -> Tensor:
    return torch.linspace(process.t_max, max(process.t_min, 1e-3), n, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("t", lambda t, s, sigma, c: t),
        ("nsr", lambda t, s, sigma, c: sigma / s),
        ("lam", lambda t, s, sigma, c: math.log(s) - math.log(sigma)),
        ("asinh", lambda t, s, sigma, c: math.asinh(s / sigma)),
        ("angle", lambda t, s, sigma, c: math.atan2(sigma, c * s)),
        ("flow", lambda t, s, sigma, c: sigma / (c * s + sigma)),
        ("bounded_lam", lambda t, s, sigma, c: math.log(s / sigma + 1.0 / c)),
    ],
)
def test_the_value_at_a_level_is_its_formula(name, formula) -> None:
    for scale in (1.0, 0.3) if name in SCALED else (1.0,):
        clock = Clock(name, scale)
        for t, s, sigma in [(0.3, 0.8, 0.6), (0.9, 1e-3, 1.0), (2.0, 1.0, 7.0)]:
            level = Level(t, s, sigma, -1.0, 1.0)
            assert clock.reading(level) == formula(t, s, sigma, scale)
            of_tensors = Level(
                *(torch.tensor([v], dtype=torch.float64) for v in (t, s, sigma, -1.0, 1.0))
            )
            vector = clock.reading(of_tensors)
            assert vector.shape == (1,)
            torch.testing.assert_close(
                float(vector), formula(t, s, sigma, scale), rtol=1e-14, atol=1e-14
            )


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("clock", CASES, ids=str)
def test_values_of_times_and_of_lam_agree_and_lead_back(clock: Clock, process: Process) -> None:
    times = some_times(process)
    values = clock.readings(process, times)
    one_by_one = [float(clock.reading(level)) for level in process.levels(times)]
    torch.testing.assert_close(values, torch.tensor(one_by_one, dtype=torch.float64))
    of_lam = clock.of_lam(process.lam(times), process)
    torch.testing.assert_close(of_lam, values, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(clock.times(process, values), times, rtol=1e-6, atol=1e-9)
    if clock.name != "t":
        torch.testing.assert_close(clock.lam(values), process.lam(times), rtol=1e-7, atol=1e-9)
        alone = clock.lam(float(values[3]))
        assert isinstance(alone, float)
        torch.testing.assert_close(alone, float(process.lam(times[3])), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("name", ["t", "nsr", "lam", "asinh"])
def test_the_slope_is_the_derivative_of_the_state(name: str, process: Process) -> None:
    """On data of one point the ODE's solution is known: `x = s x0 + sigma eps`, both constant."""
    clock = Clock(name)
    x0, eps = 0.7, -1.3
    for level in process.levels(some_times(process)[1:-1]):
        t = torch.tensor(level.t, dtype=torch.float64, requires_grad=True)
        s, sigma = process.kernel(t)
        at = Level(t, s, sigma, math.nan, math.nan)
        z = (s * x0 + sigma * eps) / clock.state_scale(at) + 0.0 * t
        (dz,) = torch.autograd.grad(z, t, retain_graph=True)
        (dq,) = torch.autograd.grad(clock.reading(at), t)
        slope = clock.slope(float(z.detach()), x0, eps, level)
        torch.testing.assert_close(float(dz / dq), slope, rtol=1e-7, atol=1e-9)


def test_where_no_signal_is_left() -> None:
    level = RectifiedFlow().level(1.0)
    values = {name: Clock(name).reading(level) for name in CLOCKS}
    assert values["nsr"] == math.inf
    assert values["lam"] == -math.inf
    assert values["asinh"] == 0.0
    assert values["angle"] == math.pi / 2
    assert values["flow"] == 1.0
    assert values["bounded_lam"] == 0.0


@pytest.mark.parametrize("every", [False, True])
def test_a_range_meets_its_times_exactly(every: bool) -> None:
    process = VP()
    times = some_times(process)
    clock = ClockRange(Clock("asinh"), process, times, every=every)
    assert clock.sign == 1.0
    back = clock.time(clock.levels)
    torch.testing.assert_close(back, times)
    kept = back == times
    assert bool(kept[0])
    assert bool(kept[-1])
    assert not every or bool(kept.all())
    assert bool((clock.time(clock.levels[-1:] + 1.0) == times[-1]).all())  # not beyond the end


def test_a_range_reads_each_value_alone() -> None:
    process = Cosine()
    clock = ClockRange(Clock("lam"), process, some_times(process))
    values = torch.linspace(float(clock.levels[0]), float(clock.levels[-1]), 23).double()
    lam, t, s, sigma = clock.read(values, lambda *numbers: numbers)
    assert torch.equal(lam, values)
    assert torch.equal(t, clock.read(values.reshape(1, 23), lambda *numbers: numbers)[1][0])
    for i in range(23):
        alone = clock.read(values[i : i + 1], lambda *numbers: numbers)
        assert [float(v) for v in alone] == [float(v[i]) for v in (lam, t, s, sigma)]


def test_what_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="clock"):
        Clock("sidereal")
    with pytest.raises(ValueError, match="process"):
        Clock("t").of_lam(torch.zeros(1))
    with pytest.raises(ValueError, match="process"):
        Clock("t").lam(0.5)
    with pytest.raises(ValueError, match="no state"):
        Clock("flow").state_scale(VP().level(0.5))

    class Wavy(Process):
        def s(self, t: Tensor) -> Tensor:
            return torch.ones_like(t)

        def sigma(self, t: Tensor) -> Tensor:
            return 2.0 + torch.sin(20.0 * t)

    with pytest.raises(GridError, match="not monotone"):
        ClockRange(Clock("lam"), Wavy(), torch.linspace(1.0, 0.1, 9, dtype=torch.float64))
