"""The randomness contract: a row depends on its own seed, and on nothing else in the batch, the
dtype, or the machine's state.
"""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from problems import CLOCKED, GRID_SOLVERS, STOCHASTIC, Mixture, slopes, warped
from torch import Tensor

from sdeflow.denoisers import Prediction
from sdeflow.noise import BrownianNoise, Noise, SeededNoise
from sdeflow.process import EDM, VP
from sdeflow.sampling.api import sample, solve
from sdeflow.solvers.base import Solver
from sdeflow.solvers.ode.ddim import DDIM
from sdeflow.solvers.sde.classic import DDPM, EulerMaruyama

SEEDS = [7, 3, 11, 5, 2**31, 2**40 + 1]
KINDS = ("seeded", "brownian")


def elementwise(x: Tensor, t: Tensor) -> Tensor:
    """An x0-network that is exact row by row: its low bits do not depend on the batch."""
    return (x / (1.0 + x.abs())).clamp(-0.75, 0.75)


def draw(
    solver: Solver,
    seeds: list[int],
    noise: str = "seeded",
    batch_size: int | None = None,
    **more: object,
) -> Tensor:
    nfe = solver.calls(5) if hasattr(solver, "calls") else None
    return sample(
        Prediction(elementwise, "x0", VP()),
        solver=solver,
        nfe=nfe,
        shape=(3, 5),
        seeds=seeds,
        noise=noise,
        batch_size=batch_size,
        **more,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("noise", KINDS)
@pytest.mark.parametrize("name", [name for name in GRID_SOLVERS if name not in CLOCKED])
def test_a_row_depends_on_its_own_seed_alone(name: str, noise: str) -> None:
    solver = GRID_SOLVERS[name]
    whole = draw(solver, SEEDS, noise)
    assert torch.equal(draw(solver, SEEDS, noise), whole)  # repeatable
    for row, seed in enumerate(SEEDS):
        assert torch.equal(draw(solver, [seed], noise)[0], whole[row])  # alone
    assert torch.equal(draw(solver, SEEDS[::-1], noise).flip(0), whole)  # permuted
    assert torch.equal(draw(solver, SEEDS, noise, batch_size=4), whole)  # split unevenly
    assert torch.equal(draw(solver, [*SEEDS, 99, 100], noise)[:6], whole)  # with other mates


@pytest.mark.parametrize("noise", KINDS)
def test_different_seeds_differ(noise: str) -> None:
    whole = draw(EulerMaruyama(), SEEDS, noise)
    gaps = torch.cdist(whole.flatten(1), whole.flatten(1)) + torch.eye(6)
    assert float(gaps.min()) > 0.01


@pytest.mark.parametrize("kind", [SeededNoise, BrownianNoise])
def test_noise_is_the_same_in_every_dtype(kind: type[Noise]) -> None:
    def draws(dtype: torch.dtype) -> list[Tensor]:
        noise = kind(SEEDS, (4,), dtype=dtype)
        return [noise.start(), noise.draw(8.0, 2.0), noise.draw(2.0, 1.0), noise.draw()]

    for exact, wide, half in zip(
        draws(torch.float32), draws(torch.float64), draws(torch.bfloat16), strict=True
    ):
        assert wide.dtype == torch.float64
        assert half.dtype == torch.bfloat16
        assert torch.equal(wide, exact.double())
        assert torch.equal(half, exact.bfloat16())


def test_results_agree_across_dtypes_to_their_rounding() -> None:
    for solver in (DDIM(), EulerMaruyama(), DDPM()):
        single, double = draw(solver, SEEDS), draw(solver, SEEDS, dtype=torch.float64)
        assert double.dtype == torch.float64
        torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-5)


def test_seeds_count_up_from_a_number() -> None:
    one = solve(Mixture(VP()), solver="ddpm", nfe=4, n=3, seeds=40)
    assert one.seeds == (40, 41, 42)
    assert torch.equal(one.x, sample(Mixture(VP()), solver="ddpm", nfe=4, seeds=[40, 41, 42]))
    assert torch.equal(one.x, sample(Mixture(VP()), solver="ddpm", nfe=4, seeds=range(40, 43)))
    assert torch.equal(
        one.x, sample(Mixture(VP()), solver="ddpm", nfe=4, seeds=torch.tensor([40, 41, 42]))
    )  # type: ignore[arg-type]
    assert torch.equal(one.x, sample(Mixture(VP()), solver="ddpm", nfe=4, n=3, seeds=np.int64(40)))  # type: ignore[arg-type]


