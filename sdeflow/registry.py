"""Names of solvers, grids and processes, with their aliases.

`register_solver`, `register_grid` and `register_process` add names; the documentation, the command
line and the tests read the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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


def _table(*rows: tuple[Any, ...]) -> dict[str, Entry]:
    """The entries of rows `(name, kind, aliases in one string, arguments)`."""
    return {
        name: Entry(name, kind, tuple(rest[0].split()) if rest else (), *rest[1:])
        for name, kind, *rest in rows
    }


SOLVERS = _table(
    ("auto", Auto, "default"),
    ("euler", Euler),
    ("heun", Heun),
    ("midpoint", Midpoint),
    ("ralston", Ralston),
    ("rk4", RK4),
    (
        "ddim",
        DDIM,
        "sample_euler k_euler eulerdiscretescheduler ddimscheduler sample_ddim ddimparallelscheduler",
    ),
    ("adams1", ExponentialAdams, "", {"p": 1}),
    ("adams2", ExponentialAdams, "", {"p": 2}),
    ("adams3", ExponentialAdams, "adams exponential_adams", {"p": 3}),
    ("adams4", ExponentialAdams, "", {"p": 4}),
    ("deis_tab1", DEIS, "", {"p": 2}),
    ("deis_tab2", DEIS, "deis sample_deis", {"p": 3}),
    ("deis_tab3", DEIS, "", {"p": 4}),
    ("deis_rho1", DEIS, "", {"p": 2, "clock": "nsr"}),
    ("deis_rho2", DEIS, "", {"p": 3, "clock": "nsr"}),
    ("deis_rho3", DEIS, "", {"p": 4, "clock": "nsr"}),
    ("deis_logrho", DEIS, "deismultistepscheduler", {"p": 2, "clock": "lam"}),
    ("deis_rho_heun", DEISRungeKutta, "", {"method": "heun"}),
    ("deis_rho_kutta3", DEISRungeKutta, "", {"method": "kutta3"}),
    ("lms", LMS, "sample_lms lmsdiscretescheduler"),
    ("ipndm", IPNDM, "sample_ipndm ipndmscheduler ipndm4"),
    ("ipndm2", IPNDM, "", {"p": 2}),
    ("ipndm3", IPNDM, "", {"p": 3}),
    ("ipndm_v", IPNDMv, "sample_ipndm_v ipndm_v4"),
    ("ipndm_v3", IPNDMv, "", {"p": 3}),
    ("pndm", PNDM, "f_pndm pndmscheduler"),
    ("s_pndm", PNDM, "", {"p": 2, "start_up": "heun"}),
    ("plms", PNDM, "sample_plms", {"start_up": "heun"}),
    ("dpm_solver_1", DPMSolver, "", {"p": 1}),
    ("dpm_solver_2", DPMSolver, "dpm2 dpm_2 sample_dpm_2 kdpm2discretescheduler", {"p": 2}),
    ("dpm_solver_3", DPMSolver, "dpm_solver", {"p": 3}),
    ("dpm_solver_fast", DPMSolver, "dpm_fast sample_dpm_fast", {"p": 3, "stages": "grid"}),
    ("dpmpp_2s", DPMSolver, "dpm++_2s dpmsolver++_2s", {"p": 2, "predicts": "x0"}),
    ("dpmpp_3s", DPMSolver, "dpm++_3s dpmsolver++_3s", {"p": 3, "predicts": "x0"}),
    (
        "dpmpp_2s_fast",
        DPMSolver,
        "dpmsolversinglestepscheduler",
        {"p": 2, "predicts": "x0", "stages": "grid"},
    ),
    ("dpmpp_3s_fast", DPMSolver, "dpmpp_fast", {"p": 3, "predicts": "x0", "stages": "grid"}),
    ("dpm_solver_2m", DPMSolverPP, "", {"p": 2, "predicts": "eps"}),
    ("dpm_solver_3m", DPMSolverPP, "", {"p": 3, "predicts": "eps"}),
    ("dpmpp_1m", DPMSolverPP, "", {"p": 1}),
    (
        "dpmpp_2m",
        DPMSolverPP,
        "sample_dpmpp_2m dpmsolvermultistepscheduler dpmsolver++ dpm_solver_pp dpm++_2m",
        {"p": 2},
    ),
    ("dpmpp_2m_heun", DPMSolverPP, "", {"p": 2, "solver_type": "heun"}),
    ("dpmpp_3m", DPMSolverPP, "dpm++_3m dpmsolver++_3m", {"p": 3}),
    ("dpmpp_3m_exact", DPMSolverPP, "", {"p": 3, "solver_type": "heun", "kappa": 1.0}),
    ("unipc_1", UniPC, "", {"p": 1}),
    ("unipc_2", UniPC, "unipc unipcmultistepscheduler", {"p": 2}),
    ("unipc_3", UniPC, "uni_pc_bh2 sample_unipc_bh2", {"p": 3}),
    ("unipc_3_bh1", UniPC, "uni_pc sample_unipc", {"p": 3, "variant": "bh1"}),
    ("euler_maruyama", EulerMaruyama, "em reverse_sde"),
    ("ddpm", DDPM, "ancestral ddpmscheduler sample_ddpm"),
    ("langevin", Langevin, "predictor_corrector pc"),
    ("churn", Churn, "edm_stochastic heun_churn sample_heun_churn"),
    ("restart", Restart, "restart_sampling restart_heun"),
    (
        "euler_ancestral",
        Ancestral,
        "euler_a sample_euler_ancestral eulerancestraldiscretescheduler k_euler_ancestral",
    ),
    (
        "dpmpp_2s_ancestral",
        Ancestral,
        "sample_dpmpp_2s_ancestral dpmpp_2s_a",
        {"solver": DPMSolver(2, "x0", stages="inner")},
    ),
    (
        "dpm2_ancestral",
        Ancestral,
        "sample_dpm_2_ancestral dpm_2_ancestral dpm2_a kdpm2ancestraldiscretescheduler",
        {"solver": DPMSolver(2, stages="inner")},
    ),
    ("annealed_langevin", AnnealedLangevin, "ncsn ald"),
    ("dpmpp_1_sde", SDEDPMSolverPP, "sde_dpm_solver_pp_1", {"p": 1}),
    (
        "dpmpp_2m_sde",
        SDEDPMSolverPP,
        "sample_dpmpp_2m_sde dpmpp_2m_sde_gpu sde_dpmsolver++ sde_dpm_solver_pp"
        " cosinedpmsolvermultistepscheduler",
        {"p": 2},
    ),
    (
        "dpmpp_2m_sde_heun",
        SDEDPMSolverPP,
        "sample_dpmpp_2m_sde_heun dpmpp_2m_sde_heun_gpu",
        {"p": 2, "exact_weights": True},
    ),
    ("dpmpp_3m_sde", SDEDPMSolverPP, "sample_dpmpp_3m_sde dpmpp_3m_sde_gpu", {"p": 3}),
    ("dpmpp_sde", SDEDPMSolverPPSingle, "sample_dpmpp_sde dpmpp_sde_gpu dpmsolversdescheduler"),
    ("seeds_1", SEEDS, "", {"p": 1}),
    ("seeds_2", SEEDS, "sample_seeds_2", {"p": 2}),
    ("seeds_3", SEEDS, "seeds sample_seeds_3", {"p": 3}),
    ("exp_heun_2_x0_sde", SEEDS, "sample_exp_heun_2_x0_sde", {"p": 2, "r": 1.0, "taylor": True}),
    ("sa_solver", SASolver, "sample_sa_solver sasolverscheduler"),
    ("sa_solver_pece", SASolver, "sample_sa_solver_pece", {"pece": True}),
    ("er_sde_1", ERSDE, "", {"p": 1}),
    ("er_sde_2", ERSDE, "", {"p": 2}),
    ("er_sde_3", ERSDE, "er_sde sample_er_sde", {"p": 3}),
    ("stochastic_adams2", StochasticAdams, "stochastic_adams", {"p": 2}),
    ("stochastic_adams3", StochasticAdams, "", {"p": 3, "corrector": True}),
    ("rk45", RK45, "dopri5 dormand_prince"),
    ("rk23", RK23, "bogacki_shampine"),
    ("dpm_adaptive_12", DPMAdaptive, "dpm_solver_12", {"p": 2}),
    (
        "dpm_adaptive_23",
        DPMAdaptive,
        "dpm_adaptive sample_dpm_adaptive dpm_solver_adaptive dpm_solver_23",
        {"p": 3},
    ),
    ("adaptive_sde", AdaptiveSDE, "gotta_go_fast ggf"),
    ("adaptive_ancestral", AdaptiveSDE, "", {"form": "ancestral"}),
    ("torchdiffeq", TorchDiffEq),
    ("torchsde", TorchSDE),
)
"""Solvers by name.

