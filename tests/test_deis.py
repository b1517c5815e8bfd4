"""DEIS, LMS, PNDM and iPNDM: against weights integrated independently, against each other, and
where their orders end.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from numpy.polynomial import Polynomial
from problems import PROCESSES, Mixture, observed_order, reference, warped
from scipy.integrate import quad
from torch import Tensor

from sdeflow import grid
from sdeflow.errors import BudgetError
from sdeflow.plan.instructions import Combine
from sdeflow.process import EDM, VP, Process, RectifiedFlow
from sdeflow.reverse import Reverse
from sdeflow.sampling.api import solve
from sdeflow.solvers.base import GridSolver
from sdeflow.solvers.ode.adams import ExponentialAdams
from sdeflow.solvers.ode.deis import DEIS, LMS, DEISRungeKutta, EpsMultistep
from sdeflow.solvers.ode.pndm import ADAMS_BASHFORTH, IPNDM, PNDM, IPNDMv, published_weights
from sdeflow.solvers.ode.runge_kutta import RK4, Heun
from sdeflow.solvers.ode.weights import _times

CLOCK = {"t": "t", "nsr": "nsr", "lam": "lam"}
MULTISTEP: list[EpsMultistep] = [
    *(DEIS(p, variable) for p in (2, 3, 4) for variable in ("t", "nsr", "lam")),  # type: ignore[arg-type]
    *(kind(p) for kind in (LMS, IPNDM, IPNDMv, PNDM) for p in (2, 3, 4)),
    *(PNDM(p, "heun") for p in (2, 4)),
]


def run(
    solver: GridSolver, process: Process, times: Tensor, x: Tensor, *, finish: bool = False
) -> Tensor:
    with torch.no_grad():
        return solver.integrate(Reverse(Mixture(process)), x, times, None, finish=finish).x


def error(solver: GridSolver, process: Process, times: Tensor) -> float:
    x, exact = reference(process, float(times[0]), float(times[-1]))
    return float((run(solver, process, times, x) - exact).norm() / exact.norm())


def in_nsr(process: Process, nsr: Sequence[float] | np.ndarray) -> Tensor:
    return process.t_of_nsr(torch.as_tensor(np.asarray(nsr), dtype=torch.float64))


def between(process: Process, n: int, high: float = 1.5, low: float = 0.1) -> Tensor:
    """`n` steps, equal in lam, over the middle of the path, where it bends."""
    return process.t_of_lam(
        torch.linspace(-math.log(high), -math.log(low), n + 1, dtype=torch.float64)
    )


# -------------------------------------------------------------------------------------- the weights


@pytest.mark.parametrize("p", [2, 3, 4])
def test_lms_integrates_its_polynomial(p: int) -> None:
    """The weights by polynomial algebra in nsr, as k-diffusion's quadrature has them."""
    process = PROCESSES["vp"]
    nsr = [8.0, 3.0, 2.2, 0.7, 0.3][-p - 1 :]
    *nodes, t_next = process.levels(in_nsr(process, nsr))
    b = LMS(p).weights(nodes[::-1], nodes[-1], t_next, process)
    for weight, at in zip(b, nodes[::-1], strict=True):
        basis = Polynomial([1.0])
        for other in nodes:
            if other is not at:
                basis *= Polynomial([-other.nsr, 1.0]) / (at.nsr - other.nsr)
        whole = basis.integ()
        assert weight == pytest.approx(
            t_next.s * (whole(t_next.nsr) - whole(nodes[-1].nsr)), rel=1e-9
        )


@pytest.mark.parametrize("p", [2, 3, 4])
def test_tab_integrates_the_papers_kernel(p: int) -> None:
    r"""On VP: $b_j = s_+ \int \beta(\tau) / (2 s \sigma)\,\ell_j(\tau)\,d\tau$ over the step, by
    adaptive quadrature.
    """
    process = VP()
    *nodes, t_next = process.levels(
        torch.tensor([0.9, 0.75, 0.65, 0.4, 0.25], dtype=torch.float64)[-p - 1 :]
    )
    nodes = nodes[::-1]

    def kernel(tau: float, j: int) -> float:
        log_s = -0.25 * 19.9 * tau**2 - 0.05 * tau
        basis = math.prod((tau - n.t) / (nodes[j].t - n.t) for i, n in enumerate(nodes) if i != j)
        return (
            (0.1 + 19.9 * tau) / (2 * math.exp(log_s) * math.sqrt(-math.expm1(2 * log_s))) * basis
        )

    for j, weight in enumerate(DEIS(p, "t").weights(nodes, nodes[0], t_next, process)):
        integral = quad(kernel, nodes[0].t, t_next.t, args=(j,), epsabs=1e-13, epsrel=1e-12)[0]
        assert weight == pytest.approx(t_next.s * integral, rel=1e-9)


