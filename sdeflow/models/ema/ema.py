r"""The exponential moving average of a network's parameters: the network that is sampled from.

$\bar\theta \leftarrow \beta\,\bar\theta + (1 - \beta)\,\theta$ with $\beta = 2^{-B/h}$ after a
batch of B images, so the half-life h is counted in images and does not change with the batch size.
While few images n have been seen, h is at most `warmup * n`: the start is forgotten
quickly.

Source. Karras et al. 2022, appendix F.3 (half-life and its ramp).
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn


class EMA:
    """An average in float32 of the parameters of `network`, on their device.

    `half_life` and the `images` of `update` are counted in training images; `warmup` is
    the largest half-life as a fraction of the images seen so far. Raises `ValueError` for numbers
    that are not positive.
    """

    def __init__(
        self, network: nn.Module, half_life: float = 500_000, warmup: float = 0.05
    ) -> None:
        for name, value in (("half_life", half_life), ("warmup", warmup)):
            if not value > 0:  # infinity is allowed
                raise ValueError(f"{name} of an EMA is a positive number; got {value!r}")
        self.half_life, self.warmup = half_life, warmup
        self.parameters = {
            name: p.detach().clone().float() for name, p in network.named_parameters()
        }

    def decay(self, images: int, batch: int) -> float:
        """The factor that the old average keeps after a batch.

        The batch has `batch` images and ends at image number `images`.
        """
        return 0.5 ** (batch / max(min(self.half_life, self.warmup * images), 1e-8))

    @torch.no_grad()
    def update(self, network: nn.Module, images: int, batch: int) -> None:
        """Take in the parameters of `network`.

        It has now seen `images` images, the last `batch` of them in this step.
        """
        new = [p.detach() for p in network.parameters()]
        torch._foreach_lerp_(list(self.parameters.values()), new, 1 - self.decay(images, batch))

    @torch.no_grad()
    def copy_to(self, network: nn.Module) -> None:
        """Write the average into `network`."""
        for name, parameter in network.named_parameters():
            parameter.copy_(self.parameters[name])

    def averaged(self, network: nn.Module) -> nn.Module:
        """A copy of `network` with the averaged parameters.

        It is in evaluation mode and without gradients.
        """
        other = deepcopy(network).eval().requires_grad_(False)
        self.copy_to(other)
        return other

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged parameters by name."""
        return dict(self.parameters)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Read what `state_dict` gave; raises `ValueError` if the names differ."""
        if set(state) != set(self.parameters):
            strange = sorted(set(state) ^ set(self.parameters))
            raise ValueError(
                "this average belongs to another network; names that differ:"
                f" {', '.join(strange[:5])}"
            )
        for name, value in state.items():
            self.parameters[name].copy_(value)
