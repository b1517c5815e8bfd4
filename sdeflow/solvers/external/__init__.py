"""The solvers of torchdiffeq and torchsde."""

from sdeflow.solvers.external.torchdiffeq import TorchDiffEq
from sdeflow.solvers.external.torchsde import TorchSDE

__all__ = ["TorchDiffEq", "TorchSDE"]
