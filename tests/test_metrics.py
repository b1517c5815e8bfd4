"""Metrics: streamed statistics are those of one pass, distances those of closed forms, and bias is
what it is said to be.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sdeflow._utils.distributed import Rank
from sdeflow.errors import NonFiniteError
from sdeflow.evaluation.metrics import (
    Statistics,
    expected_bias,
    frechet_distance,
    kernel_distance,
    precision_recall,
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(mean: Tensor, covariance: Tensor) -> Statistics:
    """Statistics that are these, to the bit."""
    statistics = Statistics(len(mean))
    statistics.n, statistics.mean, statistics.scatter = 3, mean.double(), covariance.double() * 2
    return statistics


def rotation(seed: int, dim: int) -> Tensor:
    return torch.linalg.qr(normal(seed, dim, dim))[0]


def assert_same(a: Statistics, b: Statistics, tolerance: float = 1e-12) -> None:
    assert a.n == b.n
    torch.testing.assert_close(a.mean, b.mean, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(a.covariance(), b.covariance(), rtol=tolerance, atol=tolerance)


# ----------------------------------------------------------------------------------- the statistics


def test_batches_and_merges_give_what_one_pass_gives() -> None:
    features = normal(0, 1000, 20) * 3 + 5
    whole = Statistics(20).update(features)
    batches = Statistics(20)
    for part in features.split([1, 400, 0, 99, 500]):
        batches.update(part)
    merged = (
        Statistics(20)
        .merge(Statistics(20).update(features[:17]))
        .merge(Statistics(20).update(features[17:]))
    )
    assert_same(batches, whole)
    assert_same(merged, whole)
    torch.testing.assert_close(whole.covariance(), torch.cov(features.T), rtol=1e-12, atol=1e-12)
    assert_same(whole.merge(Statistics(20)), Statistics(20).update(features))


def test_a_large_mean_costs_no_digits() -> None:
    features = normal(1, 5000, 4)
    far = Statistics(4)
    for part in (features + 1e7).split(100):
        far.update(part)
    torch.testing.assert_close(far.covariance(), torch.cov(features.T), rtol=1e-7, atol=1e-7)
    naive = (features + 1e7).T @ (features + 1e7) / 4999 - 5000 / 4999 * 1e14
    assert (
        float((naive - torch.cov(features.T)).abs().max()) > 1e-3
    )  # what the raw second moment would give


def test_features_of_any_floating_dtype_are_summed_in_float64() -> None:
    features = normal(2, 64, 3)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert_same(
            Statistics(3).update(features.to(dtype)),
            Statistics(3).update(features.to(dtype).double()),
        )
    assert Statistics(3).update(features.half()).covariance().dtype == torch.float64


@pytest.mark.parametrize(
    "features", [torch.zeros(3), torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.int64)]
)
def test_features_that_do_not_fit_are_refused(features: Tensor) -> None:
    with pytest.raises(ValueError, match=r"floating-point \[B, 3\]"):
        Statistics(3).update(features)


def test_too_few_and_non_finite_are_told() -> None:
    with pytest.raises(ValueError, match="at least two"):
        Statistics(3).update(torch.ones(1, 3)).covariance()
    with pytest.raises(NonFiniteError, match="NaN"):
        Statistics(3).update(torch.tensor([[0.0, math.nan, 0.0]])).update(
            torch.ones(2, 3)
        ).covariance()
    with pytest.raises(ValueError, match="dimensions"):
        Statistics(3).merge(Statistics(2))
    with pytest.raises(ValueError, match="at least one dimension"):
        Statistics(0)


def test_alone_the_reduction_over_processes_changes_nothing() -> None:
    features = normal(3, 50, 4)
    assert_same(Statistics(4).update(features).all_reduce(), Statistics(4).update(features), 0.0)


def test_the_reduction_over_processes_is_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes in turn, the collectives stood in for: first what each sends is seen, then
    what all get.
    """
    from sdeflow.evaluation.metrics import statistics as metrics

    features = normal(4, 90, 5) + 1e4
    parts = [features[:50], features[50:50], features[50:]]
    counts, means = (
        torch.tensor([50, 0, 40]),
        torch.stack([Statistics(5).update(part).mean for part in parts]),
    )
    sent: list[Tensor] = []

    def reduced(part: Tensor) -> Statistics:
        gathered = iter([counts, means])
        with monkeypatch.context() as patch:
            patch.setattr(metrics.distributed, "all_gather", lambda tensor: next(gathered))
            everyone = len(sent) == len(parts)
            mean = torch.stack(sent).mean(0) if everyone else None
            patch.setattr(
                metrics.distributed,
                "mean_",
                lambda t: t.copy_(mean) if mean is not None else sent.append(t.clone()) or t,
            )
            return Statistics(5).update(part).all_reduce()

    for part in parts:
        reduced(part)
    for part in parts:
        assert_same(reduced(part), Statistics(5).update(features), 1e-9)  # relative to 1e4, squared


