"""What every test file shares: workers, one thread each, repeatable Hypothesis, and the exact
problems of `problems.py`.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, settings
from problems import PROCESSES, Mixture

from sdeflow.process import Process

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
settings.register_profile(
    "sdeflow",
    derandomize=True,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("sdeflow")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite in a worker a core, where pytest-xdist is there; a part of it in this
    process. `-n` says otherwise.
    """
    worker = (
        hasattr(config, "workerinput") or "PYTEST_XDIST_WORKER" in os.environ
    )  # it starts none of its own
    whole = (
        config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.collectonly
    )
    if (
        not worker
        and whole
        and config.pluginmanager.hasplugin("xdist")
        and config.option.numprocesses is None
    ):
        config.option.numprocesses = "auto"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """The cores that this process may use; not above 8, as each worker imports torch."""
    return min(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8
    )


@pytest.fixture(params=sorted(PROCESSES))
def process(request: pytest.FixtureRequest) -> Process:
    """Every kind of process, one after the other."""
    return PROCESSES[request.param]


@pytest.fixture
def mixture() -> Mixture:
    """A nonlinear problem with an exact denoiser, under EDM; `.under(process)` takes it
    elsewhere.
    """
    return Mixture()


@pytest.fixture(scope="session")
def script() -> Iterator[Callable[[str], ModuleType]]:
    """A module of `benchmarks`, by its name below it: `script("quality.nfe_fid")`."""
    folder = str(Path(__file__).resolve().parent.parent)
    sys.path.insert(0, folder)
    yield lambda name: importlib.import_module(f"benchmarks.{name}")
    sys.path.remove(folder)
