"""Draw the training log of the bundled checkpoint: `python benchmarks/plot_training.py [LOG] [PICTURE]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent


def main(log: Path, picture: Path) -> None:
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    images = [row["images"] / 1e6 for row in rows]
    panels = [
        ("EDM-weighted loss, mean of 100 steps", [row["loss"] for row in rows], (0.14, 0.18)),
        ("thousand images a second", [row["images_per_second"] / 1e3 for row in rows], (0, None)),
        ("learning rate x 1000", [row["lr"] * 1e3 for row in rows], (0, None)),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), constrained_layout=True)
    for axis, (title, values, limits) in zip(axes, panels, strict=True):
        axis.plot(images, values, linewidth=1)
        axis.set(title=title, xlabel="million images", ylim=limits)
        axis.grid(alpha=0.25)
    figure.savefig(picture, dpi=90)


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    defaults = [HERE / "results" / "train-cifar10.jsonl", HERE.parent / "docs" / "assets" / "cifar10-training-loss.png"]
    main(*(given + defaults[len(given) :]))
