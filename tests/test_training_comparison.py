"""The comparison of trainings: EDM's network is EDM's, time is what is counted, and an interrupted
training is the same one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sdeflow._utils.run_control import Stop
from sdeflow.errors import CheckpointError
from sdeflow.images.datasets import Decoded, load_images
from sdeflow.models.checkpoint import read_tensors, write_tensors
from sdeflow.training.api import LOG, STATE, TrainConfig, fit_to_data

SMALL = ["--channels", "8", "--batch-size", "4", "--log-steps", "1"]


@pytest.fixture(scope="module")
def comparison(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("quality.training_comparison")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "test"):
        for i in range(10):
            generator = np.random.default_rng(i + 100 * (split == "test"))
            pixels = np.full((8, 8, 3), generator.integers(0, 256, 3), dtype=np.uint8)
            (folder / split / f"class{i}").mkdir(parents=True)
            Image.fromarray(pixels).save(folder / split / f"class{i}" / "0.png")
    return folder


class Ticking:
    """A clock on which a second passes from each reading to the next."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


class Enough(Stop):
    """Asks for an end after some steps."""

    def __init__(self, steps: int) -> None:
        super().__init__(None)
        self.left = steps

    @property
    def asked(self) -> bool:
        self.left -= 1
        return self.left < 0


def filled(network: nn.Module) -> nn.Module:
    """The network with nothing near zero."""
    torch.manual_seed(1)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network.eval()


