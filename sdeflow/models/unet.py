r"""A class-conditional UNet for images, shaped for speed on tensor cores.

Residual blocks as in DDPM++ and ADM (group norm, SiLU, convolution; the embedding of noise level
and class scales and shifts the second norm; the last convolution of a block starts at zero),
attention at chosen resolutions, skip connections by concatenation, and resampling inside a block by
averaging or repeating pixels. Everything is laid out channels-last, so that under bf16 autocast the
convolutions are matrix products and attention sees its tokens without a copy.

Source. Ho et al. 2020 (the UNet), Song et al. 2021 (DDPM++), Dhariwal and Nichol 2021 (adaptive
norms), Karras et al. 2022, table 7 (the arrangement, the rescaled skips), Karras et al. 2024
(normalised queries and keys).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdeflow._utils.checks import whole_number
from sdeflow._utils.options import option

Layer = TypeVar("Layer", bound=nn.Module)


@dataclass(frozen=True)
class UNetConfig:
    """What a `UNet` looks like; a plain value that survives JSON.

    Level i works on squares of `size / 2^i` pixels with `channels * multipliers[i]` channels. A
    level whose resolution in pixels is in `attention` has attention in each block; the middle
    always has. `num_classes = 0` is an unconditional network; otherwise label `num_classes` means
    "no label". `group_size` is how many channels share a mean and a variance. Raises `ValueError`
    where the numbers do not fit together.
    """

    size: int = option(
        32, "Crop and resize images to this many pixels", "Network", shown="the first one's"
    )
    in_channels: int = 3
    num_classes: int = 0
    channels: int = option(96, "Channels of the finest level", "Network")
    multipliers: tuple[int, ...] = option(
        (1, 2, 2), "Channels of each level, as multiples of those of the finest", "Network"
    )
    blocks: int = option(2, "Residual blocks a level", "Network")
    attention: tuple[int, ...] = option((16,), "Resolutions with attention", "Network")
    embedding: int = option(192, "Width of the embedding of noise level and class", "Network")
    head_channels: int = option(64, "Channels of an attention head", "Network")
    group_size: int = option(16, "Channels that are normalised together", "Network")
    dropout: float = option(0.0, "Dropout inside the blocks", "Network")

    def __post_init__(self) -> None:
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        object.__setattr__(self, "attention", tuple(self.attention))
        counts = ("size", "in_channels", "channels", "blocks", "embedding", "head_channels")
        for name in (*counts, "group_size"):
            whole_number(f"UNetConfig: {name}", getattr(self, name))
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(
                "UNetConfig: multipliers must be positive whole numbers, one a level, got"
                f" {self.multipliers}"
            )
        whole_number("UNetConfig: num_classes", self.num_classes, 0)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"UNetConfig: dropout must be in [0, 1), got {self.dropout}")
        if self.size % self.stride:
            raise ValueError(
                f"UNetConfig: size={self.size} must be a multiple of {self.stride} to be halved "
                f"{len(self.multipliers) - 1} times; use another size or fewer multipliers"
            )
        if self.channels % self.group_size:
            raise ValueError(
                f"UNetConfig: channels={self.channels} must be a multiple of"
                f" group_size={self.group_size}"
            )
        levels = [(self.size >> i, self.channels * m) for i, m in enumerate(self.multipliers)]
        heads = {width for side, width in levels if side in self.attention} | {levels[-1][1]}
        if odd := [c for c in sorted(heads) if c % self.head_channels]:
            raise ValueError(
                f"UNetConfig: attention over {odd} channels cannot be cut in heads of"
                f" {self.head_channels}"
            )

    @property
    def stride(self) -> int:
        """How many pixels of the input one pixel of the deepest level covers."""
        return 1 << (len(self.multipliers) - 1)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one sample."""
        return (self.in_channels, self.size, self.size)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready values; `from_dict` reads it back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UNetConfig:
        """The configuration that `to_dict` wrote; raises `ValueError` on names it does not know."""
        known = {f.name for f in fields(cls)}
        if strange := sorted(set(values) - known):
            raise ValueError(
                f"UNetConfig has no {', '.join(strange)}; it has {', '.join(sorted(known))}"
            )
        return cls(**values)


