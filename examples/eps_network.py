"""Wrap an eps-network with discrete times (the usual DDPM), and sample from it along another
process.

The network here is a stand-in with the right answer for data N(0, 0.5^2); put yours in its place.

python examples/eps_network.py
"""

import torch
from torch import Tensor, nn

import sdeflow
from sdeflow import Prediction, Process, RectifiedFlow

betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)


class EpsNetwork(nn.Module):
    """Takes `x` `[B, ...]` and indices `[B]`, int64, from 0 to 999; returns eps."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("alpha_bar", (1 - betas).cumprod(0))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        alpha_bar = self.alpha_bar[index].reshape(-1, *[1] * (x.ndim - 1))
        return (x * (1 - alpha_bar).sqrt() / (0.25 * alpha_bar + 1 - alpha_bar)).to(x.dtype)


model = Prediction(EpsNetwork(), "eps", Process.from_betas(betas), time="index", shape=(3, 8, 8))

x = sdeflow.sample(model, solver="ddim", nfe=50, n=64, seeds=0)
print(f"DDIM, 50 calls, on its own table: std {x.std():.3f}, should be 0.5")
x = sdeflow.sample(model, RectifiedFlow(), solver="heun", nfe=51, n=64, seeds=0)
print(f"Heun, 51 calls, rectified flow:   std {x.std():.3f}, should be 0.5")
