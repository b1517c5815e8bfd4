"""Solvers that hold a solver."""

from sdeflow.solvers.wrappers.ancestral import Ancestral
from sdeflow.solvers.wrappers.churn import Churn
from sdeflow.solvers.wrappers.langevin import Langevin
from sdeflow.solvers.wrappers.restart import Restart

__all__ = ["Ancestral", "Churn", "Langevin", "Restart"]
