"""What can be done with a plan: unroll, check, compare, draw, store and fit it; for every
registered solver that has one.
"""

from __future__ import annotations

import builtins
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import (
    GRID_SOLVERS,
    PROCESSES,
    FixedNoise,
    Mixture,
    from_the_start,
    law,
    reference,
    warped,
)
from safetensors import safe_open
from torch import Tensor

from sdeflow import grid, registry
from sdeflow.cli import main
from sdeflow.errors import CheckpointError, MissingExtraError, SolverError
from sdeflow.plan.plan import Plan
from sdeflow.plan.unroll import PREDICTS
from sdeflow.process import EDM, VP, Process, RectifiedFlow
from sdeflow.reverse import Reverse
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.adams import ExponentialAdams
from sdeflow.solvers.ode.ddim import DDIM
from sdeflow.solvers.ode.runge_kutta import RK4, Euler, Heun, Midpoint
from sdeflow.solvers.sde.classic import DDPM, EulerMaruyama

REGISTERED = {name: GRID_SOLVERS[name] for name in registry.SOLVERS if name in GRID_SOLVERS}


def traced(name: str, under: str = "vp", levels: int = 5) -> tuple[Plan, Process]:
    process = PROCESSES[under]
    return REGISTERED[name].plan(process, warped(process, levels, 20.0, 0.05)), process


# ----------------------------------------------------------------------------------------- unrolled


def values(frame: str, x: Tensor, x0: Tensor, s: Tensor, sigma: Tensor) -> Tensor:
    """The function of a prediction that a frame names, from its definition."""
    eps = (x - s * x0) / sigma
    if frame == "flow":
        return eps - x0
    return {"x0": x0, "eps": eps, "v": (s * eps - sigma * x0) / torch.sqrt(s**2 + sigma**2)}[frame]


@pytest.mark.parametrize("name", REGISTERED)
def test_the_matrix_is_what_an_execution_does(name: str) -> None:
    """Inputs and result of a run on a nonlinear problem follow from its own predictions and draws,
    in every frame.
    """
    plan, process = traced(name)
    drawn: list[Tensor] = []
    seen: list[tuple[Tensor, Tensor]] = []

    class Kept(FixedNoise):
        def draw(self, *levels: Any, **keywords: Any) -> Tensor:
            drawn.append(super().draw(*levels, **keywords))
            return drawn[-1]

    x, _ = reference(process, plan.grid[0][0], plan.grid[-1][0], n=3)
    with torch.no_grad():
        end, _ = plan.execute(
            Reverse(Mixture(process)),
            x,
            Kept(3, (2,)),
            lambda k, call, x, x0: seen.append((x.clone(), x0.clone())),
        )
    expected = torch.stack([*(given for given, _ in seen), end])
    for frame in PREDICTS:
        rows = plan.unrolled(frame)
        assert rows.matrix.shape == (plan.nfe + 1, 1 + plan.nfe + plan.draws)
        assert torch.equal(rows.t[:-1], plan.times)
        assert not rows.predictions[:-1].triu().any()  # nothing before it is known
        outputs = [
            values(frame, given, x0, s, sigma)
            for (given, x0), s, sigma in zip(seen, rows.s, rows.sigma, strict=False)
        ]
        got = torch.einsum("kj,jnd->knd", rows.matrix, torch.stack([x, *outputs, *drawn]))
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", REGISTERED)
def test_the_spread_is_the_exact_law(name: str) -> None:
    plan, _ = traced(name)
    rows = plan.unrolled()
    assert float(rows.spread(0.5)[-1]) == pytest.approx(law(plan, 0.0, 0.5)[1], rel=1e-9)
    errors = plan.consistency()
    assert float((rows.signal[:-1] - rows.s[:-1]).abs().max()) == pytest.approx(
        errors["signal"], abs=1e-12
    )
    noise = (rows.spread()[:-1] / rows.sigma[:-1] - 1.0).abs().max()
    assert float(noise) == pytest.approx(errors["noise"], rel=1e-6, abs=1e-10)
    torch.testing.assert_close(plan.unrolled("v").spread(0.5), rows.spread(0.5))
    torch.testing.assert_close(plan.unrolled("v").signal, rows.signal)


