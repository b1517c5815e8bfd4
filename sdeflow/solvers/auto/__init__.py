"""The default solver, the grid that goes with it, and the table that both read."""

from sdeflow.solvers.auto.solver import Auto

__all__ = ["Auto"]
