"""Samples and their trajectory as a figure."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdeflow._utils.figures import finished, new_figure

if TYPE_CHECKING:
    from sdeflow.solvers.base import Solution

ROWS, COLUMNS, PATHS = 8, 9, 200
"""Images of a trajectory, down and across; and paths of points."""


def plot_solution(solution: Solution, path: str | os.PathLike[str] | None = None) -> Any:
    """The figure of a solution.

    - Samples of shape `(C, H, W)`, C = 1 or 3, are images, -1 black and 1 white: a square of at
      most 64 of them; with a trajectory a row a sample, and a column a level.
    - Of all other samples the first two entries are points, with their trajectories as lines.
      Samples of one entry are a histogram, or lines over the levels.
    """
    x = solution.x.detach().float().cpu()
    states = None if solution.trajectory is None else solution.trajectory.detach().float().cpu()
    how = str(solution.solver or (solution.plan and solution.plan.solver) or "")
    if x.ndim == 4 and x.shape[1] in (1, 3):
        figure = _images(x, states, path)
    else:
        figure = _points(x.reshape(len(x), -1), states, path)
    figure.suptitle(f"{how}, NFE {solution.nfe}", fontsize="small")
    return finished(figure, path)


def _images(x: Tensor, states: Tensor | None, path: Any) -> Any:
    if states is None:
        columns = min(8, len(x))
        shown = list(x[: 8 * columns])
    else:
        chosen = torch.linspace(0, len(states) - 1, min(COLUMNS, len(states))).round().long()
        columns = len(chosen)
        shown = [states[k, row] for row in range(min(ROWS, len(x))) for k in chosen.tolist()]
    rows = -(-len(shown) // columns)
    figure = new_figure(path, "plotting samples", 1.2 * columns + 0.4, 1.2 * rows + 0.6)
    for axes, image in zip(figure.subplots(rows, columns, squeeze=False).flat, shown, strict=False):
        # A noisy state is shown relative to its own size.
        pixels = (image / image.abs().max().clamp(min=1.0) + 1.0) / 2.0
        axes.imshow(pixels.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0.0, vmax=1.0)
    for axes in figure.axes:
        axes.axis("off")
    return figure


def _points(x: Tensor, states: Tensor | None, path: Any) -> Any:
    figure = new_figure(path, "plotting samples", 5.0, 4.2)
    axes = figure.subplots()
    flat = None if states is None else states.reshape(*states.shape[:2], -1)[:, :PATHS]
    if x.shape[1] >= 2:
        if flat is not None:
            axes.plot(flat[..., 0].numpy(), flat[..., 1].numpy(), color="0.6", linewidth=0.5)
        axes.plot(x[:, 0].numpy(), x[:, 1].numpy(), ".", markersize=3)
        axes.set(xlabel="x[0]", ylabel="x[1]", aspect="equal")
    elif flat is not None:
        axes.plot(flat[..., 0].numpy(), color="C0", linewidth=0.5)
        axes.set(xlabel="level", ylabel="x")
    else:
        axes.hist(x[:, 0].numpy(), bins=min(60, max(5, len(x) // 10)))
        axes.set(xlabel="x", ylabel="samples")
    return figure