@pytest.mark.parametrize("under", ["from_betas", "from_sde"])
def test_times_within_a_step_are_those_that_a_search_over_all_of_time_finds(under: str) -> None:
    """Where a process has no closed form, over short steps and over one from nsr 20 to 0.05, to
    data and to noise.
    """
    process = PROCESSES[under]
    u = torch.linspace(0.01, 0.99, 16, dtype=torch.float64)
    for n in (1, 3, 30):
        levels = process.levels(between(process, n, 20.0, 0.05))
        for a, b in itertools.pairwise(levels):
            for t, t_next in ((a, b), (b, a)):
                lam = t.lam + u * (t_next.lam - t.lam)
                torch.testing.assert_close(
                    _times(process, lam, t, t_next), process.t_of_lam(lam), rtol=1e-14, atol=0
                )


def test_logrho_is_the_form_of_diffusers() -> None:
    r"""With two nodes:
    $\int \log(\rho/c)/\log(b/c)\,d\rho = \rho\,(\log(\rho/c) - 1)/\log(b/c)$.
    """
    process = PROCESSES["vp"]
    c, b, end = process.levels(in_nsr(process, [2.0, 1.1, 0.4]))

    def primitive(rho: float, b: float, c: float) -> float:
        return rho * (math.log(rho / c) - 1.0) / math.log(b / c)

    expected = [
        primitive(end.nsr, *pair) - primitive(b.nsr, *pair)
        for pair in ((b.nsr, c.nsr), (c.nsr, b.nsr))
    ]
    assert DEIS(2, "lam").weights([b, c], b, end, process) == pytest.approx(
        [end.s * w for w in expected], rel=1e-12
    )


@pytest.mark.parametrize(
    "solver", [s for s in MULTISTEP if not (isinstance(s, IPNDMv) and s.p == 4)], ids=str
)
def test_weights_sum_to_the_whole_step(solver: EpsMultistep) -> None:
    process = PROCESSES["cosine"]
    *nodes, t_next = process.levels(in_nsr(process, [8.0, 3.0, 2.2, 0.7, 0.3][-solver.p - 1 :]))
    total = sum(solver.weights(nodes[::-1], nodes[-1], t_next, process))
    assert total == pytest.approx(t_next.s * (t_next.nsr - nodes[-1].nsr), rel=1e-13)


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_constant_weights_are_those_of_equal_steps(p: int) -> None:
    for j, weight in enumerate(ADAMS_BASHFORTH[p - 1]):
        basis = [
            Fraction(1)
        ]  # of the polynomial that is 1 at -j and 0 at the other nodes, lowest power first
        for i in set(range(p)) - {j}:
            shifted = [Fraction(0), *basis]
            basis = [
                (a + i * b) / (i - j) for a, b in zip(shifted, [*basis, Fraction(0)], strict=True)
            ]
        assert weight == float(sum(c / (k + 1) for k, c in enumerate(basis)))


def test_published_weights_of_ipndm_v() -> None:
    """Those of diff-sampler: up to three nodes right for equal steps, off elsewhere, and for four
    nodes not even a mean.
    """
    assert published_weights([-0.5] * 4) == pytest.approx(
        [57 / 24, -65 / 24, 43 / 24, -11 / 24], rel=1e-14
    )
    for p in (1, 2, 3):
        assert published_weights([-0.5] * p) == pytest.approx(ADAMS_BASHFORTH[p - 1], rel=1e-14)
    assert published_weights([-1.2, -1.3, -1.5]) == pytest.approx([1.896, -1.272, 0.376], abs=5e-4)
    process = EDM()
    *nodes, t_next = process.levels(torch.tensor([5.0, 3.5, 2.2, 1.0], dtype=torch.float64))
    exact = [
        b / -1.2
        for b in IPNDMv(3, exact_weights=True).weights(nodes[::-1], nodes[-1], t_next, process)
    ]
    assert exact == pytest.approx([1.808, -1.108, 0.300], abs=5e-4)
    assert sum(published_weights([-1.2, -1.3, -1.5])) == pytest.approx(1.0, rel=1e-14)
    assert sum(published_weights([-1.0, -2.0, -4.0, -8.0])) == pytest.approx(
        1.0, rel=1e-14
    )  # one ratio throughout
    assert abs(sum(published_weights([-1.0, -2.0, -1.0, -2.0])) - 1.0) > 0.05


