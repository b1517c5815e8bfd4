"""A training step as one CUDA graph: no Python between its kernels.

A step of a small network is some hundred kernels of a few microseconds each, and launching them
from Python takes longer than running them. The first steps run as they are, on a stream of their
own, so that every kernel is loaded and chosen; then one is recorded, and from then on each step is
a replay with new images, a new seed and a new learning rate in the same places.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sdeflow.errors import SdeflowError

Work = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""A step's work on the device: of images and labels, the loss and the gradients' norm."""

WARM = 3
"""Steps before the capture."""


class GraphedStep:
    """`work`, captured at its fourth call and replayed from then on.

    Images and labels keep their shapes.

    Its random numbers come from `generator` or the device's own generator, so that the seeds set
    before a replay determine them. Raises `SdeflowError` where the step cannot be captured.
    """

    def __init__(self, work: Work, generator: torch.Generator) -> None:
        self.work, self.generator = work, generator
        self.calls = 0
        self.stream = torch.cuda.Stream(generator.device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, pixels: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        """The loss and the norm, on the device; a replay overwrites those of the one before."""
        self.calls += 1
        if self.calls <= WARM:
            return self._aside(pixels, label)
        if self.graph is None:
            self._capture(pixels, label)
        assert self.graph is not None
        self.pixels.copy_(pixels, non_blocking=True)
        if self.label is not None and label is not None:
            self.label.copy_(label, non_blocking=True)
        self.graph.replay()
        return self.result

    def _aside(self, pixels: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = self.work(pixels, label)
        current.wait_stream(self.stream)
        return result

    def _capture(self, pixels: Tensor, label: Tensor | None) -> None:
        self.pixels, self.label = pixels.clone(), None if label is None else label.clone()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        try:
            # Other threads, such as NCCL's watchdog, may use the device during the capture.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.result = self.work(self.pixels, self.label)
        except RuntimeError as error:
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise SdeflowError(
                f"a step of this training cannot be captured in a CUDA graph ({why}); graphs=False"
                " (--no-graphs) trains without"
            ) from error
        self.graph = graph
