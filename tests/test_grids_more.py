"""Grids of the field by their published formulas and numbers, wrappers, tables, and grids searched
on a model's trajectories.
"""

from __future__ import annotations

import itertools
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from peers import k_sampling
from problems import PROCESSES, GaussianData, Mixture
from scipy import stats
from torch import Tensor

from sdeflow import grid
from sdeflow.errors import GridError, UnknownNameError
from sdeflow.process import EDM, VE, VP, Cosine, FromBetas, Process, RectifiedFlow
from sdeflow.registry import GRIDS, grid_function, lookup
from sdeflow.sampling.api import sample, solve
from sdeflow.solvers.base import check_times
from sdeflow.solvers.ode.weights import adams
from sdeflow.tuning.gits import SearchedGrid, gits

F64 = torch.float64
TABLE = PROCESSES["from_betas"]
assert isinstance(TABLE, FromBetas)
STABLE = Process.from_betas(
    torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=F64) ** 2
)  # Stable Diffusion's
assert isinstance(STABLE, FromBetas)


def close(got: Tensor, expected: Any, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=F64), rtol=rtol, atol=0)


# ------------------------------------------------------------------------------- published formulas


@pytest.mark.parametrize("n", [2, 5, 18])
def test_grids_of_k_diffusion(n: int) -> None:
    """The same levels as k-diffusion computes, which appends the zero."""
    k = k_sampling()
    low, high = 0.03, 14.6
    bounds = {"nsr_min": low, "nsr_max": high}
    for rho in (7.0, 3.0):
        close(
            grid.karras(EDM(), n, rho=rho, **bounds),
            k.get_sigmas_karras(n, low, high, rho)[:-1].double(),
            3e-6,
        )
    close(
        grid.uniform_lam(EDM(), n, **bounds),
        k.get_sigmas_exponential(n, low, high)[:-1].double(),
        3e-6,
    )
    for rho in (1.0, 2.5, 0.5):
        ours = grid.polyexponential(EDM(), n, rho=rho, **bounds)
        close(ours, k.get_sigmas_polyexponential(n, low, high, rho)[:-1].double(), 3e-6)
    theirs = k.get_sigmas_vp(n)[:-1].double()
    ends = {"nsr_max": float(theirs[0]), "nsr_min": float(theirs[-1])}
    close(grid.uniform_vp(EDM(), n, **ends), theirs, 1e-4)  # float32 near t = 0


