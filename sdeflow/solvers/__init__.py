"""The solvers, a file a family; `sdeflow.registry` gives them names."""
