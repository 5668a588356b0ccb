"""Every Python block of the README runs, in order, as one program; its shell commands exist."""

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def test_python_blocks_run(tmp_path, monkeypatch):
    assert len(BLOCKS) >= 3
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in BLOCKS:
        if "import trl" in block or "from trl" in block:
            pytest.importorskip("trl")
        exec(compile(block, "README.md", "exec"), names)
    assert names["loss"].isfinite()
    assert names["losses"].shape == (8,)
    assert names["trainer"].state.global_step == 2


def test_before_and_after_blocks_give_the_same_numbers():
    """Both halves of the comparison at the top bind `logps`, so each half is run separately."""
    before, after = BLOCKS[0].split("# after")
    names: dict = {}
    exec(before, names)
    first = names["logps"]
    exec(f"# after{after}", names)
    assert (first - names["logps"]).abs().max() < 1e-4


def test_make_targets_and_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\S+)", README, flags=re.M):
        assert f"\n{target}:" in makefile
    for recipe in re.findall(r"--config (\S+)", README):
        assert (ROOT / "recipes" / f"{recipe}.yaml").is_file()


def test_the_score_command_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl")
    from fusedalign.cli import main

    commands = set(re.findall(r"fusedalign (score --model_name_or_path \S+ --dataset_name \S+ --out \S+)", README))
    assert len(commands) == 1
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    assert main(commands.pop().split()) == 0
    assert "wrote runs/scores.parquet" in capsys.readouterr().out


def test_every_impl_is_named():
    from fusedalign.impls import MODULES

    for name in MODULES:
        assert f"`{name}`" in README
