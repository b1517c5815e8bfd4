"""Linear combinations: every way of computing them gives the same numbers, and bits that do not depend on a row's place."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdeflow.execution import combine, kernel
from sdeflow.plan.instructions import Combine
from sdeflow.process import VP
from sdeflow.registry import grid_function, solver
from sdeflow.reverse import Reverse
from sdeflow.targets import Gaussian

needs_kernel = pytest.mark.skipif(kernel.cpu_kernel(torch.float32) is None, reason="no C compiler here")
WAYS = [combine.by_passes, combine.with_gradients, pytest.param(combine.compiled, marks=needs_kernel)]


def summed(terms: list[tuple[Tensor, float]]) -> Tensor:
    """`((c0 x0 + c1 x1) + c2 x2) + ...`, rounded after every operation."""
    total: Tensor | None = None
    for x, c in terms:
        term = x * torch.tensor(c, dtype=x.dtype)
        total = term if total is None else total + term
    assert total is not None
    return total


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("terms", [1, 2, 3, 8, 9, 15, 16, 23])
@pytest.mark.parametrize("size", [1, 7, 4095, 4096, 4097, 100_001])
def test_the_kernel_rounds_as_written(size: int, terms: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(size + terms)
    x = [torch.randn(size, generator=draw, dtype=dtype) for _ in range(terms)]
    c = torch.randn(terms, generator=draw, dtype=torch.float64).tolist()
    out, exact = torch.empty(size, dtype=dtype), summed(list(zip(x, c, strict=True)))
    run = kernel.cpu_kernel(dtype)
    assert run is not None
    run([(out, x, c)], size)
    assert torch.equal(out, exact)
    # In place, and the next one reads what this one has written.
    first = x[0].clone()
    run([(x[0], x, c), (out, [x[0], first], [2.0, 0.5])], size)
    assert torch.equal(x[0], exact)
    assert torch.equal(out, summed([(exact, 2.0), (first, 0.5)]))


@needs_kernel
def test_bits_do_not_depend_on_the_place_in_the_batch_nor_on_threads() -> None:
    x = torch.randn(64, 3, 33, 31)
    y = torch.randn_like(x)
    run = kernel.cpu_kernel(x.dtype)
    assert run is not None
    whole, one = torch.empty_like(x), torch.empty_like(x[0])
    run([(whole, [x, y], [0.3, -1.7])], x.numel())
    for k in (0, 5, 63):
        run([(one, [x[k], y[k]], [0.3, -1.7])], one.numel())
        assert torch.equal(one, whole[k])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.empty_like(x)
        run([(alone, [x, y], [0.3, -1.7])], x.numel())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, whole)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", ["alike", "transposed", "half", "expanded"])
def test_every_way_takes_every_output_of_a_network(way: combine.Way, layout: str) -> None:
    x = torch.randn(4, 6, 6)
    x0 = {
        "alike": torch.randn(4, 6, 6),
        "transposed": torch.randn(4, 6, 6).mT,
        "half": torch.randn(4, 6, 6).half(),
        "expanded": torch.randn(6).expand(4, 6, 6),
    }[layout]
    run = (Combine(2, ((0, 0.5), (1, 0.25), (2, -1.0))), Combine(0, ((0, 2.0), (2, 1.0))))
    z = torch.randn(4, 6, 6)
    held, owned = [x.clone(), x0, z.clone()], {}
    owned = {0: held[0], 2: held[2]}
    with torch.no_grad():
        way((Combine(2, ((2, -1.0), (0, 0.5), (1, 0.25))), run[1]), held, owned, x)
    expected = -z + 0.5 * x + 0.25 * x0.float()
    assert torch.allclose(held[2], expected, atol=1e-6)
    assert torch.allclose(held[0], 2.0 * x + expected, atol=1e-6)


@pytest.mark.parametrize("name", ["ddim", "adams3", "unipc_3", "ipndm", "auto", "ddpm", "heun"])
@needs_kernel
def test_a_solve_is_the_same_by_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    process, chosen = VP(), solver(name)
    times = grid_function("uniform_lam")(process, 12)
    target = Gaussian(torch.zeros(5, dtype=torch.float64), std=0.5).under(process)
    x = torch.randn(3, 5, dtype=torch.float64)

    def end() -> Tensor:
        from sdeflow.noise import SeededNoise

        noise = SeededNoise([1, 2, 3], (5,), dtype=torch.float64)
        with torch.no_grad():
            return chosen.integrate(Reverse(target), x, times, noise).x

    compiled = end()
    monkeypatch.setattr(combine, "cpu_kernel", lambda dtype: None)
    assert torch.allclose(compiled, end(), rtol=1e-12, atol=1e-12)


@needs_kernel
def test_tensors_without_memory_are_left_to_torch() -> None:
    from torch._subclasses import FakeTensorMode

    with torch.no_grad(), FakeTensorMode():
        assert combine.way(torch.empty(2, 3)) is combine.by_passes


@pytest.fixture
def fresh() -> Iterator[None]:
    """Forget which kernels there are, before and after."""
    for cached in (kernel.cpu_kernel, kernel._library):
        cached.cache_clear()
    yield
    for cached in (kernel.cpu_kernel, kernel._library):
        cached.cache_clear()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("what", ["turned off", "no compiler", "a compiler that fails"])
def test_without_a_kernel_torch_does_the_work(what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if what == "turned off":
        monkeypatch.setenv("SDEFLOW_KERNEL", "0")
    else:
        monkeypatch.setenv("CC", "false" if what == "a compiler that fails" else "no-such-compiler")
    assert kernel.cpu_kernel(torch.float32) is None
    with torch.no_grad():
        assert combine.way(torch.zeros(2)) is combine.by_passes
    assert not any(tmp_path.rglob("*.so"))


@needs_kernel
@pytest.mark.parametrize("writable", [True, False])
def test_it_is_compiled_once_and_kept(writable: bool, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    if not writable:
        folder.write_text("not a folder")
    code = "import torch; from sdeflow.execution.kernel import cpu_kernel; assert cpu_kernel(torch.float32)"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "XDG_CACHE_HOME": str(folder)}, check=True)
    assert len(list(folder.rglob("*"))) == (2 if writable else 0)  # the folder sdeflow, and one library in it
