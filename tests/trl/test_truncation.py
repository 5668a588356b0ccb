"""Tokens left by max_length: none is an error before the first step, lost rows are reported."""

import json

import pytest
import tiny
from datasets import Dataset
from transformers import AutoModelForCausalLM

from fusedalign.cli import main
from fusedalign.embedded import data_directory
from fusedalign.trl.arguments import parse
from fusedalign.trl.train import build

COMMANDS = ["sft", "dpo", "kto", "cpo", "simpo", "orpo"]


def argv(method, tmp_path, folder, **options):
    options = {
        "model_name_or_path": folder,
        "output_dir": tmp_path / "out",
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "eval_strategy": "no",
        "use_cpu": "true",
        **options,
    }
    words = [str(word) for name, x in options.items() for word in (f"--{name}", x)]
    return [method, "--config", f"recipes/{method}.yaml", *words]


def error(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fusedalign: error:")]
    return lines[0] if len(lines) == 1 else lines


@pytest.mark.parametrize("method", COMMANDS)
def test_fully_truncated_data_are_a_one_line_error(method, tmp_path, embedded_folder, capsys):
    rows = 816 if method == "kto" else 408
    assert main(argv(method, tmp_path, embedded_folder, max_length=4)) == 2
    message = (
        f"max_length=4 leaves no completion token to train on in any of the {rows} training rows: raise max_length"
    )
    assert message in error(capsys)
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("method", ["dpo", "simpo"])
def test_a_fully_truncated_stream_is_an_error(method, tmp_path, embedded_folder, capsys):
    options = {"max_length": 4, "dataset_streaming": "true"}
    assert main(argv(method, tmp_path, embedded_folder, **options)) == 2
    scope = "any of the" if method == "dpo" else "the first 64"  # DPO drops such rows itself, so all are read
    message = f"max_length=4 leaves no completion token to train on in {scope} training rows: raise max_length"
    assert message in error(capsys)


@pytest.mark.parametrize("method", ["sft", "dpo", "kto"])
def test_fully_truncated_data_are_an_error_with_the_trainer_of_trl(method, tmp_path, embedded_folder):
    """The commands attach to it under FSDP."""
    words = argv(method, tmp_path, embedded_folder, max_length=4)[1:]
    with pytest.raises(ValueError, match=r"max_length=4 leaves no completion token .* training rows: raise max_length"):
        build(method, parse(method, words), fused=False)


@pytest.mark.parametrize("method", COMMANDS)
def test_fully_truncated_evaluation_data_are_an_error(method, tmp_path, embedded_folder, capsys):
    data = tmp_path / "data"
    data.mkdir()
    long = [{"role": "user", "content": "why " * 60}]
    source = data_directory() / ("sft" if method == "sft" else "preferences") / "train.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()[:4]]
    for name, split in (("train", rows), ("test", [row | {"prompt": long} for row in rows])):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in split))
    options = {"dataset_name": data, "max_length": 50, "eval_strategy": "epoch"}
    assert main(argv(method, tmp_path, embedded_folder, **options)) == 2
    n = 8 if method == "kto" else 4
    message = f"max_length=50 leaves no completion token to train on in any of the {n} evaluation rows"
    assert message in error(capsys)


@pytest.fixture(scope="module")
def model(embedded_folder):
    return AutoModelForCausalLM.from_pretrained(embedded_folder)


def rows_of(prompts, answer="one two three four"):
    return [{"prompt": "a " * n, "chosen": answer, "rejected": answer + " five"} for n in prompts]


@pytest.fixture
def trainer(model, tiny_folder, tmp_path):
    """trainer("dpo", rows, max_length=4) -> Fused trainer with words as tokens: a prompt of n words has n tokens."""

    def build(method, rows, evaluation=None, **options):
        _, cls, config = tiny.classes(method)

        def dataset(rows):
            if method == "tpo":
                rows = [row | {"reference": row["chosen"]} for row in rows]
            if method == "sft":
                rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
            return Dataset.from_list(rows)

        return cls(
            AutoModelForCausalLM.from_pretrained(tiny_folder("qwen3")),
            args=config(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **options),
            train_dataset=dataset(rows),
            eval_dataset=evaluation and dataset(evaluation),
            processing_class=tiny.tokenizer(),
        )

    return build


FUSED = ["sft", "dpo", "kto", "cpo", "orpo", "tpo"]


@pytest.mark.parametrize("method", FUSED)
def test_fully_truncated_rows_are_counted(method, trainer, caplog):
    built = trainer(method, rows_of([2, 9, 3, 4, 12, 7]), max_length=7)
    lost_rows, rows = (6, 12) if method == "kto" else (3, 6)
    message = f"max_length=7 leaves no completion token to train on in {lost_rows} of the {rows} training rows"
    assert [message in r.getMessage() for r in caplog.records].count(True) == 1
    kept_rows = 6 if method in ("cpo", "orpo", "tpo") else rows - lost_rows  # the others drop such rows
    assert len(built.train_dataset) == kept_rows


@pytest.mark.parametrize("method", FUSED)
def test_no_warning_if_all_rows_keep_a_token(method, trainer, caplog):
    trainer(method, rows_of([2, 9, 3]), rows_of([5, 2]), max_length=10)
    assert not [r for r in caplog.records if "max_length" in r.getMessage()]


