"""The wheel: what it holds, what it says on the package index, that it works on its own, and the types users see."""

import email
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling")
pytest.importorskip("hatch_fancy_pypi_readme")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder with the unpacked wheel."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture(scope="module")
def metadata(site):
    (path,) = site.glob("*.dist-info/METADATA")
    return email.message_from_string(path.read_text())


def test_it_holds_types_and_every_recipe_with_its_data(site):
    assert (site / "fusedalign" / "py.typed").is_file()
    tracked = subprocess.run(["git", "ls-files", "recipes"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    recipes = tracked or [str(p.relative_to(ROOT)) for p in (ROOT / "recipes").rglob("*.*") if p.suffix != ".pyc"]
    assert {"recipes/dpo.yaml", "recipes/data/sft/train.jsonl"} <= set(recipes)
    for recipe in recipes:
        copy = site / "fusedalign" / "_recipes" / Path(recipe).relative_to("recipes")
        assert copy.read_bytes() == (ROOT / recipe).read_bytes()


def test_it_works_from_an_empty_folder(site, tmp_path):
    script = """
import fusedalign, fusedalign.cli, fusedalign.embedded, torch
print(fusedalign.__file__)
print(fusedalign.embedded.data_directory())
print(fusedalign.linear_logps(torch.randn(3, 8), torch.randn(20, 8), torch.arange(3)).logps.shape)
raise SystemExit(fusedalign.cli.main(["env"]))
"""
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    package, data, shape, *_ = run.stdout.splitlines()
    assert Path(package).parent == site / "fusedalign"
    assert Path(data) == (site / "fusedalign/_recipes/data").resolve()
    assert shape == "torch.Size([3])"
    assert not any(tmp_path.iterdir())


def test_links_on_the_index_are_absolute_and_lead_to_files(metadata):
    text = metadata.get_payload()
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL"))
    base = urls["Repository"]
    assert {"Repository", "Documentation", "Changelog", "Issues"} <= set(urls)
    assert all(url.startswith(base) for url in urls.values())
    fences = r"```.*?```"
    assert re.findall(fences, text, flags=re.S) == re.findall(fences, (ROOT / "README.md").read_text(), flags=re.S)
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
    targets = [
        *urls.values(),
        *re.findall(r"\]\(([^)\s]+)", prose),
        *re.findall(r"\b(?:src|srcset|href)=\"([^\"]+)", prose),
    ]
    assert len(targets) > 10
    for target in targets:
        assert re.match(r"https?://|#", target), target
        if target.startswith(base) and target not in (base, urls["Issues"]):
            kind, path = target.removeprefix(f"{base}/").split("/main/")
            path = path.partition("#")[0]
            assert (ROOT / path).is_file(), target
            assert (kind == "raw") == (Path(path).suffix in (".png", ".svg", ".gif")), target


def test_no_two_extras_are_the_same(metadata):
    packages = {
        extra: frozenset(
            requirement.partition(";")[0]
            for requirement in metadata.get_all("Requires-Dist")
            if re.search(rf"extra == ['\"]{extra}['\"]", requirement)
        )
        for extra in metadata.get_all("Provides-Extra")
    }
    assert all(packages.values())
    assert packages["bench"] < packages["trl"] < packages["all"]
    distinct = set(packages.values())
    assert len(distinct) == len(packages)


def test_trl_is_asked_for_on_every_python(metadata):
    """With a marker pip would leave it out in silence where TRL does not run."""
    (requirement,) = [r for r in metadata.get_all("Requires-Dist") if re.match(r"trl\b.*extra == 'trl'", r)]
    assert "python_version" not in requirement


def test_makefile_and_classifiers_name_the_same_pythons(metadata):
    minors = [int(c.rpartition(".")[2]) for c in metadata.get_all("Classifier") if re.search(r":: 3\.\d+$", c)]
    first, last = map(int, re.findall(r"\(3, (\d+)\)", (ROOT / "Makefile").read_text())[:2])
    assert minors == list(range(first, last + 1))
    assert metadata["Requires-Python"] == f">=3.{first}"


def test_the_citation_names_this_version(metadata):
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == metadata["Version"]
    assert citation["license"] == metadata["License-Expression"]


#: An expression and a part of its type.
REVEALED = {
    "fusedalign.linear_logps": "-> tuple[torch._tensor.Tensor, ",
    "fusedalign.linear_logps(x, x, x).logps": "torch._tensor.Tensor",
    "fusedalign.linear_cross_entropy(x, x, x)": "torch._tensor.Tensor",
    "fusedalign.LinearCrossEntropyLoss(in_features=2, out_features=3)": "fusedalign.modules.LinearCrossEntropyLoss",
    "fusedalign.dpo_loss": "(chosen_logps: torch._tensor.Tensor, ",
    "fusedalign.losses.kto_loss": "(logps: torch._tensor.Tensor, ",
    "fusedalign.explain()": "list[",
    "lm_head(torch.nn.Linear(2, 3)).softcap": "float | None",
    "pack_rows([[1]])": "fusedalign.packing.batch.PackedBatch",
    "Scorer": "-> fusedalign.score.scorer.Scorer",
    "score": "out: str | pathlib.Path | None",
    "FusedDPOTrainer('m', packed='auto')": "fusedalign.trl.trainers.FusedDPOTrainer",
    "FusedORPOTrainer('m')": "fusedalign.trl.experimental.FusedORPOTrainer",
    "attach": "packed: bool | str",
}
PROGRAM = """\
import torch

import fusedalign
import fusedalign.losses
from fusedalign.head import lm_head
from fusedalign.packing import pack_rows
from fusedalign.score import score
from fusedalign.score.scorer import Scorer
from fusedalign.trl import FusedDPOTrainer, FusedORPOTrainer, attach

x = torch.zeros(2, 2)
"""


@pytest.mark.slow  # mypy reads all of torch and transformers
def test_mypy_strict_sees_the_types_of_the_installed_wheel(wheel, tmp_path):
    pytest.importorskip("mypy")
    pytest.importorskip("trl")
    python = tmp_path / "env"
    venv.create(python, with_pip=False)
    (site,) = python.glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    (site / "packages.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    program = tmp_path / "program.py"
    program.write_text(PROGRAM + "".join(f"reveal_type({expression})\n" for expression in REVEALED))
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", python / "bin" / "python"]
    run = subprocess.run(
        [*command, "--cache-dir", tmp_path / "cache", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    types = re.findall(r'Revealed type is "(.*)"', run.stdout)
    for (expression, expected), revealed in zip(REVEALED.items(), types, strict=True):
        assert expected in revealed, f"{expression}: {revealed}"
        assert revealed != "Any"
