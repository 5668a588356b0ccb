"""`fusedalign score` from arguments to files, and `score` in Python."""

import json
import math
import subprocess
import sys

import pyarrow.parquet
import pytest
import torch
import transformers
from datasets import Dataset

from fusedalign.cli import main
from fusedalign.embedded import build_embedded_model
from fusedalign.score import score

PAIRS = [
    {"prompt": f"Question {i}?", "chosen": f" The answer is {'very ' * (i % 4)}good.", "rejected": f" No, not {i}."}
    for i in range(9)
]
TEXTS = [{"text": "Several words that stand one after another. " * (1 + i % 5)} for i in range(7)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(build_embedded_model(tmp_path_factory.mktemp("model") / "m"))


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory):
    return str(build_embedded_model(tmp_path_factory.mktemp("model") / "n", seed=1))


@pytest.fixture(scope="module")
def model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def run(folder, tmp_path, capsys):
    def command(rows, *words, name="data.jsonl", status=0, out="scores.parquet"):
        data = write(tmp_path / name, rows)
        capsys.readouterr()
        argv = ["--model_name_or_path", folder, "--dataset_name", data, "--out", str(tmp_path / out), *words]
        assert main(["score", *argv]) == status, capsys.readouterr().err
        table = tmp_path / out
        return (pyarrow.parquet.read_table(table).to_pylist() if table.exists() else None), capsys.readouterr()

    return command


@torch.no_grad()
def answer_logps(model, tokenizer, prompt, answer):
    """Per-token logps of the answer and its end token, from full logits in fp64."""
    start = tokenizer(prompt)["input_ids"]
    ids = tokenizer(prompt + answer + tokenizer.eos_token)["input_ids"]
    logits = model.double()(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    model.float()
    return [logits[t - 1, ids[t]].item() for t in range(len(start), len(ids))]


def test_pairs_are_scored_like_full_logits(run, model, tokenizer):
    rows, printed = run(PAIRS, "--per_token", "logps", "ranks")
    assert [row["row"] for row in rows] == list(range(9))
    for row, pair in zip(rows, PAIRS, strict=True):
        want = {side: answer_logps(model, tokenizer, pair["prompt"], pair[side]) for side in ("chosen", "rejected")}
        for side, logps in want.items():
            assert row[f"{side}_num_tokens"] == len(logps)
            assert row[f"{side}_logps"] == pytest.approx(sum(logps), abs=1e-3)
            assert row[f"{side}_mean_logps"] == pytest.approx(sum(logps) / len(logps), abs=1e-4)
            assert row[f"{side}_perplexity"] == pytest.approx(math.exp(-sum(logps) / len(logps)), rel=1e-4)
            assert row[f"{side}_token_logps"] == pytest.approx(logps, abs=1e-3)
            assert row[f"{side}_is_greedy"] == all(rank == 0 for rank in row[f"{side}_token_ranks"])
        assert row["margin"] == pytest.approx(sum(want["chosen"]) - sum(want["rejected"]), abs=1e-3)
        assert row["accuracy"] == (row["margin"] > 0)
    assert "accuracy" in printed.out
    assert max(map(len, printed.out.splitlines())) <= 100 or "/" in printed.out


def test_a_run_writes_only_the_scores_and_the_plot(run, tmp_path):
    _, printed = run(PAIRS)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"data.jsonl", "scores.parquet", "scores.png"}
    assert printed.err == ""
    assert f"wrote {tmp_path / 'scores.parquet'}" in printed.out


def test_a_reference_model_adds_rewards(run, other_folder, folder):
    rows, printed = run(PAIRS, "--ref_model", other_folder, "--beta", "0.5")
    for row in rows:
        reward = {side: 0.5 * (row[f"{side}_logps"] - row[f"ref_{side}_logps"]) for side in ("chosen", "rejected")}
        assert row["chosen_reward"] == pytest.approx(reward["chosen"], abs=1e-6)
        assert row["reward_margin"] == pytest.approx(reward["chosen"] - reward["rejected"], abs=1e-6)
        assert row["reward_accuracy"] == (row["reward_margin"] > 0)
    assert "reward" in printed.out
    self_rewards, _ = run(PAIRS, "--ref_model", folder, out="same.parquet")
    assert all(row["reward_margin"] == pytest.approx(0, abs=1e-6) for row in self_rewards)