def test_frames_turn_back_and_are_checked() -> None:
    plan = Heun().plan(VP(), warped(VP(), 4))
    rows = plan.unrolled("eps")
    assert torch.equal(rows.predicting("x0").matrix, plan.matrix())
    assert torch.equal(rows.predicting("v").matrix, plan.matrix("v"))
    assert rows.columns[:3] == ("x", "F0", "F1")
    with pytest.raises(ValueError, match="unknown predicts 'noise'"):
        plan.matrix("noise")
    with pytest.raises(ValueError, match="no signal is left"):
        DDIM().plan(RectifiedFlow(), grid.uniform_t(RectifiedFlow(), 4)).matrix("eps")
    lines = str(plan.unrolled()).splitlines()
    assert len(lines) == plan.nfe + 2
    assert lines[-1].split()[0] == "end"


def test_a_ddim_table_is_what_one_writes_by_hand() -> None:
    process = VP()
    rows = DDIM().plan(process, [0.9, 0.5, 0.1]).unrolled()
    a, b, c = process.levels([0.9, 0.5, 0.1])
    first, second = b.sigma / a.sigma, c.sigma / b.sigma
    expected = [
        [1.0, 0.0, 0.0, 0.0],
        [first, b.s - first * a.s, 0.0, 0.0],
        [second * first, second * (b.s - first * a.s), c.s - second * b.s, 0.0],
        [0.0, 0.0, 0.0, 1.0],
    ]
    torch.testing.assert_close(rows.matrix, torch.tensor(expected, dtype=torch.float64))
    eps = DDIM().plan(process, [0.9, 0.5, 0.1]).matrix("eps")
    assert float(eps[1, 0]) == pytest.approx(b.s / a.s)
    assert float(eps[1, 1]) == pytest.approx(b.sigma - a.sigma * b.s / a.s)


def test_a_plan_without_a_call_unrolls_too() -> None:
    rows = DDIM().plan(VP(), [0.5], finish=False).unrolled()
    assert rows.matrix.tolist() == [[1.0]]
    assert rows.t.tolist() == [0.5]


# --------------------------------------------------------------------------------------- the report


@pytest.mark.parametrize("name", REGISTERED)
def test_every_plan_has_a_report(name: str) -> None:
    plan, process = traced(name)
    report = plan.check(process)
    lines = str(report).splitlines()
    rows = lines[lines.index("") + 2 :]
    assert [row.split()[0] for row in rows] == [*map(str, range(plan.nfe)), "end"]
    assert len(report.degrees) == plan.nfe + 1
    assert (report.degrees[0] is None) == (
        plan.times[0] == plan.grid[0][0]
    )  # churn moves before its first call
    assert abs(float(report.signal[-1])) < 1e-12  # the last step is the prediction
    assert all(degree is None or -1 <= degree <= 5 for degree in report.degrees)
    if report.consistent and not report.exact_noise:
        assert "its noise is off by" in str(report)


PUBLISHED = [
    (DDIM(), "x0 in lam", 0),
    (DDPM(), "x0 in lam", 0),
    (Euler("t"), "dx/dt in t", 0),
    (Heun("t"), "dx/dt in t", 1),
    (Midpoint("nsr"), "eps in nsr", 1),
    (Heun("lam"), "d(x/s)/dlam in lam", 1),
    (RK4("t"), "dx/dt in t", 3),
    (RK4("nsr"), "eps in nsr", 3),
    (RK4("lam"), "d(x/s)/dlam in lam", 3),
    *((ExponentialAdams(p, start_up="orders"), "x0 in lam", p - 1) for p in (2, 3, 4)),
    *(
        (ExponentialAdams(3, frame, clock), f"{frame} in {clock}", 2)
        for frame in PREDICTS
        for clock in ("lam", "nsr", "angle", "t")
    ),
]


