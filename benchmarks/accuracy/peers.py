"""Other libraries' samplers on the problems of `accuracy.py`, each through its own interface.

Every peer gets the exact denoiser in the parametrisation it asks for, at the very noise level its
own coefficients assume (no rounding to a table of a network's time steps), and its calls are
counted where they happen. A peer that ends at the smallest noise gets one more call for the step to
zero noise, as `finish` is one of ours. Deterministic runs are made in float64 as far as the peer
allows; tables that it keeps in float32 stay so unless its grid is given (`sigmas=`).

`catalogue(process)` lists the settings of all peers that are installed; `benchmarks/peers.txt` has
the versions.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import math
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy.problems import CannotSpend, Method, Problem, betas
from sdeflow import grid

GRIDS: dict[str, grid.GridFunction] = {
    "uniform_t": grid.uniform_t,
    "uniform_sqrt_t": grid.uniform_sqrt_t,
    "uniform_lam": grid.uniform_lam,
    "karras": grid.karras,
}
"""What is given to peers that take any noise levels, beside the schedules of their own."""


def versions() -> dict[str, str]:
    """The installed peers."""
    out = {}
    for name in ("k-diffusion", "diffusers", "azula", "torchdiffeq", "flow-matching"):
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def catalogue(process: str) -> list[Method]:
    """Every setting of every installed peer for a process."""
    families = {
        "k-diffusion": _k_diffusion,
        "diffusers": _diffusers,
        "azula": _azula,
        "torchdiffeq": _torchdiffeq,
        "flow-matching": _flow_matching,
    }
    out = []
    for name in versions():
        if why := _missing(name):
            warnings.warn(
                f"{name} is installed and cannot be imported, so it is left out: {why}",
                stacklevel=2,
            )
        else:
            out += families[name](process)
    return out


@cache
def _missing(name: str) -> str:
    """Import a peer, once, before workers are forked; why that cannot be."""
    modules = {
        "diffusers": ("diffusers.schedulers",),
        "azula": ("azula.noise", "azula.sample"),
        "torchdiffeq": ("torchdiffeq",),
        "flow-matching": ("flow_matching.solver",),
    }
    try:
        if name == "k-diffusion":
            _k_sampling()
        for module in modules.get(name, ()):
            importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _halves(nfe: int) -> int:
    """Levels of a method with two calls a step and one for the last."""
    if nfe % 2 == 0:
        raise CannotSpend
    return (nfe + 1) // 2


@contextmanager
def _doubles() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _precision(problem: Problem) -> Any:
    """Float64 for whatever a peer makes itself, where the problem is in float64."""
    return _doubles() if problem.start.dtype == torch.float64 else nullcontext()


# -------------------------------------------------------------------------------------- k-diffusion


def _k_sampling() -> Any:
    """`k_diffusion.sampling` alone: the package itself imports training and evaluation, with a
    dozen requirements.
    """
    if "k_diffusion" not in sys.modules:
        spec = importlib.util.find_spec("k_diffusion")
        package = types.ModuleType("k_diffusion")
        package.__path__ = list(spec.submodule_search_locations or []) if spec else []
        sys.modules["k_diffusion"] = package
        # Its pictures are not needed here, and torchvision may be absent, or built for another
        # torch.
        lent = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "PIL")
        for name in lent:
            sys.modules.setdefault(name, types.ModuleType(name))
        sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
        sys.modules["torchvision.transforms"].functional = sys.modules[
            "torchvision.transforms.functional"
        ]
        sys.modules["PIL"].__dict__.setdefault("Image", types.ModuleType("PIL.Image"))
        try:
            return importlib.import_module("k_diffusion.sampling")
        finally:
            for name in lent:
                if sys.modules[name].__spec__ is None:  # not the real one
                    del sys.modules[name]
    return importlib.import_module("k_diffusion.sampling")


def _k_sigmas(k: Any, schedule: str, problem: Problem, n: int) -> Tensor:
    ends = problem.nsr_min, problem.nsr_top
    if schedule.startswith("karras rho="):
        sigmas = k.get_sigmas_karras(n, *ends, rho=float(schedule.partition("=")[2]))
    elif schedule == "exponential":
        sigmas = k.get_sigmas_exponential(n, *ends)
    elif schedule.startswith("polyexponential rho="):
        sigmas = k.get_sigmas_polyexponential(n, *ends, rho=float(schedule.partition("=")[2]))
    elif schedule == "vp":
        sigmas = k.get_sigmas_vp(n)
    else:
        sigmas = k.append_zero(problem.ratios(GRIDS[schedule], n))
    return sigmas.to(problem.start.dtype)


def _k_run(
    problem: Problem,
    nfe: int,
    *,
    sampler: str,
    schedule: str,
    calls: int,
    options: dict[str, Any],
    noisy: bool = False,
) -> Tensor:
    k = _k_sampling()
    with _precision(problem):
        if noisy:
            # Independent noise for each step instead of a Brownian tree: the same law, and hundreds
            # of times cheaper, except where one step asks for two increments of one path.
            options = {**options, "noise_sampler": lambda *_: torch.randn_like(problem.ratio_start)}
        x = problem.ratio_start

        def model(y: Tensor, sigma: Tensor) -> Tensor:
            return problem.denoise(y, sigma[0])

        sample = getattr(k, sampler)
        if sampler == "sample_dpm_fast":
            x = sample(model, x, problem.nsr_min, problem.nsr_top, nfe - 1, disable=True, **options)
            return problem.denoise(x, problem.nsr_min)
        n = nfe if calls == 1 else _halves(nfe)
        return sample(model, x, _k_sigmas(k, schedule, problem, n), disable=True, **options)


def _k_diffusion(process: str) -> list[Method]:
    schedules = ["karras rho=7", "karras rho=3", "exponential", "polyexponential rho=1.5"]
    schedules += [*(["vp"] if process == "vp" else ["uniform_t"]), "uniform_sqrt_t"]
    no_noise: dict[str, Any] = {"eta": 0.0, "noise_sampler": lambda *_: 0.0}
    deterministic: list[tuple[str, str, int, dict[str, Any]]] = [
        ("sample_euler", "", 1, {}),
        ("sample_heun", "", 2, {}),
        ("sample_dpm_2", "", 2, {}),
        *[("sample_lms", f" order={p}", 1, {"order": p}) for p in (2, 3)],
        ("sample_lms", "", 1, {}),
        ("sample_dpmpp_2m", "", 1, {}),
        ("sample_dpmpp_2s_ancestral", " eta=0", 2, no_noise),
        ("sample_dpmpp_sde", " eta=0", 2, no_noise),
        ("sample_dpmpp_2m_sde", " eta=0", 1, no_noise),
        ("sample_dpmpp_2m_sde", " eta=0 heun", 1, {**no_noise, "solver_type": "heun"}),
        ("sample_dpmpp_3m_sde", " eta=0", 1, no_noise),
    ]
    stochastic: list[tuple[str, int]] = [
        ("sample_euler_ancestral", 1),
        ("sample_dpm_2_ancestral", 2),
        ("sample_dpmpp_2s_ancestral", 2),
        ("sample_dpmpp_sde", 2),
        ("sample_dpmpp_2m_sde", 1),
        ("sample_dpmpp_3m_sde", 1),
    ]
    # The package has no default: these are what its own scripts use, and what most of its users do.
    defaults = {"sample_lms", "sample_dpmpp_2m", "sample_euler_ancestral", "sample_dpmpp_2m_sde"}
    out = []
    for schedule in schedules:
        for sampler, suffix, calls, options in deterministic:
            run = partial(_k_run, sampler=sampler, schedule=schedule, calls=calls, options=options)
            default = sampler in defaults and not suffix and schedule == "karras rho=7"
            out.append(
                Method(
                    "k-diffusion", sampler.removeprefix("sample_") + suffix, schedule, run, default
                )
            )
        for sampler, calls in stochastic:
            run = partial(
                _k_run, sampler=sampler, schedule=schedule, calls=calls, options={}, noisy=True
            )
            default = sampler in defaults and schedule == "karras rho=7"
            out.append(
                Method(
                    "k-diffusion",
                    sampler.removeprefix("sample_"),
                    schedule,
                    run,
                    default,
                    stochastic=True,
                )
            )
    fast = partial(_k_run, sampler="sample_dpm_fast", schedule="", calls=1, options={})
    out.append(Method("k-diffusion", "dpm_fast", "exponential", fast))
    return out


# ---------------------------------------------------------------------------------------- diffusers


def _level_of(scheduler: Any, t: Tensor, frame: str) -> float:
    """The scheduler's own noise level at the step it is about to make, as `nsr`."""
    if hasattr(scheduler, "sigmas") and hasattr(scheduler, "step_index"):
        sigma = float(scheduler.sigmas[scheduler.step_index or 0])
        if frame == "flow":
            return sigma / (1.0 - sigma) if sigma < 1.0 else math.inf
        return sigma
    if hasattr(scheduler, "ets") and hasattr(scheduler, "step_index"):  # IPNDM
        i = scheduler.step_index or 0
        signal = float(scheduler.alphas[i])
        return float(scheduler.betas[i]) / signal if signal > 0 else math.inf
    signal2 = float(scheduler.alphas_cumprod[int(t)])
    return math.sqrt((1.0 - signal2) / signal2)


