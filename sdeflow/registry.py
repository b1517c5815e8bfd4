"""Names: solvers, grids and processes, with their aliases; the documentation, the command line and
the tests iterate over it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sdeflow import grid
from sdeflow.errors import unknown
from sdeflow.process import EDM, VE, VP, Cosine, Process, RectifiedFlow, SubVP
from sdeflow.solvers.adaptive.dpm_solver import DPMAdaptive
from sdeflow.solvers.adaptive.runge_kutta import RK23, RK45
from sdeflow.solvers.adaptive.sde import AdaptiveSDE
from sdeflow.solvers.auto.grid import auto as auto_grid
from sdeflow.solvers.auto.solver import Auto
from sdeflow.solvers.base import Solver
from sdeflow.solvers.external.torchdiffeq import TorchDiffEq
from sdeflow.solvers.external.torchsde import TorchSDE
from sdeflow.solvers.ode.adams import ExponentialAdams
from sdeflow.solvers.ode.ddim import DDIM
from sdeflow.solvers.ode.deis import DEIS, LMS, DEISRungeKutta
from sdeflow.solvers.ode.dpm_solver import DPMSolver, DPMSolverPP
from sdeflow.solvers.ode.pndm import IPNDM, PNDM, IPNDMv
from sdeflow.solvers.ode.runge_kutta import RK4, Euler, Heun, Midpoint, Ralston
from sdeflow.solvers.ode.unipc import UniPC
from sdeflow.solvers.sde.adams import StochasticAdams
from sdeflow.solvers.sde.classic import DDPM, AnnealedLangevin, EulerMaruyama
from sdeflow.solvers.sde.dpm_solver import SDEDPMSolverPP, SDEDPMSolverPPSingle
from sdeflow.solvers.sde.er_sde import ERSDE
from sdeflow.solvers.sde.sa_solver import SASolver
from sdeflow.solvers.sde.seeds import SEEDS
from sdeflow.solvers.wrappers.ancestral import Ancestral
from sdeflow.solvers.wrappers.base import Nested
from sdeflow.solvers.wrappers.churn import Churn
from sdeflow.solvers.wrappers.langevin import Langevin
from sdeflow.solvers.wrappers.restart import Restart


@dataclass(frozen=True)
class Entry:
    """A registered name: the class or function behind it, its other names, and the arguments that
    it stands for.
    """

    name: str
    kind: Callable[..., Any]
    aliases: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def make(self) -> Callable[..., Any]:
        """What makes the thing; arguments given to it win over those of the name."""
        return partial(self.kind, **self.arguments) if self.arguments else self.kind

    @property
    def summary(self) -> str:
        """The first sentence of its documentation."""
        text = " ".join((self.kind.__doc__ or "").split("\n\n")[0].split())
        return text.split(". ")[0].rstrip(".") + "."


def _table(*entries: Entry) -> dict[str, Entry]:
    return {entry.name: entry for entry in entries}


SOLVERS = _table(
    Entry("auto", Auto, ("default",)),
    Entry("euler", Euler),
    Entry("heun", Heun),
    Entry("midpoint", Midpoint),
    Entry("ralston", Ralston),
    Entry("rk4", RK4),
    Entry("ddim", DDIM),
    Entry("adams1", ExponentialAdams, (), {"p": 1}),
    Entry("adams2", ExponentialAdams, (), {"p": 2}),
    Entry("adams3", ExponentialAdams, ("adams", "exponential_adams"), {"p": 3}),
    Entry("adams4", ExponentialAdams, (), {"p": 4}),
    Entry("deis_tab1", DEIS, (), {"p": 2}),
    Entry("deis_tab2", DEIS, ("deis", "sample_deis"), {"p": 3}),
    Entry("deis_tab3", DEIS, (), {"p": 4}),
    Entry("deis_rho1", DEIS, (), {"p": 2, "clock": "nsr"}),
    Entry("deis_rho2", DEIS, (), {"p": 3, "clock": "nsr"}),
    Entry("deis_rho3", DEIS, (), {"p": 4, "clock": "nsr"}),
    Entry("deis_logrho", DEIS, ("deismultistepscheduler",), {"p": 2, "clock": "lam"}),
    Entry("deis_rho_heun", DEISRungeKutta, (), {"method": "heun"}),
    Entry("deis_rho_kutta3", DEISRungeKutta, (), {"method": "kutta3"}),
    Entry("lms", LMS, ("sample_lms", "lmsdiscretescheduler")),
    Entry("ipndm", IPNDM, ("sample_ipndm", "ipndmscheduler", "ipndm4")),
    Entry("ipndm2", IPNDM, (), {"p": 2}),
    Entry("ipndm3", IPNDM, (), {"p": 3}),
    Entry("ipndm_v", IPNDMv, ("sample_ipndm_v", "ipndm_v4")),
    Entry("ipndm_v3", IPNDMv, (), {"p": 3}),
    Entry("pndm", PNDM, ("f_pndm", "pndmscheduler")),
    Entry("s_pndm", PNDM, (), {"p": 2, "start_up": "heun"}),
    Entry("plms", PNDM, ("sample_plms",), {"start_up": "heun"}),
    Entry("dpm_solver_1", DPMSolver, (), {"p": 1}),
    Entry("dpm_solver_2", DPMSolver, ("dpm_2", "sample_dpm_2", "kdpm2discretescheduler"), {"p": 2}),
    Entry("dpm_solver_3", DPMSolver, ("dpm_solver",), {"p": 3}),
    Entry(
        "dpm_solver_fast", DPMSolver, ("dpm_fast", "sample_dpm_fast"), {"p": 3, "stages": "grid"}
    ),
    Entry("dpmpp_2s", DPMSolver, ("dpm++_2s", "dpmsolver++_2s"), {"p": 2, "predicts": "x0"}),
    Entry("dpmpp_3s", DPMSolver, ("dpm++_3s", "dpmsolver++_3s"), {"p": 3, "predicts": "x0"}),
    Entry(
        "dpmpp_2s_fast",
        DPMSolver,
        ("dpmsolversinglestepscheduler",),
        {"p": 2, "predicts": "x0", "stages": "grid"},
    ),
    Entry(
        "dpmpp_3s_fast", DPMSolver, ("dpmpp_fast",), {"p": 3, "predicts": "x0", "stages": "grid"}
    ),
    Entry("dpm_solver_2m", DPMSolverPP, (), {"p": 2, "predicts": "eps"}),
    Entry("dpm_solver_3m", DPMSolverPP, (), {"p": 3, "predicts": "eps"}),
    Entry("dpmpp_1m", DPMSolverPP, (), {"p": 1}),
    Entry(
        "dpmpp_2m",
        DPMSolverPP,
        (
            "sample_dpmpp_2m",
            "dpmsolvermultistepscheduler",
            "dpmsolver++",
            "dpm_solver_pp",
            "dpm++_2m",
        ),
        {"p": 2},
    ),
    Entry("dpmpp_2m_heun", DPMSolverPP, (), {"p": 2, "solver_type": "heun"}),
    Entry("dpmpp_3m", DPMSolverPP, ("dpm++_3m", "dpmsolver++_3m"), {"p": 3}),
    Entry("dpmpp_3m_exact", DPMSolverPP, (), {"p": 3, "solver_type": "heun", "kappa": 1.0}),
    Entry("unipc_1", UniPC, (), {"p": 1}),
    Entry("unipc_2", UniPC, ("unipc", "unipcmultistepscheduler"), {"p": 2}),
    Entry("unipc_3", UniPC, ("uni_pc_bh2", "sample_unipc_bh2"), {"p": 3}),
    Entry("unipc_3_bh1", UniPC, ("uni_pc", "sample_unipc"), {"p": 3, "variant": "bh1"}),
    Entry("euler_maruyama", EulerMaruyama, ("em", "reverse_sde")),
    Entry("ddpm", DDPM, ("ancestral",)),
    Entry("langevin", Langevin, ("predictor_corrector", "pc")),
    Entry("churn", Churn, ("edm_stochastic", "heun_churn", "sample_heun_churn")),
    Entry("restart", Restart, ("restart_sampling", "restart_heun")),
    Entry(
        "euler_ancestral",
        Ancestral,
        (
            "euler_a",
            "sample_euler_ancestral",
            "eulerancestraldiscretescheduler",
            "k_euler_ancestral",
        ),
    ),
    Entry(
        "dpmpp_2s_ancestral",
        Ancestral,
        ("sample_dpmpp_2s_ancestral", "dpmpp_2s_a"),
        {"solver": DPMSolver(2, "x0", stages="inner")},
    ),
    Entry(
        "dpm2_ancestral",
        Ancestral,
        ("sample_dpm_2_ancestral", "dpm_2_ancestral", "dpm2_a", "kdpm2ancestraldiscretescheduler"),
        {"solver": DPMSolver(2, stages="inner")},
    ),
    Entry("annealed_langevin", AnnealedLangevin, ("ncsn", "ald")),
    Entry("dpmpp_1_sde", SDEDPMSolverPP, ("sde_dpm_solver_pp_1",), {"p": 1}),
    Entry(
        "dpmpp_2m_sde",
        SDEDPMSolverPP,
        (
            "sample_dpmpp_2m_sde",
            "dpmpp_2m_sde_gpu",
            "sde_dpmsolver++",
            "sde_dpm_solver_pp",
            "cosinedpmsolvermultistepscheduler",
        ),
        {"p": 2},
    ),
    Entry(
        "dpmpp_2m_sde_heun",
        SDEDPMSolverPP,
        ("sample_dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu"),
        {"p": 2, "exact_weights": True},
    ),
    Entry("dpmpp_3m_sde", SDEDPMSolverPP, ("sample_dpmpp_3m_sde", "dpmpp_3m_sde_gpu"), {"p": 3}),
    Entry(
        "dpmpp_sde",
        SDEDPMSolverPPSingle,
        ("sample_dpmpp_sde", "dpmpp_sde_gpu", "dpmsolversdescheduler"),
    ),
    Entry("seeds_1", SEEDS, (), {"p": 1}),
    Entry("seeds_2", SEEDS, ("sample_seeds_2",), {"p": 2}),
    Entry("seeds_3", SEEDS, ("seeds", "sample_seeds_3"), {"p": 3}),
    Entry(
        "exp_heun_2_x0_sde",
        SEEDS,
        ("sample_exp_heun_2_x0_sde",),
        {"p": 2, "r": 1.0, "taylor": True},
    ),
    Entry("sa_solver", SASolver, ("sample_sa_solver", "sasolverscheduler")),
    Entry("sa_solver_pece", SASolver, ("sample_sa_solver_pece",), {"pece": True}),
    Entry("er_sde_1", ERSDE, (), {"p": 1}),
    Entry("er_sde_2", ERSDE, (), {"p": 2}),
    Entry("er_sde_3", ERSDE, ("er_sde", "sample_er_sde"), {"p": 3}),
    Entry("stochastic_adams2", StochasticAdams, ("stochastic_adams",), {"p": 2}),
    Entry("stochastic_adams3", StochasticAdams, (), {"p": 3, "corrector": True}),
    Entry("rk45", RK45, ("dopri5", "dormand_prince")),
    Entry("rk23", RK23, ("bogacki_shampine",)),
    Entry("dpm_adaptive_12", DPMAdaptive, ("dpm_solver_12",), {"p": 2}),
    Entry(
        "dpm_adaptive_23",
        DPMAdaptive,
        ("dpm_adaptive", "sample_dpm_adaptive", "dpm_solver_adaptive", "dpm_solver_23"),
        {"p": 3},
    ),
    Entry("adaptive_sde", AdaptiveSDE, ("gotta_go_fast", "ggf")),
    Entry("adaptive_ancestral", AdaptiveSDE, (), {"form": "ancestral"}),
    Entry("torchdiffeq", TorchDiffEq),
    Entry("torchsde", TorchSDE),
)
"""Solvers by name; `torchdiffeq:METHOD` and `torchsde:METHOD` reach every method of those
libraries, and `churn:NAME`, like every name of a solver that holds a solver, has the named one
within.
"""

GRIDS = _table(
    Entry("auto", auto_grid),
    Entry("uniform_t", grid.uniform_t, ("uniform", "normal")),
    Entry("uniform_sqrt_t", grid.uniform_sqrt_t, ("sqrt_t",)),
    Entry("power_t", grid.power_t),
    Entry("cosine_t", grid.cosine_t, ("chebyshev_t",)),
    Entry(
        "uniform_lam",
        grid.uniform_lam,
        ("exponential", "logsnr", "get_sigmas_exponential", "use_lu_lambdas"),
    ),
    Entry("polyexponential", grid.polyexponential, ("power_lam", "get_sigmas_polyexponential")),
    Entry("two_powers", grid.two_powers),
    Entry("dense_lam", grid.dense_lam, ("sinh_lam",)),
    Entry("karras", grid.karras, ("edm", "get_sigmas_karras", "use_karras_sigmas")),
    Entry("uniform_angle", grid.uniform_angle, ("kl_optimal",)),
    Entry("uniform_vp", grid.uniform_vp, ("vp", "get_sigmas_vp")),
    Entry("uniform_cosine", grid.uniform_cosine, ("cosine",)),
    Entry("uniform_flow", grid.flow_shift, (), {"shift": 1.0}),
    Entry("flow_shift", grid.flow_shift, ("sd3", "flowmatcheulerdiscretescheduler")),
    Entry("simple", grid.simple),
    Entry("sgm_uniform", grid.sgm_uniform),
    Entry("linear_quadratic", grid.linear_quadratic),
    Entry("beta", grid.beta_quantiles, ("use_beta_sigmas",)),
    Entry("beta57", grid.beta_quantiles, (), {"alpha": 0.5, "beta": 0.7}),
    Entry("ays_sd15", grid.align_your_steps, ("ays", "align_your_steps"), {"model": "sd15"}),
    Entry("ays_sdxl", grid.align_your_steps, (), {"model": "sdxl"}),
    Entry("ays_svd", grid.align_your_steps, (), {"model": "svd"}),
    Entry("ays_deepfloyd_if", grid.align_your_steps, ("ays_if",), {"model": "deepfloyd_if"}),
    Entry("quadratic", grid.quadratic),
    Entry("leading", grid.leading),
    Entry("ddim_uniform", grid.ddim_uniform),
    Entry("trailing", grid.trailing),
    Entry("linspace", grid.linspace),
)
"""Grids by name."""

PROCESSES = _table(
    Entry("vp", VP, ("ddpm_continuous",)),
    Entry("subvp", SubVP),
    Entry("cosine", Cosine),
    Entry("ve", VE, ("ncsn",)),
    Entry("edm", EDM, ("karras",)),
    Entry("rectified_flow", RectifiedFlow, ("flow", "rf")),
)
"""Processes by name, with their default parameters."""


def lookup(table: dict[str, Entry], kind: str, name: str) -> Entry:
    """The entry under a name or an alias; `UnknownNameError` names the nearest."""
    key = name.strip().lower().replace("-", "_")
    for entry in table.values():
        if key == entry.name or key in entry.aliases:
            return entry
    raise unknown(kind, name, table, (alias for entry in table.values() for alias in entry.aliases))


def solver(what: str | Solver) -> Solver:
    """The solver of a name; solvers pass through."""
    if isinstance(what, Solver):
        return what
    if isinstance(what, type) and issubclass(what, Solver):
        return what()
    if not isinstance(what, str):
        raise TypeError(f"a solver is a name or a Solver; got {type(what).__name__}")
    name, _, method = what.partition(":")
    entry = lookup(SOLVERS, "solver", name)
    if not method:
        return entry.make()
    if isinstance(entry.kind, type) and issubclass(entry.kind, Nested):
        return entry.make(solver=solver(method))
    if entry.kind not in (TorchDiffEq, TorchSDE):
        raise unknown("solver", what, SOLVERS)
    return entry.make(method)


def process(what: str | Process) -> Process:
    """The process of a name, with default parameters; processes pass through."""
    if isinstance(what, Process):
        return what
    if isinstance(what, type) and issubclass(what, Process):
        return what()
    if not isinstance(what, str):
        raise TypeError(f"a process is a name or a Process; got {type(what).__name__}")
    return lookup(PROCESSES, "process", what).make()


def grid_function(what: str | grid.GridFunction) -> grid.GridFunction:
    """The grid of a name; functions pass through."""
    return what if callable(what) else lookup(GRIDS, "grid", what).make