@pytest.mark.parametrize(("solver", "function", "degree"), PUBLISHED, ids=lambda value: str(value))
def test_a_report_tells_a_method_by_its_numbers(
    solver: GridSolver, function: str, degree: int
) -> None:
    process = VP()
    report = solver.plan(process, warped(process, 8)).check(process)
    assert (report.function, report.degree) == (function, degree)
    assert f"degree {degree} of {function}" in str(report)


def test_a_report_counts_the_steps_at_the_start() -> None:
    report = ExponentialAdams(4, start_up="orders").plan(EDM(), warped(EDM(), 9)).check()
    assert report.steps == (0, 1, 2, 3, 3, 3, 3, 3, 3)
    assert report.starts_with == 3
    assert report.consistent
    assert report.exact_noise


def test_stages_are_not_steps() -> None:
    report = RK4("nsr").plan(EDM(), warped(EDM(), 3)).check()
    assert report.steps == (3, 3, 3)
    assert report.stages == (False, *(True, True, True, False) * 3, False)
    assert report.degrees[1:5] == (0, 0, 1, 3)


def test_a_step_from_where_no_signal_is_left_is_measured() -> None:
    process = RectifiedFlow()
    report = Midpoint("t").plan(process, grid.uniform_t(process, 4)).check(process)
    assert report.steps == (1, 1, 1)
    report = ExponentialAdams(2, "v", "angle").plan(process, grid.uniform_t(process, 6)).check()
    assert (report.function, report.steps[0], report.degree) == (
        "v in angle",
        -1,
        1,
    )  # there it is DDIM's, in v not constant


def test_a_nearly_reproduced_degree_is_told() -> None:
    """Half the weight of a line, where its integral would be exact: of second order, and no
    polynomial is reproduced.
    """
    process = VP()
    exact = ExponentialAdams(2, start_up="orders").plan(process, warped(process, 24))
    report = exact.check(process)
    rough = exact.with_numbers(
        exact.coefficients * (1.0 + 0.01 * torch.sin(torch.arange(len(exact.coefficients))))
    )
    assert report.degree == 1
    assert rough.check(process).degree == -1
    assert not rough.check(process).consistent
    assert "most steps do not reproduce even a constant" in str(rough.check(process))


def test_the_gaussian_variance_converges_as_the_solver_does() -> None:
    def error(solver: GridSolver, n: int) -> float:
        rows = solver.plan(VP(), warped(VP(), n), finish=False).unrolled()
        return abs(
            float(rows.spread(0.5)[-1] / torch.hypot(0.5 * rows.s[-1], rows.sigma[-1]) - 1.0)
        )

    assert math.log2(error(DDIM(), 48) / error(DDIM(), 96)) == pytest.approx(1.0, abs=0.2)
    assert math.log2(error(DDPM(), 48) / error(DDPM(), 96)) == pytest.approx(1.0, abs=0.2)
    assert math.log2(error(Heun("nsr"), 48) / error(Heun("nsr"), 96)) == pytest.approx(2.0, abs=0.3)
    report = DDPM().plan(VP(), warped(VP(), 8)).check()
    assert report.exact_noise
    assert not EulerMaruyama().plan(VP(), warped(VP(), 8)).check().exact_noise


