"""The example of a loop without a trainer trains, and stays short."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")
PATH = Path(__file__).parents[1] / "recipes" / "custom_loop.py"


@pytest.mark.parametrize("name", ["dpo", "simpo"])
def test_the_recipe_trains(tmp_path, name):
    spec = importlib.util.spec_from_file_location("custom_loop", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    losses = list(module.train(name, steps=12, folder=tmp_path))
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.8 * 3 * losses[0]


def test_the_recipe_is_at_most_40_lines_below_its_docstring():
    assert len(PATH.read_text().rpartition('"""')[2].strip().splitlines()) <= 40
