"""Rows become examples: the tokens and labels of TRL's trainers, windows of text, and refusals row by row."""

import json
import logging
import threading

import pytest

pytest.importorskip("trl")

import trl
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusedalign.embedded import build_embedded_model, data_directory
from fusedalign.score.rows import RowOptions, Rows, reason_kind, windows
from fusedalign.trl import FusedDPOTrainer, FusedSFTTrainer
from fusedalign.trl.data import served


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_embedded_model(tmp_path_factory.mktemp("embedded"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer_with_bos(folder):
    """A tokenizer that adds BOS and EOS to everything it encodes."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = "<|im_start|>"
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|im_start|>", "<|im_end|>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=ends
    )
    return tokenizer


@pytest.fixture(scope="module")
def trained_on(folder, tmp_path_factory):
    """trained_on("dpo", rows, tokenizer, max_length=...) -> tokens and labels per row and answer, from a batch."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    output = str(tmp_path_factory.mktemp("runs"))

    def batch(method, rows, tokenizer, **options):
        cls, config = {
            "dpo": (FusedDPOTrainer, trl.DPOConfig),
            "sft": (FusedSFTTrainer, trl.SFTConfig),
        }[method]
        reference = {"ref_model": AutoModelForCausalLM.from_pretrained(folder)} if method == "dpo" else {}
        trainer = cls(
            model,
            args=config(output, use_cpu=True, bf16=False, report_to="none", **options),
            train_dataset=served(Dataset.from_list(rows), method, "these rows"),
            processing_class=tokenizer,
            **reference,
        )
        rows = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
        batch = trainer.data_collator(rows)
        labels = batch.get("labels")
        if labels is None:
            labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        lengths = batch["attention_mask"].sum(1)
        pairs = [(x[:n].tolist(), y[:n].tolist()) for x, y, n in zip(batch["input_ids"], labels, lengths, strict=True)]
        return [pairs[i :: len(rows)] for i in range(len(rows))]

    return batch


def scored(rows, tokenizer, **options):
    """Tokens and labels per row and answer; asserts that no row is refused."""
    source = Rows(Dataset.from_list(rows), tokenizer, RowOptions(**options))
    examples, refused = source.examples(0, len(source))
    assert not refused
    assert [example.row for example in examples] == list(range(len(rows)))
    for example in examples:
        for answer in example.answers:
            assert len(answer.windows) == 1
    return [[(a.windows[0].input_ids, a.windows[0].labels) for a in example.answers] for example in examples]


def assert_equal(got, want):
    """Assert equal tokens, and equal labels except for the first token, which is never predicted."""
    assert len(got) == len(want)
    for row, others in zip(got, want, strict=True):
        assert [ids for ids, _ in row] == [ids for ids, _ in others]
        assert [labels[1:] for _, labels in row] == [labels[1:] for _, labels in others]
        assert all(labels[0] == -100 and any(x != -100 for x in labels) for _, labels in row)


def read(name, n):
    with open(data_directory() / name / "train.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for _, line in zip(range(n), lines, strict=False)]


def turn(role, content):
    return {"role": role, "content": content}


PLAIN = [
    {"prompt": "What is a boat?", "chosen": " A thing that floats.", "rejected": " No idea, ask the sea."},
    {"prompt": "Say hello to the people", "chosen": " Hello!", "rejected": "<|im_end|>"},
    {"prompt": "ein Gruß", "chosen": "größer ünd mehr 😀", "rejected": "\n"},
    {"prompt": "", "chosen": "nothing was asked", "rejected": "so nothing is said at all"},
    {
        "prompt": "a boat has th",
        "chosen": "e sail",
        "rejected": "at sail",
    },  # the last prompt character is merged into "the"
]
SHARED = [
    {"chosen": "Question: why? Answer: because it is so", "rejected": "Question: why? Answer: who knows"},
    {"chosen": "abc def", "rejected": "abc def and more"},
]
WHOLE = [
    {
        "prompt": "why?",
        "chosen": [turn("user", "why?"), turn("assistant", "because")],
        "rejected": [turn("user", "why?"), turn("assistant", "why not")],
    },
    {
        "prompt": "and then?",
        "chosen": [turn("system", "be brief"), turn("user", "and then?"), turn("assistant", "the end")],
        "rejected": [turn("system", "be brief"), turn("user", "and then?"), turn("assistant", "more of it")],
    },
]
IMPLICIT = [{name: x for name, x in row.items() if name != "prompt"} for row in WHOLE]
PAIRS = {
    "plain": PLAIN,
    "plain, implicit prompt": SHARED,
    "conversations": read("preferences", 20),
    "whole conversations, text prompt": WHOLE,
    "whole conversations, implicit prompt": IMPLICIT,
}


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_have_the_tokens_of_dpo(name, bos, tokenizer, tokenizer_with_bos, trained_on):
    tokenizer = tokenizer_with_bos if bos else tokenizer
    rows = PAIRS[name]
    assert_equal(scored(rows, tokenizer), trained_on("dpo", rows, tokenizer))


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("name", ["plain", "conversations"])
def test_pairs_are_truncated_like_dpo(name, mode, tokenizer, trained_on):
    rows = PAIRS[name]
    cut = {"max_length": 12 if name == "plain" else 20, "truncation_mode": mode}
    source = Rows(Dataset.from_list(rows), tokenizer, RowOptions(**cut))
    examples, refused = source.examples(0, len(rows))
    assert any(len(a.windows[0].input_ids) == cut["max_length"] for e in examples for a in e.answers)
    assert bool(refused) == (name == "conversations" and mode == "keep_start")
    got = [[(a.windows[0].input_ids, a.windows[0].labels) for a in e.answers] for e in examples]
    assert_equal(got, trained_on("dpo", rows, tokenizer, **cut))
    for _, reason in refused:
        assert reason.startswith("max_length=20 must leave a token of chosen to score, got them at ")


CHATS = [
    {"messages": [turn("user", "hello"), turn("assistant", "good day to you")]},
    {
        "messages": [
            turn("system", "sums"),
            turn("user", "1+1"),
            turn("assistant", "2"),
            turn("user", "2+2"),
            turn("assistant", "4"),
        ]
    },
]
SHAREGPT = [{"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good day"}]}]
TEXTS = [{"text": "A boat is a thing that floats."}, {"text": "größer 😀"}, {"text": "it ends here<|im_end|>"}]
ANSWERED = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PLAIN]
SINGLES = {
    "plain prompts": ("completion", ANSWERED, {}),
    "plain prompts, all tokens": ("completion", ANSWERED, {"completion_only_loss": False}),
    "conversations with prompts": ("completion", read("sft", 20), {}),
    "conversations with prompts, the assistant's": ("completion", read("sft", 5), {"assistant_only_loss": True}),
    "text prompts, whole conversations": (
        "completion",
        [{"prompt": r["prompt"], "completion": r["chosen"]} for r in WHOLE],
        {},
    ),
    "chats": ("conversation", CHATS, {}),
    "chats, the assistant's": ("conversation", CHATS, {"assistant_only_loss": True}),
    "ShareGPT": ("conversation", SHAREGPT, {"assistant_only_loss": True}),
    "text": ("text", TEXTS, {}),
    "tokens": ("text", [{"input_ids": [5, 6, 7, 8]}, {"input_ids": [9, 2]}], {}),
    "tokens with labels": ("text", [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}], {}),
    "tokens with a mask": ("text", [{"input_ids": [5, 6, 7, 8], "assistant_masks": [0, 0, 1, 0]}], {}),
}
TRL_NAMES = {"completion_only_loss": "completion_only_loss", "assistant_only_loss": "assistant_only_loss"}