def test_a_report_needs_what_it_asks_for() -> None:
    plan = Heun("t").plan(VP(), warped(VP(), 3))
    assert plan.check(VP(), predicts="velocity").degree == 1
    assert plan.check(predicts="eps", clock="nsr").function == "eps in nsr"
    with pytest.raises(ValueError, match="pass process="):
        plan.check(clock="t")
    with pytest.raises(ValueError, match="pass process="):
        plan.check(predicts="velocity")
    with pytest.raises(ValueError, match="was traced under VP"):
        plan.check(EDM())
    with pytest.raises(ValueError, match="unknown clock"):
        plan.check(clock="rho")
    with pytest.raises(ValueError, match="in the clock lam alone"):
        plan.check(predicts="slope", clock="nsr")
    with pytest.raises(ValueError, match="std is"):
        plan.check(std=0.0)


# --------------------------------------------------------------------------------------- comparison


def test_one_method_under_two_names_compares_equal() -> None:
    times = warped(VP(), 6)
    a, b = DDIM().plan(VP(), times), Euler("nsr").plan(VP(), times)
    assert a.compare(b).close()
    assert a.compare(ExponentialAdams(1).plan(VP(), times)).close()
    assert DDPM().plan(VP(), times).compare(DDIM(1.0).plan(VP(), times)).close()
    assert not a.compare(Euler("t").plan(VP(), times)).close(1e-3)
    # Heun as two mean Euler steps, and as a tableau: other registers, one method.
    heun = Heun("nsr").plan(VP(), times)
    assert heun.compare(Heun("nsr").plan(VP(), times, record=True)).close()


def test_differences_are_told() -> None:
    times = warped(VP(), 6)
    plan = DDIM().plan(VP(), times)
    more = plan.compare(Heun().plan(VP(), times))
    assert (more.nfe, more.weights, more.close(1e9)) == ((7, 13), math.inf, False)
    assert "7 calls and 0 draws, against 13 calls" in str(more)
    moved = plan.compare(plan.with_numbers(times=plan.times * 1.001))
    assert moved.weights == 0.0
    assert 1e-4 < moved.times < 1e-2
    scaled = plan.compare(plan.with_numbers(coefficients=plan.coefficients * 1.001))
    assert 1e-4 < scaled.weights < 1e-1
    assert "weights differ by up to" in str(scaled)
    open_end = DDIM().plan(VP(), [*times.tolist(), 1e-3], finish=False)
    assert not plan.compare(open_end).close(1e9)
    independent = Plan.from_dict(json.loads(json.dumps(DDPM().plan(VP(), times).to_dict())))
    assert DDPM().plan(VP(), times).compare(independent).close(0.0)


# ------------------------------------------------------------------------------------------ storage


@pytest.mark.parametrize("under", ["vp", "rectified_flow"])
@pytest.mark.parametrize("name", REGISTERED)
def test_a_plan_survives_safetensors_exactly(name: str, under: str, tmp_path: Path) -> None:
    process = PROCESSES[under]
    plan = REGISTERED[name].plan(process, warped(process, 4, 20.0, 0.05), record=True)
    plan.save(tmp_path / "plan.safetensors")
    loaded = Plan.load(tmp_path / "plan.safetensors")
    assert loaded == plan
    assert loaded.coefficients.tolist() == plan.coefficients.tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["plan.safetensors"]


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "ddpm.plan.safetensors"
    plan = DDPM().plan(RectifiedFlow(), grid.uniform_t(RectifiedFlow(), 5))
    plan.save(path)
    assert Plan.load(path) == plan  # the first draw begins at an infinite noise-to-signal ratio
    first = path.read_bytes()
    plan.save(path)
    assert path.read_bytes() == first
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["sdeflow"])
        assert file.get_tensor("times").tolist() == plan.times.tolist()
        assert file.get_tensor("coefficients").tolist() == plan.coefficients.tolist()
    assert facts["format"] == "sdeflow-plan-1"
    assert facts["version"]
    assert facts["solver"] == repr(DDPM())
    assert facts["process"] == repr(RectifiedFlow())
    path.rename(tmp_path / "renamed.json")  # the content tells, not the name
    assert Plan.load(tmp_path / "renamed.json") == plan


