"""Networks: the UNet, the moving average of its parameters, and the files they are kept in."""

from sdeflow.models.ema import EMA
from sdeflow.models.unet import UNet, UNetConfig

__all__ = ["EMA", "UNet", "UNetConfig"]
