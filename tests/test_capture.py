"""A solve captured whole in a CUDA graph replays bit for bit what the loop gives."""

from __future__ import annotations

import pytest
import torch
from problems import GRID_SOLVERS
from torch import Tensor, nn

from sdeflow import grid
from sdeflow.denoisers import Prediction
from sdeflow.errors import SolverError
from sdeflow.noise import SeededNoise
from sdeflow.plan.instructions import Call
from sdeflow.process import VP
from sdeflow.reverse import Reverse
from sdeflow.sampling.capture import CapturedSolve

SHAPE = (3, 8, 8)


class Convolution(nn.Module):
    """A small network, deterministic on the device."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, bias: Tensor | None = None) -> Tensor:
        y = torch.tanh(self.layer(x)) * torch.cos(t).reshape(-1, 1, 1, 1)
        return y if bias is None else y + bias


def test_a_capture_needs_a_device() -> None:
    plan = GRID_SOLVERS["heun"].plan(VP(), grid.uniform_t(VP(), 4))
    with pytest.raises(SolverError, match="CUDA"):
        CapturedSolve(plan, Prediction(lambda x, t: x, "x0", VP()), torch.zeros(2, *SHAPE))


def test_what_speaks_against_a_capture_is_known_before() -> None:
    times = grid.uniform_t(VP(), 4)
    plan = GRID_SOLVERS["heun"].plan(VP(), times)
    moving = GRID_SOLVERS["heun"].plan(VP(), times.clone().requires_grad_())
    assert CapturedSolve.refusal(torch.device("cuda"), plan) is None
    assert "on cpu" in (CapturedSolve.refusal(torch.device("cpu")) or "")
    assert "gradients" in (CapturedSolve.refusal(torch.device("cuda"), moving) or "")


@pytest.mark.cuda
def test_what_is_kept_on_the_way_is_what_the_loop_keeps() -> None:
    denoiser = Prediction(Convolution().cuda().eval().requires_grad_(False), "x0", VP())
    plan = GRID_SOLVERS["ddpm"].plan(VP(), grid.uniform_sqrt_t(VP(), 7), record=True)
    starts = [SeededNoise(range(seed, seed + 4), SHAPE, device="cuda") for seed in range(3)]
    solve = CapturedSolve(plan, denoiser, starts[0].start(), x0s=True)
    for seed, noise in enumerate(starts):
        replay = solve.replay(noise.start(), noise)
        seen: list[Tensor] = []
        again = SeededNoise(range(seed, seed + 4), SHAPE, device="cuda")

        def keep(k: int, call: Call, x: Tensor, x0: Tensor, seen: list[Tensor] = seen) -> None:
            seen.append(x0.clone())

        with torch.no_grad():
            x, recorded = plan.execute(Reverse(denoiser), again.start(), again, keep)
        assert torch.equal(replay.x, x)
        assert replay.trajectory is not None
        assert torch.equal(replay.trajectory, torch.stack([*recorded, x]))
        assert replay.x0s is not None
        assert torch.equal(replay.x0s, torch.stack(seen))
        assert bool(replay.finite)


@pytest.mark.cuda
@pytest.mark.parametrize("name", GRID_SOLVERS)
def test_a_replay_is_the_loop_bit_for_bit(name: str) -> None:
    network = Convolution().cuda().eval().requires_grad_(False)
    denoiser = Prediction(network, "x0", VP())
    plan = GRID_SOLVERS[name].plan(VP(), grid.uniform_sqrt_t(VP(), 7))
    solve = None
    for seed in range(3):
        seeds = range(4 * seed, 4 * seed + 4)
        x = SeededNoise(seeds, SHAPE, device="cuda").start()
        solve = solve or CapturedSolve(plan, denoiser, x)
        captured = solve(x, SeededNoise(seeds, SHAPE, device="cuda"))
        with torch.no_grad():
            eager, _ = plan.execute(Reverse(denoiser), x, SeededNoise(seeds, SHAPE, device="cuda"))
        assert torch.isfinite(captured).all()
        assert torch.equal(captured, eager)


@pytest.mark.cuda
def test_conditions_are_read_at_each_replay() -> None:
    denoiser = Prediction(Convolution().cuda().eval().requires_grad_(False), "x0", VP())
    plan = GRID_SOLVERS["ddim"].plan(VP(), grid.uniform_t(VP(), 4))
    x = torch.randn(2, *SHAPE, device="cuda")
    bias = torch.zeros(2, 1, 1, 1, device="cuda")
    solve = CapturedSolve(plan, denoiser, x, {"bias": bias})
    before = solve(x)
    bias.fill_(0.5)
    assert not torch.equal(solve(x), before)
    with pytest.raises(ValueError, match="captured for states of shape"):
        solve(x[:1])


@pytest.mark.cuda
def test_a_network_that_waits_is_refused_with_a_reason() -> None:
    denoiser = Prediction(lambda x, t: x * float(x.mean()), "x0", VP())
    plan = GRID_SOLVERS["ddim"].plan(VP(), grid.uniform_t(VP(), 4))
    with pytest.raises(SolverError, match="cannot be captured"):
        CapturedSolve(plan, denoiser, torch.randn(2, *SHAPE, device="cuda"))
    assert torch.isfinite(
        torch.randn(2, device="cuda").sum()
    )  # the device is none the worse for it
