"""A grid and a process of a user's own: one file and one registration each, used by name or as
values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from problems import Mixture
from torch import Tensor

from sdeflow import registry, sample, solve
from sdeflow.errors import GridError
from sdeflow.grid.base import in_nsr, ramp
from sdeflow.process import EDM, VP, Process, RectifiedFlow
from sdeflow.registry import register_grid, register_process

# --8<-- [start:grid]


def half_angle(
    process: Process, n: int, *, t_min: float | None = None, t_max: float | None = None
) -> Tensor:
    """Uniform in `atan(nsr) / 2`, between the noise-to-signal ratios of the process."""

    def place(top: float, bottom: float, n: int) -> Tensor:
        a, b = math.atan(top) / 2, math.atan(bottom) / 2
        return torch.tan(2 * (a + ramp(n) * (b - a)))

    return in_nsr(process, n, t_min, t_max, None, None, place)


# --8<-- [end:grid]

# --8<-- [start:process]


@dataclass(frozen=True)
class Power(Process):
    """`s = 1`, `sigma = t^power`."""

    power: float = 2.0
    t_min: float = 0.05
    t_max: float = 6.0

    def s(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t**self.power


# --8<-- [end:process]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """The names, for one test."""
    register_grid("half_angle", half_angle, aliases=("haversine",))
    register_process("power", Power)
    register_process("cubic", Power, arguments={"power": 3.0, "t_max": 4.0})
    yield
    for table, names in (
        (registry.GRIDS, ("half_angle",)),
        (registry.PROCESSES, ("power", "cubic")),
    ):
        for name in names:
            del table[name]


def test_the_grid_is_used_by_its_names_and_as_a_value() -> None:
    model = Mixture(VP())
    by_name, by_alias, by_value, by_times = (
        sample(model, solver="heun", nfe=15, n=4, seeds=0, grid=grid)
        for grid in ("half_angle", "Haversine", half_angle, half_angle(VP(), 8))
    )
    assert torch.equal(by_name, by_value)
    assert torch.equal(by_name, by_alias)
    assert torch.equal(by_name, by_times)


@pytest.mark.parametrize("process", [VP(), EDM(), RectifiedFlow(), Power()], ids=str)
def test_the_grid_holds_the_conventions_of_grids(process: Process) -> None:
    times = half_angle(process, 9)
    assert times.dtype == torch.float64
    assert float(times[0]) == process.t_max
    assert float(times[-1]) == process.t_min
    assert bool((times.diff() < 0).all())
    inner = half_angle(process, 9, t_min=0.1, t_max=0.9)
    assert (float(inner[0]), float(inner[-1])) == (0.9, 0.1)
    with pytest.raises(GridError):
        half_angle(process, 0)


def test_the_process_is_used_by_its_names_and_as_a_value() -> None:
    assert registry.process("power") == registry.process(Power) == Power()
    assert registry.process("cubic") == Power(3.0, t_max=4.0)
    by_name = solve(Mixture(Power()), "power", solver="heun", nfe=15, n=4, seeds=0)
    by_value = solve(Mixture(Power()), Power(), solver="heun", nfe=15, n=4, seeds=0)
    assert torch.equal(by_name.x, by_value.x)
    assert by_name.process == Power()


@pytest.mark.parametrize("solver", ["rk45", "dpmpp_2m", "unipc_3"])
@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_every_power_leads_to_the_same_solution(power: float, solver: str) -> None:
    """All powers describe the same path of noise-to-signal ratios, in another time."""
    process = Power(power, t_min=0.01 ** (1 / power), t_max=20.0 ** (1 / power))
    reference = EDM(t_min=0.01, t_max=20.0)
    x = 20.0 * torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    budget = {} if solver == "rk45" else {"nfe": 12}
    got, want = (
        solve(Mixture(p), p, solver=solver, x=x, grid=half_angle, **budget)
        for p in (process, reference)
    )
    torch.testing.assert_close(got.x, want.x, rtol=1e-7, atol=1e-7)
