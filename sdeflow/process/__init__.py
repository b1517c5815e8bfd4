"""Processes: the law of the noise, as two functions of time, `s(t)` and `sigma(t)`."""

from sdeflow.process import betas
from sdeflow.process.base import Level, Process
from sdeflow.process.clock import Clock
from sdeflow.process.from_betas import FromBetas
from sdeflow.process.from_sde import FromSDE
from sdeflow.process.from_table import FromTable, Tabulated
from sdeflow.process.learned import LearnedBetas
from sdeflow.process.reversed import Reversed
from sdeflow.process.standard import EDM, VE, VP, Cosine, RectifiedFlow, SubVP

__all__ = [
    "EDM",
    "VE",
    "VP",
    "Clock",
    "Cosine",
    "FromBetas",
    "FromSDE",
    "FromTable",
    "LearnedBetas",
    "Level",
    "Process",
    "RectifiedFlow",
    "Reversed",
    "SubVP",
    "Tabulated",
    "betas",
]
