"""Feature networks of the evaluation."""

from __future__ import annotations

import os

import torch

from sdeflow.errors import unknown
from sdeflow.evaluation.features.base import Extractor, file_sha256
from sdeflow.evaluation.features.cifar import (
    CIFAR_WEIGHTS,
    CifarFeatures,
    CifarNet,
    CifarNetConfig,
    save_cifar_net,
)
from sdeflow.evaluation.features.imagenet import ImageNetFeatures, imagenet_file
from sdeflow.evaluation.features.inception import INCEPTION_SHA256, Inception

__all__ = [
    "CIFAR_WEIGHTS",
    "EXTRACTORS",
    "INCEPTION_SHA256",
    "CifarFeatures",
    "CifarNet",
    "CifarNetConfig",
    "Extractor",
    "ImageNetFeatures",
    "Inception",
    "extractor",
    "file_sha256",
    "imagenet_file",
    "save_cifar_net",
]

EXTRACTORS: dict[str, type[Inception] | type[CifarFeatures] | type[ImageNetFeatures]] = {
    "fid": Inception,
    "fd_cifar": CifarFeatures,
    "fd_in": ImageNetFeatures,
}
"""Which extractor a Frechet distance is made with."""


def extractor(
    score: str, weights: str | os.PathLike[str] | None = None, device: str | torch.device = "cpu"
) -> Extractor:
    """The extractor of the score "fid", "fd_cifar" or "fd_in".

    Errors: `UnknownNameError`, and those of the extractor.
    """
    if score not in EXTRACTORS:
        raise unknown("score", score, EXTRACTORS)
    return EXTRACTORS[score](weights, device)
