"""Forward paths of a process, and the arc between two noises."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sdeflow import registry
from sdeflow.errors import GridError
from sdeflow.noise import BrownianNoise, seeds_of
from sdeflow.process import Process
from sdeflow.sampling.inputs import fresh_seeds
from sdeflow.solvers.base import check_times


def simulate(
    process: Process | str,
    x0: Tensor,
    times: Tensor | Sequence[float],
    seeds: int | Sequence[int] | None = None,
) -> Tensor:
    r"""Paths of the forward SDE from data: the states at `times`, `[len(times), n, *shape]`.

    A path is that of one Brownian motion $W$ in the clock nsr^2, which the seed alone fixes:

        x(t) = s(t) (x0 + W(nsr(t)^2))

    Each state is exact in law, given the one before it, whatever the distance between the times;
    with the same seed, other times see the same path. Where no signal is left (`s = 0`) the state
    is `sigma` times a fresh draw.

    - `x0`: data, `[n, *shape]`, floating; the states have its dtype and device.
    - `times`: strictly increasing, from 0 (the data itself, where the process has no noise there)
      to `t_max`.
    - `seeds`: one a sample, or the first of `n` consecutive ones; by default fresh ones.

    Errors: `TypeError` for data that is no floating tensor, `GridError` for times that do not
    increase or are none of the process.

    Source: the Gaussian transition of the linear SDE (Song et al. 2021, appendix B).
    """
    process = registry.process(process)
    if not isinstance(x0, Tensor) or x0.ndim < 1 or not x0.is_floating_point():
        raise TypeError("x0 is data, a floating-point tensor of shape [n, *shape]")
    grid = check_times(times)
    levels = process.levels(grid.detach())
    if len(grid) > 1 and grid[-1] < grid[0]:
        raise GridError("simulate runs from data to noise: give times that increase")
    if not float(grid[0]) >= 0.0 or float(grid[-1]) > process.t_max:
        raise GridError(
            f"{type(process).__name__} has times from 0 to t_max={process.t_max:g}; got"
            f" {float(grid[0]):g} to {float(grid[-1]):g}"
        )
    ratios = [0.0, *(float(level.nsr) for level in levels)]
    for k, (a, b) in enumerate(pairwise(ratios)):
        if not b >= a:
            raise GridError(
                f"nsr must not fall with time, and at times[{k}]={float(grid[k]):g} it is {b:g}"
                f" after {a:g}: {type(process).__name__} is no noising process there"
            )
    each = fresh_seeds(len(x0)) if seeds is None else seeds_of(seeds, len(x0))
    # In half precision the sum of many steps would lose them.
    wide = torch.promote_types(x0.dtype, torch.float32)
    noise = BrownianNoise(each, x0.shape[1:], device=x0.device, dtype=wide)
    state, out = x0.to(wide), []  # x / s
    for (a, b), level in zip(pairwise(ratios), levels, strict=True):
        if level.s == 0.0:
            out.append((noise.draw(b, a) * level.sigma).to(x0.dtype))
            continue
        if b > a:
            state = state + noise.draw(b, a) * ((b - a) * (b + a)) ** 0.5
        out.append((state * level.s).to(x0.dtype))
    return torch.stack(out)


def slerp(a: Tensor, b: Tensor, weight: float | Tensor) -> Tensor:
    r"""The arc from `a` to `b`, sample by sample: what to mix noises by, whose length it keeps.

        slerp = (sin((1 - w) angle) a + sin(w angle) b) / sin(angle)

    with the angle between the two over all entries of a sample. Of independent standard normals it
    is a standard normal at every `w`, as nearly as they are orthogonal and equally long; the mean
    of two of them (`torch.lerp`) has half their variance.

    - `a`, `b`: of one shape `[n, *shape]`. `weight`: a number, or several, `[K]`: the result then
      is `[K, n, *shape]`. 0 gives `a`, 1 gives `b`.

    Errors: `ValueError` for shapes that differ, and for samples that point in opposite directions,
    between which no arc is the shortest.

    Source: Shoemake, "Animating rotation with quaternion curves" (1985).
    """
    if a.shape != b.shape or a.ndim < 1 or not (a.is_floating_point() and b.is_floating_point()):
        raise ValueError(
            "slerp takes two floating tensors of one shape [n, *shape]; got"
            f" {tuple(a.shape)} and {tuple(b.shape)}"
        )
    dtype = torch.promote_types(a.dtype, b.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    one, other = (x.to(wide).reshape(len(x), -1) for x in (a, b))
    tiny = torch.finfo(wide).tiny
    units = [
        x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=tiny) for x in (one, other)
    ]
    # Accurate at small angles too, where acos is not.
    apart, together = (torch.linalg.vector_norm(units[0] + c * units[1], dim=1) for c in (-1, 1))
    angle = 2.0 * torch.atan2(apart, together)
    if bool((angle > torch.pi - 1e-4).any()):
        row = int((angle > torch.pi - 1e-4).nonzero()[0])
        raise ValueError(
            f"the samples number {row} point in opposite directions, and no arc between them is the"
            " shortest: change one of them a little"
        )
    angle = angle.clamp(min=1e-4).unsqueeze(1)  # equal directions: the straight line
    w = torch.as_tensor(weight, dtype=wide, device=a.device)
    if w.ndim > 1:
        raise ValueError(f"weight is a number or a vector of them; got shape {tuple(w.shape)}")
    w = w.reshape(*w.shape, 1, 1)
    mixed = (torch.sin((1.0 - w) * angle) * one + torch.sin(w * angle) * other) / torch.sin(angle)
    return mixed.reshape(*w.shape[:-2], *a.shape).to(dtype)