`torchdiffeq:METHOD` and `torchsde:METHOD` reach every method of those libraries. `churn:NAME`, and
likewise every name of a solver that holds a solver, holds the named one.
"""

_COMBINED: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "sample_heun": ("heun", {"clock": "nsr"}, None),
    "k_heun": ("heun", {"clock": "nsr"}, None),
    "heundiscretescheduler": ("heun", {"clock": "nsr"}, None),
    "edmeulerscheduler": ("ddim", {}, "karras"),
    "edmdpmsolvermultistepscheduler": ("dpmpp_2m", {}, "karras"),
    "flowmatcheulerdiscretescheduler": ("euler", {"clock": "t"}, "flow_shift"),
    "flowmatchheundiscretescheduler": ("heun", {"clock": "t"}, "flow_shift"),
}
"""Names of other libraries that mean a solver with other arguments, or with its grid."""

GRIDS = _table(
    ("auto", auto_grid),
    ("uniform_t", grid.uniform_t, "uniform normal"),
    ("uniform_sqrt_t", grid.uniform_sqrt_t, "sqrt_t"),
    ("power_t", grid.power_t),
    ("cosine_t", grid.cosine_t, "chebyshev_t"),
    ("uniform_lam", grid.uniform_lam, "exponential logsnr get_sigmas_exponential use_lu_lambdas"),
    ("polyexponential", grid.polyexponential, "power_lam get_sigmas_polyexponential"),
    ("two_powers", grid.two_powers),
    ("dense_lam", grid.dense_lam, "sinh_lam"),
    ("karras", grid.karras, "edm get_sigmas_karras use_karras_sigmas"),
    ("uniform_angle", grid.uniform_angle, "kl_optimal"),
    ("uniform_vp", grid.uniform_vp, "vp get_sigmas_vp"),
    ("uniform_cosine", grid.uniform_cosine, "cosine"),
    ("uniform_flow", grid.flow_shift, "", {"shift": 1.0}),
    ("flow_shift", grid.flow_shift, "sd3 flowmatcheulerdiscretescheduler"),
    ("simple", grid.simple),
    ("sgm_uniform", grid.sgm_uniform),
    ("linear_quadratic", grid.linear_quadratic),
    ("beta", grid.beta_quantiles, "use_beta_sigmas"),
    ("beta57", grid.beta_quantiles, "", {"alpha": 0.5, "beta": 0.7}),
    ("ays_sd15", grid.align_your_steps, "ays align_your_steps", {"model": "sd15"}),
    ("ays_sdxl", grid.align_your_steps, "", {"model": "sdxl"}),
    ("ays_svd", grid.align_your_steps, "", {"model": "svd"}),
    ("ays_deepfloyd_if", grid.align_your_steps, "ays_if", {"model": "deepfloyd_if"}),
    ("quadratic", grid.quadratic),
    ("leading", grid.leading),
    ("ddim_uniform", grid.ddim_uniform),
    ("trailing", grid.trailing),
    ("linspace", grid.linspace),
)
"""Grids by name."""

PROCESSES = _table(
    ("vp", VP, "ddpm_continuous"),
    ("subvp", SubVP),
    ("cosine", Cosine),
    ("ve", VE, "ncsn"),
    ("edm", EDM, "karras"),
    ("rectified_flow", RectifiedFlow, "flow rf"),
)
"""Processes by name, with their default parameters."""


def register_solver(
    name: str,
    kind: Callable[..., Solver],
    *,
    aliases: Sequence[str] = (),
    arguments: Mapping[str, Any] | None = None,
) -> Entry:
    """Make a solver available under a name, to `sample`, to wrappers (`"churn:NAME"`) and on the
    command line.

    `kind` is its class, or a function that returns one; `arguments` are those that the name stands
    for. Errors: `ValueError` for a name or an alias that is taken.
    """
    return _register(SOLVERS, "solver", Entry(name, kind, tuple(aliases), dict(arguments or {})))


def register_grid(
    name: str,
    function: grid.GridFunction,
    *,
    aliases: Sequence[str] = (),
    arguments: Mapping[str, Any] | None = None,
) -> Entry:
    """Make a grid available under a name: a function of a process and a number of levels that
    returns times. Otherwise as `register_solver`.
    """
    return _register(GRIDS, "grid", Entry(name, function, tuple(aliases), dict(arguments or {})))


def register_process(
    name: str,
    kind: Callable[..., Process],
    *,
    aliases: Sequence[str] = (),
    arguments: Mapping[str, Any] | None = None,
) -> Entry:
    """Make a process available under a name. Otherwise as `register_solver`."""
    return _register(PROCESSES, "process", Entry(name, kind, tuple(aliases), dict(arguments or {})))


def _register(table: dict[str, Entry], what: str, entry: Entry) -> Entry:
    entry = replace(entry, name=_key(entry.name), aliases=tuple(map(_key, entry.aliases)))
    for new in (entry.name, *entry.aliases):
        for known in table.values():
            if new in (known.name, *known.aliases):
                raise ValueError(f"the {what} {new!r} is registered already, as {known.kind}")
    table[entry.name] = entry
    return entry


def _key(name: str) -> str:
    return "_".join(name.lower().replace("-", " ").split())


def lookup(table: dict[str, Entry], kind: str, name: str) -> Entry:
    """The entry under a name or an alias; `UnknownNameError` names the nearest."""
    entry = _find(table, name)
    if entry is not None:
        return entry
    raise unknown(kind, name, table, (alias for entry in table.values() for alias in entry.aliases))


def _find(table: dict[str, Entry], name: str) -> Entry | None:
    """The entry under a name or an alias, if any; `++` may be written for `pp`."""
    key = _key(name)
    for entry in table.values():
        names = (entry.name, *entry.aliases)
        if key in names or key.replace("++", "pp") in names:
            return entry
    return None


def _with_grid(name: str) -> Solver | None:
    """The solver that a name means together with its grid, `"DPM++ 2M Karras"`; None for others.

    The grid is the solver's `default_grid`.
    """
    key = _key(name)
    entry, on = None, None
    if key in _COMBINED:
        base, arguments, on = _COMBINED[key]
        entry = SOLVERS[base]
        entry = replace(entry, arguments={**entry.arguments, **arguments})
    else:
        for known in GRIDS.values():
            for ending in (known.name, *known.aliases):
                first = key.removesuffix(f"_{ending}")
                if first not in (key, "auto") and (entry := _find(SOLVERS, first)) is not None:
                    on = known.name
                    break
            if entry is not None:
                break
    if entry is None:
        return None
    made: Solver = entry.make()
    if on is not None:
        object.__setattr__(made, "default_grid", on)
    return made


def solver(what: str | Solver) -> Solver:
    """The solver of a name; solvers pass through.

    A name may end in that of a grid, `"DPM++ 2M Karras"`: it becomes the solver's `default_grid`,
    which `grid=` overrides.
    """
    if isinstance(what, Solver):
        return what
    if isinstance(what, type) and issubclass(what, Solver):
        return what()
    if not isinstance(what, str):
        raise TypeError(f"a solver is a name or a Solver; got {type(what).__name__}")
    name, _, method = what.partition(":")
    if _find(SOLVERS, name) is None and not method and (found := _with_grid(name)) is not None:
        return found
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
