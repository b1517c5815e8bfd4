"""What a network is given and returns: conditions of every form cut along with every batch, data
that a denoiser holds for each sample, outputs, signatures, inference mode.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import GRID_SOLVERS
from torch import Tensor, nn

from sdeflow import Gaussian, PerSample, Shared, Wrapper, encode, registry, sample, solve
from sdeflow.denoisers import Denoiser, Prediction
from sdeflow.denoisers.condition import cut, plain, prepared
from sdeflow.errors import BudgetError
from sdeflow.models.checkpoint import Pretrained
from sdeflow.models.unet import UNet, UNetConfig
from sdeflow.process import EDM, VP, Process
from sdeflow.reverse import Reverse
from sdeflow.solvers.base import Solver

CPU = torch.device("cpu")


def loose(name: str) -> Solver:
    """A solver by name; one with a step size for each sample takes few calls."""
    solver = registry.solver(name)
    if solver.adaptive and not name.startswith("torch"):
        return dataclasses.replace(solver, rtol=0.1, atol=0.1)  # type: ignore[type-var]
    return solver


def budget(solver: Solver) -> int | None:
    for nfe in range(30, 70):  # of few, some methods refuse to encode
        try:
            solver.levels(nfe)
        except BudgetError:
            continue
        return nfe
    return None


# ------------------------------------------------------------------------- conditions of every form


def forms(n: int) -> dict[str, Any]:
    """The numbers 0 to n - 1 of `n` samples, in every form that is cut along."""
    numbers = torch.arange(n)
    return {
        "tensor": numbers,
        "column": numbers.reshape(n, 1).float(),
        "wide": numbers.reshape(n, 1).expand(n, n).clone(),
        "array": numbers.numpy(),
        "strided array": np.arange(2 * n)[::2] // 2,
        "strings": [f"sample {i}" for i in range(n)],
        "array of strings": np.array([f"sample {i}" for i in range(n)]),
        "tuple of strings": tuple(f"sample {i}" for i in range(n)),
        "numbers": list(range(n)),
        "numpy numbers": [np.int64(i) for i in range(n)],
        "0-d tensors": [torch.tensor(i) for i in range(n)],
        "bits": [[bool(i >> k & 1) for k in range(6)] for i in range(n)],
        "ragged": [list(range(i)) for i in range(n)],
        "tensors of several lengths": PerSample([torch.zeros(i) for i in range(n)]),
        "deque": deque(range(n)),
        "range": range(n),
        "dicts": [{"number": i} for i in range(n)],
        "dict": OrderedDict(a=numbers, b={"c": [f"{i}" for i in range(n)], "d": 0.5}),
        "list of tensors": [numbers, numbers.float()] if n != 2 else [numbers],
        "said": PerSample(numbers),
    }


def number_in(form: str, value: Any) -> list[int]:
    """The numbers of the samples that a network finds in a condition."""
    match form:
        case "tensor" | "array" | "strided array" | "numbers" | "numpy numbers" | "0-d tensors":
            assert isinstance(value, Tensor)
            assert value.ndim == 1
            return value.tolist()
        case "said" | "deque" | "range":
            return value.tolist()
        case "column":
            return value[:, 0].int().tolist()
        case "wide":
            return value[:, -1].tolist()
        case "strings" | "array of strings" | "tuple of strings":
            return [int(text.removeprefix("sample ")) for text in value]
        case "bits":
            assert value.dtype == torch.bool
            return [sum(int(b) << k for k, b in enumerate(row)) for row in value.tolist()]
        case "ragged" | "tensors of several lengths":
            return [len(entry) for entry in value]
        case "dicts":
            return [entry["number"] for entry in value]
        case "dict":
            assert value["a"].tolist() == [int(i) for i in value["b"]["c"]]
            assert value["b"]["d"] == 0.5
            return value["a"].tolist()
        case "list of tensors":
            assert all(entry.tolist() == value[0].tolist() for entry in value)
            return value[0].tolist()
    raise AssertionError(form)


def shared(n: int) -> dict[str, Any]:
    """What all samples share, some of it of `n` rows by coincidence."""
    return {
        "embedding": Shared(torch.ones(n, 3)),
        "words": Shared([f"word {i}" for i in range(n)]),
        "arrays": Shared({"a": np.ones(n), "b": [torch.ones(n)]}),
        "number": 0.25,
        "zero-d": torch.tensor(0.5),
        "text": "n" * n,
        "none": None,
        "object": len,
        "set": {1, 2},
    }


@pytest.mark.parametrize("solver", registry.SOLVERS)
def test_conditions_of_every_form_stay_with_their_samples(solver: str) -> None:
    """Under every solver: the network sees the same numbers in all forms, and what is shared is
    whole.
    """
    n = 4
    seen: list[int] = []

    def network(x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        numbers = {form: number_in(form, condition[form]) for form in forms(n)}
        assert all(found == numbers["tensor"] for found in numbers.values()), numbers
        assert len(numbers["tensor"]) == len(x)
        assert condition["embedding"].shape == (n, 3)
        assert len(condition["words"]) == len(condition["text"]) == n
        assert condition["arrays"]["a"].shape == condition["arrays"]["b"][0].shape == (n,)
        assert (condition["number"], condition["none"], condition["object"]) == (0.25, None, len)
        assert condition["zero-d"].shape == ()
        seen.extend(numbers["tensor"])
        return 0.1 * x + condition["tensor"].reshape(-1, 1)

    model = Prediction(network, "x0", VP(), shape=(2,))
    method = loose(solver)
    how: dict[str, Any] = {"solver": method, "nfe": budget(method), "n": n, "seeds": 0}
    how["condition"] = {**forms(n), **shared(n)}
    whole = sample(model, **how)
    for size in (1, 3):
        seen.clear()
        parts = sample(model, batch_size=size, **how)
        assert set(seen) == set(range(n))
        torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-3)


@settings(max_examples=100)
@given(st.data())
def test_a_cut_of_a_cut_is_a_cut(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 9))
    start = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(start + 1, n))
    some = data.draw(st.lists(st.integers(0, stop - start - 1), min_size=1, unique=True))
    for form, value in forms(n).items():
        node = prepared(form, value, n, CPU)
        assert number_in(form, plain(node)) == list(range(n))
        part = cut(node, slice(start, stop))
        assert number_in(form, plain(part)) == list(range(start, stop))
        fewer = cut(part, torch.tensor(some))
        assert number_in(form, plain(fewer)) == [start + i for i in some]
    for name, value in shared(n).items():
        node = prepared(name, value, n, CPU)
        fewer = plain(cut(cut(node, slice(start, stop)), torch.tensor(some)))
        assert type(fewer) is type(plain(node))
        if name == "words":
            assert fewer == [f"word {i}" for i in range(n)]


def test_one_row_serves_all() -> None:
    for value in (torch.tensor([7]), np.array([7]), [7], PerSample([7]), [torch.tensor(7)]):
        assert plain(prepared("label", value, 3, CPU)).tolist() == [7, 7, 7]
    assert plain(prepared("text", ["a"], 3, CPU)) == ["a", "a", "a"]
    assert plain(prepared("text", [], 3, CPU)) == []


class Pair(NamedTuple):
    a: str
    b: str


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (torch.zeros(3), ValueError, r"'y' has 3 rows for 4 samples.*\(3,\).*Shared\(value\)"),
        (np.zeros((3, 2)), ValueError, "3 rows for 4 samples"),
        (["a", "b"], ValueError, r"2 rows for 4 samples \(it is a list\).*Shared"),
        ((1024, 1024), ValueError, "2 rows for 4 samples"),
        (Pair("a", "b"), ValueError, "2 rows for 4 samples"),
        ([torch.zeros(4), torch.zeros(5)], ValueError, "2 rows for 4 samples"),
        ([torch.zeros(4, 2)] * 4, ValueError, r"4 tensors of 4 rows.*PerSample.*dict.*Shared"),
        ([np.zeros(4)] * 4, ValueError, "4 tensors of 4 rows"),
        ({"a": {"b": torch.zeros(3)}}, ValueError, "'y.a.b' has 3 rows"),
        ({"a": [torch.zeros(4), {"b": [1, 2]}]}, ValueError, "'y.a' has 2 rows"),
        (np.array([["a", "b"]] * 4), TypeError, "array of <U1"),
        (np.array([1, 2, 3, 4], dtype="M8[s]"), TypeError, "array of datetime64"),
        (iter([1, 2, 3, 4]), TypeError, "list_iterator.*one entry a sample"),
        ((i for i in range(4)), TypeError, "generator"),
        (bytearray(b"abcd"), ValueError, ""),
        (torch.eye(4).to_sparse(), TypeError, "sparse"),
        (PerSample(3), TypeError, "an? int has no rows"),
        (PerSample("abcd"), TypeError, "a str has no rows"),
        (PerSample({"a": torch.zeros(4)}), TypeError, "a dict has no rows"),
        (PerSample(torch.zeros(3)), ValueError, "3 rows for 4 samples"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(
    value: Any, error: type[Exception], match: str
) -> None:
    def network(x: Tensor, t: Tensor, y: Any) -> Tensor:
        raise AssertionError("called")

    model = Prediction(network, "x0", VP(), shape=(2,))
    if not match:
        assert plain(prepared("y", value, 4, CPU)).tolist() == [97, 98, 99, 100]
        return
    with pytest.raises(error, match=f"(?s){match}"):
        sample(model, nfe=2, n=4, condition={"y": value})


def test_a_reverse_that_is_given_values_cuts_those_of_its_size() -> None:
    model = Prediction(lambda x, t, **condition: 0.1 * x, "x0", VP())
    whole = Reverse(model, {"y": torch.arange(4), "z": ["a", "b"], "w": Shared(torch.arange(4))})
    some = whole.rows(torch.tensor([3, 1]), 4).rows(torch.tensor([1]), 2)
    assert some.condition["y"].tolist() == [1]
    assert some.condition["z"] == ["a", "b"]
    assert some.condition["w"].tolist() == [0, 1, 2, 3]


def labelled() -> Pretrained:
    torch.manual_seed(0)
    config = UNetConfig(
        size=8,
        channels=16,
        multipliers=(1,),
        blocks=1,
        attention=(),
        num_classes=3,
        head_channels=16,
    )
    return Pretrained(UNet(config).eval())


@pytest.mark.parametrize(
    "label",
    [
        torch.zeros(2, 1, dtype=torch.int64),
        torch.zeros(2),
        torch.zeros(2, dtype=torch.bool),
        [True, False],
        True,
        [0.0, 1.0],
        ["cat", "dog"],
        np.zeros((2, 1), dtype=np.int64),
        [[0], [1]],
        torch.tensor([0, 4]),
        -1,
    ],
)
def test_labels_that_are_none_are_explained_before_any_call(label: Any) -> None:
    model = labelled()
    model.network.forward = None  # type: ignore[assignment,union-attr]
    with pytest.raises((ValueError, TypeError), match=r"label is a whole number.*got"):
        sample(model, nfe=1, n=2, condition={"label": label})


def test_a_unet_of_ones_own_says_it_too() -> None:
    network = labelled().network
    for label in (torch.zeros(2, 1, dtype=torch.int64), torch.tensor([True, False])):
        with pytest.raises(ValueError, match=r"labels are integers of shape \[B\]"):
            network(torch.zeros(2, 3, 8, 8), torch.zeros(2), label)


# --------------------------------------------------------------- data that is held for each sample


class Holding(Denoiser):
    """Holds a number for each sample."""

    shape = (2,)

    def __init__(self, numbers: Tensor, process: Process):
        self.numbers, self.process = numbers, process

    def __call__(self, x: Tensor, t: float | Tensor, /, **condition: Any) -> Tensor:
        assert len(self.numbers) == len(x)
        if "number" in condition:
            assert condition["number"].tolist() == self.numbers.tolist()
        return 0.1 * x + self.numbers.reshape(-1, 1)

    def rows(self, index: Tensor) -> Denoiser:
        return Holding(self.numbers[index], self.process)


NUMBERS = torch.tensor([0.0, 10.0, 20.0, 30.0, 40.0])


@pytest.mark.parametrize("solver", registry.SOLVERS)
@pytest.mark.parametrize("start", ["noise", "x", "x0", "encode", "plan", "trajectory", "brownian"])
def test_what_is_held_for_a_sample_goes_with_it(solver: str, start: str) -> None:
    """From every start, in batches of every size, together with conditions and states."""
    method = loose(solver)
    n = len(NUMBERS)
    condition = {"number": NUMBERS}
    denoiser = Wrapper(Holding(NUMBERS, VP()))
    how: dict[str, Any] = {"condition": condition}
    given_x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    if start == "encode":
        if not method.reversible or solver == "ipndm_v":  # it is refused on every grid
            return

        def run(size: int) -> Tensor:
            nfe = None if method.adaptive else _even(method)
            return encode(denoiser, given_x, solver=method, nfe=nfe, batch_size=size, **how)
    else:
        if start == "plan":
            if solver not in GRID_SOLVERS:
                return
            method = GRID_SOLVERS[solver].plan(VP(), [1.0, 0.5, 0.1, 0.01])  # type: ignore[assignment]
            nfe = None
        else:
            nfe = budget(method)
        how |= {
            "x": {"x": given_x, "t": 0.8},
            "x0": {"x0": given_x, "t": 0.8},
            "brownian": {"noise": "brownian"},
        }.get(start, {})

        def run(size: int) -> Tensor:
            more: dict[str, Any] = {"seeds": range(n), "batch_size": size, **how}
            if start == "trajectory":
                if method.adaptive or solver not in GRID_SOLVERS:
                    return sample(denoiser, solver=method, nfe=nfe, **more)
                solution = solve(
                    denoiser, solver=method, nfe=nfe, trajectory=True, x0s=True, **more
                )
                assert solution.trajectory is not None
                assert solution.x0s is not None
                return torch.cat([solution.x, *solution.trajectory, *solution.x0s])
            return sample(denoiser, solver=method, nfe=nfe, **more)

    whole = run(n)
    for size in (1, 3):
        torch.testing.assert_close(run(size), whole, rtol=1e-3, atol=1e-3)


def _even(method: Solver) -> int:
    """A budget of encoding."""
    for nfe in range(30, 70):  # of few, some methods refuse to encode
        try:
            method.levels(nfe, finish=False)
        except BudgetError:
            continue
        return nfe
    raise AssertionError


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_what_is_held_for_a_sample_goes_with_it_on_every_rank(ranks: int) -> None:
    """As `generate` and `evaluate` cut a set: by places in the whole, then in batches."""
    whole = sample(Holding(NUMBERS, VP()), solver="rk45", n=5, seeds=0)
    for rank in range(ranks):
        rows = range(5 * rank // ranks, 5 * (rank + 1) // ranks)
        mine = Holding(NUMBERS, VP()).rows(torch.arange(rows.start, rows.stop))
        part = sample(mine, solver="rk45", n=len(rows), seeds=rows.start, batch_size=2)
        torch.testing.assert_close(part, whole[rows.start : rows.stop], rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------- outputs and signatures


@dataclasses.dataclass
class UNet2DOutput:
    sample: Tensor


@dataclasses.dataclass
class Unlike:
    x: Tensor


@pytest.mark.parametrize(
    ("output", "match"),
    [
        (lambda x: UNet2DOutput(x), r"returned UNet2DOutput .*take .sample of it.*\.sample`"),
        (lambda x: (x,), r"returned tuple .*take \[0\]"),
        (lambda x: [x, x], r"returned list .*take \[0\]"),
        (lambda x: {"eps": x}, r"returned dict .*take \['eps'\]"),
        (lambda x: Unlike(x), r"returned Unlike for a state of shape \(2, 3\)"),
        (lambda x: None, "returned NoneType"),
        (lambda x: x.numpy(), "returned ndarray"),
        (lambda x: x[..., :1], r"shape \(2, 1\)"),
        (lambda x: x.long(), r"returned torch.int64.*output.float\(\)"),
        (lambda x: x > 0, "returned torch.bool"),
        (lambda x: x.to(torch.complex64), "returned torch.complex64"),
    ],
)
@pytest.mark.parametrize("solver", ["ddim", "rk45"])
def test_an_output_that_is_none_says_what_to_take(
    output: Callable[[Tensor], Any], match: str, solver: str
) -> None:
    model = Prediction(lambda x, t: output(x), "x0", VP(), shape=(3,))
    with pytest.raises(ValueError, match=f"(?s){match}"):
        sample(model, solver=solver, n=2)


class NoTime(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("called")


class TimeByName(nn.Module):
    def forward(self, x: Tensor, *, t: Tensor) -> Tensor:
        raise AssertionError("called")


class Any2(nn.Module):
    def forward(self, *arguments: Tensor) -> Tensor:
        return 0.1 * arguments[0]


@pytest.mark.parametrize(
    "network", [NoTime(), TimeByName(), lambda x: x, lambda: None, nn.Linear(2, 2)]
)
def test_a_network_without_time_is_refused_where_it_is_wrapped(network: Any) -> None:
    with pytest.raises(
        TypeError, match=r"network\(x, t, \*\*condition\), and the network.* by pos"
    ):
        Prediction(network, "eps", VP())
    if not isinstance(network, nn.Module):
        with pytest.raises(TypeError, match=r"network\(x, t"):
            sample(network, VP(), shape=(2,))


def test_networks_of_any_signature_with_a_time_run() -> None:
    def one(x: Tensor, t: Tensor = torch.ones(1)) -> Tensor:  # noqa: B008
        return 0.1 * x

    def two(*arguments: Tensor, **condition: Any) -> Tensor:
        return 0.1 * arguments[0]

    for network in (one, two, Any2(), torch.mul):
        assert sample(Prediction(network, "x0", VP(), shape=(2,)), nfe=2, seeds=0).shape == (1, 2)


# ------------------------------------------------------------------- networks that differentiate


def energy_score(x: Tensor, t: Tensor) -> Tensor:
    """The score of a standard normal, as the gradient of its log density."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (score,) = torch.autograd.grad(-0.5 * x.square().sum(), x)
    return score


