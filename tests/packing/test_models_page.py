"""docs/models.md is what its command writes, and `fusedalign.support` says the same of a single model."""

import re
import subprocess
import sys
from pathlib import Path

import families
import models_page
import pytest
import transformers

from fusedalign import support
from fusedalign.reports import package_version
from fusedalign.supportcommand import support_command

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/models.md").read_text()
LOGPS, LIGER = (models_page.COLUMNS.index(name) for name in ("logps", "Liger kernels"))


def rows(page):
    """model type -> cells"""
    lines = [line[2:-2].split(" | ") for line in page.splitlines() if line.startswith("| ")]
    assert lines[0] == list(models_page.COLUMNS)
    return {cells[0]: cells for cells in lines[2:]}


def assert_same(actual, expected):
    """Cells agree; a difference of log-probabilities in its magnitude, which depends on the machine's rounding."""
    assert actual[:LOGPS] + actual[LOGPS + 1 :] == expected[:LOGPS] + expected[LOGPS + 1 :]
    if expected[LOGPS]:
        assert float(actual[LOGPS]) <= 4 * float(expected[LOGPS]) < 3e-5


def skip_on_other_versions():
    (version,) = re.findall(r"transformers ([\d.]+)", PAGE)
    if transformers.__version__ != version:
        pytest.skip(f"the page is of transformers {version}, this is {transformers.__version__}")


def test_the_page_has_every_family_and_is_of_the_tested_versions():
    assert list(rows(PAGE)) == sorted(families.FAMILIES)
    assert len(families.FAMILIES) >= 30
    constraints = (ROOT / "constraints.txt").read_text()
    for name, pin in (("torch", "torch"), ("transformers", "transformers"), ("Liger Kernel", "liger-kernel")):
        (version,) = re.findall(rf"\b{name} (\d[\d.]*\d)", PAGE)
        assert f"\n{pin}=={version}" in constraints, name


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "granite", "phi", "falcon_h1", "llama4_text", "stablelm"])
def test_the_page_is_right_about_a_family(name):
    skip_on_other_versions()
    assert_same(models_page.row(name), rows(PAGE)[name][:LIGER])


@pytest.mark.slow
def test_the_page_is_up_to_date():
    skip_on_other_versions()
    maker = [sys.executable, models_page.__file__]
    made = subprocess.run(maker, cwd=ROOT, capture_output=True, text=True, timeout=900, check=True).stdout
    last = None if package_version("liger-kernel") else LIGER
    actual, expected = rows(made), rows(PAGE)
    assert actual.keys() == expected.keys()
    for name, cells in expected.items():
        assert_same(actual[name][:last], cells[:last])
    if last is None:
        assert made.partition("| model type")[0] == PAGE.partition("| model type")[0], "run `make models`"


@pytest.mark.parametrize(
    ("family", "transform"), [("gemma2", {"final_logit_softcapping": 30.0}), ("granite", {"logits_scaling": 2.0})]
)
def test_a_transform_that_is_not_read_shows_in_the_difference(monkeypatch, family, transform):
    model = families.build(family, {"head_dim": 8, **transform}, attention=None)
    right = support.head_support(model)
    read = support.lm_head
    monkeypatch.setattr(support, "lm_head", lambda model: read(model)._replace(scale=1.0, softcap=None))
    assert right.difference < 1e-5
    assert support.head_support(model).difference > 1e-2


def test_a_head_that_cannot_be_read_is_a_reason():
    config = transformers.T5Config(vocab_size=50, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    model = transformers.T5ForConditionalGeneration(config)
    assert "encoder-decoder" in support.head_support(model)
    assert "encoder-decoder" in support.packing_refusal(model)


def test_the_command_examines_a_configuration_without_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(support, "liger_support", lambda model: ("LigerRMSNorm",))  # it would stay in the process
    fields = {**families.SMALL, "num_hidden_layers": 40, "vocab_size": 100_000, "head_dim": 8}
    config = transformers.Gemma2Config(**fields, final_logit_softcapping=20.0)
    config.save_pretrained(tmp_path)
    support_command(["--model_name_or_path", str(tmp_path)])
    table = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert table["model"] == "Gemma2ForCausalLM"
    assert table["softcap"] == "20"
    assert table["packed batches"].startswith("no: Gemma2Attention has softcap")
    assert table["Liger kernels"] == "LigerRMSNorm"
    with pytest.raises(ValueError, match="must name a model"):
        support_command(["--model_name_or_path", str(tmp_path / "none")])
