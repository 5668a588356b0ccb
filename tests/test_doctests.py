"""The examples in the docstrings run."""

import doctest
import importlib

import pytest

MODULES = ["ops", "sequence", "packing.batch"]  # tests/losses/test_examples.py runs those of the losses


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"fusedalign.{name}"))
    assert result.attempted
    assert not result.failed
