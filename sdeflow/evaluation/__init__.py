"""Scores of pictures against a reference."""

from sdeflow.evaluation.run import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
