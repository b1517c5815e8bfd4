"""The small classifier of CIFAR-10 that is bundled; the Frechet distance of its features is
FD-CIFAR.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdeflow.errors import CheckpointError
from sdeflow.evaluation.features.base import Extractor, file_sha256
from sdeflow.models.checkpoint import read_tensors, write_tensors

CIFAR_WEIGHTS = (
    Path(__file__).parents[2] / "models" / "checkpoints" / "cifar10_features.safetensors"
)
"""The bundled feature network, which `benchmarks/quality/train_features.py` trained."""

CIFAR_FORMAT = "sdeflow-features-1"


@dataclass(frozen=True)
class CifarNetConfig:
    """The shape of a `CifarNet`: channels and residual blocks of each stage, classes, and the
    pixels' mean and deviation.

    Each stage after the first halves the resolution; the last one's channels are the features. The
    default has 3.7 M parameters. `mean` and `std` are in [0, 1], those of CIFAR-10's training set.
    """

    widths: tuple[int, ...] = (64, 128, 256)
    blocks: tuple[int, ...] = (2, 5, 2)
    num_classes: int = 10
    size: int = 32
    mean: tuple[float, ...] = (0.4914, 0.4822, 0.4465)
    std: tuple[float, ...] = (0.2470, 0.2435, 0.2616)

    def __post_init__(self) -> None:
        if (
            len(self.widths) != len(self.blocks)
            or min((*self.widths, *self.blocks, self.num_classes, self.size)) < 1
        ):
            raise ValueError(
                f"CifarNetConfig: as many blocks as widths, all at least 1; got {self.blocks} and"
                f" {self.widths}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CifarNetConfig:
        """The configuration that `asdict` gave, from JSON."""
        known: dict[str, Any] = {
            k: tuple(v) if isinstance(v, Sequence) else v for k, v in values.items()
        }
        return cls(**known)


class _Block(nn.Module):
    """Two 3x3 convolutions, each behind normalisation and ReLU, added to their input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.skip = (
            nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            if inputs != outputs or stride > 1
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(x))
        skip = x if self.skip is None else self.skip(y)
        return skip + self.conv2(functional.relu(self.norm2(self.conv1(y))))


class CifarNet(nn.Module):
    """A wide residual network for small images: pixels uint8 `[B, 3, size, size]` to features and
    logits.

    Source: Zagoruyko & Komodakis 2016, "Wide Residual Networks" (blocks with normalisation first,
    3x3 twice).
    """

    def __init__(self, config: CifarNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or CifarNetConfig()
        self.stem = nn.Conv2d(3, config.widths[0], 3, padding=1, bias=False)
        blocks, inputs = [], config.widths[0]
        for stage, (width, count) in enumerate(zip(config.widths, config.blocks, strict=True)):
            for index in range(count):
                blocks.append(_Block(inputs, width, 2 if stage and not index else 1))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(inputs)
        self.head = nn.Linear(inputs, config.num_classes)
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.register_buffer(
            "pixel_mean", torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False
        )
        self.register_buffer(
            "pixel_std", torch.tensor(config.std).view(1, 3, 1, 1), persistent=False
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels uint8, 0 to 255, to float32 of about zero mean and unit deviation, channels
        last.
        """
        x = pixels.float().div_(255.0).sub_(self.pixel_mean).div_(self.pixel_std)
        return x.contiguous(memory_format=torch.channels_last)

    def features(self, x: Tensor) -> Tensor:
        """The last activations, averaged over places, `[B, widths[-1]]`, from normalised pixels."""
        return functional.relu(self.norm(self.blocks(self.stem(x)))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, num_classes]` from normalised pixels."""
        return self.head(self.features(x))


def save_cifar_net(
    path: str | os.PathLike[str],
    network: CifarNet,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    class_names: Sequence[str] = (),
    card: Mapping[str, Any] | None = None,
) -> None:
    """Write `network` (its own state, or `tensors`: an average's) in half precision; normalisations
    keep float32.

    `card` holds the facts of its training. Errors: `CheckpointError` if a number is not finite in
    half precision or the file cannot be written.
    """
    state = dict(network.state_dict() if tensors is None else tensors)
    state = {
        name: value for name, value in state.items() if not name.endswith("num_batches_tracked")
    }
    state = {
        name: value.detach().to("cpu", torch.float16 if value.ndim > 1 else torch.float32)
        for name, value in state.items()
    }
    if bad := [name for name, value in state.items() if not bool(value.isfinite().all())]:
        raise CheckpointError(
            f"not saved to {path}: {', '.join(bad[:3])} would not be finite in half precision"
        )
    facts = {
        "format": CIFAR_FORMAT,
        "config": asdict(network.config),
        "class_names": list(class_names),
        "card": dict(card or {}),
    }
    write_tensors(path, state, facts)


class CifarFeatures(Extractor):
    """Features of a small classifier of CIFAR-10, bundled; the score is FD-CIFAR, which is not an
    FID.

    `weights` is a file that `benchmarks/quality/train_features.py` wrote (default: the bundled
    one). Images of another size are resized. `card` holds the facts of its training. Errors:
    `CheckpointError` if the file is missing or damaged.
    """

    name, score = "cifar10_features", "fd_cifar"

    def __init__(
        self, weights: str | os.PathLike[str] | None = None, device: str | torch.device = "cpu"
    ) -> None:
        path = CIFAR_WEIGHTS if weights is None else Path(weights)
        if not path.is_file():
            help = (
                "install sdeflow again, or name the file with --cifar-weights"
                if weights is None
                else "name another"
            )
            raise CheckpointError(
                f"the feature network of fd_cifar is missing: there is no file {path}; {help}. "
                "python -m benchmarks.quality.train_features trains one in two minutes on a GPU"
            )
        tensors, facts = read_tensors(path)
        if facts.get("format") != CIFAR_FORMAT:
            raise CheckpointError(
                f"{path} holds {facts.get('format', 'something unnamed')!r}, not a feature network"
                f" ({CIFAR_FORMAT})"
            )
        try:
            network = CifarNet(CifarNetConfig.from_dict(facts["config"]))
            network.load_state_dict(
                {name: value.float() for name, value in tensors.items()}
                | {
                    name: value
                    for name, value in network.state_dict().items()
                    if name.endswith("num_batches_tracked")
                }
            )
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{path} does not fit the configuration in its own header: {error}"
            ) from error
        self.device = torch.device(device)
        network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network = network.eval().requires_grad_(False)
        self.sha256, self.dim, self.size = (
            file_sha256(path),
            network.config.widths[-1],
            network.config.size,
        )
        self.num_classes = network.config.num_classes
        self.class_names, self.card = tuple(facts["class_names"]), dict(facts["card"])
        self.resize = (
            f"none at {self.size} x {self.size}; otherwise to it, bilinear with antialiasing,"
            " float32"
        )

    def _features(self, pixels: Tensor) -> Tensor:
        if pixels.shape[2:] != (self.size, self.size):
            pixels = functional.interpolate(
                pixels.float(),
                (self.size, self.size),
                mode="bilinear",
                antialias=True,
                align_corners=False,
            )
        return self.network.features(self.network.normalise(pixels))

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """The classes' logits `[B, 10]`."""
        return self.network.head(features.to(self.device))
