"""Ours against the published implementations: with what they returned (`records.safetensors`), live
where one is installed.

`cases.py` says what is what, `make.py` makes the records, `docs/benchmarks/parity.md` lists the findings.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import SAME, Case
from deviations import RUNS as DEVIATIONS
from problems import Mixture
from published import installed, with_stages
from published_grids import GRIDS
from safetensors import safe_open
from setting import PINS, PROCESSES, RECORDS, InOrder, path, start
from torch import Tensor

from sdeflow import registry
from sdeflow.noise import Noise
from sdeflow.reverse import Reverse
from sdeflow.solvers.base import GridSolver, Solution

with safe_open(RECORDS, "pt") as stored:
    RESULTS: dict[str, Tensor] = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    CALLS: dict[str, int] = json.loads(stored.metadata()["calls"])
    MADE_WITH: dict[str, str] = json.loads(stored.metadata()["packages"])

RUNS = [
    pytest.param(case, key, steps, native, id=key)
    for case in SAME
    for key, steps, native in case.runs()
]


def ours(solver: str, given: dict[str, Any]) -> GridSolver:
    """A solver by its name in the registry, around the one that it may name."""
    given = {name: ours(*value) if name == "solver" else value for name, value in given.items()}
    return registry.lookup(registry.SOLVERS, "solver", solver).make(**given)


def solve(case: Case, times: Tensor) -> Solution:
    """The same problem by ours; the result is `x / s`, as the peers' is."""
    process, solver = PROCESSES[case.process], ours(case.solver, case.given)
    noise: Noise = InOrder()
    if case.noise == "path":
        noise = path(with_stages(times, case.given["r"]))
    solution = solver.integrate(
        Reverse(Mixture(process)), start(case.process, times[0]), times, noise, finish=case.finish
    )
    if not case.finish:
        solution.x = solution.x / process.level(float(times[-1])).s
    return solution


def test_the_records_are_those_of_the_pins() -> None:
    assert PINS["packages"] == MADE_WITH
    same = {key for case in SAME for key, *_ in case.runs()}
    assert {key for key in RESULTS if not key.endswith("/times")} - {*DEVIATIONS, *GRIDS} == same
    assert {*DEVIATIONS, *GRIDS} <= {*RESULTS}
    assert RECORDS.stat().st_size < 200_000


NO_PEER = {
    "Auto": "it chooses among the others",
    "RK4": "torchdiffeq's rk4 is Kutta's 3/8 rule, another method",
    "Ralston": "none",
    "Langevin": "none in this form: score_sde is not packaged, azula's corrector is another",
    "AnnealedLangevin": "none: NCSN's code is not packaged",
    "Restart": "none: its code is not packaged",
    "AdaptiveSDE": "none: its code is not packaged",
    "RK45": "test_adaptive_parity.py: scipy and torchdiffeq",
    "RK23": "test_adaptive_parity.py: scipy and torchdiffeq",
    "EulerMaruyama": "test_adaptive_parity.py: torchsde",
    "TorchDiffEq": "it is torchdiffeq",
    "TorchSDE": "it is torchsde",
}
"""Classes that no case of `cases.py` reaches, and why."""


def test_every_registered_solver_is_compared_or_said_not_to_be() -> None:
    compared = {
        registry.lookup(registry.SOLVERS, "solver", case.solver).kind.__name__ for case in SAME
    }
    registered = {entry.kind.__name__ for entry in registry.SOLVERS.values()}
    assert compared.isdisjoint(NO_PEER)
    assert registered - compared == {*NO_PEER}
    page = (Path(__file__).parents[2] / "docs" / "benchmarks" / "parity.md").read_text()
    assert not [name for name in NO_PEER if f"`{name}`" not in page]
    assert not [
        name for name, version in PINS["packages"].items() if f"{name} {version}" not in page
    ]


@pytest.mark.parametrize(("case", "key", "steps", "native"), RUNS)
def test_ours_ends_where_the_peer_ended(case: Case, key: str, steps: int, native: bool) -> None:
    times = RESULTS[f"{key}/times"] if native else case.times(steps)
    solution = solve(case, times)
    torch.testing.assert_close(solution.x, RESULTS[key], rtol=case.tolerance, atol=case.tolerance)
    assert solution.nfe == CALLS[key] - case.extra_calls


@pytest.mark.parametrize(("case", "key", "steps", "native"), RUNS)
def test_the_peer_still_ends_there(case: Case, key: str, steps: int, native: bool) -> None:
    if not installed(case.peer):
        pytest.skip(
            f"{case.peer} {PINS['packages'][case.peer]} is not installed; the stored result stands"
            " for it"
        )
    times, x, calls = case.run(steps, native)
    torch.testing.assert_close(x, RESULTS[key], rtol=1e-11, atol=1e-11)
    assert calls == CALLS[key]
    if native:
        torch.testing.assert_close(times, RESULTS[f"{key}/times"], rtol=1e-13, atol=0.0)
