"""Adaptive solvers choose their own steps: they agree with scipy and torchdiffeq in coefficients,
and in results to the tolerance.

And Euler-Maruyama, with torchsde on its own even grid.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.integrate
import torch
import torchsde
from problems import Mixture
from published import torchdiffeq
from setting import NOISES, PROCESSES, InOrder, start, uneven
from torch import Tensor

from sdeflow import registry
from sdeflow.reverse import Reverse
from sdeflow.solvers.ode import tableaus


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (tableaus.DORMAND_PRINCE, scipy.integrate.RK45),
        (tableaus.BOGACKI_SHAMPINE, scipy.integrate.RK23),
    ],
)
def test_the_tableau_is_scipys(ours: tableaus.Tableau, theirs: type) -> None:
    n = len(theirs.C)
    np.testing.assert_allclose(ours.c[:n], theirs.C, rtol=0, atol=1e-15)
    np.testing.assert_allclose(ours.b[:n], theirs.B, rtol=0, atol=1e-15)
    for i in range(n):
        np.testing.assert_allclose(ours.a[i], theirs.A[i, :i], rtol=0, atol=1e-14)
    assert ours.b_low is not None
    # Theirs is of higher less lower order or the reverse; its size is what a controller reads.
    difference = np.subtract(ours.b, ours.b_low)
    np.testing.assert_allclose(np.abs(difference), np.abs(theirs.E), rtol=0, atol=1e-14)


def test_the_tableau_is_torchdiffeqs() -> None:
    from torchdiffeq._impl.dopri5 import _DORMAND_PRINCE_SHAMPINE_TABLEAU as theirs

    ours = tableaus.DORMAND_PRINCE
    np.testing.assert_allclose(ours.c[1:], theirs.alpha, atol=1e-15)
    np.testing.assert_allclose(ours.b, theirs.c_sol, atol=1e-15)
    for row, beta in zip(ours.a[1:], theirs.beta, strict=True):
        np.testing.assert_allclose(row, beta, atol=1e-14)


@pytest.mark.parametrize("process", ["vp", "flow"])
@pytest.mark.parametrize(
    ("solver", "method", "rtol"), [("rk45", "dopri5", 1e-8), ("rk23", "bosh3", 1e-5)]
)
def test_it_agrees_with_torchdiffeq_to_the_tolerance(
    process: str, solver: str, method: str, rtol: float
) -> None:
    path, times = PROCESSES[process], uneven(process, 1)
    made = registry.SOLVERS[solver].make(rtol=rtol, atol=rtol / 100)
    x = made.integrate(
        Reverse(Mixture(path)), start(process, times[0]), times, None, finish=False
    ).x
    x = x / path.level(float(times[-1])).s
    theirs: Tensor = torchdiffeq(process, times, method, rtol=rtol, atol=rtol / 100)[1]
    torch.testing.assert_close(x, theirs, rtol=200 * rtol, atol=200 * rtol)


class _Increments(torchsde.BaseBrownian):
    """Brownian increments made of the noises that ours get."""

    def __init__(self) -> None:
        super().__init__()
        self._drawn = 1

    def __call__(
        self, ta: Any, tb: Any = None, return_U: bool = False, return_A: bool = False
    ) -> Tensor:
        self._drawn += 1
        return NOISES[self._drawn - 1] * math.sqrt(float(tb) - float(ta))

    def __repr__(self) -> str:
        return "increments"

    dtype, device, shape = torch.float64, torch.device("cpu"), torch.Size((4, 2))
    levy_area_approximation = "none"


@pytest.mark.parametrize("process", ["vp", "flow", "edm"])
def test_euler_maruyama_is_torchsdes_euler(process: str) -> None:
    path = PROCESSES[process]
    # Its steps are equal, and its time runs up: tau = top - t.
    times = torch.linspace(*(float(t) for t in uneven(process, 1)), 9, dtype=torch.float64)
    top = float(times[0])

    class Backwards(torch.nn.Module):
        noise_type, sde_type = "diagonal", "ito"

        def f(self, tau: Tensor, x: Tensor) -> Tensor:
            level = path.level(top - float(tau))
            s, sigma = torch.tensor([level.s, level.sigma], dtype=torch.float64)
            score = (s * Mixture().denoise(x, s, sigma) - x) / sigma**2
            return -(level.f * x - level.g2 * score)

        def g(self, tau: Tensor, x: Tensor) -> Tensor:
            return torch.full_like(x, math.sqrt(path.level(top - float(tau)).g2))

    x = start(process, times[0])
    ours = (
        registry.SOLVERS["euler_maruyama"]
        .make()
        .integrate(Reverse(Mixture(path)), x, times, InOrder(), finish=False)
        .x
    )
    dt = float(times[0] - times[1])
    taus = torch.tensor([0.0, top - float(times[-1])], dtype=torch.float64)
    theirs = torchsde.sdeint(
        Backwards(), x, taus, bm=_Increments(), method="euler", dt=dt * (1 + 1e-12)
    )[-1]
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
