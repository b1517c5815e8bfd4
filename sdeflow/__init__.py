"""sdeflow: numerical SDE/ODE solvers for diffusion models, executed as tables of numbers.

import sdeflow
model = sdeflow.load("cifar10")
images = sdeflow.sample(model, nfe=35, n=4, seeds=0)
"""

from sdeflow import grid
from sdeflow._version import __version__
from sdeflow.denoiser import Denoiser, Preconditioned, Prediction
from sdeflow.errors import (
    BudgetError,
    CheckpointError,
    GridError,
    MissingExtraError,
    NonFiniteError,
    OutOfMemoryError,
    SdeflowError,
    SolverError,
    UnknownNameError,
)
from sdeflow.execution.capture import CapturedSolve
from sdeflow.execution.compiled import CompileWarning
from sdeflow.grid.search import gits
from sdeflow.models.checkpoint import load
from sdeflow.noise import BrownianNoise, Noise, SeededNoise
from sdeflow.plan.check import PlanReport
from sdeflow.plan.plan import Plan
from sdeflow.plan.unroll import Unrolled
from sdeflow.process import EDM, VE, VP, Cosine, FromBetas, FromSDE, Level, Process, RectifiedFlow, SubVP
from sdeflow.projection import Clip, DynamicThreshold, Projected
from sdeflow.reverse import Reverse
from sdeflow.sampling import Step, encode, sample, solve
from sdeflow.solvers.adams import ExponentialAdams
from sdeflow.solvers.adaptive import RK23, RK45
from sdeflow.solvers.adaptive_sde import AdaptiveSDE
from sdeflow.solvers.ancestral import Ancestral
from sdeflow.solvers.auto import Auto
from sdeflow.solvers.base import GridSolver, Solution, Solver
from sdeflow.solvers.churn import Churn
from sdeflow.solvers.deis import DEIS, LMS, DEISRungeKutta
from sdeflow.solvers.dpm_adaptive import DPMAdaptive
from sdeflow.solvers.dpm_solver import DPMSolver, DPMSolverPP
from sdeflow.solvers.er_sde import ERSDE
from sdeflow.solvers.exponential import DDIM
from sdeflow.solvers.external import TorchDiffEq, TorchSDE
from sdeflow.solvers.pndm import IPNDM, PNDM, IPNDMv
from sdeflow.solvers.restart import Restart
from sdeflow.solvers.runge_kutta import RK4, Euler, Heun, Midpoint, Ralston
from sdeflow.solvers.sa_solver import SASolver
from sdeflow.solvers.sde_dpm_solver import SDEDPMSolverPP, SDEDPMSolverPPSingle
from sdeflow.solvers.seeds import SEEDS
from sdeflow.solvers.stochastic import DDPM, AnnealedLangevin, EulerMaruyama
from sdeflow.solvers.stochastic_adams import StochasticAdams
from sdeflow.solvers.unipc import UniPC
from sdeflow.solvers.wrappers import Langevin
from sdeflow.targets import Empirical, Gaussian, GaussianMixture

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "EDM",
    "ERSDE",
    "IPNDM",
    "LMS",
    "PNDM",
    "RK4",
    "RK23",
    "RK45",
    "SEEDS",
    "VE",
    "VP",
    "AdaptiveSDE",
    "Ancestral",
    "AnnealedLangevin",
    "Auto",
    "BrownianNoise",
    "BudgetError",
    "CapturedSolve",
    "CheckpointError",
    "Churn",
    "Clip",
    "CompileWarning",
    "Cosine",
    "DEISRungeKutta",
    "DPMAdaptive",
    "DPMSolver",
    "DPMSolverPP",
    "Denoiser",
    "DynamicThreshold",
    "Empirical",
    "Euler",
    "EulerMaruyama",
    "ExponentialAdams",
    "FromBetas",
    "FromSDE",
    "Gaussian",
    "GaussianMixture",
    "GridError",
    "GridSolver",
    "Heun",
    "IPNDMv",
    "Langevin",
    "Level",
    "Midpoint",
    "MissingExtraError",
    "Noise",
    "NonFiniteError",
    "OutOfMemoryError",
    "Plan",
    "PlanReport",
    "Preconditioned",
    "Prediction",
    "Process",
    "Projected",
    "Ralston",
    "RectifiedFlow",
    "Restart",
    "Reverse",
    "SASolver",
    "SDEDPMSolverPP",
    "SDEDPMSolverPPSingle",
    "SdeflowError",
    "SeededNoise",
    "Solution",
    "Solver",
    "SolverError",
    "Step",
    "StochasticAdams",
    "SubVP",
    "TorchDiffEq",
    "TorchSDE",
    "UniPC",
    "UnknownNameError",
    "Unrolled",
    "__version__",
    "encode",
    "gits",
    "grid",
    "load",
    "sample",
    "solve",
]
