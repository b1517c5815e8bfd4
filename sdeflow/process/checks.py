"""What a process must hold: finite `s` and `sigma`, `sigma / s` that does not fall, derivatives and
closed forms that are those of `s` and `sigma`.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from sdeflow._utils.weak_cache import WeakTable
from sdeflow.process.base import Process

_PROBES = 64
_EXACT = ("standard", "from_betas", "from_table")  # modules whose processes hold all by their form
_SOUND: WeakTable[bool] = WeakTable(256)


def check_process(process: Process) -> None:
    """Raise `ValueError` (or `TypeError`) where `process` breaks a rule, and say where."""
    kind = type(process)
    if kind.__module__ in [f"sdeflow.process.{name}" for name in _EXACT]:
        return
    if not process.t_min < process.t_max:
        raise ValueError(
            f"a process runs from t_min to a larger t_max; {kind.__name__} has"
            f" t_min={process.t_min}, t_max={process.t_max}"
        )
    with torch.inference_mode(False), torch.no_grad():
        part = torch.linspace(0.0, 1.0, _PROBES, dtype=torch.float64)
        t = process.t_min + (process.t_max - process.t_min) * part
        t[-1] = process.t_max
        s, sigma = _kernel(process, t)
        content = (*s.tolist(), *sigma.tolist(), *(getattr(kind, name) for name in _FORMS))
        if _SOUND.get(process, content):
            return
        _check_values(process, t, s, sigma)
        _check_direction(process, t, s, sigma)
        _check_derivatives(process, t)
        _check_closed_forms(process, t[1:-1], s[1:-1], sigma[1:-1])
        with contextlib.suppress(TypeError):  # no weak references to it
            _SOUND.put(process, content, True)


def _kernel(process: Process, t: Tensor) -> tuple[Tensor, Tensor]:
    """`s` and `sigma` at a vector of times."""
    values = []
    for name in ("s", "sigma"):
        try:
            values.append(getattr(process, name)(t))
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"{type(process).__name__}.{name} fails at a vector of times ({error}). It is"
                " called with float64 tensors of any shape: write it in torch, torch.exp(t) rather"
                " than math.exp(t)"
            ) from error
    s, sigma = values
    return torch.where(s.abs() < 1e-15 * sigma, torch.zeros_like(s), s), sigma


def _check_values(process: Process, t: Tensor, s: Tensor, sigma: Tensor) -> None:
    for name, value in (("s", s), ("sigma", sigma)):
        bad = ~torch.isfinite(value) | (value < 0)
        if bool(bad.any()):
            i = int(bad.nonzero()[0])
            raise ValueError(
                f"{type(process).__name__}.{name} is {float(value[i]):.6g} at t={float(t[i]):.6g}:"
                f" s and sigma are finite and not negative from t_min={process.t_min:g} to"
                f" t_max={process.t_max:g}; change {name}, or these two"
            )


def _check_direction(process: Process, t: Tensor, s: Tensor, sigma: Tensor) -> None:
    """`sigma / s`, as an angle that is finite at both ends, must not fall."""
    angle = torch.atan2(sigma, s)
    falls = angle.diff() < -1e-9 * angle[1:]
    if not bool(falls.any()):
        return
    i = int(falls.nonzero()[0])
    name = type(process).__name__
    nsr = [float(sigma[k] / s[k]) for k in (i, i + 1)]
    where = (
        f"sigma / s of {name} falls from {nsr[0]:.4g} at t={float(t[i]):.4g} to {nsr[1]:.4g} at"
        f" t={float(t[i + 1]):.4g}"
    )
    if bool((angle.diff() <= 1e-9 * angle[1:]).all()):
        raise ValueError(
            f"{where}, and so on to t_max: its time runs from noise to data, and here t is small"
            f" at the data. Use the process {name}(...).reversed(); networks are still given the"
            " time as you wrote it"
        )
    raise ValueError(
        f"{where}. Noise must not fall from t_min={process.t_min:g} to t_max={process.t_max:g}:"
        " change s or sigma, or end the process where it turns"
    )


def _check_derivatives(process: Process, t: Tensor) -> None:
    """Derivatives, automatic or given, against finite differences."""
    low, high = float(t[0]), float(t[-1])
    t = t[1:-1]
    h = 1e-3 * torch.minimum(t - low, high - t)
    after, before = _kernel(process, t + h), _kernel(process, t - h)
    for k, (name, slope_name) in enumerate((("s", "ds"), ("sigma", "dsigma"))):
        given = getattr(type(process), slope_name) is not getattr(Process, slope_name)
        measured = (after[k] - before[k]) / (2.0 * h)
        try:
            slope = getattr(process, slope_name)(t)
        except RuntimeError as error:
            raise ValueError(_blind(process, name, slope_name, str(error))) from error
        largest = torch.maximum(after[k].abs(), before[k].abs()).max()
        matters = measured.abs() * (high - low) > 1e-3 * largest
        wrong = matters & ~(
            (slope - measured).abs() <= 0.1 * torch.maximum(slope.abs(), measured.abs())
        )
        if int(wrong.sum()) * 2 <= int(matters.sum()):
            continue
        i = int(wrong.nonzero()[0])
        said = (
            f"its derivative is {float(slope[i]):.4g} at t={float(t[i]):.4g}, where {name} changes"
            f" by {float(measured[i]):.4g} a unit of time"
        )
        if given:
            raise ValueError(
                f"{type(process).__name__}.{slope_name} is not the derivative of {name}: {said};"
                f" correct it, or leave {slope_name} out"
            )
        raise ValueError(_blind(process, name, slope_name, said))


def _blind(process: Process, name: str, slope_name: str, said: str) -> str:
    return (
        f"automatic differentiation cannot see {name} of {type(process).__name__}: {said}. Write"
        f" {name} in torch, without numpy, detach() or item(), or define {slope_name}(t) as well;"
        " a table of values makes a process by Process.from_table(s, sigma)"
    )


_FORMS = ("variance", "f", "g2", "g", "nsr", "lam", "angle", "kernel", "t_of_lam", "t_of_nsr")


def _check_closed_forms(process: Process, t: Tensor, s: Tensor, sigma: Tensor) -> None:
    """Closed forms that a user's class gives, against what follows from `s` and `sigma`."""
    kind = type(process)
    ours = {
        name for name in _FORMS if getattr(kind, name).__module__.startswith("sdeflow.process.")
    }
    signal = s > 0
    t, s, sigma = t[signal], s[signal], sigma[signal]
    if not len(t):
        return
    ds, dsigma = process.ds(t), process.dsigma(t)
    f = ds / s
    g2 = 2.0 * sigma * (dsigma - f * sigma)
    expected = {
        "variance": sigma**2,
        "f": f,
        "g2": g2,
        "g": g2.clamp_min(0.0).sqrt(),
        "nsr": sigma / s,
        "lam": s.log() - sigma.log(),
        "angle": torch.atan2(sigma, s),
    }
    for name, value in expected.items():
        if name not in ours:
            _compare(process, name, t, torch.as_tensor(getattr(process, name)(t)), value)
    if "kernel" not in ours:
        for given, value in zip(process.kernel(t), (s, sigma), strict=True):
            _compare(process, "kernel", t, given, value)
    for name, at in (("t_of_lam", expected["lam"]), ("t_of_nsr", expected["nsr"])):
        if name not in ours and bool(torch.isfinite(at).all()):
            found = getattr(process, name)(at)
            there = torch.atan2(process.sigma(found), process.s(found))
            _compare(process, name, t, there, expected["angle"], f"{name} leads to sigma / s")


def _compare(
    process: Process, name: str, t: Tensor, given: Tensor, value: Tensor, said: str = ""
) -> None:
    scale = value.abs().max()
    wrong = ~((given - value).abs() <= 1e-3 * value.abs() + 1e-6 * scale) & torch.isfinite(value)
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        raise ValueError(
            f"{type(process).__name__}.{name} does not belong to its s and sigma: at"
            f" t={float(t[i]):.4g} {said or 'it'} is {float(given[i]):.6g}, where"
            f" {float(value[i]):.6g} follows from them; correct it, or leave {name} out"
        )
