"""Train the network for fitting: a small classifier of CIFAR-10 that is for losses alone.

    python -m benchmarks.quality.train_fitting_network --data train.parquet --test test.parquet \\
        --seed 1234

The recipe is that of `train_features`; the architecture is `FittingNet`. Give it another seed than
that of the network of FD-CIFAR.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.quality.train_features import Recipe, arguments, train
from sdeflow.images.datasets import Decoded
from sdeflow.models.fitting_network import (
    WEIGHTS,
    FittingNet,
    FittingNetConfig,
    load_fitting_network,
    save_fitting_network,
)


def build(data: Decoded) -> FittingNet:
    return FittingNet(FittingNetConfig(num_classes=data.num_classes, size=data.size))


def main(words: list[str] | None = None) -> None:
    given = sys.argv[1:] if words is None else words
    options = arguments([*given] if "--out" in given else [*given, "--out", str(WEIGHTS)])
    train(options, Recipe(build, save_fitting_network, load_fitting_network))


if __name__ == "__main__":
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
        main()
