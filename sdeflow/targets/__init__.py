"""Targets: distributions whose denoisers, scores and densities are exact."""

from sdeflow.targets.base import Target
from sdeflow.targets.empirical import Empirical
from sdeflow.targets.mixture import Gaussian, GaussianMixture

__all__ = ["Empirical", "Gaussian", "GaussianMixture", "Target"]
