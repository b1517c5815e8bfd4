"""A process as a figure."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import torch

from sdeflow._utils.figures import finished, new_figure

if TYPE_CHECKING:
    from sdeflow.process.base import Process


def plot_process(process: Process, path: str | os.PathLike[str] | None = None) -> Any:
    """The figure of a process with its two axes, over time from `t_min` to `t_max`.

    - `s` and `sigma`.
    - `nsr` and `g2`, on a logarithmic axis, as far as they are finite and positive.
    """
    figure = new_figure(path, "plotting a process", 9.0, 3.6)
    law, rates = figure.subplots(1, 2)
    low, high = process.t_min, process.t_max
    wide = low > 0.0 and high > max(2.0, 50.0 * low)
    ends = (math.log(low), math.log(high)) if wide else (low, high)
    t = torch.linspace(*ends, 257, dtype=torch.float64)
    t = (t.exp() if wide else t).clamp(low, high)
    curves = (
        (law, "s", process.s(t)),
        (law, "sigma", process.sigma(t)),
        (rates, "nsr", process.nsr(t)),
        (rates, "g2", process.g2(t)),
    )
    for axes, name, values in curves:
        kept = torch.isfinite(values) & ((values > 0.0) | (axes is law))
        axes.plot(t[kept].tolist(), values[kept].detach().tolist(), label=name)
    if wide:
        law.set_yscale("log")
    rates.set_yscale("log")
    for axes in (law, rates):
        axes.set(xlabel="t", xscale="log" if wide else "linear")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(repr(process), fontsize="small")
    return finished(figure, path)
