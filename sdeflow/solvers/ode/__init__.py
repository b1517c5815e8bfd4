"""Solvers of the probability-flow ODE on a grid."""
