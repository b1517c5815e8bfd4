"""What goes wrong around a computation: damaged states, interrupts, two runs in one folder, homeless
containers. Nothing is lost in silence, and nothing goes on with half.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_generate import make, target
from test_training import FLAGS, _no_drawing, config, equal, pictures, state  # noqa: F401
from torch import Tensor, nn

from sdeflow import VP, Plan, grid, registry
from sdeflow._utils import lock
from sdeflow.cli import main
from sdeflow.errors import CheckpointError, SdeflowError
from sdeflow.generate import generate
from sdeflow.models.checkpoint import load, read_tensors
from sdeflow.training.api import LOG, MODEL, STATE, stored_config, train
from sdeflow.training.trainer import previous

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return pictures(tmp_path / "data")


def spoil(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        flipped = content[:-50] + bytes([content[-50] ^ 1]) + content[-49:]
        path.write_bytes({"cut": content[:-100], "empty": b"", "flipped": flipped}[how])


# ------------------------------------------------------------------------------ the last two states


@pytest.mark.parametrize("how", ["cut", "empty", "flipped", "gone"])
def test_a_damaged_state_costs_no_training_but_the_part_since_the_one_before(
    tmp_path: Path, data: Path, how: str
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    train(config(whole, 6), data)
    for steps in (2, 4):
        train(config(out, steps), data, resume=True)
    assert read_tensors(previous(out / STATE))[1]["step"] == 2
    older = previous(out / STATE).read_bytes()
    spoil(out / STATE, how)
    stored = stored_config(out)
    assert stored is not None
    assert stored.images == 8
    with pytest.raises(CheckpointError, match="already holds a training"):
        train(config(out, 6), data)
    with pytest.warns(RuntimeWarning, match=r"state\.previous\.safetensors, at 8 images"):
        assert train(config(out, 6), data, resume=True).finished
    # The damaged one has not taken the sound one's place.
    assert previous(out / STATE).read_bytes() == older
    assert read_tensors(out / STATE)[1]["step"] == 6
    assert [read_tensors(p)[1]["step"] for p in (out / STATE, whole / STATE)] == [6, 6]


def test_the_training_that_fell_back_is_the_one_that_was_never_stopped(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_training import Stop

    whole, out = tmp_path / "whole", tmp_path / "run"
    train(config(whole, 6), data)
    for stops in ([False, True], [False, True]):
        asked = iter([*stops, *[False] * 9])
        with monkeypatch.context() as patch:
            patch.setattr(Stop, "asked", property(lambda self, asked=asked: next(asked)))
            train(config(out, 6), data, resume=True)
    spoil(out / STATE, "flipped")
    with pytest.warns(RuntimeWarning, match="goes on from the state before it"):
        train(config(out, 6), data, resume=True)
    assert equal(state(whole), state(out))


def test_two_damaged_states_are_told_with_what_can_be_done(tmp_path: Path, data: Path) -> None:
    out = tmp_path / "run"
    for steps in (1, 2):
        train(config(out, steps), data, resume=True)
    for path in (out / STATE, previous(out / STATE)):
        spoil(path, "cut")
    with pytest.raises(CheckpointError, match=r"So is the state before it.*--init") as told:
        train(config(out, 3), data, resume=True)
    assert "fetch" not in str(told.value)


def test_a_failed_save_keeps_both_states(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    for steps in (1, 2):
        train(config(out, steps), data, resume=True)
    before = [p.read_bytes() for p in (out / STATE, previous(out / STATE))]

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        train(config(out, 3), data, resume=True)
    assert [p.read_bytes() for p in (out / STATE, previous(out / STATE))] == before
    assert not list(out.glob(".*"))


def test_without_hard_links_the_state_before_is_a_copy(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    for steps in (1, 2):
        train(config(tmp_path / "run", steps), data, resume=True)
    assert read_tensors(previous(tmp_path / "run" / STATE))[1]["step"] == 1


# ------------------------------------------------------------------------------------- interruptions


def until(process: subprocess.Popen[str], there: Path) -> None:
    """Wait until a file is there that is not empty."""
    deadline = time.monotonic() + 120
    while not (there.is_dir() or (there.is_file() and there.stat().st_size > 0)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_training_saves_and_does_not_end_as_if_it_had_finished(
    tmp_path: Path, data: Path, number: signal.Signals, status: int
) -> None:
    out = tmp_path / "run"
    options = ["--out", str(out), "--data", str(data), "--steps", "100000", *FLAGS]
    command = [sys.executable, "-m", "sdeflow", "train", *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ONE_THREAD, text=True
    ) as process:
        until(process, out / LOG)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == status
    assert f"stopped ({number.name})" in said
    assert "--resume" in said
    assert read_tensors(out / STATE)[1]["step"] > 0
    assert (out / MODEL).exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_generation_keeps_its_shards_and_does_not_end_as_if_it_had_finished(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    out = tmp_path / "images"
    options = ["--out", str(out), "--n", "5000", "--nfe", "1", "--shard-size", "1", "--quiet"]
    command = [sys.executable, "-m", "sdeflow", "generate", *options, "--device", "cpu"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ONE_THREAD, text=True
    ) as process:
        until(process, out / "shard-00000")
        process.send_signal(number)
        process.communicate(timeout=120)
    assert process.returncode == status
    assert list(out.glob("shard-*"))
    assert not list(out.glob(".*"))


@pytest.mark.parametrize(
    ("command", "within"),
    [("sample", "open_model"), ("generate", "open_model"), ("plan", "_trace")],
)
def test_ctrl_c_in_any_command_is_130(
    command: str, within: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules[f"sdeflow.cli.{command}"], within, interrupted)
    for module in (None, "sdeflow.cli"):  # within the command, and outside of any
        if module is not None:
            monkeypatch.setattr(sys.modules[module], "app", interrupted)
            monkeypatch.setattr(sys.modules[module], "_foreign", lambda given: None)
        with pytest.raises(SystemExit) as end:
            main([command, *(["--out", str(tmp_path / "out")] if command == "generate" else [])])
        assert end.value.code == 130


# ------------------------------------------------------------------------------------ one at a time


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of the folder `out`."""
    program = """
        import sys, time
        from sdeflow._utils.lock import locked
        with locked(sys.argv[1], "sdeflow generate"):
            print("held", flush=True)
            time.sleep(600)
    """
    (tmp_path / "out").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_two_runs_in_one_folder_are_one_too_many(
    tmp_path: Path, data: Path, holder: subprocess.Popen[str]
) -> None:
    out = tmp_path / "out"
    told = rf"sdeflow generate \(process {holder.pid} on .*, since 20.*another folder"
    with pytest.raises(SdeflowError, match=told):
        make(out)
    with pytest.raises(SdeflowError, match=told):
        train(config(out, 1), data)
    holder.kill()  # -9: the lock ends with the process, and its file means nothing
    holder.wait()
    assert (out / lock.LOCK).exists()
    assert make(out).finished
    assert not (out / lock.LOCK).exists()


