"""`compile=True` changes how a solve runs and nothing of what it gives; `batch_size="auto"` finds
what fits and loses nothing.

On the CPU a stand-in executes what a graph would replay, from the same buffers; the tests marked
`cuda` use real graphs.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from problems import FixedNoise, Mixture
from torch import Tensor, nn

from sdeflow import grid
from sdeflow._utils import memory as _memory
from sdeflow._utils.memory import Memory
from sdeflow._utils.weak_cache import WeakTable
from sdeflow.denoisers import Prediction
from sdeflow.denoisers.thresholding import Clip, Projected
from sdeflow.errors import NonFiniteError, OutOfMemoryError, SolverError
from sdeflow.noise import SeededNoise
from sdeflow.plan.plan import Plan
from sdeflow.process import EDM, VP
from sdeflow.reverse import Reverse
from sdeflow.sampling import batch_size as batching
from sdeflow.sampling import cuda_graphs
from sdeflow.sampling.api import encode, sample, solve
from sdeflow.sampling.batch_size import BatchSize, in_batches, window
from sdeflow.sampling.capture import CapturedSolve
from sdeflow.sampling.cuda_graphs import CompileWarning
from sdeflow.solvers.ode.runge_kutta import Heun

SHAPE = (3, 8, 8)
SOLVERS = ["heun", "dpmpp_2m", "ddpm", "rk4", "annealed_langevin"]


class Net(nn.Module):
    """A small network with labels, deterministic row by row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 3, 3, padding=1)
        self.embed = nn.Embedding(5, 3)

    def forward(
        self, x: Tensor, t: Tensor, label: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        y = torch.tanh(self.layer(x)) * torch.cos(t).reshape(-1, 1, 1, 1) * scale
        return y if label is None else y + self.embed(label)[:, :, None, None]


def model(device: str = "cpu") -> Prediction:
    return Prediction(Net().to(device).eval().requires_grad_(False), "x0", VP(), shape=SHAPE)


class Graph(CapturedSolve):
    """A captured solve without a device: a replay executes the plan on the buffers of the
    capture.
    """

    made: ClassVar[list[tuple[int, ...]]] = []
    refused: ClassVar[str | None] = None

    @classmethod
    def refusal(cls, device: torch.device, plan: Plan | None = None) -> str | None:
        return "gradients" if plan is not None and plan.differentiable else None

    def _capture(self, reverse: Reverse) -> None:
        if Graph.refused:
            raise SolverError(Graph.refused)
        Graph.made.append(tuple(self._x.shape))
        self.bytes = 1000
        self._reverse = reverse
        self._replay()

    def _replay(self) -> None:
        self._result, recorded = self._run(self._reverse)
        self._states = [*recorded, self._result] if recorded and self.plan.finished else recorded
        self._finite = torch.isfinite(self._result).all()

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        yield


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """The shapes that were captured."""
    monkeypatch.setattr(cuda_graphs, "CapturedSolve", Graph)
    monkeypatch.setattr(Graph, "made", [])
    monkeypatch.setattr(Graph, "refused", None)
    cuda_graphs.forget()
    yield Graph.made
    cuda_graphs.forget()


# ------------------------------------------------------------------------------- what a graph gives


@pytest.mark.parametrize("finish", [True, False])
@pytest.mark.parametrize("solver", SOLVERS)
def test_compiled_is_uncompiled_bit_for_bit(
    solver: str, finish: bool, graphs: list[tuple[int, ...]]
) -> None:
    denoiser = model()
    times = grid.uniform_sqrt_t(VP(), 6)
    how: dict[str, Any] = {
        "solver": solver,
        "grid": times,
        "n": 4,
        "finish": finish,
        "trajectory": True,
        "x0s": True,
    }
    for seed in (0, 4):
        plain = solve(denoiser, seeds=seed, **how)
        whole = solve(denoiser, seeds=seed, compile=True, **how)
        assert torch.equal(whole.x, plain.x)
        assert plain.trajectory is not None
        assert whole.trajectory is not None
        assert plain.x0s is not None
        assert whole.x0s is not None
        assert torch.equal(whole.trajectory, plain.trajectory)
        assert torch.equal(whole.x0s, plain.x0s)
        assert (whole.nfe, whole.network_calls, whole.seeds) == (
            plain.nfe,
            plain.network_calls,
            plain.seeds,
        )
        assert whole.plan == plain.plan
        assert whole.statistics["draws"] == plain.statistics["draws"]
    assert len(graphs) == 1


def test_a_last_smaller_batch_is_padded_with_the_rows_before_it(
    graphs: list[tuple[int, ...]],
) -> None:
    denoiser, labels = model(), torch.arange(10) % 5
    how: dict[str, Any] = {
        "solver": "ddpm",
        "nfe": 5,
        "condition": {"label": labels},
        "trajectory": True,
        "x0s": True,
    }
    whole = solve(denoiser, seeds=range(10), batch_size=4, compile="require", **how)
    assert graphs == [(4, *SHAPE)]
    assert (whole.statistics["captures"], whole.statistics["replays"]) == (1, 3)
    assert whole.x.shape == (10, *SHAPE)
    how["condition"] = {"label": labels[6:]}
    padded = solve(
        denoiser, seeds=range(6, 10), **how
    )  # the batch that the last two rows were solved in
    assert torch.equal(whole.x[8:], padded.x[2:])
    assert whole.trajectory is not None
    assert padded.trajectory is not None
    assert torch.equal(whole.trajectory[:, 8:], padded.trajectory[:, 2:])
    assert whole.x0s is not None
    assert padded.x0s is not None
    assert torch.equal(whole.x0s[:, 8:], padded.x0s[:, 2:])


def test_starting_states_are_padded_along(graphs: list[tuple[int, ...]]) -> None:
    x = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0))
    for start in ({"x": x, "t": 0.5}, {"x0": x, "t": 0.5}):
        plain = sample(model(), nfe=5, seeds=range(5), batch_size=2, **start)
        padded = sample(model(), nfe=5, seeds=range(5), batch_size=2, compile="require", **start)
        torch.testing.assert_close(padded, plain, rtol=1e-6, atol=1e-6)


