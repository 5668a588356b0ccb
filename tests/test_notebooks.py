"""The notebooks run from start to end, and what they store is what a fresh execution gives.

A cell with the metadata `compare` prints numbers that do not depend on the machine: they must agree with the stored
ones to that tolerance, relative for numbers above 1, and so must the words between them. A training amplifies rounding,
so its tolerance is wide.
"""

import importlib.util
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [
    "01_logps_without_logits",
    "02_preference_losses",
    "03_align_a_small_model",
    "04_which_impl",
    "05_score_a_data_set",
]
NEED_TRL = ("03", "04", "05")
NUMBER = r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?"
MOST_BYTES = 150_000


def code_cells(notebook) -> dict:
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def printed(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def kinds(cell) -> list[str]:
    return [output.get("name", output.output_type) for output in cell.outputs]


def differences(stored: str, fresh: str, tolerance: float) -> list[str]:
    """What differs between two printed texts beyond the tolerance; nothing: []."""
    words = [re.sub(r"\s+", " ", re.sub(NUMBER, "#", text)) for text in (stored, fresh)]
    if words[0] != words[1]:
        return [f"{words[0]!r} became {words[1]!r}"]
    pairs = zip(re.findall(NUMBER, stored), re.findall(NUMBER, fresh), strict=True)
    return [f"{a} became {b}" for a, b in pairs if abs(float(a) - float(b)) > tolerance * max(1.0, abs(float(a)))]


@pytest.fixture(scope="module")
def execute():
    spec = importlib.util.spec_from_file_location("execute", ROOT / "notebooks" / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.execute


def test_all_notebooks_are_there():
    assert [path.stem for path in PATHS] == NAMES


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_stored_outputs_are_complete_and_small(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < MOST_BYTES
    counts = [cell.execution_count for cell in code_cells(notebook).values()]
    assert counts == list(range(1, len(counts) + 1))
    cells = code_cells(notebook).values()
    assert any("display_data" in kinds(cell) for cell in cells)
    for cell in cells:
        assert set(kinds(cell)) <= {"stdout", "display_data"}, cell.id  # no warnings, no progress bars
        assert not re.search(r"/(home|root|tmp|usr|opt)/|site-packages|Warning", printed(cell)), cell.id
        assert printed(cell) or "compare" not in cell.metadata, cell.id
    assert notebook.cells[0].source.startswith("# ")
    assert "## For a real model on a GPU" in notebook.cells[-1].source
    assert any("compare" in cell.metadata for cell in notebook.cells)


#: The notebooks that take half of a minute or longer on two busy cores.
LONG = ("03_align_a_small_model", "04_which_impl")


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in LONG else []) for path in PATHS],
)
def test_a_fresh_execution_agrees_with_the_stored_outputs(path, execute, tmp_path, monkeypatch):
    if path.stem.startswith(NEED_TRL):
        pytest.importorskip("trl")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # another worker has the second core
    stored, fresh = code_cells(nbformat.read(path, as_version=4)), code_cells(execute(path, tmp_path))
    for name, cell in stored.items():
        assert kinds(fresh[name]) == kinds(cell), name
        if "compare" in cell.metadata:
            assert differences(printed(cell), printed(fresh[name]), cell.metadata["compare"]) == [], name


def test_differences_sees_numbers_and_words():
    assert differences("loss 0.50, step 3", "loss  0.51, step 3", 0.02) == []
    assert differences("loss 0.50", "loss 0.60", 0.02) == ["0.50 became 0.60"]
    assert differences("5,000 rows of 1e-3", "5,000 rows of 1e-1", 0.02) == ["1e-3 became 1e-1"]
    assert len(differences("same: True", "same: False", 1.0)) == 1
