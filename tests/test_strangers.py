"""What strangers did to it, and what it answers since: their networks, noises, processes,
conditions and contexts.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from sdeflow import (
    RK45,
    VP,
    Denoiser,
    Gaussian,
    GridError,
    Heun,
    Noise,
    NonFiniteError,
    Plan,
    Prediction,
    Process,
    SeededNoise,
    SolverError,
    encode,
    grid,
    sample,
    solve,
)
from sdeflow.solvers.ode.runge_kutta import Euler

TARGET = Gaussian(torch.full((2,), 0.3), std=0.5, process=VP())


class Zero(Noise):
    def draw(self, nsr: Any = None, nsr_next: Any = None) -> Tensor:  # type: ignore[override]
        return torch.zeros(3, 2)


def test_a_noise_of_ones_own_needs_no_out_and_brings_its_seeds() -> None:
    noise = Zero(seeds=[7, 8, 9], shape=(2,))
    solution = solve(TARGET, solver="ddpm", nfe=5, n=3, noise=noise)
    assert solution.seeds == (7, 8, 9)
    with pytest.raises(ValueError, match="brings its seeds"):
        sample(TARGET, nfe=5, seeds=[1, 2, 3], noise=SeededNoise([7, 8, 9], (2,)))


def test_writing_into_the_state_is_refused() -> None:
    with pytest.raises(SolverError, match="network changed its input in place"):
        sample(Prediction(lambda x, t: x.mul_(0.5), "eps", VP(), shape=(2,)), nfe=5)
    with pytest.raises(SolverError, match="callback changed the state in place"):
        sample(TARGET, nfe=5, callback=lambda step: step.x.zero_())


def test_a_constant_will_do_for_s() -> None:
    class Mine(Process):
        t_min, t_max = 0.01, 80.0

        def s(self, t: Tensor) -> Any:
            return 1.0

        def sigma(self, t: Tensor) -> Tensor:
            return t

    times = torch.tensor([0.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(Mine().g2(times), 2 * times)
    x = sample(TARGET, Mine(), solver="rk45", n=400, seeds=0)
    assert (
        abs(float(x.std(0).mean()) - 0.5) < 0.04
    )  # 0.5 / sqrt(2 * 800) is a standard error: 3.2 of them


def test_conditions_are_cut_along_with_the_batch() -> None:
    seen: list[Any] = []

    def network(x: Tensor, t: Tensor, text: list[str], number: Tensor) -> Tensor:
        seen.append((text, number.tolist()))
        return 0.1 * x

    model = Prediction(network, "x0", VP(), shape=(2,))
    condition = {"text": ["a", "b", "c"], "number": torch.arange(3).numpy()}
    sample(model, nfe=1, n=3, batch_size=2, condition=condition)
    assert seen == [(["a", "b"], [0, 1]), (["c"], [2])]
    with pytest.raises(TypeError, match="needs the condition 'text'"):
        sample(model, nfe=1)
    sample(
        Prediction(lambda x, t, /, label: x * 0, "x0", VP(), shape=(2,)),
        nfe=1,
        condition={"label": 1},
    )


def test_a_grid_that_starts_low_or_runs_up_needs_a_state() -> None:
    with pytest.warns(UserWarning, match="only 0.* times the signal"):
        sample(TARGET, grid=[0.2, 0.1, 0.01])
    with pytest.raises(GridError, match="starts from a state"):
        sample(TARGET, grid=[0.01, 0.5, 1.0], finish=False)


@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        ({"solver": "rk45", "nfe": 7, "grid": [1.0, 0.001]}, ValueError, "max_nfe"),
        ({"device": "gpu9"}, ValueError, "no device 'gpu9'"),
        ({"seeds": 1.5}, TypeError, "seeds are integers"),
        ({"callback": 3}, TypeError, "callback"),
        ({"shape": (2.5,)}, ValueError, "whole number"),
        ({"x0": torch.zeros(1, 3), "t": 0.5}, ValueError, r"have the shape \(2,\)"),
        (
            {"x0": torch.zeros(2, 2), "t": torch.full((2,), 0.5)},
            TypeError,
            "one number for all samples",
        ),
        ({"solver": RK45(dense=True), "n": 4, "batch_size": 2}, ValueError, "one batch"),
    ],
)
def test_what_cannot_be_is_said(how: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        sample(TARGET, **how)
    with pytest.raises(ValueError, match="max_nfe"):
        encode(TARGET, torch.zeros(1, 2), solver="rk45", nfe=7)


def test_a_plan_without_records_keeps_no_trajectory() -> None:
    with pytest.raises(ValueError, match="record=True"):
        solve(TARGET, solver=Heun().plan(VP(), grid.uniform_t(VP(), 3)), trajectory=True)


def test_a_damaged_plan_is_refused() -> None:
    data = Heun().plan(VP(), grid.uniform_t(VP(), 3)).to_dict()
    for row in data["instructions"]:
        if row[0] == "call":
            row[2] = 99
    with pytest.raises(ValueError, match="damaged"):
        Plan.from_dict(data)


def test_allclose_sees_every_number_and_register() -> None:
    plan = Euler().plan(VP(), grid.uniform_t(VP(), 4))
    assert plan.allclose(Euler().plan(VP(), grid.uniform_t(VP(), 4)))
    assert not plan.allclose(plan.with_numbers(coefficients=plan.coefficients * (1 + 1e-9)))
    data = plan.to_dict()
    data["instructions"][0][5] += 1e-6  # the sigma of the first call
    assert not plan.allclose(Plan.from_dict(data))


def test_a_cached_plan_is_never_that_of_another_process() -> None:
    scale = {"value": 1.0}

    class Global(Process):
        def s(self, t: Tensor) -> Tensor:
            return 1 - 0.5 * t

        def sigma(self, t: Tensor) -> Tensor:
            return scale["value"] * t

    first = Euler().plan(Global(), [1.0, 0.5])
    scale["value"] = 2.0
    assert not first.allclose(Euler().plan(Global(), [1.0, 0.5]))
    table = Process.from_betas([0.01, 0.02, 0.03])
    assert Euler().plan(table, [1.0, 0.5]) is Euler().plan(table, [1.0, 0.5])
    assert len(repr(Process.from_betas(torch.linspace(1e-4, 0.02, 1000)))) < 100


def test_inference_mode_leaves_nothing_behind() -> None:
    def f(t: Tensor) -> Tensor:
        return -0.5 * (0.1 + 19.9 * t)

    with torch.inference_mode():
        inside = sample(TARGET, Process.from_sde(f, lambda t: -2 * f(t)), nfe=9, seeds=0)
    outside = sample(TARGET, Process.from_sde(f, lambda t: -2 * f(t)), nfe=9, seeds=0)
    torch.testing.assert_close(inside.clone(), outside)


class Custom(Denoiser):
    """A denoiser that somebody wrote, of N(0, 1/4) under VP."""

    process = VP()

    def __call__(self, x: Tensor, t: float | Tensor, /, **condition: Any) -> Tensor:
        return Gaussian(torch.zeros(2, dtype=x.dtype), std=0.5, process=VP())(x, t)


def test_a_custom_denoiser_under_another_process_copies_and_differentiates() -> None:
    from sdeflow import RectifiedFlow

    under = Custom().under(RectifiedFlow())
    assert copy.deepcopy(under).process == RectifiedFlow()
    x = torch.ones(1, 2, dtype=torch.float64)
    times = torch.tensor([0.9, 0.4], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: under.at(t, x)[0](x) + under.at(t, x)[1](x), (times,))


def test_batches_that_were_done_are_not_lost() -> None:
    calls = [0]

    def score(x: Tensor, t: Tensor) -> Tensor:
        calls[0] += 1
        return -x * (float("nan") if calls[0] > 10 else 1.0)

    with pytest.raises(NonFiniteError) as caught:
        sample(score, VP(), shape=(3,), n=4, batch_size=2, nfe=9, seeds=0)
    assert caught.value.finished.x.shape == (2, 3)
    assert bool(torch.isfinite(caught.value.finished.x).all())
