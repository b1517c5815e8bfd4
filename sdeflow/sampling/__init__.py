"""`sample`, `solve` and `encode`, and what they are made of."""

from sdeflow.sampling.api import DEFAULT_SOLVER, Step, encode, sample, solve
from sdeflow.sampling.inputs import check_device, device_of
from sdeflow.sampling.request import CallInfo, Request
from sdeflow.sampling.times import DEFAULT_NFE

__all__ = [
    "DEFAULT_NFE",
    "DEFAULT_SOLVER",
    "CallInfo",
    "Request",
    "Step",
    "check_device",
    "device_of",
    "encode",
    "sample",
    "solve",
]