def _d_run(
    problem: Problem,
    nfe: int,
    *,
    name: str,
    options: dict[str, Any],
    frame: str,
    output: str,
    steps: Callable[[int], int],
    lay: str = "",
) -> Tensor:
    from diffusers import schedulers as diffusers
    from diffusers.utils import logging

    logging.set_verbosity_error()
    given = dict(options)
    accepted = inspect.signature(getattr(diffusers, name).__init__).parameters
    if frame != "flow" and "trained_betas" in accepted and name != "IPNDMScheduler":
        given["trained_betas"] = betas(problem.process_name)
    if name.startswith("EDM"):
        given |= {"sigma_min": problem.nsr_min, "sigma_max": problem.nsr_top}
    prediction = {"sample": "sample", "flow": "flow_prediction"}.get(output)
    if prediction and "prediction_type" in accepted:
        given["prediction_type"] = prediction
    with warnings.catch_warnings(), _precision(problem):
        warnings.simplefilter("ignore")
        scheduler = getattr(diffusers, name)(**given)
        n = steps(nfe)
        scheduler.set_timesteps(n)
        if lay:
            _give(scheduler, problem, lay, n)
        elif problem.start.dtype == torch.float64 and hasattr(scheduler, "sigmas"):
            scheduler.sigmas = (
                scheduler.sigmas.double()
            )  # the same values; it solves in mixed types otherwise
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)

        first = _level_of(scheduler, scheduler.timesteps[0], frame)
        if frame == "ratio":
            x = problem.ratio_start
        elif math.isinf(first):
            x = problem.start / problem.process.prior_std
        else:
            x = problem.ratio_start / (
                1.0 + problem.nsr_top if frame == "flow" else math.hypot(1.0, problem.nsr_top)
            )
        generator = torch.Generator().manual_seed(11)
        takes = inspect.signature(scheduler.step).parameters
        extra = {"generator": generator} if "generator" in takes else {}
        if "eta" in takes and "eta" in given.get("_step", {}):
            extra["eta"] = given["_step"]["eta"]
        for t in scheduler.timesteps:
            nsr = _level_of(scheduler, t, frame)
            scale = {"ratio": 1.0, "vp": math.hypot(1.0, nsr), "flow": 1.0 + nsr}[frame]
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            if math.isinf(nsr):
                x0 = problem.denoise_at(x * problem.process.prior_std, problem.process.t_max)
                eps = x
            else:
                y = x * scale
                x0 = problem.denoise(y, nsr)
                eps = (y - x0) / nsr
            if output == "sample":
                out = x0
            elif output == "epsilon":
                out = eps
            elif output == "flow":
                out = eps - x0
            elif output == "v":
                out = eps if math.isinf(nsr) else (eps - nsr * x0) / math.hypot(1.0, nsr)
                out = -x0 if math.isinf(nsr) else out
            else:  # EDM's network
                c = 0.5
                skip, gain = c**2 / (nsr**2 + c**2), nsr * c / math.hypot(nsr, c)
                out = (x0 - skip * y) / gain
            x = scheduler.step(out, t, x, return_dict=False, **extra)[0]
        last = getattr(scheduler, "sigmas", None)
        if last is not None and float(last[-1]) > 0 and name != "DDIMScheduler":
            if float(last[-1]) == float(
                last[-2]
            ):  # its last step goes nowhere: take its last prediction
                return x0
            nsr = float(last[-1])
            if frame == "flow":
                nsr = nsr / (1.0 - nsr)
            x = problem.denoise(
                x * {"ratio": 1.0, "vp": math.hypot(1.0, nsr), "flow": 1.0 + nsr}[frame], nsr
            )
        return x