@pytest.mark.parametrize("stride", [None, 5, 15])
def test_plain_text_is_scored_in_windows(run, model, tokenizer, stride):
    """Each token except the first counts once, with at least max_length - stride tokens (or all) as context."""
    words = ["--max_length", "16", *(["--stride", str(stride)] if stride else [])]
    rows, _ = run(TEXTS, *words)
    for row, text in zip(rows, TEXTS, strict=True):
        ids = tokenizer(text["text"] + tokenizer.eos_token)["input_ids"]
        total, counted = 0.0, 1
        for begin in range(0, len(ids), stride or 8):
            window = ids[begin : begin + 16]
            if begin + len(window) > counted:
                with torch.no_grad():
                    logps = model.double()(input_ids=torch.tensor([window])).logits[0].log_softmax(-1)
                    model.float()
                total += sum(logps[t - 1, window[t]].item() for t in range(counted - begin, len(window)))
                counted = begin + len(window)
        assert row["num_tokens"] == len(ids) - 1
        assert row["logps"] == pytest.approx(total, abs=1e-3)
        assert row["num_bytes"] == len(text["text"].encode())
        assert row["bits_per_byte"] == pytest.approx(-total / math.log(2) / row["num_bytes"], rel=1e-4)


def test_unscorable_rows_are_listed(run, tmp_path):
    broken = [*PAIRS[:2], {"prompt": "x", "chosen": "", "rejected": "y"}, *PAIRS[2:4]]
    rows, printed = run(broken)
    assert [row["row"] for row in rows] == [0, 1, 3, 4]
    lines = [json.loads(line) for line in (tmp_path / "scores.refused.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [2]
    assert "chosen must not be empty" in lines[0]["reason"]
    assert printed.err.startswith("fusedalign: warning: 1 of 5 rows could not be scored")
    assert len(printed.err.splitlines()) == 1
    rows_again, printed = run(broken, "--strict", status=3)  # is finished
    assert rows_again == rows
    assert "1 of 5 rows" in printed.err


def test_other_settings_are_refused(run):
    rows, _ = run(PAIRS)
    for words in (["--max_length", "20"], ["--per_token", "logps"]):
        rows_again, printed = run(PAIRS, *words, status=2)
        assert rows_again == rows
        assert "--out must be new or of the same settings" in printed.err
    run(PAIRS[1:], status=2)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--max_length", "40"], "max_length 512, not 40"),
        (["--truncation_mode", "keep_end"], "truncation_mode keep_start, not keep_end"),
        (["--completion_only_loss", "false"], "completion_only_loss None, not False"),
        (["--per_token", "logps"], "per_token [], not ['logps']"),
        (["--max_tokens_per_batch", "64"], "max_tokens_per_batch auto, not 64"),
        (["--dtype", "bfloat16"], "dtype auto, not bfloat16"),
        (["--attn_implementation", "eager"], "attn_implementation None, not eager"),
        (["--fused_packed", "false"], "fused_packed auto, not False"),
        (["--fused_impl", "reference"], "fused_impl auto, not reference"),
        (["--ref_model", "embedded"], "ref_model None, not "),
        (["--load_in_4bit"], "load_in_4bit False, not ['nf4', False]"),
        (["--load_in_8bit"], "load_in_8bit False, not True"),
    ],
)
def test_a_setting_that_differs_is_named(run, words, name):
    rows = [{"prompt": "Question?", "completion": " An answer."}]
    run(rows)
    _, printed = run(rows, *words, status=2)
    assert name in printed.err
    assert printed.err.count("\n") == 1


def test_irrelevant_flags_and_columns_do_not_change_the_run(run):
    rows = [row | {"id": i} for i, row in enumerate(PAIRS)]
    scores, _ = run(rows, "--per_token", "ranks", "logps")
    changed = [row | {"id": -i} for i, row in enumerate(PAIRS)]
    words = ["--per_token", "logps", "ranks", "ranks", "--strict", "--beta", "3", "--fused_workspace", "1000000"]
    assert run(changed, *words)[0] == scores


def test_a_run_that_fails_at_once_leaves_no_files(run, tmp_path):
    run(PAIRS, "--fused_impl", "nonsense", status=2)
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl"}
    run(PAIRS)


def test_a_full_disk_is_a_one_line_error_with_the_remedy(run, tmp_path, monkeypatch):
    import errno
    import os

    fsync, count = os.fsync, []

    def failing_fsync(descriptor):
        count.append(descriptor)
        if len(count) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing_fsync)
        _, printed = run(PAIRS, status=2)
    assert f"got {tmp_path / 'scores.parquet'} on a full one" in printed.err
    assert "the same command goes on from there" in printed.err
    assert printed.err.count("\n") == 1
    run(PAIRS)


