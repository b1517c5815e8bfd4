"""Denoisers that hold denoisers: what they hand on, what they cost, and what they hold for each
sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from problems import PROCESSES, Mixture
from torch import Tensor, nn

from sdeflow import (
    EDM,
    VP,
    Clip,
    Denoiser,
    Prediction,
    Process,
    Projected,
    RectifiedFlow,
    Wrapper,
    registry,
    sample,
    solve,
)
from sdeflow.errors import BudgetError
from sdeflow.noise import SeededNoise
from sdeflow.reverse import Reverse
from sdeflow.solvers.adaptive.step_size import PerSample
from sdeflow.solvers.base import GridSolver, Solver

GRID_SOLVERS = {
    name: solver
    for name in registry.SOLVERS
    if isinstance(solver := registry.solver(name), GridSolver)
}
NETS = (VP(), EDM(), RectifiedFlow())


# ---------------------------------------------------------------- a wrapper as a user would write it


class Guided(Wrapper):
    """Classifier-free guidance by hand: `x0 = u + scale (c - u)`."""

    def __init__(self, denoiser: Denoiser, scale: float):
        super().__init__(denoiser)
        self.scale = scale

    def inner_calls(self, condition: Mapping[str, Any]) -> list[Any]:
        return [(self.inner, condition), (self.inner, {**condition, "label": None})]

    def combine(self, calls: Sequence[Any], x: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = (call(x) for call in calls)
        return unconditional + self.scale * (conditional - unconditional)


class ByHand(Wrapper):
    """The same with `__call__`, which says its cost itself."""

    def __init__(self, denoiser: Denoiser, scale: float):
        super().__init__(denoiser)
        self.scale = scale

    def __call__(self, x: Tensor, t: float | Tensor, /, **condition: Any) -> Tensor:
        conditional = self.inner(x, t, **condition)
        unconditional = self.inner(x, t, **{**condition, "label": None})
        return unconditional + self.scale * (conditional - unconditional)

    def forwards(self, times: Tensor, /, **condition: Any) -> Tensor:
        return 2 * self.inner.forwards(times, **condition)


class Within(Guided):
    """Guidance within an interval of the noise-to-signal ratio: one call outside it."""

    def combine(self, calls: Sequence[Any], x: Tensor, t: Tensor) -> Tensor:
        inside = self.inside(t)
        if not bool(inside.any()):
            return calls[0](x)
        guided = super().combine(calls, x, t)
        return torch.where(inside.reshape(-1, *[1] * (x.ndim - 1)), guided, calls[0](x))

    def inside(self, t: Tensor) -> Tensor:
        nsr = self.process.nsr(t)
        return (nsr > 0.3) & (nsr < 3.0)

    def forwards(self, times: Tensor, /, **condition: Any) -> Tensor:
        return 1 + 2 * self.inside(times).long()


class Counting(nn.Module):
    """A conditional x0-network that counts its forwards; every row is computed by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | int | None = None) -> Tensor:
        self.calls += 1
        centre = torch.zeros(len(x), 1) if label is None else torch.as_tensor(label).reshape(-1, 1)
        return torch.tanh(self.weight.detach() * (x - centre)) + centre


def conditional(process: Process | None = None, **more: Any) -> Prediction:
    how = {"shape": (2,), "nsr_range": (0.01, 50.0), **more}
    return Prediction(Counting(), "x0", process or VP(), **how)


class Karras(Prediction):
    """A network with a grid of its own."""

    default_grid = "karras"


def network(denoiser: Denoiser) -> Counting:
    (module, *_) = denoiser.networks
    assert isinstance(module, Counting)
    return module


LABEL = torch.tensor([0.5, -1.0, 1.5, 0.0])
EVERY = {
    "guided": lambda model: Guided(model, 2.0),
    "by hand": lambda model: ByHand(model, 2.0),
    "within": lambda model: Within(model, 2.0),
    "projected": lambda model: Projected(model, Clip(-2.0, 2.0)),
    "projected guidance": lambda model: Projected(Guided(model, 2.0), Clip(-2.0, 2.0)),
    "guided projection": lambda model: Guided(Projected(model, Clip(-2.0, 2.0)), 2.0),
    "guided guidance": lambda model: Guided(Guided(model, 1.5), 1.0),
    "identity": Wrapper,
}


# --------------------------------------------------------------------------------- what is handed on


