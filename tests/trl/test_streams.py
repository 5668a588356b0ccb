"""Streaming data in every method, and encoder-decoders in CPO, SimPO and ORPO, by command and by class."""

import json

import pytest
import tiny
import torch
from datasets import load_dataset
from transformers import AutoModelForSeq2SeqLM

from fusedalign.cli import main
from fusedalign.embedded import data_directory

METHODS = ["sft", "dpo", "kto", "cpo", "simpo", "orpo"]
PAIRS = ["cpo", "simpo", "orpo"]


def run(method, tmp_path, **options):
    options = {
        "max_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "eval_strategy": "no",
        "save_strategy": "no",
        "bf16": "false",
        "use_cpu": "true",
        "report_to": "none",
        "seed": 0,
        "train_sampling_strategy": "sequential",
        "output_dir": tmp_path / "out",
        **options,
    }
    argv = [method, *(str(word) for name, x in options.items() for word in (f"--{name}", x))]
    if main(argv):
        return None
    lines = [json.loads(line) for line in (options["output_dir"] / "metrics.jsonl").read_text().splitlines()]
    return [row for row in lines if "loss" in row or "eval_loss" in row]


@pytest.mark.parametrize(
    "method",
    [pytest.param(method, marks=[pytest.mark.slow] if method in ("cpo", "orpo") else []) for method in METHODS],
)
def test_a_stream_trains_like_the_same_rows_in_memory(method, tmp_path, embedded_folder, capsys):
    source, data = data_directory() / ("sft" if method == "sft" else "preferences"), tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        rows = [json.loads(line) for line in (source / f"{split}.jsonl").read_text().splitlines()[:6]]
        (data / f"{split}.jsonl").write_text("".join(json.dumps({"id": "a", **row}) + "\n" for row in rows))
    options = {"model_name_or_path": embedded_folder, "dataset_name": data, "eval_strategy": "steps", "eval_steps": 2}
    stream = run(method, tmp_path, dataset_streaming="true", output_dir=tmp_path / "stream", **options)
    assert stream, capsys.readouterr().err
    rows = run(method, tmp_path, dataset_streaming="false", **options)
    assert rows, capsys.readouterr().err
    names = {"loss", "eval_loss", "rewards/chosen", "logps/rejected", "step"}
    for a, b in zip(stream, rows, strict=True):
        assert {n: a[n] for n in names & set(a)} == pytest.approx({n: b[n] for n in names & set(b)}, rel=1e-6)


@pytest.fixture(scope="module")
def t5_folder(tiny_folder):
    folder = tiny_folder("t5")
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def pairs(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in tiny.rows(8)))
    return file


@pytest.mark.parametrize("stream", ["false", "true"])
@pytest.mark.parametrize("method", PAIRS)
def test_the_commands_train_an_encoder_decoder(method, stream, t5_folder, pairs, tmp_path, capsys):
    options = {"model_name_or_path": t5_folder, "dataset_name": pairs, "learning_rate": 1e-3}
    rows = run(method, tmp_path, dataset_streaming=stream, **options)
    assert rows, capsys.readouterr().err
    assert all(row["grad_norm"] > 0 for row in rows)
    before, after = (AutoModelForSeq2SeqLM.from_pretrained(folder) for folder in (t5_folder, tmp_path / "out"))
    assert not torch.equal(before.get_input_embeddings().weight, after.get_input_embeddings().weight)


def test_a_named_encoder_decoder_equals_the_instance(t5_folder, pairs, tmp_path):
    _, cls, config = tiny.classes("orpo")
    dataset = load_dataset("json", data_files=str(pairs), split="train")
    histories = []
    for model in (str(t5_folder), AutoModelForSeq2SeqLM.from_pretrained(t5_folder)):
        options = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 2, "logging_steps": 1}
        args = config(str(tmp_path), save_strategy="no", disable_tqdm=True, max_completion_length=16, **options)
        trainer = cls(model, args=args, train_dataset=dataset, processing_class=tiny.tokenizer())
        histories.append(tiny.history(trainer, evaluate=False))
    tiny.assert_same(*histories)


@pytest.mark.parametrize("method", ["sft", "dpo", "kto"])
def test_other_methods_refuse_an_encoder_decoder(method, t5_folder, pairs, tmp_path, capsys):
    assert run(method, tmp_path, model_name_or_path=t5_folder, dataset_name=pairs) is None
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fusedalign: error:")]
    assert len(errors) == 1
    assert "expected a decoder-only causal LM, got the encoder-decoder T5ForConditionalGeneration" in errors[0]
