"""Published packages that tests run live, where they are installed."""

from __future__ import annotations

import functools
import importlib.util
import sys
from types import ModuleType
from unittest import mock

import pytest


@functools.cache
def _k_diffusion() -> ModuleType | None:
    if "k_diffusion" in sys.modules:  # somebody imported all of it
        return importlib.import_module("k_diffusion.sampling")
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or not spec.submodule_search_locations:
        return None
    package, utils = ModuleType("k_diffusion"), ModuleType("k_diffusion.utils")
    package.__path__ = list(spec.submodule_search_locations)
    utils.append_dims = lambda x, ndim: x[(..., *[None] * (ndim - x.ndim))]  # type: ignore[attr-defined]
    package.utils = utils  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, {"k_diffusion": package, "k_diffusion.utils": utils}):
        before = set(sys.modules)
        sampling = importlib.import_module("k_diffusion.sampling")
        others = {name: module for name, module in sys.modules.items() if name not in before}
    sys.modules.update(
        {name: module for name, module in others.items() if not name.startswith("k_diffusion")}
    )
    return sampling


def k_sampling() -> ModuleType:
    """`k_diffusion.sampling` alone: the package itself imports training and evaluation, with a
    dozen requirements.

    It leaves no half-made `k_diffusion` behind in `sys.modules`. Where it cannot be imported, the
    test is skipped.
    """
    try:
        sampling = _k_diffusion()
    except ImportError as error:
        pytest.skip(f"k-diffusion cannot be imported: {error}")
    if sampling is None:
        pytest.skip("k-diffusion is not installed")
    return sampling
