"""The table of methods: every command and every Fused trainer comes from it."""

import subprocess
import sys
from pathlib import Path

import pytest

import fusedalign.trl
from fusedalign.cli import COMMANDS
from fusedalign.methods import METHODS, TRAINERS, WITH_REFERENCE
from fusedalign.trl import experimental, trainers
from fusedalign.trl.arguments import trl_class

RECIPES = Path(__file__).parents[2] / "recipes"


def test_the_trainers_of_the_table_are_the_public_ones():
    names = {f"Fused{name}" for name in TRAINERS}
    assert names == {*trainers.__all__, *experimental.__all__}
    assert names | {"HeadOptions", "attach", "detach"} == set(fusedalign.trl.__all__)
    for name in names:
        assert getattr(fusedalign.trl, name).__name__ == name


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_a_command_a_recipe_and_classes_of_trl(name):
    method = METHODS[name]
    assert name in COMMANDS
    assert (RECIPES / f"{name}.yaml").is_file()
    assert issubclass(getattr(fusedalign.trl, f"Fused{method.trainer}"), trl_class(method.trainer))
    assert {*method.defaults} <= {*trl_class(method.config).__dataclass_fields__}


def test_the_methods_with_a_reference_are_those_whose_trainers_take_a_cache():
    takes_cache = [
        name
        for name, method in METHODS.items()
        if issubclass(getattr(fusedalign.trl, f"Fused{method.trainer}"), trainers.FusedWithReference)
    ]
    assert tuple(takes_cache) == WITH_REFERENCE


def test_the_usage_names_every_command_and_imports_no_trl():
    script = "import sys; from fusedalign.cli import main; main(['--help']); print('trl' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
    words = done.stdout.replace(",", " ").split()
    assert set(COMMANDS) <= set(words)
