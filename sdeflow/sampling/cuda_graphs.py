"""`compile=True`: batches run as replays of captured CUDA graphs.

Graphs are kept between calls. Where there can be none, a warning says why.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager
from copy import copy
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from sdeflow._utils.weak_cache import WeakTable
from sdeflow.denoisers import Denoiser, as_denoiser
from sdeflow.denoisers.network import HALF
from sdeflow.errors import SolverError
from sdeflow.noise import Noise
from sdeflow.plan.plan import Plan
from sdeflow.process import Process
from sdeflow.reverse import Spent
from sdeflow.sampling.capture import CapturedSolve
from sdeflow.sampling.request import Request
from sdeflow.solvers.base import GridSolver, Solution, Solver

KEPT = 4
"""Captured graphs that are kept between calls; each reserves the memory of its network's
forward.
"""


class CompileWarning(UserWarning):
    """A solve with `compile=True` runs without CUDA graphs; the message says why."""


_GRAPHS: WeakTable[CapturedSolve | str] = WeakTable(KEPT)
"""Captured solves, or the reasons why there are none, by what was sampled from and by what a
capture fixes.
"""


def forget(score_fn: Any = None) -> None:
    """Free the captured graphs of a denoiser (the object that was passed to `sample`), or of all.

    They are freed without this when the denoiser is, and when newer ones take their place.
    """
    _GRAPHS.forget(score_fn)


class GraphCache:
    """Runs the batches of one solve as replays of CUDA graphs, and captures those that are missing.

    It is true as long as graphs are used. They are kept for `request.score_fn`; `denoiser` is what
    that means under the solve's process. `announce(text)` is entered during a capture.
    """

    def __init__(
        self,
        request: Request,
        denoiser: Denoiser,
        process: Process | None,
        announce: Callable[[str], AbstractContextManager[None]],
    ):
        self.asked, self.required = bool(request.compile), request.compile == "require"
        self.captures = self.replays = self.bytes = 0
        self.reason: str | None = None
        self._score_fn, self._x0s = request.score_fn, request.x0s
        self._denoiser, self._process, self._announce = denoiser, process, announce
        # The denoiser's capture_key, which does not change during a solve.
        self._known: Hashable = None
        # The graphs of a score function for which none can be kept between calls.
        self._own: dict[Hashable, CapturedSolve | str] = {}

    def __bool__(self) -> bool:
        return self.asked and self.reason is None

    def refuse(self, reason: str | None) -> None:
        """Run without graphs from here on, with one warning that gives the reason.

        If graphs are required, that is an error.
        """
        if not self or reason is None:
            return
        if self.required:
            raise SolverError(f"compile='require', and this solve cannot be compiled: {reason}")
        self.reason = reason
        warnings.warn(
            f"this solve runs without compilation: {reason}", CompileWarning, stacklevel=_outside()
        )

    def solve(
        self, plan: Plan, x: Tensor, condition: Mapping[str, Any], noise: Noise
    ) -> tuple[Solution, Tensor] | None:
        """The solution of a batch; None if it cannot be captured.

        Beside it, on the device, whether it is finite.
        """
        reason = CapturedSolve.refusal(x.device, plan)
        captured = reason if reason is not None else self._graph(plan, x, condition)
        if isinstance(captured, str):
            self.refuse(captured)
            return None
        self.replays += 1
        self.bytes = max(self.bytes, captured.bytes)
        replay = captured.replay(x, noise, condition)
        spent = Spent().add(self._denoiser, condition, plan.times)
        solution = Solution(
            replay.x,
            plan.nfe,
            spent.forwards,
            spent.gradients,
            plan=plan,
            trajectory=replay.trajectory,
            x0s=replay.x0s,
            statistics={"draws": plan.draws, "buffers": plan.buffers},
        )
        return solution, replay.finite

    def _graph(self, plan: Plan, x: Tensor, condition: Mapping[str, Any]) -> CapturedSolve | str:
        if self._known is None:
            self._known = capture_key(self._denoiser)
        key = (plan, _layout(x), _fixed(condition), self._x0s, *_settings(), self._known)
        known = self._own.get(key) or _GRAPHS.get(self._score_fn, key)
        if known is not None:
            return known
        twin = _twin(self._score_fn)
        denoiser = self._denoiser if twin is None else as_denoiser(twin, self._process)
        found: CapturedSolve | str
        try:
            with self._announce(f"capturing {plan.nfe} calls at batch {len(x)}"):
                found = CapturedSolve(plan, denoiser, x, _buffers(condition), x0s=self._x0s)
            self.captures += 1
        except SolverError as error:
            found = str(error)
        if twin is None:
            self._own[key] = found
        else:
            _GRAPHS.put(self._score_fn, key, found)
        return found

    def release(self) -> None:
        """Free all captured graphs, of every denoiser: there is no memory left."""
        self._own.clear()
        forget()

    def statistics(self) -> dict[str, Any]:
        """What `Solution.statistics` says of it."""
        if not self.asked:
            return {}
        if self.reason is not None:
            return {"compiled": f"no: {self.reason}"}
        return {"compiled": "yes", "captures": self.captures, "replays": self.replays}


def refusal(
    method: Solver | Plan, device: torch.device, request: Request, condition: Mapping[str, Any]
) -> str | None:
    """Why a solve cannot run as CUDA graphs, as far as is known before it begins; else None."""
    if request.callback is not None:
        return "a callback wants to be called between the network's calls"
    if request.requires_grad:
        return "gradients are to flow through it"
    if not isinstance(method, Plan) and not is_planned(method):
        why = getattr(method, "without_plan", None)
        why = why or f"{type(method).__name__} looks at the state to choose its steps"
        return f"{why}, so that it has no plan to capture"
    for name, value in condition.items():
        if not isinstance(value, Tensor) and not _plain(value):
            return (
                f"the condition {name!r} is a {type(value).__name__}; only tensors, numbers and"
                " strings can be held fixed"
            )
    return CapturedSolve.refusal(device)


def is_planned(method: Solver) -> bool:
    """Whether a solver is executed as a plan, and does nothing else."""
    return isinstance(method, GridSolver) and method.without_plan is None


# ----------------------------------------------------------------------- what is fixed at a capture


def capture_key(value: Any) -> Hashable:
    """What a capture fixes of a denoiser: its numbers, and the places of its tensors in memory.

    Weights may change in place: a graph reads them again. Python attributes of modules, and what
    functions close over, are not part of the key.
    """
    match value:
        case None | bool() | int() | float() | str():
            return type(value), value
        case Tensor():
            version = 0 if value.is_inference() else value._version
            return "tensor", value.data_ptr(), version, *_layout(value)
        case nn.Module():
            return "module", id(value), *_places(value)
        case Denoiser():
            return type(value), *(capture_key(entry) for entry in sorted(vars(value).items()))
        case FunctionType():
            return "function", id(value)  # which the key must not keep alive
        case tuple() | list():
            return "sequence", *map(capture_key, value)
        case dict():
            return "mapping", *((name, capture_key(entry)) for name, entry in value.items())
    try:
        hash(value)
    except TypeError:
        return type(value), id(value)
    return type(value), value


def _places(network: nn.Module) -> Iterator[int]:
    """What of a network's modules a graph depends on.

    The places of their tensors in memory, which are in training, and which are compiled.
    """
    for module in network.modules():
        yield module.training
        yield id(module._compiled_call_impl)  # of Module.compile()
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    yield tensor.data_ptr()


def _layout(x: Tensor) -> tuple[Hashable, ...]:
    return tuple(x.shape), x.stride(), x.dtype, x.device


def _plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def _fixed(condition: Mapping[str, Any]) -> Hashable:
    """A condition but for the values of its tensors."""
    key = {n: _layout(v) if isinstance(v, Tensor) else capture_key(v) for n, v in condition.items()}
    return tuple(sorted(key.items()))


def _buffers(condition: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of a condition's tensors, to be overwritten later, in inference mode or not."""
    with torch.inference_mode(False), torch.no_grad():
        return {n: v.clone() if isinstance(v, Tensor) else v for n, v in condition.items()}


def _settings() -> Iterator[Hashable]:
    """The settings that choose kernels."""
    yield HALF.get()
    yield torch.is_autocast_enabled("cuda")
    yield torch.get_autocast_dtype("cuda")
    yield torch.are_deterministic_algorithms_enabled()
    try:
        yield torch.get_float32_matmul_precision()
    except RuntimeError:  # set by torch's newer switches, which this function cannot read
        yield None


def _twin(score_fn: Any) -> Any:
    """A shallow copy for a graph to hold; None where there is none.

    The original can then be freed, and the graph with it.
    """
    if isinstance(score_fn, FunctionType):
        f = score_fn
        twin = FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, f.__closure__)
        twin.__kwdefaults__ = score_fn.__kwdefaults__
        twin.__dict__.update(score_fn.__dict__)
        return twin
    if not isinstance(score_fn, Denoiser):
        return None
    other = copy(score_fn)
    return None if other is score_fn else other


def _outside() -> int:
    """How far up the stack the caller's code begins, for a warning."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] == "sdeflow":
        frame, level = frame.f_back, level + 1
    return level
