"""The swiss roll in the three rows of Sohl-Dickstein et al. 2015, figure 1: the forward chain, the
reverse chain, and the drift of the reverse chain. The score is the exact one of the data set.

python examples/swiss_roll.py    (writes swiss_roll.png, needs matplotlib)
"""

import matplotlib
import torch

import sdeflow
from sdeflow import VP, Empirical

matplotlib.use("Agg")
import matplotlib.pyplot as plt

generator = torch.Generator().manual_seed(0)
angle = 1.5 * torch.pi * (1 + 2 * torch.rand(1000, generator=generator))
roll = torch.stack([angle * angle.cos(), angle * angle.sin()], 1) / 8
roll += 0.02 * torch.randn(roll.shape, generator=generator)

process = VP()
target = Empirical(roll, bandwidth=0.03, process=process)
solution = sdeflow.solve(target, solver="ddpm", nfe=100, n=1000, seeds=0, trajectory=True)
chain, times = solution.trajectory, [*solution.times, 0.0][: len(solution.trajectory)]

columns = [len(chain) - 1, next(i for i, t in enumerate(times) if process.nsr(t) < 0.3), 0]
axis = torch.linspace(-2.4, 2.4, 25)
points = torch.cartesian_prod(axis, axis)
figure, axes = plt.subplots(3, 3, figsize=(9, 9), sharex=True, sharey=True)
for column, i in enumerate(columns):
    t = max(float(times[i]), process.t_min)
    forward = target.sample(1000, seed=1, t=t)
    drift = -process.reverse_drift(points, t, target.score(points, t))  # backwards in time
    axes[0, column].scatter(*forward.T, s=1)
    axes[1, column].scatter(*chain[i].T, s=1)
    size = drift.norm(dim=1, keepdim=True)  # arrows of one length, their colour the size
    axes[2, column].quiver(*points.T, *(drift / size).T, size.log(), angles="xy", scale=28)
    axes[0, column].set_title(f"t = {t:.3f}")
for row, name in enumerate(("forward: x(t) of the data", "reverse: the chain", "reverse drift")):
    axes[row, 0].set_ylabel(name)
axes[0, 0].set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6))
figure.savefig("swiss_roll.png", dpi=120, bbox_inches="tight")

near = torch.cdist(chain[-1], roll).min(1).values
print(f"{chain.shape[0] - 1} steps, {solution.nfe} calls of the exact denoiser")
print(
    f"distance of the samples from the roll: median {near.median():.3f}, largest {near.max():.3f}"
)
