"""The benchmark of accuracy: its targets are the library's, its references the flow, and a torn
file is gone on with.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import sdeflow
from sdeflow import registry
from sdeflow.errors import SolverError
from sdeflow.solvers.ode.ddim import DDIM


@pytest.fixture(scope="module")
def accuracy(script: Callable[[str], ModuleType]) -> ModuleType:
    pytest.importorskip("scipy")
    return script("accuracy.run")


@pytest.fixture(scope="module")
def problems(accuracy: ModuleType) -> ModuleType:
    return accuracy.problems


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("references")


def theirs(target: Any, process: sdeflow.Process) -> sdeflow.Target:
    """The same distribution, as the library has it."""
    if hasattr(target, "variances"):
        std = target.variances.sqrt().reshape(target.shape)
        return sdeflow.Gaussian(torch.zeros_like(std), std=std, process=process)
    means = target.means.reshape(-1, *target.shape)
    if target.extra.shape[1] == 0:
        return sdeflow.GaussianMixture(
            target.weights, means, std=target.diag.sqrt(), process=process
        )
    factor = (target.directions * target.extra.sqrt().unsqueeze(-1)).mT
    return sdeflow.GaussianMixture(
        target.weights, means, factor=factor, diag=target.diag, process=process
    )


@pytest.mark.parametrize("name", ["mixture2", "mixture64", "gauss1024", "images"])
@pytest.mark.parametrize("under", ["vp", "edm", "rectified_flow"])
def test_a_target_is_that_of_the_library(
    problems: ModuleType, cache: Path, name: str, under: str
) -> None:
    process = registry.process(under)
    if name == "images":  # a kernel density, on other data
        data = torch.randn(
            20, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        target = problems.Mixture(
            torch.ones(20).double(), data, torch.full((20,), 0.01, dtype=torch.float64)
        ).under(process)
        other: Any = sdeflow.Empirical(data, 0.1, process=process)
    else:
        target = problems.target(name, None, cache).under(process)
        other = theirs(target, process)
    eps = torch.randn(
        6, *target.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    for t in (process.t_max, 0.3, process.t_min):
        x = process.perturb(target.sample(6, 2, dtype=torch.float64), t, eps)
        torch.testing.assert_close(target(x, t), other(x, t), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            target(x.float(), t).double(), target(x, t), rtol=1e-4, atol=1e-4
        )
        assert torch.equal(
            target.at(torch.tensor([0.2, t], dtype=torch.float64), x)[1](x), target(x, t)
        )


@pytest.mark.parametrize("under", ["vp", "edm", "cosine", "rectified_flow"])
def test_the_reference_is_the_flow(problems: ModuleType, cache: Path, under: str) -> None:
    """Against the library's own adaptive solver, from the start of every process."""
    problem = problems.problem("mixture2", under, starts=8, data=None, cache=cache)
    solution = sdeflow.solve(
        problem.target,
        problem.process,
        solver=sdeflow.RK45(rtol=1e-9, atol=1e-9),
        x=problem.start,
        t=problem.process.t_max,
    )
    assert problem.errors(solution.x)[1] < 1e-6


def test_an_exact_set_is_at_the_floor(problems: ModuleType, cache: Path) -> None:
    cloud = problems.cloud("mixture64", "vp", samples=512, data=None, cache=cache)
    assert 0.01 < cloud.floor < 0.12
    assert cloud.distance(cloud.target.sample(512, 99)) < 2 * cloud.floor
    assert cloud.distance(1.2 * cloud.target.sample(512, 99)) > 1.5 * cloud.floor


# -------------------------------------------------------------------------------------------- sweep

ONLY = r"^sdeflow (ddim|adams2|heun|ddpm|\(default\)) (karras|uniform_lam|\(default\))$"


def arguments(accuracy: ModuleType, out: Path, cache: Path, *more: str) -> argparse.Namespace:
    words = [
        "--out",
        str(out),
        "--cache",
        str(cache),
        "--workers",
        "1",
        "--targets",
        "mixture2",
        "--processes",
        "vp",
    ]
    words += ["--starts", "8", "--samples", "64", "--only", ONLY, "--no-peers"]
    return accuracy.parse([*words, *(more or ("--nfe", "5", "6"))])


