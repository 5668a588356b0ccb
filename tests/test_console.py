"""The console before anything heavy is imported: names, flags and help from sources; recipes; completion; widths."""

import json
import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

import fusedalign
from fusedalign.cli import COMMANDS, every_command, main
from fusedalign.commandline import WIDTH, CommandParser, suggestion, unknown_flag
from fusedalign.flags import command_flags
from fusedalign.methods import METHODS
from fusedalign.recipes import config_path, recipes

ROOT = Path(__file__).parents[1]
EVERY = every_command()
#: Commands with flags that are fields of TRL's configurations.
WITH_FIELDS = (*METHODS, "score", "check")
#: Words -> exit status, and the seconds that they may take on a busy machine.
LIGHT = {
    "": (2, 5),
    "--help": (0, 5),
    "--version": (0, 5),
    "sfft": (2, 5),
    "recipes": (0, 5),
    "dpo --help": (0, 10),
    "sft --help_all": (0, 10),
    "score --help": (0, 10),
    "dpo --bata 0.2": (2, 10),
    "score --otu x": (2, 10),
    "bench trl --step 3": (2, 5),
    "plan --memori 24GiB": (2, 5),
    "bench --help": (0, 5),
    "sft": (2, 5),
    "sft --config dop": (2, 10),
    "completion bash": (0, 20),
}


@pytest.mark.parametrize("words", LIGHT)
def test_what_needs_no_torch_imports_none(words):
    """And takes seconds at most even where two tests share a core; `python tests/console_times.py` prints the times."""
    if words.split()[:1] != ["--version"] and {"dpo", "sft", "score", "completion"} & {*words.split()}:
        pytest.importorskip("trl")
    status, limit = LIGHT[words]
    heavy = "{'torch', 'transformers', 'trl', 'accelerate', 'numpy'} & {*sys.modules}"
    script = f"import sys; from fusedalign.cli import main; s = main({words.split()!r}); sys.exit({heavy} or s)"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    assert time.monotonic() - start < limit
    assert "{'" not in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    if not words.startswith("completion"):
        assert max(map(len, done.stdout.splitlines()), default=0) <= WIDTH


#: Words that are wrong, as the console knows without torch.
WRONG = (
    "bench logpz",
    "bench --dtype bf17",
    "bench --impls vllm",
    "bench --cases llama",
    "bench --profile ours",
    "bench trl ppo",
    "bench trl --sizes 7b",
    "bench trl --impl cuda",
    "bench microbatches --rows vllm",
    "bench microbatches --count 0",
    "bench sharded --case llama",
    "bench sharded --ranks 1",
    "bench scaling --head gpt",
    "bench scaling --ranks 12",
    "bench score --mixes code",
    "bench score --size 7b",
    "check dop",
    "check --config dop",
    "completion tcsh",
    "demo fast",
    "env fast",
    "merge",
    "plan --method ppo",
    "plan",
    "recipes dop",
    "support",
)


