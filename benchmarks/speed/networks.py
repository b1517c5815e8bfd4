"""The networks of peers, rebuilt for timing: EDM's DDPM++ from its public description, and
diffusers' at its published shape.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdeflow.models.unet import AdaptiveNorm


class EDMBlock(nn.Module):
    """DDPM++'s residual block as EDM arranges it: the embedding is added, resampling is a
    depth-wise convolution.

    `fused` computes the same by the kernels that sdeflow's UNet has: see `EDMNetwork`.
    """

    def __init__(
        self, width_in: int, width: int, embedding: int, resample: str = "", attention: bool = False,
        dropout: float = 0.13, fused: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.resample, self.dropout, self.fused = resample, dropout, fused
        self.norm0 = _norm(width_in, fused)
        self.conv0 = nn.Conv2d(width_in, width, 3, padding=1)
        self.affine = nn.Linear(embedding, width)
        self.norm1 = _norm(width, fused)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.skip = nn.Conv2d(width_in, width, 1) if width_in != width or resample else None
        self.register_buffer("box", torch.full((1, 1, 2, 2), 0.25), persistent=False)
        if attention:
            self.norm2 = _norm(width, fused)
            self.qkv, self.proj = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)
        self.attention = attention

    def _resampled(self, x: Tensor) -> Tensor:
        if not self.resample:
            return x
        if self.fused:
            return (
                F.avg_pool2d(x, 2)
                if self.resample == "down"
                else F.interpolate(x, scale_factor=2.0, mode="nearest")
            )
        c = x.shape[1]
        box: Any = self.box
        if self.resample == "down":
            return F.conv2d(x, box.to(x.dtype).expand(c, 1, 2, 2), stride=2, groups=c)
        return F.conv_transpose2d(x, 4.0 * box.to(x.dtype).expand(c, 1, 2, 2), stride=2, groups=c)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        y = self.conv0(self._resampled(F.silu(self.norm0(x))))
        y = F.silu(self.norm1(y + self.affine(embedding)[:, :, None, None]))
        y = self.conv1(F.dropout(y, self.dropout, self.training))
        x = y + (x if self.skip is None else self.skip(self._resampled(x)))
        x = x * math.sqrt(0.5)
        return (x + self.proj(self._attended(x))) * math.sqrt(0.5) if self.attention else x

    def _attended(self, x: Tensor) -> Tensor:
        """The values, weighted by one head of attention over the pixels."""
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm2(x)).reshape(b, 3, c, h * w).unbind(1)
        if self.fused:
            tokens = (y.transpose(1, 2).unsqueeze(1) for y in (q, k, v))
            return (
                F.scaled_dot_product_attention(*tokens)
                .squeeze(1)
                .transpose(1, 2)
                .reshape(b, c, h, w)
            )
        weights = (
            torch.einsum("bcq,bck->bqk", q.float(), k.float() / math.sqrt(c))
            .softmax(-1)
            .to(q.dtype)
        )
        return torch.einsum("bqk,bck->bcq", weights, v).reshape(b, c, h, w)


def _norm(width: int, fused: bool) -> nn.Module:
    """Group normalisation as EDM has it: 32 groups, and at least four channels in each."""
    groups = max(1, min(32, width // 4))
    return (
        AdaptiveNorm(width, width // groups, eps=1e-6)
        if fused
        else nn.GroupNorm(groups, width, eps=1e-6)
    )


class EDMNetwork(nn.Module):
    """DDPM++ as EDM configures it for CIFAR-10: 128 channels times (2, 2, 2), four blocks a level,
    one-headed attention at 16.

    `network(x, time, label)`, as sdeflow's UNet is called. With `num_classes` it is
    class-conditional: the one-hot label times `sqrt(num_classes)` goes through a linear layer and
    is added to the embedding of the noise; label `num_classes` means "no label" and is the zero
    vector. Without, labels are ignored. Weights begin as EDM's do: Xavier-uniform, queries, keys
    and values scaled by `sqrt(0.2)`, the last convolution of each block, of attention and of the
    network by 1e-5; biases at zero. `dropout` is EDM's for trainings of 200 million images.

    `fused` computes the same function of the same parameters by the kernels that sdeflow's UNet
    has: channels last, its compiled normalisation, averages and repetition for the depth-wise
    convolutions, PyTorch's fused attention. Source: Karras et al. (2022), tables 2 and 7 and
    appendix F; Song et al. (2021).
    """

    def __init__(
        self, channels: int = 128, multipliers: tuple[int, ...] = (2, 2, 2), blocks: int = 4,
        num_classes: int = 0, dropout: float = 0.13, fused: bool = False,
    ):  # fmt: skip
        super().__init__()
        embedding = 4 * channels
        self.channels, self.num_classes, self.fused = channels, num_classes, fused
        block = partial(EDMBlock, embedding=embedding, dropout=dropout, fused=fused)
        self.label = nn.Linear(num_classes, channels) if num_classes else None
        self.map0, self.map1 = nn.Linear(channels, embedding), nn.Linear(embedding, embedding)
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        width, skips = channels, [channels]
        for level, multiplier in enumerate(multipliers):
            if level:
                self.encoder.append(block(width, width, resample="down"))
                skips.append(width)
            for _ in range(blocks):
                self.encoder.append(block(width, channels * multiplier, attention=level == 1))
                width = channels * multiplier
                skips.append(width)
        self.middle = nn.ModuleList([block(width, width, attention=True), block(width, width)])
        for level, multiplier in reversed(list(enumerate(multipliers))):
            if level < len(multipliers) - 1:
                self.decoder.append(block(width, width, resample="up"))
            for n in range(blocks + 1):
                attends = level == 1 and n == blocks
                self.decoder.append(
                    block(width + skips.pop(), channels * multiplier, attention=attends)
                )
                width = channels * multiplier
        self.norm = _norm(width, fused)
        self.head = nn.Conv2d(width, 3, 3, padding=1)
        self._initialise()
        if fused:
            nn.Module.to(self, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def _initialise(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
                part = name.rsplit(".", 1)[-1]
                module.weight *= {
                    "qkv": math.sqrt(0.2),
                    "conv1": 1e-5,
                    "proj": 1e-5,
                    "head": 1e-5,
                }.get(part, 1.0)

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        embedding = self._embed(time, label).to(x.dtype)
        embedding = F.silu(self.map1(F.silu(self.map0(embedding))))
        x = self.stem(x.contiguous(memory_format=torch.channels_last) if self.fused else x)
        skips = [x]
        for block in self.encoder:
            x = block(x, embedding)
            skips.append(x)
        for block in self.middle:
            x = block(x, embedding)
        for block in self.decoder:
            x = block(x if block.resample else torch.cat([x, skips.pop()], 1), embedding)
        return self.head(F.silu(self.norm(x)))

    def _embed(self, time: Tensor, label: Tensor | None) -> Tensor:
        """The embedding of noise level and class: a row a sample, or one row where all share
        them.
        """
        half = self.channels // 2
        steps = torch.arange(half, device=time.device, dtype=torch.float32) / (half - 1)
        angles = time.float().reshape(-1, 1) * (1.0 / 10000.0) ** steps
        embedding = torch.cat([angles.sin(), angles.cos()], 1)
        if self.label is None or label is None:
            bias = 0.0 if self.label is None else self.label.bias
            return embedding + bias
        classes = torch.arange(self.num_classes, device=label.device)
        chosen = (label.reshape(-1, 1) == classes).to(self.label.weight.dtype) * math.sqrt(
            self.num_classes
        )
        return embedding + self.label(chosen)


class Diffusers(nn.Module):
    """diffusers' `UNet2DModel` at the shape of `google/ddpm-cifar10-32`."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        self.model = UNet2DModel(
            sample_size=32,
            layers_per_block=2,
            block_out_channels=(128, 256, 256, 256),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
            norm_eps=1e-6,
            attention_head_dim=None,
        )

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        sample: Tensor = self.model(x, time).sample
        return sample
