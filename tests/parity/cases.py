"""Which published implementation, in which setting, is which solver of ours: one line each.

`same` are equal to rounding. `solver` is a registered name, `given` arguments beside it. Grids are
`setting.uneven` of so many steps, or a peer's own (`native`, with its number of steps).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from published import PEERS, Run
from setting import PINS, uneven
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """A peer's setting and ours."""

    peer: str
    what: str
    solver: str
    given: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    process: str = "sphere"
    steps: tuple[int, ...] = (2, 6)
    native: tuple[int, ...] = ()
    finish: bool = True
    noise: str = "order"
    grid: str = "uneven"
    tolerance: float = 2e-12
    extra_calls: int = 0
    """Calls that the peer makes and ours need not."""

    @property
    def name(self) -> str:
        return f"{self.peer}/{self.what}" + (f"/{self.label}" if self.label else "")

    def runs(self) -> Iterator[tuple[str, int, bool]]:
        """`(key, steps, whether the grid is the peer's own)` of each of its runs."""
        for n in self.steps:
            yield f"{self.name}/{n}", n, False
        for n in self.native:
            yield f"{self.name}/own-{n}", n, True

    def times(self, steps: int) -> Tensor:
        """The grid of so many steps that is given to both."""
        if self.grid == "fast":  # "DPM-Solver-fast": even in lam by steps of 3, 3, ... and 2 calls
            a, b = -uneven("edm", 1).log()
            blocks = torch.linspace(float(a), float(b), steps // 3 + 2, dtype=torch.float64)
            lam = [
                low + k / 3 * (high - low)
                for low, high in itertools.pairwise(blocks[:-1])
                for k in range(3)
            ]
            return torch.exp(
                -torch.stack([*lam, blocks[-2], 0.5 * (blocks[-2] + blocks[-1]), blocks[-1]])
            )
        return uneven(self.process, steps)

    def run(self, steps: int, native: bool) -> Run:
        """The peer's run."""
        settings = dict(self.settings)
        if self.peer == "k-diffusion":
            settings |= {"noise": self.noise}
        if self.peer in ("k-diffusion", "diffusers"):
            settings |= {"finish": self.finish}
        if native:
            return PEERS[self.peer](self.process, None, self.what, n=steps, **settings)
        return PEERS[self.peer](self.process, self.times(steps), self.what, **settings)


def _k(
    what: str, solver: str, given: dict[str, Any] | None = None, label: str = "", **more: Any
) -> Case:
    case = {
        key: more.pop(key)
        for key in ("steps", "finish", "noise", "tolerance", "grid", "extra_calls")
        if key in more
    }
    return Case("k-diffusion", f"sample_{what}", solver, given or {}, more, label, "edm", **case)


def _d(
    what: str, solver: str, given: dict[str, Any] | None = None, label: str = "", **more: Any
) -> Case:
    keys = ("process", "steps", "native", "finish", "noise", "tolerance", "grid", "extra_calls")
    case = {key: more.pop(key) for key in keys if key in more}
    return Case("diffusers", f"{what}Scheduler", solver, given or {}, more, label, **case)


def _a(
    what: str, solver: str, given: dict[str, Any] | None = None, label: str = "", **more: Any
) -> Case:
    case = {key: more.pop(key) for key in ("process", "steps", "tolerance") if key in more}
    return Case("azula", f"{what}Sampler", solver, given or {}, more, label, finish=False, **case)


def _k_diffusion() -> Iterator[Case]:
    nsr, inner = {"clock": "nsr"}, {"stages": "inner"}
    yield _k("euler", "euler", nsr)
    yield _k("heun", "heun", nsr)
    yield _k("dpm_2", "dpm_solver_2", inner)
    for p in (1, 2, 3, 4):
        yield _k("lms", "lms", {"p": p}, f"order={p}", order=p, finish=False)
    yield _k("dpmpp_2m", "dpmpp_2m")
    for nfe in (
        8,
        14,
    ):  # where the rest is another it has a step of order 1 before the end, see docs/benchmarks/parity.md
        more = {"steps": (nfe,), "finish": False, "noise": "none", "grid": "fast"}
        yield _k("dpm_fast", "dpm_solver_fast", {}, f"nfe={nfe}", nfe=nfe, **more)
    yield _k("dpmpp_2s_ancestral", "dpmpp_2s", inner, "eta=0", eta=0.0)
    far, loose = (
        math.log(PINS["problem"]["nsr_first"] / PINS["problem"]["nsr_last"]),
        {"rtol": 1e3, "atol": 1e3},
    )
    for p in (2, 3):  # one step to the end: the pair; the controllers differ
        more = {"steps": (1,), "finish": False, "noise": "none", "h_init": far, **loose}
        given = {"p": p, "first_step": far, "max_step": far, **loose}
        yield _k("dpm_adaptive", "dpm_adaptive", given, f"{p},one step", order=p, **more)
    yield _k("dpmpp_2s_ancestral", "dpmpp_2s_ancestral", {}, "eta=1", eta=1.0)
    yield _k("dpmpp_2s_ancestral", "dpmpp_2s_ancestral", {"eta": 0.6}, "eta=.6", eta=0.6)
    churn = {"s_churn": 1.5, "s_tmin": 0.2, "s_tmax": float("inf"), "s_noise": 1.01}
    for what, within in (
        ("euler", ("euler", nsr)),
        ("heun", ("heun", nsr)),
        ("dpm_2", ("dpm_solver_2", inner)),
    ):
        yield _k(what, "churn", {**churn, "solver": within}, "churn", **churn)
        yield _k(
            what,
            "churn",
            {**churn, "s_churn": 40.0, "solver": within},
            "churn=40",
            **{**churn, "s_churn": 40.0},
        )
    yield _k("euler_ancestral", "euler_ancestral", {}, "eta=1")
    yield _k("euler_ancestral", "euler_ancestral", {"eta": 0.6}, "eta=.6", eta=0.6)
    yield _k("dpm_2_ancestral", "dpm2_ancestral", {}, "eta=1")
    yield _k(
        "dpm_2_ancestral",
        "dpm2_ancestral",
        {"eta": 0.6, "s_noise": 1.01},
        "eta=.6",
        eta=0.6,
        s_noise=1.01,
    )
    for r in (0.5, 0.3):
        yield _k("dpmpp_sde", "dpmpp_sde", {"r": r}, f"r={r:g}", noise="path", r=r)
        yield _k(
            "dpmpp_sde",
            "dpmpp_sde",
            {"r": r, "eta": 0.6},
            f"r={r:g},eta=.6",
            noise="path",
            r=r,
            eta=0.6,
        )
    for eta in (0.0, 0.6, 1.0):
        rate = {"eta": eta}
        yield _k("dpmpp_2m_sde", "dpmpp_2m_sde", rate, f"eta={eta:g}", eta=eta)
        yield _k(
            "dpmpp_2m_sde",
            "dpmpp_2m_sde_heun",
            rate,
            f"heun,eta={eta:g}",
            eta=eta,
            solver_type="heun",
        )
        yield _k("dpmpp_3m_sde", "dpmpp_3m_sde", rate, f"eta={eta:g}", eta=eta)


def _by_another_name() -> Iterator[Case]:
    """Members of ours that are a published method in one of their settings."""
    yield _k("heun", "deis_rho_heun", {}, "deis_rho_heun")
    yield _k("lms", "ipndm_v", {"p": 3, "exact_weights": True}, "ipndm_v", order=3, finish=False)
    yield _k(
        "lms",
        "adams",
        {"p": 3, "predicts": "eps", "clock": "nsr", "start_up": "orders"},
        "adams",
        order=3,
        finish=False,
    )
    yield _k("dpmpp_2s_ancestral", "seeds_2", {"eta": 0.0}, "seeds_2", eta=0.0)
    yield _k(
        "dpmpp_2m_sde",
        "stochastic_adams2",
        {"eta": 0.6},
        "stochastic_adams2",
        eta=0.6,
        solver_type="heun",
    )
    yield _k("euler_ancestral", "seeds_1", {}, "seeds_1")
    yield _k("euler_ancestral", "er_sde_1", {"phi": "sde"}, "er_sde_1")
    yield _k("euler_ancestral", "ddim", {"eta": 0.6}, "ddim", eta=0.6)
    yield _k("euler", "er_sde_1", {"phi": "ode"}, "er_sde_1")


def _diffusers() -> Iterator[Case]:
    rows = "sphere"
    # On a table of betas, by its own time steps.
    for spacing in ("leading", "trailing", "linspace"):
        given = {"timestep_spacing": spacing, "clip_sample": False}
        n = (8,)
        if (
            spacing != "linspace"
        ):  # its steps do not go where the next one starts, see deviations.py
            yield _d("DDIM", "ddim", {}, spacing, steps=(), native=n, **given)
            yield _d(
                "DDIM",
                "ddim",
                {"eta": 0.7},
                f"{spacing},eta=.7",
                steps=(),
                native=n,
                step={"eta": 0.7},
                **given,
            )
        yield _d(
            "DDPM", "ddpm", {}, spacing, steps=(), native=n, tolerance=1e-9, **given
        )  # 1e-10 of noise at its end
    large = {"variance_type": "fixed_large", "clip_sample": False}
    yield _d("DDPM", "ddpm", {"variance": "large"}, "large", steps=(), native=(8,), **large)
    # The noise level is the time: given grids, and each spacing of its own.
    edm: dict[str, Any] = {"process": "edm"}
    for kind, solver, arguments, output in (
        ("EulerDiscrete", "euler", {"clock": "nsr"}, "sample"),
        ("HeunDiscrete", "heun", {"clock": "nsr"}, "sample"),
        ("KDPM2Discrete", "dpm_solver_2", {"stages": "inner"}, "epsilon"),
        ("EulerAncestralDiscrete", "euler_ancestral", {}, "epsilon"),
    ):
        yield _d(kind, solver, arguments, **edm, native=(5,), output=output)
    yield _d(
        "KDPM2AncestralDiscrete",
        "dpm2_ancestral",
        {},
        **edm,
        steps=(),
        native=(5,),
        output="epsilon",
    )
    yield _d(
        "DPMSolverSDE", "dpmpp_sde", {"r": 0.5}, **edm, native=(5,), output="epsilon", noise="path"
    )
    yield _d(
        "LMSDiscrete", "lms", {}, **edm, finish=False
    )  # to zero noise it extrapolates, ours return the prediction
    yield _d(
        "EulerDiscrete",
        "euler",
        {"clock": "nsr"},
        "karras",
        **edm,
        steps=(),
        native=(6,),
        use_karras_sigmas=True,
    )
    yield _d("EDMEuler", "euler", {"clock": "nsr"}, **edm, native=(6,), output="edm")
    for p in (1, 2, 3):
        order, full = {"solver_order": p}, {"lower_final": False}
        short = {
            "lower_order_final": False,
            "final_sigmas_type": "sigma_min",
            "finish": False,
            "process": rows,
            **order,
        }
        for kind in ("midpoint", "heun") if p > 1 else ("midpoint",):
            type_ = {"solver_type": kind}
            for flow in (False, True) if kind == "midpoint" else (False,):
                where = (
                    {"process": "flow", "output": "flow", "use_flow_sigmas": True}
                    if flow
                    else {"process": rows}
                )
                label = f"{p},{kind}" + (",flow" if flow else "")
                ours = {"p": p, **type_}
                yield _d(
                    "DPMSolverMultistep",
                    "dpmpp_2m",
                    ours,
                    label,
                    native=(7,),
                    **where,
                    **type_,
                    **order,
                )
            yield _d(
                "DPMSolverMultistep",
                "dpmpp_2m",
                {**ours, **full},
                f"{p},{kind},full",
                **short,
                **type_,
            )
            ours, eps = {**ours, **full, "predicts": "eps"}, {"algorithm_type": "dpmsolver"}
            yield _d(
                "DPMSolverMultistep", "dpmpp_2m", ours, f"{p},{kind},eps", **eps, **short, **type_
            )
            if p < 3:  # for 3 see deviations.py
                ours, sde = {"p": p, "exact_weights": kind == "heun"}, "sde-dpmsolver++"
                yield _d(
                    "DPMSolverMultistep",
                    "dpmpp_2m_sde",
                    ours,
                    f"{p},{kind},sde",
                    algorithm_type=sde,
                    **short,
                    **type_,
                )
            for algorithm, frame in (("dpmsolver++", "x0"), ("dpmsolver", "eps")):
                if (
                    p == 3 and kind == "midpoint"
                ):  # its second stage is not the paper's, see docs/benchmarks/parity.md
                    continue
                ours = {"p": p, "predicts": frame, "taylor": kind == "heun", "stages": "grid"}
                single = {"algorithm_type": algorithm, **short, **type_}
                yield _d(
                    "DPMSolverSinglestep",
                    "dpm_solver_3",
                    ours,
                    f"{p},{kind},{algorithm}",
                    steps=(6, 12),
                    **single,
                )
                if frame == "x0":
                    ends = {**type_, **order, "process": rows}
                    yield _d(
                        "DPMSolverSinglestep",
                        "dpm_solver_3",
                        ours,
                        f"{p},{kind}",
                        steps=(2, 5, 6),
                        native=(7,),
                        **ends,
                    )
        if p > 1:  # from 15 steps on they lower no order before the step to zero noise
            yield _d(
                "DPMSolverMultistep",
                "dpmpp_2m",
                {"p": p, **full},
                f"{p},many",
                process=rows,
                steps=(16,),
                **order,
            )
        yield _d(
            "EDMDPMSolverMultistep",
            "dpmpp_2m",
            {"p": p},
            f"{p}",
            **edm,
            native=(7,),
            output="edm",
            **order,
        )
        for bh in ("bh1", "bh2"):
            for x0 in (True, False):
                pc = {"solver_type": bh, "predict_x0": x0}
                ours = {"p": p, "variant": bh, "predicts": "x0" if x0 else "eps"}
                label = f"{p},{bh}" + ("" if x0 else ",eps")
                if x0 and bh == "bh2":  # bh1 returns NaN there, see deviations.py
                    yield _d(
                        "UniPCMultistep",
                        "unipc",
                        ours,
                        label,
                        process=rows,
                        native=(7,),
                        **pc,
                        **order,
                    )
                yield _d(
                    "UniPCMultistep", "unipc", {**ours, **full}, f"{label},full", **short, **pc
                )
        given = {"lower_order_final": False, **order, "finish": False}
        yield _d("DEISMultistep", "deis_logrho", {"p": p}, f"{p}", process=rows, **given)
        flow_ = {"process": "flow", "use_flow_sigmas": True, "output": "flow"}
        yield _d("DEISMultistep", "deis_logrho", {"p": p}, f"{p},flow", **flow_, **given)
    yield _d("IPNDM", "ipndm", {}, process=rows, finish=False, output="v", steps=(2, 3, 6))
    own = {
        "process": "betas",
        "finish": False,
        "steps": (),
        "native": (10,),
        "output": "epsilon",
        "stop": 1,
    }
    yield _d("PNDM", "pndm", {}, **own)
    yield _d("PNDM", "plms", {}, "plms", skip_prk_steps=True, **own)
    for order in (1, 2, 3, 4):
        for corrector in (max(order, 2), min(order + 1, 4)):
            for tau in (0.0, 0.7):
                label, few = (
                    f"{order},{corrector},tau={tau:g}",
                    {"few_steps": True, "lower_final": False},
                )
                yield _d("SASolver", "sa_solver", {"p": order, "c": corrector, "tau": tau, **few}, label,
                         process=rows, finish=False, predictor_order=order, corrector_order=corrector,
                         tau_func=_Constant(tau), lower_order_final=False)  # fmt: skip
    yield _d(
        "FlowMatchEulerDiscrete",
        "euler",
        {"clock": "t"},
        process="flow",
        native=(6,),
        output="flow",
    )
    yield _d("FlowMatchHeunDiscrete", "heun", {"clock": "t"}, process="flow", output="flow")


@dataclass(frozen=True)
class _Constant:
    """A function of time that does not change."""

    value: float

    def __call__(self, t: Any) -> Tensor:
        return torch.tensor(self.value, dtype=torch.float64)


def _azula() -> Iterator[Case]:
    for process in ("sphere", "flow", "edm"):
        here = {"process": process}
        yield _a("Euler", "euler", {"clock": "nsr"}, process, **here)
        yield _a("Heun", "heun", {"clock": "nsr"}, process, **here)
        yield _a("DDPM", "ddpm", {}, process, **here)
        yield _a(
            "DDIM", "ddim", {"eta": 0.6}, f"{process},eta=.36", **here, eta=0.36
        )  # it scales the variance
        for p in (1, 2, 3, 4):
            start = {"p": p, "start_up": "orders"}
            for kind, frame, clock in (
                ("zAB", "eps", "nsr"),
                ("zEAB", "eps", "lam"),
                ("xEAB", "x0", "lam"),
            ):
                yield _a(
                    kind,
                    "adams",
                    {**start, "predicts": frame, "clock": clock},
                    f"{process},{p}",
                    **here,
                    order=p,
                )
            yield _a(
                "vAB",
                "adams",
                {**start, "predicts": "flow", "clock": "flow"},
                f"{process},{p}",
                **here,
                order=p,
            )


def _ode() -> Iterator[Case]:
    for process in ("vp", "flow"):
        for method, solver in (("euler", "euler"), ("midpoint", "midpoint"), ("heun2", "heun")):
            yield Case(
                "torchdiffeq", method, solver, {"clock": "t"}, {}, process, process, finish=False
            )
    for method, solver in (("euler", "euler"), ("midpoint", "midpoint"), ("heun2", "heun")):
        yield Case("flow-matching", method, solver, {"clock": "t"}, {}, "", "flow", finish=False)


_ALL = (*_k_diffusion(), *_by_another_name(), *_diffusers(), *_azula(), *_ode())
SAME: list[Case] = list({case.name: case for case in _ALL}.values())
