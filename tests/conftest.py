"""Set up every test: no network, NaN in uninitialised memory, and Triton's interpreter if there is no GPU."""

import contextlib
import importlib
import itertools
import os
import unittest.mock

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

with contextlib.suppress(ImportError):  # after a test has looked for pip, torch.compile could not import it any more
    import setuptools  # noqa: F401

if not torch.cuda.is_available():  # triton reads it when imported; torch and fusedalign import triton lazily
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)  # the tensors are tiny: a second thread costs more than it saves


def pytest_collection_modifyitems(config, items):
    """Deselect cases that triton refuses, and mark redundant interpreter cases slow.

    The interpreter is a thousand times slower than a GPU. `make test` keeps enough cases of each test to cover every
    pair of parameter values; the remaining cases are marked slow.
    """
    on_triton = [item for item in items if _params(item).get("impl") == "triton" or item.path.name == "test_triton.py"]
    refused = [item for item in on_triton if _is_refused(_params(item))]
    if refused:
        config.hook.pytest_deselected(items=refused)
        items[:] = [item for item in items if item not in set(refused)]
    if on_triton and not torch.cuda.is_available():
        import interpreter  # which imports triton

        interpreter.speed_up()
    cases_by_test: dict = {}
    for item in on_triton:
        if item not in set(refused) and not torch.cuda.is_available():
            cases_by_test.setdefault((item.path, item.originalname), []).append(item)
    for cases in cases_by_test.values():
        for item in set(cases) - set(_covering(cases)):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Judge tests of adapters by what the adapter claims: refusals skip, and a caveat excuses inexact results.

    The budgets of eager code (`helpers.BudgetError`) hold in spite of a caveat. tests/test_library_adapters.py checks
    refusals and caveats themselves.
    """
    from helpers import BudgetError

    from fusedalign import impls

    impl = _params(pyfuncitem).get("impl")
    if impl not in impls.impl_names("adapter"):
        return (yield)
    with _recorded_caveats(importlib.import_module(impls.MODULES[impl].module).IMPL) as caveats:
        try:
            return (yield)
        except ValueError as error:
            if str(error).startswith(f"impl={impl!r} cannot do this: "):
                pytest.skip(f"refused: {str(error).partition(': ')[2].partition('; impls')[0]}")
            raise
        except AssertionError as error:
            if caveats and not isinstance(error, BudgetError):
                pytest.xfail(f"not exact, as documented: {'; '.join(sorted(caveats))}")
            raise


@contextlib.contextmanager
def _recorded_caveats(adapter):
    """The set of caveats that `adapter` has for the problems that it is asked to support."""
    caveats, supports = set(), adapter.supports

    def supports_and_record(problem):
        caveats.update(filter(None, [adapter.caveat(problem)]))
        return supports(problem)

    with unittest.mock.patch.object(adapter, "supports", supports_and_record):
        yield caveats


def _params(item) -> dict:
    return getattr(getattr(item, "callspec", None), "params", {})


def _is_refused(params) -> bool:
    """Whether triton refuses these parameters; tests/test_triton.py checks that it does."""
    return torch.float64 in params.values() or (params.get("device") == "cpu" and torch.cuda.is_available())


def _covering(items) -> list:
    """A nearly minimal subset of a test's cases that contains every pair of parameter values (greedy set cover)."""
    pairs = {}
    for item in items:
        values = ["", *(f"{name}={value!r}" for name, value in sorted(_params(item).items()))]
        pairs[item] = set(itertools.combinations_with_replacement(values, 2))  # and each value alone
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        chosen.append(max(items, key=lambda item: len(pairs[item] & missing)))
        missing -= pairs[chosen[-1]]
    return chosen


@pytest.fixture(autouse=True)
def _poison_empty():
    """Fill uninitialised tensors (`torch.empty` etc.) with NaN, so that unwritten elements show up."""
    previous = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(previous[0], warn_only=previous[1])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