def test_no_help_and_no_wrong_word_of_any_command_imports_torch():
    """All in one process, so that it is quick; the first that imports torch is named."""
    words = dict.fromkeys(WRONG, 2)
    for name in EVERY:
        if find_spec("trl") is not None or name not in WITH_FIELDS:
            words |= {f"{name} --help": 0, f"{name} --nosuch": 2}
    script = f"""
import sys
from fusedalign.cli import main
for words, status in {words!r}.items():
    assert main(words.split()) == status, words
    heavy = {{"torch", "transformers", "trl", "accelerate", "numpy"}} & {{*sys.modules}}
    assert not heavy, (words, heavy)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == list(words.values()).count(2)


def test_the_version_is_printed(capsys):
    for word in ("--version", "-V"):
        assert main([word]) == 0
        assert capsys.readouterr().out == f"fusedalign {fusedalign.__version__}\n"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("benhc", "bench"),
        ("--versoin", "--version"),
        ("bench --case tiny", "--cases"),
        ("bench trl --sizs tiny", "--sizes"),
        ("env --jsn", "--json"),
        ("merge --outt x", "--out"),
        ("recipes dop", "dpo"),
        ("sft --learning-rat 1", "--learning-rate"),
        ("score --otu x", "--out"),
    ],
)
def test_a_misspelt_name_gets_a_suggestion(capsys, words, hint):
    if words.split()[0] in METHODS or words.startswith("score"):
        pytest.importorskip("trl")
    assert main(words.split()) == 2
    assert f"; did you mean {hint}?" in capsys.readouterr().err


def test_nothing_is_suggested_for_what_is_unlike_all_names():
    assert suggestion("xyz", ["sft", "dpo"]) == ""
    assert unknown_flag("--xyz", ["--beta"], "flags") == "expected flags, got the unknown --xyz"


def test_help_follows_and_precedes_a_command(capsys):
    assert main(["help", "recipes"]) == 0
    text = capsys.readouterr().out
    assert main(["recipes", "--help"]) == 0
    assert text == capsys.readouterr().out
    assert "usage: fusedalign recipes" in text


@pytest.mark.parametrize("width", [60, WIDTH])
def test_every_help_has_the_width_of_the_terminal_and_begins_with_its_usage(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    for words in ("", *EVERY):
        if find_spec("trl") is not None or words not in WITH_FIELDS:
            assert main([*words.split(), "--help"]) == 0
            text = capsys.readouterr().out
            assert text.startswith(f"usage: fusedalign {words}")
            for line in text.splitlines():
                assert len(line) <= width or len(line.split()) <= 2, line  # a long name is not broken


def test_the_list_of_recipes_fits_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["recipes"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 60


def test_the_usage_lists_every_command_and_sub_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for words in EVERY:
        assert re.search(rf"^  {words} ", text, re.MULTILINE), words


# Names read from sources


def spellings(parser):
    return {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}


@pytest.mark.parametrize("words", [words for words in EVERY if words not in WITH_FIELDS])
def test_the_flags_of_a_command_are_those_of_its_parser(monkeypatch, words):
    parsers, parse = [], CommandParser.parse
    monkeypatch.setattr(CommandParser, "parse", lambda self, argv: parsers.append(self) or parse(self, argv))
    assert main([*words.split(), "--help"]) == 0
    (parser,) = parsers
    assert command_flags(words, EVERY[words]) == spellings(parser)


@pytest.mark.parametrize("name", [*METHODS, "score"])
def test_fields_read_from_sources_are_those_of_the_parser(name):
    """Names in order, all spellings, help texts and defaults, also where bases and our own options define them."""
    pytest.importorskip("trl")
    from fusedalign.score.command import _parser
    from fusedalign.trl.arguments import method_parser
    from fusedalign.trl.fields import score_fields, training_fields

    parser = _parser() if name == "score" else method_parser(name)
    fields = score_fields() if name == "score" else training_fields(name)
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest != "help"}
    assert list(fields.every) == [x for x in dict.fromkeys(a.dest for a in parser._actions) if x != "help"]
    assert fields.flags == spellings(parser) - {"--help"}
    for field in fields.every.values():
        assert field.help == (actions[field.name].help or "")
        assert (field.default or None) == (actions[field.name].default or None), field.name


def test_the_flags_of_the_launcher_are_those_of_its_parser():
    pytest.importorskip("trl")
    from fusedalign.trl.arguments import launch_flags
    from fusedalign.trl.fields import launcher_flags

    assert launcher_flags() == launch_flags()


def test_classes_of_unlike_sources_are_imported(monkeypatch):
    pytest.importorskip("trl")
    from fusedalign.trl import fields

    known = fields.training_fields("dpo")
    monkeypatch.setattr(fields, "_CONFIGS", ("trl/elsewhere/{0}.py",))
    imported = fields.training_fields("dpo")
    assert list(imported.every) == list(known.every)
    assert imported.flags == known.flags
    assert imported.own == known.own


# The lazy package


def test_the_public_names_are_those_of_the_modules():
    from fusedalign import losses

    assert {*losses.__all__} <= {*fusedalign.__all__}
    assert {*fusedalign.__all__} <= {*dir(fusedalign)}
    for name in fusedalign.__all__:
        assert getattr(fusedalign, name) is not None
    assert fusedalign.dpo_loss is losses.dpo_loss
    with pytest.raises(AttributeError, match="has no attribute 'logits'"):
        _ = fusedalign.logits


def test_submodules_are_attributes_and_importing_the_package_imports_no_torch():
    script = """
import sys, fusedalign
assert "torch" not in sys.modules
for name in ("losses", "head", "sequence", "impls", "ops", "problem", "modules"):
    assert getattr(fusedalign, name).__name__ == f"fusedalign.{name}"
from fusedalign import *
assert linear_logps is fusedalign.linear_logps
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


# Recipes


def test_recipes_are_listed_and_printed_as_they_are(capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert {path.name for path in recipes().values()} == {
        path.name for path in (ROOT / "recipes").iterdir() if path.suffix in (".yaml", ".py")
    }
    for name, path in recipes().items():
        assert re.search(rf"^{name} +\S", listed, re.MULTILINE)
        assert main(["recipes", name]) == 0
        assert capsys.readouterr().out == path.read_text()


def test_a_file_comes_before_a_recipe_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_path("dpo") == str(recipes()["dpo"])
    (tmp_path / "dpo").mkdir()
    assert config_path("dpo") == str(recipes()["dpo"])
    (tmp_path / "sft").write_text("seed: 1\n")
    assert config_path("sft") == "sft"
    with pytest.raises(FileNotFoundError, match=r"or a recipe .*, got custom_loop"):
        config_path("custom_loop")
    for name in ("dop", "recipes/dpo.yml"):
        with pytest.raises(FileNotFoundError, match=f"got {name}; did you mean dpo?"):
            config_path(name)


@pytest.mark.parametrize("form", ["--config kto", "--config=kto"])
def test_a_recipe_is_a_configuration_by_name(tmp_path, monkeypatch, form):
    pytest.importorskip("trl")
    from fusedalign.trl.arguments import parse

    monkeypatch.chdir(tmp_path)
    arguments = parse("kto", [*form.split(), "--max_steps=3", "--output_dir", str(tmp_path)])
    assert (arguments.model.model_name_or_path, arguments.training.max_steps) == ("embedded", 3)


@pytest.mark.slow
def test_a_recipe_trains_in_an_empty_folder_and_prints_no_bars(tmp_path):
    pytest.importorskip("trl")
    words = ["sft", "--config", "sft", "--max_steps", "2", "--eval_strategy", "no", "--use_cpu", "true"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "fusedalign", *words],
        capture_output=True, cwd=tmp_path, env=environment, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "sft" / "model.safetensors").is_file()
    for stream in (done.stdout, done.stderr):
        assert b"\r" not in stream
        assert b"\x1b" not in stream


