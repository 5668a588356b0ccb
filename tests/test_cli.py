"""The command line from end to end: training on new folders and files, and one-line errors."""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

from fusedalign.cli import COMMANDS, main


def test_env_prints_the_table_of_impls(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    rows = [line.split() for line in out.splitlines()]
    assert ["pytorch", "yes", "yes"] in [row[:3] for row in rows]
    assert ["reference", "yes", "no"] in [row[:3] for row in rows]


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    assert "usage: fusedalign" in capsys.readouterr().out
    assert main([]) == 2


def test_a_command_without_arguments_prints_its_help(capsys):
    assert main(["demo", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: fusedalign demo [-h]\n\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["ppo"], f"command must be one of {', '.join(COMMANDS)}, got 'ppo'; did you mean "),
        (["env", "now"], "expected flags of fusedalign env, got the unknown now"),
        (["demo", "fast"], "demo takes no arguments, got fast"),
    ],
)
def test_bad_commands_exit_2(capsys, argv, message):
    assert main(argv) == 2
    assert message in capsys.readouterr().err


@contextlib.contextmanager
def closed_pipe(monkeypatch):
    """Redirect standard output into a pipe whose reading end is closed, as after `| head`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        yield


@pytest.mark.parametrize("argv", [["env"], ["--help"], ["bench", "--help"], []])
def test_a_closed_pipe_prints_no_error(capsys, monkeypatch, argv):
    """The exit status is that of a program ended by SIGPIPE."""
    with closed_pipe(monkeypatch):
        assert main(argv) == 141
    assert capsys.readouterr().err == ""


def test_a_pipe_closed_halfway_prints_no_error(capsys, monkeypatch):
    """The output exceeds the buffer, so the command itself writes to the closed pipe."""
    lines = "one line more\n" * 1000
    monkeypatch.setattr("fusedalign.envcommand.env_command", lambda argv: print(lines))
    with closed_pipe(monkeypatch):
        assert main(["env"]) == 141
    assert capsys.readouterr().err == ""


def test_a_broken_pipe_other_than_stdout_is_an_error(capsys, monkeypatch):
    def command(argv):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("fusedalign.envcommand.env_command", command)
    assert main(["env"]) == 2
    assert "fusedalign: error: [Errno 32] Broken pipe" in capsys.readouterr().err


def test_env_piped_into_head_prints_no_error():
    """In a separate process, where the interpreter flushes the rest of the output at exit."""
    command = f"{shlex.quote(sys.executable)} -m fusedalign env | head -n 1"
    process = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert process.stdout.startswith("python")
    assert process.stderr == ""


trl = pytest.importorskip("trl")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A model folder unlike the shipped one: another family, another tokenizer, no chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models")
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {chr(c): i for i, c in enumerate(range(32, 127), 3)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    LlamaModel(config).save_pretrained(folder / "headless")
    for name in ("llama", "headless"):
        tokenizer.save_pretrained(folder / name)
    (folder / "empty").mkdir()
    (folder / "empty" / "notes.txt").write_text("nothing here")
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(n=12):
    return [
        {"prompt": f"Count to {i}. ", "chosen": "one " * (i % 4 + 1), "rejected": "no" * (i % 3 + 1)} for i in range(n)
    ]


def flags(tmp_path, llama, name="llama", **options):
    options = {
        "model_name_or_path": str(llama / name),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "use_cpu": "true",
        **options,
    }
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_dpo_trains_a_new_model_folder_on_a_new_file(tmp_path, llama, capsys, kind):
    file = write(tmp_path / "mine.jsonl", pairs())
    if kind == "parquet":
        from datasets import Dataset

        file = str(tmp_path / "mine.parquet")
        Dataset.from_list(pairs()).to_parquet(file)
    argv = ["dpo", "--config", "recipes/dpo.yaml", *flags(tmp_path, llama, dataset_name=file, logging_steps=1)]
    assert main(argv) == 0, capsys.readouterr().err
    printed, out = capsys.readouterr().out.splitlines(), tmp_path / "out"
    files = f"model: {out}  metrics: {out / 'metrics.jsonl'}  plot: {out / 'metrics.png'}"
    assert f"{files}  record: {out / 'run.json'}  card: {out / 'README.md'}" in printed
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert "rewards/margins" in rows[0]
    assert (out / "metrics.png").read_bytes().startswith(b"\x89PNG")
    from transformers import AutoModelForCausalLM

    before, after = (AutoModelForCausalLM.from_pretrained(p).lm_head.weight for p in (llama / "llama", out))
    assert not torch.equal(before, after)


def test_simpo_is_cpo_with_the_simpo_loss_and_flags_override_it():
    from fusedalign.trl.arguments import parse

    training = parse("simpo", ["--output_dir", "out", "--bf16", "false"]).training
    assert (training.loss_type, training.cpo_alpha, training.beta) == ("simpo", 0.0, 2.0)
    assert parse("simpo", ["--output_dir", "out", "--bf16", "false", "--cpo_alpha", "0.5"]).training.cpo_alpha == 0.5


def test_the_flags_of_the_head_reach_the_trainer(tmp_path, llama):
    from fusedalign.trl import HeadOptions
    from fusedalign.trl.arguments import parse
    from fusedalign.trl.train import build

    file = write(tmp_path / "mine.jsonl", pairs(4))
    config = tmp_path / "mine.yaml"
    config.write_text("fused_workspace: 12345\nfused_impl: reference\n")
    argv = ["--config", str(config), *flags(tmp_path, llama, dataset_name=file, bf16="false")]
    trainer = build("dpo", parse("dpo", [*argv, "--fused_impl", "pytorch"]))
    assert type(trainer).__name__ == "FusedDPOTrainer"
    assert trainer.head_options == HeadOptions("pytorch", None, 12345)


@pytest.mark.parametrize("method", ["sft", "dpo", "kto", "cpo", "simpo", "orpo"])
def test_training_help_is_short_and_names_the_main_flags(capsys, monkeypatch, method):
    monkeypatch.setenv("COLUMNS", "100")  # the width of the terminal
    assert main([method, "--help"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 120
    assert all(len(line) <= 100 for line in text.splitlines())
    for flag in (
        "--model_name_or_path",
        "--fused_impl",
        "--max_length",
        "--help_all",
        "  last: go on",
        "--num_processes",
    ):
        assert flag in text
    assert f"--config {method} " in text
    if method != "sft":
        assert "--beta" in text


def test_help_all_lists_every_field(capsys):
    assert main(["sft", "--help_all"]) == 0
    assert "--adam_beta1" in capsys.readouterr().out


def test_a_mixture_of_data_sets_trains(tmp_path, llama, capsys):
    """`datasets`, TRL's DatasetMixtureConfig."""
    files = [write(tmp_path / f"{name}.jsonl", pairs(4)) for name in "ab"]
    config = tmp_path / "mine.yaml"
    config.write_text("datasets:\n" + "".join(f"  - path: json\n    data_files: {file}\n" for file in files))
    argv = ["orpo", "--config", str(config), *flags(tmp_path, llama, bf16="false", report_to="none")]
    assert main(argv) == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_accelerate_config_relaunches_the_command(tmp_path, llama, monkeypatch, capsys):
    """From a flag or a file; the launched process has the environment of `accelerate launch` and trains."""
    from fusedalign.trl import launch as module

    calls = []

    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(module, "_run", lambda command, variables: calls.append(command) or 0)
    monkeypatch.setattr(module.torch.accelerator, "device_count", lambda: 8)
    config = tmp_path / "mine.yaml"
    config.write_text("accelerate_config: multi_gpu\nlearning_rate: 0.1\n")
    assert main(["dpo", "--config", str(config)]) == 0
    assert main(["sft", "--accelerate_config", "fsdp2", "--seed", "3"]) == 0
    (first, second) = calls
    assert first[1:4] == ["-m", "fusedalign.trl.launcher", "--config_file"]
    assert first[4].endswith("multi_gpu.yaml")
    assert first[5:] == ["-m", "fusedalign", "dpo", "--config", str(config)]
    assert second[5:] == ["-m", "fusedalign", "sft", "--accelerate_config", "fsdp2", "--seed", "3"]
    assert main(["sft", "--accelerate_config", "no_such"]) == 2
    assert "accelerate_config must be a file that exists or one of fsdp1, fsdp2," in capsys.readouterr().err


