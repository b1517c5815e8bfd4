"""Checkpoints: what is written comes back, damage is told, and a full disk costs nothing."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_unet import batch, unet

import sdeflow
from sdeflow.errors import CheckpointError
from sdeflow.models.checkpoint import (
    BUNDLED,
    load,
    load_model,
    read_tensors,
    save_model,
    write_tensors,
)

NAMES = ("cat", "dog", "frog")


def saved(path: Path) -> Path:
    save_model(path, unet(), class_names=NAMES, card={"images": 7}, sigma_data=0.4)
    return path


def test_a_network_comes_back_as_a_denoiser(tmp_path: Path) -> None:
    denoiser = load(saved(tmp_path / "a.safetensors"))
    assert (denoiser.shape, denoiser.num_classes, denoiser.class_names) == ((3, 8, 8), 3, NAMES)
    assert (denoiser.card["images"], denoiser.sigma_data, denoiser.nsr_range) == (
        7,
        0.4,
        (0.002, 80.0),
    )
    network: Any = denoiser.network
    assert not network.training
    assert {(p.dtype, p.requires_grad) for p in network.parameters()} == {(torch.float32, False)}
    for name, p in unet().named_parameters():
        assert torch.equal(network.get_parameter(name), p.detach().half().float())
    x, _, label = batch()
    assert denoiser(x, 0.5, label=label).shape == x.shape
    assert network.stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert (
        load(tmp_path / "a.safetensors", dtype=torch.float64)(x.double(), 0.5).dtype
        == torch.float64
    )


def test_the_same_network_makes_the_same_file(tmp_path: Path) -> None:
    assert (
        saved(tmp_path / "a.safetensors").read_bytes()
        == saved(tmp_path / "b.safetensors").read_bytes()
    )


def test_sampling_with_it_works(tmp_path: Path) -> None:
    x = sdeflow.sample(
        load(saved(tmp_path / "a.safetensors")),
        nfe=3,
        n=2,
        seeds=0,
        condition={"label": torch.tensor([0, 3])},
    )
    assert x.shape == (2, 3, 8, 8)


@pytest.mark.parametrize("where", ["facts", "start", "tensors", "cut"])
def test_damage_is_told(tmp_path: Path, where: str) -> None:
    path = saved(tmp_path / "a.safetensors")
    content = bytearray(path.read_bytes())
    if where == "cut":
        content = content[: len(content) // 2]
    else:
        content[
            {"facts": content.index(b"frog"), "start": 0, "tensors": len(content) - 100}[where]
        ] ^= 0x55
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        load_model(path)


def test_missing_and_foreign_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a bundled one \\(cifar10\\) nor a file"):
        load("cifar100")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_model(tmp_path / "none")
    with pytest.raises(CheckpointError):
        load_model(tmp_path)
    (tmp_path / "text").write_text("hello, this is not a checkpoint")
    with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
        load_model(tmp_path / "text")
    save_file({"x": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="not one that sdeflow wrote"):
        load_model(tmp_path / "foreign.safetensors")
    write_tensors(tmp_path / "other.safetensors", {"x": torch.zeros(3)}, {"format": "something"})
    with pytest.raises(CheckpointError, match="'something', not a network for inference"):
        load_model(tmp_path / "other.safetensors")


def test_a_network_that_does_not_fit_its_header_is_told(tmp_path: Path) -> None:
    tensors, facts = read_tensors(saved(tmp_path / "a.safetensors"))
    for change in ({"config": {**facts["config"], "channels": 16}}, {"config": {"strange": 1}}):
        write_tensors(tmp_path / "b.safetensors", tensors, facts | change)
        with pytest.raises(CheckpointError, match="does not fit the configuration"):
            load_model(tmp_path / "b.safetensors")


def test_what_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    network = unet()
    network.head.weight.data[0, 0, 0, 0] = 1e6  # finite in float32, not in half precision
    with pytest.raises(CheckpointError, match=r"head\.weight would not be finite"):
        save_model(tmp_path / "a.safetensors", network)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.safetensors")
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*untouched"):
        save_model(path, unet(seed=1))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]  # no temporary file stays
    with pytest.raises(CheckpointError, match="nothing was left behind"):
        save_model(tmp_path / "new.safetensors", unet())


def test_a_real_limit_on_file_size_leaves_the_old_file(tmp_path: Path) -> None:
    """The same with no fake: the operating system refuses to write more than 4 kB to a file."""
    path = saved(tmp_path / "a.safetensors")
    before = path.read_bytes()
    code = (
        "import sys; from sdeflow.models.checkpoint import *; t, f = read_tensors(sys.argv[1])\n"
        "try: write_tensors(sys.argv[1], t, f)\n"
        "except CheckpointError as error: print('told:', error)"
    )
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # noqa: E731
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, preexec_fn=limit
    )
    assert "told: could not save the checkpoint" in done.stdout, done.stderr
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not BUNDLED["cifar10"].is_file(), reason="no bundled checkpoint")
def test_the_bundled_checkpoint() -> None:
    assert BUNDLED["cifar10"].stat().st_size <= 32e6
    denoiser = load("cifar10")
    assert (denoiser.shape, denoiser.num_classes, denoiser.class_names[3]) == (
        (3, 32, 32),
        10,
        "cat",
    )
    card = denoiser.card
    assert "JPEG" in card["data"]
    assert len(card["runs"]) > 1
    assert card["gpu_seconds"] >= 25 * 60
    x0 = torch.zeros(2, 3, 32, 32)
    x0[:, :, 8:24, 8:24] = 0.5
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([0, 10])
    clean = denoiser(x0 + 0.1 * eps, 0.1, label=label)
    assert (clean - x0).square().mean().sqrt() < 0.05  # it removes half of the noise
