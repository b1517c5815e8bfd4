"""The benchmarks of quality: nothing is measured twice, no two processes share a cell, tables say
what was seen.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from sdeflow.models.checkpoint import save_model
from sdeflow.models.unet import UNet, UNetConfig
from sdeflow.training.api import train
from sdeflow.training.config import TrainConfig

TINY = UNetConfig(
    size=8,
    num_classes=10,
    channels=8,
    multipliers=(1,),
    blocks=1,
    attention=(),
    embedding=8,
    head_channels=8,
    group_size=8,
)


@pytest.fixture(scope="module")
def nfe_fid(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("quality.nfe_fid")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training and a test set of ten classes: two plain colours each."""
    folder, generator = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split in ("train", "test"):
        for i in range(20):
            place = folder / split / f"class{i % 10}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), generator.integers(0, 256, 3), dtype=np.uint8)).save(
                place / f"{i}.png"
            )
    return folder


def model(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    save_model(path, UNet(TINY), class_names=[f"class{i}" for i in range(10)])
    return path


def test_a_solver_spends_the_budget_or_one_or_two_calls_less(nfe_fid: ModuleType) -> None:
    found = {nfe: nfe_fid.spendable("heun", nfe) for nfe in (3, 4, 8, 10, 20, 50)}
    assert found == {
        3: 3,
        4: None,
        8: None,
        10: 9,
        20: 19,
        50: 49,
    }  # 3 and 7 are budgets: they have cells of their own
    assert nfe_fid.spendable("dpm_solver_3", 3) is None  # no fewer than the least budget
    curve = {3: 1.0, 7: 2.0, 9: 3.0, 15: 4.0, 19: 5.0}
    assert [nfe_fid.at(curve, nfe) for nfe in (3, 4, 8, 10, 12, 15, 20)] == [
        1.0,
        None,
        None,
        3.0,
        None,
        4.0,
        5.0,
    ]


@pytest.mark.parametrize(
    ("curve", "near"),
    [
        ({3: 9.0, 5: 2.0, 10: 1.09, 20: 1.0}, 10),
        ({3: 9.0, 5: 1.01, 10: 1.2, 20: 1.0}, None),  # it was near, and went away
        ({3: 9.0, 5: 0.8, 10: 1.05, 20: 1.0}, 5),  # below its end is near enough
        ({3: 9.0, 20: 1.0}, None),
    ],
)
def test_where_a_curve_settles(
    nfe_fid: ModuleType, curve: dict[int, float], near: int | None
) -> None:
    assert nfe_fid.settled(curve) == near


def test_the_best_are_those_of_least_geometric_mean(nfe_fid: ModuleType) -> None:
    scores = {"ddim": (4.0, 4.0), "heun": (1.0, 9.0), "adams3": (1.0, 20.0), "ipndm": (0.1, None)}
    cells = {
        (name, "karras", nfe, 100): {"fd_cifar": value}
        for name, pair in scores.items()
        for nfe, value in zip((9, 20), pair, strict=True)
        if value is not None
    }
    cells["dpmpp_2m", "karras", 9, 500] = {"fd_cifar": 0.0}
    assert nfe_fid.best(cells, [9, 20], 2) == [("heun", "karras"), ("ddim", "karras")]


def test_a_cell_belongs_to_one_process_until_it_ends(nfe_fid: ModuleType, tmp_path: Path) -> None:
    cell, other, path = ("ddim", "karras", 3, 8), ("ddim", "karras", 5, 8), tmp_path / "cells.lock"
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}; from benchmarks.quality import nfe_fid; lock ="
        f" open({str(path)!r}, 'a'); print(nfe_fid.claim(lock, {cell!r}), flush=True);"
        " sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with path.open("a") as lock, holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        assert not nfe_fid.claim(lock, cell)
        assert nfe_fid.claim(lock, other)
        holder.kill()
        holder.wait()
        assert nfe_fid.claim(lock, cell)


def test_a_sweep_goes_on_and_tells_what_it_saw(
    nfe_fid: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, first = tmp_path / "cells.jsonl", model(tmp_path / "first.safetensors", 0)
    sets = [
        "--data",
        str(data / "train"),
        "--test",
        str(data / "test"),
        "--out",
        str(out),
        "--batch-size",
        "8",
    ]
    with pytest.raises(SystemExit, match="names the training set"):
        nfe_fid.main(["--out", str(out)])
    with pytest.raises(SystemExit, match="holds no measurement"):
        nfe_fid.main(["--out", str(out), "--report"])
    sweep = [*sets, "--model", str(first), "-n", "12", "--only", "^(ddim|heun|ddpm)"]
    nfe_fid.main([*sweep, "--nfe", "3"])
    with out.open("a") as file:
        file.write('{"solver": "ddim", "grid": "karras", "nf')  # a kill
    nfe_fid.main([*sweep, "--nfe", "3", "5", "10"])
    _, cells = nfe_fid.read(out)
    counts = [
        json.loads(line)["nfe"] for line in out.read_text().splitlines() if '"seconds": ' in line
    ]
    assert sorted(counts) == [3, 3, 3, 5, 5, 5, 9, 10, 10]  # each once
    assert all(np.isfinite(row["fd_cifar"]) and row["fd_cifar"] > 0 for row in cells.values())
    nfe_fid.main([*sets, "--model", str(first), "-n", "20", "--nfe", "3", "5", "--best", "1"])
    headers, cells = nfe_fid.read(out)
    assert sum(cell[3] == 20 for cell in cells) == 2

    with pytest.raises(SystemExit, match="begun with other weights"):
        nfe_fid.main(
            [
                *sets,
                "--model",
                str(model(tmp_path / "second.safetensors", 1)),
                "-n",
                "12",
                "--nfe",
                "3",
            ]
        )
    capsys.readouterr()
    nfe_fid.main(["--out", str(out), "--report", "--into", str(tmp_path / "table")])
    text = (tmp_path / "table.md").read_text()
    assert capsys.readouterr().out.startswith("The excess over the test set of 12 images")
    below = next(h["test_set"] for h in headers if h["test_set"]["n"] == 12)["fd_cifar"]
    nine = cells["heun", "karras", 9, 12]["fd_cifar"] - below
    _, _, part = text.partition("excess FD-CIFAR at so many calls")
    row = next(line for line in part.splitlines() if line.startswith("| heun, karras"))
    assert row.endswith(f"| {nfe_fid.digits(nine)} |")
    assert "20 images, the distances as they are:" in text
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "table.png").stat().st_size > 10_000


def test_the_length_of_the_average_is_measured(
    script: Callable[[str], ModuleType],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    config = TrainConfig(
        data=str(data / "train"),
        out=str(run),
        images=160,
        batch_size=8,
        warmup=8,
        snapshot_images=16,
        sample_images=0,
        model=TINY,
    )
    train(config)
    sets = ["--data", str(data / "train"), "--test", str(data / "test")]
    script("quality.ema_length").main(
        [
            str(run),
            *sets,
            "--stds",
            "0.1",
            "0.15",
            "-n",
            "8",
            "--nfe",
            "3",
            "--batch-size",
            "8",
            "--out",
            str(tmp_path / "ema"),
        ]
    )
    found = json.loads((tmp_path / "ema.json").read_text())
    assert [one["std"] for one in found["averages"]] == [None, 0.1, 0.15]
    assert len({one["fd_cifar"] for one in found["averages"]}) == 3  # three different networks
    assert all(one["profile_error"] < 0.1 for one in found["averages"])
    assert f"{found['averages'][2]['fd_cifar']:.4f}" in capsys.readouterr().out
