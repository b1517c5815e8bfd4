"""Figures of matplotlib, which is an extra."""

from __future__ import annotations

import io
import os
from typing import Any

from sdeflow._utils.files import check_writable, write_atomically
from sdeflow.errors import missing_extra


def new_figure(
    path: str | os.PathLike[str] | None, purpose: str, width: float, height: float
) -> Any:
    """An empty `matplotlib.figure.Figure`; `MissingExtraError` without matplotlib, `SdeflowError`
    where `path` cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "plot", purpose) from error
    if path is not None:
        check_writable(path, "figure")
    return Figure(figsize=(width, height), layout="constrained")


def finished(figure: Any, path: str | os.PathLike[str] | None) -> Any:
    """The figure, written to `path` as PNG if one is given: the same bytes each time."""
    if path is not None:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
        write_atomically(path, buffer.getvalue(), "figure")
    return figure
