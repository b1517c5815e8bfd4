"""A compiled network says that it is compiled, once for each shape, and is the network that it
was.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_unet import unet

from sdeflow import load, sample
from sdeflow.models import torch_compile
from sdeflow.models.torch_compile import compile_network


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """torch.compile, replaced by one that takes no time; what it was asked."""
    asked: list[Any] = []

    def compile(function: Any, **options: Any) -> Any:
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    return asked


def test_each_shape_is_told_once(calls: list[Any]) -> None:
    network, told = unet(), list[str]()
    x, t, label = torch.randn(2, 3, 8, 8), torch.zeros(2), torch.tensor([0, 1])
    expected = network(x, t, label)
    compile_network(network, told.append)
    assert calls == [{"dynamic": False}]
    for _ in range(2):
        assert torch.equal(network(x, t, label), expected)
    assert [line.split(":")[0].split(" in ")[0] for line in told] == [
        "compiling the network for 2 x 3 x 8 x 8",
        "compiled for 2 x 3 x 8 x 8",
    ]
    network(x[:1], t[:1], label=label[:1])
    network(x[:1], t[:1], label[:1])
    assert len(told) == 4
    assert torch.equal(copy.deepcopy(network)(x, t, label), expected)  # a copy is not compiled
    assert len(told) == 4


def test_a_loaded_network_compiles_when_it_is_called(
    calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = sample(load("cifar10"), nfe=2, n=1, seeds=0, condition={"label": 3})
    assert not calls
    model = load("cifar10", compile=True)
    assert capsys.readouterr().err == ""
    assert torch.equal(sample(model, nfe=2, n=1, seeds=0, condition={"label": 3}), plain)
    assert "compiling the network for 1 x 3 x 32 x 32" in capsys.readouterr().err


def test_one_process_of_many_tells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        torch_compile.say(f"from {rank}")
    assert capsys.readouterr().err == "from 0\n"


@pytest.mark.cuda
def test_on_a_gpu_what_is_compiled_is_the_same_within_rounding() -> None:
    plain, fast = (load("cifar10", "cuda", compile=compile) for compile in (False, True))
    x, t, label = (
        torch.randn(4, 3, 32, 32, device="cuda"),
        torch.full((4,), 0.1, device="cuda"),
        torch.arange(4).cuda(),
    )
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        torch.testing.assert_close(
            fast.network(x, t, label), plain.network(x, t, label), rtol=1e-3, atol=1e-3
        )
