"""A process with its time reversed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdeflow.process.base import Process


@dataclass(frozen=True)
class Reversed(Process):
    """A process that is written with noise at small times, read the other way:
    `s(t) = process.s(total - t)`, `sigma(t) = process.sigma(total - t)`.

    `total` is by default `t_min + t_max`, so that the times stay between the same two. The last
    thousandth of them is left out where no noise would be left at `t_min`. Networks, score
    functions and `time=` functions are given the time before the reversal, `total - t`; a predicted
    velocity is taken along that time. All else (`t=`, grids, `Solution.times`) is in the new time.

        class Flow(Process):                       # as flow matching writes it
            def s(self, t): return t
            def sigma(self, t): return 1 - t

        Prediction(network, "velocity", Flow().reversed())

    Errors: `ValueError` where the process already has its data at small times.
    """

    process: Process
    total: float
    t_min: float = field(init=False)
    t_max: float = field(init=False)

    @torch.inference_mode(False)
    def __post_init__(self) -> None:
        ends = (self.total - self.process.t_max, self.total - self.process.t_min)
        low, high = ends
        s, sigma = (c.tolist() for c in self.kernel(torch.tensor(ends, dtype=torch.float64)))
        if not sigma[0] * s[1] < sigma[1] * s[0]:
            raise ValueError(
                f"{self.process!r} has its data at small times, as it should: use it as it is"
            )
        if not sigma[0] > 1e-12 * s[0]:
            low += 1e-3 * (high - low)
        object.__setattr__(self, "t_min", low)
        object.__setattr__(self, "t_max", high)

    def s(self, t: Tensor) -> Tensor:
        """`process.s(total - t)`."""
        return self.process.s(self.total - t)

    def sigma(self, t: Tensor) -> Tensor:
        """`process.sigma(total - t)`."""
        return self.process.sigma(self.total - t)

    def variance(self, t: Tensor) -> Tensor:
        """`process.variance(total - t)`."""
        return self.process.variance(self.total - t)

    def network_time(self, t: Tensor) -> Tensor:
        """`total - t`, the time in which the process was written."""
        return self.total - t