def test_the_only_batch_is_not_padded(graphs: list[tuple[int, ...]]) -> None:
    sample(model(), nfe=5, n=3, batch_size=8, compile="require")
    assert graphs == [(3, *SHAPE)]


@pytest.mark.parametrize(
    ("first", "stop", "size", "want"),
    [(0, 4, 4, (0, 4)), (8, 10, 4, (6, 10)), (0, 3, 8, (0, 3)), (4, 8, 4, (4, 8))],
)
def test_a_window_ends_with_its_rows_and_has_the_size_where_there_are_so_many(
    first: int, stop: int, size: int, want: tuple[int, int]
) -> None:
    assert window(slice(first, stop), size) == slice(*want)


def test_other_labels_replay_and_other_shapes_do_not(graphs: list[tuple[int, ...]]) -> None:
    denoiser = model()
    how: dict[str, Any] = {"solver": "heun", "nfe": 5, "seeds": range(4)}
    for label in (1, 2, [0, 1, 2, 3], torch.tensor([3])):
        condition = {"label": torch.full((4,), label) if isinstance(label, int) else label}
        want = sample(denoiser, condition=condition, **how)
        assert torch.equal(sample(denoiser, condition=condition, compile="require", **how), want)
    assert len(graphs) == 2  # one label for all lies in memory otherwise than one a row
    sample(denoiser, compile="require", **how)
    sample(
        denoiser,
        condition={"label": torch.zeros(4, dtype=torch.long), "scale": 0.5},
        compile="require",
        **how,
    )
    assert len(graphs) == 4
    half = sample(denoiser, condition={"scale": 0.5}, compile="require", **how)
    assert torch.equal(half, sample(denoiser, condition={"scale": 0.5}, **how))


def different(what: str, denoiser: Prediction) -> dict[str, Any]:
    return {
        "nothing": {},
        "seeds": {"seeds": [7, 9]},
        "solver": {"solver": "ddim"},
        "budget": {"nfe": 7},
        "grid": {"grid": "uniform_t"},
        "number": {"seeds": [1, 2, 3]},
        "dtype": {"dtype": torch.float64},
        "process": {"process": EDM()},
        "trajectory": {"trajectory": True},
        "x0s": {"x0s": True},
        "finish": {"finish": False, "nfe": 4},
        "brownian": {"noise": "brownian"},
    }[what]


@pytest.mark.parametrize("what", ["nothing", "seeds", "brownian"])
def test_what_a_graph_reads_anew_needs_no_capture(what: str, graphs: list[tuple[int, ...]]) -> None:
    captured_after(what, graphs, 1)


@pytest.mark.parametrize(
    "what",
    ["solver", "budget", "grid", "number", "dtype", "process", "trajectory", "x0s", "finish"],
)
def test_what_a_graph_has_fixed_needs_another(what: str, graphs: list[tuple[int, ...]]) -> None:
    captured_after(what, graphs, 2)


def captured_after(what: str, graphs: list[tuple[int, ...]], count: int) -> None:
    denoiser = model()
    how: dict[str, Any] = {"solver": "heun", "nfe": 5, "seeds": [0, 1]}
    solve(denoiser, compile="require", **how)
    how |= different(what, denoiser)
    assert torch.equal(solve(denoiser, compile="require", **how).x, solve(denoiser, **how).x)
    assert len(graphs) == count


