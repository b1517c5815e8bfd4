"""Solvers that choose a step size for every sample."""

from sdeflow.solvers.adaptive.dpm_solver import DPMAdaptive
from sdeflow.solvers.adaptive.runge_kutta import RK23, RK45
from sdeflow.solvers.adaptive.sde import AdaptiveSDE

__all__ = ["RK23", "RK45", "AdaptiveSDE", "DPMAdaptive"]
