"""Scores of a set of images against a reference, from their features."""

from __future__ import annotations

from sdeflow.evaluation.metrics.accuracy import Accuracy
from sdeflow.evaluation.metrics.base import ENOUGH, Context, Metric, Value
from sdeflow.evaluation.metrics.frechet import FrechetDistance, expected_bias, frechet_distance
from sdeflow.evaluation.metrics.kernel import KernelDistance, kernel_distance
from sdeflow.evaluation.metrics.manifolds import Precision, Recall, precision_recall
from sdeflow.evaluation.metrics.statistics import Statistics

__all__ = [
    "ENOUGH",
    "METRICS",
    "Context",
    "Metric",
    "Statistics",
    "Value",
    "expected_bias",
    "frechet_distance",
    "kernel_distance",
    "precision_recall",
]

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        FrechetDistance("fid", "fid"),
        FrechetDistance("fd_cifar", "fd_cifar"),
        FrechetDistance("fd_in", "fd_in"),
        KernelDistance("kid", "fid"),
        KernelDistance("kd_cifar", "fd_cifar"),
        KernelDistance("kd_in", "fd_in"),
        Precision("precision"),
        Recall("recall"),
        Precision("precision_cifar", "fd_cifar"),
        Recall("recall_cifar", "fd_cifar"),
        Precision("precision_in", "fd_in"),
        Recall("recall_in", "fd_in"),
        Accuracy("accuracy", "fd_cifar"),
    )
}
"""Every metric by its name. `precision` and `recall` take the features of the first distance that
is asked for, and those of `fd_cifar` if there is none.
"""