def test_weights_may_change_in_place_and_attributes_are_noticed(
    graphs: list[tuple[int, ...]],
) -> None:
    denoiser = model()
    network = denoiser.network
    assert isinstance(network, Net)
    how: dict[str, Any] = {"nfe": 3, "seeds": [0, 1]}

    def same() -> bool:
        return torch.equal(sample(denoiser, compile="require", **how), sample(denoiser, **how))

    assert same()
    network.layer.weight.mul_(1.5)
    assert same()
    assert len(graphs) == 1
    network.layer.weight = nn.Parameter(network.layer.weight.clone() * 0.5, requires_grad=False)
    assert same()
    assert len(graphs) == 2
    denoiser.network = Net().eval()
    assert same()
    assert len(graphs) == 3
    clipped = Projected(denoiser, Clip(-1.0, 1.0))
    a = sample(clipped, compile="require", **how)
    clipped.projection = Clip(-0.1, 0.1)
    assert not torch.equal(sample(clipped, compile="require", **how), a)
    assert len(graphs) == 5


def test_a_graph_serves_in_inference_mode_and_out_of_it(graphs: list[tuple[int, ...]]) -> None:
    denoiser, label = model(), torch.tensor([1, 2])
    how: dict[str, Any] = {"solver": "ddpm", "nfe": 3, "seeds": [0, 1], "compile": "require"}
    with torch.inference_mode():
        inside = sample(denoiser, condition={"label": label.clone()}, **how)
    outside = sample(denoiser, condition={"label": label}, **how)
    assert torch.equal(inside, outside)
    with torch.inference_mode():
        assert torch.equal(sample(denoiser, condition={"label": label.clone()}, **how), outside)
    assert len(graphs) == 1
    assert not outside.requires_grad


def test_a_network_that_is_compiled_meanwhile_is_captured_anew(
    graphs: list[tuple[int, ...]],
) -> None:
    denoiser = model()
    sample(denoiser, nfe=1, compile="require")
    denoiser.network._compiled_call_impl = denoiser.network._call_impl  # type: ignore[union-attr]  # as Module.compile() does
    sample(denoiser, nfe=1, compile="require")
    assert len(graphs) == 2


def test_a_denoiser_that_goes_takes_its_graphs_along(graphs: list[tuple[int, ...]]) -> None:
    denoiser = model()
    network = weakref.ref(denoiser.network)
    gc.disable()  # it must not take the collector
    try:
        sample(denoiser, VP(), nfe=3, compile="require")
        sample(denoiser, EDM(), nfe=3, compile="require")
        assert len(cuda_graphs._GRAPHS) == 2
        del denoiser
        assert len(cuda_graphs._GRAPHS) == 0
        assert network() is None
    finally:
        gc.enable()


def test_score_functions_keep_graphs_too_and_methods_for_one_call(
    graphs: list[tuple[int, ...]],
) -> None:
    def score_fn(x: Tensor, t: Tensor) -> Tensor:
        return -x

    how: dict[str, Any] = {
        "process": VP(),
        "nfe": 3,
        "shape": (2,),
        "n": 4,
        "seeds": 0,
        "compile": "require",
    }
    assert torch.equal(sample(score_fn, **how), sample(score_fn, **how))
    assert len(graphs) == len(cuda_graphs._GRAPHS) == 1
    del score_fn
    assert len(cuda_graphs._GRAPHS) == 0

    class Score:
        def method(self, x: Tensor, t: Tensor) -> Tensor:
            return -x

    score = Score()
    for _ in range(2):
        solution = solve(score.method, batch_size=2, **how)
        assert (solution.statistics["captures"], solution.statistics["replays"]) == (1, 2)
    assert len(cuda_graphs._GRAPHS) == 0


def test_only_a_few_graphs_are_kept_and_forget_frees_them(graphs: list[tuple[int, ...]]) -> None:
    denoiser, other = model(), model()
    for n in range(1, cuda_graphs.KEPT + 3):
        sample(denoiser, nfe=1, n=n, compile="require")
    assert len(cuda_graphs._GRAPHS) == cuda_graphs.KEPT
    sample(denoiser, nfe=1, n=cuda_graphs.KEPT + 2, compile="require")
    assert len(graphs) == cuda_graphs.KEPT + 2
    sample(other, nfe=1, compile="require")
    cuda_graphs.forget(denoiser)
    assert len(cuda_graphs._GRAPHS) == 1
    cuda_graphs.forget()
    assert len(cuda_graphs._GRAPHS) == 0


def test_a_noise_of_your_own_is_drawn_from(graphs: list[tuple[int, ...]]) -> None:
    plain, drawn = (FixedNoise(3, (2,), torch.float32) for _ in range(2))
    want = sample(Mixture(VP()), solver="ddpm", nfe=4, n=3, noise=plain)
    assert torch.equal(
        sample(Mixture(VP()), solver="ddpm", nfe=4, n=3, noise=drawn, compile="require"), want
    )
    assert drawn.drawn == plain.drawn == 3


def test_a_saved_plan_and_encoding_compile(graphs: list[tuple[int, ...]]) -> None:
    plan = Heun().plan(VP(), grid.uniform_t(VP(), 4))
    denoiser = Mixture(VP())
    how: dict[str, Any] = {"solver": plan, "n": 3, "seeds": 0}
    assert torch.equal(sample(denoiser, compile="require", **how), sample(denoiser, **how))
    with pytest.raises(ValueError, match="record=True"):
        solve(denoiser, trajectory=True, compile="require", **how)
    data = torch.ones(2, 2)
    assert torch.equal(
        encode(denoiser, data, nfe=4, compile="require"), encode(denoiser, data, nfe=4)
    )


