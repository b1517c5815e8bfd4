"""Many pictures: the same whatever the batch, the number of processes and the kills between; shards
whole or absent.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_unet import unet
from torch import Tensor

import sdeflow.generate.api as generating
from sdeflow._utils import files as _files
from sdeflow.cli import main
from sdeflow.denoisers import Prediction
from sdeflow.denoisers.fingerprint import model_sha256
from sdeflow.errors import MissingExtraError, NonFiniteError, SdeflowError, UnknownNameError
from sdeflow.generate.api import Labels, generate
from sdeflow.images import datasets as data
from sdeflow.images import shards
from sdeflow.images.datasets import read_images
from sdeflow.images.shards import RUN, Shards, read_settings
from sdeflow.models.checkpoint import load, save_model
from sdeflow.process import EDM, VP
from sdeflow.sampling.api import sample
from sdeflow.targets import GaussianMixture

FORMATS = shards.FORMATS
NAMES = ("ant", "bee", "cat")


def target() -> GaussianMixture:
    """An exact model of pictures, dark or light, whose rows do not know of each other."""
    means = torch.stack([torch.full((3, 4, 4), -0.5), torch.linspace(-0.2, 0.7, 48).view(3, 4, 4)])
    return GaussianMixture([0.4, 0.6], means, std=0.2, process=VP())


def make(out: Path, n: int = 17, **how: Any) -> Any:
    return generate(target(), out, n=n, **{"nfe": 5, "shard_size": 5, "batch_size": 4, **how})


def files(folder: Path) -> dict[str, bytes]:
    """All of a folder's files, their content, what is hidden too."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def everything(folder: Path, batch: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    indices, images, labels = zip(*read_images(folder, batch=batch), strict=True)
    return torch.cat(indices), torch.cat(images), torch.cat(labels)


def damage(path: Path, how: str) -> None:
    """Cut a file's end off, or change a byte within the pictures (which are in a parquet file's
    first part).
    """
    content = path.read_bytes()
    half = len(content) // (8 if path.suffix == ".parquet" else 2)
    flipped = content[:half] + bytes([content[half] ^ 255]) + content[half + 1 :]
    path.write_bytes({"cut": content[:half], "empty": b"", "flip": flipped}[how])


