"""Inception v3, whose Frechet distance is the FID; by torch-fidelity (extra `fid`)."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from sdeflow.errors import CheckpointError, MissingExtraError, missing_extra
from sdeflow.evaluation.features.base import Extractor, file_sha256

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""SHA-256 of `weights-inception-2015-12-05-6726825d.pth`, the weights of the FID; the file's name
repeats its first digits.
"""


class Inception(Extractor):
    """The 2048 features of Inception v3 that the FID is made of, by torch-fidelity (extra `fid`).

    `weights` is torch-fidelity's file; by default it is downloaded once, into torch's own cache.
    Either way its SHA-256 must be the known one: other weights do not give an FID. Errors:
    `MissingExtraError` without torch-fidelity, `CheckpointError` if the file is missing, is another
    one, or cannot be downloaded. Source: Heusel et al. 2017; Obukhov et al. 2020, "High-fidelity
    performance metrics for generative models in PyTorch".
    """

    name, score, dim = "inception-v3-compat", "fid", 2048
    resize = (
        "to 299 x 299, bilinear as in TensorFlow 1 (no antialiasing, corners not aligned), float32"
    )

    def __init__(
        self, weights: str | os.PathLike[str] | None = None, device: str | torch.device = "cpu"
    ) -> None:
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as fidelity
        except ImportError as error:
            raise missing_extra("torch-fidelity", "fid", "the metric fid") from error
        except RuntimeError as error:  # what it imports in turn was built for another PyTorch
            raise MissingExtraError(
                f"torch-fidelity is installed but cannot be imported ({error}); its torchvision"
                f" must be the one made for torch {torch.__version__}: install the two together"
            ) from error
        path = inception_file(fidelity.URL_INCEPTION_V3) if weights is None else Path(weights)
        if not path.is_file():
            raise CheckpointError(
                f"there is no file {path} with the weights of Inception; without --weights they are"
                " downloaded"
            )
        self.sha256 = file_sha256(path)
        if self.sha256 != INCEPTION_SHA256:
            raise CheckpointError(
                f"{path} has SHA-256 {self.sha256[:12]}..., but the weights of the FID have"
                f" {INCEPTION_SHA256[:12]}...: the file is damaged or another one; remove it and"
                " fetch it again, or name the right one with --weights"
            )
        self.device = torch.device(device)
        with contextlib.redirect_stdout(sys.stderr):
            network = fidelity.FeatureExtractorInceptionV3(
                self.name, ["2048"], feature_extractor_weights_path=str(path)
            )
        self.network = network.to(self.device).eval()

    def _features(self, pixels: Tensor) -> Tensor:
        return self.network(pixels)[0]


def inception_file(url: str) -> Path:
    """The downloaded weights of Inception in torch's cache; fetched from `url` if they are not
    there, whole or not at all.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            url, str(path), hash_prefix=INCEPTION_SHA256, progress=sys.stderr.isatty()
        )
    except (OSError, RuntimeError) as error:  # RuntimeError: what came has another hash
        raise CheckpointError(
            f"the weights of Inception could not be fetched from {url} ({error}). Either copy the"
            " file from elsewhere and name it with --weights PATH, or use fd_cifar, which needs no"
            " download"
        ) from error
    return path
