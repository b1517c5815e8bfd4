"""The UNet and its moving average: shapes, conditions, layouts, gradients, compilation without
graph breaks.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sdeflow.models import EMA, UNet, UNetConfig
from sdeflow.models.unet import AdaptiveNorm

TINY = UNetConfig(
    size=8, num_classes=3, channels=8, multipliers=(1, 2), blocks=1, attention=(4,), embedding=16, head_channels=8,
    group_size=4, dropout=0.0,
)  # fmt: skip


def unet(config: UNetConfig = TINY, seed: int = 0) -> UNet:
    """A network none of whose parts is at zero."""
    torch.manual_seed(seed)
    network = UNet(config)
    for parameter in network.parameters():
        if not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.1)
    return network


def batch(n: int = 4, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, size, size, generator=generator)
    return x, torch.linspace(-1, 1, n), torch.arange(n) % 4


def test_configuration_survives_json() -> None:
    assert UNetConfig.from_dict(json.loads(json.dumps(TINY.to_dict()))) == TINY
    with pytest.raises(ValueError, match="has no chanels"):
        UNetConfig.from_dict({"chanels": 3})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 9}, "multiple of 2"),
        ({"channels": 10}, "multiple of group_size"),
        ({"head_channels": 3}, "heads of 3"),
        ({"dropout": 1.0}, r"in \[0, 1\)"),
        ({"blocks": 0}, "at least 1"),
        ({"multipliers": ()}, "multipliers"),
        ({"num_classes": -1}, "num_classes"),
    ],
)
def test_impossible_configurations_are_told(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_output_has_the_shape_of_the_input_and_starts_at_zero() -> None:
    x, time, label = batch()
    assert torch.equal(UNet(TINY)(x, time, label), torch.zeros_like(x))
    assert unet()(x, time, label).shape == x.shape
    assert unet()(batch(2, 16)[0], time[:2]).shape == (2, 3, 16, 16)  # other sizes too


def test_one_time_for_all_is_the_same_as_one_each() -> None:
    x, time, label = batch()
    network = unet().eval()
    torch.testing.assert_close(network(x, time[1], label), network(x, time[1].expand(4), label))
    torch.testing.assert_close(network(x, time[1]), network(x, time[1].expand(4)))


def test_time_and_label_matter_and_no_label_is_the_null_class() -> None:
    x, time, label = batch()
    network = unet().eval()
    y = network(x, time, label)
    assert (network(x, time + 0.1, label) - y).abs().max() > 1e-3
    assert (network(x, time, (label + 1) % 4) - y).abs().max() > 1e-3
    torch.testing.assert_close(network(x, time), network(x, time, torch.full((4,), 3)))


def test_samples_do_not_see_each_other() -> None:
    x, time, label = batch()
    network = unet().eval()
    alone = torch.cat([network(x[i : i + 1], time[i : i + 1], label[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(network(x, time, label), alone, rtol=1e-4, atol=1e-5)


def test_every_parameter_gets_a_gradient() -> None:
    x, time, label = batch()
    network = unet()
    network(x, time, label).square().mean().backward()
    still = [
        name for name, p in network.named_parameters() if p.grad is None or not bool(p.grad.any())
    ]
    # Adding a constant to all keys changes no softmax, but the keys are normalised first, so their
    # bias counts too.
    assert still == []


def test_gradient_agrees_with_finite_differences() -> None:
    network = unet(replace(TINY, attention=())).double()
    x, time, label = batch(1)
    x = x.double().requires_grad_()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).double()
    (slope,) = torch.autograd.grad(network(x, time[:1], label[:1]).sum(), x)
    h = 1e-3  # norms compute in the input's precision; queries and keys are normalised in float32
    with torch.no_grad():
        up, down = (network(x + s * h * direction, time[:1], label[:1]).sum() for s in (1, -1))
    torch.testing.assert_close(
        (slope * direction).sum(), (up - down) / (2 * h), rtol=1e-3, atol=1e-4
    )


def test_both_ways_to_normalise_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 5, 5, generator=generator) * 2 + 3
    norm = AdaptiveNorm(8, 4)
    norm.weight.data.normal_(generator=generator)
    norm.bias.data.normal_(generator=generator)
    scale, shift = torch.randn(2, 2, 8, generator=generator)
    weight, bias = norm.weight * (1 + scale), norm.bias * (1 + scale) + shift
    torch.testing.assert_close(
        norm(x, scale, shift), norm._by_channel(x, weight, bias), rtol=1e-4, atol=1e-5
    )
    expected = torch.nn.functional.group_norm(x, 2, norm.weight, norm.bias, 1e-5)
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(
        norm._by_channel(x, norm.weight, norm.bias), expected, rtol=1e-4, atol=1e-5
    )


def test_memory_is_channels_last_and_bf16_is_near() -> None:
    x, time, label = batch()
    network = unet().eval()
    y = network(x, time, label)
    assert y.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        half = network(x, time, label)
    assert half.dtype == torch.bfloat16
    assert (half - y).norm() / y.norm() < 0.03


def test_it_runs_in_half_precision_with_angles_that_are_not() -> None:
    x, time, label = batch()
    network = unet().eval()
    with torch.no_grad():
        whole = network(x, time, label)
        half = network.bfloat16()(x.bfloat16(), time, label)
        # A change of the noise level that bfloat16 would round away (2^-10 of a level near 1), and
        # must not be lost.
        near, far = (network(x.bfloat16(), torch.tensor(t), label) for t in (1.0, 1.0 + 2.0**-9))
    assert half.dtype == torch.bfloat16
    assert float((half.float() - whole).norm() / whole.norm()) < 0.03
    assert not torch.equal(near, far)


def test_dropout_acts_in_training_only() -> None:
    x, time, label = batch()
    network = unet(replace(TINY, dropout=0.5))
    assert not torch.equal(network(x, time, label), network(x, time, label))
    network.eval()
    assert torch.equal(network(x, time, label), network(x, time, label))


def test_wrong_inputs_are_told() -> None:
    x, time, label = batch()
    with pytest.raises(ValueError, match="multiples of 2"):
        unet()(x[..., :7, :], time)
    with pytest.raises(ValueError, match="unconditional"):
        unet(replace(TINY, num_classes=0))(x, time, label)


def test_the_default_network_fits_the_package() -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in UNet(UNetConfig(num_classes=10)).parameters())
    assert 15e6 < count <= 16e6


def test_traces_without_graph_breaks() -> None:
    x, time, label = batch()
    network = unet(replace(TINY, attention=()))
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(x, time, label), network(x, time, label), rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
def test_compiles_and_gives_the_same_gradients() -> None:
    x, time, label = batch()
    network = unet()
    network(x, time, label).square().mean().backward()
    gradients = {
        name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None
    }
    network.zero_grad()
    torch.compile(network, fullgraph=True)(x, time, label).square().mean().backward()
    for name, p in network.named_parameters():
        assert p.grad is not None
        assert (p.grad - gradients[name]).norm() <= 1e-4 * gradients[name].norm() + 1e-7, name


# ------------------------------------------------------------------------------- the moving average


def test_average_forgets_half_in_a_half_life_whatever_the_batch_size() -> None:
    network = torch.nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(0.0)
    for size in (1, 10, 100):
        ema = EMA(network, half_life=100, warmup=1e9)
        ema.parameters["weight"].fill_(1.0)
        for seen in range(size, 101, size):
            ema.update(network, seen, size)
        torch.testing.assert_close(ema.parameters["weight"].item(), 0.5, rtol=1e-4, atol=0)


def test_average_forgets_its_start_while_it_is_young() -> None:
    ema = EMA(torch.nn.Linear(1, 1), half_life=1000, warmup=0.1)
    assert ema.decay(100, 10) == pytest.approx(0.5)  # the half-life is 10 images
    assert ema.decay(10**6, 1000) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="positive"):
        EMA(torch.nn.Linear(1, 1), half_life=0)


def test_average_is_a_copy_and_comes_back_from_its_state() -> None:
    network, other = unet(), unet(seed=1)
    ema = EMA(network)
    ema.update(other, 1000, 10)
    again = EMA(network)
    again.load_state_dict({name: value.clone() for name, value in ema.state_dict().items()})
    averaged = again.averaged(network)
    assert not averaged.training
    assert not any(p.requires_grad for p in averaged.parameters())
    for name, p in averaged.named_parameters():
        assert torch.equal(p, ema.parameters[name])
    assert network.training
    with pytest.raises(ValueError, match="another network"):
        again.load_state_dict({"weight": torch.zeros(1)})