def first_file(folder: Path, kind: str, k: int) -> Path:
    path = Shards(folder, kind, 17, 5, (4, 4, 3)).path(k)  # type: ignore[arg-type]
    return sorted(path.iterdir())[1] if path.is_dir() else path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random network of three classes, quick to run."""
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_model(path, unet(), class_names=NAMES)
    return path


# --------------------------------------------------------------------------- which picture is which


@pytest.mark.parametrize("kind", FORMATS)
def test_every_picture_is_that_of_its_seed(tmp_path: Path, kind: str) -> None:
    made = make(tmp_path / "out", format=kind, seed=100)
    assert (made.made, made.there, made.n, made.finished) == (17, 0, 17, True)
    assert made.network_calls == 5 * 7  # a call a batch: 4 + 1, three times, and 2
    indices, images, labels = everything(tmp_path / "out", batch=3)
    assert indices.tolist() == list(range(17))
    assert labels.tolist() == [-1] * 17
    assert (images.dtype, images.shape) == (torch.uint8, (17, 4, 4, 3))
    alone = sample(target(), nfe=5, n=1, seeds=[100 + 13])
    expected = ((alone[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    assert torch.equal(images[13], expected)
    assert len(images.unique(dim=0)) == 17


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("kind", FORMATS)
def test_an_exact_model_makes_the_same_files_in_any_batch(
    tmp_path: Path, kind: str, batch: int
) -> None:
    make(tmp_path / "a", format=kind)
    make(tmp_path / "b", format=kind, batch_size=batch)
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize("solver", ["ddpm", "rk45", "sa_solver"])
def test_stochastic_and_adaptive_solvers_too(tmp_path: Path, solver: str) -> None:
    budget = {} if solver == "rk45" else {"nfe": 6}
    for name, batch, shard in (("a", 4, 5), ("b", 3, 4)):
        generate(
            target(),
            tmp_path / name,
            n=9,
            solver=solver,
            batch_size=batch,
            shard_size=shard,
            **budget,
        )
    assert torch.equal(everything(tmp_path / "a")[1], everything(tmp_path / "b")[1])
    assert read_settings(tmp_path / "a")["nfe"] == budget.get("nfe")


@pytest.mark.parametrize("batch", [1, 4, 7])
def test_a_network_makes_them_within_a_level(tmp_path: Path, tiny: Path, batch: int) -> None:
    whole = generate(
        load(tiny), tmp_path / "whole", n=14, nfe=5, format="npz", shard_size=14, batch_size=14
    )
    generate(
        load(tiny), tmp_path / "parts", n=14, nfe=5, format="npz", shard_size=7, batch_size=batch
    )
    assert whole.finished
    (_, a, labels), (_, b, again) = everything(tmp_path / "whole"), everything(tmp_path / "parts")
    assert (a.int() - b.int()).abs().max() <= 1
    assert a.float().std() > 10
    assert torch.equal(labels, torch.arange(14) % 3)
    assert torch.equal(labels, again)


@pytest.mark.filterwarnings("ignore::sdeflow.sampling.cuda_graphs.CompileWarning")
@pytest.mark.parametrize(
    "how", [{"batch_size": "auto"}, {"compile": True}, {"compile": True, "batch_size": 2}]
)
def test_what_fits_and_graphs_make_the_same_files(tmp_path: Path, how: dict[str, Any]) -> None:
    make(tmp_path / "a")
    made = make(tmp_path / "b", **how)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert ("CUDA device" in str(made)) == (
        "compile" in how
    )  # there is none here, and the summary says so


@pytest.mark.filterwarnings("ignore::sdeflow.sampling.cuda_graphs.CompileWarning")
def test_a_last_smaller_shard_is_compiled_as_the_others_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    run = generating.run

    def counted(request: Any) -> Any:
        sizes.append(request.n)
        return run(request)

    make(tmp_path / "a", n=17, shard_size=6, batch_size=3)
    monkeypatch.setattr(generating, "run", counted)
    make(tmp_path / "b", n=13, shard_size=6, batch_size=3, compile=True)
    make(tmp_path / "b", n=17, shard_size=6, batch_size=3, compile=True)
    assert sizes == [1, 6, 6, 3, 1, 5]  # a sentence first; the last shard of 13 holds one picture
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_classes_take_turns_by_index(tmp_path: Path, tiny: Path) -> None:
    model = load(tiny)
    assert Labels.of(model, "all").numbers(range(4, 9)).tolist() == [1, 2, 0, 1, 2]
    assert Labels.of(model, ["Cat", 0]).numbers(range(3)).tolist() == [2, 0, 2]
    none = Labels.of(model, "none")
    assert none.numbers(range(2)).tolist() == [-1, -1]
    given = none.given(range(2))
    assert given is not None
    assert given.tolist() == [3, 3]
    assert Labels.of(target(), "all").given(range(3)) is None
    with pytest.raises(UnknownNameError, match="did you mean 'bee'"):
        Labels.of(model, ["bea"])
    with pytest.raises(ValueError, match="unconditional"):
        Labels.of(target(), ["cat"])
    with pytest.raises(ValueError, match="at least one"):
        Labels.of(model, [])
    generate(model, tmp_path / "a", n=3, nfe=3, classes=["cat", "ant"])
    assert everything(tmp_path / "a")[2].tolist() == [2, 0, 2]
    expected = sample(model, nfe=3, n=3, seeds=0, condition={"label": [2, 0, 2]})
    got = everything(tmp_path / "a")[1].permute(0, 3, 1, 2).float() / 127.5 - 1
    assert (got - expected.clamp(-1, 1)).abs().max() < 1.1 / 127.5


def test_grey_pictures_stay_grey(tmp_path: Path) -> None:
    grey = GaussianMixture([1.0], torch.zeros(1, 1, 4, 6), std=0.3, process=VP())
    for kind in FORMATS:
        generate(grey, tmp_path / kind, n=3, nfe=3, format=kind)
        assert everything(tmp_path / kind)[1].shape == (3, 4, 6, 1)


# ---------------------------------------------------------------------------------------- processes


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from test_generate import load, generate, make
from pathlib import Path
out, kind, batches = Path(sys.argv[2]), sys.argv[3], [int(batch) for batch in sys.argv[4].split(",")]
for batch in batches:
    where = out if len(batches) == 1 else Path(f"{out}-{batch}")
    make(where, format=kind, batch_size=batch)
    if len(sys.argv) > 5:
        network = Path(f"{where}-network")
        generate(load(sys.argv[5]), network, n=17, nfe=5, shard_size=5, format=kind, batch_size=batch)
"""