@pytest.mark.parametrize("name", SINGLES)
def test_single_rows_have_the_tokens_of_sft(name, tokenizer, trained_on):
    kind, rows, options = SINGLES[name]
    assert Rows(Dataset.from_list(rows), tokenizer, RowOptions(**options)).kind == kind
    want = trained_on("sft", rows, tokenizer, **{TRL_NAMES[k]: x for k, x in options.items()})
    assert_equal(scored(rows, tokenizer, **options), want)


@pytest.mark.parametrize("name", ["plain prompts", "text"])
def test_a_tokenizer_that_adds_bos_and_eos_matches_the_trainers(name, tokenizer_with_bos, trained_on):
    _, rows, _ = SINGLES[name]
    assert_equal(scored(rows, tokenizer_with_bos), trained_on("sft", rows, tokenizer_with_bos))


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize(
    "name", ["plain prompts", "conversations with prompts", "chats, the assistant's", "tokens with labels"]
)
def test_single_rows_are_truncated_like_sft(name, mode, tokenizer, trained_on):
    _, rows, options = SINGLES[name]
    cut = {"max_length": {"tokens with labels": 3, "plain prompts": 12}.get(name, 24), "truncation_mode": mode}
    examples, refused = Rows(Dataset.from_list(rows), tokenizer, RowOptions(**cut, **options)).examples(0, len(rows))
    assert len(examples) + len(refused) == len(rows)
    assert max(len(e.answers[0].windows[0].input_ids) for e in examples) == cut["max_length"]
    got = [[(a.windows[0].input_ids, a.windows[0].labels) for a in e.answers] for e in examples]
    assert_equal(got, trained_on("sft", rows, tokenizer, **cut, **{TRL_NAMES[k]: x for k, x in options.items()}))


