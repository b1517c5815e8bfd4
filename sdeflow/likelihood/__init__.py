"""Likelihood: the variational bound of the chain, and the likelihood along the probability-flow
ODE.
"""

from sdeflow.likelihood.bound import Bound, variational_bound
from sdeflow.likelihood.ode import LogLikelihood, log_likelihood

__all__ = ["Bound", "LogLikelihood", "log_likelihood", "variational_bound"]