def together(ranks: int, *command: str, status: int = 0) -> str:
    done = subprocess.run(
        [*TORCHRUN, str(ranks), *command],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=100,
        check=False,
    )
    assert (done.returncode == 0) == (status == 0), done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("ranks", "batches"),
    [(2, (4,)), *(pytest.param(n, (1, 4, 7), marks=pytest.mark.slow) for n in (1, 2, 3))],
)
def test_processes_make_the_same_files_as_one(
    tmp_path: Path, tiny: Path, ranks: int, batches: tuple[int, ...]
) -> None:
    """Gloo processes and several sizes of batch: an exact model bit for bit, a network within a
    level of 255.
    """
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    make(tmp_path / "exact", format="npz", batch_size=5)
    generate(
        load(tiny), tmp_path / "network", n=17, nfe=5, shard_size=5, format="npz", batch_size=5
    )
    make(
        tmp_path / ("many-4" if len(batches) > 1 else "many"), n=6, format="npz"
    )  # some of it is there already
    together(
        ranks,
        str(script),
        str(Path(__file__).parent),
        str(tmp_path / "many"),
        "npz",
        ",".join(map(str, batches)),
        str(tiny),
    )
    _, pixels, labels = everything(tmp_path / "network")
    for batch in batches:
        many = tmp_path / (f"many-{batch}" if len(batches) > 1 else "many")
        assert files(many) == files(tmp_path / "exact")
        _, got, again = everything(Path(f"{many}-network"))
        assert (got.int() - pixels.int()).abs().max() <= 1
        assert torch.equal(again, labels)


@pytest.mark.slow
def test_the_command_makes_them_on_two_processes_and_says_so_once(
    tmp_path: Path, tiny: Path
) -> None:
    options = [
        "-n",
        "23",  # torchrun's parser takes "--n" for one of its own
        "--nfe",
        "4",
        "--model",
        str(tiny),
        "--shard-size",
        "5",
        "--device",
        "cpu",
    ]
    with pytest.raises(SystemExit):
        main(["generate", *options, "--out", str(tmp_path / "one"), "--quiet"])
    said = together(
        2,
        "-m",
        "sdeflow",
        "generate",
        *options,
        "--out",
        str(tmp_path / "two"),
        "--batch-size",
        "2",
    )
    assert said.count("23 of 23 (23 made now") == 1
    assert "generating 23: 100%" in said
    calls = int(said.split("calls")[1].split()[0])
    assert calls == 4 * (4 * 3 + 2)  # 2 + 2 + 1 of each shard of 5, and 2 + 1: over both processes
    (_, a, labels), (_, b, again) = everything(tmp_path / "one"), everything(tmp_path / "two")
    assert (a.int() - b.int()).abs().max() <= 1
    assert torch.equal(labels, again)


@pytest.mark.slow
def test_a_process_that_dies_takes_the_others_down_and_a_rerun_completes(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys\n"
        "from sdeflow.generate import shards\n"
        "write, rank = shards.Shards.write, os.environ['RANK']\n"
        "def die(self, k, *rest):\n"
        "    if rank == '1' and k == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return write(self, k, *rest)\n"
        "shards.Shards.write = die\n" + SCRIPT
    )
    began = time.monotonic()
    together(
        2, str(script), str(Path(__file__).parent), str(tmp_path / "out"), "png", "4", status=1
    )
    assert time.monotonic() - began < 60
    assert not (tmp_path / "out" / "shard-00003").exists()
    there = Shards(tmp_path / "out", "png", 17, 5, (4, 4, 3))
    assert there.is_sound(1)
    assert make(tmp_path / "out").finished
    make(tmp_path / "one")
    assert files(tmp_path / "out") == files(tmp_path / "one")