def test_the_model_digest_includes_its_code(folder, tmp_path):
    import shutil

    from fusedalign.score import identity

    shutil.copytree(folder, tmp_path / "m")
    digests = {identity.files_digest(str(tmp_path / "m"), None)}
    for name in ("modeling_own.py", "config.json", "model.safetensors"):
        with (tmp_path / "m" / name).open("a") as file:
            file.write(" ")
        digests.add(identity.files_digest(str(tmp_path / "m"), None))
    assert len(digests) == 4


def test_yaml_fields_and_flags_are_accepted(run, tmp_path):
    (tmp_path / "score.yaml").write_text("per_token: [entropy]\nmax_tokens_per_batch: 64\n")
    rows, _ = run(PAIRS, "--config", str(tmp_path / "score.yaml"))
    assert len(rows[0]["chosen_token_entropies"]) == rows[0]["chosen_num_tokens"]
    (tmp_path / "score.yaml").write_text("per_tokens: [entropy]\n")
    _, printed = run(PAIRS, f"--config={tmp_path / 'score.yaml'}", status=2, out="new.parquet")
    assert "did you mean --per_token?" in printed.err


def test_an_adapter_folder_is_accepted_as_a_model(run, folder, tmp_path):
    import peft

    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(tmp_path / "adapter")
    plain, _ = run(PAIRS, out="plain.parquet")
    put_on, _ = run(PAIRS, "--adapter", str(tmp_path / "adapter"), out="on.parquet")
    itself, _ = run(PAIRS, "--model_name_or_path", str(tmp_path / "adapter"), out="itself.parquet")
    assert put_on == itself
    assert abs(put_on[0]["margin"] - plain[0]["margin"]) > 1e-2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "scores.csv"], "--out must name the file to write, such as scores.parquet, got scores.csv"),
        (["--out", "/proc/nothing/scores.parquet"], "--out must be a folder that can be written to"),
        (["--per_token", "rank"], "per_token must be of logps, entropy, ranks, got 'rank'"),
        (["--max_length", "0"], "max_length must be 2 or more, since nothing predicts a first token, got 0"),
        (["--max_tokens_per_batch", "0"], "max_tokens_per_batch must be auto or a number of tokens, got '0'"),
        (["--beta", "nan"], "beta must be a number above 0, got nan"),
        (["--beta", "0"], "beta must be a number above 0, got 0.0"),
        (["--assistant_only_loss"], "assistant_only_loss needs messages"),
        (["--completion_only_loss", "true"], "completion_only_loss needs the columns prompt, completion"),
        (["--max_tokens_per_batch", "many"], "max_tokens_per_batch must be auto or a number of tokens, got 'many'"),
        (["--stride", "9", "--max_length", "9"], "stride must be less than max_length=9"),
        (["--truncation_mode", "middle"], "truncation_mode must be keep_start or keep_end, got 'middle'"),
        (["--fused_packed", "maybe"], "fused_packed must be auto, true or false, got 'maybe'"),
        (["--dataset_train_split", "valid"], "dataset_train_split must be a split of"),
        (["--dataset_streaming", "true"], "dataset_streaming must be false"),
        (["--model_name_or_path", "/nowhere"], "model_name_or_path must name a folder that exists"),
        (["--ref_model", "/nowhere"], "ref_model must name a folder that exists"),
        (["--adapter", "/nowhere"], "--adapter must hold an adapter_config.json"),
        (["--learning_rate", "1"], "expected fields of fusedalign score, got the unknown --learning_rate"),
        (["--fused_impl", "cuda"], "impl must be one of"),
    ],
)
def test_bad_arguments_are_one_line_errors(run, words, message):
    _, printed = run(PAIRS, *words, status=2, out="new.parquet")
    assert message in printed.err
    assert len(printed.err.strip().splitlines()) == 1


def test_no_scorable_row_is_reported(run, tmp_path):
    for words, status in (([], 0), (["--strict"], 3)):  # the second reads the finished file
        rows, printed = run([{"prompt": "a", "chosen": "", "rejected": "b"}] * 3, *words, status=status)
        assert rows == []
        lines = [json.loads(line) for line in (tmp_path / "scores.refused.jsonl").read_text().splitlines()]
        assert [line["row"] for line in lines] == [0, 1, 2]
        assert printed.err.count("\n") == 1
        assert "3 of 3 rows could not be scored" in printed.err
        assert "3  chosen must not be empty" in printed.out
    _, printed = run([{"question": "a"}], status=2, name="columns.jsonl")
    assert "question" in printed.err


