"""Fitting grids and plans to a model."""