class AdaptiveNorm(nn.Module):
    r"""Group normalisation with an affine map that may depend on the sample:
    $y = (x - \mu)/\rho \cdot a + b$.

    `scale` and `shift` are [B, C] and multiply and add to the learned affine map. Compiled, mean
    and variance come from sums over pixels for each channel, which read channels-last memory in its
    own order; eagerly, PyTorch's own kernel is best.
    """

    def __init__(self, channels: int, group_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = channels // group_size, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        """Normalise `x` [B, C, H, W]."""
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if scale is not None and shift is not None:
            gain = 1 + scale.float()
            weight, bias = weight * gain, bias * gain + shift.float()
        if torch.compiler.is_compiling():
            return self._by_channel(x, weight, bias)
        if scale is None:
            return F.group_norm(x, self.groups, weight, bias, self.eps)
        y = F.group_norm(x, self.groups, eps=self.eps)
        weight, bias = (p[:, :, None, None].to(y.dtype) for p in (weight, bias))
        return torch.addcmul(bias, y, weight)

    def _by_channel(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        b, c = x.shape[:2]
        wide = x.float()  # fused: nothing of this width is stored
        mean = wide.mean((2, 3)).view(b, self.groups, -1).mean(-1, keepdim=True)
        square = wide.square().mean((2, 3)).view(b, self.groups, -1).mean(-1, keepdim=True)
        inverse = ((square - mean.square()).clamp_min(0) + self.eps).rsqrt()
        a = inverse.expand(b, self.groups, c // self.groups).reshape(b, c) * weight
        shift = bias - mean.expand(b, self.groups, c // self.groups).reshape(b, c) * a
        return (wide * a[:, :, None, None] + shift[:, :, None, None]).to(x.dtype)


class Attention(nn.Module):
    """Self-attention over pixels.

    Queries and keys have unit size, so that the logits stay bounded in bf16.
    """

    def __init__(self, channels: int, head_channels: int, group_size: int) -> None:
        super().__init__()
        self.heads = channels // head_channels
        self.norm = AdaptiveNorm(channels, group_size)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = _zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Mix the pixels of `x` [B, C, H, W]."""
        b, c, h, w = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # channels-last: a view
        qkv = self.qkv(tokens).view(b, h * w, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = (F.rms_norm(y.float(), (y.shape[-1],), eps=1e-6).to(v.dtype) for y in (q, k))
        y = F.scaled_dot_product_attention(q, k, v)
        y = self.out(y.transpose(1, 2).reshape(b, h * w, c))
        return (x + y.transpose(1, 2).reshape(b, c, h, w)) * math.sqrt(0.5)


class Block(nn.Module):
    """A residual block: norm, SiLU, convolution, twice; the embedding enters at the second norm.

    `resample` is "none", "down" (average of 2x2 pixels) or "up" (each pixel repeated), on both
    branches.
    """

    def __init__(
        self,
        config: UNetConfig,
        in_channels: int,
        out_channels: int,
        resample: str = "none",
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.resample, self.dropout = resample, config.dropout
        self.norm0 = AdaptiveNorm(in_channels, config.group_size)
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.affine = _zeroed(nn.Linear(config.embedding, 2 * out_channels))
        self.norm1 = AdaptiveNorm(out_channels, config.group_size)
        self.conv1 = _zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.attention = (
            Attention(out_channels, config.head_channels, config.group_size) if attention else None
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """`x` [B, C, H, W] and `embedding` [B, E] to [B, C', H', W']."""
        y = self.conv0(self._resampled(F.silu(self.norm0(x))))
        scale, shift = self.affine(embedding).chunk(2, dim=1)
        y = F.silu(self.norm1(y, scale, shift))
        y = self.conv1(F.dropout(y, self.dropout, self.training))
        x = self._resampled(x)
        if self.skip is not None:
            x = self.skip(x)
        x = (x + y) * math.sqrt(0.5)  # keeps the variance of the sum of two equals
        return x if self.attention is None else self.attention(x)

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x


class UNet(nn.Module):
    """A UNet for images: `unet(x, time, label=None)`.

    `x` is [B, C, H, W], `time` 0-d or [B], and `label` int64 [B].

    `time` is any number of order one that gives the noise level, such as `log(nsr) / 4` (see
    `Preconditioned`); `label=None` means the null class everywhere. The output has the shape of
    `x`. Parameters are float32; run it under autocast for bf16. Raises `ValueError` if a label
    reaches an unconditional network or the image cannot be halved often enough.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.embed0 = nn.Linear(2 * (config.embedding // 2), config.embedding)
        self.embed1 = nn.Linear(config.embedding, config.embedding)
        self.label = (
            nn.Embedding(config.num_classes + 1, config.embedding) if config.num_classes else None
        )

        width = config.channels
        self.stem = nn.Conv2d(config.in_channels, width, 3, padding=1)
        self.encoder = nn.ModuleList()
        self.middle = nn.ModuleList()
        self.decoder = nn.ModuleList()
        skips = [width]
        for level, multiplier in enumerate(config.multipliers):
            attends, wide = config.size >> level in config.attention, config.channels * multiplier
            if level:
                self.encoder.append(Block(config, width, width, "down"))
                skips.append(width)
            for _ in range(config.blocks):
                self.encoder.append(Block(config, width, wide, attention=attends))
                width = wide
                skips.append(width)
        self.middle.append(Block(config, width, width, attention=True))
        self.middle.append(Block(config, width, width))
        for level, multiplier in reversed(list(enumerate(config.multipliers))):
            attends, wide = config.size >> level in config.attention, config.channels * multiplier
            for _ in range(config.blocks + 1):
                self.decoder.append(Block(config, width + skips.pop(), wide, attention=attends))
                width = wide
            if level:
                self.decoder.append(Block(config, width, width, "up"))
        self.norm = AdaptiveNorm(width, config.group_size)
        self.head = _zeroed(nn.Conv2d(width, config.in_channels, 3, padding=1))
        nn.Module.to(self, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def num_classes(self) -> int:
        """How many labels it knows; 0 if it is unconditional."""
        return self.config.num_classes

    def forward(self, x: Tensor, time: Tensor, label: Tensor | int | None = None) -> Tensor:
        """The network's raw output at `x`; see the class."""
        if x.ndim != 4 or x.shape[1] != self.config.in_channels or x.shape[2] % self.config.stride:
            raise ValueError(
                f"UNet takes [B, {self.config.in_channels}, H, W] with H and W multiples of"
                f" {self.config.stride}, got {tuple(x.shape)}"
            )
        embedding = self._embed(time, label)
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for block in self.encoder:
            x = block(x, embedding)
            skips.append(x)
        for block in self.middle:
            x = block(x, embedding)
        for block in self.decoder:
            if block.resample != "up":
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, embedding)
        return self.head(F.silu(self.norm(x)))

    def _embed(self, time: Tensor, label: Tensor | int | None) -> Tensor:
        """The embedding of noise level and class.

        It has a row a sample, or one row where all share them.
        """
        if time.ndim and time.stride(0) == 0:  # expanded: one level for all
            time = time[:1]
        # Angular frequencies from 1/2 to 32 over log(nsr)/4, which spans about 2.6: every scale of
        # that axis that matters. In float32 whatever the weights are in: in bfloat16 the angles
        # would be off by a tenth of a radian and more.
        half = self.config.embedding // 2
        frequencies = torch.exp2(torch.linspace(-1.0, 5.0, half, device=time.device))
        angles = time.float().reshape(-1, 1) * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.embed0.weight.dtype)
        embedding = self.embed1(F.silu(self.embed0(waves)))
        if self.label is not None:
            # A 0-d time gives one row, which broadcasts over the labels.
            label = self.config.num_classes if label is None else label
            index = torch.full((1,), label, device=time.device) if isinstance(label, int) else label
            if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
                raise ValueError(
                    f"labels are integers of shape [B]; got {index.dtype} of shape"
                    f" {tuple(index.shape)}"
                )
            embedding = embedding + self.label(index)
        elif label is not None:
            raise ValueError(
                "this UNet is unconditional (num_classes=0) and takes no label; leave label out"
            )
        return F.silu(embedding)


def _zeroed(module: Layer) -> Layer:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
