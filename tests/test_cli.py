"""The command line: what it writes, what it says, and how it ends; where the process itself
matters, as a subprocess.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image

from sdeflow.cli import main
from sdeflow.cli import options as cli_options
from sdeflow.images.render import read_facts
from sdeflow.models import UNet, UNetConfig
from sdeflow.models.checkpoint import save_model

NAMES = ("ant", "bee", "cat")


SHOWN = {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "TERM": "dumb"}


def spawn(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own, which takes seconds to import torch."""
    command = [sys.executable, "-m", "sdeflow", *arguments]
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **SHOWN},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command in this process: what it says, and the status that it would end with."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.chdir(cwd),
        mock.patch.dict(os.environ, SHOWN),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main(arguments)
        except SystemExit as end:
            status = int(end.code or 0)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random network of three classes, quick to run."""
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    torch.manual_seed(0)
    config = UNetConfig(
        size=8,
        num_classes=3,
        channels=16,
        multipliers=(1, 1),
        blocks=1,
        attention=(),
        embedding=16,
        head_channels=8,
        group_size=8,
    )
    save_model(path, UNet(config), class_names=NAMES, card={"data": "none"})
    return path


def test_ctrl_c_writes_the_images_of_the_finished_batches(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []
    forward = UNet.forward

    def interrupted(self: UNet, *arguments: Any, **options: Any) -> torch.Tensor:
        seen.append(1)
        if len(seen) > 10:  # in the third batch of five calls each
            raise KeyboardInterrupt
        return forward(self, *arguments, **options)

    monkeypatch.setattr(UNet, "forward", interrupted)
    out = tmp_path / "a.png"
    options = {"--model": tiny, "--n": 6, "--nfe": 5, "--batch-size": 2, "--out": out}
    with pytest.raises(SystemExit) as end:
        main(["sample", "--quiet", *(str(part) for pair in options.items() for part in pair)])
    assert end.value.code == 130
    assert "stopped with 4 of 6 images finished" in capsys.readouterr().err
    facts = read_facts(out)
    assert facts["seeds"] == [0, 1, 2, 3]
    assert facts["labels"] == [0, 1, 2, 0]


def test_sample_writes_a_labelled_picture_and_says_how(tiny: Path, tmp_path: Path) -> None:
    done = run(
        "sample",
        "--model",
        str(tiny),
        "--n",
        "7",
        "--nfe",
        "5",
        "--seed",
        "3",
        "--out",
        "a.png",
        "--gif",
        "a.gif",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "RGB"
        assert min(picture.size) > 3 * 100  # three columns and rows of about 128 pixels
    facts = read_facts(tmp_path / "a.png")
    assert facts["labels"] == [0, 1, 2, 0, 1, 2, 0]
    assert facts["seeds"] == list(range(3, 10))
    assert facts["nfe"] == 5
    with Image.open(tmp_path / "a.gif") as film:
        assert 1 <= film.n_frames <= 5
    for said in ("NFE      5", "Auto", "EDM", "written  a.png"):
        assert said in done.stdout
    assert "100%" in done.stderr  # the progress bar


def test_the_same_seed_makes_the_same_file(tiny: Path, tmp_path: Path) -> None:
    for name, start in (("a.png", run), ("b.png", spawn)):
        done = start(
            "sample",
            "--model",
            str(tiny),
            "--n",
            "2",
            "--nfe",
            "3",
            "--out",
            name,
            "--quiet",
            cwd=tmp_path,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_classes_solver_process_grid_and_tolerance_are_honoured(tiny: Path, tmp_path: Path) -> None:
    options = [
        "--classes",
        "cat,0",
        "--process",
        "vp",
        "--grid",
        "uniform_lam",
        "--solver",
        "ddpm",
        "--nfe",
        "4",
        "--n",
        "3",
    ]
    done = run("sample", "--model", str(tiny), *options, "--batch-size", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = read_facts(tmp_path / "samples.png")
    assert facts["labels"] == [2, 0, 2]
    assert facts["grid"] == "uniform_lam"
    assert "VP" in facts["process"]
    assert "DDPM" in facts["solver"]
    done = run(
        "sample",
        "--model",
        str(tiny),
        "--solver",
        "rk45",
        "--rtol",
        "1e-2",
        "--n",
        "1",
        "--quiet",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "rtol=0.01, atol=0.01" in read_facts(tmp_path / "samples.png")["solver"]


def test_what_fits_and_graphs_are_options(tiny: Path, tmp_path: Path) -> None:
    plain, auto = (
        run(
            "sample",
            "--model",
            str(tiny),
            "--n",
            "3",
            "--nfe",
            "3",
            "--out",
            out,
            *options,
            cwd=tmp_path,
        )
        for out, options in (
            ("a.png", []),
            ("b.png", ["--batch-size", "auto", "--compile", "--device", "cpu"]),
        )
    )
    assert (plain.returncode, auto.returncode) == (0, 0), auto.stderr
    assert (
        "compiled no: a CUDA graph needs a state on a CUDA device" in auto.stdout
    )  # said once, and no warning
    assert "Warning" not in auto.stderr
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("device", "asked", "half", "compiled"),
    [("cpu", True, False, False), ("cuda", True, True, True), ("cuda", False, False, False)],
)
def test_a_network_is_compiled_where_that_serves(
    monkeypatch: pytest.MonkeyPatch, device: str, asked: bool, half: bool, compiled: bool
) -> None:
    load = mock.Mock()
    monkeypatch.setattr(cli_options, "load", load)
    cli_options.open_model("cifar10", torch.device(device), half, asked)
    dtype = torch.bfloat16 if half else torch.float32
    load.assert_called_once_with("cifar10", torch.device(device), dtype, compile=compiled)


def test_half_precision_makes_another_picture_and_says_so(tiny: Path, tmp_path: Path) -> None:
    for name, options in (("a.png", []), ("b.png", ["--half", "--classes", "all"])):
        done = run(
            "sample",
            "--model",
            str(tiny),
            "--n",
            "3",
            "--nfe",
            "3",
            "--out",
            name,
            *options,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
    whole, half = (read_facts(tmp_path / name) for name in ("a.png", "b.png"))
    assert (whole.pop("dtype"), half.pop("dtype")) == ("float32", "bfloat16")
    assert whole == half
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_the_commands_share_their_options(tmp_path: Path) -> None:
    """An option of two commands has the same words in both."""
    sample, generate = (
        run(name, "--help", cwd=tmp_path).stdout.splitlines() for name in ("sample", "generate")
    )
    for name in (
        "solver",
        "nfe",
        "process",
        "grid",
        "rtol",
        "noise",
        "model",
        "compile",
        "half",
        "quiet",
    ):
        [a], [b] = (
            [" ".join(row.split()) for row in rows if f"--{name} " in row and "│" in row]
            for rows in (sample, generate)
        )
        assert a == b


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--solver", "hen"], 2, "did you mean 'heun'"),
        (["--solver", "heun", "--nfe", "36"], 2, "35 and 37"),
        (["--solver", "rk45", "--nfe", "10"], 2, "leave --nfe out"),
        (["--rtol", "1e-3"], 2, "adaptive"),
        (["--process", "vpp"], 2, "did you mean"),
        (["--grid", "karas"], 2, "did you mean 'karras'"),
        (["--classes", "bea"], 2, "did you mean 'bee'"),
        (["--classes", "7"], 2, "unknown class '7'"),
        (["--device", "nothing"], 2, "no device 'nothing'"),
        (["--noise", "pink"], 2, "brownian"),
        (["--n", "0"], 2, "--n"),
        (
            ["--batch-size", "many"],
            2,
            "--batch-size is a whole number, at least 1, or auto; got 'many'",
        ),
        (["--out", "missing.txt/a.png"], 1, "missing.txt"),
        (["--out", "a.jpg"], 2, "--out is written as PNG: call it a.png, not a.jpg"),
        (["--gif", "a.mp4"], 2, "--gif is written as GIF: call it a.gif, not a.mp4"),
        (["--model", "nowhere.safetensors"], 1, "no checkpoint 'nowhere.safetensors'"),
        (["--model", "broken.safetensors"], 1, "damaged"),
    ],
)
def test_errors_teach_in_a_line_and_leave_no_file(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    said: str,
) -> None:
    (tmp_path / "missing.txt").write_text("a file where a folder should be")
    (tmp_path / "broken.safetensors").write_bytes(tiny.read_bytes()[:-100])
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["sample", "--model", str(tiny), *arguments])
    told = capsys.readouterr().err
    assert end.value.code == status, told
    assert said in told
    assert "Traceback" not in told
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_error_ends_the_process_with_its_status(tiny: Path, tmp_path: Path) -> None:
    done = spawn("sample", "--model", str(tiny), "--solver", "heun", "--nfe", "36", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert (
        done.stderr.splitlines()[-1]
        == "error: Heun cannot spend nfe=36; the nearest it can are 35 and 37"
    )


def test_help_version_and_info(tmp_path: Path) -> None:
    done = run("sample", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "Examples" in done.stdout
    assert "sdeflow sample --solver rk45" in done.stdout
    assert run("--version", cwd=tmp_path).stdout.startswith("sdeflow ")
    done = run("info", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("rectified_flow", "euler_maruyama", "karras", "cifar10", "15778563"):
        assert name in done.stdout
    assert run("info", "solver", cwd=tmp_path).returncode == 2


@pytest.mark.slow
def test_the_default_command_draws_the_bundled_model(tmp_path: Path) -> None:
    done = run("sample", "--n", "2", "--nfe", "9", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "samples.png").stat().st_size > 1000