@pytest.mark.parametrize("at", [0, 5, 9])
def test_nan_is_found_at_the_end_and_what_was_done_is_not_lost(
    at: int, graphs: list[tuple[int, ...]]
) -> None:
    bad = torch.zeros(10, dtype=torch.long)
    bad[at] = 1

    def network(x: Tensor, t: Tensor, bad: Tensor) -> Tensor:
        return torch.where(bad.reshape(-1, 1) > 0, torch.nan, 0.1 * x)

    denoiser = Prediction(network, "x0", VP(), shape=(2,))
    with pytest.raises(
        NonFiniteError, match=rf"in 1 of \d samples \(number {at}\).* first at call 1"
    ) as caught:
        sample(
            denoiser,
            nfe=5,
            seeds=range(10),
            batch_size=4,
            condition={"bad": bad},
            compile="require",
        )
    done = caught.value.finished
    first = at - at % 4
    assert done is None if first == 0 else len(done.x) == first
    assert caught.value.partial.x.shape == (min(4, 10 - first), 2)


def test_the_progress_bar_counts_and_says_that_it_captures(
    graphs: list[tuple[int, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    sample(model(), solver="heun", nfe=5, n=5, batch_size=2, compile="require", progress=True)
    err = capsys.readouterr().err
    assert "capturing 5 calls at batch 2" in err
    assert "sampling 5" in err.splitlines()[-1].split("\r")[-1]
    assert "15/15" in err


def test_a_captured_condition_keeps_its_kind(graphs: list[tuple[int, ...]]) -> None:
    plan = Heun().plan(VP(), grid.uniform_t(VP(), 3))
    graph = Graph(
        plan,
        model(),
        torch.zeros(2, *SHAPE),
        {"label": torch.zeros(2, dtype=torch.long), "scale": 1.0},
    )
    graph(torch.zeros(2, *SHAPE), None, {"label": torch.ones(2, dtype=torch.long), "scale": 1.0})
    with pytest.raises(ValueError, match="'scale' is fixed"):
        graph(torch.zeros(2, *SHAPE), None, {"scale": 2.0})
    with pytest.raises(
        ValueError, match=r"'label' was captured with shape \(2,\); got shape \(1,\)"
    ):
        graph(torch.zeros(2, *SHAPE), None, {"label": torch.zeros(1, dtype=torch.long)})
    with pytest.raises(ValueError, match="captured for states of shape"):
        graph(torch.zeros(1, *SHAPE))


# ---------------------------------------------------------------------- where it cannot be compiled


REASONS: dict[str, tuple[dict[str, Any], str]] = {
    "callback": ({"callback": lambda step: None}, "a callback wants to be called"),
    "adaptive": ({"solver": "rk45"}, "RK45 looks at the state"),
    "gradients": ({"requires_grad": True}, "gradients are to flow"),
    "list": ({"condition": {"words": ["a", "b", "c", "d"]}}, "the condition 'words' is a list"),
}


@pytest.mark.parametrize("why", REASONS)
def test_what_cannot_be_compiled_runs_with_one_warning_that_says_why(
    why: str, graphs: list[tuple[int, ...]]
) -> None:
    how, reason = REASONS[why]
    how = {"n": 4, "seeds": 0, "batch_size": 2, **how}
    denoiser = Prediction(lambda x, t, words=(): torch.tanh(x), "x0", VP(), shape=(2,))
    with pytest.warns(CompileWarning, match=reason) as caught:
        solution = solve(denoiser, compile=True, **how)
    assert [w.category for w in caught].count(CompileWarning) == 1
    assert caught[0].filename == __file__
    assert reason in solution.statistics["compiled"]
    assert torch.equal(solution.x, solve(denoiser, **how).x)
    assert not graphs
    with pytest.raises(SolverError, match=f"compile='require'.*{reason}"):
        solve(denoiser, compile="require", **how)


def test_a_network_that_cannot_be_captured_runs_and_is_not_tried_again(
    graphs: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Graph, "refused", "this network cannot be captured in a CUDA graph (it waits)"
    )
    denoiser = model()
    tried: list[int] = []
    before = Graph._capture
    monkeypatch.setattr(
        Graph, "_capture", lambda self, reverse: (tried.append(1), before(self, reverse))
    )
    for _ in range(2):
        with pytest.warns(CompileWarning, match="it waits") as caught:
            x = sample(denoiser, solver="ddpm", nfe=3, n=5, batch_size=2, seeds=0, compile=True)
        assert len(caught) == 1
        assert torch.equal(x, sample(denoiser, solver="ddpm", nfe=3, n=5, batch_size=2, seeds=0))
    assert len(tried) == 1
    with pytest.raises(SolverError, match="it waits"):
        sample(denoiser, solver="ddpm", nfe=3, n=5, batch_size=2, compile="require")


def test_a_refusal_on_the_way_leaves_the_rest_to_the_loop(
    graphs: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(
        [None] * 4 + ["the device has gone"]
    )  # asked before the solve, at the capture, and for each batch
    monkeypatch.setattr(
        Graph, "refusal", classmethod(lambda cls, device, plan=None: next(answers, None))
    )
    how: dict[str, Any] = {"solver": "ddpm", "nfe": 5, "seeds": range(5), "batch_size": 2}
    denoiser = model()
    with pytest.warns(CompileWarning, match="the device has gone"):
        solution = solve(denoiser, compile=True, **how)
    assert solution.statistics["compiled"] == "no: the device has gone"
    assert torch.equal(solution.x, sample(denoiser, **how))


def test_on_a_cpu_it_just_runs() -> None:
    denoiser = model()
    with pytest.warns(CompileWarning, match="CUDA device; this one is on cpu"):
        x = sample(denoiser, nfe=3, seeds=0, compile=True)
    assert torch.equal(x, sample(denoiser, nfe=3, seeds=0))
    with pytest.raises(SolverError, match="this one is on cpu"):
        sample(denoiser, nfe=3, compile="require")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(denoiser, nfe=3, compile=False)
    with pytest.raises(ValueError, match="True, False or 'require'"):
        sample(denoiser, nfe=3, compile="always")  # type: ignore[arg-type]


def test_errors_of_the_network_stay_what_they_are(graphs: list[tuple[int, ...]]) -> None:
    wrong = Prediction(lambda x, t: x[:, :1], "x0", VP(), shape=(2,))
    with pytest.raises(ValueError, match="it must return the same shape"):
        sample(wrong, nfe=3, compile=True)


# ------------------------------------------------------------------------------- memory and batches


class Small(Mixture):
    """A device on which `most` rows fit."""

    def __init__(
        self,
        most: int,
        error: Callable[[], BaseException] = lambda: torch.cuda.OutOfMemoryError("CUDA out"),
    ):
        super().__init__(VP())
        self.most, self.error = most, error
        self.sizes: list[int] = []

    def __call__(self, x: Tensor, t: float | Tensor, /, **condition: Any) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise self.error()
        return super().__call__(x, t, **condition)


ERRORS: dict[str, Callable[[], BaseException]] = {
    "cuda": lambda: torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "mps": lambda: RuntimeError("MPS backend out of memory"),
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
    ),
    "cublas": lambda: RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"
    ),
    "python": lambda: MemoryError(),
}


@pytest.mark.parametrize(
    ("solver", "error"),
    [
        *(("ddpm", error) for error in ERRORS),
        *((name, next(iter(ERRORS))) for name in ("heun", "rk45")),
    ],
)
def test_auto_halves_until_it_fits_and_nothing_is_lost(solver: str, error: str) -> None:
    denoiser = Small(6, ERRORS[error])
    how: dict[str, Any] = {"solver": solver, "seeds": range(21)}
    solution = solve(denoiser, batch_size="auto", trajectory=True, **how)
    plain = solve(Mixture(VP()), batch_size=4, trajectory=True, **how)
    assert denoiser.sizes[:4] == [21, 8, 4, 4]  # half, down to a power of two; then on from there
    assert max(denoiser.sizes[2:]) == 4
    assert torch.equal(solution.x, plain.x)
    assert solution.seeds == tuple(range(21))
    assert solution.network_calls == plain.network_calls == len(denoiser.sizes) - 2
    if solver != "rk45":
        assert torch.equal(solution.trajectory, plain.trajectory)  # type: ignore[arg-type]


def test_memory_that_is_spent_in_the_middle_loses_no_batch() -> None:
    """Somebody else takes memory while the third batch is solved: its rows are seen again, in
    smaller batches.
    """
    seen: list[tuple[int, int]] = []
    denoiser = Small(4)

    def callback(step: Any) -> None:
        seen.append((step.samples.start, step.samples.stop))
        denoiser.most = 2 if len(seen) == 7 else denoiser.most

    x = sample(
        denoiser, solver="ddim", nfe=3, seeds=range(14), batch_size="auto", callback=callback
    )
    assert torch.equal(
        x, sample(Mixture(VP()), solver="ddim", nfe=3, seeds=range(14), batch_size=2)
    )
    whole = [(0, 4)] * 3 + [(4, 8)] * 3 + [(8, 12)]  # given up after its first call
    assert seen == whole + [(k, k + 2) for k in (8, 10, 12) for _ in range(3)]


def test_auto_remembers_what_worked_for_a_denoiser_and_a_shape() -> None:
    denoiser = Small(6)
    sample(denoiser, nfe=3, n=21, batch_size="auto")
    denoiser.sizes.clear()
    sample(denoiser, nfe=3, n=50, batch_size="auto")
    assert denoiser.sizes[0] == 4
    assert max(denoiser.sizes) == 4
    other = Small(6)
    sample(other, nfe=3, n=21, batch_size="auto")
    assert other.sizes[0] == 21
    # How few were once asked for limits nothing.
    third = Small(100)
    sample(third, nfe=3, n=2, batch_size="auto")
    sample(third, nfe=3, n=60, batch_size="auto")
    assert max(third.sizes) == 60


def test_auto_ends_at_one_sample() -> None:
    denoiser = Small(0)
    with pytest.raises(
        OutOfMemoryError,
        match=r"batch of 1 of 21 samples \(CUDA out\): a single sample does not fit",
    ) as caught:
        sample(denoiser, nfe=3, n=21, batch_size="auto")
    assert denoiser.sizes == [21, 8, 4, 2, 1]
    assert isinstance(caught.value.__cause__, torch.cuda.OutOfMemoryError)
    assert isinstance(caught.value, MemoryError)
    assert caught.value.finished is None


@pytest.mark.parametrize(
    ("asked", "advice"), [(8, "pass batch_size=4, or batch_size='auto'"), (None, "batch_size=8")]
)
def test_a_size_that_was_asked_for_is_kept_and_the_error_says_what_to_do(
    asked: int | None, advice: str
) -> None:
    denoiser = Small(4)
    with pytest.raises(OutOfMemoryError, match=advice):
        sample(denoiser, nfe=3, n=21, batch_size=asked)
    assert len(denoiser.sizes) == 1


def test_what_was_done_before_memory_was_spent_is_not_lost() -> None:
    denoiser = Small(8)
    denoiser.most = 8

    def callback(step: Any) -> None:
        if step.samples.start == 8:
            denoiser.most = 1

    with pytest.raises(OutOfMemoryError) as caught:
        sample(denoiser, solver="ddim", nfe=3, seeds=range(21), batch_size=8, callback=callback)
    done = caught.value.finished
    assert torch.equal(done.x, sample(Mixture(VP()), solver="ddim", nfe=3, seeds=range(8)))


def test_samples_that_cannot_be_joined_on_the_device_are_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, calls = torch.cat, []

    def cat(tensors: Any, *rest: Any, **how: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return before(tensors, *rest, **how)

    want = sample(Mixture(VP()), solver="ddim", nfe=3, seeds=range(10))
    monkeypatch.setattr(torch, "cat", cat)
    with pytest.raises(
        OutOfMemoryError, match=r"all 10 samples are done.*`finished`, on the CPU"
    ) as caught:
        sample(Mixture(VP()), solver="ddim", nfe=3, seeds=range(10), batch_size=4)
    torch.testing.assert_close(caught.value.finished.x, want)


def test_what_cannot_be_cut_says_so() -> None:
    with pytest.raises(OutOfMemoryError, match="noise is your own"):
        sample(
            Small(2),
            solver="ddpm",
            nfe=4,
            n=3,
            noise=FixedNoise(3, (2,), torch.float32),
            batch_size="auto",
        )


def test_another_error_is_no_matter_of_memory() -> None:
    denoiser = Small(
        4, lambda: RuntimeError("CUDA error: an illegal memory access was encountered")
    )
    with pytest.raises(RuntimeError, match="illegal memory access") as caught:
        sample(denoiser, nfe=3, n=21, batch_size="auto")
    assert len(denoiser.sizes) == 1
    assert not isinstance(caught.value, OutOfMemoryError)


@pytest.mark.parametrize("size", [0, -1, "all", 2.5, True])
def test_batch_sizes_that_are_none(size: Any) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        sample(Mixture(VP()), nfe=3, batch_size=size)


def test_auto_and_compile_go_together(
    graphs: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Graph._capture

    def capture(self: Graph, reverse: Reverse) -> None:
        if len(self._x) > 6:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        before(self, reverse)

    monkeypatch.setattr(Graph, "_capture", capture)
    denoiser = model()
    solution = solve(
        denoiser, solver="ddpm", nfe=5, seeds=range(21), batch_size="auto", compile="require"
    )
    assert graphs == [(4, *SHAPE)]
    assert solution.statistics["replays"] == 6
    want = sample(denoiser, solver="ddpm", nfe=5, seeds=range(21), batch_size=4)
    assert torch.equal(solution.x[:20], want[:20])
    torch.testing.assert_close(solution.x, want, rtol=1e-6, atol=1e-6)


def test_the_progress_bar_takes_back_what_was_given_up(capsys: pytest.CaptureFixture[str]) -> None:
    denoiser = Small(10)

    def callback(step: Any) -> None:
        denoiser.most = 6 if step.nfe == 3 else denoiser.most

    sample(
        denoiser, solver="ddim", nfe=5, n=10, batch_size="auto", progress=True, callback=callback
    )
    last = capsys.readouterr().err.splitlines()[-1].split("\r")[-1]
    assert "15/15" in last  # and not 18, though three calls of the batch of ten were made


def test_rows_that_do_not_fit_come_again_after_a_release() -> None:
    log: list[Any] = []

    def run(rows: slice) -> None:
        log.append((rows.start, rows.stop))
        if rows.stop - rows.start > 2:
            raise MemoryError

    size = BatchSize("auto", 5, object(), "key")
    in_batches(size, run, lambda: log.append("release"))
    assert log == [(0, 5), "release", (0, 2), (2, 4), (4, 5)]


def test_a_device_is_measured_by_a_few_rows_and_filled_with_a_power_of_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_memory, "available", lambda device: 10_000)
    device = torch.device("cpu")
    assert batching.fitting(device, lambda rows: 50) == 128  # 170 fit
    assert batching.fitting(device, lambda rows: 10**9) == 1
    assert batching.fitting(device, lambda rows: 0) == batching.MOST
    asked: list[int] = []

    def tight(rows: int) -> int:
        asked.append(rows)
        if rows > 2:
            raise torch.cuda.OutOfMemoryError
        return 1000

    assert batching.fitting(device, tight) == 8
    assert asked == [8, 4, 2]


def test_a_solution_states_its_memory() -> None:
    solution = solve(model(), solver="heun", nfe=5, n=4, batch_size=3)
    assert solution.plan is not None
    assert solution.statistics["memory"] == Memory(
        buffers=solution.plan.buffers * 3 * 3 * 8 * 8 * 4
    )
    assert "memory   buffers 4.5 KiB" in str(solution)
    assert "memory" not in solve(Mixture(VP()), solver="rk45").statistics
    assert (
        str(Memory(peak=3 * 2**30, buffers=0, graph=2**20))
        == "peak 3 GiB, buffers 0 B, graph 1 MiB"
    )


def test_a_weak_table_holds_a_few_values_and_no_owner() -> None:
    class Owner:
        def __eq__(self, other: object) -> bool:  # unhashable, and equal to all
            return True

    table: WeakTable[int] = WeakTable(3)
    one, two = Owner(), Owner()
    table.put(one, "a", 1)
    table.put(two, "a", 2)
    assert (table.get(one, "a"), table.get(two, "a"), table.get(one, "b")) == (1, 2, None)
    table.put(one, "b", 3)
    table.get(one, "a")
    table.put(one, "c", 4)  # now two's is the oldest
    assert table.get(two, "a") is None
    assert table.get(one, "a") == 1
    del one
    assert len(table) == 0
    with pytest.raises(TypeError):
        table.put(7, "a", 1)


# ------------------------------------------------------------------------------------------ on CUDA


@pytest.fixture
def fresh() -> Iterator[None]:
    cuda_graphs.forget()
    yield
    cuda_graphs.forget()


@pytest.mark.cuda
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("solver", SOLVERS)
def test_on_cuda_compiled_is_uncompiled_bit_for_bit(solver: str) -> None:
    denoiser = model("cuda")
    how: dict[str, Any] = {
        "solver": solver,
        "grid": grid.uniform_sqrt_t(VP(), 7),
        "n": 4,
        "trajectory": True,
        "x0s": True,
    }
    for seed in (0, 4, 8):
        plain = solve(denoiser, seeds=seed, **how)
        whole = solve(denoiser, seeds=seed, compile="require", **how)
        assert torch.equal(whole.x, plain.x)
        assert torch.equal(whole.trajectory, plain.trajectory)  # type: ignore[arg-type]
        assert torch.equal(whole.x0s, plain.x0s)  # type: ignore[arg-type]
        assert whole.statistics["captures"] == (1 if seed == 0 else 0)


@pytest.mark.cuda
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("noise", ["seeded", "brownian"])
def test_on_cuda_the_last_batch_is_padded_and_labels_change_without_a_capture(noise: Any) -> None:
    denoiser = model("cuda")
    how: dict[str, Any] = {"solver": "ddpm", "nfe": 5, "noise": noise}
    captures = 0
    for shift in range(3):
        labels = (torch.arange(10) + shift) % 5
        whole = solve(
            denoiser,
            seeds=range(10),
            batch_size=4,
            condition={"label": labels},
            compile="require",
            progress=shift == 1,
            **how,
        )
        captures += whole.statistics["captures"]
        for rows, keep in ((slice(0, 4), 0), (slice(4, 8), 0), (slice(6, 10), 2)):
            part = sample(denoiser, seeds=range(10)[rows], condition={"label": labels[rows]}, **how)
            assert torch.equal(whole.x[rows][keep:], part[keep:])
    assert captures == 1


@pytest.mark.cuda
@pytest.mark.usefixtures("fresh")
def test_on_cuda_nan_raises_and_what_was_done_is_not_lost() -> None:
    def network(x: Tensor, t: Tensor, bad: Tensor) -> Tensor:
        return torch.where(bad.reshape(-1, 1) > 0, torch.nan, 0.1 * x)

    denoiser = Prediction(network, "x0", VP(), shape=(2,))
    bad = torch.zeros(10, dtype=torch.long)
    bad[5] = 1
    with pytest.raises(NonFiniteError, match=r"number 5\).* first at call 1") as caught:
        sample(
            denoiser,
            nfe=5,
            seeds=range(10),
            batch_size=4,
            condition={"bad": bad},
            device="cuda",
            compile="require",
        )
    assert len(caught.value.finished.x) == 4


@pytest.mark.cuda
@pytest.mark.usefixtures("fresh")
def test_on_cuda_a_network_that_waits_falls_back() -> None:
    denoiser = Prediction(lambda x, t: x * float(x.mean().item() > 100), "x0", VP(), shape=(2,))
    with pytest.warns(CompileWarning, match="cannot be captured") as caught:
        x = sample(
            denoiser, solver="ddpm", nfe=5, n=5, seeds=0, batch_size=2, device="cuda", compile=True
        )
    assert [w.category for w in caught].count(CompileWarning) == 1
    assert torch.equal(
        x, sample(denoiser, solver="ddpm", nfe=5, n=5, seeds=0, batch_size=2, device="cuda")
    )
    with pytest.raises(SolverError, match="compile='require'"):
        sample(denoiser, solver="ddpm", nfe=5, n=2, device="cuda", compile="require")
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    sample(model("cuda"), nfe=5, compile="require")  # and the device is none the worse for it


@pytest.mark.cuda
@pytest.mark.usefixtures("fresh")
def test_on_cuda_a_replay_waits_for_nothing() -> None:
    plan = Heun().plan(VP(), grid.uniform_t(VP(), 5))
    label = torch.zeros(4, dtype=torch.long, device="cuda")
    x = torch.randn(4, *SHAPE, device="cuda")
    graph = CapturedSolve(plan, model("cuda"), x, {"label": label.clone()}, x0s=True)
    noise = SeededNoise(range(4), SHAPE, device="cuda")
    graph.replay(x, noise, {"label": label})
    torch.cuda.set_sync_debug_mode("error")
    try:
        done = graph.replay(x, noise, {"label": label + 1})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert done.x0s is not None
    assert bool(done.finite)
    assert graph.bytes > 0


@pytest.mark.cuda
@pytest.mark.usefixtures("fresh")
def test_on_cuda_streams_take_turns() -> None:
    denoiser = model("cuda")
    plan = Heun().plan(VP(), grid.uniform_t(VP(), 9))
    starts = [torch.randn(4, *SHAPE, device="cuda") for _ in range(6)]
    graph = CapturedSolve(plan, denoiser, starts[0])
    want = [graph(x) for x in starts]
    torch.cuda.synchronize()
    got = []
    for x in starts:
        with torch.cuda.stream(torch.cuda.Stream()):
            got.append(graph(x))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.cuda
@pytest.mark.usefixtures("fresh")
def test_on_cuda_a_graph_goes_with_its_denoiser() -> None:
    denoiser = Prediction(nn.Identity(), "x0", VP(), shape=(3, 256, 256))
    denoiser.network = Net().cuda().eval().requires_grad_(False)
    solution = solve(denoiser, nfe=5, n=8, compile="require")
    memory = solution.statistics["memory"]
    assert memory.peak > memory.buffers > 0
    assert memory.graph > 0
    graph = weakref.ref(next(iter(cuda_graphs._GRAPHS._held.values()))[1])
    del solution
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    del denoiser
    assert graph() is None
    torch.cuda.empty_cache()
    assert before - torch.cuda.memory_reserved() >= memory.graph // 2


@pytest.mark.cuda
@pytest.mark.usefixtures("fresh")
def test_on_cuda_autocast_is_captured_as_it_is() -> None:
    denoiser = model("cuda")
    how: dict[str, Any] = {"solver": "heun", "nfe": 5, "n": 4, "seeds": 0}
    plain = sample(denoiser, compile="require", **how)
    with torch.autocast("cuda", torch.bfloat16):
        want = sample(denoiser, **how)
        for _ in range(2):
            assert torch.equal(sample(denoiser, compile="require", **how), want)
    assert not torch.equal(want, plain)
    assert torch.equal(sample(denoiser, compile="require", **how), plain)


@pytest.mark.cuda
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("compile", [False, True])
def test_on_cuda_auto_fits_and_survives(compile: bool) -> None:
    class Greedy(nn.Module):
        """Takes 64 MiB a row, for a moment."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.5))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x * self.weight + torch.zeros(len(x), 2**24, device=x.device).mean(
                1, keepdim=True
            )

    denoiser = Prediction(Greedy().cuda().requires_grad_(False), "x0", VP(), shape=(2,))
    how: dict[str, Any] = {"solver": "ddpm", "nfe": 5, "seeds": range(100)}
    want = sample(denoiser, batch_size=4, **how)
    total = torch.cuda.get_device_properties(0).total_memory
    cuda_graphs.forget()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(
        2 * 2**30 / total
    )  # 2 GiB: auto sees more than it may have
    try:
        solution = solve(denoiser, batch_size="auto", compile=compile, **how)
        with pytest.raises(OutOfMemoryError, match="batch_size='auto'"):
            sample(denoiser, batch_size=100, **how)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.testing.assert_close(solution.x, want, rtol=1e-5, atol=1e-5)
    assert solution.statistics["memory"].peak <= 2 * 2**30
