"""`fusedalign check` and `--dry_run`: what a training would do, without the weights of its model."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from fusedalign import cli
from fusedalign.check.rows import inner_collator, sequences
from fusedalign.check.tokens import Style, render_tokens
from fusedalign.check.training import check, find_method
from fusedalign.methods import METHODS
from fusedalign.packing.batch import pack_padded
from fusedalign.plan.shape import Step
from fusedalign.trl.arguments import parse
from fusedalign.trl.train import build

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def no_weights(embedded_folder, tmp_path_factory):
    """The folder of a model that lacks its weights."""
    folder = tmp_path_factory.mktemp("model") / "no-weights"
    shutil.copytree(embedded_folder, folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    return folder


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


LONG = "a very long answer that goes on and on about boats " * 8
#: One row of each kind is longer than the others.
DATA = {
    "messages": [{"messages": talk("Who are you?", x)} for x in ("A model.", LONG, "Me.", "You.")],
    "text": [{"text": x} for x in ("One fine day", LONG, "Two fine days", "Three")],
    "completion": [{"prompt": f"Q{i}: ", "completion": x} for i, x in enumerate(["yes", LONG, "no", "maybe"])],
    "pairs": [{"prompt": f"Q{i}: ", "chosen": x, "rejected": "no"} for i, x in enumerate(["yes", LONG, "ok", "so"])],
    "talks": [
        {"chosen": talk(f"Q{i}", x), "rejected": talk(f"Q{i}", "no")} for i, x in enumerate(["a", LONG, "b", "c"])
    ],
    "labels": [
        {"prompt": f"Q{i}: ", "completion": x, "label": i > 1} for i, x in enumerate(["yes", LONG, "no", "maybe"])
    ],
}


@pytest.fixture(autouse=True)
def _few_plans(request, monkeypatch):
    """Leave out the memory plan, which takes most of the time, in tests that do not read it."""
    if not any(part in request.node.name for part in ("the_plan", "writes_nothing[dpo]")):
        monkeypatch.setattr("fusedalign.check.training.plan_memory", _no_plan)


def _no_plan(*_):
    raise ValueError("left out")


@pytest.fixture
def words(no_weights, tmp_path):
    """words("pairs", "--beta", "1") -> the words of a command on those rows, or on rows that are passed."""

    def make(rows, *more, model=no_weights):
        file = tmp_path / "data.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in (DATA[rows] if isinstance(rows, str) else rows)))
        fields = {"model_name_or_path": model, "dataset_name": file, "output_dir": tmp_path / "out"}
        fields |= {"per_device_train_batch_size": 2, "use_cpu": "true", "report_to": "none", "save_strategy": "no"}
        return [word for name, value in fields.items() for word in (f"--{name}", str(value))] + list(more)

    return make


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_passes_its_check_in_short_lines_and_writes_nothing(method, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["check", str(RECIPES / f"{method}.yaml"), "--dtype", "float32"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{method}: 408 rows")
    assert max(map(len, out.splitlines())) <= 100
    assert "\x1b" not in out
    assert not err
    assert out.rstrip().endswith("nothing"), out[-300:]
    assert not list(tmp_path.iterdir())


def test_the_dry_run_of_a_method_prints_its_check(words, capsys):
    argv = words("pairs", "--max_length", "30")
    assert cli.main(["check", "dpo", *argv]) == cli.main(["dpo", *argv, "--dry_run"]) == 0
    texts = capsys.readouterr().out.split("dpo: 4 rows")[1:]
    first, second = (text.partition("what to look at")[0] for text in texts)  # TRL warns once in a process
    assert first == second
    assert "max_length 30" in first


@pytest.mark.parametrize(
    ("method", "rows"),
    [
        *[("sft", rows) for rows in ("messages", "text", "completion", "talks")],
        *[(method, rows) for method in ("dpo", "cpo", "orpo", "kto") for rows in ("pairs", "talks")],
        ("kto", "labels"),
    ],
)
def test_the_tokens_shown_as_trained_are_those_of_the_real_trainer(method, rows, words, embedded_folder):
    """Also truncated ones: the kept sequences of a check against the batches of the trainer that the command builds."""
    options = ["--max_length", "40"]
    found = check(method, words(rows, *options))
    trainer = build(method, parse(method, words(rows, *options, model=embedded_folder)))
    real = [x for row in trainer.train_dataset for x in sequences(inner_collator(trainer)([row]))]
    assert [x for row in found.rows for x in row.kept if x.ids] == real
    assert any(row.is_cut for row in found.rows)
    labels = [x for row in trainer.train_dataset for x in trained_tokens(inner_collator(trainer)([row]))]
    shown = [[i for i, on in zip(x.ids, x.trained, strict=True) if on] for row in found.rows for x in row.kept if x.ids]
    assert shown == labels


def trained_tokens(batch):
    """The tokens with a label of each sequence of a batch of one row, read from the batch by itself."""
    if "chosen_labels" in batch:
        return [[x for x in batch[f"{side}_labels"][0].tolist() if x != -100] for side in ("chosen", "rejected")]
    if "labels" in batch:
        return [[x for x in row if x != -100] for row in batch["labels"].tolist()]
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)]


def test_what_max_length_cuts_is_counted(words):
    found = check("dpo", words("pairs", "--max_length", "20"))
    assert [(row.is_cut, row.is_lost, row.is_shortened) for row in found.rows] == [
        (False, False, False),
        (True, False, True),
        (False, False, False),
        (False, False, False),
    ]
    long_prompt = [*DATA["pairs"], {"prompt": LONG, "chosen": "yes", "rejected": "no"}]
    for method in ("dpo", "cpo", "kto", "sft"):
        rows = check(method, words(long_prompt, "--max_length", "20")).rows
        assert [row.is_lost for row in rows].count(True) == (2 if method == "kto" else 1), method


def test_slots_are_those_of_the_batches(words, embedded_folder):
    argv = words("pairs", "--seed", "3")
    found = check("dpo", argv)
    trainer = build("dpo", parse("dpo", words("pairs", "--seed", "3", model=embedded_folder)))
    batches = list(trainer.get_train_dataloader())
    assert [x.padded for x in found.slots] == [batch["input_ids"].numel() for batch in batches]
    packed = [pack_padded(x["input_ids"], x["attention_mask"], groups=2, multiple=64) for x in batches]
    assert [x.packed for x in found.slots] == [x.tokens for x in packed]
    assert all(x.shared > 0 for x in found.slots)


@pytest.mark.parametrize(
    "more",
    [
        ["--bta", "1"],
        ["--beta", "-1"],
        ["--loss_type", "exo_pair"],
        ["--dataset_train_split", "nothing"],
        ["--fused_impl", "nothing"],
        ["--fused_packed", "perhaps"],
        ["--lora_target_modules", "nothing", "--use_peft", "true"],
        ["--report_to", "nothing"],
        ["--max_length", "2"],
        ["--resume_from_checkpoint", "last"],
        ["--model_name_or_path", "runs/nothing/here"],
    ],
)
def test_an_error_is_that_of_the_training(more, words, embedded_folder, capsys):
    argv = words("pairs", "--max_steps", "1", *more, model=embedded_folder)
    assert cli.main(["check", "dpo", *argv]) == 2
    checked = capsys.readouterr()
    assert cli.main(["dpo", *argv]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("fusedalign: error: ")
    assert checked.err.splitlines()[-1] == message
    assert not checked.out


def test_a_bad_row_is_the_same_error(words, capsys):
    argv = words([*DATA["messages"], {"messages": []}])
    assert [cli.main(["check", "sft", *argv]), cli.main(["sft", *argv])] == [2, 2]
    first, second = (x for x in capsys.readouterr().err.splitlines() if "error" in x)
    assert first == second
    assert "row 5" in first


def test_findings_name_what_trains_nothing(words):
    rows = [*DATA["pairs"], DATA["pairs"][0], {"prompt": "Q", "chosen": "same", "rejected": "same"}]
    found = check("dpo", words(rows, "--max_length", "20")).findings
    assert [text for text in found if "are cut by max_length=20" in text]
    assert [text for text in found if "equal chosen and rejected" in text and "row 6" in text]
    assert [text for text in found if text == "1 of 6 rows are copies of another row"]
    same = check("kto", words([row | {"label": True} for row in DATA["labels"]])).findings
    assert [text for text in same if "all rows have a good answer" in text]
    ids = [{"input_ids": [5, 6, 7, 8, 9, 10]}, {"input_ids": [5, 6, 7, 9000]}]
    tokens = check("sft", words(ids)).findings
    assert [text for text in tokens if "2 of 2 rows do not end in <|im_end|>" in text]
    assert [text for text in tokens if "vocabulary" in text and "row 2" in text]


def test_an_output_directory_with_a_run_is_a_finding(words, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").touch()
    assert cli.main(["check", "sft", *words("text")]) == 0
    text = " ".join(capsys.readouterr().out.partition("what to look at")[2].split())
    assert "- the training would not start: output_dir must hold no earlier run, got " in text
    assert cli.main(["check", "sft", *words("text"), "--overwrite_output_dir"]) == 0
    assert "would not start" not in capsys.readouterr().out


def test_a_large_data_set_is_sampled_and_a_stream_is_read_in_part(words, monkeypatch):
    monkeypatch.setattr("fusedalign.check.weightless.SAMPLE", 3)
    rows = [{"prompt": f"Q{i}: ", "completion": "yes"} for i in range(10)]
    found = check("sft", words(rows))
    assert len(found.rows) == 3
    assert found.sample.total == 10
    steps = dict(found.decisions)["steps"]
    assert steps.startswith("15, 3 epochs of 5; 2 rows")  # of all rows, not of the sample
    stream = check("sft", words(rows, "--dataset_streaming", "true", "--max_steps", "4"))
    assert len(stream.rows) == 3
    assert stream.sample.total is None
    assert dict(stream.decisions)["steps"].startswith("4 of a stream")


def test_decisions_are_those_of_the_configuration(words):
    lora = dict(check("dpo", words("pairs", "--use_peft", "true", "--lora_r", "4", "--num_processes", "4")).decisions)
    assert "LORA of rank 4" in lora["trains"]
    assert lora["reference"] == "the same model with its adapter disabled"
    assert "8 pairs (2 on a device x 4 processes)" in lora["steps"]
    full = dict(check("dpo", words("pairs", "--fused_packed", "true", "--fused_impl", "pytorch")).decisions)
    assert full["batches"].startswith("packed (proven on a small model")
    assert full["head"].startswith("pytorch on cpu")
    assert full["reference"] == "a second model in memory"
    assert full["trains"] == "all weights"
    before = dict(check("kto", words("labels", "--precompute_ref_log_probs", "true")).decisions)
    assert before["reference"] == "precomputed"


def test_the_plan_is_of_the_largest_batch_and_the_configuration(words):
    options = ["--gradient_checkpointing", "false", "--use_peft", "true", "--lora_r", "4", "--optim", "sgd"]
    found = check("dpo", words("pairs", *options, "--gradient_accumulation_steps", "2"))
    largest = max(found.slots, key=lambda x: x.padded)
    step = found.memory.step
    assert step.padded == largest.padded > min(x.padded for x in found.slots)
    assert step == Step(
        "dpo",
        batch=2,
        length=largest.width,
        prompt=step.prompt,
        tokens=largest.packed,
        lora_r=4,
        checkpointing=False,
        optimiser="sgd",
        accumulation=2,
    )
    assert [total.who for total in found.memory.totals] == ["fusedalign"] * 2 + ["stock TRL"] * 2
    assert found.memory.totals[1].bytes < found.memory.totals[3].bytes


def test_an_adapter_that_is_trained_further_needs_no_weights_of_its_base(words, embedded_folder, no_weights, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(embedded_folder)
    base.config.name_or_path = str(no_weights)
    lora = peft.LoraConfig(r=2, target_modules="all-linear", base_model_name_or_path=str(no_weights))
    peft.get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    for more in ([], ["--merge_adapter", "true"], ["--use_peft", "true"]):
        decisions = dict(check("sft", words("text", *more, model=tmp_path / "adapter")).decisions)
        assert ("model's folder" in decisions["trains"]) == (not more)


@pytest.mark.parametrize(
    ("name", "content", "method"),
    [
        ("my-dpo.yaml", {}, "dpo"),
        ("mine.yaml", {"desirable_weight": 1.0}, "kto"),
        ("mine.yaml", {"cpo_alpha": 1.0}, "cpo"),
        ("mine.yaml", {"cpo_alpha": 1.0, "loss_type": "simpo"}, "simpo"),
        ("mine.yaml", {"rows": "messages"}, "sft"),
        ("mine.yaml", {"rows": "labels"}, "kto"),
    ],
)
def test_a_configuration_tells_its_method(name, content, method, tmp_path):
    if rows := content.pop("rows", None):
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DATA[rows]))
        content["dataset_name"] = str(tmp_path / "data.jsonl")
    (tmp_path / name).write_text(yaml.safe_dump(content))
    assert find_method(str(tmp_path / name)) == method


def test_a_configuration_that_does_not_tell_its_method_is_an_error_that_says_what_to_type(tmp_path):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DATA["pairs"]))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"dataset_name": str(tmp_path / "data.jsonl"), "beta": 0.1}))
    with pytest.raises(ValueError, match=r"fusedalign check METHOD --config .*mine.yaml, where METHOD may be dpo, kto"):
        find_method(str(tmp_path / "mine.yaml"))
    with pytest.raises(FileNotFoundError, match=r"did you mean dpo"):
        find_method("dppo")


def test_sequences_are_shown_with_brackets_or_colours_and_without_control_characters(no_weights):
    from transformers import AutoTokenizer

    from fusedalign.check.rows import Sequence

    tokenizer = AutoTokenizer.from_pretrained(no_weights)
    prompt, answer = tokenizer("Say\x1b[31m it:\n")["input_ids"], tokenizer("a \x00 b<|im_end|>\n")["input_ids"]
    whole = Sequence("row", prompt + answer, [False] * len(prompt) + [True] * len(answer))
    assert render_tokens(whole, whole, tokenizer, Style(False, 98)) == [
        r"Say\x1b[31m it:\n",
        r"[[a \x00 b<|im_end|>\n]]",
    ]
    kept = Sequence("row", whole.ids[:-3], whole.trained[:-3])
    coloured = render_tokens(kept, whole, tokenizer, Style(True, 98))
    assert re.sub(r"\x1b\[\d+m", "", coloured[1]).endswith("[3 tokens cut, 3 of them trained]")
    assert coloured[1].startswith("\x1b[32m")
    assert max(map(len, render_tokens(whole, whole, tokenizer, Style(False, 10)))) <= 10
