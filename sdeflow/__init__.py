"""sdeflow: numerical SDE/ODE solvers for diffusion models, executed as tables of numbers.

import sdeflow
model = sdeflow.load("cifar10")
images = sdeflow.sample(model, solver="heun", nfe=35, n=4, seeds=0)
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
    SdeflowError,
    SolverError,
    UnknownNameError,
)
from sdeflow.models.checkpoint import load
from sdeflow.noise import BrownianNoise, Noise, SeededNoise
from sdeflow.plan import Plan
from sdeflow.process import EDM, VE, VP, Cosine, FromBetas, FromSDE, Level, Process, RectifiedFlow, SubVP
from sdeflow.reverse import Reverse
from sdeflow.sampling import Step, encode, sample, solve
from sdeflow.solvers.adaptive import RK23, RK45
from sdeflow.solvers.base import GridSolver, Solution, Solver
from sdeflow.solvers.exponential import DDIM
from sdeflow.solvers.external import TorchDiffEq, TorchSDE
from sdeflow.solvers.runge_kutta import RK4, Euler, Heun, Midpoint, Ralston
from sdeflow.solvers.stochastic import DDPM, AnnealedLangevin, EulerMaruyama
from sdeflow.solvers.wrappers import Langevin
from sdeflow.targets import Empirical, Gaussian, GaussianMixture

__all__ = [
    "DDIM",
    "DDPM",
    "EDM",
    "RK4",
    "RK23",
    "RK45",
    "VE",
    "VP",
    "AnnealedLangevin",
    "BrownianNoise",
    "BudgetError",
    "CheckpointError",
    "Cosine",
    "Denoiser",
    "Empirical",
    "Euler",
    "EulerMaruyama",
    "FromBetas",
    "FromSDE",
    "Gaussian",
    "GaussianMixture",
    "GridError",
    "GridSolver",
    "Heun",
    "Langevin",
    "Level",
    "Midpoint",
    "MissingExtraError",
    "Noise",
    "NonFiniteError",
    "Plan",
    "Preconditioned",
    "Prediction",
    "Process",
    "Ralston",
    "RectifiedFlow",
    "Reverse",
    "SdeflowError",
    "SeededNoise",
    "Solution",
    "Solver",
    "SolverError",
    "Step",
    "SubVP",
    "TorchDiffEq",
    "TorchSDE",
    "UnknownNameError",
    "__version__",
    "encode",
    "grid",
    "load",
    "sample",
    "solve",
]