@pytest.mark.slow
def test_accelerate_config_launches_a_real_process(tmp_path, llama):
    config = tmp_path / "cpu.yaml"
    config.write_text("distributed_type: 'NO'\nuse_cpu: true\nnum_processes: 1\nmixed_precision: 'no'\n")
    argv = [*flags(tmp_path, llama, dataset_name=write(tmp_path / "mine.jsonl", pairs(4)), bf16="false")]
    command = [sys.executable, "-m", "fusedalign", "orpo", *argv, "--accelerate_config", str(config)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_sft_trains_and_evaluates_a_folder_of_splits(tmp_path, llama, capsys):
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"prompt": f"{i}: ", "completion": "yes " * (i % 3 + 1)} for i in range(8)]
    write(data / "train.jsonl", rows)
    write(data / "test.jsonl", rows[:4])
    argv = ["sft", "--config", "recipes/sft.yaml", *flags(tmp_path, llama, dataset_name=data, num_train_epochs=1)]
    assert main(argv) == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert any("eval_loss" in line for line in lines)


MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "completion": "b"}),
        ({"chosen": "a b", "rejected": "a c"}, {"text": "a b"}),
        ({"chosen": MESSAGES, "rejected": MESSAGES[:1]}, {"messages": MESSAGES}),
        ({"prompt": "a", "completion": "b", "chosen": "x"}, {"prompt": "a", "completion": "b"}),
    ],
)
def test_sft_learns_the_chosen_side_of_preference_data(row, columns):
    from datasets import Dataset

    from fusedalign.trl.data import served

    assert served(Dataset.from_list([row, row]), "sft", "mine.jsonl")[0] == columns