_TO_SMALLEST = ("DEISMultistepScheduler", "SASolverScheduler")
"""Schedulers that end at the smallest noise of their table; on karras grids and the like, where
their last step is of no length.
"""


def _give(scheduler: Any, problem: Problem, lay: str, n: int) -> None:
    """Put noise levels of our choice, in double precision, in place of the scheduler's table."""
    kind = type(scheduler).__name__
    if kind in _TO_SMALLEST or scheduler.config.get("final_sigmas_type") == "sigma_min":
        scheduler.sigmas = problem.ratios(GRIDS[lay], n + 1)
        return
    nsr = problem.ratios(GRIDS[lay], n)
    if kind == "IPNDMScheduler":
        angle = torch.cat([torch.atan(nsr), torch.zeros(1, dtype=torch.float64)])
        scheduler.betas, scheduler.alphas = torch.sin(angle), torch.cos(angle)
        return
    sigmas = torch.cat([nsr, nsr.new_zeros(1)])
    if kind == "HeunDiscreteScheduler":
        sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    scheduler.sigmas = sigmas


def _same(nfe: int) -> int:
    return nfe


def _less(nfe: int) -> int:
    return nfe - 1


def _prk(nfe: int) -> int:
    if nfe < 13:
        raise CannotSpend
    return nfe - 9


