"""Scores of images against a reference."""

from sdeflow.evaluation.api import evaluate
from sdeflow.evaluation.result import Evaluation

__all__ = ["Evaluation", "evaluate"]