def batch(n: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    return x, torch.linspace(-1, 1, n), torch.arange(n)


# ------------------------------------------------------------------------------------ EDM's network


def test_networks_are_of_equal_size(comparison: ModuleType) -> None:
    entries = [
        comparison.Entry(name, channels, 32, 10, 860.0, 0.02, 1e-3)
        for name, channels in comparison.CHANNELS.items()
    ]
    sizes = [sum(p.numel() for p in entry.build().parameters()) for entry in entries]
    assert sizes == [13_649_411, 13_957_059, 13_957_059]


def test_edm_begins_with_its_own_weights(comparison: ModuleType) -> None:
    torch.manual_seed(0)
    network = comparison.EDMNetwork(32, num_classes=10)
    scales = {"qkv": math.sqrt(0.2), "conv1": 1e-5, "proj": 1e-5, "head": 1e-5}
    seen = set()
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            area = module.weight[0, 0].numel()
            bound = math.sqrt(
                6 / (area * sum(module.weight.shape[:2]))
            )  # Glorot's, over inputs and outputs
            scale = scales.get(name.rsplit(".", 1)[-1], 1.0)
            seen.add(scale)
            assert 0.95 * scale * bound < module.weight.abs().max() <= 1.001 * scale * bound, name
            assert not module.bias.any(), name
    assert seen == {1.0, *scales.values()}
    x, time, label = batch()
    assert network.eval()(x, time, label).abs().max() < 1e-3


def test_edm_knows_its_label(comparison: ModuleType) -> None:
    network = filled(comparison.EDMNetwork(8, num_classes=4))
    x, time, label = batch()
    none = torch.full((3,), 4)
    assert not torch.allclose(network(x, time, label), network(x, time, label + 1))
    torch.testing.assert_close(
        network(x, time, none), network(x, time)
    )  # no label is the zero vector
    torch.testing.assert_close(network(x, time, label)[:1], network(x[:1], time[:1], label[:1]))
    # A label adds its column of the map, scaled by the root of the number of classes.
    added = network._embed(time, label) - network._embed(time, none)
    torch.testing.assert_close(added, 2.0 * network.label.weight.T[label], rtol=1e-4, atol=1e-5)


def test_edm_by_our_kernels_is_the_same_function(comparison: ModuleType) -> None:
    plain = filled(comparison.EDMNetwork(8, num_classes=4))
    fused = comparison.EDMNetwork(8, num_classes=4, fused=True).eval()
    fused.load_state_dict(plain.state_dict())
    x, time, label = batch()
    torch.testing.assert_close(fused(x, time, label), plain(x, time, label), rtol=1e-4, atol=1e-5)


def test_dropout_is_an_argument(comparison: ModuleType) -> None:
    x, time, label = batch()
    for dropout, same in ((0.0, True), (0.5, False)):
        network = filled(comparison.EDMNetwork(8, num_classes=4, dropout=dropout)).train()
        assert torch.equal(network(x, time, label), network(x, time, label)) == same


# ----------------------------------------------------------------------------------------- the loop


def trainer(
    comparison: ModuleType,
    data: Path,
    out: Path,
    network: str,
    seconds: float = 8.0,
    device: str = "cpu",
) -> tuple[Any, Decoded]:
    images = load_images(data / "train", progress=False)
    config = TrainConfig(
        out=str(out),
        images=10**12,
        batch_size=4,
        schedule="constant",
        warmup=0,
        log_steps=1,
        save_seconds=0,
        compile=False,
    )
    entry = comparison.Entry(network, 8, 8, 10, seconds, 0.25, 1e-2)
    clock = Ticking() if device == "cpu" else time.perf_counter
    made = comparison.TimedTrainer(fit_to_data(config, images), entry, torch.device(device), clock)
    return made, images


def test_learning_rate_is_a_function_of_the_share_of_time(comparison: ModuleType) -> None:
    entry = comparison.Entry("ours", 8, 8, 10, 800.0, 0.25, 2.0)
    rates = [entry.rate(s) for s in (0, 100, 200, 500, 800, 900)]
    assert rates == pytest.approx([2e-6, 1.0, 2.0, 1.0, 2e-6, 2e-6])
    for wrong in ({"seconds": 0.0}, {"warmup": 1.0}, {"network": "theirs"}):
        with pytest.raises(ValueError):
            comparison.Entry(**{**vars(entry), **wrong})


@pytest.mark.parametrize("network", ["ours", "edm"])
def test_an_interrupted_training_is_the_same(
    comparison: ModuleType,
    data: Path,
    tmp_path: Path,
    network: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, images = trainer(comparison, data, tmp_path / "whole", network, seconds=4.0)
    comparison.run(whole, images, Stop(None))
    lines = [json.loads(line) for line in (tmp_path / "whole" / LOG).read_text().splitlines()]
    assert [line["seconds"] for line in lines] == [1, 2, 3, 4]
    assert whole.step == 4
    assert whole.seconds == 5  # reading the clock at the end took one more

    cut, _ = trainer(comparison, data, tmp_path / "cut", network, seconds=4.0)
    comparison.run(cut, images, Enough(2))
    assert cut.step == 2
    # The last reading of the clock took a second that no step did; take it back to compare.
    tensors, facts = read_tensors(tmp_path / "cut" / STATE)
    write_tensors(tmp_path / "cut" / STATE, tensors, {**facts, "seconds": 2.0})
    cut, _ = trainer(comparison, data, tmp_path / "cut", network, seconds=4.0)
    cut.go_on(tmp_path / "cut" / STATE)
    comparison.run(cut, images, Stop(None))
    one, other = (read_tensors(tmp_path / name / STATE)[0] for name in ("whole", "cut"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any("label" in name for name in one)


def test_preparing_leaves_no_trace(comparison: ModuleType, data: Path, tmp_path: Path) -> None:
    prepared, images = trainer(comparison, data, tmp_path, "ours")
    plain, _ = trainer(comparison, data, tmp_path, "ours")
    stream = comparison.Stream(images, 4, 0)
    prepared.prepare(stream)
    assert (prepared.step, prepared.seconds) == (0, 0.0)
    for one in (prepared, plain):
        one.begin()
        one.advance(stream)
        one.advance(stream)
    assert prepared.seconds == plain.seconds == 2.0
    assert all(
        torch.equal(value, plain._tensors()[name]) for name, value in prepared._tensors().items()
    )


@pytest.mark.cuda
@pytest.mark.parametrize("network", ["ours", "edm", "edm_fused"])
def test_on_a_gpu_steps_are_counted_and_preparing_leaves_no_trace(
    comparison: ModuleType, data: Path, tmp_path: Path, network: str
) -> None:
    made, images = trainer(comparison, data, tmp_path, network, seconds=0.5, device="cuda")
    kept = {name: value.clone() for name, value in made._tensors().items()}
    made.prepare(comparison.Stream(images, 4, 0, device="cuda"))
    assert made.work.graph is not None
    assert all(torch.equal(value, kept[name]) for name, value in made._tensors().items())
    began = time.perf_counter()
    comparison.run(made, images, Stop(None))
    assert 0.5 <= made.seconds < 1.0
    assert made.seconds < time.perf_counter() - began
    assert made.step > 20
    assert not torch.equal(made._tensors()["model.head.weight"], kept["model.head.weight"])


def test_another_training_is_not_gone_on_with(
    comparison: ModuleType, data: Path, tmp_path: Path
) -> None:
    short, images = trainer(comparison, data, tmp_path, "ours", seconds=1.0)
    comparison.run(short, images, Stop(None))
    longer, _ = trainer(comparison, data, tmp_path, "ours", seconds=2.0)
    with pytest.raises(CheckpointError, match=r"seconds=1\.0, and now seconds=2\.0"):
        longer.go_on(tmp_path / STATE)
    tensors, facts = read_tensors(tmp_path / STATE)
    write_tensors(tmp_path / STATE, tensors, {**facts, "runs": []})
    with pytest.raises(CheckpointError, match="not a training of this benchmark"):
        comparison.averaged(tmp_path / STATE, torch.device("cpu"))


def test_the_averaged_network_comes_back(
    comparison: ModuleType, data: Path, tmp_path: Path
) -> None:
    made, images = trainer(comparison, data, tmp_path, "edm", seconds=2.0)
    comparison.run(made, images, Stop(None))
    network, entry, facts = comparison.averaged(tmp_path / STATE, torch.device("cpu"))
    assert entry == made.entry
    assert facts["step"] == 2
    x, time, label = batch()
    assert torch.equal(network(x, time, label), made.ema.averaged(made.network)(x, time, label))
    assert not network.training
    first, again = (
        comparison.loss_of(network, made.config, images, torch.device("cpu"), False)
        for _ in range(2)
    )
    assert first == again
    assert 0 < first < 10


# ---------------------------------------------------------------------------------- from end to end


def test_from_training_to_the_report(
    comparison: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "compare"
    common = ["--data", str(data / "train"), "--out", str(out), "--seconds", "0.4", *SMALL]
    measure = [
        "--test",
        str(data / "test"),
        "--evaluate",
        "--n",
        "10",
        "--nfe",
        "3",
        "--note",
        "plain colours",
    ]
    report = ["--out", str(out), "--report", "--into", str(tmp_path / "table")]
    comparison.main([*common, "--network", "ours"])
    comparison.main([*common, "--network", "ours"])  # there is nothing left to do
    assert "0.4 s" in capsys.readouterr().out
    comparison.main([*common, "--network", "edm", "--max-seconds", "0.05"])
    assert "the same command goes on" in capsys.readouterr().out
    for name in ("ours", "edm"):
        comparison.main([*common, "--network", name, *measure])
    with pytest.raises(SystemExit, match=r"edm has 0\.\d of 0\.4 s: train it to the end"):
        comparison.main(report)
    comparison.main([*common, "--network", "edm"])
    comparison.main([*common, "--network", "edm", *measure])
    comparison.main(report)

    text = (tmp_path / "table.md").read_text()
    assert "| sdeflow UNet |" in text
    assert "| EDM DDPM++ |" in text
    assert "10 images" in text
    assert "Data: plain colours." in text
    assert "in 2 invocations" in text
    found = json.loads((tmp_path / "table.json").read_text())
    ours, edm = found["networks"]
    assert (ours["network"], edm["network"]) == ("ours", "edm")
    for one in (ours, edm):
        assert one["seconds"] >= 0.4
        assert one["images"] == 4 * one["steps"] > 0
        assert 0 < one["fd_cifar"] < math.inf
        assert one["fd_cifar"] != one["floor"] > 0
        assert 0 < one["ema_loss_train"] < 10
        assert sum(run["seconds"] for run in one["runs"]) == pytest.approx(one["seconds"], abs=0.01)
    assert found["provenance"]["date"]

    edm["same"]["nfe"] = 5
    (out / "edm" / "result.json").write_text(json.dumps(edm))
    with pytest.raises(SystemExit, match=r"not comparable .nfe: 3 and 5"):
        comparison.main(report)
    (out / "edm" / "result.json").unlink()
    with pytest.raises(SystemExit, match="train edm and then measure it"):
        comparison.main(report)


def test_what_is_missing_is_told(
    comparison: ModuleType, data: Path, tmp_path: Path, capsys: Any
) -> None:
    with pytest.raises(SystemExit):
        comparison.main(["--out", str(tmp_path), "--network", "ours", "--evaluate"])
    assert "missing: --data, --test" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="the comparison draws 10 in turn"):
        comparison.main(
            ["--out", str(tmp_path), "--network", "ours", "--data", str(data / "train" / "class0")]
        )
