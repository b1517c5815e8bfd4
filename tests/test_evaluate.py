"""Evaluation: scores from any source, the same on any number of processes; results that say how
they were made; clear errors.

The feature network is a small random one, saved as the bundled one is.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import sdeflow
from sdeflow._utils.distributed import Rank
from sdeflow.cli import main
from sdeflow.errors import CheckpointError, MissingExtraError, SdeflowError, UnknownNameError
from sdeflow.evaluation.api import compare, evaluate
from sdeflow.evaluation.features import (
    CifarFeatures,
    CifarNet,
    CifarNetConfig,
    Inception,
    cifar,
    extractor,
    file_sha256,
    save_cifar_net,
)
from sdeflow.evaluation.features import inception as features
from sdeflow.evaluation.measure import FeatureStatistics, measure, open_images
from sdeflow.evaluation.metrics import Statistics, frechet_distance, precision_recall
from sdeflow.evaluation.result import Evaluation
from sdeflow.evaluation.sampled import Sampling, samples_of
from sdeflow.images import shards
from sdeflow.images.datasets import Decoded
from sdeflow.models import UNet, UNetConfig
from sdeflow.models.checkpoint import save_model, write_tensors
from sdeflow.process import VP
from sdeflow.sampling.api import solve
from sdeflow.sampling.cuda_graphs import CompileWarning
from sdeflow.targets import GaussianMixture

NAMES = ("ant", "bee", "cat")


def pixels(seed: int, n: int, size: int = 8) -> Tensor:
    return torch.randint(
        0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def small(seed: int = 0) -> CifarNet:
    torch.manual_seed(seed)
    return CifarNet(CifarNetConfig((8, 16), (1, 1), 3, 8)).eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("features") / "features.safetensors"
    save_cifar_net(path, small(), class_names=NAMES, card={"accuracy": 0.5})
    return path


@pytest.fixture
def net(weights: Path) -> CifarFeatures:
    return CifarFeatures(weights)


def folder(
    path: Path, images: Tensor, labels: Tensor | None = None, size: int = 8, **settings: Any
) -> Path:
    """A folder as `sdeflow generate` writes it."""
    n, (height, width) = len(images), images.shape[2:]
    labels = torch.arange(n) % 3 if labels is None else labels
    settings = {
        "format": "npz", "n": n, "shard_size": size, "shape": [height, width, 3], "class_names": list(NAMES),
        "seed": 5, "nfe": 9, "solver": "Heun()", "classes": [0, 1, 2], **settings,
    }  # fmt: skip
    path.mkdir(parents=True)
    shards.write_settings(path, settings)
    opened = shards.opened(path, settings)
    for k in range(len(opened)):
        rows = opened.indices(k)
        part = slice(rows.start, rows.stop)
        opened.write(k, images[part].permute(0, 2, 3, 1).contiguous(), labels[part])
    return path


def pngs(path: Path, images: Tensor) -> Path:
    path.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path / f"{i:04d}.png")
    return path


# ----------------------------------------------------------------------------------- the extractors


def test_the_network_is_stored_in_half_precision_and_read_back(tmp_path: Path) -> None:
    network = small()
    save_cifar_net(tmp_path / "net.safetensors", network, class_names=NAMES, card={"accuracy": 0.9})
    stored = CifarFeatures(tmp_path / "net.safetensors")
    assert (stored.name, stored.score, stored.dim, stored.num_classes) == (
        "cifar10_features",
        "fd_cifar",
        16,
        3,
    )
    assert (stored.class_names, stored.card["accuracy"]) == (NAMES, 0.9)
    assert stored.sha256 == file_sha256(tmp_path / "net.safetensors") == stored.describe()["sha256"]
    x = pixels(0, 5)
    got = stored(x)
    torch.testing.assert_close(got, network.features(network.normalise(x)), rtol=0.02, atol=0.02)
    assert (got.dtype, got.shape, stored.logits(got).shape) == (torch.float32, (5, 16), (5, 3))
    assert not got.requires_grad
    torch.testing.assert_close(stored(x[:1]), got[:1], rtol=1e-5, atol=1e-5)


def test_the_default_network_is_of_the_promised_size(tmp_path: Path) -> None:
    network = CifarNet()
    assert 3.5e6 < sum(p.numel() for p in network.parameters()) < 4e6
    save_cifar_net(tmp_path / "net.safetensors", network)
    assert (tmp_path / "net.safetensors").stat().st_size < 8e6
    assert CifarFeatures(tmp_path / "net.safetensors").dim == 256


def test_other_sizes_are_resized_and_grey_is_made_three_channels(net: CifarFeatures) -> None:
    x = pixels(1, 4, 16)
    resized = torch.nn.functional.interpolate(x.float(), (8, 8), mode="bilinear", antialias=True)
    torch.testing.assert_close(net(x), net.network.features(net.network.normalise(resized)))
    assert torch.equal(net(x[:, :1]), net(x[:, :1].expand(-1, 3, -1, -1)))


@pytest.mark.parametrize(
    ("images", "error", "said"),
    [(torch.zeros(2, 3, 8, 8), TypeError, "uint8"), (torch.zeros(2, 2, 8, 8, dtype=torch.uint8), ValueError, r"\[B, 3, H, W\]"),
     (torch.zeros(3, 8, 8, dtype=torch.uint8), ValueError, r"\[B, 3, H, W\]")],
)  # fmt: skip
def test_what_is_no_picture_is_refused(
    net: CifarFeatures, images: Tensor, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        net(images)


def test_a_missing_damaged_or_other_file_of_weights_is_told(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar, "CIFAR_WEIGHTS", tmp_path / "nowhere.safetensors")
    with pytest.raises(CheckpointError, match=r"is missing.*install sdeflow again.*train_features"):
        CifarFeatures()
    with pytest.raises(CheckpointError, match="there is no file"):
        CifarFeatures(tmp_path / "other")
    whole = bytearray(weights.read_bytes())
    (tmp_path / "cut").write_bytes(whole[:-50])
    whole[-10] ^= 1
    (tmp_path / "flipped").write_bytes(whole)
    for name in ("cut", "flipped"):
        with pytest.raises(CheckpointError, match="damaged"):
            CifarFeatures(tmp_path / name)
    write_tensors(tmp_path / "state", {"x": torch.zeros(1)}, {"format": "sdeflow-training-1"})
    with pytest.raises(CheckpointError, match="not a feature network"):
        CifarFeatures(tmp_path / "state")
    facts = {
        "format": cifar.CIFAR_FORMAT,
        "config": {"widths": [4]},
        "class_names": [],
        "card": {},
    }
    write_tensors(tmp_path / "misfit", {"x": torch.zeros(1)}, facts)
    with pytest.raises(CheckpointError, match="does not fit"):
        CifarFeatures(tmp_path / "misfit")
    with pytest.raises(CheckpointError, match="would not be finite"):
        save_cifar_net(tmp_path / "x", small(), tensors={"stem.weight": torch.full((2, 2), 1e9)})
    with pytest.raises(UnknownNameError, match="did you mean 'fd_cifar'"):
        extractor("fd_cifr")


# ---------------------------------------------------------------------------------------- Inception


class Stand(torch.nn.Module):
    """In torch-fidelity's place: 64 numbers an image."""

    def __init__(self, name: str, wanted: list[str], feature_extractor_weights_path: str) -> None:
        super().__init__()
        print("a message of the library")
        assert wanted == ["2048"]

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x.flatten(1).float().mean(1, keepdim=True) * torch.arange(64) / 64,)