def _diffusers(process: str) -> list[Method]:
    native: list[tuple[str, dict[str, Any]]] = [
        ("linspace", {"timestep_spacing": "linspace"}),
        ("leading", {"timestep_spacing": "leading"}),
        ("trailing", {"timestep_spacing": "trailing"}),
        ("karras sigmas", {"use_karras_sigmas": True}),
        ("exponential sigmas", {"use_exponential_sigmas": True}),
        ("beta sigmas", {"use_beta_sigmas": True}),
    ]
    lu = ("lu lambdas", {"use_lu_lambdas": True})
    flow = ("flow sigmas", {"use_flow_sigmas": True})
    given = [*GRIDS]
    out: list[Method] = []

    def add(
        scheduler: str, label: str, options: dict[str, Any], grids: list[tuple[str, dict[str, Any]]], *, frame: str,
        output: str = "sample", steps: Callable[[int], int] = _same, lays: list[str] | None = None, default: str = "",
        stochastic: bool = False,
    ) -> None:  # fmt: skip
        title = scheduler.removesuffix("Scheduler") + (f" {label}" if label else "")
        for name, extra in grids:
            settings = {
                "name": scheduler,
                "options": {**options, **extra},
                "frame": frame,
                "output": output,
            }
            if extra.get("use_flow_sigmas"):
                settings |= {"frame": "flow", "output": "flow"}
            run = partial(_d_run, **settings, steps=steps)
            out.append(Method("diffusers", title, name, run, name == default, stochastic))
        for lay in lays or []:
            settings = {"name": scheduler, "options": options, "frame": frame, "output": output}
            run = partial(_d_run, **settings, steps=steps, lay=lay)
            out.append(Method("diffusers", title, f"sigmas={lay}", run, False, stochastic))

    flows = [flow] if process == "rectified_flow" else []
    chosen = "flow sigmas" if flows else "linspace"
    for order in (1, 2, 3):
        for kind in ("midpoint", "heun") if order > 1 else ("midpoint",):
            label = f"{order} {kind}"
            grids = [*native, lu, *flows] if kind == "midpoint" else [native[0], native[3], *flows]
            options = {"solver_order": order, "solver_type": kind}
            is_default = chosen if (order, kind) == (2, "midpoint") else ""
            add(
                "DPMSolverMultistepScheduler",
                label,
                options,
                grids,
                frame="vp",
                lays=given,
                default=is_default,
            )
        if order > 1:
            options = {
                "solver_order": order,
                "lower_order_final": False,
                "final_sigmas_type": "sigma_min",
            }
            add(
                "DPMSolverMultistepScheduler",
                f"{order} full order",
                options,
                [],
                frame="vp",
                steps=_less,
                lays=given,
            )
            options = {
                "solver_order": order,
                "algorithm_type": "dpmsolver",
                "final_sigmas_type": "sigma_min",
            }
            add(
                "DPMSolverMultistepScheduler",
                f"{order} dpmsolver",
                options,
                [],
                frame="vp",
                steps=_less,
                lays=given,
            )
        for kind in ("bh1", "bh2"):
            for x0 in (True, False):
                label = f"{order} {kind}" + ("" if x0 else " noise")
                options = {"solver_order": order, "solver_type": kind, "predict_x0": x0}
                to_zero = (
                    kind == "bh2" and x0
                )  # the others give NaN in their last step to zero noise
                if to_zero:
                    is_default = chosen if order == 2 else ""
                    grids = [*native, *flows]
                    add(
                        "UniPCMultistepScheduler",
                        label,
                        options,
                        grids,
                        frame="vp",
                        lays=given,
                        default=is_default,
                    )
                else:
                    options["final_sigmas_type"] = "sigma_min"
                    add(
                        "UniPCMultistepScheduler",
                        label,
                        options,
                        native[:1],
                        frame="vp",
                        steps=_less,
                        lays=given,
                    )
                if order > 1 and x0:
                    options = {
                        **options,
                        "lower_order_final": False,
                        "final_sigmas_type": "sigma_min",
                    }
                    label += " full order"
                    add(
                        "UniPCMultistepScheduler",
                        label,
                        options,
                        [],
                        frame="vp",
                        steps=_less,
                        lays=given,
                    )
        is_default, options = chosen if order == 2 else "", {"solver_order": order}
        deis = {"frame": "vp", "default": is_default}
        add(
            "DEISMultistepScheduler",
            f"{order}",
            options,
            native[:3],
            steps=_less,
            lays=given,
            **deis,
        )  # type: ignore[arg-type]
        add("DEISMultistepScheduler", f"{order}", options, [*native[3:], *flows], **deis)  # type: ignore[arg-type]
        add(
            "DPMSolverSinglestepScheduler", f"{order}", {"solver_order": order}, [("linspace", {}), *native[3:]],
            frame="vp", lays=given, default="linspace" if order == 2 and not flows else "",
        )  # fmt: skip
        options = {"solver_order": order}
        for schedule in ("karras", "exponential"):
            add(
                "EDMDPMSolverMultistepScheduler", f"{order}", {**options, "sigma_schedule": schedule}, [(schedule, {})],
                frame="ratio", output="edm", default="karras" if order == 2 and schedule == "karras" else "",
            )  # fmt: skip
    spacings = native[:3]
    add(
        "DDIMScheduler",
        "",
        {"clip_sample": False},
        spacings,
        frame="vp",
        default="" if flows else "leading",
    )
    add(
        "PNDMScheduler",
        "",
        {},
        spacings,
        frame="vp",
        output="epsilon",
        steps=_prk,
        default="" if flows else "leading",
    )
    options = {"skip_prk_steps": True}
    add("PNDMScheduler", "plms", options, spacings, frame="vp", output="epsilon", steps=_less)
    add(
        "EulerDiscreteScheduler",
        "",
        {},
        native,
        frame="ratio",
        lays=given,
        default="" if flows else "linspace",
    )
    add(
        "HeunDiscreteScheduler", "", {}, native, frame="ratio", steps=_halves, lays=given,
        default="" if flows else "linspace",
    )  # fmt: skip
    lms = {"output": "sample", "frame": "ratio"}
    add(
        "LMSDiscreteScheduler",
        "",
        {},
        native,
        lays=given,
        default="" if flows else "linspace",
        **lms,
    )  # type: ignore[arg-type]
    add(
        "KDPM2DiscreteScheduler", "", {}, native, frame="ratio", output="epsilon", steps=_halves,
        default="" if flows else "linspace",
    )  # fmt: skip
    add(
        "IPNDMScheduler",
        "",
        {},
        [("its own", {})],
        frame="vp",
        output="v",
        lays=given,
        default="its own",
    )
    add(
        "EDMEulerScheduler", "", {}, [("karras", {})], frame="ratio", output="edm", default="karras"
    )
    if flows:
        euler = [("uniform", {}), ("shift=3", {"shift": 3.0})]
        add(
            "FlowMatchEulerDiscreteScheduler",
            "",
            {},
            euler,
            frame="flow",
            output="flow",
            default="uniform",
        )
        add(
            "FlowMatchHeunDiscreteScheduler", "", {}, euler, frame="flow", output="flow", steps=_halves,
            default="uniform",
        )  # fmt: skip

    # Stochastic ones.
    for order in (1, 2):
        options = {"solver_order": order, "algorithm_type": "sde-dpmsolver++"}
        add(
            "DPMSolverMultistepScheduler", f"{order} sde", options, [native[0], native[3]], frame="vp", lays=given,
            stochastic=True,
        )  # fmt: skip
    add(
        "DDPMScheduler",
        "",
        {"clip_sample": False},
        spacings,
        frame="vp",
        default="leading",
        stochastic=True,
    )
    add(
        "EulerAncestralDiscreteScheduler", "", {}, spacings, frame="ratio", output="epsilon", lays=given,
        default="linspace", stochastic=True,
    )  # fmt: skip
    add(
        "SASolverScheduler", "", {}, native[:1], frame="vp", steps=_less, lays=given, default="linspace", stochastic=True
    )  # fmt: skip
    add("SASolverScheduler", "", {}, [native[3]], frame="vp", stochastic=True)
    add("EDMDPMSolverMultistepScheduler", "2 sde", {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"},
        [("karras", {})], frame="ratio", output="edm", stochastic=True)  # fmt: skip
    ddim = {"clip_sample": False, "_step": {"eta": 1.0}}
    add("DDIMScheduler", "eta=1", ddim, spacings, frame="vp", stochastic=True)
    return out


# -------------------------------------------------------------------------------------------- azula

_AZULA_SCHEDULES = {
    "vp": "VPSchedule",
    "cosine": "CosineSchedule",
    "rectified": "RectifiedSchedule",
    "decay": "DecaySchedule",
}


def _azula_run(
    problem: Problem, nfe: int, *, sampler: str, schedule: str, calls: int, options: dict[str, Any]
) -> Tensor:
    """To the smallest noise in steps even in the schedule's time (its default), then one call to
    zero noise.
    """
    import azula.noise
    import azula.sample

    steps, rest = divmod(nfe - 1, calls)
    if rest or not steps:
        raise CannotSpend
    dtype = problem.start.dtype
    ours = schedule in GRIDS
    with _precision(problem):
        if ours:
            process = problem.process
            times = problem.times(GRIDS[schedule], steps + 1)

            def kernel(t: Tensor) -> tuple[Tensor, Tensor]:
                level = process.kernel(t.double())
                return level[0].to(dtype), level[1].to(dtype)

        else:
            kernel = getattr(azula.noise, _AZULA_SCHEDULES[schedule])()

            def time_of(nsr: float) -> float:
                low, high = 0.0, 1.0
                for _ in range(80):
                    middle = 0.5 * (low + high)
                    signal, noise = kernel(torch.tensor(middle, dtype=torch.float64))
                    low, high = (middle, high) if float(noise / signal) < nsr else (low, middle)
                return 0.5 * (low + high)

            ends = time_of(problem.nsr_top), time_of(problem.nsr_min)
            times = torch.linspace(*ends, steps + 1, dtype=torch.float64)

        class Exact:
            def __call__(self, x: Tensor, t: Tensor) -> Any:
                signal, noise = kernel(t)
                return types.SimpleNamespace(mean=problem.denoise(x / signal, noise / signal))

            schedule = staticmethod(kernel)

        kind = getattr(azula.sample, sampler)
        kind = type(
            sampler,
            (kind,),
            {"timesteps": property(lambda self: times if ours else times.to(dtype))},
        )
        signal, _ = kernel(times[0].to(torch.float64))
        x = kind(Exact(), silent=True, **options)((problem.ratio_start * signal).to(dtype))
        signal, noise = kernel(times[-1].to(torch.float64))
        return problem.denoise(x / signal, noise / signal)


def _azula(process: str) -> list[Method]:
    out = []
    for schedule in [*_AZULA_SCHEDULES, *GRIDS]:
        settings: list[tuple[str, int, dict[str, Any], bool]] = [
            ("EulerSampler", 1, {}, False),
            ("DDIMSampler", 1, {}, False),
            ("HeunSampler", 2, {}, False),
            ("DDPMSampler", 1, {}, True),
            ("ItoSampler", 1, {}, True),
            ("DDIMSampler", 1, {"eta": 1.0}, True),
        ]
        for sampler in ("zABSampler", "vABSampler", "zEABSampler", "xEABSampler", "REABSampler"):
            settings += [(sampler, 1, {"order": p}, False) for p in (2, 3, 4)]
        for sampler, calls, options, stochastic in settings:
            name = sampler.removesuffix("Sampler") + "".join(
                f" {k}={v:g}" for k, v in options.items()
            )
            run = partial(
                _azula_run, sampler=sampler, schedule=schedule, calls=calls, options=options
            )
            default = schedule == "vp" and (name == "DDIM" or sampler == "DDPMSampler")
            title = f"its own {schedule}" if schedule in _AZULA_SCHEDULES else schedule
            out.append(Method("azula", name, title, run, default, stochastic))
    return out


# ------------------------------------------------------------------ torchdiffeq, and what it serves

_DIFFEQ = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4, "explicit_adams": 1}