@pytest.mark.parametrize("name", EVERY)
def test_what_the_inner_denoiser_knows_is_handed_on(name: str) -> None:
    model = Karras(Counting(), "x0", VP(), shape=(2,), nsr_range=(0.01, 50.0))
    model.class_names = ("cat", "dog")
    wrapper = EVERY[name](model)
    assert wrapper.process == VP()
    assert wrapper.shape == (2,)
    assert wrapper.nsr_range == (0.01, 50.0)
    assert wrapper.default_grid == "karras"
    assert wrapper.class_names == ("cat", "dog")
    assert wrapper.networks[0] is model.network
    assert wrapper.network is model.network
    assert not wrapper.known_density
    for path in NETS:
        other = wrapper.under(path)
        assert other.process == path
        assert other.default_grid == model.under(path).default_grid
        assert other.nsr_range == (0.01, 50.0)
        assert other.under(VP()).process == VP()
    assert wrapper.under(VP()) is wrapper
    assert wrapper.rows(torch.tensor([1])) is wrapper
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = wrapper.nothing


@pytest.mark.parametrize("name", EVERY)
def test_conditions_are_checked_before_the_first_call(name: str) -> None:
    for path in NETS:
        model = conditional()
        wrapper = EVERY[name](model)
        with pytest.raises(TypeError, match="takes no condition 'lable'"):
            sample(wrapper, path, solver="ddim", nfe=3, condition={"lable": LABEL}, n=4, seeds=0)
        assert network(model).calls == 0


def test_a_condition_that_a_wrapper_needs_is_named() -> None:
    class Doubled(Guided):
        def inner_calls(self, condition: Mapping[str, Any]) -> list[Any]:
            return [(self.inner, {"label": 2 * condition["label"]})] * 2

    with pytest.raises(TypeError, match=r"needs the condition 'label': pass condition=\{'label'"):
        sample(Doubled(conditional(), 2.0), solver="ddim", nfe=3, seeds=0)


def test_a_denoiser_under_another_process_keeps_its_check() -> None:
    """The condition check of a user's denoiser holds on every path."""

    class Mine(Mixture):
        under = Denoiser.under  # type: ignore[assignment]

        def check_condition(self, condition: Mapping[str, Any]) -> None:
            if condition:
                raise TypeError("Mine takes no condition")

    moved = Mine(VP()).under(EDM())
    assert moved.process == EDM()
    assert moved.known_density
    assert moved.default_grid is None
    for path in (VP(), EDM(), RectifiedFlow()):
        with pytest.raises(TypeError, match="Mine takes no condition"):
            sample(Mine(VP()), path, solver="ddim", nfe=3, seeds=0, condition={"label": 1})


def test_guidance_keeps_the_grid_and_the_range_of_its_network() -> None:
    model = Karras(Counting(), "x0", VP(), shape=(2,), nsr_range=(0.01, 50.0))
    plain = solve(model, solver="heun", nfe=9, n=4, seeds=0, condition={"label": LABEL})
    for wrapper in (Guided(model, 2.0), ByHand(model, 2.0)):
        guided = solve(wrapper, solver="heun", nfe=9, n=4, seeds=0, condition={"label": LABEL})
        assert guided.grid == plain.grid == "karras"
        assert torch.equal(guided.times, plain.times)
        assert (guided.nfe, guided.network_calls) == (9, 18)


def test_the_device_and_the_training_flag_are_those_of_all_networks() -> None:
    class Both(Wrapper):
        def combine(self, calls: Sequence[Any], x: Tensor, t: Tensor) -> Tensor:
            return 2.0 * calls[0](x) - calls[1](x)

    class Dropped(Counting):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.0)

    weak = Prediction(Dropped(), "x0", EDM(), nsr_range=(0.02, 100.0))
    both = Both(conditional(), weak)
    assert both.nsr_range == (0.02, 50.0)
    assert [d.process for d in both.held] == [VP(), VP()]
    assert len(both.networks) == 2
    with pytest.warns(UserWarning, match="in training mode"):
        assert solve(both, solver="ddim", nfe=3, seeds=0).network_calls == 6


def test_wrappers_of_what_does_not_go_together_are_refused() -> None:
    with pytest.raises(TypeError, match="Wrapper wraps a Denoiser"):
        Wrapper(nn.Identity())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got none"):
        Wrapper()
    with pytest.raises(ValueError, match="of one shape"):
        Wrapper(conditional(), conditional(shape=(3,)))
    with pytest.raises(ValueError, match="common noise levels"):
        Wrapper(conditional(nsr_range=(0.01, 0.1)), conditional(nsr_range=(1.0, 2.0)))
    with pytest.raises(TypeError, match="its calls cannot be counted"):

        class Uncounted(Wrapper):
            def __call__(self, x: Tensor, t: float | Tensor, /, **condition: Any) -> Tensor:
                return self.inner(x, t) + self.inner(-x, t)

    with pytest.raises(NotImplementedError, match="define combine"):
        Wrapper(conditional(), conditional())(torch.zeros(1, 2), 0.5)


def test_the_old_name_of_a_known_density_says_the_new_one() -> None:
    with pytest.raises(AttributeError, match="known_density"):
        _ = Mixture().exact
    with pytest.raises(AttributeError, match="known_density"):
        Mixture().exact = True
    with pytest.raises(TypeError, match="known_density"):

        class Old(Mixture):
            exact = True


