"""A mixture of Gaussians with its exact score, sampled by four solvers: who gets the weights and
the widths right?

python examples/mixture.py
"""

import sdeflow
from sdeflow import VP, GaussianMixture

target = GaussianMixture([0.3, 0.7], [[-1.0, 0.0], [1.0, 0.0]], std=[0.2, 0.1], process=VP())

print(f"{'solver':>15}  NFE  weight   std left  std right")
print(f"{'the target':>15}       {0.7:.3f}    {0.2:.3f}     {0.1:.3f}")
for solver, nfe in (("ddim", 20), ("heun", 35), ("ddpm", 35), ("euler_maruyama", 200)):
    solution = sdeflow.solve(target, solver=solver, nfe=nfe, n=2000, seeds=0)
    x, y = solution.x.double().unbind(1)
    right = x > 0
    print(
        f"{solver:>15}  {solution.nfe:>3}  {right.double().mean():.3f}    {y[~right].std():.3f}    "
        f" {y[right].std():.3f}"
    )