def test_independent_draws_stay_independent(tmp_path: Path) -> None:
    plan = REGISTERED["annealed_langevin"].plan(VP(), warped(VP(), 2))
    plan.save(tmp_path / "plan.safetensors")
    assert Plan.load(tmp_path / "plan.safetensors") == plan


def damaged(content: bytes, how: str) -> bytes:
    if how == "cut":
        return content[:-9]
    if how == "flipped":
        return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]
    if how == "relabelled":
        return content.replace(b"DDIM", b"DDIN")
    return {
        "empty": b"",
        "text": b"hello",
        "zeros": bytes(64),
        "list": b"[1, 2]",
        "header": content[:40],
    }[how]


@pytest.mark.parametrize(
    "how", ["cut", "flipped", "relabelled", "empty", "text", "zeros", "list", "header"]
)
def test_a_damaged_file_says_so(how: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    DDIM().plan(VP(), warped(VP(), 3)).save(path)
    path.write_bytes(damaged(path.read_bytes(), how))
    with pytest.raises(CheckpointError, match=r"plan\.safetensors is not a plan saved by sdeflow"):
        Plan.load(path)


def test_other_files_and_missing_ones_are_told(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="something else"):
        Plan.load(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="cannot read the plan"):
        Plan.load(tmp_path / "nowhere.json")
    with pytest.raises(CheckpointError, match="cannot read the plan"):
        Plan.load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("instructions", 3),
        ("instructions", [["combine", 1, []]]),
        ("instructions", [["jump", 1, 0]]),
        ("instructions", [[]]),
        ("instructions", [["call", 1, 0, "soon", 1.0, 1.0]]),
        ("grid", []),
        ("grid", [[1.0, 2.0]]),
        ("registers", None),
        ("registers", 0),
        ("registers", 3 * 10**8),
        ("registers", 2.0),
        ("registers", True),
        ("result", 40),
        ("result", -1),
        ("finished", "yes"),
        ("solver", None),
        ("version", 1),
        ("version", "next"),
        ("format", "sdeflow-plan-2"),
        ("colour", "red"),
        ("grid", [[1.0, float("nan"), 1.0]]),
        ("grid", [[float("inf"), 1.0, 1.0]]),
        ("instructions", [["combine", 0, [[0, float("nan")]]]]),
        ("instructions", [["combine", 0, [[0, float("inf")]]]]),
        ("instructions", [["combine", 0, [[0, 10**400]]]]),
        ("instructions", [["combine", 0, [[0, "1.0"]]]]),
        ("instructions", [["combine", 0.0, [[0, 1.0]]]]),
        ("instructions", [["call", 1, 0, float("nan"), 1.0, 1.0]]),
        ("instructions", [["call", 1, 0, 1.0, float("inf"), 1.0]]),
        ("instructions", [["draw", 1, float("nan"), 1.0]]),
        ("instructions", [["draw", 1, -1.0, 1.0]]),
        ("instructions", [["draw", 1, None, 1.0]]),
        ("instructions", [["record", 40, 0]]),
    ],
)
@pytest.mark.parametrize("name", ["plan.json", "plan.safetensors"])
def test_no_content_breaks_the_reader(name: str, key: str, value: Any, tmp_path: Path) -> None:
    data = DDIM().plan(VP(), warped(VP(), 2)).to_dict()
    data[key] = value
    with pytest.raises(ValueError, match=r"plan"):
        Plan.from_dict(data)
    (tmp_path / name).write_text(json.dumps(data))
    with pytest.raises(CheckpointError):
        Plan.load(tmp_path / name)


@pytest.mark.parametrize("name", ["plan.json", "plan.safetensors"])
def test_no_flipped_bit_makes_another_plan(name: str, tmp_path: Path) -> None:
    path, rng = tmp_path / name, random.Random(0)
    for solver in ("ddim", "dpmpp_2m_sde", "heun"):
        plan = REGISTERED[solver].plan(VP(), warped(VP(), 6), record=True)
        plan.save(path)
        whole = path.read_bytes()
        for flips in (1, 1, 1, 2) * 50:
            content = bytearray(whole)
            for _ in range(flips):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(bytes(content))
            try:
                loaded = Plan.load(path)
            except CheckpointError:
                continue
            assert loaded == plan  # the flip was in white space, or below the last digit of a float