@pytest.mark.parametrize("method", FUSED)
def test_fully_truncated_evaluation_rows_are_counted(method, trainer):
    with pytest.raises(ValueError, match=r"max_length=4 leaves no completion token .* of the . evaluation rows"):
        trainer(method, rows_of([2, 9, 3]), rows_of([5, 4]), max_length=4)


@pytest.mark.parametrize("method", ["sft", "dpo", "tpo"])
def test_keep_end_refuses_only_single_tokens(method, trainer, caplog):
    """The end of a row is its answer, so only max_length=1 is too short: a first token is never predicted."""
    trainer(method, rows_of([5, 9]), max_length=2, truncation_mode="keep_end")
    assert not [r for r in caplog.records if "max_length" in r.getMessage()]
    with pytest.raises(ValueError, match=r"max_length=1 leaves no completion token .* any of the 2 training rows"):
        trainer(method, rows_of([5, 9]), max_length=1, truncation_mode="keep_end")


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packing_refuses_fully_truncated_rows(strategy, trainer):
    options = {"packing": True, "packing_strategy": strategy}
    trainer("sft", rows_of([2, 9, 3]), max_length=6, **options)
    if strategy == "bfd":  # it truncates rows before packing
        with pytest.raises(ValueError, match=r"max_length=3 leaves no completion token .* any of the 3 training rows"):
            trainer("sft", rows_of([3, 9, 4]), max_length=3, **options)


def test_whole_sft_rows_lose_only_the_first_token(trainer, model, tmp_path):
    """Without a prompt, or with completion_only_loss=False, all tokens except the first are trained on."""
    trainer("sft", rows_of([5, 9]), max_length=2, completion_only_loss=False)
    with pytest.raises(ValueError, match=r"max_length=1 leaves no completion token"):
        trainer("sft", rows_of([5, 9]), max_length=1, completion_only_loss=False)


def test_a_truncated_assistant_turn_is_an_error(embedded_folder, tmp_path, capsys):
    data = tmp_path / "mine.jsonl"
    turns = [{"role": "user", "content": "why " * 20}, {"role": "assistant", "content": "because"}]
    data.write_text(json.dumps({"messages": turns}) + "\n")
    options = {"dataset_name": data, "max_length": 12, "assistant_only_loss": "true"}
    assert main(argv("sft", tmp_path, embedded_folder, **options)) == 2
    assert "max_length=12 leaves no completion token to train on in any of the 1 training rows" in error(capsys)


@pytest.mark.parametrize("method", ["sft", "dpo", "kto", "orpo"])
def test_a_data_set_without_rows_is_an_error(method, trainer):
    with pytest.raises(ValueError, match="train_dataset must have at least one row, got none"):
        trainer(method, [])
    if method != "orpo":
        with pytest.raises(ValueError, match="eval_dataset must have at least one row, got none"):
            trainer(method, rows_of([2]), Dataset.from_list([]))


SILENT = {"prompt": "", "chosen": "", "rejected": ""}  # its only token, the EOS, is the first one


@pytest.mark.parametrize("max_length", [16, None])
@pytest.mark.parametrize("method", FUSED)
def test_rows_without_a_token_before_truncation_are_no_fault_of_max_length(method, max_length, trainer, caplog):
    options = {} if max_length is None and method in ("cpo", "orpo") else {"max_length": max_length}
    reason = r"no completion token to train on in any of the (2|4) training rows, also before truncation: leave out"
    with pytest.raises(ValueError, match=reason) as raised:
        trainer(method, [SILENT] * 2, **options)
    assert "max_length" not in str(raised.value)
    trainer(method, [SILENT, *rows_of([2, 3])], **{"max_length": 16, **{k: v for k, v in options.items() if v}})
    texts = [r.getMessage() for r in caplog.records if "completion token" in r.getMessage()]
    assert len(texts) == 1
    assert "also before truncation: leave out" in texts[0]
    assert "1 of the 3" in texts[0] or "2 of the 6" in texts[0]


@pytest.mark.parametrize("method", FUSED)
def test_empty_rows_are_counted_apart_from_cut_ones(method, trainer, caplog):
    trainer(method, [SILENT, *rows_of([2, 9, 3, 12])], max_length=7)
    lost, rows, empty = (6, 10, 2) if method == "kto" else (3, 5, 1)
    (text,) = [r.getMessage() for r in caplog.records if "completion token" in r.getMessage()]
    assert f"max_length=7 leaves no completion token to train on in {lost} of the {rows} training rows" in text
    assert text.endswith(f"; {empty} of them have none before truncation either")


def test_a_stream_without_labels_is_no_fault_of_max_length(tmp_path, embedded_folder, capsys):
    data = tmp_path / "mine.jsonl"
    data.write_text(json.dumps({"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}) + "\n")
    options = {"dataset_name": data, "dataset_streaming": "true"}
    assert main(argv("sft", tmp_path, embedded_folder, **options)) == 2
    assert "also before truncation: leave out rows with an empty completion, or with labels" in error(capsys)
