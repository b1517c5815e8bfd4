"""A table of betas whose entries are parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdeflow.process.base import Process
from sdeflow.process.from_betas import FromBetas


class LearnedBetas(Process):
    r"""The process of a table $\beta_1 \dots \beta_T$ that is trained: `beta = sigmoid(logits)`.

    `logits` (float64 `[T]`, `requires_grad`) are the parameters. Gradients flow through `s` and
    `sigma`, so that `variational_bound(..., requires_grad=True)` trains the table, with a network
    or alone. The entries lie at the times `i / T`; between them `-log s` is linear in time.
    `frozen()` is the table as a process of numbers, to sample with.

    Errors: `ValueError` where a beta is outside (0, 1). Source: Ho et al. 2020, section 2 (betas
    "learned by reparameterization").
    """

    default_grid = "quadratic"

    def __init__(self, betas: Sequence[float] | Tensor):
        table = torch.as_tensor(betas, dtype=torch.float64).detach().clone()
        if table.ndim != 1 or not len(table) or not bool(((table > 0) & (table < 1)).all()):
            raise ValueError("a table of betas is a vector with every entry inside (0, 1)")
        self.logits = torch.logit(table).requires_grad_()
        self.t_min, self.t_max = 1.0 / len(table), 1.0

    def __repr__(self) -> str:
        return f"LearnedBetas({len(self.logits)} betas)"

    @property
    def betas(self) -> Tensor:
        """The table, `[T]`, with its gradient."""
        return torch.sigmoid(self.logits)

    def frozen(self) -> FromBetas:
        """The table as it is now, as a process of numbers."""
        return Process.from_betas(self.betas.detach())

    def _decay(self, t: Tensor) -> Tensor:
        """`-log s(t)`."""
        n = len(self.logits)
        # log(1 - beta) = -softplus(logit)
        steps = 0.5 * torch.nn.functional.softplus(self.logits)
        nodes = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])
        nodes = nodes.to(t.device, t.dtype)
        i = (t.detach() * n * (1 + 1e-15)).floor().long().clamp(0, n - 1)
        return nodes[i] + (t * n - i) * (nodes[i + 1] - nodes[i])

    def s(self, t: Tensor) -> Tensor:
        """Square root of the product of `1 - beta`."""
        return torch.exp(-self._decay(t))

    def variance(self, t: Tensor) -> Tensor:
        """`1 - s^2`, without cancellation."""
        return -torch.expm1(-2.0 * self._decay(t))

    def sigma(self, t: Tensor) -> Tensor:
        """`sqrt(1 - s^2)`."""
        return self.variance(t).sqrt()
