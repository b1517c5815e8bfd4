"""Binomial diffusion of the heartbeat sequences of Sohl-Dickstein et al. 2015: a pulse every fifth
bin, 20 bins, 2000 steps. Trains a small network, prints its bound in bits and draws its samples.

python examples/heartbeat.py    (writes heartbeat.png, needs matplotlib)
"""

import matplotlib
import torch
from torch import Tensor, nn

from sdeflow import BinomialProcess, harmonic_betas

matplotlib.use("Agg")
import matplotlib.pyplot as plt

torch.manual_seed(0)
data = torch.stack([(torch.arange(20) % 5 == phase).float() for phase in range(5)])
process = BinomialProcess(harmonic_betas(2000), rate=0.5)
hidden = nn.Linear(22, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU()
layers = nn.Sequential(*hidden, nn.Linear(128, 20))


def network(x: Tensor, t: Tensor) -> Tensor:
    """P(x0 = 1 | x_t) of every bit."""
    share = (t / process.steps).unsqueeze(1)
    return torch.sigmoid(layers(torch.cat([2 * x - 1, share, -share.log() / 4], 1)))


generator, iterations = torch.Generator().manual_seed(0), 2000
optimiser = torch.optim.Adam(layers.parameters(), 2e-3)
rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
for _ in range(iterations):
    x0 = data[torch.randint(5, (256,), generator=generator)]
    optimiser.zero_grad()
    process.loss(network, x0, generator=generator).mean().backward()
    nn.utils.clip_grad_norm_(layers.parameters(), 1.0)
    optimiser.step()
    rate.step()

bound = process.bound(network, data.repeat(200, 1), draws=200)
x = process.sample(network, n=100, shape=(20,), trajectory=True)[[0, 1000, -1]]
right = (x[-1][:, None] == data).all(-1).any(1).double().mean()
print(f"bound {bound.mean:.3f} bits, standard error {bound.standard_error:.3f}; entropy 2.322")
print(f"{100 * right:.0f} of 100 samples are heartbeats")
_, axes = plt.subplots(1, 3, figsize=(9, 5))
for axis, state, name in zip(axes, x, ("t = 2000", "t = 1000", "samples"), strict=True):
    axis.imshow(state.numpy(), cmap="gray_r", aspect="auto", interpolation="nearest")
    axis.set_title(name)
plt.savefig("heartbeat.png", dpi=100)
