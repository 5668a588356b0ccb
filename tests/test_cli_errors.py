"""Wrong arguments end with one line that says what was expected, and exit code 2."""

import functools
import json
import re

import pytest

from fusedalign.cli import main
from fusedalign.recipes import configurations

pytest.importorskip("trl")

METHODS = ["sft", "dpo", "kto", "cpo", "simpo", "orpo"]


def error_of(capsys, argv):
    """The one line on stderr."""
    assert main(argv) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("fusedalign: "))
    return line.removeprefix("fusedalign: error: ").removesuffix(" (--debug shows the traceback)")


FILES = {
    "broken": ("a: [1\nb: 2\n", "--config must name a valid YAML file, got FILE line 2: expected ',' or ']'"),
    "tab": ("a:\n\tb: 2\n", "--config must name a valid YAML file, got FILE line 2: found character"),
    "twice": (
        "seed: 1\nbeta: 2\nseed: 3\n",
        "--config must name a valid YAML file, got FILE line 3: seed occurs twice",
    ),
    "list": ("- 1\n", "--config must name a YAML file of `field: value` lines, got FILE"),
    "empty": ("", "--config must name a YAML file of `field: value` lines, got FILE"),
    "number as a name": ("1: 2\n", "--config must name a YAML file of `field: value` lines, got FILE"),
    "list for a number": ("learning_rate: [1, 2]\n", "learning_rate in FILE must be one value, got the list [1, 2]"),
    "list for text": ("output_dir: [a]\n", "output_dir in FILE must be one value, got the list ['a']"),
    "no list for a number": ("seed: []\n", "seed in FILE must be one value, got the list []"),
    "mapping for text": ("output_dir: {a: 1}\n", "output_dir in FILE must be one value, got the mapping {'a': 1}"),
    "text in a list of numbers": ("loss_weights: [1, much]\n", "loss_weights in FILE must be a number, got 'much'"),
    "mapping for a number": ("seed: {a: 1}\n", "seed in FILE must be one value, got the mapping {'a': 1}"),
    "fraction of a step": ("max_steps: 2.5\n", "max_steps in FILE must be an integer, got '2.5'"),
    "text for a number": ("max_steps: ten\n", "max_steps in FILE must be an integer, got 'ten'"),
    "text for a switch": ("bf16: maybe\n", "bf16 in FILE: Truthy value expected: got maybe"),
    "bare no": (
        "save_strategy: no\n",
        "save_strategy in FILE must not be false, which is also how YAML reads a bare no",
    ),
    "nothing": ("learning_rate:\n", "learning_rate in FILE must have a value, got nothing"),
    "no choice": ("dtype: float8\n", "got 'float8'; did you mean float"),
    "unknown": ("learning_rat: 1\n", "in FILE, got the unknown --learning_rat; did you mean --learning_rate?"),
    "hyphens": ("learning-rate: 1\n", "in FILE, got the unknown --learning-rate; did you mean --learning_rate?"),
    "environment": ("env: 3\n", "env in FILE must hold `NAME: value` lines, got 3"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("form", ["--config FILE", "--config=FILE"])
def test_a_bad_configuration_file_is_a_one_line_error(tmp_path, capsys, name, form):
    text, message = FILES[name]
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    error = error_of(capsys, ["dpo", *form.replace("FILE", str(file)).split()])
    assert message.replace("FILE", str(file)) in error


def test_a_file_that_is_not_a_configuration_is_a_one_line_error(tmp_path, capsys):
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00a")
    assert f"in UTF-8, got {binary} with other bytes" in error_of(capsys, ["sft", "--config", str(binary)])
    assert f"got the folder {tmp_path}" in error_of(capsys, ["sft", f"--config={tmp_path}"])
    names = ", ".join(configurations())
    error = error_of(capsys, ["sft", "--config=nowhere.yaml"])
    assert f"a YAML file that exists or a recipe ({names}), got nowhere.yaml" in error
    assert "must be given once, got a and b" in error_of(capsys, ["sft", "--config", "a", "--config=b"])


WORDS = {
    "--confg x.yaml": "got the unknown --confg; did you mean --config?",
    "--confg=x.yaml": "got the unknown --confg; did you mean --config?",
    "recipe.yaml": "expected --field value pairs, got 'recipe.yaml'; did you mean --config recipe.yaml?",
    "--seed 3 4": "expected --field value pairs, got '4'",
    "-lr 1": "expected --field value pairs, got '-lr'",
    "--learning_rat=1": "got the unknown --learning_rat; did you mean --learning_rate?",
    "--torch_dtype bfloat16": "got the unknown --torch_dtype; did you mean --dtype?",
    "--num_process 2": "got the unknown --num_process; did you mean --num_processes?",
    "--dtype float8": "--dtype must be one of auto, bfloat16, float16, float32, got 'float8'",
    "--max_steps 2.5": "--max_steps must be an integer, got '2.5'",
    "--seed": "expected one argument",
    "--model_init_kwargs {broken": "model_init_kwargs must be JSON, got '{broken'",
    "--gradient_accumulation_steps 0": "gradient_accumulation_steps must be at least 1, got 0",
    "--per_device_eval_batch_size -2": "per_device_eval_batch_size must be at least 1, got -2",
    "--num_train_epochs 0": "num_train_epochs must be above 0 where max_steps is not, got 0",
    "--accelerate_config=nowhere": "accelerate_config must be a file that exists or one of fsdp1, fsdp2,",
    "--accelerate-config nowhere": "accelerate_config must be a file that exists or one of fsdp1, fsdp2,",
    "--accelerate_config .": "accelerate_config must be a file that exists or one of fsdp1, fsdp2,",
    "--model_name_or_path runs/nowhere/sft": "got runs/nowhere/sft; if a training is to write it, run that first: "
    "fusedalign sft ... --output_dir runs/nowhere/sft",
    "--model_name_or_path runs/sft": "got runs/sft: there is no such folder here, and the Hub has no such model or "
    "cannot be reached; if a training is to write it, run that first: fusedalign sft ... --output_dir runs/sft",
    "--model_name_or_path org/name": "got org/name: there is no such folder here, and the Hub has no such model",
    "--model_name_or_path mine.jsonl": "model_name_or_path must name a folder, got the file mine.jsonl",
    "--output_dir mine.jsonl": "output_dir must be a folder that can be written to, got mine.jsonl (File exists)",
    "--output_dir mine.jsonl/out": "output_dir must be a folder that can be written to, got mine.jsonl/out (Not a dir",
    "--model_name_or_path checkpoints": "with checkpoint-10, checkpoint-9; the last checkpoint in it is "
    "checkpoints/checkpoint-10",
}


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("method", ["sft", "dpo", "orpo"])
def test_bad_arguments_are_a_one_line_error(tmp_path, monkeypatch, capsys, method, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row) + "\n")
    for step in (9, 10):
        (tmp_path / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
    assert WORDS[words] in error_of(capsys, [method, *words.split(), "--dataset_name=mine.jsonl"])


@pytest.mark.parametrize("method", METHODS)
def test_every_command_takes_both_forms_of_a_flag(tmp_path, method):
    from fusedalign.trl.arguments import parse

    file = tmp_path / "mine.yaml"
    file.write_text("seed: 3\nmax_steps: 7\nlearning_rate: 1e-4\n")
    for form in (["--config", str(file)], [f"--config={file}"]):
        for flag in (["--seed", "5"], ["--seed=5"], ["--seed=4", "--seed", "5"]):
            training = parse(method, [*flag, *form]).training
            assert (training.seed, training.max_steps, training.learning_rate) == (5, 7, 1e-4)


def test_valid_values_in_a_file_are_accepted(tmp_path):
    """Lists, mappings, numbers as text, null for optional fields, and text as numbers."""
    from fusedalign.trl.arguments import parse

    file = tmp_path / "mine.yaml"
    file.write_text(
        "run_name: 2024\nhub_model_id: '{mine}'\nmax_length:\nloss_type: [sigmoid, sft]\nloss_weights: [1, 0.5]\n"
        "report_to: none\nmodel_init_kwargs: {use_cache: false}\nlora_target_modules: all-linear\nbeta: 1\n"
        "save_strategy: 'no'\nlogging_steps: 0.5\nload_in_4bit: false\ndisable_dropout: no\n"
    )
    arguments = parse("dpo", ["--config", str(file)])
    training = arguments.training
    assert (training.run_name, training.max_length, training.loss_type) == ("2024", None, ["sigmoid", "sft"])
    assert (training.loss_weights, training.model_init_kwargs) == ([1.0, 0.5], {"use_cache": False})
    assert (training.beta, training.save_strategy, training.logging_steps) == (1.0, "no", 0.5)
    assert (training.disable_dropout, training.hub_model_id) == (False, "{mine}")
    assert arguments.model.lora_target_modules == "all-linear"


@pytest.mark.parametrize("words", ["q_proj", "q_proj v_proj", "all-linear"])
def test_target_modules_accept_names(words):
    """TRL turns a single name into a pattern that matches no module."""
    from fusedalign.trl.arguments import parse

    modules = parse("sft", ["--lora_target_modules", *words.split()]).model.lora_target_modules
    assert modules == ("all-linear" if words == "all-linear" else words.split())


@pytest.mark.parametrize("method", ["sft", "dpo", "kto", "orpo"])
def test_bf16_is_off_where_no_accelerator_has_it(monkeypatch, capsys, method):
    from fusedalign.trl import arguments

    for name in ("is_torch_bf16_gpu_available", "is_torch_xla_available"):
        monkeypatch.setattr(arguments, name, lambda: False)
    assert arguments.parse(method, []).training.bf16 is False
    assert arguments.parse(method, ["--bf16", "true", "--use_cpu"]).training.bf16 is True
    for flag in ("--bf16", "--bf16_full_eval"):
        error = error_of(capsys, [method, flag, "true"])
        assert error.startswith("bf16 must be false where no accelerator has it, got true")
    monkeypatch.setattr(arguments, "is_torch_bf16_gpu_available", lambda: True)
    assert arguments.read_words(arguments.method_parser(method), []).values.bf16 is None  # TRL's default


def test_long_messages_are_truncated(monkeypatch, capsys):
    def fail(argv):
        raise ValueError("expected this,\n\n  got " + "that and " * 200)

    monkeypatch.setattr("fusedalign.envcommand.env_command", fail)
    error = error_of(capsys, ["env"])
    assert error.startswith("expected this, got that and that")
    assert error.endswith("that and ...")
    assert len(error) <= 400


def test_empty_messages_and_missing_packages_are_explained(monkeypatch, capsys):
    def fail(argv, error):
        raise error

    for raised, message in (
        (StopIteration(), "StopIteration, without a message"),
        (ModuleNotFoundError("No module named 'trl'", name="trl"), "this command needs: pip install 'fusedalign[trl]'"),
        (ModuleNotFoundError("No module named 'wandb'", name="wandb"), "ModuleNotFoundError: No module named 'wandb'"),
    ):
        monkeypatch.setattr("fusedalign.envcommand.env_command", functools.partial(fail, error=raised))
        error = error_of(capsys, ["env"])
        assert message in error
        assert ("pip install" in error) == ("'trl'" in error)


def test_bench_checks_its_output_folder_first(tmp_path, monkeypatch, capsys):
    from fusedalign.bench import runner, stage

    def measured(*args, **kwargs):
        raise AssertionError("it was measured first")

    monkeypatch.setattr(runner, "run", measured)
    monkeypatch.setattr(stage, "Stage", measured)
    (tmp_path / "file").write_text("")
    for words in (["logps"], ["microbatches"]):
        error = error_of(capsys, ["bench", *words, "--out", str(tmp_path / "file" / "out")])
        assert re.match("--out must be a folder that can be written to, got .*/file/out \\(Not a directory\\)", error)
