"""The documentation site: each page has a place in it, and the API pages show every public name."""

import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SITE = (ROOT / "mkdocs.yml").read_text()
#: Page of the API -> the module whose public names it shows.
MODULES = {
    "losses": "fusedalign.losses",
    "sequence": "fusedalign.sequence",
    "trl": "fusedalign.trl",
    "score": "fusedalign.score",
    "packing": "fusedalign.packing",
}


def shown(page: Path) -> list[str]:
    """The objects that a page of the API shows, with their modules."""
    return re.findall(r"^::: (\S+)$", page.read_text(), flags=re.M)


def public_names(module: ModuleType) -> set[str]:
    """`__all__`, or what the module defines without an underscore."""
    defined = {name for name, x in vars(module).items() if getattr(x, "__module__", None) == module.__name__}
    return {name for name in getattr(module, "__all__", defined) if not name.startswith("_")}


def load(name: str) -> ModuleType:
    """A file of docs/_site."""
    spec = importlib.util.spec_from_file_location(f"site_{name}", DOCS / f"_site/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_navigation_names_every_page_once():
    pages = sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
    assert sorted(re.findall(r"^ +- .*?: (\S+\.md)$", SITE, flags=re.M)) == pages


def test_the_repository_has_one_address():
    (address,) = re.findall(r"^repo_url: (\S+)$", SITE, flags=re.M)
    assert f'Repository = "{address}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("page", MODULES)
def test_the_page_of_a_module_shows_its_public_names(page):
    if page == "trl":
        pytest.importorskip("trl")
    module = importlib.import_module(MODULES[page])
    names = {target.rpartition(".")[2] for target in shown(DOCS / f"api/{page}.md")}
    assert names == public_names(module)


def test_the_api_pages_show_every_name_of_the_package():
    import fusedalign

    names = {target.rpartition(".")[2] for page in DOCS.glob("api/*.md") for target in shown(page)}
    assert public_names(fusedalign) <= names


@pytest.mark.parametrize("page", sorted(DOCS.glob("api/*.md")), ids=lambda page: page.stem)
def test_objects_are_named_by_the_module_that_defines_them(page):
    if page.stem == "trl":
        pytest.importorskip("trl")
    for target in shown(page):
        module, _, name = target.rpartition(".")
        x = getattr(importlib.import_module(module), name)
        assert x.__module__ == module
        assert inspect.getdoc(x), target


def test_every_command_is_on_the_page_of_commands():
    from fusedalign.cli import COMMANDS

    rows = "".join(re.findall(r"^\| `.*?\|", (DOCS / "api/commands.md").read_text(), flags=re.M))
    assert set(COMMANDS) <= set(re.findall(r"`(\w+)`", rows))


@pytest.mark.parametrize("figure", sorted(DOCS.glob("figures/*.png")), ids=lambda figure: figure.name)
def test_each_figure_is_drawn_by_a_script_or_by_a_command_on_its_page(figure):
    script = figure.with_suffix(".py")
    commands = [script] if script.exists() else []
    for page in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        lines = page.read_text().splitlines()
        for number, line in enumerate(lines):
            if f"figures/{figure.name})" in line or f'figures/{figure.name}"' in line:
                near = "\n".join(lines[max(number - 20, 0) : number + 20])
                commands += re.findall(r"(?:^|`|/)(?:fusedalign|python|make) \S+", near, flags=re.M)
    assert commands


def test_links_out_of_the_site_lead_to_the_repository():
    included = SimpleNamespace(inclusion=SimpleNamespace(is_included=lambda: True), page=SimpleNamespace(title="Title"))
    files = SimpleNamespace(get_file_from_path={"api/trl.md": included, "losses.md": included}.get)
    page = SimpleNamespace(file=SimpleNamespace(src_uri="api/index.md"))
    config = SimpleNamespace(repo_url="https://host/repo", docs_dir=str(DOCS))

    def rewrite(text: str) -> str:
        return load("links").on_page_markdown(text, page=page, config=config, files=files)

    assert rewrite("[a](trl.md#b) [c](../losses.md)") == "[a](trl.md#b) [c](../losses.md)"
    assert rewrite("[losses.md](../losses.md#b)") == "[Title](../losses.md#b)"
    assert rewrite("[d](../../README.md#e)") == "[d](https://host/repo/blob/main/README.md#e)"
    assert rewrite("[f](../figures/losses.py)") == "[f](https://host/repo/blob/main/docs/figures/losses.py)"
    for text in ("[dead](../../nothing.md)", "`[g](../../h)`", "```\n[i](../../j)\n```", "[k](#l)", "[m](https://n)"):
        assert rewrite(text) == text


def test_numbers_in_tables_do_not_wrap():
    html = load("links").on_page_content("<td>1.6e-07</td><td>error</td><td>12</td>")
    assert html == '<td class="number">1.6e-07</td><td>error</td><td class="number">12</td>'


@pytest.mark.parametrize(
    ("docstring", "want"),
    [
        ("Loss::\n\n    a\n", "Loss:\n\n    a\n"),
        ("    beta: > 0, see docs/trl.md.", "    beta: &gt; 0, see [trl](../trl.md)."),
        ("Args:\n    a, b,\n        c: d\n", "Args:\n    a, b, c: d\n"),
        ("Returns:\n    T: x, or\n    y: z\n\nRaises:\n", "Returns:\n    T&#58; x, or\n    y&#58; z\n\nRaises:\n"),
        ("Example:\n    >>> 1\n", "Examples:\n    >>> 1\n"),
    ],
)
def test_docstrings_become_markdown(docstring, want):
    pytest.importorskip("griffe")
    assert load("docstrings").markdown(docstring) == want


def test_attributes_become_a_section_of_their_class():
    pytest.importorskip("griffe")
    listed = load("docstrings").listed
    assert listed("A pair.\n", {"a": "[B] first\n    one", "b": "0: none"}) == (
        "A pair.\n\nAttributes:\n    a: [B] first one\n    b: 0: none"
    )
    assert listed("A pair.", {}) == "A pair."


def test_names_of_public_objects_become_links():
    pytest.importorskip("griffe")
    text = load("docstrings").linked("`fusedalign.f`, `x`", {"f": "fusedalign.ops.f"})
    assert text == "[`fusedalign.f`][fusedalign.ops.f], `x`"
