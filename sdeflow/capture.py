"""A whole solve as one CUDA graph: network and solver recorded once, then replayed without Python between the calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sdeflow.denoiser import Denoiser
from sdeflow.errors import SolverError
from sdeflow.instructions import Draw
from sdeflow.noise import Noise
from sdeflow.plan import Plan
from sdeflow.reverse import Reverse


class CapturedSolve:
    """A plan around a network, captured in a CUDA graph: `solve(x, noise)` replays it.

        solve = CapturedSolve(plan, denoiser, x)
        samples = solve(x)                       # or solve(x, noise), where the plan draws

    `x` (`[B, *shape]`, on the device) gives shape and dtype; `condition` is fixed at the capture, and its tensors are read anew
    at each replay, so that new values can be copied into them. A replay is bit for bit what `plan.execute` gives with the same
    start and noise. Draws are made before the replay, into buffers of their own, since they come from generators on the CPU.

    The network must be capturable: static shapes, no wait for the device, no memory of its own allocated on the CPU.

    Memory: the network's, the plan's `buffers`, and one state a draw. Errors: `SolverError` without CUDA, for a plan through
    which gradients flow, or where the network cannot be captured (with the reason).
    """

    def __init__(self, plan: Plan, denoiser: Denoiser, x: Tensor, condition: Mapping[str, Any] | None = None):
        if not x.is_cuda:
            raise SolverError(f"a CUDA graph needs a state on a CUDA device; this one is on {x.device}")
        if plan.differentiable:
            raise SolverError("gradients flow through this plan's numbers: execute it instead of capturing it")
        self.plan = plan
        self._x = x.clone()
        self._drawn = _Drawn(plan, x)
        reverse = Reverse(denoiser, condition)
        try:
            with torch.no_grad(), torch.cuda.device(x.device):
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):  # off the graph first, so that every kernel is loaded and chosen,
                    self._run(reverse)
                    with _no_waiting():  # and again, since a capture that fails leaves the device's generator unusable
                        self._run(reverse)
                torch.cuda.current_stream().wait_stream(side)
                networks = reverse.calls(
                    plan.times, self._x
                )  # their numbers are on the device before the capture begins
                torch.cuda.synchronize()
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph):
                    self._result = self._run(reverse, networks)
        except RuntimeError as error:
            raise SolverError(
                f"this network cannot be captured in a CUDA graph ({str(error).splitlines()[0]}): it must have static shapes "
                "and may not wait for the device. plan.execute runs it without a capture"
            ) from error
        # What the graph reads must live as long as it does.
        self._held = (reverse, networks)

    def _run(self, reverse: Reverse, networks: Any = None) -> Tensor:
        self._drawn.rewind()
        return self.plan.execute(reverse, self._x, self._drawn, networks=networks)[0]

    def __call__(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """The result for the start `x`, a tensor of its own."""
        if x.shape != self._x.shape:
            raise ValueError(f"captured for states of shape {tuple(self._x.shape)}; got {tuple(x.shape)}")
        self._drawn.fill(noise)
        self._x.copy_(x)
        self._graph.replay()
        return self._result.clone()


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Whatever waits for the device raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class _Drawn(Noise):
    """Buffers that hold the draws of a plan, in order."""

    def __init__(self, plan: Plan, x: Tensor):
        self.seeds, self.shape = (), tuple(x.shape[1:])
        self._draws = [i for i in plan.instructions if isinstance(i, Draw)]
        self._buffers = [torch.zeros_like(x) for _ in self._draws]
        self._at = 0

    def rewind(self) -> None:
        self._at = 0

    def fill(self, noise: Noise | None) -> None:
        if self._draws and noise is None:
            raise SolverError("this plan draws noise: give it a source of noise, solve(x, noise)")
        for draw, buffer in zip(self._draws, self._buffers, strict=True):
            assert noise is not None
            buffer.copy_(noise.draw(draw.nsr, draw.nsr_next))

    def start(self) -> Tensor:
        raise SolverError("the start of a captured solve is given")

    def draw(self, nsr: float | None = None, nsr_next: float | None = None, *, out: Tensor | None = None) -> Tensor:
        self._at += 1
        return self._buffers[self._at - 1]
