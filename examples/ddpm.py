"""DDPM to the letter: algorithms 1 and 2 of Ho et al. 2020, and the same samples from the library.

python examples/ddpm.py
"""

import torch
from torch import Tensor, nn

from sdeflow import DDPM, Prediction, Process, SeededNoise, betas, sample

torch.manual_seed(0)
T = 200
beta = betas.linear(T, reference=1000).float()
alpha, alpha_bar = 1 - beta, (1 - beta).cumprod(0)
data = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
layers = nn.Sequential(nn.Linear(6, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU())
layers.append(nn.Linear(128, 2))


def network(x: Tensor, t: Tensor) -> Tensor:
    """eps, for t counted from 0."""
    a = alpha_bar[t].unsqueeze(1)
    level = torch.cat([a.sqrt(), (1 - a).sqrt(), (1 - a).log() / 4], 1)
    return layers(torch.cat([x, level, (a / (1 - a)).log() / 4], 1))


optimiser = torch.optim.Adam(layers.parameters(), 2e-3)
for _ in range(1000):  # algorithm 1
    x0, t = data[torch.randint(4, (256,))], torch.randint(T, (256,))
    eps, a = torch.randn_like(x0), alpha_bar[t].unsqueeze(1)
    loss = (eps - network(a.sqrt() * x0 + (1 - a).sqrt() * eps, t)).square().mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()

noise, again = (SeededNoise(range(256), (2,)) for _ in range(2))
with torch.no_grad():  # algorithm 2, with sigma_t^2 = beta_t
    x = noise.start()
    for t in reversed(range(T)):
        z = noise.draw() if t > 0 else torch.zeros_like(x)
        eps = network(x, torch.full((256,), t))
        x = (x - beta[t] / (1 - alpha_bar[t]).sqrt() * eps) / alpha[t].sqrt() + beta[t].sqrt() * z
model = Prediction(
    network, "eps", Process.from_betas(betas.linear(T, reference=1000)), time="index"
)
grid = torch.arange(T, 0, -1) / T
ours = sample(model, solver=DDPM("large"), grid=grid, x=again.start(), t=1.0, noise=again)
near = (torch.cdist(x, data).amin(1) < 0.2).float().mean()
print(f"{near:.0%} of the samples are within 0.2 of a point of the data")
print(f"largest difference to the library's solver: {(x - ours).abs().max():.0e}")
