"""Averages of weights during training, and of any length afterwards."""

from sdeflow.models.ema.ema import EMA
from sdeflow.models.ema.power import PowerEMA

__all__ = ["EMA", "PowerEMA"]
