"""TRL's private names: each exists in the installed version, and only `fusedalign.trl.stock` uses them."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest
import trl

from fusedalign.trl import stock

PACKAGE = Path(stock.__file__).parents[1]
TRAINERS = (trl.SFTTrainer, trl.DPOTrainer, trl.KTOTrainer)
#: Names that TRL 1.15 does not have; `stock` does without them there.
SINCE_1_16 = {"_use_triton"}


def pairs(table):
    return [(owner, name) for owner, names in table.items() for name in names]


@pytest.mark.parametrize(("module", "name"), pairs(stock.MODULE_NAMES))
def test_a_name_exists_in_its_module_of_trl(module, name):
    if name in SINCE_1_16 and trl.__version__.startswith("1.15"):
        pytest.skip("new in TRL 1.16")
    assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", [*stock.ATTRIBUTES, *stock.OVERRIDDEN])
def test_an_attribute_or_method_exists_in_a_trainer_of_trl(name):
    assert any(hasattr(cls, name) or f"self.{name} " in inspect.getsource(cls) for cls in TRAINERS)


@pytest.mark.parametrize(("module", "name"), pairs(stock.SOURCE_NAMES))
def test_a_name_exists_in_the_source_of_its_module(module, name):
    assert name in inspect.getsource(importlib.import_module(module))


FILES = [path for path in PACKAGE.rglob("*.py") if path != Path(stock.__file__)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_module_uses_a_private_name(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    used |= {node.id for node in nodes if isinstance(node, ast.Name)}
    used |= {node.arg for node in nodes if isinstance(node, ast.keyword)}
    used |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    used |= {alias.name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
    used |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    private = {name for _, name in pairs(stock.MODULE_NAMES)} | {*stock.ATTRIBUTES, "_fused_forward"}
    assert not (private - {"_name", "logger"} - own) & used  # these two are words of everyday code
    assert not [name for name in used if name and name.startswith(("trl.trainer", "trl.data_utils"))]


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "trl"], ids=lambda path: path.name)
def test_every_private_attribute_of_a_trainer_is_listed(path):
    """An attribute with an underscore that ours do not define themselves but TRL's trainers have."""
    tree = ast.parse(path.read_text())
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("_")}
    used |= {name for name in own if name.startswith("_")}
    theirs = {name for name in used if any(hasattr(cls, name) for cls in TRAINERS) and not name.startswith("__")}
    assert theirs <= {*stock.ATTRIBUTES, *stock.OVERRIDDEN}
