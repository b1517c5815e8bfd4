"""Published implementations that do not do what their papers, or their names, say: runs that show
it, and what ours do instead.

`RUNS` has the peers' runs, stored as those of `cases.py` are; `test_deviations.py` measures them
and ours side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from published import azula, diffusers, k_diffusion
from setting import Asked, uneven
from torch import Tensor

QUADRATIC = (0.3, -0.2, 0.5)
"""A prediction that is a parabola in lam: methods that interpolate three predictions there are
exact on it.
"""
COUNTS = (40, 80, 160)
ORDER_3: dict[str, Any] = {
    "solver_order": 3,
    "lower_order_final": False,
    "final_sigmas_type": "sigma_min",
}


def short(steps: int, parts: int) -> Tensor:
    """The first levels of an uneven grid of three steps, whose lengths are divided by `parts`."""
    lam = -uneven("edm", 3).log()
    return torch.exp(-(lam[0] + (lam - lam[0]) / parts))[: steps + 1]


def _still(**settings: Any) -> Tensor:
    """A run of an SDE's sampler without its noise: what it makes of the predictions alone."""
    with mock.patch.object(Asked, "noise", return_value=torch.zeros(4, 2, dtype=torch.float64)):
        return diffusers(**settings)[1]


def _runs() -> dict[str, tuple[str, Callable[[], Tensor]]]:
    out: dict[str, tuple[str, Callable[[], Tensor]]] = {}

    def add(key: str, peer: str, run: Callable[[], Tensor]) -> None:
        out[f"deviation/{key}"] = (peer, run)

    for steps in (2, 3):
        for parts in (1, 2, 4):
            grid = short(steps, parts)
            add(
                f"3m_sde/{parts}/{steps}", "k-diffusion",
                lambda grid=grid: k_diffusion("edm", grid, "sample_dpmpp_3m_sde", finish=False, noise="none", eta=0.0,
                                              polynomial=QUADRATIC)[1],
            )  # fmt: skip
            for key, algorithm in (("3m", "dpmsolver++"), ("3m-diffusers-sde", "sde-dpmsolver++")):
                settings = {
                    **ORDER_3,
                    "algorithm_type": algorithm,
                    "finish": False,
                    "polynomial": QUADRATIC,
                }
                add(
                    f"{key}/{parts}/{steps}", "diffusers",
                    lambda grid=grid, settings=settings: _still(
                        process="sphere", times=grid, scheduler="DPMSolverMultistepScheduler", **settings),
                )  # fmt: skip
    for n in COUNTS:
        for p in (2, 3):
            add(
                f"reab{p}/{n}",
                "azula",
                lambda n=n, p=p: azula("sphere", uneven("sphere", n), "REABSampler", order=p)[1],
            )
    for grid_ in ("even", "uneven"):
        add(f"adams/{grid_}", "torchdiffeq", lambda grid_=grid_: _adams(grid_))
    for spacing, n in (("linspace", 12), ("trailing", 12), ("trailing", 48), ("leading", 12)):
        add(
            f"ddim-{spacing}/{n}",
            "diffusers",
            lambda n=n, spacing=spacing: _ddim_levels(n, spacing),
        )
    for bh in ("bh1", "bh2"):
        add(
            f"unipc-{bh}",
            "diffusers",
            lambda bh=bh: _run("UniPCMultistepScheduler", 6, {"solver_type": bh}),
        )
    add("deis3-float32", "diffusers", _deis_float32)
    add("flow-shift/8", "diffusers", lambda: _shifted(8))
    add("sa-karras/8", "diffusers", lambda: _sa_levels(8))
    return out


def _run(scheduler: str, n: int, given: dict[str, Any]) -> Tensor:
    return diffusers("sphere", None, scheduler, n=n, **given)[1]


def _ddim_levels(n: int, spacing: str) -> Tensor:
    """Where each step of DDIM leads, and where the network is asked next: the noise's share sigma,
    `[2, n - 1]`.

    With a prediction of zero a state is noise alone, and its size after a step is the sigma of the
    level that it was taken to.
    """
    from diffusers import DDIMScheduler
    from problems import LINEAR_BETAS

    made = DDIMScheduler(
        trained_betas=LINEAR_BETAS.numpy(),
        timestep_spacing=spacing,
        clip_sample=False,
        prediction_type="sample",
    )
    made.alphas_cumprod = torch.cumprod(1.0 - LINEAR_BETAS, 0)
    made.set_timesteps(n)
    sigma = (1.0 - made.alphas_cumprod[made.timesteps]).sqrt()
    reached = [
        made.step(torch.zeros(1, dtype=torch.float64), t, x.reshape(1), return_dict=False)[0]
        for t, x in zip(made.timesteps[:-1], sigma[:-1], strict=True)
    ]
    return torch.stack([torch.cat(reached), sigma[1:]])


def clock(grid: str) -> Tensor:
    """Twenty steps from 0 to 1, even or smoothly uneven."""
    u = torch.linspace(0.0, 1.0, 21, dtype=torch.float64)
    return u if grid == "even" else u + 0.3 * torch.sin(2 * math.pi * u) / (2 * math.pi)


def _adams(grid: str) -> Tensor:
    """`dx/dt = 3 t^2`, on which a method of order 3 is exact; it ends at 1."""
    from torchdiffeq import odeint

    return odeint(
        lambda t, x: 3.0 * t**2,
        torch.zeros(1, dtype=torch.float64),
        clock(grid),
        method="explicit_adams",
    )[-1]


def _deis_float32() -> Tensor:
    """The weights of a step of DEIS's third order at 50 steps of the karras grid, as it takes them
    in float32; and the levels.
    """
    from diffusers import DEISMultistepScheduler
    from problems import LINEAR_BETAS

    made = DEISMultistepScheduler(
        trained_betas=LINEAR_BETAS.numpy(),
        solver_order=3,
        prediction_type="epsilon",
        use_karras_sigmas=True,
    )
    made.set_timesteps(50)
    made.set_begin_index(0)
    made._step_index = 30
    weights = []
    for j in range(
        3
    ):  # the step is linear: its weights are what it makes of one prediction at a time
        outputs = [torch.zeros(1), torch.zeros(1), torch.zeros(1)]
        outputs[2 - j] = torch.ones(1)
        weights.append(made.multistep_deis_third_order_update(outputs, sample=torch.zeros(1)))
    return torch.cat([torch.cat(weights).double(), made.sigmas[28:32].double()])


def _shifted(n: int) -> Tensor:
    from diffusers import FlowMatchEulerDiscreteScheduler

    made = FlowMatchEulerDiscreteScheduler(shift=3.0)
    made.set_timesteps(n)
    return made.sigmas.double()


def _sa_levels(n: int) -> Tensor:
    from diffusers import SASolverScheduler
    from problems import LINEAR_BETAS

    made = SASolverScheduler(trained_betas=LINEAR_BETAS.numpy(), use_karras_sigmas=True)
    made.set_timesteps(n)
    return made.sigmas.double()


RUNS = _runs()
