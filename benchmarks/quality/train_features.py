"""Train the feature network of FD-CIFAR: a wide residual network on CIFAR-10, in about a minute and
a half of one GPU.

    python -m benchmarks.quality.train_features --data train.parquet --test test.parquet --seconds 120

Stochastic gradient descent with Nesterov's momentum and one cycle of the learning rate, label
smoothing, random crops, flips, cutout and CutMix, bf16; what is kept is an exponential average. The
cycle runs over `--epochs` or over `--seconds`, whichever ends first, so that a slower machine
trains less and still ends with a small learning rate; the file is written before `--seconds`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.report import provenance
from sdeflow.evaluation.features import (
    CIFAR_WEIGHTS,
    CifarFeatures,
    CifarNet,
    CifarNetConfig,
    file_sha256,
    save_cifar_net,
)
from sdeflow.images.datasets import Decoded, load_images
from sdeflow.training.api import card_markdown

RESERVE = 0.06
"""The share of `--seconds` that is kept for writing the file, a second at least."""


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", required=True, help="training images: parquet, folder or hub name"
    )
    parser.add_argument("--test", help="test images (default: the split test of --data)")
    parser.add_argument("--note", default="", help="what should be known of the data, for the file")
    parser.add_argument("--out", type=Path, default=CIFAR_WEIGHTS)
    parser.add_argument(
        "--seconds",
        type=float,
        default=120.0,
        help="the file is written before this, from the start of the command",
    )
    parser.add_argument("--epochs", type=int, default=45)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--lr", type=float, default=0.4, help="the peak, for a batch of 512")
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument(
        "--cutout", type=int, default=12, help="side of the erased square in pixels; 0 for none"
    )
    parser.add_argument(
        "--cutmix",
        type=float,
        default=0.5,
        help="share of batches whose images get a part of another",
    )
    parser.add_argument("--ema", type=float, default=0.995, help="decay of the average, a step")
    parser.add_argument("--widths", type=int, nargs="+", default=list(CifarNetConfig.widths))
    parser.add_argument("--blocks", type=int, nargs="+", default=list(CifarNetConfig.blocks))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile: some 40 seconds more to start, faster after",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="bfloat16 (default: on a GPU; CPUs with AMX gain)",
    )
    options = parser.parse_args(given)
    if options.bf16 is None:
        options.bf16 = torch.device(options.device).type == "cuda"
    return options


def one_cycle(progress: float, peak: float, rise: float = 0.2) -> float:
    """The learning rate when `progress` (0 to 1) is done: up in a straight line, down along a
    cosine to nearly zero.
    """
    if progress < rise:
        return peak * (0.1 + 0.9 * progress / rise)
    return peak * max(
        1e-3, 0.5 + 0.5 * math.cos(math.pi * min(1.0, (progress - rise) / (1.0 - rise)))
    )


class Crops:
    """Random crops, flips and cutout on the device, one gather a batch: pixels uint8 [N, 3, S, S],
    padded by 4.
    """

    def __init__(self, pixels: Tensor, cutout: int, seed: int) -> None:
        self.size, self.cutout = pixels.shape[-1], cutout
        self.padded = functional.pad(pixels, (4, 4, 4, 4)).permute(0, 2, 3, 1).contiguous()
        self.generator = torch.Generator(pixels.device).manual_seed(seed)

    def _draw(self, high: int, count: int) -> Tensor:
        return torch.randint(high, (count, 1), device=self.padded.device, generator=self.generator)

    def __call__(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """The images [B, 3, S, S] (channels last), and where they are erased [B, 1, S, S]."""
        count, places = len(indices), torch.arange(self.size, device=indices.device)
        rows, columns = places + self._draw(9, count), places + self._draw(9, count)
        columns = torch.where(self._draw(2, count) == 1, columns.flip(1), columns)
        pixels = self.padded[indices[:, None, None], rows[:, :, None], columns[:, None, :]].permute(
            0, 3, 1, 2
        )
        if not self.cutout:
            return pixels, None
        inside = [(places - self._draw(self.size, count) + self.cutout // 2) for _ in range(2)]
        hit = [(place >= 0) & (place < self.cutout) for place in inside]
        return pixels, (hit[0][:, :, None] & hit[1][:, None, :]).unsqueeze(1)


def cut_mixed(
    x: Tensor, labels: Tensor, share: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, float]:
    """In a `share` of calls, each image with a box of its neighbour's; the neighbours' labels and
    how much of them there is.
    """
    if float(torch.rand((), generator=generator)) >= share:
        return x, labels, 0.0
    size = x.shape[-1]
    kept, row, column = torch.rand(
        3, generator=generator
    ).tolist()  # on the host: nothing waits for the device
    side = round(size * math.sqrt(1.0 - kept))
    top, left = (
        max(0, min(size - side, round(place * size - side / 2))) for place in (row, column)
    )
    x = x.clone()
    x[:, :, top : top + side, left : left + side] = x.roll(1, 0)[
        :, :, top : top + side, left : left + side
    ]
    return x, labels.roll(1), (side / size) ** 2


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how it is stored; `None` stands for the network of FD-CIFAR.

    A network has `normalise(pixels)` and, called with that, gives logits. `save` takes a path, the
    network, `tensors`, `class_names` and `card`; `load` a path and a device.
    """

    build: Callable[[Decoded], Any] | None = None
    save: Callable[..., None] = save_cifar_net
    load: Callable[[Path, torch.device], Any] = lambda path, device: (
        CifarFeatures(path, device).network
    )


