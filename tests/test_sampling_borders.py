"""The borders of `sample` and `solve`: names, numbers and grids of everyday code, half precision,
states that are kept, faults in the middle of a solve.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sdeflow import EDM, VP, Prediction, RectifiedFlow, registry, sample, solve
from sdeflow.errors import UnknownNameError
from sdeflow.grid import karras
from sdeflow.solvers.ode.ddim import DDIM
from sdeflow.solvers.ode.runge_kutta import Heun
from sdeflow.targets import Gaussian


def gaussian(process: Any = None, std: float = 0.5) -> Gaussian:
    return Gaussian(torch.full((3,), 0.3), std=std, process=process or VP())


# ------------------------------------------------------------------------- everyday numbers and grids


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8])
def test_integers_of_numpy_are_whole_numbers(kind: Any) -> None:
    model = gaussian()
    plain = sample(model, solver="heun", nfe=9, n=4, seeds=3, batch_size=2)
    other = sample(model, solver="heun", nfe=kind(9), n=kind(4), seeds=kind(3), batch_size=kind(2))
    assert torch.equal(plain, other)
    shaped = sample(lambda x, t: -x, VP(), shape=(kind(2), kind(3)), nfe=kind(2), n=kind(1))
    assert shaped.shape == (1, 2, 3)


@pytest.mark.parametrize("t", [0.7, np.float32(0.7), np.float64(0.7), torch.tensor(0.7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_agree_to_float32(t: Any, dtype: torch.dtype) -> None:
    x = torch.ones(2, 3)
    grid = torch.linspace(0.7, 0.01, 10, dtype=dtype)
    found = sample(gaussian(), solver="ddim", x=x, t=t, grid=grid)
    exact = sample(
        gaussian(), solver="ddim", x=x, t=0.7, grid=torch.linspace(0.7, 0.01, 10).double()
    )
    assert torch.allclose(found, exact, atol=1e-5)
    plan = DDIM().plan(VP(), grid)
    assert torch.allclose(sample(gaussian(), solver=plan, x=x, t=t), exact, atol=1e-5)


@pytest.mark.parametrize("end", ["t_min", "t_max"])
@pytest.mark.parametrize("process", [VP(), EDM(), RectifiedFlow()])
def test_the_ends_of_time_may_be_rounded_to_float32(process: Any, end: str) -> None:
    t = getattr(process, end)
    x = t * torch.ones(1, 3)
    for given in (np.float32(t), torch.tensor(t, dtype=torch.float32)):
        found = sample(
            gaussian(process), solver="heun", nfe=1 if end == "t_min" else 5, x=x, t=given
        )
        same = sample(gaussian(process), solver="heun", nfe=1 if end == "t_min" else 5, x=x, t=t)
        assert torch.equal(found, same)


def test_a_state_at_another_time_than_the_grid_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"starts at t=0\.7, the state at t=0\.70001: .*leave t= out"
    ):
        sample(gaussian(), x=torch.ones(1, 3), t=0.70001, grid=[0.7, 0.1], solver="ddim")


@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp_2m", "euler_ancestral", "rk45", "auto"])
@pytest.mark.parametrize("process", [VP(), EDM(), RectifiedFlow()])
def test_a_trailing_zero_is_the_step_to_zero_noise(process: Any, name: str) -> None:
    model = gaussian(process)
    times = karras(process, 6) if isinstance(process, EDM) else torch.linspace(0.9, 0.05, 6)
    x = process.level(float(times[0])).sigma * torch.ones(2, 3)
    given = {"solver": name, "x": x, "seeds": 0, "n": 2}
    ends = sample(model, grid=times, **given)
    zero = sample(model, grid=torch.cat([times, torch.zeros(1)]), **given)
    assert torch.equal(ends, zero)
    with pytest.raises(ValueError, match="no noise is left there"):
        sample(model, grid=[*times.tolist(), 0.0], finish=False, **given)


def test_a_trailing_zero_is_no_level_of_the_budget() -> None:
    assert solve(gaussian(EDM()), solver="ddim", nfe=5, grid=[80, 20, 5, 1, 0.1, 0.0]).nfe == 5


# ------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "same", "grid"),
    [
        ("DPM++ 2M Karras", "dpmpp_2m", "karras"),
        ("DPM++ 2M SDE Heun Karras", "dpmpp_2m_sde_heun", "karras"),
        ("DPM++ 3M SDE Exponential", "dpmpp_3m_sde", "uniform_lam"),
        ("DPM++ 2M SGM Uniform", "dpmpp_2m", "sgm_uniform"),
        ("DPM++ 2S a Karras", "dpmpp_2s_ancestral", "karras"),
        ("DPM2 a Karras", "dpm2_ancestral", "karras"),
        ("LMS Karras", "lms", "karras"),
        ("heun-karras", "heun", "karras"),
        ("EDMDPMSolverMultistepScheduler", "dpmpp_2m", "karras"),
        ("DPM++ SDE", "dpmpp_sde", None),
        ("Euler a", "euler_ancestral", None),
        ("DPM2", "dpm_solver_2", None),
        ("DPM fast", "dpm_solver_fast", None),
        ("DPM adaptive", "dpm_adaptive_23", None),
        ("sample_euler", "ddim", None),
        ("DDIMScheduler", "ddim", None),
        ("EulerDiscreteScheduler", "ddim", None),
        ("DDPMScheduler", "ddpm", None),
    ],
)
def test_names_of_other_libraries(name: str, same: str, grid: str | None) -> None:
    solver = registry.solver(name)
    assert solver == registry.solver(same)
    assert solver.default_grid == grid
    assert registry.solver(same).default_grid is None
    if grid is not None:
        model = gaussian(EDM())
        found = solve(model, solver=name, nfe=9, seeds=0)
        assert found.grid == grid
        assert torch.equal(found.x, sample(model, solver=same, grid=grid, nfe=9, seeds=0))
        other = solve(model, solver=name, nfe=9, seeds=0, grid="uniform_lam")  # grid= overrides
        assert other.grid == "uniform_lam"


@pytest.mark.parametrize("name", ["sample_heun", "HeunDiscreteScheduler"])
def test_published_heun_steps_in_nsr(name: str) -> None:
    assert registry.solver(name) == Heun("nsr")


@pytest.mark.parametrize("name", registry.SOLVERS)
def test_a_name_with_a_space_reaches_every_solver(name: str) -> None:
    assert registry.solver(name.replace("_", " ").title()) == registry.solver(name)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("huen", "heun"),
        ("dpmp_2m", "dpmpp_2m"),
        ("DPM++ 2N", "dpm++_2m"),
        ("DDIMSchedular", "ddim"),
    ],
)
def test_a_near_miss_does_not_list_every_name(name: str, meant: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        registry.solver(name)
    said = str(caught.value)
    assert "did you mean" in said
    assert meant in said
    assert "sdeflow info" in said
    assert len(said) < 200


@pytest.mark.parametrize(
    ("word", "predicts"),
    [
        ("epsilon", "eps"),
        ("noise", "eps"),
        ("sample", "x0"),
        ("x_start", "x0"),
        ("v_prediction", "v"),
        ("flow_prediction", "velocity"),
    ],
)
def test_predictions_have_other_words(word: str, predicts: Any) -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * x

    with_word = Prediction(network, word, VP(), shape=(3,))  # type: ignore[arg-type]
    assert with_word.predicts == predicts
    assert torch.equal(
        sample(with_word, nfe=3, seeds=0),
        sample(Prediction(network, predicts, VP(), shape=(3,)), nfe=3, seeds=0),
    )
    with pytest.raises(UnknownNameError, match=f"did you mean.*'{word}'"):
        Prediction(network, word + "s", VP())  # type: ignore[arg-type]
