"""A plan as a figure: its unrolled table as a heat map, the levels of its calls, and the weights
of each call.
"""

from __future__ import annotations

import io
import os
from typing import Any

import torch
from torch import Tensor

from sdeflow._utils.files import check_writable, write_atomically
from sdeflow.errors import missing_extra
from sdeflow.plan.unroll import Unrolled

AGES = 4  # the newest so many predictions have a line of their own


def plot_unrolled(
    rows: Unrolled, title: str = "", path: str | os.PathLike[str] | None = None
) -> Any:
    """The figure (`matplotlib.figure.Figure`) of an unrolled plan with its three axes; written to
    `path` as PNG if one is given.

    - Heat map: a row a call and one for the result; the columns weigh the start, the predictions
      and the noise. Red is positive, blue negative; the scale is linear up to a hundredth of the
      largest weight and logarithmic beyond.
    - Levels: the noise-to-signal ratio of each call.
    - Weights: of the start, of the newest predictions (`F-1` is the newest) and of the noise, in
      each call's input.

    Errors: `MissingExtraError` without matplotlib, `SdeflowError` if the file cannot be written.
    """
    try:
        from matplotlib.colors import SymLogNorm
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise missing_extra("matplotlib", "plot", "plotting a plan") from error
    if path is not None:
        check_writable(path, "figure")
    matrix = rows.matrix.detach()
    count, width = matrix.shape
    figure = Figure(figsize=(12.0, 4.6), layout="constrained")
    heat, levels, weights = figure.subplots(1, 3, width_ratios=(1.6, 1.0, 1.0))
    top = max(float(matrix.abs().max()), 1e-12)
    image = heat.imshow(
        torch.where(matrix == 0.0, torch.nan, matrix).numpy(),
        cmap="RdBu_r", aspect="auto", interpolation="nearest",
        norm=SymLogNorm(1e-2 * top, vmin=-top, vmax=top),
    )  # fmt: skip
    figure.colorbar(image, ax=heat, label="weight")
    every = max(1, -(-width // 16))
    heat.set_xticks(range(0, width, every), rows.columns[::every], rotation=90 if width > 8 else 0)
    names = [*map(str, range(count - 1)), "end"]
    every = max(1, -(-count // 16))
    heat.set_yticks(range(0, count, every), names[::every])
    heat.set(ylabel="input of call", title=f"weights (predictions as {rows.predicts})")
    calls = range(count - 1)
    nsr = rows.nsr[:-1].detach()
    known = torch.isfinite(nsr) & (nsr > 0.0)
    levels.semilogy([k for k in calls if known[k]], nsr[known].tolist(), "o-", color="C0")
    levels.set(xlabel="call", ylabel="nsr", title="levels")
    for label, line in _lines(rows):
        weights.plot(
            range(count),
            torch.where(line == 0.0, torch.nan, line).tolist(),
            "o-",
            markersize=3,
            label=label,
        )
    weights.axhline(0.0, color="0.8", linewidth=0.8, zorder=0)
    weights.set(xlabel="input of call (the last: the result)", title="what is weighed")
    weights.set_yscale("symlog", linthresh=1.0)
    weights.legend(fontsize="small")
    for axes in (levels, weights):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.suptitle(title.replace(" under ", "\nunder "), fontsize="small")
    if path is not None:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
        write_atomically(path, buffer.getvalue(), "figure")
    return figure


def _lines(rows: Unrolled) -> list[tuple[str, Tensor]]:
    """A line of weights a row: of the start, of the predictions by their age, of all noise."""
    predictions = rows.predictions.detach()
    lines = [("x", rows.start.detach())]
    for age in range(1, min(AGES, rows.nfe) + 1):
        line = torch.zeros(len(predictions), dtype=torch.float64)
        line[age:] = predictions.diagonal(-age)
        lines.append((f"F-{age}", line))
    if rows.draws.shape[1]:
        lines.append(("noise", (rows.draws.detach() ** 2).sum(1).sqrt()))
    return lines
