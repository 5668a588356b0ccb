"""The recipes: their comments are true, each trains, and the script chains them."""

import json
import math
import re
import runpy
import subprocess
import sys

import guarded
import pytest
import torch

pytest.importorskip("trl")

from safetensors.torch import load_file
from transformers import Qwen3Config

from fusedalign import recipes
from fusedalign.bench.training.settings import SIZES
from fusedalign.cli import main
from fusedalign.plan.command import _parser, step_of
from fusedalign.plan.model import Shapes
from fusedalign.plan.plan import plan
from fusedalign.plan.table import render
from fusedalign.trl import launch

TRAINED = [name for name in recipes.configurations() if name != "score"]
SEVERAL = {"dpo_multi_gpu": "multi_gpu", "dpo_fsdp2": "fsdp2", "sft_zero3": "zero3"}
SCRIPT = recipes.find_recipe("sft_then_dpo")


def method_of(name):
    return name.partition("_")[0]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("path", recipes.recipes().values(), ids=lambda path: path.name)
def test_a_recipe_starts_with_what_it_does_what_it_needs_and_what_to_change(path):
    text = path.read_text()
    if path.suffix == ".yaml":
        *lines, blank = text.splitlines()[:4]
        assert blank == ""
        assert all(line.startswith("# ") for line in lines)
        assert max(map(len, text.splitlines())) <= 100
    else:
        lines = [line for line in text.strip('"').splitlines() if line][:3]
    does, needs, change = (line.removeprefix("# ") for line in lines)
    assert does == recipes.about(path)
    assert len(does) <= 80
    assert does.endswith(".")
    assert needs.startswith("Needs ")
    assert change.startswith("For your data change ")


@pytest.fixture(scope="module")
def shapes():
    """The layers of Qwen3-1.7B, traced once for all plans."""
    return Shapes(Qwen3Config(**SIZES["1.7b"].config), "Qwen/Qwen3-1.7B")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "dpo" else [pytest.mark.slow])  # each kind of step is a trace of its own
        for name in [*recipes.configurations(), SCRIPT.stem]
    ],
)
def test_the_stated_memory_is_that_of_the_stated_command(name, shapes):
    needs = re.search(r"Needs .*?([0-9.]+) GiB.*?: fusedalign (plan .*)", recipes.find_recipe(name).read_text())
    options = _parser().parse(needs[2].split()[1:])
    assert options.model_name_or_path == "Qwen/Qwen3-1.7B"
    text = render(plan(shapes, step_of(options)))
    line = r"^ +weights +([0-9.]+) GiB" if name == "score" else r"^needs ([0-9.]+) GiB of a card"
    assert needs[1] == f"{float(re.search(line, text, re.MULTILINE)[1]):.1f}"


@pytest.fixture(scope="module")
def chained(tmp_path_factory):
    """The folder of a run of the script, its commands in this process."""
    folder = tmp_path_factory.mktemp("chained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(subprocess, "run", lambda words: subprocess.CompletedProcess(words, main(words[3:])))
        runpy.run_path(str(SCRIPT))["main"](["--max_steps", "2", "--logging_steps", "1"])
    return folder / "runs/sft_then_dpo"


def test_the_script_trains_the_model_of_its_sft_against_a_cached_reference(chained):
    assert (chained / "reference.parquet").is_file()
    first, *_, last = (row for row in metrics(chained / "dpo") if "loss" in row or "eval_loss" in row)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5), "policy and cached reference start equal"
    assert abs(last["eval_loss"] - math.log(2)) > 1e-3
    sft, dpo = (load_file(chained / name / "model.safetensors") for name in ("sft", "dpo"))
    moved = max((sft[name] - dpo[name]).abs().max() for name in sft)
    assert 0 < moved < 5e-5, "one step with the learning rate 1e-5; SFT's was 1e-4"


def test_the_script_ends_with_the_status_of_a_command_that_fails(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda words: subprocess.CompletedProcess(words, 3))
    with pytest.raises(SystemExit, match="3"):
        runpy.run_path(str(SCRIPT))["main"]([])


@pytest.mark.parametrize("name", [n for n in TRAINED if n not in SEVERAL and n not in ("sft", "dpo")])  # the script's
def test_a_recipe_trains(name, chained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # names and data are found from anywhere
    start = [] if name.startswith("sft") else ["--model_name_or_path", str(chained / "sft")]
    assert main([method_of(name), "--config", name, "--max_steps", "2", *start]) == 0, capsys.readouterr().err
    folder = tmp_path / "runs" / name
    assert all(math.isfinite(row["eval_loss"]) for row in metrics(folder) if "eval_loss" in row)
    weights = "adapter_model" if name.endswith("_lora") else "model"
    assert [path.stem for path in folder.glob("*.safetensors")] == [weights]


def test_the_recipe_of_scoring_scores(chained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["score", "--config", "score"]) == 0, capsys.readouterr().err
    assert (tmp_path / "runs/test_scores.parquet").is_file()
    models = ["--model_name_or_path", str(chained / "dpo"), "--ref_model", str(chained / "sft")]
    assert main(["score", "--config", "score", *models, "--out", "rewards.parquet"]) == 0, capsys.readouterr().err
    assert "reward accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("name", SEVERAL)
def test_a_recipe_for_several_gpus_starts_a_process_for_each(name, monkeypatch, capsys):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    commands = []
    monkeypatch.setattr(launch, "_run", lambda command, variables: commands.append(command[3:]) or 0)
    monkeypatch.setattr(launch, "is_deepspeed_available", lambda: False)
    words = [method_of(name), "--config", name]
    if name.endswith("zero3"):
        assert main(words) == 2
        assert "DeepSpeed, which is not installed: pip install deepspeed" in capsys.readouterr().err
        monkeypatch.setattr(launch, "is_deepspeed_available", lambda: True)
    for gpus in (0, 2):
        monkeypatch.setattr(torch.accelerator, "device_count", lambda gpus=gpus: gpus)
        assert main(words) == 0, capsys.readouterr().err
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert main(words) == 2
    assert "num_processes must be at most 1, the GPUs of this machine, got 2" in capsys.readouterr().err
    first, second = commands
    assert first == second
    assert first[1].endswith(f"{SEVERAL[name]}.yaml")
    assert first[2:] == ["--num_processes", "2", "-m", "fusedalign", *words]


@pytest.mark.slow
@pytest.mark.parametrize("name", SEVERAL)
def test_a_recipe_for_several_gpus_trains_on_two_ranks(name, tmp_path):
    gpus = torch.accelerator.device_count()
    if name.endswith("zero3"):
        pytest.importorskip("deepspeed")
    if gpus < 2 and (gpus or name.endswith("zero3")):  # ZeRO compiles operators for the CPU
        pytest.skip("needs two GPUs")
    command = [sys.executable, "-m", "fusedalign", method_of(name), "--config", name, "--max_steps", "2"]
    flags = ["--output_dir", str(tmp_path / "run"), "--main_process_port", "0"]
    ended = guarded.run([*command, *flags], limit=240)
    assert ended.status == 0, ended.stderr[-4000:]
    assert (tmp_path / "run/model.safetensors").is_file()
    assert sum(math.isfinite(row.get("eval_loss", math.nan)) for row in metrics(tmp_path / "run")) == 1