def test_sft_trains_on_a_preference_file(tmp_path, llama, capsys):
    file = write(tmp_path / "mine.jsonl", pairs())
    assert main(["sft", *flags(tmp_path, llama, dataset_name=file, bf16="false", report_to="none")]) == 0, (
        capsys.readouterr().err
    )
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_fields_override_the_recipe_and_reach_the_trainer(tmp_path):
    from fusedalign.trl.arguments import parse

    argv = ["--config", "recipes/dpo.yaml", "--beta", "0.25", "--output_dir", str(tmp_path)]
    arguments = parse("dpo", argv)
    assert arguments.training.beta == 0.25
    assert arguments.training.loss_type == ["sigmoid"]  # from the recipe
    assert arguments.script.dataset_name == "recipes/data/preferences"


BAD = {
    "config file": (["--config", "nowhere.yaml"], "nowhere.yaml"),
    "config without a file": (["--config"], "--config must be followed by a YAML file, got nothing"),
    "field": (["--bata", "0.2"], "got the unknown --bata; did you mean --beta?"),
    "value": (["--beta", "much"], "--beta must be a number, got 'much'"),
    "no model": ([], "model_name_or_path must name a model folder, a Hub model or 'embedded', got nothing"),
    "missing folder": (["--model_name_or_path", "./nowhere"], "must name a folder that exists, got ./nowhere"),
    "missing file": (
        ["--dataset_name", "nowhere.jsonl"],
        "dataset_name must name a file or folder that exists, got nowhere",
    ),
    "odd file": (
        ["--dataset_name", "README.md"],
        "dataset_name must be a .jsonl, .json, .parquet, .csv or .arrow file",
    ),
    "split": (["--dataset_train_split", "valid"], "(train), got 'valid'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_2(tmp_path, capsys, name):
    argv, message = BAD[name]
    data = write(tmp_path / "mine.jsonl", pairs())
    base = ["--dataset_name", data, "--output_dir", str(tmp_path / "out"), "--bf16", "false"]
    assert main(["dpo", *base, *argv]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fusedalign: ")]
    assert len(err) == 1
    assert message in err[0]


def test_an_unknown_field_in_the_file_is_an_error(tmp_path, capsys):
    config = tmp_path / "mine.yaml"
    config.write_text("bta: 0.2\n")
    assert main(["dpo", "--config", str(config)]) == 2
    assert "got the unknown --bta; did you mean --beta?" in capsys.readouterr().err


def test_data_without_the_columns_are_an_error(tmp_path, llama, capsys):
    file = write(tmp_path / "mine.jsonl", [{"question": "a", "answer": "b"}])
    for method, expected in (
        ("dpo", "chosen+rejected"),
        ("sft", "input_ids or prompt+completion or messages or conversations or text or chosen"),
        ("kto", "prompt+completion+label or chosen+rejected"),
    ):
        assert main([method, *flags(tmp_path, llama, dataset_name=file, bf16="false")]) == 2
        message = f"data set for {method} must have the columns {expected}, got {file} with question, answer"
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("headless", "model_name_or_path must name a causal LM with an LM head, got"),
        ("empty", "model_name_or_path must be a folder with a config.json or adapter_config.json, got"),
    ],
)
def test_a_folder_without_a_model_or_head_is_an_error(tmp_path, llama, capsys, name, message):
    file = write(tmp_path / "mine.jsonl", pairs())
    assert main(["dpo", *flags(tmp_path, llama, name, dataset_name=file, bf16="false")]) == 2
    assert message in capsys.readouterr().err


def test_tracebacks_are_printed_only_on_request(tmp_path, capsys):
    """Also by the installed command in a separate process."""
    words = ["dpo", "--bata", "1"]
    command = shutil.which("fusedalign", path=os.path.dirname(sys.executable)) or "fusedalign"
    process = subprocess.run([command, *words], capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 2
    assert "Traceback" not in process.stderr
    assert main(words) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert main([*words, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
