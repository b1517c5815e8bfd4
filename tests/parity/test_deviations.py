"""Where a published implementation is wrong: what it does, by its stored results, live where
installed; and that ours is right.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from deviations import COUNTS, QUADRATIC, RUNS, clock, short
from problems import Mixture, Problem, _mixture_numpy, slopes
from published import diffusers, installed, k_diffusion
from scipy.integrate import quad, solve_ivp
from setting import NOISES, PROCESSES, InOrder, start, uneven
from test_parity import RESULTS, ours
from torch import Tensor

from sdeflow.process import Process
from sdeflow.reverse import Reverse
from sdeflow.solvers.ode.weights import adams


@pytest.mark.parametrize("key", list(RUNS))
def test_the_peer_still_does_so(key: str) -> None:
    peer, run = RUNS[key]
    if not installed(peer):
        pytest.skip(
            f"{peer} is not installed at the pinned version; the stored result stands for it"
        )
    torch.testing.assert_close(run(), RESULTS[key], rtol=1e-11, atol=1e-11, equal_nan=True)


class Parabola(Problem):
    """A prediction that is a parabola in lam, whatever the state."""

    def denoise(self, x: Tensor, s: Tensor, sigma: Tensor) -> Tensor:
        lam = torch.log(s) - torch.log(sigma)
        return torch.zeros_like(x) + sum(c * lam**k for k, c in enumerate(QUADRATIC))


def exact_step(process: Process, x: Tensor, t: float, t_next: float, rate: float = 0.0) -> Tensor:
    """Where a step of the reverse SDE, without its noise, takes `x / s` on a parabola: its linear
    part and one integral.
    """
    a, b = process.level(t), process.level(t_next)
    T = 1.0 + rate

    def integrand(lam: float) -> float:
        return T * math.exp(-T * (b.lam - lam)) * sum(c * lam**k for k, c in enumerate(QUADRATIC))

    whole = quad(integrand, a.lam, b.lam, epsabs=1e-15, epsrel=1e-13)[0]
    return x * (b.nsr / a.nsr * math.exp(-rate * (b.lam - a.lam))) + whole


def last_step_error(run: Callable[[int, int], Tensor], process: str, rate: float) -> list[float]:
    """How far the third step of a grid is from exact, given the state after two, for steps of 1,
    1/2 and 1/4 of a length.
    """
    errors = []
    for parts in (1, 2, 4):
        grid = short(3, parts)
        exact = exact_step(PROCESSES[process], run(parts, 2), float(grid[2]), float(grid[3]), rate)
        errors.append(float((run(parts, 3) - exact).abs().max()))
    return errors


def of_ours(process: str, solver: str, given: dict[str, Any]) -> Callable[[int, int], Tensor]:
    path = PROCESSES[process]

    def run(parts: int, steps: int) -> Tensor:
        times = short(steps, parts)
        made = ours(solver, given)
        noise = None if not made.stochastic else _Silence()
        x = made.integrate(
            Reverse(Parabola(path)), start(process, times[0]), times, noise, finish=False
        ).x
        return x / path.level(float(times[-1])).s

    return run


class _Silence(InOrder):
    def draw(self, *_: Any, **__: Any) -> Tensor:
        return torch.zeros_like(NOISES[0])


@pytest.mark.parametrize(
    ("key", "process", "solver", "rate", "power"),
    [
        # Half the weight of the second derivative: an error of h^3 a step.
        ("3m_sde", "edm", "dpmpp_3m_sde", 0.0, 3.0),
        ("3m", "sphere", "dpmpp_3m_sde", 0.0, 3.0),
        # -1/2 where k-diffusion, the paper's appendix and the ODE's branch have +1/2: an error of
        # h^2, global order 1.
        ("3m-diffusers-sde", "sphere", "dpmpp_3m_sde", 1.0, 2.0),
    ],
)
def test_three_predictions_are_not_interpolated_by_the_peers_3m(
    key: str, process: str, solver: str, rate: float, power: float
) -> None:
    theirs = last_step_error(
        lambda parts, steps: RESULTS[f"deviation/{key}/{parts}/{steps}"], process, rate
    )
    assert slopes(theirs)[-1] == pytest.approx(power, abs=0.35)
    exact = last_step_error(
        of_ours(process, solver, {"eta": rate, "exact_weights": True}), process, rate
    )
    assert max(exact) < 1e-13
    assert theirs[-1] > 1e-5


def errors_of(process: str, run: Callable[[int], Tensor]) -> list[float]:
    path, found = PROCESSES[process], []
    for n in COUNTS:
        times = uneven(process, n)
        a, b = path.level(float(times[0])), path.level(float(times[-1]))
        exact = _end(round(a.lam, 12), round(b.lam, 12))
        found.append(float((run(n) - exact).abs().max()))
    return found


@functools.lru_cache
def _end(lam: float, lam_next: float) -> Tensor:
    """Where the probability-flow ODE takes the start of these tests, as `x / s`; scipy's DOP853 in
    lam.
    """
    z = start("edm", math.exp(-lam)).numpy()

    def slope(lam: float, z: np.ndarray) -> np.ndarray:
        z = z.reshape(4, 2)
        return (_mixture_numpy(z, math.exp(-lam)) - z).ravel()

    end = solve_ivp(slope, (lam, lam_next), z.ravel(), method="DOP853", rtol=1e-11, atol=1e-11).y[
        :, -1
    ]
    return torch.from_numpy(end.reshape(4, 2))


def ours_at(process: str, solver: str, given: dict[str, Any]) -> Callable[[int], Tensor]:
    path = PROCESSES[process]

    def run(n: int) -> Tensor:
        times = uneven(process, n)
        x = (
            ours(solver, given)
            .integrate(Reverse(Mixture(path)), start(process, times[0]), times, None, finish=False)
            .x
        )
        return x / path.level(float(times[-1])).s

    return run


@pytest.mark.parametrize("p", [2, 3])
def test_azulas_reab_is_of_order_1(p: int) -> None:
    theirs = errors_of("sphere", lambda n: RESULTS[f"deviation/reab{p}/{n}"])
    right = errors_of(
        "sphere",
        ours_at(
            "sphere", "adams", {"p": p, "predicts": "v", "clock": "lam", "start_up": "singlestep"}
        ),
    )
    assert slopes(theirs)[-1] == pytest.approx(1.0, abs=0.25)
    assert slopes(right)[-1] > p - 0.25
    assert theirs[-1] > 50 * right[-1]


def test_torchdiffeqs_explicit_adams_takes_every_grid_for_an_even_one() -> None:
    assert float(RESULTS["deviation/adams/even"]) == pytest.approx(1.0, abs=1e-12)
    assert abs(float(RESULTS["deviation/adams/uneven"]) - 1.0) > 1e-4
    # Ours: the same polynomial as eps, in nsr, after a start that is exact for it.
    nsr = clock("uneven").flip(0) + 1.0
    nodes = [PROCESSES["edm"].level(float(r)) for r in nsr]
    x = nsr[2] ** 3
    for i in range(2, len(nodes) - 1):
        last = nodes[i - 2 : i + 1][::-1]
        b = adams("eps", "nsr", last, nodes[i], nodes[i + 1], PROCESSES["edm"])[1]
        x = x + sum(weight * 3.0 * node.nsr**2 for weight, node in zip(b, last, strict=True))
    assert float(x) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(
    ("spacing", "n", "off"),
    [("linspace", 12, 0.05), ("trailing", 12, 0.003), ("trailing", 48, 0.02), ("leading", 12, 0.0)],
)
def test_diffusers_ddim_does_not_step_to_the_level_where_it_goes_on(
    spacing: str, n: int, off: float
) -> None:
    reached, asked = RESULTS[f"deviation/ddim-{spacing}/{n}"]
    worst = float(((reached - asked) / asked).abs().max())
    assert worst > off if off else worst < 1e-12


def test_diffusers_unipc_bh1_cannot_step_to_zero_noise() -> None:
    assert bool(torch.isnan(RESULTS["deviation/unipc-bh1"]).all())
    assert bool(torch.isfinite(RESULTS["deviation/unipc-bh2"]).all())


def test_diffusers_deis_takes_its_weights_in_float32() -> None:
    stored = RESULTS["deviation/deis3-float32"]
    theirs, nsr = stored[:3], stored[3:]
    path = PROCESSES["sphere"]
    levels = [path.level(float(r)) for r in nsr]
    right = torch.tensor(
        adams("eps", "lam", levels[2::-1], levels[2], levels[3], path)[1], dtype=torch.float64
    )
    assert float((theirs - right).abs().max() / right.abs().max()) > 5e-6
    total = levels[3].s * (levels[3].nsr - levels[2].nsr)
    assert float(right.sum()) == pytest.approx(total, rel=1e-14)
    assert abs(float(theirs.sum()) - total) > 1e-6 * abs(total)


def test_diffusers_flow_matching_shifts_its_last_level_twice() -> None:
    last = float(RESULTS["deviation/flow-shift/8"][-2])

    def shift(t: float) -> float:
        return 3.0 * t / (1.0 + 2.0 * t)

    assert last == pytest.approx(shift(shift(0.001)), rel=1e-6)


def test_diffusers_sa_solver_ends_with_a_step_of_no_length() -> None:
    levels = RESULTS["deviation/sa-karras/8"]
    assert float(levels[-1]) == float(levels[-2]) > 0.0


@pytest.mark.parametrize("sampler", ["sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde"])
def test_k_diffusions_multistep_sde_samplers_cannot_take_one_step(sampler: str) -> None:
    solver = ours(sampler, {})
    path, one = PROCESSES["edm"], torch.tensor([12.0], dtype=torch.float64)
    x = solver.integrate(Reverse(Mixture(path)), start("edm", one[0]), one, None, finish=True).x
    assert bool(torch.isfinite(x).all())
    if not installed("k-diffusion"):
        pytest.skip("k-diffusion is not installed at the pinned version")
    with pytest.raises(UnboundLocalError):
        k_diffusion("edm", one, sampler)


def test_diffusers_edm_scheduler_has_no_third_order_of_the_sde() -> None:
    if not installed("diffusers"):
        pytest.skip("diffusers is not installed at the pinned version")
    with pytest.raises(UnboundLocalError):
        diffusers(
            "edm", uneven("edm", 6), "EDMDPMSolverMultistepScheduler", output="edm", solver_order=3,
            algorithm_type="sde-dpmsolver++",
        )  # fmt: skip
