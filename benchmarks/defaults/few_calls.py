"""`auto` on small networks at few calls, beside named solvers on named grids.

Small networks that predict eps or the score, and some that predict other things, are trained here,
two minutes of processor time each, and kept in `--cache`. The error of a solver is the rms distance of
its samples to the network's own exact ODE solution, 600 calls, from the same starts. Those marked
as held out were not in the search of the table (`search_tables.py`).

    python -m benchmarks.defaults.few_calls --cache /tmp/few_calls

`digits` needs scikit-learn and `cifar8` a parquet file of images (`--data`), for their data; they
are left out where neither that nor the trained network is there.
"""

from __future__ import annotations

import argparse
import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

import sdeflow
from benchmarks.report import table, write
from sdeflow import Preconditioned, Prediction
from sdeflow.denoisers import Denoiser
from sdeflow.process import EDM, VE, VP, Cosine, Process, RectifiedFlow
from sdeflow.solvers.ode.adams import ExponentialAdams

BUDGETS = (3, 4, 5, 6, 8, 10, 15, 20, 35)
FEW = (3, 4, 5, 6, 8)
SOLVERS = (
    *("ddim", "dpmpp_2m", "dpm_solver_2m", "unipc_2", "unipc_3", "ipndm2", "ipndm3", "ipndm"),
    *("deis_tab1", "deis_tab2", "deis_tab3"),
)
GRIDS = ("trailing", "uniform_lam", "karras", "uniform_sqrt_t")
PAIRS = [(solver, grid) for solver in SOLVERS for grid in GRIDS]
"""The named settings that `auto` is compared with; `trailing` needs a table of betas."""

# ------------------------------------------------------------------------------------------- data


def swiss_roll(n: int, draw: torch.Generator) -> Tensor:
    t = 1.5 * math.pi * (1 + 2 * torch.rand(n, generator=draw))
    points = torch.stack([t * t.cos(), t * t.sin()], 1) / 10
    return points + 0.02 * torch.randn(n, 2, generator=draw)


def moons(n: int, draw: torch.Generator) -> Tensor:
    u = torch.rand(n, generator=draw) * math.pi
    k = (torch.rand(n, generator=draw) < 0.5).float()
    points = torch.stack([u.cos() * (1 - 2 * k) + k, u.sin() * (1 - 2 * k) + 0.5 * k], 1)
    return (points - torch.tensor([0.5, 0.25])) * 1.6 + 0.05 * torch.randn(n, 2, generator=draw)


def checkerboard(n: int, draw: torch.Generator) -> Tensor:
    i = torch.randint(0, 8, (n,), generator=draw)
    corner = torch.stack([i // 2, 2 * (i % 2) + (i // 2) % 2], 1).float()
    return (corner + torch.rand(n, 2, generator=draw) - 2) * 0.6


def mixture(n: int, draw: torch.Generator) -> Tensor:
    fixed = torch.Generator().manual_seed(5)
    means, stds = (
        torch.randn(10, 16, generator=fixed) * 0.8,
        0.1 + 0.5 * torch.rand(10, 16, generator=fixed),
    )
    k = torch.randint(0, 10, (n,), generator=draw)
    return means[k] + stds[k] * torch.randn(n, 16, generator=draw)


def waves(n: int, draw: torch.Generator) -> Tensor:
    u = torch.linspace(0, 1, 32)
    frequency = 1 + 3 * torch.rand(n, 1, generator=draw)
    phase = 2 * math.pi * torch.rand(n, 1, generator=draw)
    height = 0.3 + torch.rand(n, 1, generator=draw)
    offset = 0.4 * torch.randn(n, 1, generator=draw)
    wave = height * torch.sin(2 * math.pi * frequency * u + phase) + offset
    return wave + 0.03 * torch.randn(n, 32, generator=draw)


_SETS: dict[str, Tensor] = {}


def digits(n: int, draw: torch.Generator) -> Tensor:
    if "digits" not in _SETS:
        from sklearn.datasets import load_digits  # type: ignore[import-not-found]

        _SETS["digits"] = torch.tensor(load_digits().data / 8 - 1, dtype=torch.float32)
    x = _SETS["digits"]
    rows = torch.randint(0, len(x), (n,), generator=draw)
    return x[rows] + 0.03 * torch.randn(n, 64, generator=draw)


def photographs(n: int, draw: torch.Generator) -> Tensor:
    x = _SETS["photographs"]
    return x[torch.randint(0, len(x), (n,), generator=draw)]


def _read_photographs(path: str) -> None:
    from sdeflow.images.datasets import load_images

    source = load_images(path, memory_gb=0.0, progress=False)
    pixels = source.get(torch.arange(10_000)).float() / 127.5 - 1
    _SETS["photographs"] = nn.functional.avg_pool2d(pixels, 4)


# --------------------------------------------------------------------------------------- networks


def embedding(t: Tensor, width: int = 64) -> Tensor:
    """Sinusoids of a time between 0 and 1000."""
    f = torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2))
    u = t.float()[:, None] * f
    return torch.cat([u.sin(), u.cos()], 1)