# ------------------------------------------------------------------------------------- the distance


def test_commuting_gaussians_have_the_closed_form() -> None:
    q = rotation(0, 6)
    a, b = (
        torch.tensor(values, dtype=torch.float64)
        for values in ([1, 4, 9, 0.25, 0, 1e-6], [4, 4, 1, 1, 2, 0])
    )
    first, second = normal(1, 6), normal(2, 6)
    got = frechet_distance(exact(first, q @ a.diag() @ q.T), exact(second, q @ b.diag() @ q.T))
    assert got == pytest.approx(
        float((first - second).square().sum() + (a.sqrt() - b.sqrt()).square().sum()), rel=1e-10
    )


def test_one_dimension_is_that_of_means_and_deviations() -> None:
    got = frechet_distance(
        exact(torch.tensor([1.0]), torch.tensor([[4.0]])),
        exact(torch.tensor([-2.0]), torch.tensor([[9.0]])),
    )
    assert got == pytest.approx(9 + 1, rel=1e-12)


def test_general_gaussians_are_those_of_scipy() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    a, b = normal(3, 300, 40) @ normal(4, 40, 40), normal(5, 200, 40) @ normal(6, 40, 40) + 1
    first, second = Statistics(40).update(a), Statistics(40).update(b)
    root = linalg.sqrtm((first.covariance() @ second.covariance()).numpy()).real
    expected = (
        float(
            (a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace()
        )
        - 2 * root.trace()
    )
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_two_by_two_has_the_closed_form_of_the_trace() -> None:
    a, b = (m @ m.T for m in (normal(7, 2, 2), normal(8, 2, 2)))
    root = math.sqrt(
        float((a @ b).trace()) + 2 * math.sqrt(float(a.det() * b.det()))
    )  # of the eigenvalues of a b
    zero = torch.zeros(2)
    assert frechet_distance(exact(zero, a), exact(zero, b)) == pytest.approx(
        float(a.trace() + b.trace()) - 2 * root, rel=1e-12
    )


def test_a_set_is_at_distance_zero_from_itself_and_distances_are_symmetric() -> None:
    a, b = Statistics(30).update(normal(9, 100, 30)), Statistics(30).update(normal(10, 100, 30) * 2)
    assert frechet_distance(a, a) < 1e-11
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    assert frechet_distance(a, b) > 1


def test_singular_covariances_are_exact() -> None:
    """Fewer images than dimensions; rounding noise under a square root would leave 1e-8 a
    dimension.
    """
    few = Statistics(100).update(normal(11, 5, 100))
    assert frechet_distance(few, few) < 1e-11
    q = rotation(18, 60)
    apart = [exact(torch.zeros(60), q[:, i : i + 20] @ q[:, i : i + 20].T) for i in (0, 30)]
    assert frechet_distance(*apart) == pytest.approx(40.0, abs=1e-11)
    flat = exact(torch.zeros(3), torch.diag(torch.tensor([1.0, 0.0, 0.0])))
    tall = exact(torch.zeros(3), torch.diag(torch.tensor([0.0, 1.0, 0.0])))
    point = exact(torch.ones(3), torch.zeros(3, 3))
    assert frechet_distance(flat, tall) == pytest.approx(2.0, abs=1e-14)
    assert frechet_distance(flat, point) == pytest.approx(4.0, abs=1e-14)
    assert frechet_distance(point, point) == 0.0


def test_the_distance_is_invariant_under_motion_and_scales_with_its_square() -> None:
    a, b = normal(12, 80, 8) * 2, normal(13, 60, 8) + 1
    q, shift = rotation(14, 8), normal(15, 8)
    plain = frechet_distance(Statistics(8).update(a), Statistics(8).update(b))
    moved = frechet_distance(
        Statistics(8).update(a @ q + shift), Statistics(8).update(b @ q + shift)
    )
    assert moved == pytest.approx(plain, rel=1e-10)
    scaled = frechet_distance(Statistics(8).update(3 * a), Statistics(8).update(3 * b))
    assert scaled == pytest.approx(9 * plain, rel=1e-10)


def test_unequal_dimensions_have_no_distance() -> None:
    with pytest.raises(ValueError, match="one extractor"):
        frechet_distance(exact(torch.zeros(2), torch.eye(2)), exact(torch.zeros(3), torch.eye(3)))


# ----------------------------------------------------------------------------------------- its bias


def test_identical_gaussians_do_not_score_zero_and_the_bias_says_how_much() -> None:
    """PyTorch users' puzzle: 256 dimensions, 2000 draws each, distance 16.7."""
    a, b = (Statistics(256).update(normal(seed, 2000, 256)) for seed in (16, 17))
    unit = exact(torch.zeros(256), torch.eye(256))
    assert expected_bias(unit, 2000, 2000) == pytest.approx(256 * 261 / 4 * (2 / 2000), rel=1e-12)
    assert expected_bias(unit, 2000, 2000) == pytest.approx(16.7, abs=0.01)
    assert expected_bias(unit, 50_000, 50_000) == pytest.approx(0.668, abs=0.001)
    assert frechet_distance(a, b) == pytest.approx(16.7, rel=0.02)


def test_the_bias_holds_for_an_uneven_spectrum_against_an_exact_reference() -> None:
    scale = torch.logspace(0, -2, 24, dtype=torch.float64)
    truth = exact(torch.zeros(24), scale.square().diag())
    got = [
        frechet_distance(truth, Statistics(24).update(normal(seed, 400, 24) * scale))
        for seed in range(20, 60)
    ]
    assert sum(got) / len(got) == pytest.approx(expected_bias(truth, 400), rel=0.08)


# ----------------------------------------------------------------------------- precision and recall


def naive(real: Tensor, fake: Tensor, k: int) -> tuple[float, float]:
    def inside(points: Tensor, others: Tensor) -> float:
        radii = torch.cdist(others, others).fill_diagonal_(math.inf).sort(1).values[:, k - 1]
        return float((torch.cdist(points, others) <= radii).any(1).double().mean())

    return inside(fake, real), inside(real, fake)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_the_definition(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = normal(30, 130, 5), normal(31, 90, 5) * 0.7 + 0.5
    expected = naive(real, fake, k)
    assert precision_recall(real, fake, k=k) == expected
    assert 0 < expected[1] < expected[0] < 1
    monkeypatch.setattr("sdeflow.evaluation.metrics.manifolds.BLOCK", 700)  # a few rows at a time
    assert precision_recall(real.float() + 100, fake.float() + 100, k=k) == expected


def test_good_but_few_is_precise_and_varied_but_bad_recalls() -> None:
    real = normal(32, 300, 3)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 1000) == (0.0, 0.0)
    precision, recall = precision_recall(real, real[:40] * 0.05)
    assert precision > 0.95
    assert recall < 0.1
    precision, recall = precision_recall(real, normal(33, 300, 3) * 4)
    assert precision < 0.5
    assert recall > 0.9


def test_balls_are_closed() -> None:
    """On a line, spacing 1: radius 1 at k=1; a point at distance 1 from the last one is inside,
    beyond it is not.
    """
    real = torch.arange(6.0)[:, None]
    fake = torch.tensor([[-1.0], [6.0], [6.001], [-1.001]])
    assert precision_recall(real, fake, k=1)[0] == 0.5


def test_a_process_computes_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes in turn: the gathered parts are stood in for. A matrix product of other rows
    rounds differently on some processors, so the radii agree to rounding.
    """
    from sdeflow.evaluation.metrics import manifolds

    real, fake = normal(34, 31, 4), normal(35, 29, 4)
    ranks = [Rank(i, 2) for i in range(2)]
    parts: list[Tensor] = []
    monkeypatch.setattr(
        manifolds.distributed, "all_gather", lambda tensor: parts.append(tensor) or tensor
    )
    for rank in ranks:
        manifolds._radii(real, 3, rank)
    radii = torch.cat(parts)
    torch.testing.assert_close(radii, manifolds._radii(real, 3, Rank()), rtol=1e-10, atol=1e-10)
    whole = manifolds._inside(fake, real, radii, Rank())
    assert sum(manifolds._inside(fake, real, radii, rank) for rank in ranks) == pytest.approx(
        whole, abs=1.5 / len(fake)
    )


@pytest.mark.parametrize(
    ("real", "fake", "k", "said"),
    [((5, 2), (5, 3), 3, "one D"), ((3, 2), (5, 2), 3, "3 real images"),
     ((5, 2), (5, 2), 0, "k is 1 or more"), ((5,), (5, 2), 1, "one D")],
)  # fmt: skip
def test_features_that_have_no_neighbours_are_refused(
    real: tuple[int, ...], fake: tuple[int, ...], k: int, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        precision_recall(torch.zeros(real), torch.zeros(fake), k=k)


# ------------------------------------------------------------------------------ the kernel distance


def test_the_kernel_distance_is_its_definition() -> None:
    x, y = normal(40, 9, 3), normal(41, 7, 3) + 0.5
    kernel = lambda a, b: (float(a @ b) / 3 + 1) ** 3  # noqa: E731
    expected = (
        sum(kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (9 * 8)
        + sum(kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (7 * 6)
        - 2 * sum(kernel(a, b) for a in x for b in y) / (9 * 7)
    )
    found = kernel_distance(x, y)
    assert found.value == pytest.approx(expected, rel=1e-12)
    assert found.error is not None
    assert found.error > 0


def test_the_kernel_distance_is_unbiased_at_few_images() -> None:
    """Of one distribution its mean is 0 with sets of ten, where a Frechet distance has a bias."""
    values = torch.tensor(
        [kernel_distance(normal(100 + i, 10, 4), normal(900 + i, 10, 4)).value for i in range(400)]
    )
    assert abs(float(values.mean())) < 4 * float(values.std()) / 20


def test_the_standard_error_of_the_kernel_distance_is_that_of_repeats() -> None:
    found = [
        kernel_distance(normal(2000 + i, 80, 3), normal(5000 + i, 60, 3) * 1.4 + 0.7)
        for i in range(200)
    ]
    spread = float(torch.tensor([value for value, _ in found]).std())
    told = float(torch.tensor([error for _, error in found]).mean())
    assert told == pytest.approx(spread, rel=0.25)


@pytest.mark.parametrize(
    ("real", "fake", "said"), [((5, 2), (5, 3), "one D"), ((1, 2), (5, 2), "two images")]
)
def test_a_kernel_distance_that_has_no_value_is_refused(
    real: tuple[int, ...], fake: tuple[int, ...], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        kernel_distance(torch.zeros(real), torch.zeros(fake))
