"""What every test file shares: one thread, repeatable Hypothesis, and the exact problems of `problems.py` as fixtures."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings
from problems import PROCESSES, Mixture

from sdeflow.process import Process

torch.set_num_threads(1)
settings.register_profile(
    "sdeflow", derandomize=True, deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("sdeflow")


@pytest.fixture(params=sorted(PROCESSES))
def process(request: pytest.FixtureRequest) -> Process:
    """Every kind of process, one after the other."""
    return PROCESSES[request.param]


@pytest.fixture
def mixture() -> Mixture:
    """A nonlinear problem with an exact denoiser, under EDM; `.under(process)` takes it elsewhere."""
    return Mixture()
