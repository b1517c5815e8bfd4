"""Scores of pictures against a reference."""

from sdeflow.evaluation.api import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