def _diffeq_steps(method: str, calls: int) -> int:
    """Steps of a fixed-step method that make so many calls."""
    if method == "explicit_adams":  # two steps of RK4 to begin with
        steps = calls // 4 if calls <= 8 and calls % 4 == 0 else calls - 6
        if calls < 4 or (calls < 8 and calls % 4) or steps < 1:
            raise CannotSpend
        return steps
    steps, rest = divmod(calls, _DIFFEQ[method])
    if rest or not steps:
        raise CannotSpend
    return steps


def _torchdiffeq_run(problem: Problem, nfe: int, *, method: str, lay: str) -> Tensor:
    """The probability-flow ODE in the process's own time, to `t_min`; then one call to zero
    noise.
    """
    from torchdiffeq import odeint

    times = GRIDS[lay](problem.process, _diffeq_steps(method, nfe - 1) + 1)
    x = odeint(lambda t, x: problem.velocity(x, t), problem.start, times, method=method)[-1]
    return problem.denoise_at(x, float(times[-1]))


def _torchdiffeq(process: str) -> list[Method]:
    return [
        Method(
            "torchdiffeq", method, lay, partial(_torchdiffeq_run, method=method, lay=lay),
            (method, lay) == ("rk4", "uniform_t"),
        )
        for method in _DIFFEQ
        for lay in GRIDS
    ]  # fmt: skip