RENDERING = (
    "{%- if tools %}{{ 'tools ' + tools[0]['name'] + '<|im_end|>' }}{%- endif %}{{ style or 'plain' }}"
    "{%- for message in messages %}{{ message.role + ' ' + message.content + '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ 'assistant ' }}{%- endif %}"
)


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_template_columns_are_used_like_in_the_trainers(method, folder, trained_on):
    tokenizer = AutoTokenizer.from_pretrained(folder, chat_template=RENDERING)
    options = [
        {"tools": '[{"name": "boat"}]', "chat_template_kwargs": {"style": "short"}},
        {"tools": '[{"name": "sail"}]', "chat_template_kwargs": {"style": "long"}},
    ]
    names = ["prompt", "chosen", "rejected"]
    if method == "sft":
        names[1:] = ["completion"]
    columns = [
        {"prompt": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"], "completion": row["chosen"]}
        for row in WHOLE
    ]
    rows = [{name: row[name] for name in names} | option for row, option in zip(columns, options, strict=True)]
    got = scored(rows, tokenizer)
    assert_equal(got, trained_on(method, rows, tokenizer))
    assert ["boat" in tokenizer.decode(row[0][0]) for row in got] == [True, False]
    assert ["long" in tokenizer.decode(row[0][0]) for row in got] == [False, True]
    plain_rows = [rows[0], rows[1] | {"tools": None, "chat_template_kwargs": None}]
    examples, refused = Rows(plain_rows, tokenizer, RowOptions()).examples(0, 2)
    assert not refused
    assert tokenizer.decode(examples[1].answers[0].windows[0].input_ids).startswith("plain")


def tokens(text, tokenizer):
    return tokenizer(text)["input_ids"]


@pytest.mark.parametrize("stride", [None, 1, 3, 7])
@pytest.mark.parametrize("length", [2, 7, 8, 9, 16, 50])
def test_windows_count_each_token_once_with_the_context_of_the_stride(length, stride):
    ids, width = list(range(100, 100 + length)), 8
    parts = windows(ids, width, stride)
    counted = [x for part in parts for x in part.labels if x != -100]
    assert counted == ids[1:]
    advance = 4 if stride is None else stride
    for i, part in enumerate(parts):
        assert part.input_ids == ids[i * advance : i * advance + width]
        context = next(k for k, x in enumerate(part.labels) if x != -100)
        assert context == (width - advance if i else 1)
        assert [x for x in part.labels if x != -100] == part.input_ids[context:]


def test_text_that_fits_is_one_window_and_ends_with_the_eos(tokenizer):
    text = "A boat is a thing that floats. ü😀"
    examples, _ = Rows([{"text": text}], tokenizer, RowOptions(max_length=100)).examples(0, 1)
    (answer,) = examples[0].answers
    assert answer.name == "text"
    assert answer.text_bytes == len(text.encode())
    (window,) = answer.windows
    assert window.input_ids == [*tokens(text, tokenizer), tokenizer.eos_token_id]
    assert window.labels == [-100, *window.input_ids[1:]]


def test_long_text_is_split_into_windows(tokenizer):
    text = "A boat is a thing that floats. " * 20
    ids = [*tokens(text, tokenizer), tokenizer.eos_token_id]
    for stride in (None, 5):
        options = RowOptions(max_length=32, stride=stride)
        (example,), refused = Rows([{"text": text}], tokenizer, options).examples(0, 1)
        assert not refused
        assert example.answers[0].windows == windows(ids, 32, stride)
        assert len(example.answers[0].windows) > 3
        assert example.answers[0].text_bytes == len(text.encode())


def test_a_bos_is_the_context_of_the_first_token(tokenizer, tokenizer_with_bos):
    for tok, first in ((tokenizer, 1), (tokenizer_with_bos, 0)):
        ((example,), _) = Rows([{"text": "a boat"}], tok, RowOptions()).examples(0, 1)
        counted = [x for x in example.answers[0].windows[0].labels if x != -100]
        assert counted == [*tokens("a boat", tokenizer), tokenizer.eos_token_id][first:]


def test_input_ids_are_windowed_unchanged(tokenizer):
    ids = list(range(3, 40))
    ((example,), _) = Rows([{"input_ids": ids}], tokenizer, RowOptions(max_length=10)).examples(0, 1)
    assert example.answers[0].windows == windows(ids, 10)
    assert example.answers[0].text_bytes is None


GOOD = {
    "preference": PLAIN[0],
    "completion": ANSWERED[0],
    "conversation": CHATS[0],
    "text": TEXTS[0],
    "tokens": {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
}
STRICT = (
    "{%- for message in messages %}{%- if message.role == 'system' %}{{ raise_exception('no system, please') }}"
    "{%- endif %}{{ message.role + message.content + '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ 'assistant' }}{%- endif %}"
)
LONG = "many words are in here " * 10
REFUSED = {
    "empty answer": ("preference", {"chosen": ""}, {}, "chosen must not be empty, got ''"),
    "empty rejected answer": ("preference", {"rejected": ""}, {}, "rejected must not be empty, got ''"),
    "None": ("preference", {"rejected": None}, {}, "rejected must be text or a list of messages, got None"),
    "number": ("preference", {"prompt": 3}, {}, "prompt must be text or a list of messages, got 3"),
    "two kinds": ("preference", {"chosen": [turn("assistant", "a")]}, {}, "chosen and rejected must both be text"),
    "no messages": ("preference", {"chosen": [], "rejected": []}, {}, "chosen must be text or a list of messages"),
    "long prompt": ("preference", {"prompt": LONG}, {"max_length": 16}, "max_length=16 must leave a token of chosen"),
    "missing": (
        "preference",
        {"chosen": ...},
        {},
        "a row must have the columns chosen, rejected, got prompt, rejected",
    ),
    "empty completion": ("completion", {"completion": ""}, {}, "completion must not be empty, got ''"),
    "empty turn": ("completion", {"completion": [turn("assistant", "")]}, {}, "completion must not be empty"),
    "long prompt of a completion": (
        "completion",
        {"prompt": LONG},
        {"max_length": 16},
        "max_length=16 must leave a token of completion to score, got them at ",
    ),
    "no prompt": ("completion", {"prompt": None}, {}, "prompt must be text or a list of messages, got None"),
    "no role": ("conversation", {"messages": [{"content": "a"}]}, {}, "messages[0].role must be text, got None"),
    "no content": ("conversation", {"messages": [turn("user", None)]}, {}, "messages[0].content must be text"),
    "text for messages": ("conversation", {"messages": "hello"}, {}, "messages must be a list of messages, got text"),
    "the template's error": (
        "conversation",
        {"messages": [turn("system", "a"), turn("user", "b")]},
        {},
        "the chat template must render the row, got its error: no system, please",
    ),
    "content that the template cannot take": (
        "conversation",
        {"messages": [turn("user", [{"type": "text", "text": "a"}])]},
        {},
        "TypeError: ",
    ),
    "empty text": ("text", {"text": ""}, {}, "text must not be empty, got ''"),
    "text of another type": ("text", {"text": 7.5}, {}, "text must be text, got 7.5"),
    "half a character": ("text", {"text": "\ud800"}, {}, "TypeError: "),
    "text of None": ("text", {"text": None}, {}, "text must be text, got None"),
    "tokens of text": ("tokens", {"input_ids": "abc"}, {}, "input_ids must be a list of integers, got 'abc'"),
    "fractions": ("tokens", {"input_ids": [1.5, 2.0, 3.0]}, {}, "input_ids must be a list of integers, got [1.5"),
    "unknown tokens": ("tokens", {"input_ids": [1, 99999, 3]}, {}, "input_ids must be tokens from 0 to "),
    "negative tokens": ("tokens", {"input_ids": [1, -100, 3]}, {}, "input_ids must be tokens from 0 to "),
    "other lengths": ("tokens", {"labels": [1, 2]}, {}, "labels must be as long as input_ids (3), got 2"),
    "no label": ("tokens", {"labels": [1, -100, -100]}, {}, "input_ids must have a token to score after the first"),
    "no tokens": ("tokens", {"input_ids": [], "labels": []}, {}, "input_ids must have a token to score"),
    "not a mapping": ("text", 5, {}, "a row must be a mapping from columns to values, got int"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_row_is_refused_by_name_and_the_others_are_kept(name, folder):
    kind, change, options, reason = REFUSED[name]
    tokenizer = AutoTokenizer.from_pretrained(folder, chat_template=STRICT)
    good = GOOD[kind]
    bad = {k: x for k, x in (good | change).items() if x is not ...} if isinstance(change, dict) else change
    rows = [good, bad, good]
    source = Rows(rows, tokenizer, RowOptions(**options))
    examples, refused = source.examples(0, 3)
    assert [example.row for example in examples] == [0, 2]
    assert [row for row, _ in refused] == [1]
    assert refused[0].reason.startswith(reason)
    assert "\n" not in refused[0].reason
    assert refused[0].reason


def test_assistant_only_loss_needs_an_assistant_turn(tokenizer, folder):
    rows = [CHATS[0], {"messages": [turn("user", "hello?")]}]
    _, refused = Rows(rows, tokenizer, RowOptions(assistant_only_loss=True)).examples(0, 2)
    reason = "the chat template must mark the assistant's tokens with {% generation %}, got none marked"
    assert refused == [(1, reason)]
    rows = [{"prompt": [turn("user", "a")], "completion": [turn("assistant", "b")]}, ANSWERED[0]]
    _, refused = Rows(rows, tokenizer, RowOptions(assistant_only_loss=True)).examples(0, 2)
    assert [row for row, _ in refused] == [1]
    assert "got text" in refused[0].reason


def test_reasons_are_counted_without_row_specific_values():
    assert reason_kind("messages[3].role must be text, got None") == "messages[...].role must be text"
    assert reason_kind("max_length=16 must leave a token of chosen to score, got them at 3 to 5 of 7 tokens") == (
        "max_length=16 must leave a token of chosen to score"
    )


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "at least one row, got none"),
        ([{"question": "a"}], {}, r"must have the columns chosen\+rejected or .* or text, got question"),
        ([{"text": "a"}], {"dataset_text_field": "body"}, r"or body, got text"),
        ([{"text": "a"}], {"assistant_only_loss": True}, "assistant_only_loss needs messages"),
        (PLAIN, {"assistant_only_loss": True}, "assistant_only_loss needs messages"),
        (PLAIN, {"completion_only_loss": False}, "completion_only_loss needs the columns prompt, completion"),
        (PLAIN, {"stride": 3}, "stride is for plain text"),
        ([PLAIN[0] | {"image": "a.png"}], {}, "must be of text alone"),
    ],
)
def test_options_that_no_row_can_satisfy_are_refused_at_once(rows, options, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        Rows(rows, tokenizer, RowOptions(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "max_length must be 2 or more"),
        ({"truncation_mode": "middle"}, "truncation_mode must be keep_start or keep_end, got 'middle'"),
        ({"stride": 0}, "stride must be 1 or more, got 0"),
        ({"stride": 8, "max_length": 8}, "stride must be less than max_length=8"),
    ],
)
def test_options_out_of_range_raise(options, message):
    with pytest.raises(ValueError, match=message):
        RowOptions(**options)


def test_missing_tokenizer_features_are_refused_at_once(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    for rows in (CHATS, read("preferences", 2)):
        with pytest.raises(ValueError, match="must have a chat template"):
            Rows(rows, tokenizer, RowOptions())
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="must have an eos_token"):
        Rows(TEXTS, tokenizer, RowOptions())


def test_a_stream_is_refused(tokenizer):
    with pytest.raises(TypeError, match=r"must have a length .*, got IterableDataset"):
        Rows(Dataset.from_list(TEXTS).to_iterable_dataset(), tokenizer, RowOptions())


def test_slices_equal_the_full_list(tokenizer):
    source = Rows(Dataset.from_list(read("preferences", 25)), tokenizer, RowOptions(max_length=20))
    full = source.examples(0, 25)
    parts = [source.examples(start, start + 10) for start in (0, 10, 20)]
    assert [example for examples, _ in parts for example in examples] == full[0]
    assert [row for _, refused in parts for row in refused] == full[1]
    assert full[0]
    assert full[1]
    assert source.examples(0, 25) == full


def test_a_reading_thread_logs_nothing_and_restores_trl(tokenizer, monkeypatch, caplog, capsys):
    """TRL logs how each prompt was truncated, through a logger that needs accelerate's process state."""
    monkeypatch.setattr(PartialState, "_shared_state", {})
    before = {name: vars(trl.trainer.dpo_trainer)[name] for name in ("logger", "global_then_local_main_first")}
    rows = [{"prompt": "a boat has th", "chosen": "e sail" * 600, "rejected": "at sail"}, PLAIN[0]]
    assert tokens("a boat has the", tokenizer)[: len(tokens("a boat has th", tokenizer))] != tokens(
        "a boat has th", tokenizer
    )
    source = Rows(Dataset.from_list(rows), tokenizer, RowOptions())
    results = []
    with caplog.at_level(logging.DEBUG):
        thread = threading.Thread(target=lambda: results.append(source.examples(0, 2)))
        thread.start()
        thread.join()
    ((examples, refused),) = results
    assert len(examples) == 2
    assert not refused
    assert not caplog.records
    assert "".join(capsys.readouterr()) == ""
    assert PartialState._shared_state == {}
    assert {name: vars(trl.trainer.dpo_trainer)[name] for name in before} == before
