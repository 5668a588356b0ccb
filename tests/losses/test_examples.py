"""Every public loss has an example in its docstring, and the examples run."""

import doctest
import importlib

import pytest

from fusedalign import losses

MODULES = ["dpo", "cpo", "orpo", "kto", "sft"]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"fusedalign.losses.{name}"))
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize("name", [name for name in losses.__all__ if name.islower()])
def test_docstrings_have_all_sections(name):
    doc = getattr(losses, name).__doc__
    for part in ("Args:", "Returns:", "Raises:", "Source:", "Example:", ">>>"):
        assert part in doc, part
