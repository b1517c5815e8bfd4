"""Noise: the randomness contract, and the Brownian path against its law, itself and torchsde."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from scipy import stats

from sdeflow.noise import BrownianNoise, Noise, SeededNoise

KINDS = [SeededNoise, BrownianNoise]
SHAPES = [(), (1,), (15,), (17,), (3, 7, 5)]  # torch draws fewer than 16 numbers by another path
LEVELS = [80.0, 30.0, 11.0, 10.5, 2.0, 0.3, 0.01, 0.0]


def karras(n: int, low: float = 0.002, high: float = 80.0) -> list[float]:
    ramp = torch.linspace(high ** (1 / 7), low ** (1 / 7), n, dtype=torch.float64)
    return (ramp**7).tolist()


def everything(noise: Noise) -> torch.Tensor:
    """All that a solve may ask for, `[queries, B, *shape]`."""
    draws = [noise.start(), noise.draw(), noise.draw(math.inf, LEVELS[0])]
    draws += [noise.draw(a, b) for a, b in pairwise(LEVELS)]
    return torch.stack([*draws, noise.draw(2.0, 2.1), noise.draw()])


def standardised(noise: Noise, levels: list[float]) -> torch.Tensor:
    """The increments over a grid as columns, `[samples, steps]`, float64."""
    draws = [noise.draw(a, b).flatten() for a, b in pairwise(levels)]
    return torch.stack(draws, 1).double()


def assert_independent_standard_normal(z: torch.Tensor, alpha: float = 1e-6) -> None:
    """`z` of shape `[n, k]` against N(0, I_k): means, the covariance matrix and the distribution of
    all entries.

    For standard normal columns, n |mean|^2 is chi^2(k) and each of the k(k+1)/2 entries of the
    sample second moment is nearly normal, so that the sum of their squared z-scores is chi^2. Each
    of the three checks fails a right source with probability `alpha`; seeds are fixed, so a failure
    is a bug, not bad luck.
    """
    n, k = z.shape
    assert stats.chi2.sf(float(n * z.mean(0).square().sum()), k) > alpha
    moments = z.mT @ z / n - torch.eye(k)
    scores = moments * math.sqrt(n) / torch.where(torch.eye(k, dtype=torch.bool), math.sqrt(2), 1.0)
    upper = scores[torch.triu(torch.ones(k, k, dtype=torch.bool))]
    assert stats.chi2.sf(float(upper.square().sum()), len(upper)) > alpha
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > alpha


# ------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_is_bit_identical_alone_in_any_batch_and_permuted(kind, shape):
    seeds = [5, 2**40, -3, 0, 7, 5]
    batch = everything(kind(seeds, shape))
    assert torch.equal(batch[:, 0], batch[:, 5])
    for i, seed in enumerate(seeds):
        assert torch.equal(everything(kind([seed], shape))[:, 0], batch[:, i])
    order = [3, 1, 0, 4, 2]
    assert torch.equal(everything(kind([seeds[i] for i in order], shape)), batch[:, order])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_does_not_change_what_is_drawn(kind, dtype):
    drawn = everything(kind(range(4), (3, 5), dtype=dtype))
    assert drawn.dtype == dtype
    assert torch.equal(drawn, everything(kind(range(4), (3, 5))).to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_out_receives_the_same_bits(kind):
    for dtype in (torch.float32, torch.float64):
        plain, into = kind([1, 2, 3], (4, 5), dtype=dtype), kind([1, 2, 3], (4, 5), dtype=dtype)
        for levels in [(), (2.0, 1.0), (1.0, 0.5), (math.inf, 1.0)]:
            for out in (
                torch.full((3, 4, 5), math.nan, dtype=dtype),
                torch.empty(3, 5, 4, dtype=dtype).mT,
            ):
                assert into.draw(*levels, out=out) is out
                assert torch.equal(out, plain.draw(*levels))
    for shape in [(3, 4, 6), (2, 4, 5), (3, 20), (1, 3, 4, 5)]:
        with pytest.raises(ValueError, match="out has shape"):
            plain.draw(out=torch.empty(shape))


def test_the_start_is_torchs_own_and_no_draw():
    shape, seeds = (3, 8, 8), [0, 1, 2**32 - 1]
    expected = torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
    for kind in KINDS:
        noise, silent = kind(seeds, shape), kind(seeds, shape)
        assert torch.equal(noise.start(), expected)
        assert torch.equal(noise.start(), expected)
        assert torch.equal(noise.draw(), silent.draw())


def test_seeded_noise_ignores_levels_and_goes_on():
    one, two = SeededNoise([3, 4], (20,)), SeededNoise([3, 4], (20,))
    drawn = [one.draw(2.0, 1.0), one.draw(1.0, 0.0), one.draw(math.inf, 7.0)]
    assert all(torch.equal(a, two.draw()) for a in drawn)
    assert not torch.equal(drawn[0], drawn[1])


def test_every_64_bit_seed_counts():
    # torch's own CPU generator reads 32 bits: without hashing, 1 and 2^32 + 1 would be one seed.
    distinct = [0, 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1, -(2**63) + 1]
    for kind in KINDS:
        for draw in everything(kind(distinct, (16,))):
            assert len({tuple(row.tolist()) for row in draw}) == len(distinct)
        assert torch.equal(
            everything(kind([-1, -(2**63)], (3,))), everything(kind([2**64 - 1, 2**63], (3,)))
        )


def test_seeds_may_come_from_any_integers():
    expected = SeededNoise([3, 4], (2,)).start()
    for seeds in (
        range(3, 5),
        torch.tensor([3, 4]),
        torch.tensor([3, 4]).numpy(),
        (s for s in (3, 4)),
    ):
        assert torch.equal(SeededNoise(seeds, (2,)).start(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_explained(kind):
    for seeds, error in [
        (7, TypeError),
        ([0.5], TypeError),
        (["a"], TypeError),
        (None, TypeError),
        ([], ValueError),
    ]:
        with pytest.raises(error, match="seeds are integers, one a sample"):
            kind(seeds, (2,))
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match=r"a seed lies in \[-2\^63, 2\^64\)"):
            kind([seed], (2,))
    with pytest.raises(ValueError, match="every size at least 1"):
        kind([0], (3, 0))
    with pytest.raises(TypeError, match="floating dtype"):
        kind([0], (3,), dtype=torch.int64)


def test_bad_levels_are_explained():
    noise = BrownianNoise([0], (2,))
    for levels in [(1.0, None), (None, 1.0)]:
        with pytest.raises(ValueError, match="between two levels"):
            noise.draw(*levels)
    for levels in [(-1.0, 1.0), (1.0, math.nan)]:
        with pytest.raises(ValueError, match="non-negative"):
            noise.draw(*levels)


def test_seeded_draws_are_independent_standard_normal():
    noise = SeededNoise(range(16), (1024,))
    z = torch.stack([noise.start(), *(noise.draw() for _ in range(7))], -1).double()
    assert_independent_standard_normal(z.reshape(-1, 8))
    assert_independent_standard_normal(z.permute(1, 2, 0).reshape(-1, 16))  # between the seeds


# ----------------------------------------------------------------------------------- Brownian paths


def test_the_path_does_not_depend_on_the_order_of_queries():
    grid = karras(20)
    steps = list(pairwise(grid))
    forward, backward, fresh = (BrownianNoise([1, 2], (5,)) for _ in range(3))
    drawn = {step: forward.draw(*step) for step in steps}
    for step in [*reversed(steps), steps[7], steps[0], steps[12]]:
        assert torch.equal(backward.draw(*step), drawn[step])
    # Steps of many widths, which the tree resolves to different depths, from levels visited at
    # another one.
    for step in [
        (2.0, 0.7),
        (0.7, 0.699),
        (0.699, 0.5),
        (0.5, 0.699),
        (0.699, 0.69899),
        (0.69899, 0.6),
    ]:
        assert torch.equal(forward.draw(*step), BrownianNoise([1, 2], (5,)).draw(*step))
    fresh.draw(1e9, 1e-9)
    fresh.draw()
    assert torch.equal(fresh.draw(*steps[3]), drawn[steps[3]])


def test_swapping_the_levels_changes_the_sign():
    noise = BrownianNoise([1], (9,))
    for a, b in [(3.0, 1.0), (3.0, 0.0), (80.0, 79.9)]:
        assert torch.equal(noise.draw(a, b), -noise.draw(b, a))


@pytest.mark.parametrize("fine", [2, 7, 40, 160])
def test_a_long_step_is_the_sum_of_its_short_steps(fine):
    """To float32 rounding, as long as the short steps are wider than two leaves."""
    high, low = 50.0, 0.01
    grid = (
        torch.linspace(math.log(high), math.log(low), fine + 1, dtype=torch.float64).exp().tolist()
    )
    noise, total = BrownianNoise([4, 8], (33,)), 0.0
    for a, b in pairwise(grid):
        total = total + noise.draw(a, b).double() * math.sqrt(a**2 - b**2)
    long = noise.draw(grid[0], grid[-1]).double() * math.sqrt(grid[0] ** 2 - grid[-1] ** 2)
    torch.testing.assert_close(total, long, rtol=0, atol=3e-6 * high)


def test_20_and_40_steps_share_one_path_and_reach_zero():
    paths = []
    for n in (21, 41):
        ramp = torch.linspace(80 ** (1 / 7), 0.0, n, dtype=torch.float64)
        grid, noise, path = (ramp**7).tolist(), BrownianNoise([0], (50,)), {}
        total = torch.zeros(1, 50, dtype=torch.float64)
        for a, b in pairwise(grid):
            total = total + noise.draw(a, b).double() * math.sqrt(a**2 - b**2)
            path[round(b, 12)] = total
        paths.append(path)
    shared = paths[0].keys() & paths[1].keys()
    assert len(shared) == 20
    assert 0.0 in shared
    for level in shared:
        torch.testing.assert_close(paths[0][level], paths[1][level], rtol=0, atol=3e-4)


def test_a_level_one_ulp_off_is_the_same_level():
    noise = BrownianNoise([3], (200,))
    for level in (
        80.0,
        1.0,
        2.0 ** (1 / 64),
        0.002,
    ):  # inside a leaf, at an octave's end and at a leaf's end
        for other in (level / 3, level * 3):
            expected = noise.draw(level, other)
            for near in (math.nextafter(level, 0.0), math.nextafter(level, math.inf)):
                torch.testing.assert_close(noise.draw(near, other), expected, rtol=0, atol=2e-5)


def test_any_two_levels_give_a_finite_standard_normal():
    extreme = [
        0.0,
        5e-324,
        1e-25,
        1e-19,
        1e-4,
        1.0,
        math.nextafter(1.0, 2.0),
        1.00001,
        1.001,
        1e16,
        1e18,
        1e30,
        math.inf,
    ]
    noise = BrownianNoise(range(2), (2000,))
    for a in extreme:
        for b in extreme:
            z = noise.draw(a, b).double().flatten()
            assert bool(torch.isfinite(z).all()), (a, b)
            # 4000 numbers: their mean and their mean square are within 5.5 deviations (false alarm
            # 4e-8 each).
            assert abs(float(z.mean())) < 5.5 / math.sqrt(4000), (a, b)
            assert abs(float(z.square().mean()) - 1) < 5.5 * math.sqrt(2 / 4000), (a, b)


@pytest.mark.parametrize(
    "grid", [karras(12), karras(60)[::-1][:12], [3 * 1.003**-i for i in range(12)]]
)
def test_increments_are_independent_standard_normal(grid):
    """On long steps, on steps upwards, and on steps far narrower than a leaf."""
    z = standardised(BrownianNoise(range(8), (2048,)), grid)
    other = BrownianNoise(range(8), (2048,))
    extra = [other.start(), other.draw(), other.draw(math.inf, grid[0])]
    assert_independent_standard_normal(
        torch.cat([z, torch.stack([e.flatten() for e in extra], 1).double()], 1)
    )


def test_narrow_steps_add_up_to_the_right_variance():
    """1000 steps of 0.3 percent: their sums over stretches of the path are independent and of the
    right size.
    """
    grid = [1.003**-i for i in range(1001)]
    noise, stretches = BrownianNoise(range(4), (512,)), []
    for first in range(0, 1000, 50):
        total = 0.0
        for a, b in zip(grid[first : first + 50], grid[first + 1 : first + 51], strict=True):
            total = total + noise.draw(a, b).double() * math.sqrt(a**2 - b**2)
        stretches.append(total.flatten() / math.sqrt(grid[first] ** 2 - grid[first + 50] ** 2))
    assert_independent_standard_normal(torch.stack(stretches, 1))


def test_the_path_has_the_law_of_torchsdes():
    """Overlapping intervals, so that the covariances are not trivial; two-sample tests at 1e-6
    each.
    """
    torchsde = pytest.importorskip("torchsde")
    n = 20_000
    intervals = [(9.0, 4.0), (5.0, 1.0), (2.0, 0.5), (9.0, 0.1), (0.5, 0.1), (4.0, 3.5)]  # in tau
    theirs = torchsde.BrownianInterval(
        0.05, 10.0, size=(n, 1), dtype=torch.float64, entropy=0, halfway_tree=True, tol=1e-3
    )
    ours = BrownianNoise([0], (n,))
    a = torch.stack(
        [
            ours.draw(math.sqrt(hi), math.sqrt(lo)).double()[0] * math.sqrt(hi - lo)
            for hi, lo in intervals
        ],
        1,
    )
    b = torch.cat([theirs(lo, hi) for hi, lo in intervals], 1)
    exact = torch.tensor(
        [[max(0.0, min(p[0], q[0]) - max(p[1], q[1])) for q in intervals] for p in intervals]
    ).double()
    spread = torch.sqrt(
        (exact**2 + exact.diagonal().outer(exact.diagonal())) / n
    )  # of an entry of a sample covariance
    for sample in (a, b):
        assert (
            float(((sample.mT @ sample / n - exact) / spread).abs().max()) < 5.6
        )  # 36 entries, 2e-8 each
    for column in range(len(intervals)):
        assert stats.ks_2samp(a[:, column].numpy(), b[:, column].numpy()).pvalue > 1e-6


@pytest.mark.parametrize(("steps", "most"), [(10, 11), (40, 7.5), (1000, 4)])
def test_a_sequential_solve_draws_little(steps, most, monkeypatch):
    calls, keyed = 0, Noise._keyed

    def counted(self: Noise, keys: list[int]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return keyed(self, keys)

    monkeypatch.setattr(Noise, "_keyed", counted)
    standardised(BrownianNoise([0], (2,)), karras(steps + 1))
    assert calls <= most * steps


@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
def test_the_device_does_not_change_what_is_drawn(kind):
    drawn = everything(kind(range(4), (3, 5), device="cuda"))
    assert drawn.device.type == "cuda"
    assert torch.equal(drawn.cpu(), everything(kind(range(4), (3, 5))))
    # Many draws in flight at once: pinned memory must not be reused before its copy is done.
    moved, local = kind(range(4), (500, 500), device="cuda"), kind(range(4), (500, 500))
    assert all(torch.equal(a.cpu(), local.draw()) for a in [moved.draw() for _ in range(20)])


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_another_kind_of_cpu_changes_last_digits_only(capability: str, tmp_path: Path) -> None:
    code = (
        "import sys, torch; from sdeflow.noise import SeededNoise; "
        "torch.save(SeededNoise(range(8), (3, 32, 32)).draw(), sys.argv[1])"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    path = tmp_path / "drawn.pt"
    subprocess.run([sys.executable, "-c", code, str(path)], env=environment, check=True)
    here = SeededNoise(range(8), (3, 32, 32)).draw()
    torch.testing.assert_close(torch.load(path, weights_only=True), here, rtol=0, atol=1e-5)