@pytest.fixture
def fidelity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A torch-fidelity of which only the names are real, and a file of weights with the known
    hash.
    """
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.URL_INCEPTION_V3 = "https://example.invalid/weights-6726825d.pth"  # type: ignore[attr-defined]
    module.FeatureExtractorInceptionV3 = Stand  # type: ignore[attr-defined]
    package = types.ModuleType("torch_fidelity")
    package.feature_extractor_inceptionv3 = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    monkeypatch.setattr(Inception, "dim", 64)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "inception.pth").write_bytes(b"weights")
    monkeypatch.setattr(features, "INCEPTION_SHA256", file_sha256(tmp_path / "inception.pth"))
    return tmp_path / "inception.pth"


def test_inception_takes_the_file_that_is_named_and_checks_it(
    fidelity: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inception = Inception(fidelity)
    assert (inception.score, inception.sha256) == ("fid", file_sha256(fidelity))
    assert inception(pixels(0, 3)).shape == (3, 64)
    assert capsys.readouterr().out == ""  # what the library prints is not a result
    fidelity.write_bytes(b"weight")
    with pytest.raises(CheckpointError, match=r"SHA-256.*damaged or another one"):
        Inception(fidelity)
    with pytest.raises(CheckpointError, match="there is no file"):
        Inception(fidelity.parent / "nowhere")
    with pytest.raises(ValueError, match="no classes"):
        inception.logits(torch.zeros(1, 2048))


def test_inception_is_fetched_once_and_a_failure_names_both_ways_out(
    fidelity: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []

    def fetch(url: str, path: str, hash_prefix: str, progress: bool) -> None:
        fetched.append(url)
        if len(fetched) == 1:
            raise OSError("no route to host")
        if len(fetched) == 2:
            raise RuntimeError("invalid hash value")
        assert hash_prefix == features.INCEPTION_SHA256
        shutil.copy(fidelity, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for why in ("no route to host", "invalid hash value"):
        with pytest.raises(CheckpointError, match=rf"{why}.*--weights PATH, or use fd_cifar"):
            Inception()
    Inception()
    Inception()
    assert len(fetched) == 3


def test_without_torch_fidelity_the_command_to_install_it_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = builtins.__import__

    for failure, said in (
        (ImportError("gone"), r"the metric fid needs torch-fidelity.*pip install 'sdeflow\[fid\]'"),
        (
            RuntimeError("operator torchvision::nms does not exist"),
            "cannot be imported.*nms.*install the two together",
        ),
    ):

        def refuse(name: str, *rest: Any, failure: Exception = failure, **named: Any) -> Any:
            if name.startswith("torch_fidelity"):
                raise failure
            return original(name, *rest, **named)

        monkeypatch.setattr(builtins, "__import__", refuse)
        with pytest.raises(MissingExtraError, match=said):
            evaluate(pixels(0, 4), pixels(1, 4), ("fid",))


def test_the_known_hash_is_that_of_the_files_name() -> None:
    assert len(features.INCEPTION_SHA256) == 64
    assert features.INCEPTION_SHA256.startswith("6726825d")


# -------------------------------------------------------------------------------------- the sources


def test_every_source_of_the_same_images_measures_the_same(
    net: CifarFeatures, tmp_path: Path
) -> None:
    images, labels = pixels(2, 21), torch.arange(21) % 3
    np.savez(tmp_path / "a.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    sources: list[Any] = [
        images,
        [images[:10], images[10:]],
        ((part, label) for part, label in zip(images.split(4), labels.split(4), strict=True)),
        folder(tmp_path / "run", images, labels),
        pngs(tmp_path / "images", images),
        tmp_path / "a.npz",
        Decoded(images, labels),
        [(image, int(label)) for image, label in zip(images, labels, strict=True)],
    ]
    found = [measure(open_images(source, batch_size=4), [net])[0] for source in sources]
    for other in found[1:]:
        assert other.facts["images_sha256"] == found[0].facts["images_sha256"]
        assert other.statistics.n == 21
        assert frechet_distance(found[0].statistics, other.statistics) < 1e-9
    accurate = [f.facts.get("accuracy") for f in found]
    assert [a is None for a in accurate] == [True, True, False, False, True, False, False, False]
    expected = float((net.logits(net(images)).argmax(1) == labels).double().mean())
    assert {a for a in accurate if a is not None} == {expected}
    shuffled = measure(open_images(images.flip(0)), [net])[0]
    assert shuffled.facts["images_sha256"] == found[0].facts["images_sha256"]
    assert (
        measure(open_images(images[1:]), [net])[0].facts["images_sha256"]
        != found[0].facts["images_sha256"]
    )


def test_the_first_n_are_the_same_whatever_the_source(net: CifarFeatures, tmp_path: Path) -> None:
    images = pixels(3, 20)
    np.savez(tmp_path / "a.npz", images=images.permute(0, 2, 3, 1).numpy())
    sources = [
        images,
        images.split(6),
        folder(tmp_path / "run", images),
        Decoded(images),
        tmp_path / "a.npz",
    ]
    expected = measure(open_images(images[:11]), [net])[0].facts["images_sha256"]
    for source in sources:
        found = measure(open_images(source, n=11, batch_size=4), [net])[0]
        assert (found.statistics.n, found.facts["images_sha256"]) == (11, expected)


def test_processes_share_each_source_without_gaps_or_doubles(tmp_path: Path) -> None:
    images = pixels(4, 30)
    np.savez(tmp_path / "a.npz", images=images.permute(0, 2, 3, 1).numpy())
    for source in (folder(tmp_path / "run", images), Decoded(images), tmp_path / "a.npz"):
        for n in (None, 17):
            opened = [open_images(source, n=n, batch_size=4, rank=Rank(i, 3)) for i in range(3)]
            none = torch.zeros(0, 3, 8, 8, dtype=torch.uint8)
            seen = [torch.cat([none, *(part for part, _ in images.batches)]) for images in opened]
            together = torch.cat(seen)
            assert sorted(map(bytes, together.numpy())) == sorted(map(bytes, images[:n].numpy()))
            assert max(map(len, seen)) < len(together)


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        ([torch.zeros(2, 3, 8, 8)], TypeError, "to_uint8"),
        ([torch.zeros(2, 8, 8, 3, dtype=torch.uint8)], TypeError, r"\[B, C, H, W\]"),
        ([(pixels(0, 2), torch.zeros(3))], ValueError, "as many labels"),
        ([pixels(0, 1)], ValueError, "two at least"),
        ([pixels(0, 2), pixels(0, 2, 16)], ValueError, "differ in shape"),
        (iter([]), ValueError, "holds 0 images"),
        ("no/where/at/all", ValueError, "neither a folder"),
        (7, TypeError, "__len__"),
    ],
)
def test_what_gives_no_images_is_told(
    net: CifarFeatures, source: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        measure(open_images(source), [net])


def test_an_unfinished_or_damaged_folder_is_told(weights: Path, tmp_path: Path) -> None:
    run = folder(tmp_path / "run", pixels(5, 20))
    (run / "shard-00001.npz").write_bytes((run / "shard-00001.npz").read_bytes()[:100])
    with pytest.raises(SdeflowError, match=r"shard 1 .* is damaged"):
        evaluate(run, pixels(6, 9), ("fd_cifar",), cifar_weights=weights)
    (run / "shard-00001.npz").unlink()
    with pytest.raises(SdeflowError, match="not finished"):
        evaluate(run, pixels(6, 9), ("fd_cifar",), cifar_weights=weights)
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(ValueError, match="holds no images"):
        open_images(tmp_path / "file.txt")


# ----------------------------------------------------------------------------- reference statistics


def test_statistics_are_kept_with_their_provenance_and_read_back(
    net: CifarFeatures, tmp_path: Path
) -> None:
    [found] = measure(open_images(pixels(7, 40)), [net], features=["fd_cifar"])
    found.save(tmp_path / "a.safetensors")
    again = FeatureStatistics.load(tmp_path / "a.safetensors")
    assert torch.equal(again.statistics.scatter, found.statistics.scatter)
    assert torch.equal(again.statistics.mean, found.statistics.mean)
    assert torch.equal(again.features, found.features)  # type: ignore[arg-type]
    assert again.facts == found.facts
    assert {
        "source",
        "images_sha256",
        "n",
        "shape",
        "extractor",
        "version",
        "torch",
        "machine",
        "date",
    } <= set(again.facts)
    assert again.facts["extractor"]["resize"] == net.resize
    assert frechet_distance(again.statistics, found.statistics) < 1e-12


def test_missing_damaged_or_other_statistics_are_told(
    net: CifarFeatures, weights: Path, tmp_path: Path
) -> None:
    file = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match="there are no statistics at"):
        evaluate(pixels(0, 5), file, ("fd_cifar",), cifar_weights=weights)
    measure(open_images(pixels(7, 40)), [net])[0].save(file)
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(content)
    (tmp_path / "cut.safetensors").write_bytes(content[:-5])
    for name in ("flipped", "cut"):
        with pytest.raises(CheckpointError, match="damaged"):
            FeatureStatistics.load(tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="no statistics of images"):
        FeatureStatistics.load(weights)
    with pytest.raises(CheckpointError, match="hold no features"):
        evaluate(pixels(0, 5), file, ("precision",), cifar_weights=weights)
    save_cifar_net(tmp_path / "other", small(1))
    with pytest.raises(CheckpointError, match=r"another extractor \(sha256"):
        evaluate(pixels(0, 5), file, ("fd_cifar",), cifar_weights=tmp_path / "other")


def test_a_reference_is_measured_once(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, keep = pngs(tmp_path / "real", pixels(8, 30)), tmp_path / "stats"
    named = {"statistics": keep, "cifar_weights": weights}
    first = evaluate(pixels(9, 20), source, ("fd_cifar",), **named)  # type: ignore[arg-type]
    assert (keep / "cifar10_features.safetensors").is_file()
    evaluate(pixels(9, 20), source, ("fd_cifar", "recall"), **named)  # type: ignore[arg-type]  # measured again, for features
    shutil.rmtree(source)  # whatever comes now, it is not read
    source.mkdir()
    again = evaluate(pixels(9, 20), source, ("fd_cifar", "recall"), **named)  # type: ignore[arg-type]
    assert again.metrics["fd_cifar"] == pytest.approx(first.metrics["fd_cifar"], abs=1e-12)
    assert evaluate(pixels(9, 20), None, **named).metrics == pytest.approx(  # type: ignore[arg-type]
        again.metrics | {"precision": mock.ANY}
    )
    with pytest.raises(SdeflowError, match=r"n 7\).*another folder"):
        evaluate(pixels(9, 20), source, ("fd_cifar",), reference_n=7, **named)  # type: ignore[arg-type]
    with pytest.raises(SdeflowError, match="holds the statistics of"):
        evaluate(pixels(9, 20), tmp_path / "else", ("fd_cifar",), **named)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="there are no statistics"):
        evaluate(
            pixels(9, 20), None, ("fd_cifar",), statistics=tmp_path / "empty", cifar_weights=weights
        )
    with pytest.raises(ValueError, match="a path or a name"):
        evaluate(pixels(9, 20), pixels(8, 30), ("fd_cifar",), **named)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a reference is needed"):
        evaluate(pixels(9, 20), None, ("fd_cifar",), cifar_weights=weights)


def test_a_full_disk_leaves_the_old_statistics(
    net: CifarFeatures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [found] = measure(open_images(pixels(7, 40)), [net])
    found.save(tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        found.save(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == before
    result = compare(found, found)
    with pytest.raises(SdeflowError, match=r"could not save the result.*No space left.*Make room"):
        result.save(tmp_path / "result.json")
    assert len(list(tmp_path.iterdir())) == 1


# -------------------------------------------------------------------------------------- the results


def test_the_scores_are_those_of_the_metrics(
    net: CifarFeatures, weights: Path, tmp_path: Path
) -> None:
    real, fake = pixels(10, 50), pixels(11, 40) // 2
    labels = torch.arange(40) % 3
    result = evaluate(
        folder(tmp_path / "run", fake, labels),
        real,
        ("accuracy", "recall", "fd_cifar", "precision"),
        cifar_weights=weights,
    )
    a, b = net(real), net(fake)
    distance = frechet_distance(Statistics(16).update(a), Statistics(16).update(b))
    precision, recall = precision_recall(a, b)
    accuracy = float((net.logits(b).argmax(1) == labels).double().mean())
    assert list(result.metrics) == ["accuracy", "recall", "fd_cifar", "precision"]
    expected = {
        "accuracy": accuracy,
        "recall": recall,
        "fd_cifar": distance,
        "precision": precision,
    }
    assert result.metrics == pytest.approx(expected, rel=1e-6)


def test_a_result_says_all_that_it_depends_on(weights: Path, tmp_path: Path) -> None:
    run = folder(tmp_path / "run", pixels(12, 24))
    result = evaluate(
        run, pixels(13, 30), ("fd_cifar", "recall"), floor=pixels(14, 25), cifar_weights=weights
    )
    result.save(tmp_path / "result.json")
    told = json.loads((tmp_path / "result.json").read_text())
    assert (told["n"], told["reference_n"], told["floor"]["n"]) == (24, 30, 24)
    assert (told["seed"], told["nfe"], told["solver"], told["classes"]) == (
        5,
        9,
        "Heun()",
        [0, 1, 2],
    )
    assert set(told["floor"]["metrics"]) == {"fd_cifar"}
    excess = told["metrics"]["fd_cifar"] - told["floor"]["metrics"]["fd_cifar"]
    assert told["excess"] == {"fd_cifar": pytest.approx(excess, rel=1e-12)}
    for side in ("samples", "reference"):
        facts = told[side]["fd_cifar"]
        assert len(facts["images_sha256"]) == 64
        assert facts["extractor"]["sha256"] == file_sha256(weights)
        assert "8 x 8" in facts["extractor"]["resize"]
    assert told["version"] == sdeflow.__version__
    assert told["machine"]
    assert told["date"].startswith("20")
    assert told["settings"]["k"] == 3
    assert told["bias"]["fd_cifar"] > 0
    assert "biased upwards" in told["warnings"][0]
    assert "fid" not in {
        *told["metrics"],
        *told["samples"],
    }  # the score of the own network is never called so
    again = Evaluation.load(tmp_path / "result.json")
    assert again == result
    for said in ("FD-CIFAR", "floor", "24 against 30", "warning:"):
        assert said in str(result)
    for content in ("{", "[]", "{}"):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(SdeflowError, match="not a result"):
            Evaluation.load(tmp_path / "bad.json")


def test_warnings_are_given_where_they_are_due(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pixels(15, 30)
    assert any(
        "very images" in text
        for text in evaluate(real, real, ("fd_cifar",), cifar_weights=weights).warnings
    )
    larger = evaluate(pixels(16, 10, 16), real, ("fd_cifar",), cifar_weights=weights).warnings
    assert any("resizing alone" in text for text in larger)
    assert any("not even more than the 16 dimensions" in text for text in larger)
    other = folder(tmp_path / "run", pixels(17, 30), class_names=["x", "y", "z"])
    told = evaluate(other, real, ("fd_cifar", "accuracy"), cifar_weights=weights).warnings
    assert any("are not those of the network" in text for text in told)
    monkeypatch.setattr("sdeflow.evaluation.metrics.frechet.ENOUGH", 30)
    assert evaluate(pixels(17, 30), real, ("fd_cifar",), cifar_weights=weights).warnings == []


def test_the_distance_of_two_sets_of_one_kind_is_about_its_bias(weights: Path) -> None:
    result = evaluate(pixels(18, 1500), pixels(19, 1500), ("fd_cifar",), cifar_weights=weights)
    assert (
        1 / 3 < result.metrics["fd_cifar"] / result.bias["fd_cifar"] < 3
    )  # one draw of it, mostly along one direction


def test_several_scores_share_one_pass(fidelity: Path, weights: Path) -> None:
    passes: list[int] = []

    def once(seed: int) -> Any:
        passes.append(seed)
        yield pixels(seed, 12)

    result = evaluate(
        once(1), once(2), ("fid", "fd_cifar", "precision"), weights=fidelity, cifar_weights=weights
    )
    assert passes == [1, 2] or passes == [2, 1]
    assert result.settings["precision_recall_features"] == "fid"
    assert result.samples["fid"]["extractor"]["name"] == "inception-v3-compat"
    alone = evaluate(pixels(1, 12), pixels(2, 12), ("precision",), cifar_weights=weights)
    assert alone.settings["precision_recall_features"] == "fd_cifar"
    assert alone.metrics.keys() == {"precision"}


@pytest.mark.parametrize(
    ("metrics", "more", "said"),
    [
        (("fd_cifr",), {}, "did you mean 'fd_cifar'"),
        ((), {}, "at least one of"),
        ("fid", {}, "sequence of names"),
        (("accuracy",), {}, "labels"),
        (("fd_cifar",), {"weights": "x.pth"}, "weights is for fid"),
        (("fd_cifar",), {"n": 1}, "2 at least"),
        (("fd_cifar",), {"sampling": Sampling(n=4)}, "these samples are there already"),
        (
            ("precision",),
            {"k": 30},
            "the 30 nearest neighbours of each image, and there are only 20 reference images",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_told(
    weights: Path, metrics: Any, more: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        evaluate(pixels(0, 20), pixels(1, 20), metrics, cifar_weights=weights, **more)


def test_compared_statistics_need_no_network(
    net: CifarFeatures, weights: Path, tmp_path: Path
) -> None:
    paths = []
    for seed in (20, 21):
        paths.append(tmp_path / f"{seed}.safetensors")
        measure(open_images(pixels(seed, 40)), [net])[0].save(paths[-1])
    stored = compare(*paths)
    mixed = compare(paths[0], pixels(21, 40), cifar_weights=weights)
    assert stored.metrics["fd_cifar"] == pytest.approx(mixed.metrics["fd_cifar"], rel=1e-9)
    assert (stored.n, stored.reference_n) == (40, 40)
    save_cifar_net(tmp_path / "other", small(1))
    measure(open_images(pixels(0, 9)), [CifarFeatures(tmp_path / "other")])[0].save(
        tmp_path / "b.safetensors"
    )
    with pytest.raises(CheckpointError, match="another extractor"):
        compare(paths[0], tmp_path / "b.safetensors")


# ---------------------------------------------------------------------------------- from a denoiser


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    torch.manual_seed(0)
    config = UNetConfig(
        size=8, num_classes=3, channels=16, multipliers=(1, 1), blocks=1, attention=(), embedding=16, head_channels=8,
        group_size=8,
    )  # fmt: skip
    save_model(path, UNet(config), class_names=NAMES, card={"data": "none"})
    return path


def test_a_denoiser_is_drawn_from_as_generate_draws(
    model: Path, weights: Path, tmp_path: Path
) -> None:
    from sdeflow.generate import generate

    denoiser = sdeflow.load(model)
    sampling = Sampling(n=10, nfe=5, solver="heun", seed=3, batch_size=4)
    found = evaluate(
        denoiser, pixels(0, 20), ("fd_cifar", "accuracy"), sampling=sampling, cifar_weights=weights
    )
    generate(
        denoiser,
        tmp_path / "run",
        n=10,
        nfe=5,
        solver="heun",
        seed=3,
        batch_size=4,
        shard_size=4,
        format="npz",
    )
    read = evaluate(
        tmp_path / "run", pixels(0, 20), ("fd_cifar", "accuracy"), cifar_weights=weights
    )
    assert found.metrics == pytest.approx(read.metrics, rel=1e-5)
    for key in (
        "seed",
        "nfe",
        "solver",
        "classes",
        "model_sha256",
        "process",
        "grid",
        "noise",
        "times",
        "dtype",
    ):
        assert found.how[key] == read.how[key], key
    with pytest.raises(ValueError, match="n is a whole number"):
        Sampling(n=1)


def test_compiled_batches_are_of_one_size_and_the_images_the_same(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each size would be compiled anew, so the last batch is filled up with images that were
    there before.
    """
    sizes: list[int] = []

    def counted(*given: Any, **named: Any) -> Any:
        sizes.append(named["n"])
        return solve(*given, **named)

    monkeypatch.setattr("sdeflow.evaluation.sampled.solve", counted)
    target = GaussianMixture([1.0], torch.zeros(1, 3, 8, 8), std=0.4, process=VP())
    results = []
    for how in ({}, {"compile": True}, {"compile": True, "batch_size": 50}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CompileWarning)
            sampling = Sampling(**{"n": 10, "nfe": 3, "batch_size": 4, **how})  # type: ignore[arg-type]
            results.append(
                evaluate(
                    target, pixels(0, 20), ("fd_cifar",), sampling=sampling, cifar_weights=weights
                )
            )
    assert sizes == [4, 4, 2, 4, 4, 4, 10]
    assert len({result.samples["fd_cifar"]["images_sha256"] for result in results}) == 1
    assert [result.n for result in results] == [10, 10, 10]
    assert results[0].how["compiled"] == "no"
    assert results[1].how["compiled"].startswith("no: a CUDA graph needs")
    assert (results[1].how["dtype"], results[1].how["network_compiled"]) == ("float32", False)