def test_fresh_seeds_are_kept_and_reproduce() -> None:
    torch.manual_seed(0)
    first = solve(Mixture(VP()), solver="ddpm", nfe=4, n=3)
    torch.manual_seed(0)
    second = solve(Mixture(VP()), solver="ddpm", nfe=4, n=3)
    assert len(first.seeds) == 3
    assert first.seeds != second.seeds
    assert torch.equal(sample(Mixture(VP()), solver="ddpm", nfe=4, seeds=first.seeds), first.x)


@pytest.mark.parametrize("noise", KINDS)
@pytest.mark.parametrize("name", ["heun", "euler_maruyama", "rk45", "langevin"])
def test_global_generators_are_left_alone(name: str, noise: str) -> None:
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    before = (
        torch.get_rng_state(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
        random.getstate(),
    )
    sample(Mixture(VP()), solver=name, n=2, noise=noise)  # type: ignore[arg-type]
    sample(Mixture(VP()), solver=name, n=2, seeds=0, noise=noise)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert random.getstate() == before[2]


@pytest.mark.parametrize("name", ["heun", "ddim", "euler", "rk4"])
def test_deterministic_solvers_draw_nothing(name: str) -> None:
    class Forbidden(SeededNoise):
        def draw(self, *levels: object, **keywords: object) -> Tensor:
            raise AssertionError("a deterministic solver drew noise")

    for finish in (True, False):
        sample(Mixture(VP()), solver=name, finish=finish, n=2, noise=Forbidden(range(2), (2,)))


def test_a_stochastic_solver_draws_once_a_step_and_not_for_the_last() -> None:
    class Counted(SeededNoise):
        count = 0

        def draw(self, *levels: float, out: Tensor | None = None) -> Tensor:
            self.count += 1
            return super().draw(*levels, out=out)

    for name, draws in (("euler_maruyama", 9), ("ddpm", 9), ("ddim-eta=1", 9)):
        noise = Counted(range(2), (2,))
        sample(Mixture(VP()), solver=STOCHASTIC[name], nfe=10, n=2, noise=noise)
        assert noise.count == draws


@pytest.mark.parametrize("name", ["euler_maruyama", "ddpm"])
def test_brownian_noise_keeps_the_composition_at_20_and_40_steps(name: str) -> None:
    denoiser = Mixture(EDM())

    def ends(noise: str) -> list[Tensor]:
        grids = [warped(EDM(), n, 20.0, 0.05) for n in (20, 40)]
        return [
            sample(
                denoiser,
                solver=STOCHASTIC[name],
                grid=g,
                seeds=range(200),
                noise=noise,
                dtype=torch.float64,
            )
            for g in grids
        ]  # type: ignore[arg-type]

    def gap(noise: str) -> float:
        a, b = ends(noise)
        return float((a - b).norm(dim=1).median())

    assert gap("brownian") < gap("seeded") / 3


def test_brownian_increments_add_up() -> None:
    noise = BrownianNoise(range(4), (3,), dtype=torch.float64)
    nodes = [80.0, 20.0, 5.0, 1.0, 0.2, 0.002]

    def increment(a: float, b: float) -> Tensor:
        return noise.draw(a, b) * (a**2 - b**2) ** 0.5

    whole = increment(nodes[0], nodes[-1])
    parts = torch.stack([increment(a, b) for a, b in itertools.pairwise(nodes)]).sum(0)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


def test_the_start_does_not_depend_on_the_kind_of_noise_or_the_solver() -> None:
    starts = []
    for noise in KINDS:
        for solver in ("heun", "ddpm"):
            seen: list[Tensor] = []
            sample(
                Mixture(VP()),
                solver=solver,
                seeds=[1, 2],
                noise=noise,
                callback=lambda step, seen=seen: seen.append(step.x.clone()),
            )  # type: ignore[arg-type]
            starts.append(seen[0])
    assert all(torch.equal(start, starts[0]) for start in starts)
    assert slopes([2.0, 1.0]) == [1.0]