def careless_score(x: Tensor, t: Tensor) -> Tensor:
    return torch.autograd.grad(-0.5 * x.square().sum(), x)[0]


@pytest.mark.parametrize("solver", registry.SOLVERS)
def test_a_score_that_differentiates_runs_in_every_mode(solver: str) -> None:
    method = loose(solver)
    how: dict[str, Any] = {
        "solver": method,
        "nfe": budget(method),
        "shape": (2,),
        "n": 3,
        "seeds": 0,
    }
    want = sample(lambda x, t: -x, VP(), **how)
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            got = sample(energy_score, VP(), **how)
        assert not got.is_inference()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_states_and_conditions_of_inference_mode_are_taken() -> None:
    with torch.inference_mode():
        x, label = torch.ones(2, 2), torch.ones(2)

    def network(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        with torch.enable_grad():
            label = label.detach().requires_grad_()
            (gradient,) = torch.autograd.grad((label**2).sum(), label)
        return energy_score(x, t) * gradient.reshape(-1, 1)

    model = Prediction(network, "score", VP(), shape=(2,))
    for inside in (True, False):
        with torch.inference_mode(inside):
            for solver in ("ddim", "rk45", "euler_maruyama"):
                for start in ({"x": x, "t": 0.5}, {"x0": x, "t": 0.5}):
                    got = sample(model, solver=solver, condition={"label": label}, **start)
                    assert bool(torch.isfinite(got).all())
            encode(model, x, solver="ddim", condition={"label": label})


def test_a_careless_gradient_is_taught() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)careless_score differentiates.*enable_grad\(\)"):
        sample(careless_score, VP(), shape=(2,))


def test_gradients_still_flow_where_they_are_asked_for() -> None:
    x = torch.ones(2, 2, requires_grad=True)
    data = Gaussian(torch.zeros(2), std=0.5, process=EDM())
    sample(data, x=x, t=5.0, solver="ddim", nfe=3, requires_grad=True).sum().backward()
    assert x.grad is not None
    assert bool((x.grad != 0).all())
