"""Linear combinations: every backend gives the same numbers, with bits that do not depend on a
row's place.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdeflow.noise import SeededNoise
from sdeflow.plan import combine
from sdeflow.plan.instructions import Combine
from sdeflow.process import VP
from sdeflow.registry import grid_function, solver
from sdeflow.reverse import Reverse
from sdeflow.targets import Gaussian

BACKENDS = [combine.torch_passes, combine.with_gradients]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["alike", "transposed", "half", "expanded"])
def test_every_backend_takes_every_output_of_a_network(
    backend: combine.Backend, layout: str
) -> None:
    x = torch.randn(4, 6, 6)
    x0 = {
        "alike": torch.randn(4, 6, 6),
        "transposed": torch.randn(4, 6, 6).mT,
        "half": torch.randn(4, 6, 6).half(),
        "expanded": torch.randn(6).expand(4, 6, 6),
    }[layout]
    z = torch.randn(4, 6, 6)
    held = [x.clone(), x0, z.clone()]
    owned = {0: held[0], 2: held[2]}
    run = (Combine(2, ((2, -1.0), (0, 0.5), (1, 0.25))), Combine(0, ((0, 2.0), (2, 1.0))))
    with torch.no_grad():
        backend(run, held, owned, x)
    expected = -z + 0.5 * x + 0.25 * x0.float()
    assert torch.allclose(held[2], expected, atol=1e-6)
    assert torch.allclose(held[0], 2.0 * x + expected, atol=1e-6)


@pytest.mark.parametrize("terms", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 7, 33 * 31])
def test_bits_do_not_depend_on_the_place_in_the_batch_nor_on_threads(size: int, terms: int) -> None:
    draw = torch.Generator().manual_seed(size + terms)
    states = [torch.randn(64, 3, size, generator=draw) for _ in range(terms)]
    run = (
        Combine(
            terms, tuple((k, float(c)) for k, c in enumerate(torch.randn(terms, generator=draw)))
        ),
    )

    def total(rows: slice) -> torch.Tensor:
        held = [*(x[rows].clone() for x in states), None]
        with torch.no_grad():
            combine.torch_passes(run, held, {}, held[0])
        return held[terms]

    whole = total(slice(None))
    for k in (0, 5, 63):
        assert torch.equal(total(slice(k, k + 1))[0], whole[k])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert torch.equal(total(slice(None)), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["ddim", "adams3", "unipc_3", "ipndm", "auto", "ddpm", "heun"])
def test_a_solve_is_the_same_with_and_without_gradients(name: str) -> None:
    process, chosen = VP(), solver(name)
    times = grid_function("uniform_lam")(process, 12)
    target = Gaussian(torch.zeros(5, dtype=torch.float64), std=0.5).under(process)
    x = torch.randn(3, 5, dtype=torch.float64)

    def end(grad: bool) -> torch.Tensor:
        noise = SeededNoise([1, 2, 3], (5,), dtype=torch.float64)
        with torch.set_grad_enabled(grad):
            return chosen.integrate(Reverse(target), x, times, noise).x

    assert torch.allclose(end(False), end(True), rtol=1e-12, atol=1e-12)


SOLVE = """
import torch, sdeflow
target = sdeflow.Gaussian(torch.zeros(3), std=0.5)
for solver in ("auto", "dpmpp_2m_sde", "rk45"):
    x = sdeflow.sample(target, solver=solver, n=4, seeds=0, **({} if solver == "rk45" else {"nfe": 9}))
    assert bool(torch.isfinite(x).all())
"""


@pytest.mark.parametrize("home", ["empty", "missing", "a file"])
def test_importing_and_sampling_write_and_compile_nothing(home: str, tmp_path: Path) -> None:
    folder = tmp_path / "home"
    if home == "empty":
        folder.mkdir()
    elif home == "a file":
        folder.write_text("not a folder")
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("HOME", "XDG_CACHE_HOME", "CC")
    }
    environment |= {"TMPDIR": str(tmp_path / "no-such-folder"), "PYTHONDONTWRITEBYTECODE": "1"}
    if home != "missing":
        environment |= {"HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}
    code = "import subprocess\nsubprocess.Popen = None  # no compiler is started\n" + SOLVE
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, cwd=tmp_path)
    assert [p.name for p in tmp_path.rglob("*")] == ([] if home == "missing" else ["home"])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_solve_can_be_traced() -> None:
    """`torch.jit.trace` sees every operation of the loop."""
    target = Gaussian(torch.zeros(5, dtype=torch.float64), std=0.5).under(VP())
    plan = solver("adams3").plan(VP(), grid_function("uniform_lam")(VP(), 8))
    x = torch.randn(3, 5, dtype=torch.float64)
    with torch.no_grad():
        traced = torch.jit.trace(
            lambda x: plan.execute(Reverse(target), x, None)[0], x, check_trace=False
        )
        y = torch.randn(3, 5, dtype=torch.float64)
        assert torch.allclose(traced(y), plan.execute(Reverse(target), y, None)[0], rtol=1e-12)
