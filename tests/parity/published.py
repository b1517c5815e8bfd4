"""The published implementations, each run through its own interface in float64, at the levels and
with the noises of `setting`.

A run takes a case's settings and returns `(times, x / s, calls)`: the levels that the peer used, as
times of the case's process; where it ended; and how often it asked for a prediction. `times` given
are put in place of the peer's table; else they are read from it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from peers import k_sampling
from problems import LINEAR_BETAS
from setting import PINS, PROCESSES, Asked, kernel, path, start
from torch import Tensor

Run = tuple[Tensor, Tensor, int]


def installed(package: str) -> bool:
    """Whether a package is there at the pinned version."""
    try:
        return importlib.metadata.version(package) == PINS["packages"][package]
    except importlib.metadata.PackageNotFoundError:
        return False


@contextlib.contextmanager
def doubles() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Wide:
    """A module in which float32 is float64: for code that casts down whatever it is given."""

    def __init__(self, module: Any, float64: Any):
        self._module, self.float32 = module, float64

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@contextlib.contextmanager
def wide(module: Any) -> Iterator[None]:
    """A module of diffusers with float64 wherever it says float32."""
    with contextlib.ExitStack() as stack:
        for name, float64 in (("torch", torch.float64), ("np", np.float64)):
            if hasattr(module, name):
                stack.enter_context(
                    mock.patch.object(module, name, _Wide(getattr(module, name), float64))
                )
        yield


# -------------------------------------------------------------------------------------- k-diffusion


def on_path(times: Tensor, r: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Noise as the increments of one Brownian path, for levels and one stage in each step."""
    brownian = path(with_stages(times, r))
    return lambda a, b: brownian.draw(float(a), float(b))


def with_stages(times: Tensor, r: float) -> list[float]:
    """Levels, and those a fraction `r` of each step in lam beyond them."""
    lam = -times.log()
    return torch.cat([times, torch.exp(-(lam[:-1] + r * lam.diff()))]).tolist()


def k_diffusion(
    process: str, times: Tensor, sampler: str, *, finish: bool = True, noise: str = "order", polynomial: tuple[float, ...] = (),
    **options: Any,
) -> Run:  # fmt: skip
    """A sampler over noise levels, which are the times of `edm`; `sample_dpm_fast` and `_adaptive`
    take the two ends alone.
    """
    k, asked = k_sampling(), Asked(polynomial=polynomial)
    if noise == "order":
        options["noise_sampler"] = lambda *_: asked.noise()
    elif noise == "path":
        options["noise_sampler"] = on_path(times, options.get("r", 0.5))
    elif noise == "none":
        options["noise_sampler"] = lambda *_: 0.0
    sample, takes = getattr(k, sampler), inspect.signature(getattr(k, sampler)).parameters
    if "noise_sampler" not in takes:
        options.pop("noise_sampler", None)
    with doubles(), mock.patch.object(torch, "randn_like", asked.noise):
        x = start(process, times[0])

        def model(z: Tensor, sigma: Tensor) -> Tensor:
            return asked(z, sigma[0])

        if "sigma_min" in takes:
            if sampler == "sample_dpm_fast":
                options["n"] = options.pop("nfe")
            x = sample(model, x, float(times[-1]), float(times[0]), disable=True, **options)
        else:
            x = sample(model, x, k.append_zero(times) if finish else times, disable=True, **options)
    return times, x, asked.calls


# ---------------------------------------------------------------------------------------- diffusers


def diffusers(
    process: str, times: Tensor | None, scheduler: str, *, n: int = 0, finish: bool = True, output: str = "sample",
    step: dict[str, Any] | None = None, polynomial: tuple[float, ...] = (), stop: int | None = None, **options: Any,
) -> Run:  # fmt: skip
    """A scheduler's loop. Its levels are its own (`times=None`, `n` steps) or those given, in place
    of its `sigmas`.

    `finish`: the levels given are followed by 0. `stop`: leave out so many of its last steps.
    `output`: what it is told that the network predicts. Each step gets the exact prediction at the
    level that the scheduler's own coefficients assume.
    """
    module = importlib.import_module(f"diffusers.schedulers.{_FILES[scheduler]}")
    kind, asked = getattr(module, scheduler), Asked(process, polynomial=polynomial)
    takes = inspect.signature(kind.__init__).parameters
    if "trained_betas" in takes and scheduler != "IPNDMScheduler":
        options.setdefault("trained_betas", LINEAR_BETAS.numpy())
    if "prediction_type" in takes and output in ("sample", "flow", "epsilon"):
        options["prediction_type"] = {"flow": "flow_prediction"}.get(output, output)
    noise = mock.patch.object(module, "randn_tensor", asked.noise, create=True)
    with wide(module), noise, warnings.catch_warnings(), doubles():
        warnings.simplefilter("ignore")
        made = kind(**options)
        if hasattr(made, "alphas_cumprod") and "trained_betas" in options:
            made.alphas_cumprod = torch.cumprod(1.0 - torch.as_tensor(options["trained_betas"]), 0)
        made.set_timesteps(len(times) - (0 if finish else 1) if times is not None else n)
        if times is not None:
            _give(made, process, times, finish)
        if hasattr(made, "set_begin_index"):
            made.set_begin_index(0)
        if hasattr(made, "noise_sampler"):
            made.noise_sampler = on_path(made.sigmas.unique()[1:].flip(0), 0.5)
        steps = list(made.timesteps)[: len(made.timesteps) - (stop or 0)]
        levels = [_level(made, i, t, process) for i, t in enumerate(steps)]
        x = start(process, levels[0])
        if scheduler in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"):
            assert process == "edm"
        for i, t in enumerate(steps):
            if hasattr(made, "scale_model_input"):
                made.scale_model_input(x, t)
            out = _output(asked, process, x, _asked_level(made, i, t, process, levels), output)
            x = made.step(out, t, x, return_dict=False, **(step or {}))[0]
        used = _used(made, steps, levels, process, finish and not stop)
    s, _ = kernel(process, used[-1])
    return used, x if finish and not stop else x / s, asked.calls


