"""What makes two models the same: a SHA-256 of the network, its parametrisation and its process."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sdeflow.denoisers import Denoiser
from sdeflow.process import Process


def model_sha256(denoiser: Denoiser) -> str:
    """SHA-256 of all that a denoiser holds: the tensors of its network, and the numbers and tensors
    beside them.

    A function is known by its name alone: one that was rewritten under the same name counts as the
    same.
    """
    total = hashlib.sha256()

    def add(value: Any, depth: int = 0) -> None:
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous()
            total.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            total.update(plain.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, nn.Module):
            value = getattr(value, "_orig_mod", value)  # what torch.compile wraps
            add(
                [
                    type(value).__name__,
                    repr(getattr(value, "config", "")),
                    dict(value.state_dict()),
                ],
                depth,
            )
        elif isinstance(value, Mapping):
            for key in sorted(value, key=str):
                add([str(key), value[key]], depth)
        elif isinstance(value, list | tuple):
            total.update(f"[{len(value)}".encode())
            for item in value:
                add(item, depth)
        elif value is None or isinstance(value, str | int | float | bool | Process | torch.dtype):
            total.update(repr(value).encode() + b";")
        elif isinstance(value, types.FunctionType | types.MethodType | type) or depth > 8:
            total.update(getattr(value, "__qualname__", type(value).__name__).encode())
        elif hasattr(value, "__dict__"):
            add(
                [
                    type(value).__name__,
                    {k: v for k, v in vars(value).items() if k not in ("card", "class_names")},
                ],
                depth + 1,
            )
        else:
            total.update(type(value).__name__.encode())

    add(denoiser)
    return total.hexdigest()
