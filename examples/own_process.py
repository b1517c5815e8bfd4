"""A noising process of your own, in four lines; its SDE is derived, and every solver runs on it.

python examples/own_process.py
"""

import torch

import sdeflow
from sdeflow import Gaussian, Process


class Trigonometric(Process):
    t_max = 0.999  # at t = 1 no signal is left

    def s(self, t: torch.Tensor) -> torch.Tensor:
        return torch.cos(t * torch.pi / 2)

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return torch.sin(t * torch.pi / 2)


process = Trigonometric()
print("    t        f      g^2      nsr")
for t in (0.1, 0.5, 0.9):
    print(f"{t:>5}  {process.f(t):>7.3f}  {process.g2(t):>7.3f}  {process.nsr(t):>7.3f}")

target = Gaussian(torch.zeros(3), std=[0.2, 0.5, 1.0], process=process)
for solver in ("heun", "ddpm"):
    x = sdeflow.sample(target, solver=solver, nfe=101, n=4000, seeds=0)
    print(
        f"{solver:>6}: standard deviations {[round(v, 3) for v in x.double().std(0).tolist()]},"
        " should be [0.2, 0.5, 1.0]"
    )