def test_the_other_count_of_karras() -> None:
    """`k/N`: `n + 1` levels without a zero, the last of which the step to zero noise may
    replace.
    """
    k = torch.arange(11, dtype=F64)
    expected = (80 ** (1 / 7) + k / 10 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    close(grid.karras(EDM(), 11), expected)
    close(grid.karras(EDM(), 10, last=False), expected[:10])
    close(grid.without_last(grid.karras)(EDM(), 10), expected[:10])


def test_a_table_of_what_is_uniform_in_what() -> None:
    def uneven(values: Tensor) -> float:
        gaps = values.diff()
        return float((gaps / gaps.mean() - 1.0).abs().max())

    for process in (VP(), EDM(), VE()):
        lam = process.lam
        assert (
            uneven(
                torch.asinh((lam(grid.dense_lam(process, 12, center=0.7, width=0.6)) - 0.7) / 0.6)
            )
            < 1e-9
        )
        end = lam(process.t_min)
        assert (
            uneven(((end - lam(grid.polyexponential(process, 12, rho=2.0))).clamp_min(0)) ** 0.5)
            < 1e-6
        )
        assert uneven(VP().t_of_lam(lam(grid.uniform_vp(process, 12)))) < 1e-9
        assert uneven(VP().t_of_lam(lam(grid.uniform_vp(process, 12, rho=2.0))).sqrt()) < 1e-9
        assert uneven(Cosine().t_of_lam(lam(grid.uniform_cosine(process, 12)))) < 1e-8
        assert uneven(torch.sigmoid(-lam(grid.flow_shift(process, 12, shift=1.0)))) < 1e-8
    close(grid.uniform_vp(VP(), 12), grid.uniform_t(VP(), 12), 1e-11)
    close(grid.uniform_cosine(Cosine(), 12), grid.uniform_t(Cosine(), 12), 1e-9)
    close(
        grid.flow_shift(RectifiedFlow(), 12, shift=1.0), grid.uniform_t(RectifiedFlow(), 12), 1e-11
    )
    u = torch.linspace(0, 1, 9, dtype=F64)
    span = EDM().t_max - EDM().t_min
    torch.testing.assert_close(
        grid.cosine_t(EDM(), 9),
        EDM().t_min + span * (1 + torch.cos(math.pi * u)) / 2,
        rtol=0,
        atol=1e-12,
    )
    half = grid.cosine_t(EDM(), 9, both=False)
    torch.testing.assert_close(
        half, EDM().t_min + span * (1 - torch.sin(math.pi * u / 2)), rtol=0, atol=1e-12
    )


def test_a_narrow_centre_is_dense_and_a_wide_one_is_uniform() -> None:
    process = EDM()
    close(grid.dense_lam(process, 20, width=1e4), grid.uniform_lam(process, 20), 1e-6)
    lam = process.lam(grid.dense_lam(process, 40, center=1.0, width=0.5))
    gaps = lam.diff()
    assert abs(float(lam[:-1][gaps.argmin()]) - 1.0) < 0.3
    middle = 0.5 * (lam[1:] + lam[:-1])
    ratio = gaps / torch.sqrt(0.25 + (middle - 1.0) ** 2)
    assert float(ratio.max() / ratio.min()) < 1.02


@pytest.mark.parametrize(
    ("a", "b", "quantile"),
    [
        (1.0, 1.0, lambda p: p),
        (0.5, 0.5, lambda p: torch.sin(0.5 * math.pi * p) ** 2),  # the arcsine distribution
        (0.3, 1.0, lambda p: p ** (1 / 0.3)),
        (1.0, 5.0, lambda p: -torch.expm1(torch.log1p(-p) / 5.0)),
    ],
)
def test_beta_quantiles_in_closed_form(a: float, b: float, quantile) -> None:
    process = RectifiedFlow(t_min=0.0)
    times = grid.beta_quantiles(process, 33, alpha=a, beta=b)
    p = 1.0 - torch.arange(33, dtype=F64) / 33
    torch.testing.assert_close(times, quantile(p), rtol=1e-13, atol=2e-15)


@pytest.mark.parametrize("n", [1, 2, 4, 20])
def test_beta_is_comfyuis_and_diffusers(n: int) -> None:
    p = 1.0 - torch.arange(n, dtype=F64) / n
    entry = 999 * torch.from_numpy(stats.beta.ppf(p.numpy(), 0.6, 0.6))
    torch.testing.assert_close(
        TABLE.index(grid.beta_quantiles(TABLE, n)), entry, rtol=1e-10, atol=1e-9
    )
    made = GRIDS["beta57"].make(TABLE, n)
    torch.testing.assert_close(
        TABLE.index(made),
        999 * torch.from_numpy(stats.beta.ppf(p.numpy(), 0.5, 0.7)),
        rtol=1e-10,
        atol=1e-9,
    )
    if n > 1:
        q = torch.from_numpy(
            stats.beta.ppf(1.0 - torch.linspace(0, 1, n, dtype=F64).numpy(), 0.6, 0.6)
        )
        close(grid.beta_quantiles(EDM(), n, clock="nsr", last=True), 0.002 + q * (80 - 0.002), 1e-9)


@pytest.mark.parametrize("n", [2, 3, 8, 25])
def test_linear_quadratic_is_a_line_and_a_parabola(n: int) -> None:
    """The whole schedule, with its zero: equal steps of threshold/half, then constant second
    differences, no jump in slope.
    """
    t = torch.cat([grid.linear_quadratic(RectifiedFlow(), n), torch.zeros(1, dtype=F64)])
    assert float(t[0]) == 1.0
    half = n // 2
    line = t[: half + 1].diff()
    close(line, [-0.025 / half] * half, 1e-9)
    curve = t[half:]
    if len(curve) > 2:
        bends = curve.diff().diff()
        close(bends, bends[:1].expand_as(bends), 1e-8)
        # The slope of the parabola at its start, from its first step and half its bend.
        assert float(curve.diff()[0] - bends[0] / 2) == pytest.approx(-0.025 / half, rel=1e-7)
    close(grid.linear_quadratic(EDM(), n), 80 * t[:-1])


@pytest.mark.parametrize("n", [1, 2, 7, 10, 333])
def test_grids_one_step_short_of_the_end(n: int) -> None:
    j = torch.arange(n, dtype=F64)
    close(grid.simple(RectifiedFlow(), n), 1 - j / n)
    close(grid.simple(EDM(), n), 80 * (1 - j / n))
    assert TABLE.index(grid.simple(TABLE, n)).round().long().tolist() == [
        999 - int(i * 1000 / n) for i in range(n)
    ]
    close(TABLE.index(grid.sgm_uniform(TABLE, n)), 999 * (1 - j / n), 1e-9)
    close(grid.sgm_uniform(VP(), n), 1 - j / n * (1 - 1e-3))
    if 1000 % n == 0:
        assert torch.equal(grid.simple(TABLE, n), grid.trailing(TABLE, n))
    assert TABLE.index(grid.ddim_uniform(TABLE, n)).round().long().tolist() == [
        i * (1000 // n) + 1 for i in reversed(range(n))
    ]


COMFYUI = [
    "simple",
    "sgm_uniform",
    "karras",
    "exponential",
    "ddim_uniform",
    "beta",
    "normal",
    "linear_quadratic",
    "kl_optimal",
]
K_DIFFUSION = [
    "get_sigmas_karras",
    "get_sigmas_exponential",
    "get_sigmas_polyexponential",
    "get_sigmas_vp",
]


def test_names_of_image_programs_are_known() -> None:
    for name in COMFYUI + K_DIFFUSION:
        times = grid_function(name)(TABLE, 10)
        assert torch.equal(check_times(times), times)
        assert len(times) == 10
    close(
        grid_function("kl-optimal")(EDM(), 5),
        torch.tan(torch.linspace(math.atan(80), math.atan(0.002), 5, dtype=F64)),
    )
    assert lookup(GRIDS, "grid", "power_lam").kind is grid.polyexponential


# ------------------------------------------------------------------------------------- any settings


@st.composite
def settings(draw: Any) -> tuple[grid.GridFunction, bool]:
    """A grid with settings of its own, and whether its last level is the end."""

    def number(low: float, high: float) -> float:
        return math.exp(draw(st.floats(math.log(low), math.log(high))))

    last = draw(st.booleans())
    kind = draw(
        st.sampled_from(
            ["karras", "poly", "dense", "vp", "cosine", "flow", "lam", "beta", "shifted", "power"]
        )
    )
    rho, a = number(0.3, 20.0), number(0.1, 10.0)
    options: dict[str, Any] = {"last": last}
    match kind:
        case "karras":
            function, options = grid.karras, options | {"rho": rho}
        case "poly":
            function, options = grid.polyexponential, options | {"rho": number(0.4, 2.5)}
        case "dense":
            function = grid.dense_lam
            options |= {"center": draw(st.floats(-4, 4)), "width": number(0.05, 50.0)}
        case "vp":
            function, options = grid.uniform_vp, options | {"rho": number(0.5, 4.0)}
        case "cosine":
            function = grid.uniform_cosine
        case "flow":
            function, options = grid.flow_shift, options | {"shift": a}
        case "lam":
            function = grid.uniform_lam
        case "beta":
            function, options = (
                grid.beta_quantiles,
                options | {"alpha": number(0.4, 2.0), "beta": number(0.4, 2.0)},
            )
        case "shifted":
            inner = draw(
                st.sampled_from([grid.uniform_t, grid.karras, grid.uniform_lam, grid.uniform_angle])
            )
            return grid.shifted(inner, a), True
        case _:
            return (
                lambda process, n, **ends: grid.power_t(process, n, rho=number(0.5, 4.0), **ends),
                True,
            )
    return lambda process, n, **ends: function(process, n, **options, **ends), last


@given(settings(), st.integers(1, 40), st.sampled_from(sorted(PROCESSES)), st.booleans())
def test_every_setting_falls_strictly_between_exact_ends(
    made: tuple[grid.GridFunction, bool], n: int, under: str, part: bool
) -> None:
    (function, last), process = made, PROCESSES[under]
    ends = {}
    if part:
        span = process.t_max - process.t_min
        ends = {"t_min": process.t_min + 0.11 * span, "t_max": process.t_min + 0.73 * span}
    times = function(process, n, **ends)
    assert torch.equal(check_times(times), times)
    assert len(times) == n
    assert bool((times.diff() < 0).all())
    assert float(times[0]) == ends.get("t_max", process.t_max)
    if n > 1:
        end = ends.get("t_min", process.t_min)
        assert float(times[-1]) == end if last else float(times[-1]) > end


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: grid.polyexponential(EDM(), 5, rho=0.0), "rho > 0"),
        (lambda: grid.karras(EDM(), 5, rho=math.nan), "rho > 0"),
        (lambda: grid.karras(EDM(), 5, rho=math.inf), "rho > 0"),
        (lambda: grid.dense_lam(EDM(), 5, width=0.0), "width > 0"),
        (lambda: grid.dense_lam(EDM(), 5, center=math.inf), "finite center"),
        (lambda: grid.uniform_vp(EDM(), 5, rho=-1), "rho > 0"),
        (lambda: grid.flow_shift(EDM(), 5, shift=0.0), "shift > 0"),
        (lambda: grid.shifted(grid.karras, -1.0), "shift > 0"),
        (lambda: grid.beta_quantiles(EDM(), 5, alpha=0.0), "alpha > 0"),
        (lambda: grid.beta_quantiles(EDM(), 5, clock="lam"), 'clock "t" or "nsr"'),  # type: ignore[arg-type]
        (lambda: grid.linear_quadratic(EDM(), 5, threshold=1.5), "threshold"),
        (lambda: grid.linear_quadratic(EDM(), 5, linear_steps=5), "0 to 4 linear"),
        (lambda: grid.karras(TABLE, 10, nsr_max=1e5, nsr_min=0.01), "not apart"),
        (lambda: grid.shift_of_tokens(0), "tokens > 0"),
        (lambda: grid.table([3.0, 1.0, 2.0]), "fall strictly"),
        (lambda: grid.table([3.0]), "at least two"),
        (lambda: grid.table([3.0, 1.0, -1.0]), "zero is the solver"),
        (lambda: grid.table([3.0, math.nan, 1.0]), "finite"),
        (lambda: grid.table([3.0, 1.0], of="lam"), 'of="nsr"'),  # type: ignore[arg-type]
        (lambda: grid.table([300.0, 200.0])(VP(), 5), "lies within"),
        (lambda: grid.table([3.0, 1.0])(VP(), 0), "at least 1"),
        (lambda: grid.ddim_uniform(VP(), 5), "table"),
        (lambda: grid.sgm_uniform(VP(), True), "at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(call: Any, match: str) -> None:
    with pytest.raises(GridError, match=match):
        call()


def test_a_wrapper_takes_a_function() -> None:
    with pytest.raises(TypeError, match="grid function"):
        grid.shifted("karras", 3.0)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="sd15"):
        grid.align_your_steps(EDM(), 10, model="sd1")


# ------------------------------------------------------------------------------------------- shifts


def test_a_shift_multiplies_the_noise_to_signal_ratio() -> None:
    flow = RectifiedFlow()
    times = grid.shifted(grid.uniform_t, 3.0)(flow, 28)
    # Back through the shift it is the uniform grid between the levels that are taken to the ends.
    before = times / (3 - 2 * times)
    close(before, torch.linspace(1.0, 1e-3 / (3 - 2e-3), 28, dtype=F64), 1e-12)
    close(grid.flow_shift(flow, 28, shift=3.0), times, 1e-12)
    # As a scheduler that shifts its last level, then the linear grid to it, once more.
    last = 3 * 1e-3 / (1 + 2e-3)
    linear = torch.linspace(1.0, last, 28, dtype=F64)
    sd3 = 3 * linear / (1 + 2 * linear)
    close(grid.shifted(grid.uniform_t, 3.0)(flow, 28, t_min=float(sd3[-1])), sd3, 1e-12)
    for process in (VP(), EDM(), Cosine()):
        base = grid.shifted(grid.uniform_lam, 2.0)(
            process, 9, t_max=float(process.t_of_nsr(8.0)), t_min=float(process.t_of_nsr(0.5))
        )
        close(
            process.nsr(base), torch.linspace(math.log(8), math.log(0.5), 9, dtype=F64).exp(), 1e-9
        )
    close(grid.shifted(grid.karras, 1.0)(EDM(), 9), grid.karras(EDM(), 9), 1e-12)
    # The shift spends more levels at high noise the larger it is.
    assert [int((grid.flow_shift(flow, 20, shift=a) > 0.5).sum()) for a in (1 / 3, 1.0, 3.0)] == [
        5,
        10,
        15,
    ]


def test_how_much_to_shift() -> None:
    assert grid.shift_of_tokens(256) == pytest.approx(math.exp(0.5))
    assert grid.shift_of_tokens(4096) == pytest.approx(math.exp(1.15))
    assert grid.shift_of_pixels(1024**2, 512**2) == pytest.approx(2.0)


@pytest.mark.parametrize(
    "function",
    [
        grid.shifted(grid.karras, 2.0),
        grid.without_last(grid.uniform_t),
        grid.table([80.0, 1.0, 0.1]),
    ],
    ids=["shifted", "without_last", "table"],
)
def test_wrappers_are_values(function: Any) -> None:
    again = pickle.loads(pickle.dumps(function))
    assert again == function
    assert hash(again) == hash(function)
    assert torch.equal(again(EDM(), 7), function(EDM(), 7))
    x = sample(
        GaussianData(EDM(), 0.3, 0.5),
        solver="ddim",
        nfe=7,
        grid=function,
        shape=(1,),
        seeds=range(3),
    )
    assert bool(torch.isfinite(x).all())


# ------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("model", "entries"),
    [
        ("sd15", [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]),
        ("sdxl", [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]),
    ],
)
def test_align_your_steps_as_published(model: str, entries: list[int]) -> None:
    """Table 3's noise levels stand where the timesteps published beside them say, on Stable
    Diffusion's betas.
    """
    index = STABLE.index(grid.align_your_steps(STABLE, 10, model=model))
    assert float((index - torch.tensor(entries, dtype=F64)).abs().max()) < 1.0
    levels = grid.ALIGN_YOUR_STEPS[model]
    close(
        STABLE.nsr(grid.align_your_steps(STABLE, 11, model=model, last=True))[1:-1],
        levels[1:-1],
        1e-9,
    )


