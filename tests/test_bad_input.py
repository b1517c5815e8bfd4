"""What cannot be is said before the first network call: a typed error that names what was asked,
what is possible, what to do.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems import GRID_SOLVERS, Mixture
from torch import Tensor, nn

from sdeflow import errors
from sdeflow.denoisers import Preconditioned, Prediction
from sdeflow.errors import (
    BudgetError,
    GridError,
    NonFiniteError,
    SdeflowError,
    SolverError,
    UnknownNameError,
)
from sdeflow.noise import BrownianNoise, SeededNoise
from sdeflow.process import VE, VP, Cosine, Process, RectifiedFlow, SubVP
from sdeflow.sampling.api import encode, sample, solve
from sdeflow.solvers.ode.ddim import DDIM
from sdeflow.solvers.ode.runge_kutta import Heun
from sdeflow.solvers.sde.classic import DDPM, AnnealedLangevin, EulerMaruyama
from sdeflow.solvers.wrappers.langevin import Langevin


class Untouched:
    """An x0-network that must not be called."""

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("the network was called")


MODEL = Prediction(Untouched(), "x0", VP(), shape=(2,))
SHAPELESS = Prediction(Untouched(), "x0", VP())


@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        # names
        ({"solver": "huen"}, UnknownNameError, r"unknown solver 'huen'; did you mean.*'heun'"),
        ({"solver": "zzz"}, UnknownNameError, r"known: .*ddim.*heun"),
        ({"solver": "heun:rk"}, UnknownNameError, "heun:rk"),
        ({"solver": 3}, TypeError, "name or a Solver; got int"),
        ({"grid": "karas"}, UnknownNameError, r"unknown grid 'karas'; did you mean 'karras'"),
        ({"process": "vq"}, UnknownNameError, r"unknown process 'vq'; did you mean"),
        ({"process": 1.0}, TypeError, "name or a Process; got float"),
        ({"noise": "gaussian"}, ValueError, "'seeded', 'brownian' or a Noise"),
        # budgets
        ({"solver": "heun", "nfe": 36}, BudgetError, "nfe=36; the nearest it can are 35 and 37"),
        ({"nfe": 0}, BudgetError, "at least 1; got 0"),
        ({"nfe": 3.0}, BudgetError, "whole number.*got 3.0"),
        ({"solver": "heun", "nfe": 35, "grid": [1.0, 0.5]}, BudgetError, "2 levels; Heun needs 18"),
        # grids
        (
            {"grid": [1.0, 0.2, 0.5]},
            GridError,
            r"strictly one way.*times\[1\]=0.2 is followed by times\[2\]=0.5",
        ),
        ({"grid": [0.5, 0.5]}, GridError, "strictly one way"),
        ({"grid": [1.0, math.nan]}, GridError, "only finite times"),
        ({"grid": []}, GridError, "at least one time"),
        ({"grid": [[1.0, 0.5]]}, GridError, r"vector.*shape \(1, 2\)"),
        ({"grid": [0.1, 1.0]}, GridError, "finish=False"),
        ({"grid": [1.0, 0.5, 0.0], "finish": False}, GridError, "no noise is left there"),
        ({"grid": [1.0, -0.5]}, GridError, "does not reach there"),
        ({"grid": [2.0, 0.5], "process": RectifiedFlow()}, GridError, "does not reach there"),
        ({"grid": "trailing"}, GridError, "table of betas"),
        ({"grid": lambda process, n: torch.ones(n)}, GridError, "strictly one way"),
        ({"grid": 0.5}, GridError, "vector"),
        ({"grid": "karras", "process": VP(t_min=0.0)}, GridError, "nsr_min"),
        # the start
        ({"x": torch.zeros(1, 2), "x0": torch.zeros(1, 2), "t": 0.5}, ValueError, "not from both"),
        ({"x0": torch.zeros(1, 2)}, ValueError, "t=0.5"),
        ({"t": 0.5}, ValueError, "x= .*x0="),
        ({"x": torch.zeros(1, 2), "t": 1.5}, GridError, "t=0.001 to t=1"),
        ({"x": torch.zeros(1, 2), "t": 0.5, "grid": [0.6, 0.1]}, GridError, "must be the same"),
        ({"x": torch.zeros(1, 2, dtype=torch.int64)}, TypeError, "floating"),
        ({"x": [[0.0, 0.0]]}, TypeError, "tensors of shape"),
        ({"x": torch.full((1, 2), math.nan)}, NonFiniteError, "NaN or infinity"),
        ({"x": torch.zeros(2, 2), "n": 3}, ValueError, "n says 3, the starting state says 2"),
        # how many, and of what
        ({"n": 0}, ValueError, "at least 1; got 0"),
        ({"n": 2.0}, ValueError, "whole number"),
        ({"n": 2, "seeds": [1, 2, 3]}, ValueError, "n says 2, seeds says 3"),
        ({"seeds": []}, ValueError, "at least 1"),
        ({"seeds": [1.5]}, TypeError, "integer"),
        ({"seeds": 0.5}, TypeError, "integer"),
        ({"seeds": [2**64]}, ValueError, "seed"),
        ({"batch_size": 0}, ValueError, "batch_size.*at least 1"),
        ({"shape": (1, 2)}, ValueError, r"one sample, without the batch: \(2,\)"),
        ({"shape": (-1,)}, ValueError, "shape"),
        ({"dtype": torch.int32}, TypeError, "floating"),
        ({"dtype": "float32"}, TypeError, "dtype"),
        # conditions
        ({"condition": torch.zeros(1)}, TypeError, "mapping of names"),
        ({"condition": {"label": torch.zeros(3)}, "n": 2}, ValueError, "3 rows for 2 samples"),
        ({"condition": {"label": 1}}, TypeError, "takes no condition 'label'"),
    ],
)
def test_bad_arguments_are_explained_before_any_call(
    how: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=f"(?s){match}") as caught:
        sample(MODEL, **how)
    assert isinstance(caught.value, ValueError | TypeError | ArithmeticError)
    assert len(str(caught.value)) > 20


def test_a_missing_shape_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"shape= of one sample.*shape=\(3, 32, 32\)"):
        sample(SHAPELESS)


@pytest.mark.parametrize(
    ("model", "process", "error", "match"),
    [
        (lambda x, t: x, None, TypeError, r"process=VP\(\)"),
        (nn.Linear(2, 2), VP(), TypeError, r"Prediction\(module, 'eps', process\)"),
        (None, VP(), TypeError, "got NoneType"),
        ("cifar10", VP(), TypeError, "got str"),
    ],
)
def test_what_a_model_predicts_is_not_guessed(
    model: Any, process: Process | None, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        sample(model, process, shape=(2,))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (
            lambda: Prediction(Untouched(), "nois", VP()),
            UnknownNameError,
            "unknown prediction 'nois'.*'noise'.*eps",
        ),
        (lambda: Prediction(Untouched(), "eps", "vp"), TypeError, "process"),
        (lambda: Prediction(Untouched(), "eps", VP(), time="index"), ValueError, "from_betas"),
        (lambda: Prediction(Untouched(), "eps", VP(), time="discrete"), ValueError, "continuous"),
        (
            lambda: Prediction(Untouched(), "eps", VP(), nsr_range=(2.0, 1.0)),
            ValueError,
            "low < high",
        ),
        (lambda: Prediction(3, "eps", VP()), TypeError, "network"),
        (lambda: Preconditioned(Untouched(), sigma_data=0.0), ValueError, "sigma_data"),
        (lambda: VP(beta_min=0.0), ValueError, "beta_min"),
        (lambda: VP(t_min=1.0, t_max=0.5), ValueError, "t_min"),
        (lambda: SubVP(beta_min=5.0, beta_max=1.0), ValueError, "beta_min <= beta_max"),
        (lambda: VE(sigma_min=2.0, sigma_max=1.0), ValueError, "sigma_min < sigma_max"),
        (lambda: Cosine(t_max=1.5), ValueError, "t_max"),
        (lambda: RectifiedFlow(t_max=1.5), ValueError, "t = 1"),
        (lambda: Process.from_betas([1.0, 0.1]), ValueError, "zero-terminal"),
        (lambda: Process.from_betas([]), ValueError, "betas"),
        (lambda: Process.from_sde(lambda t: -1 / (1 - t), lambda t: t), ValueError, "f.1. = -inf"),
        (lambda: Process.from_sde(lambda t: 0 * t, lambda t: t - 0.5), ValueError, "g2"),
        (lambda: DDIM(eta=-1.5), ValueError, "eta"),
        (lambda: DDPM("medium"), UnknownNameError, "small"),
        (lambda: Heun(clock="sigma"), UnknownNameError, "lam, nsr, t"),
        (lambda: AnnealedLangevin(steps=0), ValueError, "steps >= 1"),
        (lambda: AnnealedLangevin(step_size=5.0), ValueError, "step_size < 4"),
        (lambda: Langevin(snr=2.0), ValueError, "snr"),
        (lambda: Langevin("heun"), TypeError, "solver"),
        (lambda: Heun(colck="t"), TypeError, "colck"),
        (lambda: SeededNoise([], (2,)), ValueError, "seeds"),
        (lambda: BrownianNoise([1], (0,)), ValueError, "shape"),
        (lambda: BrownianNoise([1], (2,)).draw(1.0), ValueError, "two levels"),
    ],
)
def test_things_are_checked_where_they_are_made(
    make: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize("finish", [True, False])
@pytest.mark.parametrize(
    "solver", [DDPM(), EulerMaruyama(), DDIM(1.0), Langevin(), AnnealedLangevin()], ids=str
)
def test_stochastic_solvers_do_not_run_upwards(solver: Any, finish: bool) -> None:
    with pytest.raises(GridError, match=r"finish=False|noise to data"):
        sample(MODEL, solver=solver, grid=[0.1, 0.5, 1.0], x=torch.zeros(1, 2), finish=finish)
    with pytest.raises(GridError, match="noise to data"):
        encode(MODEL, torch.zeros(1, 2), solver=solver)


def test_encode_takes_a_rising_grid() -> None:
    with pytest.raises((GridError, ValueError), match="increas"):
        encode(MODEL, torch.zeros(1, 2), grid=[1.0, 0.5, 0.1])


# --------------------------------------------------------------------------- what networks do wrong


@pytest.mark.parametrize(
    ("output", "match"),
    [
        (lambda x: x[:, :1], r"shape \(2, 1, 4\) for a state of shape \(2, 3, 4\)"),
        (lambda x: torch.cat([x, x], 1), "twice the channels is a learned variance"),
        (lambda x: (x, x), "tuple"),
        (lambda x: None, "NoneType"),
    ],
)
def test_outputs_that_do_not_fit_are_explained(output: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        sample(Prediction(lambda x, t: output(x), "eps", VP()), shape=(3, 4), n=2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["heun", "ddpm", "ddim", "rk4", "langevin"])
def test_nan_from_a_network_names_call_time_and_sample(name: str, value: float) -> None:
    calls = {"n": 0}
    solver = GRID_SOLVERS[name]
    nfe = solver.calls(6)
    times = solve(
        Prediction(lambda x, t: 0 * x, "x0", VP()), solver=solver, nfe=nfe, shape=(2,)
    ).plan.times  # type: ignore[union-attr]

    def network(x: Tensor, t: Tensor) -> Tensor:
        calls["n"] += 1
        out = 0.1 * x
        if bool(t[0] == times[3].float()):  # from the fourth call's time on, for the second sample
            out[1] = value
        return out

    first = next(k for k, t in enumerate(times.tolist()) if t == float(times[3])) + 1
    with pytest.raises(
        NonFiniteError,
        match=(
            rf"1 of 3 samples \(number 1\).*call {first} \(t={float(times[3]):.6g}\): the network"
            r" returned it"
        ),
    ) as caught:
        sample(Prediction(network, "x0", VP()), solver=solver, nfe=nfe, shape=(2,), n=3, seeds=0)
    assert isinstance(caught.value, ArithmeticError)
    partial, finished = caught.value.partial, caught.value.finished
    assert bool(torch.isfinite(partial.x[[0, 2]]).all())  # nothing is lost
    assert finished is None


def test_nan_in_a_later_batch_is_numbered_in_the_whole() -> None:
    def network(x: Tensor, t: Tensor, row: Tensor) -> Tensor:
        return torch.where((row == 3).unsqueeze(-1), torch.full_like(x, math.nan), 0.1 * x)

    with pytest.raises(NonFiniteError, match=r"number 3\)") as caught:
        sample(
            Prediction(network, "x0", VP()),
            nfe=3,
            shape=(2,),
            n=5,
            condition={"row": torch.arange(5)},
            batch_size=2,
            seeds=0,
        )
    # The batch before it is whole.
    alone = sample(
        Prediction(network, "x0", VP()),
        nfe=3,
        shape=(2,),
        condition={"row": torch.arange(2)},
        seeds=[0, 1],
    )
    assert torch.equal(caught.value.finished.x, alone)


def test_errors_of_the_network_itself_come_through() -> None:
    class Mine(Exception):
        pass

    def network(x: Tensor, t: Tensor) -> Tensor:
        raise Mine

    with pytest.raises(Mine):
        sample(Prediction(network, "x0", VP()), shape=(2,))


def test_an_eps_prediction_without_signal_is_answered_at_its_last_level_or_explained() -> None:
    bounded = sample(
        Prediction(lambda x, t: x, "eps", RectifiedFlow()),
        solver="ddim",
        nfe=5,
        shape=(2,),
        seeds=0,
    )
    assert bool(torch.isfinite(bounded).all())
    with pytest.raises(ValueError, match=r"no signal is left.*nsr_range"):
        sample(
            Prediction(lambda x, t: x, "eps", RectifiedFlow(), nsr_range=(0.0, math.inf)),
            solver="ddim",
            nfe=5,
            shape=(2,),
            seeds=0,
        )


# ---------------------------------------------------------------------------------------- the types


def test_every_error_is_ours_and_a_builtin() -> None:
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, SdeflowError) and kind is not SdeflowError
    ]
    assert len(kinds) >= 7
    for kind in kinds:
        assert issubclass(kind, ValueError | RuntimeError | ArithmeticError | ImportError)
        assert kind.__doc__
    assert issubclass(SolverError, RuntimeError)


@pytest.mark.parametrize("function", [sample, solve, encode])
def test_unknown_keywords_are_type_errors(function: Any) -> None:
    with pytest.raises(TypeError, match="num_steps"):
        (
            function(Mixture(VP()), torch.zeros(1, 2), num_steps=5)
            if function is encode
            else function(Mixture(VP()), num_steps=5)
        )
