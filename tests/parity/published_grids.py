"""The grids of k-diffusion and diffusers, by their own code: noise-to-signal ratios, or entries of
a table.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from peers import k_sampling
from problems import LINEAR_BETAS
from published import doubles, wide
from torch import Tensor

LOW, HIGH = 0.002, 80.0


def _k(name: str, n: int, *args: float, **more: float) -> Tensor:
    with doubles():
        return getattr(k_sampling(), f"get_sigmas_{name}")(n, *args, **more)[:-1].double()


def _made(module: str, kind: str, n: int, entries: bool = False, **options: Any) -> Tensor:
    """The sigmas of a scheduler without the last, in float64; or its entries of the table."""
    m = importlib.import_module(f"diffusers.schedulers.{module}")
    if kind not in ("EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"):
        options["trained_betas"] = LINEAR_BETAS.numpy()
    with wide(m), doubles():
        made = getattr(m, kind)(**options)
        if hasattr(made, "alphas_cumprod"):
            made.alphas_cumprod = torch.cumprod(1.0 - LINEAR_BETAS, 0)
        made.set_timesteps(n)
    return made.timesteps.double() if entries else made.sigmas[:-1].double()


def _euler(n: int, **options: Any) -> Tensor:
    return _made("scheduling_euler_discrete", "EulerDiscreteScheduler", n, **options)


def _ddim(n: int, spacing: str, **options: Any) -> Tensor:
    return _made("scheduling_ddim", "DDIMScheduler", n, True, timestep_spacing=spacing, **options)


def _ays(name: str) -> Tensor:
    from diffusers.schedulers.scheduling_utils import AysSchedules

    return torch.tensor(AysSchedules[name][:-1], dtype=torch.float64)


GRIDS: dict[str, tuple[str, Callable[[], Tensor]]] = {
    "grid/karras": ("k-diffusion", lambda: _k("karras", 9, LOW, HIGH)),
    "grid/karras-rho=3": ("k-diffusion", lambda: _k("karras", 9, LOW, HIGH, rho=3.0)),
    "grid/exponential": ("k-diffusion", lambda: _k("exponential", 9, LOW, HIGH)),
    "grid/polyexponential": ("k-diffusion", lambda: _k("polyexponential", 9, LOW, HIGH, rho=1.5)),
    "grid/vp": ("k-diffusion", lambda: _k("vp", 9)),
    "grid/leading": ("diffusers", lambda: _ddim(7, "leading")),
    "grid/leading-offset=1": ("diffusers", lambda: _ddim(7, "leading", steps_offset=1)),
    "grid/trailing": ("diffusers", lambda: _ddim(7, "trailing")),
    "grid/linspace": ("diffusers", lambda: _ddim(7, "linspace")),
    "grid/karras-of-table": ("diffusers", lambda: _euler(9, use_karras_sigmas=True)),
    "grid/exponential-of-table": ("diffusers", lambda: _euler(9, use_exponential_sigmas=True)),
    "grid/beta-of-table": ("diffusers", lambda: _euler(9, use_beta_sigmas=True)),
    "grid/edm": ("diffusers", lambda: _made("scheduling_edm_euler", "EDMEulerScheduler", 9)),
    "grid/ays-sd15": ("diffusers", lambda: _ays("StableDiffusionSigmas")),
    "grid/ays-sdxl": ("diffusers", lambda: _ays("StableDiffusionXLSigmas")),
    "grid/ays-svd": ("diffusers", lambda: _ays("StableDiffusionVideoSigmas")),
}