@pytest.mark.parametrize("model", sorted(grid.ALIGN_YOUR_STEPS))
def test_align_your_steps_on_another_path(model: str) -> None:
    levels = grid.ALIGN_YOUR_STEPS[model]
    process = EDM(t_max=1000.0)
    close(grid.align_your_steps(process, 10, model=model), levels[:-1])
    close(grid.align_your_steps(process, 11, model=model, last=True), levels)
    twice = grid.align_your_steps(process, 20, model=model)
    close(twice[::2], levels[:-1], 1e-11)
    close(twice[1::2], [math.sqrt(a * b) for a, b in itertools.pairwise(levels)], 1e-11)
    for n in (1, 2, 5, 33):
        for other in PROCESSES.values():
            times = grid.align_your_steps(other, n, model=model)
            assert len(times) == n
            assert bool((times.diff() < 0).all())
            assert other.t_min <= float(times[-1]) <= float(times[0]) <= other.t_max


def test_a_users_table() -> None:
    values = [10.0, 3.0, 1.0, 0.1]
    close(grid.table([*values, 0.0])(EDM(), 4), values)  # with the zero that others append
    close(grid.table(torch.tensor(values).flip(0))(EDM(), 4), values, 1e-6)
    close(VP().nsr(grid.table(values)(VP(), 4)), values, 1e-9)
    close(grid.table(values, last=False)(EDM(), 3), values[:3])
    close(grid.table(values)(EDM(), 7)[1::2], [30**0.5, 3**0.5, 0.1**0.5])
    times = [1.0, 0.6, 0.3, 0.001]
    for process in (RectifiedFlow(), VP()):
        close(grid.table(times, of="t")(process, 4), times)
        close(grid.table(times, of="t")(process, 7)[1::2], [0.8, 0.45, 0.1505])
    # A start in the middle begins there and keeps the rest of the way.
    part = grid.table(values)(EDM(), 3, t_max=1.0)
    close(part, [1.0, 0.1**0.5, 0.1])
    assert grid.table(values)(EDM(), 4, t_max=20.0).tolist() == pytest.approx([20.0, 3.0, 1.0, 0.1])
    assert grid.table(values)(EDM(), 4, t_min=0.05).tolist() == pytest.approx(
        [10.0, 3.0, 1.0, 0.05]
    )