_FILES = {
    "DDIMScheduler": "scheduling_ddim",
    "DDPMScheduler": "scheduling_ddpm",
    "DEISMultistepScheduler": "scheduling_deis_multistep",
    "DPMSolverSDEScheduler": "scheduling_dpmsolver_sde",
    "DPMSolverMultistepScheduler": "scheduling_dpmsolver_multistep",
    "DPMSolverSinglestepScheduler": "scheduling_dpmsolver_singlestep",
    "EDMDPMSolverMultistepScheduler": "scheduling_edm_dpmsolver_multistep",
    "EDMEulerScheduler": "scheduling_edm_euler",
    "EulerAncestralDiscreteScheduler": "scheduling_euler_ancestral_discrete",
    "EulerDiscreteScheduler": "scheduling_euler_discrete",
    "FlowMatchEulerDiscreteScheduler": "scheduling_flow_match_euler_discrete",
    "FlowMatchHeunDiscreteScheduler": "scheduling_flow_match_heun_discrete",
    "HeunDiscreteScheduler": "scheduling_heun_discrete",
    "IPNDMScheduler": "scheduling_ipndm",
    "KDPM2AncestralDiscreteScheduler": "scheduling_k_dpm_2_ancestral_discrete",
    "KDPM2DiscreteScheduler": "scheduling_k_dpm_2_discrete",
    "LMSDiscreteScheduler": "scheduling_lms_discrete",
    "PNDMScheduler": "scheduling_pndm",
    "SASolverScheduler": "scheduling_sasolver",
    "UniPCMultistepScheduler": "scheduling_unipc_multistep",
}
_TWICE = (
    "HeunDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "DPMSolverSDEScheduler",
)
"""Schedulers with two calls a step, whose tables hold each level twice."""


def _give(made: Any, process: str, times: Tensor, finish: bool) -> None:
    """Levels of our choice in place of a scheduler's table."""
    name = type(made).__name__
    sigmas = torch.cat([times, times.new_zeros(1)]) if finish else times
    if name == "IPNDMScheduler":
        angle = torch.atan(sigmas)
        made.betas, made.alphas = torch.sin(angle), torch.cos(angle)
    elif name == "KDPM2DiscreteScheduler":
        between = sigmas.log().lerp(sigmas.roll(1).log(), 0.5).exp()
        made.sigmas = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2), sigmas[-1:]])
        made.sigmas_interpol = torch.cat(
            [between[:1], between[1:].repeat_interleave(2), between[-1:]]
        )
    elif name in _TWICE:
        inner = sigmas[1:-1].repeat_interleave(2) if finish else sigmas[1:].repeat_interleave(2)
        made.sigmas = torch.cat([sigmas[:1], inner, sigmas[-1:]])
        if not finish:
            made.timesteps = torch.arange(2 * (len(times) - 1), 0, -1, dtype=torch.float64)
    else:
        made.sigmas = sigmas


def _of_table(made: Any, t: Any, process: str) -> Tensor:
    """The time of an entry of the table of betas."""
    signal2 = made.alphas_cumprod[int(t)]
    return torch.sqrt((1.0 - signal2) / signal2) if process == "sphere" else _entry(t)


def _entry(t: Any) -> Tensor:
    return (torch.as_tensor(float(t)) + 1.0) / len(LINEAR_BETAS)


def _level(made: Any, i: int, t: Any, process: str) -> Tensor:
    """The scheduler's level at its i-th call, as a time of the process."""
    if type(made).__name__ == "IPNDMScheduler":
        return made.betas[i] / made.alphas[i]
    if hasattr(made, "step_index") and hasattr(made, "sigmas"):
        return made.sigmas[i].double()
    return _of_table(made, t, process)