# ----------------------------------------------------------------------------------- one in another


@pytest.mark.parametrize("under", ["vp", "rectified_flow", "edm"])
@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize("variable", ["t", "nsr", "lam"])
def test_deis_is_exponential_adams_in_eps(variable: Any, p: int, under: str) -> None:
    """From the end of time, where rectified flow has no signal; and to zero noise."""
    process = PROCESSES[under]
    times = grid.uniform_sqrt_t(process, 8) if under != "edm" else grid.karras(process, 8)
    x = (
        torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        * process.level(times[0]).sigma
    )
    member = ExponentialAdams(p, "eps", CLOCK[variable], start_up="orders")  # type: ignore[arg-type]
    expected = run(member, process, times, x, finish=True)
    torch.testing.assert_close(
        run(DEIS(p, variable), process, times, x, finish=True), expected, rtol=1e-12, atol=1e-12
    )
    if variable == "nsr":
        for same in (LMS(p), IPNDMv(p, exact_weights=True)):
            torch.testing.assert_close(
                run(same, process, times, x, finish=True), expected, rtol=1e-12, atol=1e-12
            )


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_ipndm_is_adams_bashforth_where_steps_are_equal_in_nsr(p: int) -> None:
    process = PROCESSES["vp"]
    times = in_nsr(process, np.linspace(4.0, 0.2, 12))
    x, _ = reference(process, float(times[0]), float(times[-1]))
    expected = run(LMS(p), process, times, x)
    torch.testing.assert_close(run(IPNDM(p), process, times, x), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        run(IPNDMv(p, p == 4), process, times, x), expected, rtol=1e-11, atol=1e-11
    )
    uneven = warped(process, 11, 4.0, 0.2)
    apart = (run(IPNDM(p), process, uneven, x) - run(LMS(p), process, uneven, x)).abs().max()
    assert (float(apart) > 1e-3) == (p > 1)


def test_pseudo_runge_kutta_steps_are_runge_kutta_where_t_is_nsr() -> None:
    process = EDM()
    times = torch.linspace(4.0, 1.0, 4, dtype=torch.float64)
    x, _ = reference(process, 4.0, 1.0)
    torch.testing.assert_close(
        run(PNDM(), process, times, x), run(RK4("nsr"), process, times, x), rtol=1e-13, atol=1e-13
    )
    pair = times[:2]
    torch.testing.assert_close(
        run(PNDM(4, "heun"), process, pair, x),
        run(Heun("nsr"), process, pair, x),
        rtol=1e-13,
        atol=1e-13,
    )
    # Elsewhere the middle of a step is another level.
    vp = PROCESSES["vp"]
    times = vp.t_of_nsr(times)
    assert float((run(PNDM(), vp, times, x) - run(RK4("nsr"), vp, times, x)).abs().max()) > 1e-3


def test_rho_heun_is_edms_sampler() -> None:
    times = grid.karras(EDM(), 10)
    x = 80.0 * torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(
        run(DEISRungeKutta("heun"), EDM(), times, x), run(Heun("nsr"), EDM(), times, x)
    )


# --------------------------------------------------------------------------------------- the orders


@pytest.mark.parametrize(
    ("solver", "under"),
    [
        *((solver, "vp") for solver in MULTISTEP),
        *((solver, "rectified_flow") for solver in MULTISTEP if solver.p == 3),
    ],
    ids=str,
)
def test_the_start_bounds_the_order(solver: EpsMultistep, under: str) -> None:
    process = PROCESSES[under]
    assert solver.order == 2
    order = observed_order(lambda n: error(solver, process, between(process, n)), (160, 320))
    assert abs(order - 2.0) < 0.15, order


def test_pndm_reaches_its_order_where_steps_are_equal() -> None:
    """On EDM, where t is nsr, with equal steps: Runge-Kutta's start and then Adams-Bashforth, both
    of order 4.
    """
    process = EDM()
    for p in (2, 3, 4):
        order = observed_order(
            lambda n, p=p: error(
                PNDM(p), process, torch.linspace(1.5, 0.3, n + 1, dtype=torch.float64)
            ),
            (80, 160),
        )
        assert abs(order - p) < 0.2, (p, order)