@pytest.mark.cuda
def test_on_a_gpu_batches_graphs_and_processes_make_the_same_within_a_level(
    tmp_path: Path, tiny: Path
) -> None:
    """Two processes share one GPU here: they need no NCCL."""

    def go(name: str, **how: Any) -> Tensor:
        model = load(tiny, "cuda")
        generate(model, tmp_path / name, n=23, nfe=9, shard_size=8, format="npz", **how)
        return everything(tmp_path / name)[1].int()

    whole = go("whole")
    for name, how in {
        "3": {"batch_size": 3},
        "auto": {"batch_size": "auto"},
        "graphs": {"compile": True},
    }.items():
        assert (go(name, **how) - whole).abs().max() <= 1
    options = [
        "-n",
        "23",
        "--nfe",
        "9",
        "--model",
        str(tiny),
        "--shard-size",
        "8",
        "--device",
        "cuda:0",
        "--format",
        "npz",
    ]
    together(2, "-m", "sdeflow", "generate", *options, "--out", str(tmp_path / "two"))
    assert (everything(tmp_path / "two")[1].int() - whole).abs().max() <= 1


# ------------------------------------------------------------------------------- kills and going on


@pytest.mark.parametrize("kind", FORMATS)
def test_a_run_that_is_killed_goes_on_without_gaps_or_duplicates(tmp_path: Path, kind: str) -> None:
    """SIGKILL in the middle of a process of its own, which is slowed down so that there is a
    middle.
    """
    script = tmp_path / "script.py"
    script.write_text(
        "import time\nfrom sdeflow.generate import api\nrun = api.run\n"
        "def slow(request):\n    time.sleep(0.03)\n    return run(request)\n"
        "api.run = slow\n" + SCRIPT
    )
    command = [
        sys.executable,
        str(script),
        str(Path(__file__).parent),
        str(tmp_path / "out"),
        kind,
        "1",
    ]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "out").glob("shard-*"))) < 2:
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    before = {
        name: content
        for name, content in files(tmp_path / "out").items()
        if name.startswith("shard")
    }
    (tmp_path / "out" / ".shard-00003.abc.tmp").mkdir()  # as a kill within a write leaves it
    made = make(tmp_path / "out", format=kind)
    assert 2 <= made.there // 5 <= 3, "it was to be killed in the middle"
    assert made.made == 17 - made.there
    make(tmp_path / "whole", format=kind)
    after = files(tmp_path / "out")
    assert after == files(tmp_path / "whole")
    assert before.items() <= after.items()


@pytest.mark.parametrize("how", ["cut", "empty", "flip"])
@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_torn_is_made_again_and_nothing_else(tmp_path: Path, kind: str, how: str) -> None:
    make(tmp_path / "out", format=kind)
    good = files(tmp_path / "out")
    damage(first_file(tmp_path / "out", kind, 1), how)
    with pytest.raises(SdeflowError, match=r"shard 1 of .*images 5 to 9, is damaged"):
        everything(tmp_path / "out")
    made = make(tmp_path / "out", format=kind)
    assert (made.there, made.made) == (12, 5)
    assert files(tmp_path / "out") == good


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_missing_is_told_and_made(tmp_path: Path, kind: str) -> None:
    make(tmp_path / "out", format=kind)
    good = files(tmp_path / "out")
    path = Shards(tmp_path / "out", kind, 17, 5, (4, 4, 3)).path(2)  # type: ignore[arg-type]
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(
        SdeflowError, match=r"1 of its 4 shards are missing \(number 2\); run sdeflow generate"
    ):
        read_images(tmp_path / "out")
    assert make(tmp_path / "out", format=kind).made == 5
    assert files(tmp_path / "out") == good
    again = make(tmp_path / "out", format=kind)
    assert (again.made, again.there, again.network_calls, again.finished) == (0, 17, 0, True)


