"""All methods train on the same tokens: each answer has one end token."""

import json

import pytest
import tiny
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusedalign.embedded import END, PAD, START, data_directory
from fusedalign.trl.shapes import preference
from fusedalign.trl.tokens import pair_ids

METHODS = ["sft", "dpo", "kto", "cpo", "orpo", "tpo"]
TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}ENDS{% endfor %}"
OPENING = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def template(end):
    return TURNS.replace("ENDS", end) + OPENING


def recipe_rows(n=6):
    lines = (data_directory() / "preferences" / "train.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:n]]


def plain_rows(n=6):
    return [
        {side: message[0]["content"] for side, message in row.items()} | {"prompt": row["prompt"][0]["content"] + "\n"}
        for row in recipe_rows(n)
    ]


@pytest.fixture
def tokenizer(embedded_folder):
    return AutoTokenizer.from_pretrained(embedded_folder)


@pytest.fixture(scope="module")
def model(embedded_folder):
    return AutoModelForCausalLM.from_pretrained(embedded_folder)


@pytest.fixture
def sequences(model, tmp_path):
    """sequences("dpo", rows, tokenizer) -> (prompt, answer) token ids of all chosen answers, then all rejected ones."""

    def tokens(method, rows, tokenizer, **options):
        _, cls, config = tiny.classes(method)
        if method == "sft":
            rows = [{"prompt": row["prompt"], "completion": row[side]} for side in SIDES for row in rows]
        if method == "tpo":
            rows = [row | {"reference": row["chosen"]} for row in rows]
        args = config(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **options)
        trainer = cls(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        return list(_pairs(method, trainer.train_dataset))

    return tokens


SIDES = ("chosen", "rejected")


def _pairs(method, data):
    if method == "sft":
        for row in data:
            n = sum(x == -100 for x in row["labels"])
            yield row["input_ids"][:n], row["labels"][n:]
    elif method == "kto":
        yield from ((row["prompt_ids"], row["completion_ids"]) for row in data)
    elif method in ("cpo", "orpo"):
        for side in SIDES:
            for row in data:
                n = len(row["prompt_input_ids"])
                assert row[f"{side}_input_ids"][:n] == row["prompt_input_ids"]
                assert row[f"{side}_labels"] == [-100] * n + row[f"{side}_input_ids"][n:]
                assert row[f"{side}_attention_mask"] == [1] * len(row[f"{side}_labels"])
                yield row["prompt_input_ids"], row[f"{side}_input_ids"][n:]
    else:
        yield from ((row["prompt_ids"], row[f"{side}_ids"]) for side in SIDES for row in data)


@pytest.mark.parametrize("method", METHODS)
def test_answers_of_the_recipes_have_one_end(method, sequences, tokenizer):
    rows = recipe_rows()
    token_ids = sequences(method, rows, tokenizer)
    for (prompt, answer), text in zip(token_ids, [row[side] for side in SIDES for row in rows], strict=True):
        assert tokenizer.decode(answer) == text[0]["content"] + END + "\n"
        assert answer.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(prompt).endswith(f"{END}\n{START}assistant\n")


def _adding(tokenizer, single, *names):
    """A tokenizer that adds BOS or EOS by itself."""
    tokenizer.bos_token = PAD
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


def _set(tokenizer, **values):
    for name, x in values.items():
        setattr(tokenizer, name, x)
    return tokenizer


TOKENIZERS = {
    "ends in eos and a newline": lambda t: t,
    "ends in eos": lambda t: _set(t, chat_template=template(END)),
    "another token ends the turn": lambda t: _set(t, eos_token=PAD),
    "begins with bos": lambda t: _set(t, bos_token=PAD, chat_template="{{ '<|pad|>' }}" + template(END + "\n")),
    "has a bos that it does not use": lambda t: _set(t, bos_token=PAD),
    "adds bos": lambda t: _adding(t, f"{PAD} $A", PAD),
    "adds eos": lambda t: _adding(t, f"$A {END}", END),
    "adds both": lambda t: _adding(t, f"{PAD} $A {END}", PAD, END),
}


@pytest.mark.parametrize("rows", [recipe_rows(3), plain_rows(3)], ids=["messages", "text"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_all_methods_tokenise_like_dpo(kind, rows, sequences, tokenizer):
    tokenizer = TOKENIZERS[kind](tokenizer)
    want = sequences("dpo", rows, tokenizer)
    text = isinstance(rows[0]["prompt"], str)
    end = tokenizer.eos_token if text else END
    for prompt, answer in want:
        ends = [i for i in answer if i in tokenizer.added_tokens_decoder]
        assert ends == [tokenizer.convert_tokens_to_ids(end)]
        assert tokenizer.decode(answer).rstrip().endswith(end)
        assert prompt.count(tokenizer.bos_token_id) == (1 if kind in BOS[text] else 0)
    for method in ("sft", "kto", "orpo"):
        assert sequences(method, rows, tokenizer) == want, method


BOS = {True: ("adds bos", "adds both"), False: ("begins with bos",)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("written", [END, END + "\n", f"{END}\n\n"])
def test_text_with_an_end_gets_no_second_one(method, written, sequences, tokenizer):
    rows = [row | {side: row[side] + written for side in SIDES} for row in plain_rows(3)]
    for _, answer in sequences(method, rows, tokenizer):
        assert answer.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(answer).endswith(written)


def test_a_template_without_an_end_is_warned_about(tokenizer, caplog):
    """TRL's DPO and SFT add no end token there, so the model does not learn where to stop."""
    tokenizer.chat_template = template("\n")
    for row in recipe_rows(2):
        *_, answer = pair_ids(row, tokenizer)
        assert tokenizer.eos_token_id not in answer
    assert [r.message for r in caplog.records] == [
        "the chat template ends no answer with a special token, so the model does not learn where to stop: "
        f"let it end the assistant's turns with {END}"
    ]


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def test_tools_and_template_options_are_used_like_in_dpo(sequences, tokenizer):
    tokenizer.chat_template = "{{ shout }}{% if tools %}{{ tools | tojson }}{% endif %}" + tokenizer.chat_template
    rows = [r | {"tools": json.dumps([TOOL]), "chat_template_kwargs": {"shout": "Hi!"}} for r in recipe_rows(3)]
    want = sequences("dpo", rows, tokenizer)
    assert tokenizer.decode(want[0][0]).startswith('Hi![{"type": "function"')
    assert sequences("orpo", rows, tokenizer) == want == sequences("cpo", rows, tokenizer)


def test_multi_turn_and_system_prompts_are_used_like_in_dpo(sequences, tokenizer):
    rows = []
    for a, b in zip(recipe_rows(4), recipe_rows(4)[1:], strict=False):
        system = [{"role": "system", "content": "Be short."}]
        rows.append({side: system + a["prompt"] + a["chosen"] + b["prompt"] + b[side] for side in SIDES})
    want = sequences("dpo", rows, tokenizer)
    assert tokenizer.decode(want[0][0]).count(START) == 5  # one system, two user and two assistant messages
    assert all(answer.count(tokenizer.eos_token_id) == 1 for _, answer in want)
    for method in ("cpo", "orpo", "kto"):
        assert sequences(method, rows, tokenizer) == want, method
    sft = sequences("sft", [preference(row) for row in rows], tokenizer)
    assert sft == want


def test_answers_are_truncated_like_stock_cpo(sequences, tokenizer):
    rows = plain_rows(4)
    full, cut = sequences("orpo", rows, tokenizer), sequences("orpo", rows, tokenizer, max_length=16)
    assert any(len(p + a) > 16 for p, a in full)
    assert cut == [(p, a[: 16 - len(p)]) for p, a in full]