def _flow_run(problem: Problem, nfe: int, *, method: str, lay: str) -> Tensor:
    """Its time runs from noise at 0 to data at 1. By default to the very end; on grids of ours to
    `t_min`, and a call.
    """
    from flow_matching.solver import ODESolver

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return -problem.velocity(x, 1.0 - float(t))

    solver = ODESolver(velocity_model=velocity)
    x = problem.start
    if lay == "step_size":
        steps = _diffeq_steps(method, nfe)
        grid_ = torch.tensor([0.0, 1.0], dtype=torch.float64)
        # A hair above the exact size, lest rounding add a step.
        return solver.sample(
            x_init=x, step_size=(1.0 + 1e-12) / steps, method=method, time_grid=grid_
        )
    times = GRIDS[lay](problem.process, _diffeq_steps(method, nfe - 1) + 1)
    x = solver.sample(x_init=x, step_size=None, method=method, time_grid=1.0 - times)
    return problem.denoise_at(x, float(times[-1]))


def _flow_matching(process: str) -> list[Method]:
    if process != "rectified_flow":
        return []
    # Methods with a stage at the very end would ask for a velocity where there is no noise left.
    out = [
        Method(
            "flow-matching",
            method,
            "step_size",
            partial(_flow_run, method=method, lay="step_size"),
            True,
        )
        for method in ("euler", "midpoint")
    ]
    for method in _DIFFEQ:
        for lay in GRIDS:
            out.append(
                Method("flow-matching", method, lay, partial(_flow_run, method=method, lay=lay))
            )
    return out
