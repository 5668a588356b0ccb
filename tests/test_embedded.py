"""The shipped data equal the output of their script, and the embedded model serves the recipes and the demo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from fusedalign import embedded
from fusedalign.embedded import build_embedded_model, data_directory

FILES = {
    f"{kind}/{split}.jsonl": keys
    for kind, keys in (("preferences", ("prompt", "chosen", "rejected")), ("sft", ("prompt", "completion")))
    for split in ("train", "test")
}
QUESTION = [{"role": "user", "content": "What is 3 + 4?"}]
ANSWER = [{"role": "assistant", "content": "3 + 4 is 7."}]


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (data_directory() / name).read_text(encoding="utf-8").splitlines()]


def prompts(name: str) -> list[str]:
    return [row["prompt"][0]["content"] for row in rows(name)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return build_embedded_model(tmp_path_factory.mktemp("embedded") / "model")


@pytest.fixture(scope="module")
def tokenizer(directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def test_shipped_data_equal_the_script_output(tmp_path):
    script = data_directory() / "make_data.py"
    subprocess.run([sys.executable, str(script), "--out", str(tmp_path)], check=True, capture_output=True)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == set(FILES)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (data_directory() / name).read_bytes(), name


@pytest.mark.parametrize("name", FILES)
def test_rows_are_conversations(name):
    conversations = rows(name)
    assert len(conversations) >= (50 if "test" in name else 350)
    for row in conversations:
        assert tuple(row) == FILES[name]
        for key, messages in row.items():
            assert [message["role"] for message in messages] == ["user" if key == "prompt" else "assistant"]
            text = messages[0]["content"]
            assert text
            assert text == " ".join(text.split())
            assert "{" not in text
        assert row.get("chosen") != row.get("rejected", "")
    assert len(set(prompts(name))) == len(conversations)


def test_no_test_prompt_is_in_any_training_file():
    train = set(prompts("preferences/train.jsonl")) | set(prompts("sft/train.jsonl"))
    test = set(prompts("preferences/test.jsonl")) | set(prompts("sft/test.jsonl"))
    assert not train & test


def test_data_directory_says_where_it_looked(tmp_path, monkeypatch):
    package = tmp_path / "fusedalign"
    monkeypatch.setattr(embedded, "__file__", str(package / "embedded.py"))
    with pytest.raises(FileNotFoundError, match="recipes") as raised:
        data_directory()
    assert "\n" not in str(raised.value)
    installed = package / "_recipes" / "data"
    (installed / "sft").mkdir(parents=True)
    (installed / "sft" / "train.jsonl").touch()
    assert data_directory() == installed.resolve()


@pytest.mark.parametrize("text", ["What is 3 + 4?", " two  spaces\n\tand a tab ", "Zürich, 東京 🙂", "it's <tagged>"])
def test_tokenizer_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_chat_template_renders_the_conversation(tokenizer):
    prompt = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nWhat is 3 + 4?<|im_end|>\n<|im_start|>assistant\n"
    text = tokenizer.apply_chat_template(QUESTION + ANSWER, tokenize=False)
    assert text == prompt + "3 + 4 is 7.<|im_end|>\n"
    # The trainers rely on it: the prompt's tokens are a prefix of the conversation's.
    prefix = tokenizer(prompt)["input_ids"]
    assert tokenizer(text)["input_ids"][: len(prefix)] == prefix


def test_assistant_mask_covers_the_answer_and_its_end(tokenizer):
    encoded = tokenizer.apply_chat_template(QUESTION + ANSWER, return_dict=True, return_assistant_tokens_mask=True)
    answer = [token for token, keep in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if keep]
    assert tokenizer.decode(answer) == "3 + 4 is 7.<|im_end|>\n"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token not in (None, tokenizer.eos_token)


def test_the_model_reloads_and_generates(directory, tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    assert model.config.vocab_size == len(tokenizer) == model.get_output_embeddings().weight.shape[0]
    assert model.dtype == torch.float32
    for config in (model.config, model.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert inputs["input_ids"].shape[1] < out.shape[1] <= inputs["input_ids"].shape[1] + 4


def test_the_same_seed_gives_the_same_files_and_keeps_the_random_state(directory, tmp_path):
    from safetensors.torch import load_file

    state = torch.get_rng_state()
    repeated = build_embedded_model(str(tmp_path / "again"))
    other = build_embedded_model(tmp_path / "other", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    names = sorted(path.name for path in directory.iterdir())
    assert names == sorted(path.name for path in repeated.iterdir())
    for name in names:
        assert (directory / name).read_bytes() == (repeated / name).read_bytes(), name
    weights, other_weights = (load_file(path / "model.safetensors") for path in (directory, other))
    assert not torch.equal(weights["model.embed_tokens.weight"], other_weights["model.embed_tokens.weight"])
