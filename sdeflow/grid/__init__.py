r"""Time grids: the levels of a solver.

Float64 on the CPU, decreasing, `n` levels from `t_max` to `t_min`.

Every grid is a function `grid(process, n, *, t_min=None, t_max=None, ...)`. `grid=` takes any
function of that form, and any strictly monotone vector of times, and uses it exactly. The step from
the last level to zero noise is the solver's `finish`; no grid holds zero.

A grid in the noise-to-signal ratio needs a finite top. Where `nsr(t_max)` is infinite, or beyond
`NSR_TOP`, the grid is made from `NSR_TOP` down and `t_max` itself is put in front.
"""

from functools import partial

from sdeflow._utils.moved import renamed
from sdeflow.grid.base import NSR_TOP, GridFunction
from sdeflow.grid.continuous import (
    cosine_t,
    dense_lam,
    flow_shift,
    karras,
    polyexponential,
    power_t,
    two_powers,
    uniform_angle,
    uniform_cosine,
    uniform_lam,
    uniform_sqrt_t,
    uniform_t,
    uniform_vp,
)
from sdeflow.grid.discrete import (
    beta_quantiles,
    ddim_uniform,
    leading,
    linear_quadratic,
    linspace,
    quadratic,
    sgm_uniform,
    simple,
    trailing,
)
from sdeflow.grid.tables import ALIGN_YOUR_STEPS, Table, align_your_steps, table
from sdeflow.grid.wrappers import (
    Shifted,
    WithoutLast,
    shift_of_pixels,
    shift_of_tokens,
    shifted,
    without_last,
)

ON_A_TABLE = (quadratic, leading, trailing, linspace, ddim_uniform)
"""The grids that consist of entries of a table of betas, and need one."""

__all__ = [
    "ALIGN_YOUR_STEPS",
    "NSR_TOP",
    "ON_A_TABLE",
    "GridFunction",
    "Shifted",
    "Table",
    "WithoutLast",
    "align_your_steps",
    "beta_quantiles",
    "cosine_t",
    "ddim_uniform",
    "dense_lam",
    "flow_shift",
    "karras",
    "leading",
    "linear_quadratic",
    "linspace",
    "polyexponential",
    "power_t",
    "quadratic",
    "sgm_uniform",
    "shift_of_pixels",
    "shift_of_tokens",
    "shifted",
    "simple",
    "table",
    "trailing",
    "two_powers",
    "uniform_angle",
    "uniform_cosine",
    "uniform_lam",
    "uniform_sqrt_t",
    "uniform_t",
    "uniform_vp",
    "without_last",
]

__getattr__ = partial(renamed, "grid")
