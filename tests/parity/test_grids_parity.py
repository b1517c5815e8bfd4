"""Our grids against those of k-diffusion and diffusers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import LINEAR_BETAS
from published import installed
from published_grids import GRIDS, HIGH, LOW
from setting import PROCESSES
from test_parity import RESULTS
from torch import Tensor

from sdeflow import grid
from sdeflow.process import EDM, Process

EDM_ = EDM()
TABLE = PROCESSES["betas"]
FIRST = float(torch.sqrt(1.0 / (1.0 - LINEAR_BETAS[0]) - 1.0))


def nsr(process: Process, times: Tensor) -> Tensor:
    return process.nsr(times)


def entries(times: Tensor) -> Tensor:
    return times * len(LINEAR_BETAS) - 1.0


OURS: dict[str, tuple[Callable[[], Tensor], float]] = {
    "grid/karras": (lambda: grid.karras(EDM_, 9), 1e-12),
    "grid/karras-rho=3": (lambda: grid.karras(EDM_, 9, rho=3.0), 1e-12),
    "grid/exponential": (lambda: grid.uniform_lam(EDM_, 9), 1e-12),
    "grid/polyexponential": (lambda: grid.polyexponential(EDM_, 9, rho=1.5), 1e-12),
    "grid/vp": (lambda: nsr(PROCESSES["vp"], grid.uniform_t(PROCESSES["vp"], 9)), 1e-12),
    "grid/leading": (lambda: entries(grid.leading(TABLE, 7)), 1e-12),
    "grid/leading-offset=1": (lambda: entries(grid.leading(TABLE, 7, offset=1)), 1e-12),
    "grid/trailing": (lambda: entries(grid.trailing(TABLE, 7)), 1e-12),
    "grid/linspace": (lambda: entries(grid.linspace(TABLE, 7)), 1e-12),
    "grid/karras-of-table": (lambda: nsr(TABLE, grid.karras(TABLE, 9)), 1e-9),
    "grid/exponential-of-table": (lambda: nsr(TABLE, grid.uniform_lam(TABLE, 9)), 1e-9),
    "grid/beta-of-table": (
        lambda: nsr(TABLE, grid.beta_quantiles(TABLE, 9, clock="nsr", last=True)),
        1e-9,
    ),
    "grid/edm": (lambda: grid.karras(EDM_, 9), 1e-12),
    "grid/ays-sd15": (lambda: grid.align_your_steps(EDM_, 10, model="sd15"), 1e-12),
    "grid/ays-sdxl": (lambda: grid.align_your_steps(EDM_, 10, model="sdxl"), 1e-12),
    "grid/ays-svd": (lambda: grid.align_your_steps(EDM(t_max=700.0), 10, model="svd"), 1e-12),
}


def test_every_stored_grid_is_compared() -> None:
    assert {*OURS} == {*GRIDS}
    assert (EDM_.t_min, EDM_.t_max) == (LOW, HIGH)


@pytest.mark.parametrize("key", list(GRIDS))
def test_our_grid_is_the_peers(key: str) -> None:
    lay, tolerance = OURS[key]
    torch.testing.assert_close(lay(), RESULTS[key], rtol=tolerance, atol=0.0)


@pytest.mark.parametrize("key", list(GRIDS))
def test_the_peer_still_lays_it_so(key: str) -> None:
    peer, lay = GRIDS[key]
    if not installed(peer):
        pytest.skip(f"{peer} is not installed at the pinned version; the stored grid stands for it")
    torch.testing.assert_close(lay(), RESULTS[key], rtol=1e-12, atol=0.0)
