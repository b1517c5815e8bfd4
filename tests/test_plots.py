"""Processes, samples and trajectories as figures: they show the numbers that they are of."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import PROCESSES
from torch import Tensor

from sdeflow import VP, Gaussian, Heun, MissingExtraError, Prediction, grid, solve

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("name", PROCESSES)
def test_a_process_is_drawn(name: str, tmp_path: Path) -> None:
    process = PROCESSES[name]
    figure = process.plot(tmp_path / "process.png")
    law, rates = figure.axes
    lines = {line.get_label(): line for axes in (law, rates) for line in axes.get_lines()}
    assert set(lines) == {"s", "sigma", "nsr", "g2"}
    for label in ("s", "sigma", "nsr"):
        t, y = (torch.as_tensor(column, dtype=torch.float64) for column in lines[label].get_data())
        torch.testing.assert_close(getattr(process, label)(t), y)
    first = (tmp_path / "process.png").read_bytes()
    process.plot(tmp_path / "process.png")
    assert (tmp_path / "process.png").read_bytes() == first


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 4, 4), (5,), (2, 3), (1,)])
@pytest.mark.parametrize("trajectory", [False, True])
def test_samples_are_drawn(shape: tuple[int, ...], trajectory: bool, tmp_path: Path) -> None:
    model = Gaussian(torch.zeros(shape), std=0.5, process=VP())
    made = solve(model, solver="heun", nfe=5, n=3, seeds=0, trajectory=trajectory)
    figure = made.plot(tmp_path / "samples.png")
    assert (tmp_path / "samples.png").stat().st_size > 1000
    if len(shape) == 1 and shape[0] > 1:
        points = figure.axes[0].get_lines()[-1]
        torch.testing.assert_close(torch.as_tensor(points.get_xdata()), made.x[:, 0])
        assert len(figure.axes[0].get_lines()) == (4 if trajectory else 1)
    if len(shape) == 3:
        assert len([a for a in figure.axes if a.images]) == (3 * 4 if trajectory else 3)


def test_a_saved_plan_s_samples_are_drawn_too() -> None:
    plan = Heun().plan(VP(), grid.uniform_t(VP(), 3))

    def network(x: Tensor, t: Tensor) -> Tensor:
        return 0.1 * x

    made = solve(Prediction(network, "x0", VP(), shape=(2,)), solver=plan, n=2, seeds=0)
    assert "Heun" in made.plot()._suptitle.get_text()


def test_drawing_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtraError, match=r"plotting a process.*sdeflow\[plot\]"):
        VP().plot()
