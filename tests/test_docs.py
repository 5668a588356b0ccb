"""The pages under docs/: Python blocks run, losses are described, links lead somewhere, the figure can be drawn."""

import json
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
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("notebooks/*.ipynb"))]


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


def test_every_page_with_python_blocks_is_run():
    """Blocks marked `py` are fragments, or use other libraries."""
    pages = {path.stem for path in (ROOT / "docs").glob("*.md") if "```python\n" in path.read_text()}
    assert pages == {"impls", "losses", "migrating", "packing", "precision", "scoring"}


@pytest.mark.parametrize("page", ["migrating", "precision"])
def test_python_blocks_of_a_page_run_as_one_program(page, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(), flags=re.S):
        exec(compile(block, f"docs/{page}.md", "exec"), names)
    assert names["linear_logps"]


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


def markdown(page: Path) -> str:
    """The text of a page or of a notebook's cells, without fenced blocks."""
    text = page.read_text()
    if page.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.S | re.M)


def links(text: str) -> list[str]:
    """The targets of links and images, in Markdown and in HTML."""
    text = re.sub(r"`[^`\n]*`", "`code`", text)
    return re.findall(r"\]\(([^)\s]+)", text) + re.findall(r"""(?:href|src|srcset)="([^"]+)""", text)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    seen: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.+?) *$", markdown(page), flags=re.M):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", words).lower().replace(" ", "-")
        count = seen[slug] = seen.get(slug, -1) + 1
        if count:
            seen[f"{slug}-{count}"] = 0
    return set(seen)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files_and_headings(page):
    for target in links(markdown(page)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), target


def test_anchors_are_those_of_github(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# `a_b`: [C](c.md) & D-e\n## Same\n## Same\n```sh\n# no heading\n```\n")
    assert anchors(page) == {"a_b-c--d-e", "same", "same-1"}


def test_the_figure_draws(tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "losses.png"
    subprocess.run([sys.executable, ROOT / "docs/figures/losses.py", "--out", out], check=True)
    assert out.read_bytes().startswith(b"\x89PNG")
    assert out.stat().st_size < 250_000