def test_predict_returns_all_outputs() -> None:
    model, x = Guided(conditional(), 2.0), torch.randn(4, 2)
    assert model.outputs == ("x0",)
    (x0,) = model.predict(x, 0.5, label=LABEL)
    assert torch.equal(x0, model(x, 0.5, label=LABEL))


# ------------------------------------------------------------------- every wrapper, by every solver


@pytest.mark.parametrize("name", EVERY)
def test_prepared_calls_are_the_call(name: str) -> None:
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    for path in PROCESSES.values():
        wrapper = EVERY[name](conditional()).under(path)
        times = path.t_of_nsr(torch.tensor([5.0, 1.0, 0.2], dtype=torch.float64))
        for t, call in zip(times, wrapper.at(times, x, label=LABEL), strict=True):
            expected = wrapper(x, t, label=LABEL)
            torch.testing.assert_close(call(x), expected)
            torch.testing.assert_close(wrapper(x, t.expand(4), label=LABEL), expected)


def expected(name: str, model: Prediction, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """What a wrapper says, written out."""
    c, u = model(x, t, label=label), model(x, t)
    guided = u + 2.0 * (c - u)
    match name:
        case "guided" | "by hand":
            return guided
        case "projected":
            return c.clamp(-2.0, 2.0)
        case "projected guidance":
            return guided.clamp(-2.0, 2.0)
        case "guided projection":
            return u.clamp(-2, 2) + 2.0 * (c.clamp(-2, 2) - u.clamp(-2, 2))
        case "within":
            nsr = model.process.nsr(t)
            return guided if 0.3 < float(nsr) < 3.0 else c
        case "guided guidance":
            return u + 1.5 * (c - u)
    return c


class WrittenOut(Denoiser):
    """The textbook of a wrapper: no base, no preparation."""

    def __init__(self, name: str, model: Prediction):
        self.name, self.model, self.process, self.shape = name, model, model.process, (2,)
        self.nsr_range = model.nsr_range

    def __call__(self, x: Tensor, t: float | Tensor, /, **condition: Any) -> Tensor:
        return expected(self.name, self.model, x, torch.as_tensor(t), condition["label"])


def loose(name: str) -> Solver:
    """A solver by name; one with a step size for each sample takes few calls."""
    solver = registry.solver(name)
    return (
        dataclasses.replace(solver, rtol=0.1, atol=0.1) if isinstance(solver, PerSample) else solver
    )


def budget(solver: Solver) -> int | None:
    for nfe in range(5, 40):
        try:
            solver.levels(nfe)
        except BudgetError:
            continue
        return nfe
    return None


@pytest.mark.parametrize("solver", GRID_SOLVERS)
def test_a_wrapper_equals_its_textbook_under_every_solver(solver: str) -> None:
    method = GRID_SOLVERS[solver]
    for k, name in enumerate(EVERY):
        path = NETS[k % len(NETS)]
        model = conditional(path)
        network(model).double()
        wrapper = EVERY[name](model)
        nfe = budget(method)
        whole = solve(
            wrapper, solver=method, nfe=nfe, n=4, seeds=0, condition={"label": LABEL},
            grid="uniform_lam", batch_size=3, dtype=torch.float64,
        )  # fmt: skip
        counted = network(model).calls
        assert whole.network_calls == counted
        assert whole.nfe == nfe
        source = SeededNoise(range(4), (2,), dtype=torch.float64)
        start = source.start() * path.level(float(whole.times[0])).sigma
        reverse = Reverse(WrittenOut(name, model), {"label": LABEL})
        textbook = method.textbook(reverse, start, whole.times, source)
        torch.testing.assert_close(whole.x, textbook, rtol=1e-8, atol=1e-8)


# ------------------------------------------------------------------- what is held for each sample


class Offset(Denoiser):
    """Holds an offset for each sample, and keeps which it was asked with."""

    shape = (2,)

    def __init__(self, offset: Tensor, process: Process, asked: list[Tensor]):
        self.offset, self.process, self.asked = offset, process, asked

    def __call__(self, x: Tensor, t: float | Tensor, /, **condition: Any) -> Tensor:
        assert len(self.offset) == len(x)
        self.asked.append(self.offset)
        return 0.1 * x + self.offset.reshape(-1, 1)

    def rows(self, index: Tensor) -> Denoiser:
        return Offset(self.offset[index], self.process, self.asked)


class Scaled(Guided):
    """Guidance with a scale for each sample."""

    def combine(self, calls: Sequence[Any], x: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = (call(x) for call in calls)
        scale = self.scale.reshape(-1, 1)
        return unconditional + scale * (conditional - unconditional)

    def rows(self, index: Tensor) -> Denoiser:
        other = super().rows(index)
        if other is self:
            other = Scaled(self.inner, self.scale)
        other.scale = self.scale[index]
        return other


OFFSETS = torch.tensor([0.0, 10.0, 20.0, 30.0])


@pytest.mark.parametrize("solver", registry.SOLVERS)
def test_a_sample_keeps_its_own_data_in_every_batch(solver: str) -> None:
    method = loose(solver)
    for wrap in (lambda d: d, lambda d: Projected(Wrapper(d), Clip(-99.0, 99.0)), None):
        asked: list[Tensor] = []
        inner = Offset(OFFSETS, VP(), asked)
        denoiser = Offset(OFFSETS, EDM(), asked).under(VP()) if wrap is None else wrap(inner)
        how: dict[str, Any] = {"solver": method, "nfe": budget(method), "n": 4, "seeds": 0}
        whole = sample(denoiser, **how)
        for size in (1, 2, 3):
            asked.clear()
            parts = sample(denoiser, batch_size=size, **how)
            torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-3)
            assert {float(o) for offsets in asked for o in offsets} == {0.0, 10.0, 20.0, 30.0}


def test_an_adaptive_solver_asks_for_the_places_in_the_whole_set() -> None:
    asked: list[Tensor] = []
    sample(Offset(OFFSETS, VP(), asked), solver="rk45", n=4, batch_size=2, seeds=0)
    assert asked[0].tolist() == [0.0, 10.0]
    assert asked[-1].tolist() == [20.0, 30.0]


@pytest.mark.parametrize(
    "solver", ["rk45", "dpm_adaptive_23", "adaptive_ancestral", "heun", "ddpm"]
)
def test_wrappers_of_wrappers_cut_along(solver: str) -> None:
    scale = torch.tensor([0.0, 1.0, 2.0, 3.0])
    how: dict[str, Any] = {"solver": loose(solver), "nfe": budget(loose(solver)), "seeds": 0}
    how["condition"] = {"label": LABEL}
    for process in NETS:
        model = Projected(Scaled(conditional(), scale), Clip(-9.0, 9.0))
        whole = sample(model, process, n=4, **how)
        parts = sample(model, process, n=4, batch_size=3, **how)
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
        for i in range(4):
            how_alone = {**how, "seeds": [i], "condition": {"label": LABEL[i : i + 1]}}
            alone = sample(Guided(conditional(), float(scale[i])), process, n=1, **how_alone)
            torch.testing.assert_close(alone[0], whole[i], rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------- what it costs


@pytest.mark.parametrize("solver", [n for n in registry.SOLVERS if n not in GRID_SOLVERS])
def test_adaptive_and_external_solvers_count_forwards(solver: str) -> None:
    method = loose(solver)
    for name in ("guided", "by hand", "guided guidance", "identity"):
        model = conditional()
        each = {"guided guidance": 4, "identity": 1}.get(name, 2)
        solution = solve(
            EVERY[name](model), solver=method, nfe=budget(method), n=4, seeds=0, batch_size=2,
            condition={"label": LABEL},
        )  # fmt: skip
        assert solution.network_calls == network(model).calls
        assert solution.network_calls % each == 0
        assert solution.network_gradients == 0


def test_plans_and_batches_count_forwards() -> None:
    model = conditional()
    times = torch.linspace(1.0, 0.01, 5, dtype=torch.float64)
    plan = GRID_SOLVERS["heun"].plan(VP(), times)
    solution = solve(Guided(model, 2.0), solver=plan, n=5, seeds=0, batch_size=2)
    assert (solution.nfe, solution.network_calls) == (9, 3 * 18)
    assert network(model).calls == 3 * 18


def test_gradients_are_counted() -> None:
    class Differentiated(Wrapper):
        def combine(self, calls: Sequence[Any], x: Tensor, t: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                x0 = calls[0](x)
                (slope,) = torch.autograd.grad(x0.square().sum(), x)
            return x0.detach() - 0.01 * slope

        def network_gradients(self, times: Tensor, /, **condition: Any) -> Tensor:
            return torch.ones(len(times), dtype=torch.int64)

    solution = solve(Differentiated(conditional()), solver="ddim", nfe=5, n=4, seeds=0)
    assert (solution.nfe, solution.network_calls, solution.network_gradients) == (5, 5, 5)


def test_a_network_that_returns_one_tensor_at_every_call_can_be_guided() -> None:
    held = torch.empty(4, 2)

    def lender(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return held.copy_(x * 0.5 if label is None else x * 0.5 + label.reshape(-1, 1))

    guided = Guided(Prediction(lender, "x0", VP()), 2.0)
    x = torch.randn(4, 2)
    torch.testing.assert_close(guided(x, 0.5, label=LABEL), x * 0.5 + 2.0 * LABEL.reshape(-1, 1))