# Completion and reports


#: What is typed -> what bash offers.
TYPED = {
    "bench tr": "trl",
    "bench trl --st": "--steps",
    "dpo --beta 0.1 --max_st": "--max_steps",
    "dpo --config simp": "simpo",
    "recipes cust": "custom_loop",
    "completion z": "zsh",
    "check kt": "kto",
    "check dpo_mu": "dpo_multi_gpu",
    "check scor": "",
    "ver": "",
}


def test_bash_completes_commands_sub_commands_flags_and_recipes(tmp_path):
    pytest.importorskip("trl")
    script = [f"source <({sys.executable} -m fusedalign completion bash)"]
    for words in ("", *TYPED):
        typed = ["fusedalign", *words.split(" ")]
        script.append(f"COMP_WORDS=({' '.join(map(repr, typed))}); COMP_CWORD={len(typed) - 1}")
        script.append('_fusedalign; echo "${COMPREPLY[@]}"')
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = ["bash", "-c", "\n".join(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment)
    assert done.stderr == ""
    commands, *others = done.stdout.splitlines()
    assert {*commands.split()} == {*COMMANDS, "--version", "--help"}
    assert others == list(TYPED.values())


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_get_every_flag(capsys, shell):
    pytest.importorskip("trl")
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    for word in (*EVERY, "gradient_accumulation_steps", "simpo", "count"):
        assert word.split()[-1] in text


def test_the_json_of_env_names_versions_and_impls_and_no_secret(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main(["env", "--json"]) == 0
    text = capsys.readouterr().out
    facts = json.loads(text, parse_constant=pytest.fail)
    import torch

    assert (facts["fusedalign"], facts["torch"]["version"]) == (fusedalign.__version__, torch.__version__)
    assert {"python", "platform", "packages", "devices", "driver", "impls", "auto"} <= facts.keys()
    assert len(facts["devices"]) == torch.cuda.device_count()
    (row,) = (row for row in facts["impls"] if row["impl"] == "pytorch")
    assert row["available"]
    assert "hf_secret" not in text
    assert main(["env"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= WIDTH


def test_bench_prints_100_columns_and_all_with_wide(capsys):
    argv = ["bench", "sft", "--cases", "N=8,D=8,V=50", "--impls", "pytorch,eager,liger-fused"]
    titles = {}
    for words in ([], ["--wide"]):
        assert main([*argv, *words]) == 0
        out = capsys.readouterr().out
        titles[len(words)] = next(line for line in out.splitlines() if line.startswith("| impl"))
        if not words:
            assert max(map(len, out.splitlines())) <= WIDTH
            assert "\n* liger-fused: " in out or "| liger-fused | -" not in out
    for title in ("fwd U", "fwd MiB", "loss err."):
        assert title in titles[1]
        assert title not in titles[0]


def test_a_message_is_one_line_that_ends_with_a_word_where_it_can():
    from fusedalign.commandline import one_line

    assert one_line(ValueError("one\n  two three ")) == "one two three"
    assert one_line("one two three", 13) == "one two three"
    assert one_line("one two three", 12) == one_line("one two three", 11) == "one two ..."
    assert one_line("abcdefgh", 7) == "abc ..."


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("argument --beta/-b: invalid float value: 'x'", "--beta must be a number, got 'x'"),
        ("argument --max_steps/--max-steps: invalid int value: '2.5'", "--max_steps must be an integer, got '2.5'"),
        ("argument --a: invalid choice: 'xz' (choose from 'xy', 'b')", "--a must be one of xy, b, got 'xz'"),
        (
            "argument --a: invalid choice: 'on' (choose from one, two)",
            "--a must be one of one, two, got 'on'; did you mean one?",
        ),
        ("argument --seed: expected one argument", "--seed: expected one argument"),
    ],
)
def test_errors_of_the_parser_say_what_was_expected_and_what_came(message, error):
    from fusedalign.commandline import argument_error

    assert argument_error(message) == error


def test_folded_lines_keep_flags_whole_below_the_end_of_their_start():
    from fusedalign.commandline import fold

    assert fold("a --per-device flag", "name  ", width=18) == ["name  a", "      --per-device", "      flag"]
    assert fold("one two", indent=2, width=5) == ["one", "  two"]
    assert fold("", "name  ") == ["name"]
