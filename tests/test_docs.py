"""The pages under docs/: Python blocks run, every loss is described, links resolve, the figure can be drawn."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fusedalign.losses
from fusedalign.losses import cpo, dpo, kto, sft
from fusedalign.score import columns

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/losses.md").read_text()
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]


def test_python_blocks_of_the_losses_page_run():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    assert len(blocks) >= 2
    names: dict = {}
    for block in blocks:  # the blocks run in order as one program
        exec(compile(block, "docs/losses.md", "exec"), names)
    for name in ("loss", "ipo", "simpo", "ld", "wpo", "mpo", "alphapo", "orpo", "kto"):
        assert names[name].shape == ()
        assert names[name].isfinite(), name


def test_python_blocks_of_the_impls_page_run(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/impls.md").read_text(), flags=re.S)
    names: dict = {}
    exec(compile(block, "docs/impls.md", "exec"), names)
    assert names["loss"].isfinite()
    assert "pytorch exact" in capsys.readouterr().out


def test_python_block_of_the_packing_page_runs():
    pytest.importorskip("transformers")
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/packing.md").read_text(), flags=re.S)
    names: dict = {}
    exec(compile(block, "docs/packing.md", "exec"), names)
    assert names["batch"].tokens == 13
    padded = names["batch"].input_ids[0][names["batch"].token_index]
    logits = names["model"](padded, attention_mask=names["batch"].valid.long()).logits.log_softmax(-1)
    targets = names["shift_labels"](names["labels"])
    want = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0].masked_fill(targets == -100, 0)
    assert (names["logps"] - want).abs().max() < 1e-5


def test_python_block_of_the_scoring_page_runs(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/scoring.md").read_text(), flags=re.S)
    names: dict = {}
    exec(compile(block, "docs/scoring.md", "exec"), names)
    assert len(names["scores"]) == 16
    assert len(names["kept"]) == sum(names["scores"]["accuracy"])
    assert names["out"].logps.shape == (2,)


@pytest.mark.parametrize("name", {**columns.PER_ANSWER, **columns.PER_ROW, **columns.WITH_REFERENCE})
def test_every_column_is_on_the_scoring_page(name):
    assert f"`{name}`" in (ROOT / "docs/scoring.md").read_text()


@pytest.mark.parametrize(
    "name",
    sorted({*dpo.LOSS_TYPES, *cpo.LOSS_TYPES, *kto.LOSS_TYPES, *sft.LOSS_TYPES, "tpo-l", *fusedalign.losses.__all__}),
)
def test_every_loss_is_on_the_page(name):
    assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", PAGE)


@pytest.mark.parametrize("name", dpo.LOSS_TYPES)
def test_every_dpo_type_has_a_section(name):
    assert f"\n### {name}\n" in PAGE


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_and_images_exist(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)", text):
        path = target.partition("#")[0]
        if path and not re.match(r"[a-z]+:", path):
            assert (page.parent / path).exists(), target


def test_the_figure_draws(tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "losses.png"
    subprocess.run([sys.executable, ROOT / "docs/figures/losses.py", "--out", out], check=True)
    assert out.read_bytes().startswith(b"\x89PNG")
    assert out.stat().st_size < 250_000
