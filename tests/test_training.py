"""Training: the loss, the schedule, and that a training stopped in any way goes on to the very same
weights.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_unet import TINY, unet
from torch import Tensor

from sdeflow import Preconditioned
from sdeflow._utils.run_control import Log, Stop
from sdeflow.cli import train as cli_train
from sdeflow.errors import CheckpointError, NonFiniteError, SdeflowError
from sdeflow.losses import EDMLoss
from sdeflow.models.checkpoint import load, read_tensors
from sdeflow.models.ema.posthoc import find_snapshots, reconstruct
from sdeflow.models.ema.power import exponent
from sdeflow.training import api as training
from sdeflow.training import trainer
from sdeflow.training.api import LOG, MODEL, STATE, TrainConfig, crossed, stored_config, train

FLAGS = [
    *(
        "--batch-size",
        "4",
        "--channels",
        "8",
        "--multipliers",
        "1,2",
        "--blocks",
        "1",
        "--attention",
        "4",
    ),
    *(
        "--embedding",
        "16",
        "--head-channels",
        "8",
        "--group-size",
        "4",
        "--dropout",
        "0.1",
        "--log-steps",
        "1",
    ),
    *("--sample-images", "0", "--warmup", "8", "--device", "cpu"),
]


def pictures(path: Path) -> Path:
    for i in range(6):
        pixels = np.full((8, 8, 3), np.random.default_rng(i).integers(0, 256, 3), dtype=np.uint8)
        (path / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path / f"class{i % 2}" / f"{i}.png")
    return path


def config(out: Path, steps: int = 6) -> TrainConfig:
    """The same training as `FLAGS`."""
    return TrainConfig(
        out=str(out), images=4 * steps, batch_size=4, warmup=8, sample_images=0, log_steps=1, device="cpu",
        model=replace(TINY, dropout=0.1),
    )  # fmt: skip


def state(out: Path) -> dict[str, Tensor]:
    return read_tensors(out / STATE)[0]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / LOG).read_text().splitlines()]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return pictures(tmp_path / "data")


@pytest.fixture(autouse=True)
def _no_drawing(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "grid" not in request.node.name:
        monkeypatch.setattr(training, "draw_grid", lambda *a, **k: None)


# ----------------------------------------------------------------------------------------- the loss


def test_loss_is_the_weighted_error_of_the_denoiser() -> None:
    network, d = unet().double().eval(), 0.4
    loss = EDMLoss(sigma_data=d)
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 3, 8, 8, generator=generator).double()
    n = torch.tensor([0.003, 0.05, 0.4, 3.0, 70.0]).double()
    label = torch.arange(5) % 4
    denoiser = Preconditioned(network, d, shape=(3, 8, 8))
    error = denoiser(x0 + n.view(-1, 1, 1, 1) * eps, n, label=label) - x0
    expected = (n**2 + d**2) / (n * d) ** 2 * error.square().mean((1, 2, 3))
    torch.testing.assert_close(
        loss.at(network, x0, n, eps, label).double(), expected, rtol=1e-4, atol=1e-6
    )


def test_noise_levels_are_log_normal_and_one_to_a_slice() -> None:
    generator = torch.Generator().manual_seed(0)
    loss = EDMLoss(mean=-1.0, std=0.7)
    draws = torch.stack([loss.nsr(64, generator).log() for _ in range(200)]).double()
    assert draws.mean() == pytest.approx(-1.0, abs=1e-3)
    assert draws.std() == pytest.approx(0.7, rel=0.01)
    slices = (
        (0.5 * (1 + torch.erf((draws + 1.0) / (0.7 * math.sqrt(2)))) * 64).floor().sort(1).values
    )
    # A draw within rounding of a slice's edge may fall on either side of it.
    assert (slices == torch.arange(64)).double().mean() > 0.95
    assert bool(draws.isfinite().all())


def test_labels_are_dropped_at_the_stated_rate() -> None:
    label = torch.zeros(20000, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    dropped = EDMLoss(label_dropout=0.1, null_label=3).labels(label, generator)
    assert dropped is not None
    assert set(dropped.tolist()) == {0, 3}
    assert (dropped == 3).double().mean() == pytest.approx(0.1, abs=0.01)
    assert EDMLoss(label_dropout=0.0, null_label=3).labels(label, generator) is label
    assert EDMLoss(null_label=None).labels(label, generator) is label
    assert EDMLoss(null_label=3).labels(None, generator) is None


@pytest.mark.parametrize("change", [{"std": 0.0}, {"sigma_data": -1.0}, {"label_dropout": 1.1}])
def test_impossible_losses_are_told(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="EDMLoss"):
        EDMLoss(**change)


def test_a_denoiser_s_loss_is_that_of_its_network_bit_for_bit() -> None:
    """Noise levels, noise and labels are drawn in this order: a seed trains as it did."""
    network, x0 = unet().eval(), torch.randn(6, 3, 8, 8)
    label, loss = torch.arange(6) % 3, EDMLoss(label_dropout=0.5, null_label=3)
    generator = torch.Generator().manual_seed(3)
    nsr = loss.nsr(6, generator)
    eps = torch.randn(x0.shape, generator=generator)
    expected = loss.at(network, x0, nsr, eps, loss.labels(label, generator))
    generator.manual_seed(3)
    found = loss(Preconditioned(network), x0, generator=generator, label=label)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("loss", ["flow", "min_snr"])
def test_another_loss_trains_and_cannot_change_on_the_way(
    loss: str, tmp_path: Path, data: Path
) -> None:
    out = tmp_path / "run"
    settings = replace(config(out, 2), loss=loss)
    result = train(settings, data)
    assert result.finished
    assert math.isfinite(result.loss)
    described = settings.objective.describe()
    assert ("FlowMatching" if loss == "flow" else "MinSNR") in described
    with pytest.raises(CheckpointError, match="not edm"):
        train(replace(config(out, 4), loss="edm"), data, resume=True)


# ------------------------------------------------------------------------------------- the settings


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_rises_and_falls(schedule: str) -> None:
    c = TrainConfig(images=10_000, batch_size=10, warmup=1000, lr=2.0, schedule=schedule)
    assert c.lr_at(0) == pytest.approx(0.01)
    assert c.lr_at(99) == pytest.approx(2.0, rel=0.01)
    middle, end = {"cosine": (1.0, 0.0), "linear": (1.0, 0.0), "constant": (2.0, 2.0)}[schedule]
    assert c.lr_at(549) == pytest.approx(middle, rel=0.01)
    assert c.lr_at(c.steps - 1) == pytest.approx(end, abs=2e-3)


def test_configuration_survives_json() -> None:
    c = config(Path("x"))
    assert TrainConfig.from_dict(json.loads(json.dumps(c.to_dict()))) == c


@pytest.mark.parametrize(
    "change", [{"images": 0}, {"schedule": "magic"}, {"precision": "fp8"}, {"lr": -1.0}]
)
def test_impossible_settings_are_told(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(TrainConfig(), **change)


def test_crossing_a_multiple_is_seen_once() -> None:
    assert [i for i in range(4, 41, 4) if crossed(i, 4, 10)] == [12, 20, 32, 40]
    assert not crossed(40, 4, 0)


def test_log_drops_the_future_and_a_line_cut_short(tmp_path: Path) -> None:
    (tmp_path / LOG).write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    Log(tmp_path / LOG, 2).write({"step": 5})
    assert [line["step"] for line in log(tmp_path)] == [1, 2, 5]


# ------------------------------------------------------------------------------------- the training


def test_training_learns_and_leaves_everything_in_its_folder(tmp_path: Path, data: Path) -> None:
    c = replace(
        config(tmp_path / "run"), images=640, batch_size=16, lr=1e-2, label_dropout=0.0, model=TINY
    )
    before = torch.random.get_rng_state()
    result = train(c, data, export=tmp_path / "out" / "mine.safetensors")
    assert torch.equal(before, torch.random.get_rng_state())  # the caller's generator is left alone
    assert (result.finished, result.images) == (True, 640)
    lines = log(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert set(lines[0]) >= {
        "step",
        "images",
        "loss",
        "images_per_second",
        "lr",
        "grad_norm",
        "seconds",
    }
    first, last = (sum(line["loss"] for line in part) / 10 for part in (lines[:10], lines[-10:]))
    assert last < 0.85 * first, (first, last)
    for path in (tmp_path / "run" / MODEL, tmp_path / "out" / "mine.safetensors"):
        denoiser = load(path)
        assert (denoiser.shape, denoiser.num_classes, denoiser.class_names) == (
            (3, 8, 8),
            2,
            ("class0", "class1"),
        )
        assert denoiser.card["images"] == 640
        assert "| run |" in path.with_suffix(".md").read_text()


def test_grids_of_samples_are_drawn(tmp_path: Path, data: Path) -> None:
    train(replace(config(tmp_path / "run", 2), sample_images=4), data)
    names = sorted(p.name for p in (tmp_path / "run").glob("*.png"))
    assert names == ["samples-000000004.png", "samples-000000008.png", "samples.png"]


def test_unconditional_training(tmp_path: Path) -> None:
    images = [torch.full((3, 8, 8), 40 * i, dtype=torch.uint8) for i in range(5)]
    assert train(config(tmp_path, 2), images).denoiser.num_classes == 0


def test_stopped_and_resumed_gives_the_very_same_weights(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(tmp_path / "whole"), data)
    parts, asked = config(tmp_path / "parts"), iter([False, False, True] + [False] * 9)
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "asked", property(lambda self: next(asked)))
        assert train(parts, data).images == 8
    assert (
        train(replace(parts, max_seconds=0.0), data, resume=True).images == 8
    )  # a time limit of nothing does nothing
    assert train(parts, data, resume=True).finished
    assert equal(state(tmp_path / "whole"), state(tmp_path / "parts"))


def test_killed_and_resumed_gives_the_very_same_weights(tmp_path: Path, data: Path) -> None:
    """`kill -9` in the middle of a training through the command line; resumed here; bit for bit as
    if nothing had been.
    """
    whole, killed, steps = tmp_path / "whole", tmp_path / "killed", 60
    train(config(whole, steps), data)
    command = [
        sys.executable,
        "-m",
        "sdeflow",
        "train",
        "--data",
        str(data),
        "--out",
        str(killed),
        "--steps",
        str(steps),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, *FLAGS, "--save-seconds", "0.05"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
    ) as process:
        deadline = time.monotonic() + 120
        while not (
            (killed / STATE).exists()
            and (killed / LOG).exists()
            and len((killed / LOG).read_bytes()) > 500
        ):
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    step = read_tensors(killed / STATE)[1]["step"]
    assert 0 < step < steps, "it was to be killed in the middle"
    assert list(killed.glob("*.md")) == []
    result = train(config(killed, steps), data, resume=True)
    assert result.finished
    assert equal(state(whole), state(killed))
    assert [line["step"] for line in log(killed)] == list(range(1, steps + 1))
    again = [line["loss"] for line in log(killed)][step:]
    assert again == [line["loss"] for line in log(whole)][step:]
    assert len(read_tensors(killed / STATE)[1]["runs"]) == 2


def test_sigterm_saves_and_the_command_line_resumes(tmp_path: Path, data: Path) -> None:
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "sdeflow",
        "train",
        "--out",
        str(out),
        "--data",
        str(data),
        "--steps",
        "100000",
        *FLAGS,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while not ((out / LOG).exists() and (out / LOG).stat().st_size > 0):
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.terminate()
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "stopped (SIGTERM)" in said
    assert "--resume" in said
    step = read_tensors(out / STATE)[1]["step"]
    assert (out / MODEL).exists()
    cli_train.train(out=out, resume=True, steps=step + 3)  # all else is taken over
    assert read_tensors(out / STATE)[1]["step"] == step + 3


def test_a_folder_with_a_training_is_not_overwritten(tmp_path: Path, data: Path) -> None:
    train(config(tmp_path / "run", 1), data)
    with pytest.raises(CheckpointError, match="already holds a training"):
        train(config(tmp_path / "run", 1), data)


@pytest.mark.parametrize(
    "change", [{"batch_size": 2}, {"seed": 1}, {"model": replace(TINY, dropout=0.2)}]
)
def test_what_would_not_be_the_same_training_is_not_resumed(
    tmp_path: Path, data: Path, change: dict[str, Any]
) -> None:
    train(config(tmp_path / "run", 1), data)
    before = (tmp_path / "run" / STATE).read_bytes()
    name = "dropout" if "model" in change else next(iter(change))
    with pytest.raises(CheckpointError, match=f"{name}.*leave that option out"):
        train(replace(config(tmp_path / "run", 2), **change), data, resume=True)
    assert (tmp_path / "run" / STATE).read_bytes() == before


def test_a_damaged_state_is_told(tmp_path: Path, data: Path) -> None:
    train(config(tmp_path / "run", 1), data)
    path = tmp_path / "run" / STATE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        train(config(tmp_path / "run", 2), data, resume=True)


def test_a_loss_that_is_not_finite_ends_it_and_the_last_good_state_stays(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    train(config(out, 2), data)
    before = (out / STATE).read_bytes()
    monkeypatch.setattr(
        EDMLoss,
        "at",
        lambda self, network, x0, *rest: network(x0, x0[:, 0, 0, 0]).mean((1, 2, 3)) * math.nan,
    )
    with pytest.raises(NonFiniteError, match=r"loss is nan.*last good state is kept"):
        train(config(out, 4), data, resume=True)
    assert (out / STATE).read_bytes() == before


def test_a_full_disk_in_the_middle_does_not_end_it(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, original, calls = tmp_path / "run", os.fsync, []

    def full_at_first(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) <= 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", full_at_first)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        assert train(replace(config(out), save_seconds=1e-6), data).finished
    assert read_tensors(out / STATE)[1]["step"] == 6


def test_a_folder_that_cannot_be_written_is_told_at_once(tmp_path: Path, data: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SdeflowError, match="cannot write the training state"):
        train(config(tmp_path / "file" / "run"), data)


def test_gradients_are_clipped_to_the_stated_norm() -> None:
    network = unet()
    gradients = trainer.Gradients(network)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for clip, factor in ((1e9, 1.0), (1e-3, None)):
        network.zero_grad()
        network(x, torch.zeros(2), torch.zeros(2, dtype=torch.int64)).square().sum().backward()
        plain = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
        expected = torch.stack([g.norm() for g in plain.values()]).norm()
        norm = gradients.collect(clip)
        torch.testing.assert_close(norm, expected, rtol=1e-4, atol=0)
        scale = factor or clip / float(norm)
        for name, p in network.named_parameters():
            torch.testing.assert_close(p.grad, plain[name] * scale, rtol=1e-4, atol=1e-9)


def test_training_begins_from_a_checkpoint(tmp_path: Path, data: Path) -> None:
    """Its weights and its network, but for the dropout; the first average is of them too; going on
    needs it no more.
    """
    first = train(config(tmp_path / "first", 3), data)
    model = tmp_path / "first" / MODEL
    asked = replace(
        config(tmp_path / "second", 2), init=str(model), lr=1e-12, model=replace(TINY, channels=16)
    )
    second = train(asked, data).denoiser
    assert second.network.config == replace(first.denoiser.network.config, dropout=0.0)  # type: ignore[attr-defined]
    weights = load(model).network.state_dict()  # type: ignore[attr-defined]
    for name, value in second.network.state_dict().items():  # type: ignore[attr-defined]
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-6)
    assert second.card["settings"]["init"] == str(model)
    assert re.fullmatch(rf"{MODEL} \(12 images in [\d.]+ s\)", second.card["begun_from"])
    third = train(
        replace(asked, out=str(tmp_path / "third"), init=str(tmp_path / "second" / MODEL)), data
    ).denoiser
    assert f"begun from {second.card['begun_from']}" in third.card["begun_from"]
    model.unlink()
    stored = stored_config(tmp_path / "second")
    assert stored is not None
    again = train(replace(stored, images=12), data, resume=True)
    assert again.images == 12
    assert again.denoiser.card["begun_from"] == second.card["begun_from"]
    with pytest.raises(CheckpointError, match="init"):
        train(replace(stored, images=16, init=None), data, resume=True)


def test_averages_count_what_a_checkpoint_has_seen(tmp_path: Path, data: Path) -> None:
    """Its weights stand for the 12 images before: of the 16 after a step of 4 they keep
    (12/16)^(gamma + 1).
    """
    train(config(tmp_path / "first", 3), data)
    model = tmp_path / "first" / MODEL
    asked = replace(
        config(tmp_path / "second", 1),
        init=str(model),
        lr=0.1,
        warmup=0,
        schedule="constant",
        snapshot_images=4,
    )
    made = train(asked, data).denoiser
    begun, after = load(model).network.state_dict(), state(tmp_path / "second")  # type: ignore[attr-defined]
    kept = (12 / 16) ** (exponent(0.1) + 1)
    for name, old in begun.items():
        new = after[f"model.{name}"]
        assert not torch.equal(new, old), name
        torch.testing.assert_close(
            after[f"power-0.1:{name}"], kept * old + (1 - kept) * new, rtol=1e-5, atol=1e-6
        )
    assert {s.images for s in find_snapshots(tmp_path / "second")} == {16}
    assert (made.card["images"], made.card["images_before"]) == (4, 12)
    train(replace(asked, images=8), data, resume=True)
    assert {s.images for s in find_snapshots(tmp_path / "second")} == {16, 20}
    third = replace(
        config(tmp_path / "third", 1), init=str(tmp_path / "second" / MODEL), snapshot_images=4
    )
    assert train(third, data).denoiser.card["images_before"] == 20


def test_graphs_need_a_gpu(tmp_path: Path, data: Path) -> None:
    with pytest.raises(ValueError, match=r"this training is on cpu; leave it out"):
        train(replace(config(tmp_path, 2), graphs=True), data)


def test_a_checkpoint_of_other_classes_is_no_beginning(tmp_path: Path, data: Path) -> None:
    with pytest.raises(
        CheckpointError, match="10 classes of 32x32 pixels, and the data are 2 of 8x8"
    ):
        train(replace(config(tmp_path, 2), init="cifar10"), data)


@pytest.mark.cuda
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_replayed_step_is_the_step(tmp_path: Path, data: Path, dropout: float) -> None:
    """Ten steps, of which seven are replays of one CUDA graph, give the weights of ten steps one
    after the other.
    """
    states = []
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        for graphs in (False, True):
            asked = replace(
                config(tmp_path / str(graphs), 10), device="cuda", compile=False, graphs=graphs,
                precision="float32", model=replace(TINY, dropout=dropout),
            )  # fmt: skip
            train(asked, data)
            states.append(state(tmp_path / str(graphs)))
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_averages_are_stored_and_one_of_another_length_is_made_of_them(
    tmp_path: Path, data: Path
) -> None:
    """Stopped and resumed they are the same; the averages of a future that is no more are
    dropped.
    """
    asked = replace(config(tmp_path / "whole", 16), snapshot_images=8)
    train(asked, data)
    parts = replace(asked, out=str(tmp_path / "parts"), images=40)
    train(parts, data)
    old = tmp_path / "parts" / "ema-0.050-000000900.safetensors"
    old.write_bytes(b"of a state that was lost")
    train(replace(parts, images=64), data, resume=True)
    assert not old.exists()
    stored = find_snapshots(tmp_path / "whole")
    assert sorted({s.images for s in stored}) == [8, 16, 24, 32, 40, 48, 56, 64]
    assert {s.std for s in stored} == {0.05, 0.10}
    whole, again = (state(tmp_path / name) for name in ("whole", "parts"))
    tracked = [name for name in whole if name.startswith("power-0.1:")]
    assert tracked
    # the schedule is another until image 40, so the weights are not the same, but the averages go
    # on with them
    assert all(again[name].isfinite().all() for name in tracked)
    made = reconstruct(tmp_path / "whole", 0.1)
    for name in tracked:
        torch.testing.assert_close(
            made.parameters[name.partition(":")[2]], whole[name], rtol=1e-4, atol=1e-6
        )


def test_averages_may_begin_in_the_middle(tmp_path: Path, data: Path) -> None:
    asked = config(tmp_path, 2)
    train(asked, data)
    train(replace(asked, images=16, snapshot_images=4), data, resume=True)
    assert {s.images for s in find_snapshots(tmp_path)} == {12, 16}
    train(replace(asked, images=20), data, resume=True)


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path: Path, data: Path) -> None:
    """Under torchrun: the same images a step, one log, and weights that differ by the noise that
    each rank draws.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "sdeflow",
        "train",
    ]
    done = subprocess.run(
        [*command, "--data", str(data), "--out", str(tmp_path / "two"), "--steps", "4", *FLAGS],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line["images"] for line in log(tmp_path / "two")] == [4, 8, 12, 16]
    assert done.stdout.count("finished at 16 images") == 1
    assert "2 x" in read_tensors(tmp_path / "two" / STATE)[1]["runs"][0]["machine"]


@pytest.mark.filterwarnings("error")
def test_training_warns_of_nothing(tmp_path: Path, data: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        train(config(tmp_path / "run", 2), data)