def test_a_compiled_network_is_told(model: Path) -> None:
    for compile in (False, True):
        denoiser = sdeflow.load(model, dtype=torch.bfloat16, compile=compile)
        how = samples_of(denoiser, Sampling(n=4), Rank()).how
        assert (how["network_compiled"], how["dtype"]) == (compile, "bfloat16")


def test_what_cannot_be_drawn_is_told_before_the_reference_is_measured(
    model: Path, weights: Path
) -> None:
    def unread() -> Any:
        pytest.fail("the reference was read")
        yield

    for how, said in (({"solver": "hen"}, "did you mean 'heun'"), ({"solver": "heun", "nfe": 4}, "3 and 5"),
                      ({"classes": ["bea"]}, "did you mean 'bee'")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            evaluate(
                sdeflow.load(model), unread(), sampling=Sampling(n=4, **how), cifar_weights=weights
            )  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="say it once"):
        evaluate(sdeflow.load(model), unread(), sampling=Sampling(n=4), n=5, cifar_weights=weights)


# --------------------------------------------------------------------------------- the command line


def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(["evaluate", *map(str, arguments)])
        except SystemExit as end:
            status = int(end.code or 0)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def test_the_command_writes_a_result_beside_the_images(weights: Path, tmp_path: Path) -> None:
    images = folder(tmp_path / "images", pixels(30, 20))
    pngs(tmp_path / "real", pixels(31, 25))
    options = (
        "--reference",
        "real",
        "--statistics",
        "stats",
        "--cifar-weights",
        weights,
        "--device",
        "cpu",
    )
    done = run(images, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "FD-CIFAR" in done.stdout
    told = json.loads((images / "evaluation.json").read_text())
    assert told["metrics"].keys() == {"fd_cifar", "precision", "recall"}
    done = run(
        images,
        *options,
        "--metrics",
        "fd_cifar",
        "--n",
        "10",
        "--out",
        "other.json",
        "--quiet",
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert json.loads((tmp_path / "other.json").read_text())["n"] == 10
    stored = tmp_path / "stats" / "cifar10_features.safetensors"
    done = run(
        "--compare", stored, "real", "--cifar-weights", weights, "--out", "c.json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "c.json").read_text())["metrics"]["fd_cifar"] < 1e-9


def test_the_command_draws_from_a_model(model: Path, weights: Path, tmp_path: Path) -> None:
    pngs(tmp_path / "real", pixels(31, 25))
    done = run(
        model, "--reference", "real", "--n", "6", "--nfe", "4", "--classes", "ant,2", "--seed", "9", "--metrics",
        "fd_cifar,accuracy", "--cifar-weights", weights, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "evaluation.json").read_text())
    assert (told["n"], told["nfe"], told["seed"], told["classes"]) == (6, 4, 9, [0, 2])


def test_half_and_compile_are_in_the_result(model: Path, weights: Path, tmp_path: Path) -> None:
    pngs(tmp_path / "real", pixels(31, 25))
    options = (
        "--reference",
        "real",
        "-n",
        "6",
        "--nfe",
        "4",
        "--cifar-weights",
        weights,
        "--device",
        "cpu",
    )
    plain, other = (
        run(model, *options, *more, cwd=tmp_path)
        for more in (("--out", "a.json"), ("--out", "b.json", "--half", "--compile"))
    )
    assert (plain.returncode, other.returncode) == (0, 0), other.stderr
    assert "compiled" not in plain.stdout
    assert (
        "compiled   no: a CUDA graph needs a state on a CUDA device" in other.stdout
    )  # said once, and no warning
    assert "Warning" not in other.stderr
    a, b = (json.loads((tmp_path / name).read_text())["how"] for name in ("a.json", "b.json"))
    assert (a["dtype"], a["compiled"], a["network_compiled"]) == ("float32", "no", False)
    assert (b["dtype"], b["network_compiled"]) == ("bfloat16", False)
    assert b["compiled"].startswith("no: a CUDA graph needs")
    assert (a["model"], a["batch_size"]) == (str(model), 256)
    assert {key for key in a if a[key] != b[key]} == {"dtype", "compiled", "model_sha256"}


def test_numbers_that_are_not_there_are_told(weights: Path, tmp_path: Path) -> None:
    folder(tmp_path / "images", pixels(30, 20))
    pngs(tmp_path / "real", pixels(31, 25))
    options = ("--reference", "real", "--cifar-weights", weights, "--device", "cpu")
    done = run("images", *options, "--n", "30", "--reference-n", "40", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "samples: the first 30 were asked for, and these are 20" in done.stdout
    assert "reference: the first 40 were asked for, and these are 25" in done.stdout
    assert (
        "precision and recall depend on how many samples (20) and reference images (25)"
        in done.stdout
    )
    done = run("images", *options, "--n", "3", cwd=tmp_path)
    assert done.returncode == 2
    assert "there are only 3 samples" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ((), 2, "name the images"),
        (
            ("images", "--reference", "images", "--half"),
            2,
            "--half: how samples are made is for a model",
        ),
        (
            ("--compare", "a", "b", "--reference", "c", "--nfe", "9"),
            2,
            "--reference, --nfe: --compare takes two sets",
        ),
        (("cifar1", "--reference", "images"), 2, "nor a model: those are cifar10"),
        (("none.safetensors", "--reference", "images"), 1, "no checkpoint"),
        (("images", "--compare", "a", "b"), 2, "not both"),
        (("images", "--metrics", "fd"), 2, "unknown metric"),
        (("images",), 2, "a reference is needed"),
        (("images", "--reference", "none.safetensors"), 1, "there are no statistics"),
        (
            ("images", "--reference", "images", "--nfe", "9"),
            2,
            "--nfe: how samples are made is for a model",
        ),
        (
            ("nowhere", "--reference", "images"),
            2,
            "neither a folder or file of images nor a model",
        ),
        (("images", "--reference", "images", "--out", "."), 1, "it is a folder"),
    ],
)
def test_what_goes_wrong_is_told_in_a_line(
    weights: Path, tmp_path: Path, arguments: tuple[str, ...], status: int, said: str
) -> None:
    pngs(tmp_path / "images", pixels(30, 6))
    done = run(*arguments, "--cifar-weights", weights, cwd=tmp_path)
    assert (done.returncode, said in done.stderr) == (status, True), done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


@pytest.mark.cuda
def test_a_gpu_measures_what_a_cpu_does(model: Path, tmp_path: Path) -> None:
    save_cifar_net(tmp_path / "net", CifarNet())
    run, real, names = (
        folder(tmp_path / "run", pixels(50, 600, 32)),
        pixels(51, 700, 32),
        ("fd_cifar", "precision", "recall", "accuracy"),
    )
    cpu, gpu = (
        evaluate(run, real, names, cifar_weights=tmp_path / "net", device=device)
        for device in ("cpu", "cuda")
    )
    assert gpu.metrics == pytest.approx(cpu.metrics, rel=1e-3)
    assert gpu.samples["fd_cifar"]["images_sha256"] == cpu.samples["fd_cifar"]["images_sha256"]
    from_model = evaluate(
        sdeflow.load(model, "cuda"),
        real,
        ("fd_cifar",),
        sampling=Sampling(n=8, nfe=3),
        cifar_weights=tmp_path / "net",
    )
    assert from_model.n == 8


@pytest.mark.cuda
def test_on_a_gpu_a_model_is_compiled_and_scores_the_same(
    model: Path, weights: Path, tmp_path: Path
) -> None:
    pngs(tmp_path / "real", pixels(31, 60))
    options = (
        "--reference",
        "real",
        "-n",
        "20",
        "--nfe",
        "5",
        "--cifar-weights",
        weights,
        "--batch-size",
        "8",
    )
    for name, more in (("a", ()), ("b", ("--compile",)), ("c", ("--compile", "--half"))):
        done = run(
            model, *options, *more, "--out", f"{name}.json", "--device", "cuda", cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
    a, b, c = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "abc")
    assert [told["how"]["compiled"] for told in (a, b, c)] == ["no", "yes", "yes"]
    assert [told["how"]["network_compiled"] for told in (a, b, c)] == [False, True, True]
    assert [told["how"]["dtype"] for told in (a, b, c)] == ["float32", "float32", "bfloat16"]
    assert b["metrics"]["fd_cifar"] == pytest.approx(a["metrics"]["fd_cifar"], rel=1e-2)
    assert c["metrics"]["fd_cifar"] == pytest.approx(a["metrics"]["fd_cifar"], rel=0.1)


@pytest.mark.slow
def test_two_processes_draw_as_one_does(model: Path, weights: Path, tmp_path: Path) -> None:
    pngs(tmp_path / "real", pixels(33, 41))
    options = [
        "--reference",
        "real",
        "-n",
        "23",
        "--nfe",
        "3",
        "--cifar-weights",
        str(weights),
        "--device",
        "cpu",
        "--compile",
    ]
    alone = run(model, *options, "--out", "one.json", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "sdeflow",
    ]
    done = subprocess.run(
        [*torchrun, "evaluate", str(model), *options, "--batch-size", "4", "--out", "two.json"],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert two["n"] == one["n"] == 23
    assert two["metrics"]["fd_cifar"] == pytest.approx(one["metrics"]["fd_cifar"], rel=1e-3)
    assert {key for key in one["how"] if one["how"][key] != two["how"][key]} == {"batch_size"}
    assert done.stdout.count("compiled") == 1


@pytest.mark.slow
def test_two_processes_measure_as_one_does(weights: Path, tmp_path: Path) -> None:
    images = folder(tmp_path / "images", pixels(32, 50))
    pngs(tmp_path / "real", pixels(33, 41))
    options = [
        "--reference",
        "real",
        "--metrics",
        "fd_cifar,precision,recall,accuracy",
        "--cifar-weights",
        str(weights),
    ]
    alone = run(images, *options, "--out", "one.json", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "sdeflow",
    ]
    done = subprocess.run(
        [*torchrun, "evaluate", str(images), *options, "--statistics", "stats", "--out", "two.json", "--device", "cpu"],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-6)
    assert two["n"] == one["n"] == 50
    assert two["machine"].startswith("2 x")
    for side in ("samples", "reference"):
        assert two[side]["fd_cifar"]["shape"] == [3, 8, 8]
        assert two[side]["fd_cifar"]["images_sha256"] == one[side]["fd_cifar"]["images_sha256"]
    assert done.stdout.count("FD-CIFAR") == 1
    (images / "shard-00006.npz").write_bytes(
        b"torn"
    )  # of the second process: the first does not wait for it
    done = subprocess.run(
        [*torchrun, "evaluate", str(images), *options, "--out", "three.json", "--device", "cpu"],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=200,
    )  # fmt: skip
    assert done.returncode != 0
    assert "shard 6" in done.stderr
    assert not (tmp_path / "three.json").exists()


# ------------------------------------------------------------------ training of the feature network


@pytest.fixture(scope="module")
def trainer(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("quality.train_features")


def labelled(path: Path, n: int, seed: int) -> Path:
    """Images whose class is their colour."""
    generator = np.random.default_rng(seed)
    for i in range(n):
        image = generator.integers(0, 120, (8, 8, 3), dtype=np.uint8)
        image[..., i % 3] += 100
        (path / NAMES[i % 3]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path / NAMES[i % 3] / f"{i}.png")
    return path


def test_the_feature_network_is_trained_and_stored_in_time(
    trainer: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        "--data", str(labelled(tmp_path / "train", 96, 0)), "--test", str(labelled(tmp_path / "test", 30, 1)), "--device", "cpu",
        "--out", str(tmp_path / "net.safetensors"), "--widths", "8", "16", "--blocks", "1", "1", "--batch-size", "32",
        "--lr", "1.0", "--cutout", "2", "--ema", "0.8", "--seconds", "60", "--epochs", "5", "--note", "colours",
    ]  # fmt: skip
    facts = trainer.train(trainer.arguments(given))
    assert facts["stored_accuracy"] > 0.9
    stored = CifarFeatures(tmp_path / "net.safetensors")
    assert stored.class_names == NAMES
    assert stored.card["epochs"] == 5
    assert {"accuracy", "date", "machine", "command", "torch", "note"} <= set(stored.card)
    assert str(tmp_path) not in json.dumps(stored.card)
    assert "stored accuracy: " in (tmp_path / "net.md").read_text()
    assert capsys.readouterr().out.count("epoch ") == 5
    result = evaluate(
        tmp_path / "test",
        tmp_path / "train",
        ("fd_cifar", "accuracy"),
        cifar_weights=tmp_path / "net.safetensors",
    )
    assert result.metrics["accuracy"] > 0.9


def test_the_time_limit_ends_a_training_that_would_be_longer(
    trainer: ModuleType, tmp_path: Path
) -> None:
    import time

    given = [
        "--data", str(labelled(tmp_path / "train", 96, 0)), "--test", str(labelled(tmp_path / "test", 30, 1)), "--device", "cpu",
        "--out", str(tmp_path / "net.safetensors"), "--widths", "4", "--blocks", "1", "--batch-size", "32", "--seconds", "3",
        "--epochs", "100000",
    ]  # fmt: skip
    began = time.monotonic()
    facts = trainer.train(trainer.arguments(given))
    assert time.monotonic() - began < 3
    assert 0 < facts["epochs"] < 100_000
    assert CifarFeatures(tmp_path / "net.safetensors").card["epochs"] == facts["epochs"]


def test_the_cycle_rises_and_ends_near_zero(trainer: ModuleType) -> None:
    rates = [trainer.one_cycle(k / 100, 1.0) for k in range(101)]
    assert max(rates) == pytest.approx(1.0, abs=1e-3)
    assert rates.index(max(rates)) == 20
    assert rates[0] == pytest.approx(0.1)
    assert rates[-1] <= 1e-3


def test_crops_are_shifted_mirrored_and_erased_images(trainer: ModuleType) -> None:
    x = pixels(40, 6)
    crops = trainer.Crops(x, 3, seed=0)
    got, erased = crops(torch.arange(6).repeat(30))
    assert (got.shape, erased.shape) == ((180, 3, 8, 8), (180, 1, 8, 8))
    assert got.is_contiguous(memory_format=torch.channels_last)
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    for i in range(180):
        windows = (
            padded[i % 6]
            .unfold(1, 8, 1)
            .unfold(2, 8, 1)
            .permute(1, 2, 0, 3, 4)
            .reshape(-1, 3, 8, 8)
        )
        assert bool(
            (windows == got[i]).flatten(1).all(1).any()
            | (windows.flip(3) == got[i]).flatten(1).all(1).any()
        )
    assert 0 < float(erased.float().mean()) <= 9 / 64
    assert int(erased.sum((1, 2, 3)).max()) == 9
    assert math.isclose(float(erased.float().sum((2, 3)).max()), 9)
    assert trainer.Crops(x, 0, seed=0)(torch.arange(2))[1] is None
