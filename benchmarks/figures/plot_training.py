"""Draw the logs of the trainings of the bundled checkpoint, one after the other:
`python -m benchmarks.figures.plot_training`.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parents[1]


def main(logs: list[Path], picture: Path) -> None:
    rows, images = [], [0.0]
    for log in logs:  # each counts its own images
        own = [json.loads(line) for line in log.read_text().splitlines()]
        before = images[-1]
        images += [before + row["images"] / 1e6 for row in own]
        rows += own
    panels = [
        ("EDM-weighted loss, mean of 100 steps", [row["loss"] for row in rows], (0.14, 0.18)),
        ("thousand images a second", [row["images_per_second"] / 1e3 for row in rows], (0, None)),
        ("learning rate x 1000", [row["lr"] * 1e3 for row in rows], (0, None)),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), constrained_layout=True)
    for axis, (title, values, limits) in zip(axes, panels, strict=True):
        axis.plot(images[1:], values, linewidth=1)
        axis.set(title=title, xlabel="million images", ylim=limits)
        axis.grid(alpha=0.25)
    figure.savefig(picture, dpi=90)


if __name__ == "__main__":
    results = HERE / "results"
    logs = [results / "train-cifar10.jsonl", results / "train-cifar10-2.jsonl"]
    main(logs, HERE.parent / "docs" / "assets" / "cifar10-training-loss.png")