def test_a_sweep_goes_on_where_it_was_torn(
    accuracy: ModuleType, cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "accuracy.jsonl"
    first = accuracy.sweep(arguments(accuracy, out, cache))
    _, whole = accuracy.read(out)
    assert first["cells"] == sum(len(cells) for cells in whole.values())
    # At 5 and 6 calls: DDIM and Adams on two grids, Heun too though it cannot spend 6, the default;
    # DDPM as a law, at 5 alone.
    assert first["cells"] == 2 * (2 + 2 + 2 + 1) + 2
    assert accuracy.sweep(arguments(accuracy, out, cache))["cells"] == 0

    text = out.read_bytes().splitlines(keepends=True)
    rows = [line for line in text if b'"method"' in line]
    out.write_bytes(b"".join(text[:1] + rows[:-1]) + rows[-1][:30])
    lost = len(json.loads(rows[-1])["cells"])
    assert accuracy.sweep(arguments(accuracy, out, cache))["cells"] == lost
    assert accuracy.read(out)[1] == whole  # the same figures, from the same seeds
    for line in out.read_bytes().splitlines():
        json.loads(line)  # and nothing torn is left in between

    more = accuracy.sweep(arguments(accuracy, out, cache, "--nfe", "5", "8"))["cells"]
    assert more == 2 + 2 + 2 + 1
    again = accuracy.sweep(arguments(accuracy, out, cache, "--nfe", "5", "--redo", "adams2"))[
        "cells"
    ]
    assert again == 2


def test_it_says_why_there_is_no_figure(
    accuracy: ModuleType, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, *_: Any, **__: Any) -> Any:
        raise SolverError("not today")

    monkeypatch.setattr(DDIM, "integrate", fail)
    out = tmp_path / "accuracy.jsonl"
    accuracy.sweep(arguments(accuracy, out, cache, "--nfe", "6"))
    cells = {key[1]: value["6"] for key, value in accuracy.read(out)[1].items() if "6" in value}
    assert cells["ddim"] == "error: SolverError: not today"
    assert cells["heun"].startswith("skip")
    assert all(0 < figure < 1 for figure in cells["adams2"])

    problem = accuracy.problems.problem("mixture2", "vp", starts=8, data=None, cache=cache)
    wasteful = accuracy.Method(
        "x", "y", "z", lambda problem, nfe: problem.denoise(problem.ratio_start, 1.0)
    )
    assert accuracy.cell(wasteful, problem, 2) == "error: 1 calls for nfe=2"


def test_settings_are_not_mixed(accuracy: ModuleType, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "accuracy.jsonl"
    accuracy.sweep(arguments(accuracy, out, cache, "--nfe", "5"))
    with pytest.raises(SystemExit, match="choose another file"):
        accuracy.sweep(arguments(accuracy, out, cache, "--nfe", "5", "--starts", "9"))


def test_every_solver_takes_part(accuracy: ModuleType) -> None:
    """A newly registered solver is measured without anybody doing anything."""
    mine, _ = accuracy.ours.catalogue("vp")
    names = {method.name for method in mine}
    for name, entry in registry.SOLVERS.items():
        if entry.kind.__module__.endswith(".external") or name == "auto" or entry.make().adaptive:
            continue
        same = [
            other
            for other, solver in accuracy.ours.solvers().items()
            if repr(solver) == repr(entry.make())
        ]
        assert names & {name, *same}, name
    assert len(accuracy.problems.methods_by_key(mine)) == len(mine)


def test_the_report(accuracy: ModuleType, cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "accuracy.jsonl"
    accuracy.sweep(arguments(accuracy, out, cache))
    accuracy.main(["--out", str(out), "--report", "--into", str(tmp_path / "results")])
    text = (tmp_path / "results" / "accuracy.md").read_text()
    assert "adams2 · uniform_lam" in text
    found = json.loads((tmp_path / "results" / "accuracy.json").read_text())
    assert found["run"]["settings"]["starts"] == 8
    assert (
        (tmp_path / "results" / "accuracy.csv")
        .read_text()
        .startswith("process,target,family,solver,grid,error,5,6\n")
    )
    assert (tmp_path / "results" / "accuracy.png").stat().st_size > 10_000