def test_a_run_that_fails_leaves_no_lock(tmp_path: Path) -> None:
    with lock.locked(tmp_path, "a test"):
        with pytest.raises(SdeflowError, match=f"a test .process {os.getpid()}"):
            make(tmp_path)
        assert (tmp_path / lock.LOCK).exists()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="shape"):
        generate(target(), tmp_path, n=2, nfe=3, shape=(2, 2))
    assert make(tmp_path).finished


def test_settings_written_while_waiting_are_checked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdeflow.generate import api

    real = api.locked

    def late(folder: Path, *rest: Any) -> Any:
        monkeypatch.setattr(api, "locked", real)
        make(folder, n=5, nfe=7)  # another run, between our check and our lock
        return real(folder, *rest)

    monkeypatch.setattr(api, "locked", late)
    with pytest.raises(ValueError, match="was made with nfe=7"):
        make(tmp_path / "out", n=5)


def test_a_file_system_without_locks_locks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert make(tmp_path / "out").finished
    assert not (tmp_path / "out" / lock.LOCK).exists()


# --------------------------------------------------------------------------------------- containers

SOLVES = """
import os, pwd, sys

wrote = []

def hook(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        writes = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and path != os.devnull:
            wrote.append((event, path))
    elif event in ("os.mkdir", "os.rename", "os.link", "subprocess.Popen", "os.posix_spawn"):
        wrote.append((event, *arguments[:1]))
    elif event in ("os.exec", "os.system", "os.fork", "socket.connect", "ctypes.dlopen.compiled"):
        wrote.append((event, *arguments[:1]))

def unknown(user):
    raise KeyError("getpwuid(): uid not found: 54321")

pwd.getpwuid = unknown
os.chdir(sys.argv[1])
import torch  # what others do when they are imported is theirs
import numpy, scipy.special, torchdiffeq, torchsde
sys.addaudithook(hook)
from sdeflow import VP, Gaussian, registry, sample
target = Gaussian(torch.zeros(3), std=0.5, process=VP())
for name in registry.SOLVERS:
    for nfe in ((None,) if registry.solver(name).adaptive else (12, 13)):
        try:
            x = sample(target, solver=name, nfe=nfe, n=2, seeds=0)
            break
        except ValueError:
            continue
    assert bool(x.isfinite().all()), name
sample(target, nfe=5, n=2, seeds=0, noise="brownian", solver="ddpm")
print("solved", wrote, os.listdir())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="users and permissions as Unix has them")
def test_every_solve_works_in_a_bare_container_and_writes_nothing(tmp_path: Path) -> None:
    """An unknown user, no HOME, no compiler, no place to write: nothing is opened for writing, made
    or started, whatever the permissions.
    """
    place, empty = tmp_path / "place", tmp_path / "empty"
    place.mkdir()
    empty.mkdir()
    place.chmod(0o555)
    root = Path(__file__).parent.parent
    bare = {
        "PATH": str(empty),
        "TMPDIR": str(place),
        "LANG": "C",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SOLVES, str(place)],
        env=bare,
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "solved [] []\n"


# ------------------------------------------------------------------------------------------ messages


class Net(nn.Module):
    """Any network of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_of_torch_save_is_said_to_be_one(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "net.pt"
    torch.save(Net().state_dict(), path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"torch\.save.*Prediction\(network, 'eps'"):
        load(path)


def test_weights_of_another_project_are_said_to_be_so(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(Net().state_dict(), tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match=r"not one that sdeflow wrote.*Prediction"):
        load(tmp_path / "net.safetensors")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sample", "--steps", "20"], "sample has no --steps: it is called --nfe"),
        (["generate", "--num-inference-steps=20"], "called --nfe"),
        (["plan", "--steps", "20"], "called --nfe"),
        (["sample", "--sampler", "heun"], "called --solver"),
        (["generate", "--scheduler", "heun"], "called --solver"),
        (["sample", "--num-samples", "4"], "called --n"),
        (["sample", "--solver", "rk45", "--nfe", "10"], "leave --nfe out, and set its accuracy"),
        (["sample", "--solver", "torchdiffeq", "--nfe", "10"], "leave --nfe out"),
        (["sample", "--solver", "nowhere.json"], "cannot read the plan nowhere.json"),
        (["sample", "--solver", "plan.json", "--nfe", "9"], "nor another --nfe"),
        (["sample", "--solver", "plan.json", "--rtol", "1e-3"], "plan.json is a plan"),
        (["sample", "--solver", "plan.json", "--process", "ve"], "pass --process"),
    ],
)
def test_the_command_line_answers_in_its_own_words(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    edm = registry.process("edm")
    registry.solver("heun").plan(edm, grid.karras(edm, 2)).save("plan.json")  # type: ignore[attr-defined]
    with pytest.raises(SystemExit) as end:
        main(arguments)
    told = " ".join(capsys.readouterr().err.split())
    assert end.value.code in (1, 2)
    assert said in told
    assert "nfe=" not in told
    assert "max_nfe" not in told


def test_a_saved_plan_is_a_solver_on_the_command_line_too(tmp_path: Path) -> None:
    from sdeflow.images.render import read_facts

    edm = registry.process("edm")
    plan: Plan = registry.solver("heun").plan(edm, grid.karras(edm, 2))  # type: ignore[attr-defined]
    for name in ("plan.json", "plan.safetensors"):
        path = tmp_path / name
        plan.save(path)
        for out, solver in (("a.png", ["--solver", str(path)]), ("b.png", ["--solver", "heun"])):
            grid_of = [] if out == "a.png" else ["--nfe", "3", "--grid", "karras"]
            options = ["--n", "1", "--device", "cpu", "--quiet", "--out", str(tmp_path / out)]
            with pytest.raises(SystemExit) as end:
                main(["sample", *solver, *grid_of, *options])
            assert not end.value.code
        a, b = (read_facts(tmp_path / out) for out in ("a.png", "b.png"))
        assert a["solver"] == b["solver"]


def test_generate_takes_a_saved_plan(tmp_path: Path) -> None:
    vp = VP()
    plan: Plan = registry.solver("ddim").plan(vp, grid.uniform_t(vp, 4))  # type: ignore[attr-defined]
    assert generate(target(), tmp_path / "out", n=2, solver=plan).finished