def _asked_level(made: Any, i: int, t: Any, process: str, levels: list[Tensor]) -> Tensor:
    """The level at which the i-th call is made."""
    name = type(made).__name__
    if name == "DPMSolverSDEScheduler" and i % 2:
        return torch.exp(0.5 * (made.sigmas[i - 1].log() + made.sigmas[i].log()))
    if name.startswith("KDPM2") and i % 2:
        return made.sigmas_interpol[i if name == "KDPM2DiscreteScheduler" else i - 1]
    return levels[i]


def _used(made: Any, steps: list[Any], levels: list[Tensor], process: str, finish: bool) -> Tensor:
    """The levels of a run without those within its steps, each once."""
    if type(made).__name__ == "PNDMScheduler":  # its steps at the start have calls within
        return torch.stack([_entry(t) for t in reversed(made._timesteps)])
    every = [*levels] if finish else [*levels, _after(made, len(levels), steps, process)]
    once = [every[0]]
    for level in every[1:]:
        if level != once[-1]:
            once.append(level)
    return torch.stack(once).double()


def _after(made: Any, i: int, steps: list[Any], process: str) -> Tensor:
    """The level after the last step that was taken."""
    if type(made).__name__ == "IPNDMScheduler" or (
        hasattr(made, "step_index") and hasattr(made, "sigmas")
    ):
        return _level(made, i, None, process)
    ratio = made.config.num_train_timesteps // made.num_inference_steps
    return _of_table(made, int(steps[-1]) - ratio, process)


def _output(asked: Asked, process: str, x: Tensor, level: Tensor, output: str) -> Tensor:
    """What a network of the kind `output` would say of `x`."""
    s, sigma = kernel(process, level)
    z, nsr = x / s, sigma / s
    x0 = asked(z, nsr)
    eps = (x - s * x0) / sigma
    if output == "sample":
        return x0
    if output == "epsilon":
        return eps
    if output == "flow":
        return eps - x0
    if output == "v":
        return s * eps - sigma * x0
    data = 0.5  # EDM's preconditioning
    skip, gain = data**2 / (nsr**2 + data**2), nsr * data / torch.sqrt(nsr**2 + data**2)
    return (x0 - skip * z) / gain


# -------------------------------------------------------------------------------------------- azula


def azula(process: str, times: Tensor, sampler: str, **options: Any) -> Run:
    """A sampler from the first time to the last."""
    module, asked = importlib.import_module("azula.sample"), Asked(process)
    path_ = PROCESSES[process]

    class Exact:
        schedule = staticmethod(lambda t: path_.kernel(t))

        def __call__(self, x: Tensor, t: Tensor) -> Any:
            s, sigma = path_.kernel(t)
            return types.SimpleNamespace(mean=asked(x / s, sigma / s))

    kind = getattr(module, sampler)
    kind = type(sampler, (kind,), {"timesteps": property(lambda self: times)})
    with doubles(), mock.patch.object(torch, "randn_like", asked.noise):
        x = kind(Exact(), silent=True, **options)(start(process, times[0]))
    return times, x / path_.kernel(times[-1])[0], asked.calls


# ----------------------------------------------------------------------- torchdiffeq, flow_matching


def _velocity(process: str, asked: Asked) -> Callable[[Tensor, Tensor], Tensor]:
    path_ = PROCESSES[process]

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        level = path_.level(t)
        if level.s == 0.0:  # all is noise: the mean of the data
            raise AssertionError("the grids of these tests end before")
        z, nsr = x / level.s, level.sigma / level.s
        x0 = asked(z, nsr)
        return level.ds * x0 + level.dsigma * (z - x0) / nsr

    return velocity


def torchdiffeq(process: str, times: Tensor, method: str, **options: Any) -> Run:
    """The probability-flow ODE in the process's own time."""
    module, asked = importlib.import_module("torchdiffeq"), Asked(process)
    x = module.odeint(
        _velocity(process, asked), start(process, times[0]), times, method=method, **options
    )[-1]
    return times, x / kernel(process, times[-1])[0], asked.calls


def flow_matching(process: str, times: Tensor, method: str) -> Run:
    """Its time runs from noise at 0 to data at 1."""
    module, asked = importlib.import_module("flow_matching.solver"), Asked(process)
    velocity = _velocity(process, asked)
    solver = module.ODESolver(velocity_model=lambda x, t: -velocity(1.0 - t, x))
    with doubles():
        x = solver.sample(
            x_init=start(process, times[0]), step_size=None, method=method, time_grid=1.0 - times
        )
    return times, x / kernel(process, times[-1])[0], asked.calls


PEERS: dict[str, Callable[..., Run]] = {
    "k-diffusion": k_diffusion,
    "diffusers": diffusers,
    "azula": azula,
    "torchdiffeq": torchdiffeq,
    "flow-matching": flow_matching,
}
