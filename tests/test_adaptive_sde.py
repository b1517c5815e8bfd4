"""The adaptive solver of the reverse SDE: its order, its noise after refused steps, its
independence of the batch, its ends.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from problems import PROCESSES, FixedNoise, GaussianData, Mixture, Point
from torch import Tensor

from sdeflow import registry
from sdeflow.denoisers import Prediction
from sdeflow.errors import BudgetError, GridError, NonFiniteError, SolverError
from sdeflow.noise import Noise, SeededNoise
from sdeflow.process import EDM, VP, RectifiedFlow
from sdeflow.reverse import Reverse
from sdeflow.sampling.api import sample, solve
from sdeflow.solvers.adaptive.sde import AdaptiveSDE, _Paths

FORMS = ("euler", "ancestral")
SEEDS = [7, 3, 11, 5, 2**31, 2**40 + 1]


def elementwise(x: Tensor, t: Tensor) -> Tensor:
    """An x0-network that is exact row by row."""
    return (x / (1.0 + x.abs())).clamp(-0.75, 0.75)


MODEL = Prediction(elementwise, "x0", VP(), shape=(3, 5))


def test_names() -> None:
    assert registry.solver("gotta_go_fast") == registry.solver("ggf") == AdaptiveSDE()
    assert registry.solver("adaptive_ancestral") == AdaptiveSDE(form="ancestral")


# -------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("under", ["vp", "edm", "cosine"])
@pytest.mark.parametrize("form", FORMS)
def test_weak_order_two_from_the_exact_law(form: str, under: str) -> None:
    """With steps held constant the sampler is affine on Gaussian data: run on a basis, it shows its
    law, without Monte Carlo.
    """
    process, mean, std = PROCESSES[under], 0.7, 0.5
    ends = [float(process.t_of_nsr(n)) for n in (4.0, 0.3)]
    times = torch.tensor(ends, dtype=torch.float64)
    s, sigma = process.kernel(times)
    clock = times if form == "euler" else torch.asinh(s / sigma)
    data = GaussianData(process, mean, std)

    def errors(n: int) -> tuple[float, float]:
        class Basis(Noise):
            count = 1

            def draw(self, *levels: object, **keywords: object) -> Tensor:
                self.count += 1
                return (
                    torch.nn.functional.one_hot(torch.tensor(self.count), n + 2)
                    .double()
                    .unsqueeze(-1)
                )

        step = float((clock[1] - clock[0]).abs()) / n
        solver = AdaptiveSDE(1e9, 1e9, form=form, first_step=step, grow=1.0, safety=1.0)  # type: ignore[arg-type]
        x = torch.full((n + 2, 1), float(s[0]) * mean, dtype=torch.float64)
        x[1] += math.hypot(float(s[0]) * std, float(sigma[0]))
        noise = Basis(range(n + 2), (1,))
        with torch.no_grad():
            solution = solver.integrate(Reverse(data), x, times, noise, finish=False)
        assert solution.statistics["accepted"].tolist() == [n] * (n + 2)
        assert noise.count == n + 1
        y = solution.x
        variance = float(((y[1:] - y[0]) ** 2).sum())
        return abs(float(y[0]) - float(s[1]) * mean), abs(
            variance - float((s[1] * std) ** 2 + sigma[1] ** 2)
        )

    coarse, fine = errors(40), errors(80)
    for a, b in zip(coarse, fine, strict=True):
        assert b < 0.01
        if max(a, b) > 1e-12:  # the ancestral form keeps the mean exactly
            assert abs(math.log2(a / b) - 2) < 0.25


@pytest.mark.parametrize("form", FORMS)
def test_one_step_is_the_one_written(form: str) -> None:
    """Algorithm 1 of the paper, and the step of the ancestral form, written out under VP."""
    process = VP()
    times = torch.tensor([0.5, 0.48], dtype=torch.float64)
    data, x = (
        Mixture(process),
        torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    )
    a, b = process.level(0.5), process.level(0.48)
    z = FixedNoise(3, (2,)).draw()
    with torch.no_grad():
        got = AdaptiveSDE(1e3, 1e3, form=form, first_step=1.0).integrate(  # type: ignore[arg-type]
            Reverse(data), x, times, FixedNoise(3, (2,)), finish=False
        )
        if form == "euler":
            h = 0.02

            def increment(x: Tensor, level: Any) -> Tensor:
                score = (level.s * data(x, level.t) - x) / level.sigma**2
                return -h * (level.f * x - level.g2 * score) + math.sqrt(level.g2 * h) * z

            first = increment(x, a)
            want = x + 0.5 * (first + increment(x + first, b))
        else:
            ratio = b.nsr / a.nsr
            low = b.s * data(x, 0.5) + b.sigma * ratio * (x - a.s * data(x, 0.5)) / a.sigma
            low = low + b.sigma * math.sqrt(1 - ratio**2) * z
            want = low + 0.5 * b.s * (1 - ratio**2) * (data(low, 0.48) - data(x, 0.5))
    torch.testing.assert_close(got.x, want, rtol=1e-12, atol=1e-12)
    assert got.nfe == 2


# -------------------------------------------------------------------------------------------- noise


def test_refused_steps_split_their_noise_by_a_bridge() -> None:
    """Whatever was asked for and given up, the increments passed over are those of a Brownian
    motion.
    """
    n = 10_000
    paths = _Paths(FixedNoise(n, (1,)), torch.zeros(n, 1, dtype=torch.float64))
    rows, needed, asked, passed = torch.arange(n), set(range(n)), [], []

    def ask(at: float, to: float) -> Tensor:
        ends = torch.full((2, n), at, dtype=torch.float64)
        ends[1] = to
        return paths.increments(rows, ends[0], ends[1], ends[0], ends[1], needed)[:, 0]

    for at, tries in (
        (0.0, (1.0, 0.6, 0.3)),
        (0.3, (0.8, 0.7)),
        (0.7, (2.0,)),
        (2.0, (2.5, 2.1)),
        (2.1, (2.5,)),
    ):
        asked += [ask(at, to) for to in tries]
        passed.append(asked[-1])
        paths.pass_over(rows, torch.full((n,), tries[-1], dtype=torch.float64))
    whole_to_one, to_six_tenths = asked[0], asked[1]
    assert not any(paths.ahead)
    lengths = torch.tensor([0.3, 0.4, 1.3, 0.1, 0.4], dtype=torch.float64)
    normal = torch.stack(passed) / lengths.sqrt().unsqueeze(1)
    covariance = (normal @ normal.T / n).numpy()
    assert np.abs(covariance - np.eye(5)).max() < 4.5 * math.sqrt(2 / n)
    assert float(normal.mean(1).abs().max()) < 4.5 / math.sqrt(n)
    assert float((normal**4).mean(1).sub(3).abs().max()) < 4.5 * math.sqrt(96 / n)
    # One path: what was refused is what the shorter steps add up to.
    cov = float((whole_to_one * (passed[0] + passed[1])).mean())
    assert cov == pytest.approx(0.7, abs=4.5 * math.sqrt(1.2 / n))
    assert float((to_six_tenths * passed[0]).mean()) == pytest.approx(
        0.3, abs=4.5 * math.sqrt(0.3 / n)
    )


@pytest.mark.parametrize("form", FORMS)
def test_refusals_do_not_bias_the_samples(form: str) -> None:
    """Tolerances at which every third step is refused: mean and spread of Gaussian samples within
    4.5 standard errors.
    """
    n = 1200  # values, of 300 samples
    data = GaussianData(VP(), 0.4, 0.5)
    solver = AdaptiveSDE(0.05, 0.03, form=form, safety=1.0, exponent=0.5)  # type: ignore[arg-type]
    solution = solve(data, solver=solver, shape=(4,), seeds=range(n // 4), dtype=torch.float64)
    rejected, accepted = (
        float(solution.statistics[key].double().sum()) for key in ("rejected", "accepted")
    )
    assert rejected > 0.2 * accepted
    assert abs(float(solution.x.mean()) - 0.4) < 4.5 * 0.5 / math.sqrt(n) + 0.01
    assert abs(float(solution.x.std()) / 0.5 - 1.0) < 4.5 / math.sqrt(2 * n) + 0.01


def test_on_one_path_samples_converge_as_tolerances_fall() -> None:
    denoiser = Mixture(EDM())
    times = [float(EDM().t_of_nsr(n)) for n in (8.0, 0.1)]
    x = 8.0 * torch.randn(12, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = [
        sample(
            denoiser,
            solver=AdaptiveSDE(tol, tol, form="ancestral"),
            grid=times,
            x=x,
            finish=False,
            seeds=range(12),
            noise="brownian",
        )
        for tol in (0.1, 0.02, 0.004)
    ]
    gaps = [float((a - b).norm(dim=1).median()) for a, b in pairwise(ends)]
    assert gaps[1] < 0.5 * gaps[0]
    assert gaps[1] < 0.1


# ------------------------------------------------------------------------------------- a row by row


@pytest.mark.parametrize("noise", ["seeded", "brownian"])
@pytest.mark.parametrize("form", FORMS)
def test_a_row_depends_on_its_own_seed_alone(form: str, noise: Any) -> None:
    solver = AdaptiveSDE(0.1, 0.05, form=form)  # type: ignore[arg-type]

    def run(seeds: list[int], **more: Any) -> Any:
        return solve(MODEL, solver=solver, seeds=seeds, noise=noise, **more)

    whole = run(SEEDS)
    nfe = whole.statistics["nfe"]
    assert len(set(nfe.tolist())) > 1  # samples take different numbers of steps
    for row in (0, 5):
        alone = run([SEEDS[row]])
        assert torch.equal(alone.x[0], whole.x[row])
        assert alone.statistics["nfe"].tolist() == [int(nfe[row])]
    assert torch.equal(run(SEEDS[::-1]).x.flip(0), whole.x)
    assert torch.equal(run([*SEEDS, 99]).x[:6], whole.x)
    split = run(SEEDS, batch_size=4)
    assert torch.equal(split.x, whole.x)
    assert torch.equal(split.statistics["nfe"], nfe)
    with_levels = run(SEEDS[:4], grid=[1.0, 0.5, 1e-3]).x
    assert torch.equal(run(SEEDS[1:3], grid=[1.0, 0.5, 1e-3]).x, with_levels[1:3])


def test_calls_are_counted_a_sample_and_a_forward() -> None:
    rows: list[int] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        rows.append(len(x))
        return elementwise(x, t)

    for form in FORMS:
        rows.clear()
        solution = solve(
            Prediction(network, "x0", VP(), shape=(2,)),
            solver=AdaptiveSDE(0.1, 0.05, form=form),  # type: ignore[arg-type]
            seeds=range(5),
        )
        counts = solution.statistics
        assert torch.equal(counts["nfe"], 2 * (counts["accepted"] + counts["rejected"]) + 1)
        assert solution.nfe == int(counts["nfe"].max()) == len(rows) == solution.network_calls
        assert sum(rows) == int(counts["nfe"].sum())
        assert rows[-1] == 5  # the last step is the denoised prediction of all
        unfinished = solve(
            Prediction(network, "x0", VP(), shape=(2,)),
            solver=AdaptiveSDE(0.1, 0.05, form=form),  # type: ignore[arg-type]
            seeds=range(5),
            finish=False,
        )
        assert torch.equal(unfinished.statistics["nfe"], counts["nfe"] - 1)


def test_levels_between_are_met_and_kept() -> None:
    solution = solve(
        MODEL,
        solver=AdaptiveSDE(0.1, 0.05),
        seeds=SEEDS,
        grid=[1.0, 0.4, 0.1, 1e-3],
        trajectory=True,
        dtype=torch.float64,
    )
    assert solution.trajectory is not None
    assert solution.trajectory.shape == (5, 6, 3, 5)
    assert torch.equal(solution.trajectory[-1], solution.x)
    stopped = sample(
        MODEL,
        solver=AdaptiveSDE(0.1, 0.05),
        seeds=SEEDS,
        grid=[1.0, 0.4],
        finish=False,
        dtype=torch.float64,
    )
    assert torch.equal(solution.trajectory[1], stopped)


# --------------------------------------------------------------------------------------------- ends


@pytest.mark.parametrize("under", sorted(PROCESSES))
def test_the_ancestral_form_runs_from_every_end_of_time(under: str) -> None:
    """No error at all asks for the longest step: a point is reached in a few, and exactly."""
    process = PROCESSES[under]
    solution = solve(Point(process), solver="adaptive_ancestral", shape=(2,), seeds=range(3))
    assert torch.equal(solution.x, torch.full_like(solution.x, Point.value))
    assert solution.nfe < 12
    mixture = sample(
        Mixture(process), solver=AdaptiveSDE(0.1, 0.05, form="ancestral"), seeds=range(4)
    )
    assert bool(torch.isfinite(mixture).all())
    assert float(mixture.abs().max()) < 4.0


def test_the_euler_form_says_where_it_cannot_start() -> None:
    with pytest.raises(GridError, match="form='ancestral'"):
        sample(Mixture(RectifiedFlow()), solver="adaptive_sde", seeds=0)
    x = sample(Mixture(RectifiedFlow(t_max=0.99)), solver=AdaptiveSDE(0.1, 0.05), seeds=range(4))
    assert float(x.abs().max()) < 4.0


@pytest.mark.parametrize("under", ["vp", "rectified_flow"])
def test_samples_of_a_mixture_are_near_it_in_sliced_distance(under: str) -> None:
    """As near as another set of data is, at 1e-3: the limit is the mean of 40 such distances and 4
    of their deviations.
    """
    n, process = 384, PROCESSES[under]
    angles = np.linspace(0.0, np.pi, 16, endpoint=False)
    directions = np.stack([np.cos(angles), np.sin(angles)])

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(
            np.sqrt(((np.sort(a @ directions, 0) - np.sort(b @ directions, 0)) ** 2).mean())
        )

    null = [distance(Mixture.draw(n, 2 * k + 100), Mixture.draw(n, 2 * k + 101)) for k in range(40)]
    x = (
        sample(Mixture(process), solver=AdaptiveSDE(form="ancestral"), seeds=range(n))
        .double()
        .numpy()
    )
    assert distance(x, Mixture.draw(n, 7)) < np.mean(null) + 4.0 * np.std(null)


# ------------------------------------------------------------------------------------------- errors


def test_errors_say_what_was_reached() -> None:
    with pytest.raises(SolverError, match="max_nfe=11") as caught:
        solve(MODEL, solver=AdaptiveSDE(0.1, 0.05, max_nfe=11), seeds=range(3))
    assert caught.value.partial.x.shape == (3, 3, 5)
    assert bool((caught.value.partial.statistics["t"] < 1.0).all())
    with pytest.raises(SolverError, match=r"min_step=0\.005"):
        solve(MODEL, solver=AdaptiveSDE(1e-5, 1e-5, min_step=0.005), seeds=range(3))

    def broken(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(t.reshape(-1, 1) < 0.5, torch.full_like(x, math.nan), x / (1 + x.abs()))

    with pytest.raises(NonFiniteError, match="returned NaN"):
        solve(
            Prediction(broken, "x0", VP(), shape=(2,)),
            solver=AdaptiveSDE(0.1, 0.05),
            seeds=range(3),
        )


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: AdaptiveSDE(form="heun"), ValueError, "ancestral"),  # type: ignore[arg-type]
        (lambda: AdaptiveSDE(atol=0.0), ValueError, "tolerances"),
        (lambda: AdaptiveSDE(grow=0.5), ValueError, "grow"),
        (lambda: AdaptiveSDE(exponent=2.0), ValueError, "exponent"),
        (lambda: AdaptiveSDE().levels(20), BudgetError, "max_nfe"),
        (
            lambda: sample(
                MODEL, solver=AdaptiveSDE(), x=torch.zeros(1, 3, 5), grid=[0.1, 1.0], finish=False
            ),
            GridError,
            "noise to data",
        ),
        (
            lambda: AdaptiveSDE().integrate(
                Reverse(MODEL), torch.zeros(1, 3, 5), torch.tensor([1.0, 0.1]), None
            ),
            SolverError,
            "source of noise",
        ),
    ],
)
def test_bad_input_is_explained(make: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_other_noise_is_drawn_as_it_comes() -> None:
    """A noise of one's own is asked for independent draws, at most one a step that was tried."""

    class Counted(SeededNoise):
        count = 0

        def draw(self, *levels: float, out: Tensor | None = None) -> Tensor:
            assert not levels
            self.count += 1
            return super().draw(*levels, out=out)

    noise = Counted(SEEDS, (3, 5))
    solution = solve(MODEL, solver=AdaptiveSDE(0.1, 0.05), n=6, noise=noise)
    tried = solution.statistics["accepted"] + solution.statistics["rejected"]
    assert noise.count <= int(tried.max())
    assert torch.equal(solution.x, sample(MODEL, solver=AdaptiveSDE(0.1, 0.05), seeds=SEEDS))
