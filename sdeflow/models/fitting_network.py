"""The network for fitting: a small classifier of CIFAR-10, for losses and never as a judge.

A plan or a network that was fitted in the features of a network looks good to that network and to
its kin. So the network that takes part in a fit has another architecture, another seed and another
recipe than those that judge, and `sdeflow.evaluation` does not know it.
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
from sdeflow.models.checkpoint import read_tensors, write_tensors

WEIGHTS = Path(__file__).parent / "checkpoints" / "cifar10_fitting.safetensors"
"""The bundled network, which `benchmarks/quality/train_fitting_network.py` trained."""

FORMAT = "sdeflow-fitting-1"


@dataclass(frozen=True)
class FittingNetConfig:
    """The shape of a `FittingNet`: the channels of its stem and three stages, classes and size.

    `mean` and `std` are those of the pixels in [0, 1]. The default has 1.9 M parameters.
    """

    widths: tuple[int, ...] = (64, 128, 192, 224)
    num_classes: int = 10
    size: int = 32
    mean: tuple[float, ...] = (0.4914, 0.4822, 0.4465)
    std: tuple[float, ...] = (0.2470, 0.2435, 0.2616)

    def __post_init__(self) -> None:
        if len(self.widths) != 4 or min((*self.widths, self.num_classes, self.size)) < 1:
            raise ValueError(
                "FittingNetConfig: four widths, num_classes and size are at least 1; "
                f"got {self.widths}, {self.num_classes} and {self.size}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FittingNetConfig:
        """The configuration that `asdict` gave, from JSON."""
        known: dict[str, Any] = {
            k: tuple(v) if isinstance(v, Sequence) else v for k, v in values.items()
        }
        return cls(**known)


def _unit(inputs: int, outputs: int) -> nn.Sequential:
    """A 3x3 convolution, batch normalisation, GELU."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.GELU())


class _Residual(nn.Module):
    """Two units added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.units = nn.Sequential(_unit(width, width), _unit(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.units(x)


class FittingNet(nn.Module):
    """A nine-layer residual network with average pooling and GELU: smooth in its pixels.

    `features(normalised)` are `[B, widths[-1]]`; `embed(images)` takes images in [-1, 1] and passes
    gradients to them.
    """

    def __init__(self, config: FittingNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or FittingNetConfig()
        a, b, c, d = config.widths
        self.stages = nn.Sequential(
            _unit(3, a), _unit(a, b), nn.AvgPool2d(2), _Residual(b),
            _unit(b, c), nn.AvgPool2d(2), _unit(c, d), nn.AvgPool2d(2), _Residual(d),
        )  # fmt: skip
        self.head = nn.Linear(d, config.num_classes)
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        for name in ("mean", "std"):
            value = torch.tensor(getattr(config, name)).view(1, 3, 1, 1)
            self.register_buffer(f"pixel_{name}", value, persistent=False)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels uint8, 0 to 255, to float32 of about zero mean and unit deviation."""
        x = pixels.float().div_(255.0).sub_(self.pixel_mean).div_(self.pixel_std)
        return x.contiguous(memory_format=torch.channels_last)

    def features(self, x: Tensor) -> Tensor:
        """The last activations, averaged over places, `[B, widths[-1]]`, from normalised pixels."""
        return self.stages(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, num_classes]` from normalised pixels."""
        return self.head(self.features(x))

    def embed(self, images: Tensor) -> Tensor:
        """The features of images `[B, 3, H, W]` in [-1, 1], with gradients to the images."""
        size = (self.config.size, self.config.size)
        if images.shape[2:] != size:
            images = functional.interpolate(
                images, size, mode="bilinear", antialias=True, align_corners=False
            )
        return self.features(((images + 1.0) / 2.0 - self.pixel_mean) / self.pixel_std)


def save_fitting_network(
    path: str | os.PathLike[str],
    network: FittingNet,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    class_names: Sequence[str] = (),
    card: Mapping[str, Any] | None = None,
) -> None:
    """Write `network` (its own state, or `tensors`) in half precision; normalisations in float32.

    Errors: `CheckpointError` if a number is not finite in half precision, or if the file cannot be
    written.
    """
    state = dict(network.state_dict() if tensors is None else tensors)
    state = {
        name: value.detach().to("cpu", torch.float16 if value.ndim > 1 else torch.float32)
        for name, value in state.items()
        if not name.endswith("num_batches_tracked")
    }
    if bad := [name for name, value in state.items() if not bool(value.isfinite().all())]:
        raise CheckpointError(f"not saved to {path}: {', '.join(bad[:3])} is not finite in half")
    facts = {"format": FORMAT, "config": asdict(network.config), "class_names": list(class_names)}
    write_tensors(path, state, {**facts, "card": dict(card or {})})


def load_fitting_network(
    path: str | os.PathLike[str] | None = None, device: str | torch.device = "cpu"
) -> FittingNet:
    """The network for fitting: the bundled one, or one that `save_fitting_network` wrote.

    It is in evaluation mode and its parameters take no gradients. Errors: `CheckpointError` if the
    file is missing, damaged or of another kind.
    """
    path = WEIGHTS if path is None else Path(path)
    tensors, facts = read_tensors(path)
    if facts.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} holds {facts.get('format', 'something unnamed')!r}, not a network for fitting "
            f"({FORMAT}); benchmarks/quality/train_fitting_network.py trains one"
        )
    try:
        network = FittingNet(FittingNetConfig.from_dict(facts["config"]))
        state = {name: value.float() for name, value in tensors.items()}
        counts = {k: v for k, v in network.state_dict().items() if k.endswith("_tracked")}
        network.load_state_dict(state | counts)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit its own configuration: {error}") from error
    return network.to(device).eval().requires_grad_(False)