def test_constant_weights_are_of_order_one_where_steps_jump() -> None:
    """Every other step twice as long; and there the published iPNDM_v of four does not converge."""
    process = PROCESSES["vp"]

    def jumping(n: int) -> Tensor:
        steps = np.where(np.arange(n) % 2 == 0, 2.0, 1.0)
        lam = np.concatenate([[0.0], np.cumsum(steps)]) / steps.sum() * math.log(15.0) - math.log(
            1.5
        )
        return process.t_of_lam(torch.from_numpy(lam))

    def shown(solver: GridSolver) -> float:
        return observed_order(lambda n: error(solver, process, jumping(n)), (80, 160))

    assert abs(shown(IPNDM(2)) - 1.0) < 0.2
    assert abs(shown(IPNDM(4)) - 1.0) < 0.2
    assert abs(shown(LMS(2)) - 2.0) < 0.2
    assert abs(shown(IPNDMv(3)) - 2.0) < 0.3
    assert shown(IPNDMv(4)) < 0.3
    assert abs(shown(IPNDMv(4, exact_weights=True)) - 2.0) < 0.3


# ----------------------------------------------------------------------------------------- the ends


@functools.cache
def fine(process: Process) -> tuple[Tensor, Tensor]:
    """States where no signal is left, and where the ODE takes them."""
    x = torch.randn(32, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, run(RK4("t"), process, grid.uniform_t(process, 401), x, finish=True)


@pytest.mark.parametrize(
    "solver",
    [*MULTISTEP, *(DEISRungeKutta(m) for m in ("midpoint", "heun", "kutta3", "rk4"))],
    ids=str,  # type: ignore[arg-type]
)
def test_from_where_no_signal_is_left(solver: GridSolver) -> None:
    """Rectified flow from t = 1: nsr is infinite, and more steps end nearer."""
    process = RectifiedFlow()
    x, exact = fine(process)
    gaps = [
        float(
            (run(solver, process, grid.uniform_t(process, n + 1), x, finish=True) - exact)
            .norm(dim=1)
            .median()
        )
        for n in (10, 20, 40, 80)
    ]
    if solver != IPNDMv(4):  # nsr falls by a changing factor there: see above
        assert all(a > 1.5 * b for a, b in itertools.pairwise(gaps)), gaps
    assert gaps[-1] < 0.01
    back = run(solver, process, grid.uniform_t(process, 41).flip(0), 0.3 * x)
    assert bool(torch.isfinite(back).all())


# ----------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize(
    ("solver", "costs"),
    [
        (PNDM(), [1, 5, 9, 13, 14, 15]),
        (PNDM(2), [1, 5, 6, 7]),
        (PNDM(4, "heun"), [1, 3, 4, 5, 6]),
        (PNDM(2, "heun"), [1, 3, 4]),
        (IPNDM(), [1, 2, 3, 4, 5, 6]),
        (DEISRungeKutta("kutta3"), [1, 4, 7]),
    ],
    ids=str,
)
def test_budgets(solver: GridSolver, costs: list[int]) -> None:
    assert [solver.calls(levels) for levels in range(1, len(costs) + 1)] == costs
    for nfe in costs:
        assert solve(Mixture(RectifiedFlow()), solver=solver, nfe=nfe, n=2, seeds=0).nfe == nfe
    missing = set(range(1, costs[-1])) - set(costs)
    if missing:
        with pytest.raises(BudgetError):
            solver.levels(min(missing))


@pytest.mark.parametrize(("p", "combinations", "terms"), [(2, 1, 4), (3, 2, 6), (4, 2, 7)])
def test_plans_are_lean(p: int, combinations: int, terms: int) -> None:
    """A call costs one eps and one next state; where eps serves one later step only, they merge."""
    process = EDM()
    for solver in (LMS(p), IPNDM(p)):
        plan = solver.plan(process, grid.karras(process, 21), finish=False)
        found = [len(i.terms) for i in plan.instructions if isinstance(i, Combine)]
        assert len(found) <= combinations * 20
        assert sum(found) <= terms * 20
        assert plan.buffers <= p


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: DEIS(5), "p = 1 to 4"),
        (lambda: DEIS(0), "p = 1 to 4"),
        (lambda: DEIS(2.0), "p = 1 to 4"),  # type: ignore[arg-type]
        (lambda: DEIS(2, "rh"), "nsr"),  # type: ignore[arg-type]
        (lambda: LMS(7), "p = 1 to 6"),
        (lambda: PNDM(1), "with one it is DDIM"),
        (lambda: PNDM(4, "euler"), "heun"),  # type: ignore[arg-type]
        (lambda: DEISRungeKutta("euler"), "kutta3"),  # type: ignore[arg-type]
    ],
)
def test_what_does_not_exist_says_so(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
