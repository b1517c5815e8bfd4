"""The networks of peers, rebuilt for timing: EDM's DDPM++ from its public description, and diffusers' at its published shape."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EDMBlock(nn.Module):
    """DDPM++'s residual block as EDM arranges it: the embedding is added, resampling is a depth-wise convolution."""

    def __init__(self, width_in: int, width: int, embedding: int, resample: str = "", attention: bool = False):
        super().__init__()
        self.resample = resample
        self.norm0 = nn.GroupNorm(min(32, width_in // 4), width_in, eps=1e-6)
        self.conv0 = nn.Conv2d(width_in, width, 3, padding=1)
        self.affine = nn.Linear(embedding, width)
        self.norm1 = nn.GroupNorm(min(32, width // 4), width, eps=1e-6)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.skip = nn.Conv2d(width_in, width, 1) if width_in != width or resample else None
        self.register_buffer("box", torch.full((1, 1, 2, 2), 0.25))
        if attention:
            self.norm2 = nn.GroupNorm(min(32, width // 4), width, eps=1e-6)
            self.qkv, self.proj = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)
        self.attention = attention

    def _resampled(self, x: Tensor) -> Tensor:
        if not self.resample:
            return x
        c = x.shape[1]
        box: Any = self.box
        if self.resample == "down":
            return F.conv2d(x, box.to(x.dtype).expand(c, 1, 2, 2), stride=2, groups=c)
        return F.conv_transpose2d(x, 4.0 * box.to(x.dtype).expand(c, 1, 2, 2), stride=2, groups=c)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        y = self.conv0(self._resampled(F.silu(self.norm0(x))))
        y = F.silu(self.norm1(y + self.affine(embedding)[:, :, None, None]))
        y = self.conv1(F.dropout(y, 0.13, self.training))
        x = y + (x if self.skip is None else self.skip(self._resampled(x)))
        x = x * math.sqrt(0.5)
        if self.attention:
            b, c, h, w = x.shape
            q, k, v = self.qkv(self.norm2(x)).reshape(b, c, 3, h * w).unbind(2)
            weights = torch.einsum("bcq,bck->bqk", q.float(), k.float() / math.sqrt(c)).softmax(-1).to(q.dtype)
            y = torch.einsum("bqk,bck->bcq", weights, v).reshape(b, c, h, w)
            x = (x + self.proj(y)) * math.sqrt(0.5)
        return x


class EDMNetwork(nn.Module):
    """DDPM++ as EDM configures it for CIFAR-10: 128 channels times (2, 2, 2), four blocks a level, one-headed attention at 16.

    `network(x, time, label)`, as sdeflow's UNet is called. Source: Karras et al. (2022), table 7; Song et al. (2021).
    """

    def __init__(self, channels: int = 128, multipliers: tuple[int, ...] = (2, 2, 2), blocks: int = 4):
        super().__init__()
        embedding = 4 * channels
        self.channels = channels
        self.map0, self.map1 = nn.Linear(channels, embedding), nn.Linear(embedding, embedding)
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        width, skips = channels, [channels]
        for level, multiplier in enumerate(multipliers):
            if level:
                self.encoder.append(EDMBlock(width, width, embedding, "down"))
                skips.append(width)
            for _ in range(blocks):
                self.encoder.append(EDMBlock(width, channels * multiplier, embedding, attention=level == 1))
                width = channels * multiplier
                skips.append(width)
        self.middle = nn.ModuleList(
            [EDMBlock(width, width, embedding, attention=True), EDMBlock(width, width, embedding)]
        )
        for level, multiplier in reversed(list(enumerate(multipliers))):
            if level < len(multipliers) - 1:
                self.decoder.append(EDMBlock(width, width, embedding, "up"))
            for n in range(blocks + 1):
                attends = level == 1 and n == blocks
                self.decoder.append(EDMBlock(width + skips.pop(), channels * multiplier, embedding, attention=attends))
                width = channels * multiplier
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.head = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        half = self.channels // 2
        frequencies = (1.0 / 10000.0) ** (torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angles = time.float()[:, None] * frequencies
        embedding = torch.cat([angles.cos(), angles.sin()], 1).to(x.dtype)
        embedding = F.silu(self.map1(F.silu(self.map0(embedding))))
        x = self.stem(x)
        skips = [x]
        for block in self.encoder:
            x = block(x, embedding)
            skips.append(x)
        for block in self.middle:
            x = block(x, embedding)
        for block in self.decoder:
            x = block(x if block.resample else torch.cat([x, skips.pop()], 1), embedding)
        return self.head(F.silu(self.norm(x)))


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