class MLP(nn.Module):
    """Residual layers with the time added."""

    def __init__(self, size: int, w: int = 256, depth: int = 3):
        super().__init__()
        self.i = nn.Linear(size, w)
        self.t = nn.Sequential(nn.Linear(64, w), nn.SiLU(), nn.Linear(w, w))
        self.b = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(w), *(nn.Linear(w, w) for _ in range(3))])
            for _ in range(depth)
        )
        self.o, self.act = nn.Linear(w, size), nn.SiLU()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        e, h = self.t(embedding(t)), self.i(x)
        blocks: Any = self.b
        for norm, a, b, c in blocks:
            h = h + b(self.act(a(norm(h)) + c(e)))
        return self.o(self.act(h))


class Conv(nn.Module):
    """Residual convolutions with the time and the mean over the image added."""

    def __init__(self, channels: int = 3, w: int = 40, depth: int = 4):
        super().__init__()
        self.i = nn.Conv2d(channels, w, 3, padding=1)
        self.t = nn.Sequential(nn.Linear(64, w), nn.SiLU(), nn.Linear(w, w))
        self.b = nn.ModuleList(
            nn.ModuleList(
                [
                    *(nn.GroupNorm(4, w), nn.Conv2d(w, w, 3, padding=1)),
                    *(nn.GroupNorm(4, w), nn.Conv2d(w, w, 3, padding=1)),
                    *(nn.Linear(w, w), nn.Linear(w, w)),
                ]
            )
            for _ in range(depth)
        )
        self.o, self.act = nn.Conv2d(w, channels, 3, padding=1), nn.SiLU()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        e, h = self.t(embedding(t)), self.i(x)
        blocks: Any = self.b
        for n1, c1, n2, c2, line, mean in blocks:
            y = c1(self.act(n1(h))) + line(e)[:, :, None, None]
            y = y + mean(y.mean((2, 3)))[:, :, None, None]
            h = h + c2(self.act(n2(y)))
        return self.o(self.act(h))


