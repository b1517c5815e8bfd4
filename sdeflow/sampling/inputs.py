"""Where a solve starts: the number and shape of the samples, their seeds, states and conditions."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from operator import index
from typing import Any

import torch
from torch import Tensor

from sdeflow._utils.checks import whole_number
from sdeflow._utils.math import transformed
from sdeflow.denoisers import Denoiser
from sdeflow.denoisers.condition import cut, plain, prepared
from sdeflow.errors import NonFiniteError
from sdeflow.noise import Noise
from sdeflow.process import Process
from sdeflow.sampling.request import Request


class Inputs:
    """Where the solve starts: shape, number, seeds, device and dtype, and the states themselves."""

    def __init__(self, denoiser: Denoiser, request: Request):
        shape, n, seeds, t = request.shape, request.n, request.seeds, request.t
        x, x0, device, dtype = request.x, request.x0, request.device, request.dtype
        given = x if x is not None else x0
        if x is not None and x0 is not None:
            raise ValueError("start from a state x or from data x0, not from both")
        if x0 is not None and t is None:
            raise ValueError(
                "x0= starts from data noised to a time: say which, t=0.5 (its noise level is the"
                " strength)"
            )
        if t is not None and given is None:
            raise ValueError(
                "t= is the time of a state x= (or of data x0= noised to it): give one of them"
            )
        if given is not None and (
            not isinstance(given, Tensor) or given.ndim < 1 or not given.is_floating_point()
        ):
            raise TypeError("x and x0 are floating-point tensors of shape [n, *shape]")
        if given is not None and not (transformed(given) or bool(torch.isfinite(given).all())):
            raise NonFiniteError("the state to start from holds NaN or infinity")
        if given is not None and denoiser.shape not in (None, tuple(given.shape[1:])):
            raise ValueError(
                f"samples of this model have the shape {denoiser.shape}; x and x0 add a batch in"
                f" front: got {tuple(given.shape)}"
            )
        number = isinstance(t, Real) or (isinstance(t, Tensor) and t.ndim == 0)
        if t is not None and not number:
            raise TypeError(f"t is one number for all samples; got {t!r}")
        known = tuple(given.shape[1:]) if given is not None else denoiser.shape
        if shape is not None:
            sizes = [shape] if isinstance(shape, Integral) else shape
            asked = tuple(whole_number("shape", size) for size in sizes)
            if known is not None and asked != known:
                raise ValueError(
                    f"shape is that of one sample, without the batch: {known} here, not {asked}; n="
                    " says how many"
                )
            known = asked
        if known is None:
            raise ValueError(
                "this model does not know its shape: pass shape= of one sample, without the batch,"
                " such as shape=(3, 32, 32)"
            )
        if isinstance(seeds, Tensor):
            seeds = seeds.tolist()
        if seeds is not None and not hasattr(seeds, "__len__"):
            try:
                seeds = index(seeds)  # whatever kind of integer it is
            except TypeError as error:
                raise TypeError(
                    f"seeds are integers, one a sample, or the first of n; got {seeds!r}"
                ) from error
        # A state made in inference mode could not be differentiated by a network.
        x, x0 = (g.clone() if g is not None and g.is_inference() else g for g in (x, x0))
        self.shape, self.x, self.x0 = known, x, x0
        self.n = _count(n, seeds, given)
        self.seeds = _seeds(seeds, self.n)
        place = device_of(denoiser) if given is None else given.device
        self.device = place if device is None else check_device(device)
        self.dtype = dtype or (given.dtype if given is not None else torch.float32)
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise TypeError(
                "dtype is that of the state, a floating one such as torch.float32; got"
                f" {self.dtype!r}"
            )

    @property
    def computed_in(self) -> torch.dtype:
        """The dtype of the states of the solve: float32 where the result is in half precision."""
        return torch.promote_types(self.dtype, torch.float32)

    def state(self, process: Process, t: float, rows: slice, noise: Noise) -> Tensor:
        """The states of some rows at the time where the solve begins."""
        if self.x is not None:
            return self.x[rows].to(self.device, self.computed_in)
        eps = noise.start().to(self.device, self.computed_in)
        if self.x0 is not None:
            return process.perturb(self.x0[rows].to(self.device, self.computed_in), t, eps)
        return eps * process.level(t).sigma


class Conditions:
    """The network's keyword arguments, cut along with the batch (`sdeflow.denoisers.condition`)."""

    def __init__(self, condition: Mapping[str, Any] | None, n: int, device: torch.device):
        if condition is not None and not isinstance(condition, Mapping):
            raise TypeError(
                "condition is a mapping of names to values, such as {'label': labels}; got"
                f" {type(condition).__name__}"
            )
        self.nodes = {
            name: prepared(name, value, n, device) for name, value in (condition or {}).items()
        }
        self.values = {name: plain(node) for name, node in self.nodes.items()}

    def rows(self, rows: slice) -> dict[str, Any]:
        """The condition of some rows, as the network gets it."""
        return {name: plain(node) for name, node in self.cut(rows).items()}

    def cut(self, rows: slice) -> dict[str, Any]:
        """The condition of some rows, which can be cut further."""
        return {name: cut(node, rows) for name, node in self.nodes.items()}


def check_device(name: str | torch.device) -> torch.device:
    """The device of a name; `ValueError` for one that is not on this machine."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"no device {str(name)!r} on this machine ({str(error).splitlines()[0]}); 'cpu'"
            " always is"
        ) from error
    return device


def named_device(name: str | torch.device) -> torch.device:
    """The device of a name; "auto" is a GPU where there is one.

    `ValueError` for one that is not on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return check_device(name)


def device_of(denoiser: Denoiser) -> torch.device:
    """The device of the network's first parameter; the CPU where there is none."""
    parameters = (p for network in denoiser.networks for p in network.parameters())
    first = next(parameters, None)
    return torch.device("cpu") if first is None else first.device


def _count(n: int | None, seeds: int | Sequence[int] | None, given: Tensor | None) -> int:
    counts = {}
    if n is not None:
        counts["n"] = whole_number("n", n)
    if seeds is not None and not isinstance(seeds, int):
        counts["seeds"] = len(seeds)
    if given is not None:
        counts["the starting state"] = len(given)
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{name} says {count}" for name, count in counts.items())
        raise ValueError(f"how many samples? {said}")
    count = next(iter(counts.values()), 1)
    return whole_number("the number of samples", count)


def fresh_seeds(n: int) -> tuple[int, ...]:
    """`n` consecutive seeds that nobody chose, without torch's global generator, whose state a
    sampler must not change.
    """
    first = int.from_bytes(os.urandom(4), "little")
    return tuple(range(first, first + n))


def _seeds(seeds: int | Sequence[int] | None, n: int) -> tuple[int, ...]:
    if seeds is None:
        return fresh_seeds(n)
    if isinstance(seeds, int):
        return tuple(range(seeds, seeds + n))
    return tuple(index(seed) for seed in seeds)