def test_help_names_the_main_options(capsys):
    assert main(["score", "--help"]) == 0
    text = capsys.readouterr().out
    for word in ("--out", "--ref_model", "--max_tokens_per_batch", "--ref_cache", "--strict"):
        assert word in text


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torch.distributed.run", "accelerate.commands.launch"])
def test_two_processes_write_the_same_file(run, folder, tmp_path, launcher):
    single, _ = run(PAIRS)
    flag = "--nproc_per_node" if launcher.startswith("torch") else "--num_processes"
    cpu = [] if launcher.startswith("torch") else ["--cpu"]
    words = ["--model_name_or_path", folder, "--dataset_name", str(tmp_path / "data.jsonl")]
    out = tmp_path / "two.parquet"
    command = [sys.executable, "-m", launcher, flag, "2", *cpu, "-m", "fusedalign", "score", *words, "--out", str(out)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr
    assert pyarrow.parquet.read_table(out).to_pylist() == single
    assert not list(tmp_path.glob("two.parquet.*"))


# In Python


def test_score_returns_a_data_set_in_python(model, tokenizer, tmp_path):
    model.train()
    scores = score(model, tokenizer, Dataset.from_list(PAIRS))
    assert model.training
    assert len(scores) == 9
    want = answer_logps(model.eval(), tokenizer, PAIRS[3]["prompt"], PAIRS[3]["chosen"])
    assert scores[3]["chosen_logps"] == pytest.approx(sum(want), abs=1e-3)
    assert len(scores.filter(lambda row: row["margin"] > 0)) == sum(scores["accuracy"])
    out = tmp_path / "scores.parquet"
    assert score(model, tokenizer, Dataset.from_list(PAIRS), out=out).to_list() == scores.to_list()
    with pytest.raises(ValueError, match="--out must be new or of the same settings"):
        score(model, tokenizer, Dataset.from_list(PAIRS[1:]), out=out)
    changed = transformers.AutoModelForCausalLM.from_pretrained(model.name_or_path)
    with torch.no_grad():
        changed.model.norm.weight[3] += 0.5
    with pytest.raises(ValueError, match="policy weights"):
        score(changed, tokenizer, Dataset.from_list(PAIRS), out=out)


def test_rewards_are_returned_in_python(model, tokenizer, other_folder):
    reference = transformers.AutoModelForCausalLM.from_pretrained(other_folder)
    scores = score(model, tokenizer, Dataset.from_list(PAIRS), ref_model=reference, beta=0.2)
    row = scores[0]
    assert row["chosen_reward"] == pytest.approx(0.2 * (row["chosen_logps"] - row["ref_chosen_logps"]), abs=1e-6)


def test_python_accepts_lists_of_mappings_with_arrays(model, tokenizer, tmp_path):
    """A list of mappings, arrays in it; an array is known by all of its values."""
    import numpy as np

    tokens = np.arange(3, 1503) % 400
    out = tmp_path / "scores.parquet"
    scores = score(model, tokenizer, [{"input_ids": tokens}], max_length=64, out=out)
    assert scores[0]["num_tokens"] == 1499
    tokens[700] += 1
    with pytest.raises(ValueError, match="with dataset"):
        score(model, tokenizer, [{"input_ids": tokens}], max_length=64, out=out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "max_length must be 2 or more"),
        ({"beta": math.nan}, "beta must be a number above 0"),
        ({"per_token": "rank"}, "per_token must be of logps, entropy, ranks, got 'rank'"),
        ({"max_tokens_per_batch": 0}, "max_tokens must be 'auto' or a number of tokens above 0, got 0"),
    ],
)
def test_bad_options_raise_in_python(model, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        score(model, tokenizer, Dataset.from_list(PAIRS), **options)


def test_no_scorable_row_raises_in_python(model, tokenizer):
    with pytest.raises(ValueError, match="expected a row that can be scored, got 2 that cannot, the first for: chosen"):
        score(model, tokenizer, Dataset.from_list([PAIRS[0] | {"chosen": ""}] * 2))
    with pytest.raises(ValueError, match="the data set must have at least one row, got none"):
        score(model, tokenizer, [])
