"""Forward paths against their exact law, and the arc between noises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from problems import PROCESSES
from torch import Tensor

from sdeflow import EDM, VP, GridError, Process, RectifiedFlow, simulate, slerp

MANY = 20_000


def times_of(process: Process, n: int = 4) -> Tensor:
    low, high = math.log(max(process.t_min, 1e-3)), math.log(process.t_max)
    times = torch.linspace(low, high, n, dtype=torch.float64).exp()
    times[-1] = process.t_max
    return times


@pytest.mark.parametrize("name", PROCESSES)
def test_paths_have_the_exact_law(name: str) -> None:
    """Mean, variance and the covariance of every two times, given `x0`: `cov(x_i, x_j) =
    s_i s_j nsr_i^2` for `t_i < t_j`.
    """
    process = PROCESSES[name]
    times = times_of(process)
    x0 = torch.tensor([0.5, -2.0])[:, None].expand(2, MANY)
    x = simulate(process, x0, times, seeds=0).double()
    levels = process.levels(times)
    for row in range(2):
        path = x[:, row]
        mean = torch.tensor([level.s * float(x0[row, 0]) for level in levels], dtype=torch.float64)
        std = torch.tensor([level.sigma for level in levels], dtype=torch.float64)
        assert bool(((path.mean(1) - mean).abs() < 5 * std / math.sqrt(MANY) + 1e-6).all())
        exact = torch.tensor(
            [
                [
                    a.s * b.s * min(a.nsr, b.nsr) ** 2 if a.s * b.s else (a.sigma**2) * (a is b)
                    for b in levels
                ]
                for a in levels
            ],
            dtype=torch.float64,
        )
        found = (path - mean[:, None]) @ (path - mean[:, None]).T / MANY
        scale = std[:, None] * std
        assert bool(((found - exact).abs() / scale < 5 * math.sqrt(2 / MANY)).all())


def test_a_path_is_that_of_its_seed() -> None:
    x0 = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0))
    times = times_of(VP(), 9)
    whole = simulate("vp", x0, times, seeds=[7, 8, 9])
    assert torch.equal(simulate(VP(), x0[1:], times, seeds=8), whole[:, 1:])
    coarse = simulate(VP(), x0, times[::4], seeds=np.array([7, 8, 9]))
    torch.testing.assert_close(coarse, whole[::4], rtol=1e-4, atol=1e-4)
    assert not torch.equal(simulate(VP(), x0, times), simulate(VP(), x0, times))
    for dtype in (torch.bfloat16, torch.float64):
        assert simulate(VP(), x0.to(dtype), times, seeds=0).dtype == dtype


def test_the_data_itself_is_at_time_zero() -> None:
    x0 = torch.randn(2, 3)
    assert torch.equal(simulate(RectifiedFlow(), x0, [0.0, 0.5, 1.0], seeds=0)[0], x0)
    end = simulate(RectifiedFlow(), torch.full((1, MANY), 3.0), [0.5, 1.0], seeds=0)[1]
    assert abs(float(end.mean())) < 5 / math.sqrt(MANY)  # no signal is left
    assert abs(float(end.std()) - 1) < 5 / math.sqrt(MANY)


def test_what_cannot_be_simulated_is_said() -> None:
    class Falling(Process):
        def s(self, t: Tensor) -> Tensor:
            return torch.ones_like(t)

        def sigma(self, t: Tensor) -> Tensor:
            return 1.1 - t

    x0 = torch.zeros(2, 3)
    with pytest.raises(GridError, match="give times that increase"):
        simulate(VP(), x0, [0.9, 0.1], seeds=0)
    with pytest.raises(GridError, match=r"times from 0 to t_max=1; got 0.1 to 3"):
        simulate(VP(), x0, [0.1, 3.0], seeds=0)
    with pytest.raises(ValueError, match=r"nsr|fall"):
        simulate(Falling(), x0, [0.1, 0.9], seeds=0)
    with pytest.raises(ValueError, match="2 samples and 3 seeds"):
        simulate(VP(), x0, [0.1], seeds=[1, 2, 3])
    with pytest.raises(TypeError, match="floating"):
        simulate(VP(), torch.zeros(2, dtype=torch.int64), [0.1])


# -------------------------------------------------------------------------------------------- slerp


def test_slerp_runs_along_the_arc() -> None:
    a, b = (torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    assert torch.allclose(slerp(a, b, 0.0), a, atol=1e-6)
    assert torch.allclose(slerp(a, b, 1.0), b, atol=1e-6)
    weights = torch.linspace(0, 1, 5)
    arc = slerp(a, b, weights)
    assert arc.shape == (5, *a.shape)
    for w, mixed in zip(weights.tolist(), arc, strict=True):
        assert torch.allclose(slerp(a, b, w), mixed, atol=1e-6)
    # By hand, in a plane: a quarter of a circle, in equal angles.
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    angles = weights * torch.pi / 2
    expected = torch.stack([angles.cos(), angles.sin()], 1)[:, None]
    assert torch.allclose(slerp(x, y, weights), expected, atol=1e-6)
    assert slerp(a.half(), b.half(), 0.5).dtype == torch.float16


def test_slerp_keeps_the_variance_that_lerp_halves() -> None:
    a, b = (torch.randn(2, MANY, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    assert abs(float(slerp(a, b, 0.5).var()) - 1.0) < 0.05
    assert abs(float(torch.lerp(a, b, 0.5).var()) - 0.5) < 0.05


def test_slerp_of_one_direction_is_a_line_and_of_two_opposite_ones_nothing() -> None:
    a = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(slerp(a, a, 0.3), a, atol=1e-6)
    assert torch.allclose(slerp(a, 3 * a, 0.5), 2 * a, atol=1e-5)
    assert bool(slerp(torch.zeros(1, 3), torch.ones(1, 3), 0.5).isfinite().all())
    with pytest.raises(ValueError, match="number 1 point in opposite"):
        slerp(a, torch.stack([a[0], -a[1]]), 0.5)
    with pytest.raises(ValueError, match="one shape"):
        slerp(a, a[:1], 0.5)


def test_edm_in_float32_keeps_small_increments() -> None:
    x = simulate(EDM(t_max=100.0), torch.zeros(1, MANY), [1e-3, 80.0, 80.0001], seeds=0)
    step = (x[2] - x[1]).double()
    exact = math.sqrt(80.0001**2 - 80.0**2)
    assert abs(float(step.std()) / exact - 1.0) < 5 / math.sqrt(2 * MANY) + 1e-3
