"""Training a denoiser."""

from sdeflow.training.api import TrainResult, train
from sdeflow.training.config import TrainConfig
from sdeflow.training.trainer import Trainer

__all__ = ["TrainConfig", "TrainResult", "Trainer", "train"]