class Transformer(nn.Module):
    """Attention over the sixteen pairs of a sequence of 32."""

    def __init__(self, length: int = 32, w: int = 48, depth: int = 3):
        super().__init__()
        self.i, self.o = nn.Linear(2, w), nn.Linear(w, 2)
        self.p = nn.Parameter(0.02 * torch.randn(length // 2, w))
        self.t = nn.Sequential(nn.Linear(64, w), nn.SiLU(), nn.Linear(w, w))
        layer: Any = {"batch_first": True, "norm_first": True, "activation": "gelu"}
        self.b = nn.ModuleList(
            nn.TransformerEncoderLayer(w, 4, 2 * w, 0.0, **layer) for _ in range(depth)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.i(x.reshape(len(x), -1, 2)) + self.p + self.t(embedding(t))[:, None]
        for block in self.b:
            h = block(h)
        return self.o(h).reshape(x.shape)


class Score(nn.Module):
    """The score from a network of eps."""

    def __init__(self, eps: nn.Module, spec: Spec):
        super().__init__()
        self.eps, self.spec = eps, spec

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        sigma = _like(self.spec.process.sigma(t.double()), x)
        x = x / (sigma**2 + 0.5).sqrt() if isinstance(self.spec.process, VE) else x
        return -self.eps(x, self.spec.label(t)) / sigma


class _OfLogarithm(nn.Module):
    """What EDM's preconditioning calls with `log(nsr) / 4`."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.inner(x, 1000 * c)


def _like(c: Tensor, x: Tensor) -> Tensor:
    return c.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


# -------------------------------------------------------------------------------- the collection


def _cosine_betas() -> Tensor:
    t = torch.arange(1001, dtype=torch.float64) / 1000
    kept = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - kept[1:] / kept[:-1]).clamp(max=0.999)


LINEAR = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
SCALED = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2


@dataclass(frozen=True)
class Spec:
    """A network: data, shape, architecture, what it predicts, under which process."""

    data: Callable[[int, torch.Generator], Tensor]
    shape: tuple[int, ...]
    net: Callable[[], nn.Module]
    predicts: str
    process: Process
    index: bool = False
    held_out: bool = False

    def label(self, t: Tensor) -> Tensor:
        """The time as the network takes it."""
        if hasattr(self.process, "betas"):
            return self.process.index(t).clamp(min=0)  # type: ignore[attr-defined]
        if isinstance(self.process, VE):
            return 100 * torch.log(t.clamp(min=1e-4))
        return 999 * t


SPECS = {
    "swiss": Spec(swiss_roll, (2,), lambda: MLP(2, 128), "eps", Process.from_betas(LINEAR)),
    "digits": Spec(digits, (64,), lambda: MLP(64), "eps", Process.from_betas(LINEAR), index=True),
    "cifar8": Spec(photographs, (3, 8, 8), Conv, "eps", Process.from_betas(SCALED)),
    "moons": Spec(moons, (2,), lambda: MLP(2, 128), "score", VP()),
    "mix16": Spec(mixture, (16,), lambda: MLP(16, 192), "eps", Process.from_betas(_cosine_betas())),
    "checker_ve": Spec(checkerboard, (2,), lambda: MLP(2, 128), "score", VE(), held_out=True),
    "waves": Spec(waves, (32,), Transformer, "eps", Process.from_betas(LINEAR), held_out=True),
    "rf_cifar8": Spec(photographs, (3, 8, 8), Conv, "velocity", RectifiedFlow()),
    "v_swiss": Spec(swiss_roll, (2,), lambda: MLP(2, 128), "v", Cosine()),
    "edm_moons": Spec(moons, (2,), lambda: MLP(2, 128), "edm", EDM()),
}


def train(spec: Spec, seconds: float) -> dict[str, Tensor]:
    """The averaged weights after a training of so long."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    model, average = spec.net(), spec.net()
    average.load_state_dict(model.state_dict())
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    batch, process = 256 if len(spec.shape) == 1 else 96, spec.process
    began, steps = time.process_time(), 0
    while (part := (time.process_time() - began) / seconds) < 1:
        decay = 1.0 if part < 0.3 else 0.02 + 0.49 * (1 + math.cos(math.pi * (part - 0.3) / 0.7))
        optimiser.param_groups[0]["lr"] = 2e-3 * min(1.0, steps / 300 + 0.01) * decay
        x0 = spec.data(batch, draw)
        eps = torch.randn(x0.shape, generator=draw)
        if spec.predicts == "edm":
            nsr = _like(torch.exp(-0.8 + 1.4 * torch.randn(batch, generator=draw)), x0)
            r = (nsr**2 + 0.25).sqrt()
            x = x0 + nsr * eps
            guess = model(x / r, 250 * nsr.flatten().log())
            aim = (x0 - 0.25 / r**2 * x) / (0.5 * nsr / r)
        else:
            u = torch.rand(batch, generator=draw, dtype=torch.float64)
            t = process.t_min + (process.t_max - process.t_min) * u
            if hasattr(process, "betas"):
                t = ((u * 1000).floor() + 1) / 1000
            s, sigma = (_like(c, x0) for c in process.kernel(t))
            x = s * x0 + sigma * eps
            seen = x / (sigma**2 + 0.5).sqrt() if isinstance(process, VE) else x
            guess = model(seen, spec.label(t))
            aim = {"v": s * eps - sigma * x0, "velocity": eps - x0}.get(spec.predicts, eps)
        loss = (guess - aim).square().mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        steps += 1
        with torch.no_grad():
            torch._foreach_lerp_(
                [*average.parameters()],
                [*model.parameters()],
                1 - min(0.999, (1 + steps) / (10 + steps)),
            )
    print(f"trained for {steps} steps", flush=True)
    return average.state_dict()


def denoiser(name: str, cache: Path, seconds: float) -> Denoiser:
    """The trained network of a name, trained now where it is not kept."""
    spec, kept = SPECS[name], cache / f"net_{name}.pt"
    if not kept.exists():
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(train(spec, seconds), kept)
    model = spec.net()
    model.load_state_dict(torch.load(kept))
    model.eval().requires_grad_(False)
    if spec.predicts == "edm":
        return Preconditioned(_OfLogarithm(model), shape=spec.shape)
    if spec.predicts == "score":
        return Prediction(Score(model, spec), "score", spec.process, shape=spec.shape)
    label: Any = "index" if spec.index else spec.label
    return Prediction(model, spec.predicts, spec.process, time=label, shape=spec.shape)  # type: ignore[arg-type]


def measure(net: Denoiser, n: int) -> dict[str, dict[str, float]]:
    """By budget, the error of `auto` and of every named setting that can be had."""
    top = net.process.level(net.process.t_max)
    draw = torch.Generator().manual_seed(3)
    assert net.shape is not None
    x = torch.randn(n, *net.shape, generator=draw) * math.hypot(top.s, top.sigma)

    def solve(solver: Any, grid: Any, nfe: int) -> Tensor:
        how: Any = {"x": x, "t": net.process.t_max}
        return sdeflow.solve(net, solver=solver, grid=grid, nfe=nfe, **how).x

    fine = ExponentialAdams(2, "v", "lam", predicts_scale=0.5)
    exact = solve(fine, "uniform_lam", 600)
    out: dict[str, dict[str, float]] = {}
    for nfe in BUDGETS:
        row = out[str(nfe)] = {}
        for solver, grid in [("auto", None), *PAIRS]:
            try:
                end = solver, solve(solver, grid, nfe)
            except (ValueError, sdeflow.GridError):  # no table of betas, or two levels on one time
                continue
            row[f"{solver} {grid or ''}".strip()] = float((end[1] - exact).square().mean().sqrt())
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", default="/tmp/sdeflow-few-calls")
    parser.add_argument("--data", help="a parquet file of images")
    parser.add_argument(
        "--seconds", type=float, default=110.0, help="of processor time, a training"
    )
    parser.add_argument("--networks", nargs="+", default=list(SPECS), choices=list(SPECS))
    parser.add_argument("--starts", type=int, default=64)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if arguments.data:
        _read_photographs(arguments.data)
    results: dict[str, Any] = {}
    rows: list[list[Any]] = []
    for name in arguments.networks:
        spec = SPECS[name]
        try:
            net = denoiser(name, Path(arguments.cache), arguments.seconds)
        except (ImportError, KeyError) as error:
            print(f"{name} is left out: {error!r}", flush=True)
            continue
        found = measure(net, arguments.starts if len(spec.shape) == 1 else arguments.starts // 4)
        results[name] = {"predicts": spec.predicts, "held_out": spec.held_out, "errors": found}
        for nfe, row in found.items():
            mine = row["auto"]
            best, which = min((error, key) for key, error in row.items() if key != "auto")
            plain = row.get("dpmpp_2m trailing", row.get("dpmpp_2m uniform_lam", math.nan))
            what = f"{name}, {spec.predicts}" + (", held out" if spec.held_out else "")
            rows.append(
                [
                    what,
                    nfe,
                    *(f"{e:.4f}" for e in (mine, best)),
                    which,
                    f"{mine / best:.2f}",
                    f"{plain:.4f}",
                ]
            )
            print(*rows[-1], flush=True)
    head = ["network", "NFE", "auto", "best named", "which", "ratio", "dpmpp_2m"]
    text = (
        "Rms distance to the network's own exact ODE solution; the best of"
        f" {len(PAIRS)} named settings in hindsight, and `dpmpp_2m` on `trailing`"
        " (`uniform_lam` without a table of betas).\n\n"
    )
    write("few_calls", {"networks": results}, text + table(head, rows), arguments.out)


if __name__ == "__main__":
    main()
