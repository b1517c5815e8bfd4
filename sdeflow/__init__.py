"""sdeflow: numerical SDE/ODE solvers for diffusion models, executed as tables of numbers.

import sdeflow
model = sdeflow.load("cifar10")
images = sdeflow.sample(model, nfe=35, n=4, seeds=0)
"""

from sdeflow import grid
from sdeflow._utils import moved
from sdeflow._version import __version__
from sdeflow.denoisers import (
    Denoiser,
    PerSample,
    Preconditioned,
    Prediction,
    Shared,
    Wrapper,
)
from sdeflow.denoisers.thresholding import Clip, DynamicThreshold, Projected
from sdeflow.discrete import (
    BinaryEmpirical,
    BinomialProcess,
    CategoricalEmpirical,
    CategoricalProcess,
    DiscreteBound,
    harmonic_betas,
)
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
from sdeflow.likelihood import Bound, LogLikelihood, log_likelihood, variational_bound
from sdeflow.models.checkpoint import load
from sdeflow.noise import BrownianNoise, Noise, SeededNoise
from sdeflow.plan.check import PlanReport
from sdeflow.plan.plan import Plan
from sdeflow.plan.unroll import Unrolled
from sdeflow.process import (
    EDM,
    VE,
    VP,
    Cosine,
    FromBetas,
    FromSDE,
    FromTable,
    LearnedBetas,
    Level,
    Process,
    RectifiedFlow,
    Reversed,
    SubVP,
    betas,
)
from sdeflow.reverse import Reverse
from sdeflow.sampling.api import Step, encode, sample, solve
from sdeflow.sampling.capture import CapturedSolve
from sdeflow.sampling.cuda_graphs import CompileWarning
from sdeflow.sampling.simulate import simulate, slerp
from sdeflow.solvers.adaptive.dpm_solver import DPMAdaptive
from sdeflow.solvers.adaptive.runge_kutta import RK23, RK45
from sdeflow.solvers.adaptive.sde import AdaptiveSDE
from sdeflow.solvers.auto.solver import Auto
from sdeflow.solvers.base import GridSolver, Solution, Solver
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
from sdeflow.solvers.sde.optimal import Optimal
from sdeflow.solvers.sde.sa_solver import SASolver
from sdeflow.solvers.sde.seeds import SEEDS
from sdeflow.solvers.wrappers.ancestral import Ancestral
from sdeflow.solvers.wrappers.churn import Churn
from sdeflow.solvers.wrappers.langevin import Langevin
from sdeflow.solvers.wrappers.restart import Restart
from sdeflow.targets import Empirical, Gaussian, GaussianMixture
from sdeflow.tuning.gits import gits

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
    "BinaryEmpirical",
    "BinomialProcess",
    "Bound",
    "BrownianNoise",
    "BudgetError",
    "CapturedSolve",
    "CategoricalEmpirical",
    "CategoricalProcess",
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
    "DiscreteBound",
    "DynamicThreshold",
    "Empirical",
    "Euler",
    "EulerMaruyama",
    "ExponentialAdams",
    "FromBetas",
    "FromSDE",
    "FromTable",
    "Gaussian",
    "GaussianMixture",
    "GridError",
    "GridSolver",
    "Heun",
    "IPNDMv",
    "Langevin",
    "LearnedBetas",
    "Level",
    "LogLikelihood",
    "Midpoint",
    "MissingExtraError",
    "Noise",
    "NonFiniteError",
    "Optimal",
    "OutOfMemoryError",
    "PerSample",
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
    "Reversed",
    "SASolver",
    "SDEDPMSolverPP",
    "SDEDPMSolverPPSingle",
    "SdeflowError",
    "SeededNoise",
    "Shared",
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
    "Wrapper",
    "__version__",
    "betas",
    "encode",
    "gits",
    "grid",
    "harmonic_betas",
    "load",
    "log_likelihood",
    "sample",
    "simulate",
    "slerp",
    "solve",
    "variational_bound",
]

moved.install()