@pytest.mark.parametrize("kind", FORMATS)
def test_no_changed_byte_changes_what_is_read(tmp_path: Path, kind: str) -> None:
    """Any byte of a shard: it is noticed, or it held nothing of the pictures, their labels and
    numbers.
    """
    make(tmp_path, n=2, shard_size=2, format=kind)
    place = Shards(tmp_path, kind, 2, 2, (4, 4, 3))  # type: ignore[arg-type]
    good, path = place.read(0), place.path(0)
    path = sorted(path.iterdir())[0] if path.is_dir() else path
    content, noticed = path.read_bytes(), 0
    for i in range(0, len(content), max(1, len(content) // 300)):
        path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        try:
            assert all(torch.equal(a, b) for a, b in zip(place.read(0), good, strict=True)), (
                f"byte {i}"
            )
        except SdeflowError:
            noticed += 1
    assert noticed > 100


def test_a_shard_in_another_ones_place_is_noticed(tmp_path: Path) -> None:
    for kind in FORMATS:
        make(tmp_path / kind, format=kind)
        place = Shards(tmp_path / kind, kind, 17, 5, (4, 4, 3))
        if kind == "png":
            shutil.copy(place.path(0) / "00000003.png", place.path(1) / "00000007.png")
        else:
            shutil.copy(place.path(0), place.path(1))
        assert [place.is_sound(k) for k in range(4)] == [True, False, True, True]


@pytest.mark.parametrize("kind", FORMATS)
def test_n_may_grow_but_not_shrink(tmp_path: Path, kind: str) -> None:
    make(tmp_path / "out", n=7, format=kind)
    made = make(tmp_path / "out", n=17, format=kind)
    assert (made.there, made.made) == (
        5,
        12,
    )  # the shard that was short is made again, as a full one
    make(tmp_path / "whole", format=kind)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    with pytest.raises(ValueError, match="n may grow but not shrink"):
        make(tmp_path / "out", n=7, format=kind)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"nfe": 6}, "nfe=5, .*not with nfe=6"),
        ({"solver": "heun"}, "solver=Auto.*not with solver=Heun"),
        ({"seed": 1}, "seed=0, not with seed=1"),
        ({"process": "rectified_flow"}, "process=VP.*process=RectifiedFlow"),
        ({"grid": "uniform_lam"}, "grid=auto"),
        ({"noise": "brownian"}, "noise=seeded, not with noise=brownian"),
        ({"format": "npz"}, "format=png, not with format=npz"),
        ({"shard_size": 6}, "shard_size=5, not with shard_size=6"),
    ],
)
def test_other_settings_are_refused_by_name(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    make(tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(ValueError, match=f"{said}.*another folder"):
        make(tmp_path / "out", **change)
    assert files(tmp_path / "out") == before


def test_another_model_dtype_or_version_is_refused(tmp_path: Path, tiny: Path) -> None:
    def go(denoiser: Any) -> None:
        generate(
            denoiser,
            tmp_path / "out",
            n=2,
            nfe=3,
            classes="none" if hasattr(denoiser, "card") else "all",
            shape=(3, 8, 8),
        )

    model = load(tiny)
    go(model)
    go(model)  # used, and still the same
    go(load(tiny))
    changed = load(tiny)
    next(changed.network.parameters()).data[0] += 1e-3  # type: ignore[attr-defined]
    for other, said in (
        (changed, "model_sha256"),
        (load(tiny, dtype=torch.bfloat16), "dtype=float32, not with.*dtype=bfloat16"),
    ):
        with pytest.raises(ValueError, match=said):
            go(other)
    settings = read_settings(tmp_path / "out")
    (tmp_path / "out" / RUN).write_text(json.dumps({**settings, "version": "0.0.1"}))
    with pytest.raises(ValueError, match=r"version=0\.0\.1"):
        go(model)


def test_models_are_told_apart_by_all_that_they_hold() -> None:
    class Scaled(torch.nn.Linear):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(x)

    def wrapped(scale: float) -> Prediction:
        network = Scaled(2, 2)
        torch.nn.init.constant_(network.weight, scale)
        torch.nn.init.zeros_(network.bias)
        return Prediction(network, "eps", VP(), shape=(3, 4, 4))

    same = [model_sha256(wrapped(1.0)), model_sha256(wrapped(1.0))]
    other = [
        model_sha256(wrapped(2.0)),
        model_sha256(wrapped(1.0).under(EDM())),
        model_sha256(target()),
    ]
    assert len(set(same)) == 1
    assert len({*same, *other}) == 4
    model = target()
    before = model_sha256(model)
    sample(model, nfe=3, n=2, seeds=0)
    assert model_sha256(model) == before


def test_it_stops_when_asked_and_goes_on(tmp_path: Path) -> None:
    made = make(tmp_path / "out", max_seconds=0.0)
    assert (made.finished, made.made, made.reason) == (False, 0, "time limit")
    assert "the same command continues" in str(made)
    assert make(tmp_path / "out").finished


# ---------------------------------------------------------------------------------- what goes wrong


class Broken(Prediction):
    """NaN in the rows whose start is that of certain seeds."""

    def __init__(self, seeds: list[int]) -> None:
        starts = torch.stack(
            [torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(s)) for s in seeds]
        )
        level = VP().level(1.0).sigma

        def network(x: Tensor, t: Tensor) -> Tensor:
            bad = ((x[:, None] - level * starts).abs().amax((2, 3, 4)) < 1e-4).any(1)
            return torch.where(bad[:, None, None, None], torch.nan, 0.1 * x)

        super().__init__(network, "x0", VP(), shape=(3, 4, 4))


@pytest.mark.parametrize("batch", [5, "auto"])
def test_nan_names_the_pictures_and_writes_nothing_of_the_shard(tmp_path: Path, batch: Any) -> None:
    with pytest.raises(
        NonFiniteError,
        match=(
            r"images 7, 8 \(seed 20 \+ number\).*nothing was written of shard 1.*first at call 1"
        ),
    ):
        generate(
            Broken([27, 28]), tmp_path / "out", n=17, nfe=5, shard_size=5, seed=20, batch_size=batch
        )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [RUN, "shard-00000"]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_full_disk_is_told_and_loses_nothing(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **_: Any) -> Any:
        if ".shard-00002" in str(arguments[0]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **_)

    if kind == "png":
        real: Callable[..., Any] = Path.write_bytes
        monkeypatch.setattr(Path, "write_bytes", full)
    else:
        real = os.replace
        monkeypatch.setattr(_files.os, "replace", full)
    with pytest.raises(SdeflowError, match=r"shard-00002.*No space left.*finished stay"):
        make(tmp_path / "out", format=kind)
    monkeypatch.undo()
    assert sorted(p.name[:11] for p in (tmp_path / "out").iterdir()) == [
        RUN,
        "shard-00000",
        "shard-00001",
    ]
    assert make(tmp_path / "out", format=kind).there == 10


def test_places_where_no_pictures_can_go_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SdeflowError, match="cannot write the run file"):
        make(tmp_path / "file")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"holds other things already \(mine.png\).*new folder"):
        make(tmp_path / "photos")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / RUN).write_text('{"n": 5')
    with pytest.raises(SdeflowError, match="damaged or missing"):
        make(tmp_path / "torn")
    assert list((tmp_path / "photos").iterdir()) == [tmp_path / "photos" / "mine.png"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n": 0}, "n is a whole number"),
        ({"shard_size": 0}, "shard_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"format": "jpg"}, "png, npz, parquet"),
        ({"nfe": 4, "solver": "heun"}, "3 and 5"),
        ({"solver": "hen"}, "did you mean"),
        ({"device": "nothing"}, "no device"),
        ({"classes": ["cat"]}, "unconditional"),
        ({"noise": "pink"}, "brownian"),
        ({"seed": 2**64 - 5}, "seed"),
        ({"grid": [1.0, 0.5, 0.6]}, "one way"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_written(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        make(tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_models_of_no_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shape \(C, H, W\)"):
        generate(
            GaussianMixture([1.0], torch.zeros(1, 2), std=0.3, process=VP()), tmp_path / "out", n=1
        )
    with pytest.raises(ValueError, match="pass shape="):
        generate(lambda x, t: -x, tmp_path / "out", n=1, process="vp")


def test_parquet_without_its_package_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'sdeflow\[train\]'"):
        make(tmp_path / "out", format="parquet")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--solver", "hen"], 2, "did you mean 'heun'"),
        (["--classes", "bea"], 2, "did you mean 'bee'"),
        (["--nfe", "5"], 2, "nfe=3, not with nfe=5"),
        (["--n", "1"], 2, "n may grow but not shrink"),
        (["--format", "jpg"], 2, "jpg"),
        (["--rtol", "1e-3"], 2, "adaptive"),
        (["--model", "nowhere.safetensors"], 1, "no checkpoint"),
        (["--out", "file/deeper"], 1, "run file"),
    ],
)
def test_the_command_teaches_in_a_line(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str],
    status: int, said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    whole = ["generate", "--model", str(tiny), "--n", "2", "--out", "out"]
    with pytest.raises(SystemExit) as end:
        main([*whole, "--nfe", "3"])
    assert end.value.code in (0, None)
    told = capsys.readouterr()
    assert "2 of 2 (2 made now, 0 were there)" in told.out
    assert "generating 2: 100%" in told.err
    before = files(tmp_path)
    with pytest.raises(SystemExit) as end:
        main([*whole, *(["--nfe", "3"] if "--nfe" not in arguments else []), *arguments])
    told = capsys.readouterr()
    assert end.value.code == status, told.err
    assert said in told.err
    assert "Traceback" not in told.err
    assert files(tmp_path) == before


def test_the_command_runs_in_half_precision_and_says_why_it_is_not_compiled(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--model",
        str(tiny),
        "--n",
        "2",
        "--nfe",
        "3",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "out"),
    ]
    with pytest.raises(SystemExit) as end:
        main(["generate", *options, "--half", "--compile"])
    assert end.value.code in (0, None)
    told = capsys.readouterr()
    assert (
        "compiled  no: a CUDA graph needs a state on a CUDA device" in told.out
    )  # said once, and no warning
    assert "Warning" not in told.err
    assert read_settings(tmp_path / "out")["dtype"] == "bfloat16"


# ---------------------------------------------------------------------------------- reading others'


def test_folders_and_files_of_others_are_read(tmp_path: Path) -> None:
    pixels = torch.randint(
        0, 256, (5, 6, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    (tmp_path / "pictures" / "deeper").mkdir(parents=True)
    for i, picture in enumerate(pixels.numpy()):
        Image.fromarray(picture).save(
            tmp_path / "pictures" / ("deeper" if i == 4 else "") / f"z{i}.png"
        )
    Image.fromarray(pixels[0].numpy()).convert("L").save(tmp_path / "pictures" / "a.jpg")
    indices, images, labels = everything(tmp_path / "pictures", batch=4)
    assert (indices.tolist(), labels.tolist()) == (list(range(6)), [-1] * 6)
    assert torch.equal(images[2:], pixels[[0, 1, 2, 3]])  # a.jpg, deeper/z4.png, z0.png ...
    assert torch.equal(images[1], pixels[4])
    np.savez(tmp_path / "a.npz", pixels.numpy(), np.arange(5))
    assert [len(part[0]) for part in read_images(tmp_path / "a.npz", batch=2)] == [2, 2, 1]
    _, images, labels = everything(tmp_path / "a.npz")
    assert torch.equal(images, pixels)
    assert labels.tolist() == list(range(5))


def test_our_parquet_is_a_data_set_to_train_on_and_any_such_is_read(
    tmp_path: Path, tiny: Path
) -> None:
    generate(load(tiny), tmp_path / "out", n=7, nfe=3, shard_size=4, format="parquet")
    _, images, labels = everything(tmp_path / "out")
    read = data.load_images(tmp_path / "out", progress=False)
    assert read.class_names == NAMES
    assert read.labels is not None
    assert read.labels.tolist() == labels.tolist()
    assert torch.equal(read.get(torch.arange(7)).permute(0, 2, 3, 1), images)
    shutil.copytree(tmp_path / "out", tmp_path / "bare")
    (tmp_path / "bare" / RUN).unlink()
    indices, again, labels = everything(tmp_path / "bare", batch=3)
    assert indices.tolist() == list(range(7))
    assert torch.equal(again, images)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_parquet(
        str(tmp_path / "out" / "shard-00000.parquet"), cache_dir=str(tmp_path / "cache")
    )
    assert np.array_equal(np.array(table[2]["img"]), images[2].numpy())
    assert table.features["label"].names == list(NAMES)


def test_unreadable_pictures_of_others_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not there"):
        read_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        read_images(tmp_path / "empty")
    with pytest.raises(ValueError, match="batch"):
        read_images(tmp_path, batch=0)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    Image.new("RGB", (5, 4)).save(tmp_path / "b.png")
    with pytest.raises(SdeflowError, match="number 0 is 4 x 4 pixels, number 1 is 5 x 4"):
        everything(tmp_path)
    damage(tmp_path / "b.png", "cut")
    with pytest.raises(SdeflowError, match=r"b\.png cannot be read as an image"):
        everything(tmp_path)
    (tmp_path / "c.npz").write_bytes(b"no archive")
    with pytest.raises(SdeflowError, match=r"c\.npz cannot be read"):
        everything(tmp_path / "c.npz")
    (tmp_path / "d.parquet").write_bytes(b"no table")
    with pytest.raises(SdeflowError, match=r"d\.parquet cannot be read"):
        everything(tmp_path / "d.parquet")
