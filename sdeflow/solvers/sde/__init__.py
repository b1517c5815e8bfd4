"""Solvers of the reverse SDE on a grid."""
