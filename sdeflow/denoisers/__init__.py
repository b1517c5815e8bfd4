"""Denoisers: what a network knows, `E[x0 | x(t) = x]`."""

from sdeflow.denoisers.base import Denoiser
from sdeflow.denoisers.condition import PerSample, Shared
from sdeflow.denoisers.network import Parametrisation, Preconditioned, Prediction, as_denoiser
from sdeflow.denoisers.thresholding import Clip, DynamicThreshold, Projected
from sdeflow.denoisers.wrapper import Wrapper

__all__ = [
    "Clip",
    "Denoiser",
    "DynamicThreshold",
    "Parametrisation",
    "PerSample",
    "Preconditioned",
    "Prediction",
    "Projected",
    "Shared",
    "Wrapper",
    "as_denoiser",
]