def test_a_json_file_without_a_checksum_is_read_and_one_that_was_changed_is_not(
    tmp_path: Path,
) -> None:
    plan, path = Heun().plan(VP(), warped(VP(), 3)), tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_dict()))  # as 0.5 wrote them
    assert Plan.load(path) == plan
    plan.save(path)
    data = json.loads(path.read_text())
    assert Plan.from_dict(data) == plan
    next(row for row in data["instructions"] if row[0] == "combine")[2][0][1] *= 1.5
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"SHA-256 .* deletes that entry"):
        Plan.load(path)
    del data["sha256"]
    path.write_text(json.dumps(data))
    assert Plan.load(path) != plan


def test_what_asks_for_much_memory_is_refused_before_it_takes_any(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with path.open("wb") as file:
        file.truncate(2**29)  # sparse: half a gigabyte of zeros
    with pytest.raises(CheckpointError, match="536,870,912 bytes"):
        Plan.load(path)
    path.write_text("[" * 100_000)
    with pytest.raises(CheckpointError):
        Plan.load(path)
    data = DDIM().plan(VP(), warped(VP(), 2)).to_dict() | {"registers": 300_000_000}
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="300000000 registers for"):
        Plan.load(path)


def test_another_version_of_the_format_says_which_sdeflow_wrote_it(tmp_path: Path) -> None:
    data = DDIM().plan(VP(), warped(VP(), 2)).to_dict()
    with pytest.raises(ValueError, match=r"'sdeflow-plan-2' \(written by sdeflow 9\.1\)"):
        Plan.from_dict({**data, "format": "sdeflow-plan-2", "version": "9.1"})


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.safetensors"
    plan = DDIM().plan(VP(), warped(VP(), 3))
    plan.save(path)
    before = path.read_bytes()

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(CheckpointError, match="No space left"):
        Heun().plan(VP(), warped(VP(), 3)).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["plan.safetensors"]


# ------------------------------------------------------------------------------------------ drawing