class Average:
    """An exponential average of all of a network's floating-point state, normalisation statistics
    included.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.source = {
            name: value for name, value in network.state_dict().items() if value.is_floating_point()
        }
        self.state = {name: value.detach().clone() for name, value in self.source.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10))
        torch._foreach_lerp_(list(self.state.values()), list(self.source.values()), 1.0 - decay)


@torch.no_grad()
def accuracy(network: Any, state: dict[str, Tensor], images: Decoded, batch: int = 1000) -> float:
    """The share of `images` that a network with this state names rightly."""
    was, training = (
        {name: value.clone() for name, value in network.state_dict().items()},
        network.training,
    )
    network.load_state_dict({**was, **state})
    network.eval()
    assert images.labels is not None
    right = torch.zeros((), dtype=torch.int64, device=images.pixels.device)
    for start in range(0, images.count, batch):
        pixels = images.pixels[start : start + batch]
        right += (
            network(network.normalise(pixels)).argmax(1) == images.labels[start : start + batch]
        ).sum()
    network.load_state_dict(was)
    network.train(training)
    return int(right) / images.count


def read(options: argparse.Namespace, device: torch.device) -> tuple[Decoded, Decoded]:
    sets = [
        load_images(source, split=split, memory_gb=1e9, progress=False)
        for source, split in ((options.data, "train"), (options.test or options.data, "test"))
    ]
    for images in sets:
        if not isinstance(images, Decoded) or images.labels is None:
            raise ValueError(f"{images.name} has no labels: a classifier needs them")
    return sets[0].to(device), sets[1].to(device)  # type: ignore[attr-defined]


def train(options: argparse.Namespace, recipe: Recipe | None = None) -> dict[str, Any]:
    """Train, test after each epoch, and write the file; returns the facts that are in it."""
    began = time.monotonic()
    deadline = began + options.seconds - max(1.0, options.seconds * RESERVE)
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    data, test = read(options, device)
    config = CifarNetConfig(
        tuple(options.widths), tuple(options.blocks), data.num_classes, data.size
    )
    recipe = recipe or Recipe()
    made = recipe.build(data) if recipe.build else CifarNet(config)
    network = made.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=options.lr, momentum=0.9, nesterov=True)
    average, crops = Average(network, options.ema), Crops(data.pixels, options.cutout, options.seed)
    forward = torch.compile(network) if options.compile else network
    generator = torch.Generator(device).manual_seed(options.seed + 1)
    coins = torch.Generator().manual_seed(options.seed + 2)
    batch = min(options.batch_size, data.count)
    per_epoch = data.count // batch
    peak, total = options.lr * batch / 512, options.epochs * per_epoch
    parameters = sum(p.numel() for p in network.parameters())
    print(
        f"{parameters} parameters, {data.count} images, {time.monotonic() - began:.1f} s to read",
        flush=True,
    )
    few = Decoded(test.pixels[:1000], test.labels[:1000])  # type: ignore[index]
    accuracy(network, {}, few)
    lap = time.monotonic()
    accuracy(network, {}, few)
    deadline -= (
        3.0 * (time.monotonic() - lap) * test.count / few.count
    )  # two tests are left to do at the end
    started, step, history, value = time.monotonic(), 0, [], math.inf
    span = max(1e-9, deadline - started)
    network.train()
    while step < total and time.monotonic() < deadline:
        order = torch.randperm(data.count, device=device, generator=generator)
        for index in range(per_epoch):
            progress = max(step / total, (time.monotonic() - started) / span)
            if progress >= 1.0:
                break
            for group in optimizer.param_groups:
                group["lr"] = one_cycle(progress, peak)
            chosen = order[index * batch : (index + 1) * batch]
            pixels, erased = crops(chosen)
            x = network.normalise(pixels)
            x = x if erased is None else x.masked_fill(erased, 0.0)
            right_ones = data.labels[chosen]  # type: ignore[index]
            x, others, part = cut_mixed(x, right_ones, options.cutmix, coins)
            with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
                logits = forward(x)
            loss = sum(
                weight
                * functional.cross_entropy(
                    logits.float(), wanted, label_smoothing=options.smoothing
                )
                for weight, wanted in ((1.0 - part, right_ones), (part, others))
                if weight
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            average.update()
            step += 1
        right, value = accuracy(network, average.state, test), float(loss.detach())
        if not math.isfinite(value):
            raise SystemExit(
                f"the loss is {value} after epoch {len(history) + 1}; nothing is written. Try a"
                " smaller --lr"
            )
        history.append(right)
        print(
            f"epoch {len(history):3d}  loss {value:.4f}  accuracy {100 * right:.2f} % "
            f" {time.monotonic() - began:.1f} s",
            flush=True,
        )
    if not history:
        raise SystemExit(
            f"no epoch fits into {options.seconds} s; nothing is written. Give it more with"
            " --seconds"
        )
    unused = ("data", "test", "out", *(("widths", "blocks") if recipe.build else ()))
    kept = {k: v for k, v in vars(options).items() if k not in unused}
    about = provenance()  # files by their names alone: where they lie is nobody's business
    about["command"] = " ".join(
        Path(word).name if "/" in word else word for word in about["command"].split(" ")
    )
    facts = {
        "accuracy": history[-1], "accuracies": history, "epochs": len(history), "steps": step, "images": step * batch,
        "training_seconds": round(time.monotonic() - started, 1), "data": Path(data.name).name, "test": Path(test.name).name,
        "note": options.note, "parameters": parameters, "settings": kept, **about,
    }  # fmt: skip
    recipe.save(
        options.out, network, tensors=average.state, class_names=data.class_names, card=facts
    )
    stored = recipe.load(options.out, device)
    # what counts is what is in the file
    facts["stored_accuracy"] = accuracy(stored, {}, test)
    Path(options.out).with_suffix(".md").write_text(card_markdown(facts))
    size, sha256 = options.out.stat().st_size / 1e6, file_sha256(options.out)
    print(f"written {options.out}, {size:.2f} MB, SHA-256 {sha256}")
    print(
        f"accuracy {100 * facts['stored_accuracy']:.2f} % as stored, {time.monotonic() - began:.1f}"
        " s in all"
    )
    return facts


if __name__ == "__main__":
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
        print(
            json.dumps({k: v for k, v in train(arguments()).items() if k != "accuracies"}, indent=1)
        )
