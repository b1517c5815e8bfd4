"""The names of 0.5 that moved import for one release, with a warning that names the new place."""

from __future__ import annotations

import importlib

import pytest

import sdeflow
from sdeflow._utils.moved import MOVED, RENAMED


@pytest.mark.parametrize(("old", "new"), sorted(MOVED.items()))
def test_an_old_module_forwards_to_the_new_one(old: str, new: str) -> None:
    import sys

    sys.modules.pop(f"sdeflow.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"is now sdeflow.{new};"):
        module = importlib.import_module(f"sdeflow.{old}")
    home = importlib.import_module(f"sdeflow.{new}")
    for name in (name for name in vars(home) if not name.startswith("_")):
        assert getattr(module, name) is getattr(home, name)
    with pytest.raises(AttributeError):
        _ = module.no_such_name


@pytest.mark.parametrize(("old", "new"), sorted(RENAMED.items()))
def test_an_old_name_is_the_new_one(old: str, new: str) -> None:
    module, _, name = old.rpartition(".")
    home, _, renamed = new.rpartition(".")
    with pytest.warns(DeprecationWarning, match=f"is now sdeflow.{new};"):
        found = getattr(importlib.import_module(f"sdeflow.{module}"), name)
    assert found is getattr(importlib.import_module(f"sdeflow.{home}"), renamed)


def test_a_name_that_never_was_is_an_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nowhere'"):
        _ = sdeflow.grid.nowhere
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("sdeflow.nowhere")
