"""Models, tokenizers and schedules that cannot train give one line before training starts."""

import json
import shutil

import pytest
import tiny
import torch
import transformers

from fusedalign.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder, and copies with something missing."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tiny.MODELS["qwen3"]().save_pretrained(folder / "bare")
    words = tiny.tokenizer().backend_tokenizer
    for name, special in {
        "whole": {"pad_token": "<pad>", "eos_token": "</s>"},
        "no ends": {},
        "no eos": {"pad_token": "<pad>"},
        "no pad": {"eos_token": "</s>"},
    }.items():
        shutil.copytree(folder / "bare", folder / name)
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **special)
        tokenizer.save_pretrained(folder / name)
    rows = [{"prompt": "a good", "chosen": "answer is short", "rejected": "boats"}] * 4
    talk = [
        {"messages": [{"role": "user", "content": "a good"}, {"role": "assistant", "content": "answer"}]},
    ] * 4
    for name, lines in {"rows": rows, "talk": talk}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def words(folder, tmp_path, model="whole", data="rows", **options):
    options = {
        "model_name_or_path": folder / model,
        "dataset_name": folder / f"{data}.jsonl",
        "output_dir": tmp_path / "out",
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "use_cpu": "true",
        **options,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def error_of(capsys, argv):
    assert main(argv) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("fusedalign: "))
    return line


@pytest.mark.parametrize("method", ["sft", "dpo", "kto", "orpo"])
def test_a_tokenizer_without_eos_is_an_error(folder, tmp_path, capsys, method):
    error = error_of(capsys, [method, *words(folder, tmp_path, "no ends")])
    path = folder / "no ends"
    assert f"the tokenizer of {path} must have an eos_token, got none and no pad_token: set it in its" in error
    error = error_of(capsys, [method, *words(folder, tmp_path, "no eos")])
    assert f"the tokenizer of {folder / 'no eos'} must have an eos_token, got none: set it in its" in error


def test_a_tokenizer_trains_without_tokens_it_does_not_need(folder, tmp_path, capsys):
    """EOS replaces a missing padding token; conversations end as their template says."""
    assert main(["dpo", *words(folder, tmp_path, "no pad")]) == 0, capsys.readouterr().err
    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}{{ message.content + ' ' }}{% endfor %}")
    argv = ["sft", *words(folder, tmp_path, "no eos", "talk", chat_template_path=template), "--output_dir"]
    assert main([*argv, str(tmp_path / "talk")]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("method", ["sft", "dpo", "orpo"])
def test_a_model_without_a_tokenizer_is_an_error(folder, tmp_path, capsys, method):
    """transformers would create an empty tokenizer, and training on no tokens would succeed."""
    error = error_of(capsys, [method, *words(folder, tmp_path, "bare")])
    assert f"the model must come with a tokenizer, got {folder / 'bare'} without one" in error


@pytest.mark.parametrize("method", ["sft", "dpo", "kto", "cpo"])
@pytest.mark.parametrize(
    "options",
    [
        {"load_best_model_at_end": "true", "eval_strategy": "epoch", "save_strategy": "epoch"},
        {"load_best_model_at_end": "true", "eval_strategy": "steps", "save_strategy": "best"},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
    ],
    ids=lambda options: " ".join(options.values()),
)
def test_options_that_need_an_evaluation_are_errors_without_one(folder, tmp_path, capsys, method, options):
    """The data has a single split, so there is nothing to evaluate on."""
    error = error_of(capsys, [method, *words(folder, tmp_path, **options)])
    name = next(iter(options))
    assert f"{name}=" in error
    assert "needs an evaluation, got data without a split for it: add the split test, or leave" in error


def test_a_missing_chat_template_is_an_error(folder, tmp_path, capsys):
    error = error_of(capsys, ["sft", *words(folder, tmp_path, chat_template_path="runs/nowhere")])
    assert "chat_template_path must name a .jinja file or a tokenizer's folder, got runs/nowhere" in error


@pytest.mark.parametrize("method", ["sft", "dpo", "orpo"])
def test_without_bf16_a_command_trains_on_a_cpu(folder, tmp_path, monkeypatch, capsys, method):
    """TRL's default is bf16, an error without an accelerator that supports it."""
    monkeypatch.setattr(transformers.training_args, "is_torch_bf16_gpu_available", lambda: False)
    from fusedalign.trl import arguments

    monkeypatch.setattr(arguments, "is_torch_bf16_gpu_available", lambda: False)
    argv = words(folder, tmp_path)
    index = argv.index("--use_cpu")
    assert main([method, *argv[:index], *argv[index + 2 :]]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("method", ["sft", "dpo", "kto", "orpo"])
def test_conversations_without_a_template_are_an_error(folder, tmp_path, capsys, method):
    pair = _pair("a good")
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(pair) + "\n")
    error = error_of(capsys, [method, *words(folder, tmp_path, dataset_name=file)])
    assert f"the tokenizer of {folder / 'whole'} must have a chat template for data with messages, got none" in error


@pytest.mark.parametrize("method", ["sft", "dpo", "kto", "orpo"])
def test_a_conversation_rejected_by_the_template_is_an_error(folder, tmp_path, capsys, method):
    model = tmp_path / "model"
    shutil.copytree(folder / "whole", model)
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ m.role }} {{ m.content }}{{ eos_token }}{% endfor %}"
    )
    (model / "chat_template.jinja").write_text(template)
    refused = _pair("a good")
    refused["prompt"].insert(0, {"role": "system", "content": "short"})
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [_pair("a good"), refused]))
    error = error_of(capsys, [method, *words(folder, tmp_path, model=model, dataset_name=file)])
    assert f"the chat template of {model} accepts, got {file}, split 'train', row 2: no system here" in error


def _pair(prompt):
    chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in ("answer is short", "boats"))
    return {"prompt": [{"role": "user", "content": prompt}], "chosen": chosen, "rejected": rejected}