@pytest.mark.parametrize("solver", [DDIM(), Heun(), EulerMaruyama()], ids=str)
def test_a_plan_is_drawn(solver: GridSolver, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    plan = solver.plan(RectifiedFlow(), grid.uniform_t(RectifiedFlow(), 6))
    figure = plan.plot(tmp_path / "plan.png")
    heat, levels, weights = figure.axes[0], figure.axes[1], figure.axes[2]
    shown = (
        heat.images[0].get_array().filled(0.0)
        if hasattr(heat.images[0].get_array(), "filled")
        else None
    )
    assert shown is not None
    torch.testing.assert_close(torch.as_tensor(shown), plan.matrix())
    assert len(levels.lines[0].get_xdata()) == int(torch.isfinite(plan.unrolled().nsr[:-1]).sum())
    labels = [text.get_text() for text in weights.get_legend().get_texts()]
    assert ("noise" in labels) == (plan.draws > 0)
    with Image.open(tmp_path / "plan.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 800
    assert [path.name for path in tmp_path.iterdir()] == ["plan.png"]


def test_a_picture_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a.png", "b.png"):
        DDIM().plan(VP(), warped(VP(), 3)).plot(tmp_path / name, "eps")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_drawing_without_matplotlib_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"needs matplotlib.*sdeflow\[plot\]"):
        DDIM().plan(VP(), warped(VP(), 3)).plot(tmp_path / "plan.png")
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------- gradients


def projected(solver: GridSolver, process: Process, x: Tensor, times: Tensor) -> Tensor:
    """A number into which the end state, all weights, times and levels enter."""
    plan = solver.plan(process, times)
    end, _ = plan.execute(Reverse(Mixture(process)), x, FixedNoise(len(x), (2,)))
    rows = plan.unrolled()
    total = torch.zeros((), dtype=torch.float64)
    for n, part in enumerate((end, rows.matrix, rows.t, rows.s, rows.sigma)):
        generator = torch.Generator().manual_seed(n)
        total = (
            total + (torch.randn(part.shape, generator=generator, dtype=torch.float64) * part).sum()
        )
    return total


def check_gradient(solver: GridSolver, process: Process, times: Tensor, first: int = 0) -> None:
    level = process.level(float(times[0]))
    x = (
        torch.randn(2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        * level.sigma
        + 0.3 * level.s
    )
    moving = times.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(projected(solver, process, x, moving), moving)
    assert bool(torch.isfinite(gradient[first:]).all()), f"{solver}: gradient {gradient.tolist()}"
    with torch.no_grad():  # on Python floats: the other way through every coefficient
        for k in range(first, len(times)):
            h = 1e-6 * float(times[k])
            shift = torch.zeros_like(times)
            shift[k] = h
            plus, minus = (
                float(projected(solver, process, x, times + sign * shift)) for sign in (1, -1)
            )
            slope = (plus - minus) / (2.0 * h)
            assert float(gradient[k]) == pytest.approx(
                slope, rel=2e-5, abs=2e-5 * float(gradient[first:].abs().max())
            )


@pytest.mark.parametrize("name", REGISTERED)
def test_gradients_flow_through_the_times_of_every_solver(name: str) -> None:
    """The end state and every number of the table, differentiated by each time of the grid, against
    central differences.
    """
    process = PROCESSES["vp"]
    check_gradient(REGISTERED[name], process, warped(process, 4, 3.0, 0.07))


@pytest.mark.parametrize("name", REGISTERED)
def test_gradients_flow_from_where_no_signal_is_left(name: str) -> None:
    """The start at s = 0 stays where it is; the gradients of the times after it are right."""
    solver, process = REGISTERED[name], PROCESSES["rectified_flow"]
    if not from_the_start(solver, process):
        pytest.skip("cannot start there")
    try:
        solver.plan(process, [1.0, 0.6, 0.3, 0.06])
    except SolverError as error:
        pytest.skip(f"cannot start there: {error}")
    check_gradient(
        solver, process, torch.tensor([1.0, 0.6, 0.3, 0.06], dtype=torch.float64), first=1
    )


def test_the_unrolled_matrix_is_differentiable_in_the_coefficients() -> None:
    plan = Heun().plan(VP(), warped(VP(), 2))

    def matrices(coefficients: Tensor) -> tuple[Tensor, Tensor]:
        tuned = plan.with_numbers(coefficients)
        return tuned.matrix(), tuned.unrolled("eps").matrix

    assert torch.autograd.gradcheck(matrices, [plan.coefficients.requires_grad_()])


def test_a_plan_of_five_calls_is_fitted() -> None:
    """Gradient descent on coefficients and times of five calls, against the exact flow, on states
    held out from the fit.
    """
    process = VP()
    plan = DDIM().plan(
        process, grid.uniform_lam(process, 6, nsr_max=8.0, nsr_min=0.1), finish=False
    )
    assert plan.nfe == 5
    x, exact = reference(process, plan.grid[0][0], plan.grid[-1][0], n=256, seed=3)
    fitted, held = slice(0, 192), slice(192, 256)
    coefficients, times = plan.coefficients.requires_grad_(), plan.times.log().requires_grad_()
    denoiser = Mixture(process)

    def error(rows: slice) -> Tensor:
        tuned = plan.with_numbers(coefficients, times.exp())
        end, _ = tuned.execute(Reverse(denoiser), x[rows], None)
        return ((end - exact[rows]) ** 2).mean().sqrt()

    with torch.no_grad():
        before = error(held)
    optimiser = torch.optim.Adam(
        [{"params": [coefficients], "lr": 0.01}, {"params": [times], "lr": 0.03}]
    )
    for _ in range(120):
        optimiser.zero_grad()
        error(fitted).backward()
        optimiser.step()
    with torch.no_grad():
        after = error(held)
    assert float(after) < 0.5 * float(before), (float(before), float(after))
    assert not torch.allclose(times.exp(), plan.times, rtol=1e-3)


def test_a_grid_is_fitted_through_the_solver() -> None:
    """The inner levels themselves, of which all coefficients are functions: the plan stays
    consistent.
    """
    process, solver = VP(), ExponentialAdams(2)
    start = warped(process, 5)
    x, exact = reference(process, float(start[0]), float(start[-1]), n=64)
    inner = start[1:-1].log().requires_grad_()
    optimiser = torch.optim.Adam([inner], lr=0.05)
    errors = []
    for _ in range(25):
        optimiser.zero_grad()
        times = torch.cat([start[:1], inner.exp(), start[-1:]])
        plan = solver.plan(process, times, finish=False)
        loss = ((plan.execute(Reverse(Mixture(process)), x, None)[0] - exact) ** 2).mean().sqrt()
        errors.append(float(loss.detach()))
        loss.backward()
        optimiser.step()
    assert min(errors) < 0.8 * errors[0], errors
    assert plan.check(process).consistent


# --------------------------------------------------------------------------------- the command line


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command printed; it must succeed."""
    with pytest.raises(SystemExit) as end:
        main(["plan", *arguments])
    captured = capsys.readouterr()
    assert end.value.code == 0, captured.err
    return captured.out


def test_the_command_shows_checks_draws_and_saves(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "a.plan.safetensors", tmp_path / "a.png"
    asked = ["--solver", "adams3", "--process", "vp", "--nfe", "10", "--grid", "uniform_lam"]
    text = told(capsys, *asked, "--check", "--matrix", "--plot", str(picture), "--out", str(out))
    assert "NFE 10" in text
    assert "degree 2 of x0 in lam" in text
    assert "written" in text
    plan = Plan.load(out)
    assert plan == registry.solver("adams3").plan(VP(), grid.uniform_lam(VP(), 10))
    assert picture.stat().st_size > 10_000
    again = told(capsys, "--file", str(out), "--quiet", "--check")
    assert again.startswith("ExponentialAdams(p=3")
    assert "degree 2 of x0 in lam" in again
    assert told(capsys, "--file", str(out), "--out", str(tmp_path / "a.json"), "--quiet") == ""
    assert Plan.load(tmp_path / "a.json") == plan


def test_the_command_says_what_is_in_t_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert "degree 1 of dx/dt in t" in told(
        capsys, "--solver", "heun", "--process", "vp", "--check"
    )


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--solver", "hen"], 2, "did you mean 'heun'"),
        (["--solver", "rk45"], 2, "has no plan"),
        (["--solver", "heun", "--nfe", "10"], 2, "9 and 11"),
        (["--process", "vpp"], 2, "did you mean"),
        (["--grid", "karas"], 2, "did you mean 'karras'"),
        (["--predicts", "noise", "--matrix"], 2, "unknown predicts"),
        (["--file", "nowhere.json"], 1, "cannot read the plan nowhere.json"),
        (["--file", "broken.safetensors"], 1, "not a plan saved by sdeflow"),
        (["--out", "broken.safetensors/a.json"], 1, "broken.safetensors"),
        (["--plot", "broken.safetensors/a.png"], 1, "broken.safetensors"),
    ],
)
def test_the_command_teaches_in_a_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    said: str,
) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["plan", *arguments])
    text = capsys.readouterr().err
    assert end.value.code == status, text
    assert said in text
    assert "Traceback" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["broken.safetensors"]