@given(
    st.lists(st.floats(-6.0, 6.0), min_size=2, max_size=12),
    st.integers(1, 50),
    st.sampled_from(["vp", "edm", "subvp"]),
)
def test_every_table_is_laid_within_its_process(logs: list[float], n: int, under: str) -> None:
    values = sorted({math.exp(v) for v in logs}, reverse=True)
    process = PROCESSES[under]
    low, high = (float(process.nsr(t)) for t in (process.t_min, process.t_max))
    assume(len(values) > 1 and min(a / b for a, b in itertools.pairwise(values)) > 1.01)
    assume(min(values[0], high) > 1.05 * max(values[-1], low))
    times = grid.table(values)(process, n)
    assert len(times) == n
    assert bool((times.diff() < 0).all())
    assert process.t_min <= float(times[-1])
    assert float(times[0]) <= process.t_max


# -------------------------------------------------------------------- on a model's own trajectories


def searched(order: int, process: Process | None = None, **options: Any) -> SearchedGrid:
    process = EDM() if process is None else process
    return gits(Mixture(process), n=32, order=order, dtype=F64, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("coefficient", [0.9, 1.0, 1.3])
@pytest.mark.parametrize("order", [1, 2])
def test_the_search_finds_the_best_of_all(order: int, coefficient: float) -> None:
    found = searched(order, nodes=9, coefficient=coefficient)
    for n in range(2, 10):
        every = [(0, *inner, 8) for inner in itertools.combinations(range(1, 8), n - 2)]
        best = min(every, key=found.error)
        assert found.error(found.levels(n)) == pytest.approx(found.error(best), rel=1e-12)
        assert found.levels(n) == list(best)
    assert found.levels(1) == [0]


@pytest.mark.parametrize("under", ["edm", "vp", "rectified_flow"])
@pytest.mark.parametrize("unit", ["signal", "spread"])
def test_errors_are_those_of_the_steps(under: str, unit: str) -> None:
    """Against steps written out: DDIM's, and the exponential Adams step of order 2 in x0 and lam on
    teacher's predictions.
    """
    process = PROCESSES[under]
    found = searched(2, process, nodes=7, unit=unit)
    assert found.double is not None
    path = solve(
        Mixture(process),
        solver="adams3",
        grid=found.times,
        finish=False,
        trajectory=True,
        x0s=True,
        n=32,
        seeds=0,
        dtype=F64,
    )
    assert path.trajectory is not None
    assert path.x0s is not None
    x, x0, levels = path.trajectory, path.x0s, process.levels(found.times)
    for i, j, k in itertools.combinations(range(7), 3):
        scale = (
            levels[k].s if unit == "signal" else float((x[k] - x[k].mean(0)).square().mean().sqrt())
        )
        ratio = levels[k].sigma / levels[j].sigma
        alone = ratio * x[j] + (levels[k].s - ratio * levels[j].s) * x0[j] - x[k]
        error = alone.square().mean(-1).sqrt().mean() / scale
        assert float(found.single[j, k]) == pytest.approx(float(error), rel=1e-9, abs=1e-12)
        if levels[i].s > 0:
            a, (b, c) = adams("x0", "lam", [levels[j], levels[i]], levels[j], levels[k], process)
            error = (a * x[j] + b * x0[j] + c * x0[i] - x[k]).square().mean(
                -1
            ).sqrt().mean() / scale
        assert float(found.double[i, j, k]) == pytest.approx(float(error), rel=1e-7, abs=1e-12)
    assert math.isinf(float(found.single[3, 3]))


@pytest.mark.parametrize(
    ("under", "solver", "order"), [("vp", "ddim", 1), ("edm", "ddim", 1), ("vp", "dpmpp_2m", 2)]
)
def test_a_searched_grid_beats_a_uniform_one(under: str, solver: str, order: int) -> None:
    process = PROCESSES[under]
    model = Mixture(process)
    best = gits(model, order=order, dtype=F64)  # type: ignore[arg-type]
    x = process.prior_std * torch.randn(
        256, 2, dtype=F64, generator=torch.Generator().manual_seed(9)
    )
    exact = sample(model, solver="adams3", nfe=600, grid="uniform_lam", x=x)

    def error(nfe: int, which: Any) -> float:
        return float(
            (sample(model, solver=solver, nfe=nfe, grid=which, x=x) - exact).norm(dim=1).median()
        )

    for nfe in (5, 6, 7, 8) if order == 1 else (10, 12, 16):
        assert error(nfe, best) < 0.75 * error(nfe, "uniform_t"), nfe
        assert error(nfe, best) < 0.75 * error(nfe, "uniform_lam"), nfe


def test_a_searched_grid_serves_everywhere() -> None:
    found = searched(1)
    times = found(EDM(), 6)
    assert (float(times[0]), float(times[-1])) == (80.0, 0.002)
    # Other paths: the same noise-to-signal ratios.
    other = found(VP(t_max=0.9), 6, t_max=0.9)
    assert float(other[0]) == 0.9
    close(EDM().t_of_nsr(VP().nsr(found(VP(), 6))), times, 1e-9)
    # From the middle, and to an end of one's own.
    part = found(EDM(), 5, t_max=3.21, t_min=0.0123)
    assert (float(part[0]), float(part[-1])) == (3.21, 0.0123)
    assert bool((part.diff() < 0).all())
    x = solve(
        Mixture(EDM()), solver="ddim", nfe=5, grid=found, x0=torch.zeros(3, 2), t=2.0, seeds=0
    )
    assert x.times is not None
    assert float(x.times[0]) == 2.0
    with pytest.raises(GridError, match="more nodes"):
        found(EDM(), 62)
    assert torch.equal(found(EDM(), 61), found.times)
    # The same seeds give the same grid; a grid of one's own to choose from is honoured.
    assert torch.equal(searched(1)(EDM(), 6), times)
    own = [80.0, 20.0, 5.0, 1.0, 0.3, 0.05, 0.002]
    assert set(searched(1, fine=own)(EDM(), 4).tolist()) < set(own)
    assert "61 levels" in repr(found)
    assert x.grid == "gits"
    # One trajectory is enough to search on, and a state to start from serves as well as seeds.
    one = gits(Mixture(EDM()), x=torch.tensor([[30.0, -60.0]]), order=2)
    assert bool((one(EDM(), 7).diff() < 0).all())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"order": 3}, "order 1 or 2"),
        ({"coefficient": 0.0}, "positive"),
        ({"unit": "x"}, "spread"),
        ({"nodes": 2}, "at least 3"),
        ({"fine": [0.002, 1.0, 80.0]}, "which fall"),
        ({"teacher": "ddpm"}, "stochastic"),
        ({"teacher": "heun", "fine": [80.0, 5.0, 1.0, 0.1]}, "once a level"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        gits(Mixture(EDM()), n=4, **options)
