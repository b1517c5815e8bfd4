"""A complete solve as one CUDA graph.

Network and solver are captured once, then replayed without Python between the calls.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdeflow._utils.memory import out_of_memory
from sdeflow.denoisers import Denoiser
from sdeflow.errors import SolverError
from sdeflow.noise import Noise
from sdeflow.plan.instructions import Call, Draw
from sdeflow.plan.plan import Plan
from sdeflow.reverse import Reverse


class Replay(NamedTuple):
    """The result of a replay, in new tensors: the device may still be at work on them."""

    x: Tensor
    trajectory: Tensor | None
    """The state at every level and the result, `[levels, B, *shape]`, where the plan records it."""
    x0s: Tensor | None
    """The prediction of each call, `[nfe, B, *shape]`, where it was asked for."""
    finite: Tensor
    """Whether all of `x` is finite: one boolean on the device."""


class CapturedSolve:
    """A plan around a network, captured in a CUDA graph: `solve(x, noise)` replays it.

        solve = CapturedSolve(plan, denoiser, x)
        samples = solve(x)                       # or solve(x, noise), where the plan draws

    `x` (`[B, *shape]`, on the device) gives shape and dtype. `condition` is fixed at the capture,
    but its tensors are read again at each replay: copy new values into them, or pass `condition=`
    to have them copied. A replay gives bit for bit what `plan.execute` gives with the same start
    and noise. Draws are made before the replay, into buffers, since they come from generators on
    the CPU. A plan traced with `record=True` keeps its trajectory, and `x0s=True` the prediction at
    each call, in buffers of the graph: `replay` returns them. Threads may share it; they take
    turns.

    The network must be capturable: static shapes, no wait for the device, no allocation on the CPU.
    Numbers that it reads from Python are those of the capture.

    Memory: the network's, the plan's `buffers`, one state a draw, and one for each state or
    prediction kept; `bytes` is what the graph reserves. Errors: `SolverError` without CUDA, for a
    plan through which gradients flow, or where the network cannot be captured (with the reason);
    `torch.OutOfMemoryError` as it is.
    """

    def __init__(
        self,
        plan: Plan,
        denoiser: Denoiser,
        x: Tensor,
        condition: Mapping[str, Any] | None = None,
        *,
        x0s: bool = False,
    ):
        reason = self.refusal(x.device, plan)
        if reason is not None:
            raise SolverError(reason)
        self.plan = plan
        self.condition = dict(condition or {})
        self.bytes = 0
        self._x0s: list[Tensor] = []
        self._watch = self._keep if x0s else None
        self._turn = threading.Lock()
        # The buffers are written at each replay, in inference mode or not.
        with torch.inference_mode(False), torch.no_grad():
            self._x = x.clone()
            self._drawn = _Draws(plan, x)
            self._capture(Reverse(denoiser, self.condition))

    @classmethod
    def refusal(cls, device: torch.device, plan: Plan | None = None) -> str | None:
        """Why this plan, or any plan, cannot be captured on a device; None where it can."""
        if device.type != "cuda":
            return f"a CUDA graph needs a state on a CUDA device; this one is on {device}"
        if plan is not None and plan.differentiable:
            return "gradients flow through this plan's numbers: execute it instead of capturing it"
        return None

    def _capture(self, reverse: Reverse) -> None:
        device = self._x.device
        try:
            # A failed capture may leave its own stream current: restore the present one.
            present = torch.cuda.current_stream(device)
            with _CAPTURING, torch.cuda.device(device), torch.cuda.stream(present):
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    # First without a graph, so that every kernel is loaded and chosen. Then again,
                    # refusing to wait: a failed capture would make the generator unusable.
                    self._run(reverse)
                    with _no_waiting():
                        self._run(reverse)
                torch.cuda.current_stream().wait_stream(side)
                # Their numbers are on the device before the capture begins.
                networks = reverse.calls(self.plan.times, self._x)
                self._x0s.clear()
                torch.clear_autocast_cache()  # the graph must not read weights that autocast cast
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                reserved = torch.cuda.memory_reserved(device)
                self._graph = torch.cuda.CUDAGraph()
                # Other threads may use the device during the capture.
                with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
                    self._result, recorded = self._run(reverse, networks)
                    self._finite = torch.isfinite(self._result).all()
                self.bytes = max(torch.cuda.memory_reserved(device) - reserved, 0)
                self._done = torch.cuda.Event()
        except RuntimeError as error:
            exhausted = _out_of_memory_behind(error)
            if exhausted is not None:
                raise exhausted from None
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise SolverError(
                f"this network cannot be captured in a CUDA graph ({why}): it must have static"
                " shapes and may not wait for the device. plan.execute runs it without a capture"
            ) from error
        finally:
            torch.clear_autocast_cache()  # which may hold tensors in the graph's memory
        self._states = [*recorded, self._result] if recorded and self.plan.finished else recorded
        # What the graph reads must live as long as it does.
        self._held = (reverse, networks)

    def _run(self, reverse: Reverse, networks: Any = None) -> tuple[Tensor, list[Tensor]]:
        self._drawn.rewind()
        self._x0s.clear()
        return self.plan.execute(reverse, self._x, self._drawn, self._watch, networks)

    def _keep(self, number: int, call: Call, x: Tensor, x0: Tensor) -> None:
        self._x0s.append(x0.clone())

    def __call__(
        self, x: Tensor, noise: Noise | None = None, condition: Mapping[str, Any] | None = None
    ) -> Tensor:
        """The result for the start `x`, a tensor of its own."""
        return self.replay(x, noise, condition).x

    def replay(
        self, x: Tensor, noise: Noise | None = None, condition: Mapping[str, Any] | None = None
    ) -> Replay:
        """The results of a replay from `x`.

        The tensors of `condition` are copied into those of the capture.
        """
        if x.shape != self._x.shape:
            raise ValueError(
                f"captured for states of shape {tuple(self._x.shape)}; got {tuple(x.shape)}"
            )
        with torch.no_grad(), self._in_turn():
            self._drawn.fill(noise)
            self._x.copy_(x, non_blocking=True)
            for name, value in (condition or {}).items():
                self._set_condition(name, value)
            self._replay()
            trajectory = torch.stack(self._states) if self._states else None
            x0s = torch.stack(self._x0s) if self._x0s else None
            return Replay(self._result.clone(), trajectory, x0s, self._finite.clone())

    def _set_condition(self, name: str, value: Any) -> None:
        held = self.condition.get(name)
        if not isinstance(held, Tensor):
            if name not in self.condition or isinstance(value, Tensor) or held != value:
                raise ValueError(
                    f"the condition {name!r} is fixed at the capture, as {held!r}; got another"
                    " value"
                )
        elif not isinstance(value, Tensor) or value.shape != held.shape:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f"the condition {name!r} was captured with shape {tuple(held.shape)}; got {got}"
            )
        elif held is not value:
            held.copy_(value, non_blocking=True)

    def _replay(self) -> None:
        self._graph.replay()

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        """One replay after the other, from any thread or stream, since they share buffers."""
        with self._turn, torch.cuda.device(self._x.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(stream)


_CAPTURING = threading.RLock()  # CUDA graphs are captured one at a time in a process


def _out_of_memory_behind(error: BaseException | None) -> BaseException | None:
    """The out-of-memory error that caused another, which the end of a failed capture raises."""
    while error is not None and not out_of_memory(error):
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def _no_waiting() -> Iterator[None]:
    """An operation that waits for the device raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class _Draws(Noise):
    """Buffers with the draws of a plan, in order."""

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
            if noise.in_place:
                noise.draw(draw.nsr, draw.nsr_next, out=buffer)
            else:
                buffer.copy_(noise.draw(draw.nsr, draw.nsr_next))

    def start(self) -> Tensor:
        raise SolverError("the start of a captured solve is given")

    def draw(
        self, nsr: float | None = None, nsr_next: float | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        self._at += 1
        return self._buffers[self._at - 1]
