"""Data formats in use: those in TRL's documentation, ShareGPT, UltraFeedback; and faulty data."""

import json
import re

import datasets
import pytest
from datasets import Dataset

from fusedalign.cli import main
from fusedalign.trl.arguments import parse
from fusedalign.trl.contents import survey
from fusedalign.trl.data import served
from fusedalign.trl.train import build

METHODS = ["sft", "dpo", "kto", "cpo", "simpo", "orpo"]
USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "Hi?"), ("assistant", "Hello."), ("assistant", "No."))
)
SYSTEM = {"role": "system", "content": "Be kind."}
MORE = {"role": "user", "content": "And?"}


def user_turn(user, **fields):
    return [{"role": "user", "content": user, **fields}]


def assistant_turn(assistant, **fields):
    return [{"role": "assistant", "content": assistant, **fields}]


TEXT = {"prompt": "Hi?", "chosen": " Hello.", "rejected": " No."}
CHAT = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
WHOLE = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
SCORES = {"prompt_id": "x1", "score_chosen": 8.5, "score_rejected": 2.0, "messages": [USER, GOOD]}

#: name -> (row, its form for DPO, CPO, SimPO and ORPO)
PAIRS = {
    "text": (TEXT, TEXT),
    "messages": (CHAT, CHAT),
    "text without a prompt": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    ),
    "text without anything in common": (
        {"chosen": "Yes ", "rejected": "No"},
        {"prompt": "", "chosen": "Yes ", "rejected": "No"},
    ),
    "messages without a prompt": (WHOLE, CHAT),
    "UltraFeedback": ({"prompt": "Hi?", **WHOLE, **SCORES}, CHAT),
    "UltraFeedback with a system prompt": (
        {"prompt": "Hi?", "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
        CHAT | {"prompt": [SYSTEM, USER]},
    ),
    "UltraFeedback of several turns": (
        {"prompt": "Hi?", "chosen": [USER, GOOD, MORE, GOOD], "rejected": [USER, GOOD, MORE, BAD]},
        CHAT | {"prompt": [USER, GOOD, MORE]},
    ),
    "two answers that are the same": (
        {"prompt": "Hi?", "chosen": [USER, GOOD], "rejected": [USER, GOOD]},
        CHAT | {"rejected": [GOOD]},
    ),
    "a string beside answers alone": ({**CHAT, "prompt": "Hi?"}, CHAT),
    "a string beside a system prompt and the answer": (
        {"prompt": "Hi?", "chosen": [SYSTEM, GOOD], "rejected": [SYSTEM, BAD]},
        CHAT | {"prompt": [SYSTEM, USER]},
    ),
    "messages beside text": ({**CHAT, "chosen": "Hello.", "rejected": "No."}, CHAT),
    "the prompt again in the answers": ({**CHAT, **WHOLE}, CHAT),
    "ShareGPT": (
        {
            "prompt": [{"from": "human", "value": "Hi?"}],
            "chosen": [{"from": "gpt", "value": "Hello."}],
            "rejected": [{"from": "gpt", "value": "No."}],
        },
        CHAT,
    ),
    "extra columns": ({**TEXT, "text": "x", "completion": "y", "label": True, "source": "z"}, TEXT),
}
CHAT_COMPLETION = {"prompt": [USER], "completion": [GOOD]}
#: name -> (row, its form for SFT)
SUPERVISED = {
    "text": ({"text": "The sky is blue."}, None),
    "messages": ({"messages": [USER, GOOD]}, None),
    "prompt and completion": ({"prompt": "Hi?", "completion": " Hello."}, None),
    "prompt and completion as messages": (CHAT_COMPLETION, None),
    "a string and a conversation": ({"prompt": "Hi?", "completion": [USER, GOOD]}, CHAT_COMPLETION),
    "tokens": ({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, None),
    "conversations": ({"conversations": [USER, GOOD]}, {"messages": [USER, GOOD]}),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}], "id": "a1"},
        {"messages": [USER, GOOD]},
    ),
    "ShareGPT with a system prompt": (
        {"conversations": [{"from": n, "value": v} for n, v in (("system", "Be kind."), ("user", "Hi?"))]},
        {"messages": [SYSTEM, USER]},
    ),
    "text beside a completion": (
        {"prompt": "Hi?", "completion": " Hello.", "text": "x"},
        {"prompt": "Hi?", "completion": " Hello."},
    ),
    "messages beside a prompt": ({"prompt": "Hi?", "messages": [USER, GOOD]}, {"messages": [USER, GOOD]}),
    "chosen": (TEXT, {"prompt": "Hi?", "completion": " Hello."}),
    "chosen as messages": (CHAT, CHAT_COMPLETION),
    "chosen without a prompt": (WHOLE, {"messages": [USER, GOOD]}),
    "UltraFeedback": ({"prompt": "Hi?", **WHOLE}, CHAT_COMPLETION),
    "UltraFeedback binarized": ({"prompt": "Hi?", **WHOLE, **SCORES}, {"messages": [USER, GOOD]}),
}
LABELLED = {"prompt": [USER], "completion": [GOOD], "label": True}
#: name -> (row, its form for KTO), in addition to the pairs
UNPAIRED = {
    "text": ({"prompt": "Hi?", "completion": " Hello.", "label": True}, None),
    "messages": (LABELLED, None),
    "a string and a conversation": ({"prompt": "Hi?", "completion": [USER, GOOD], "label": True}, LABELLED),
    "a string and several turns": (
        {"prompt": "Hi?", "completion": [USER, GOOD, MORE, BAD], "label": False},
        {"prompt": [USER, GOOD, MORE], "completion": [BAD], "label": False},
    ),
    "extra columns": ({**LABELLED, "score": 3, "messages": [USER]}, LABELLED),
}
EVERY = [(method, kind) for method in ("dpo", "cpo", "simpo", "orpo", "kto") for kind in PAIRS]
EVERY += [("sft", kind) for kind in SUPERVISED] + [("kto", kind) for kind in UNPAIRED]


def example(method, kind):
    table = SUPERVISED if method == "sft" else PAIRS if kind in PAIRS and method != "kto" else {**PAIRS, **UNPAIRED}
    row, want = table[kind]
    return row, row if want is None else want


def relevant_columns(row, want):
    return {name: row[name] for name in row if name in {*want, "prompt", "messages", "text", "completion", "label"}}


@pytest.mark.parametrize("stream", [False, True], ids=["", "stream"])
@pytest.mark.parametrize(("method", "kind"), EVERY)
def test_every_shape_is_converted_to_the_trainers_format(method, kind, stream):
    row, want = example(method, kind)
    dataset = Dataset.from_list([row] * 3)
    got = served(dataset.to_iterable_dataset() if stream else dataset, method, "mine.jsonl")
    assert [relevant_columns(r, want) for r in got] == [want] * 3


TOKENS = [(m, k) for m in ("sft", "dpo", "kto", "orpo") for k in ("UltraFeedback", "ShareGPT")]
TOKENS += [
    ("dpo", "messages without a prompt"),
    ("simpo", "text without a prompt"),
    ("kto", "a string and several turns"),
]


def flags(tmp_path, folder, **options):
    options = {
        "model_name_or_path": folder,
        "output_dir": tmp_path / "out",
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "eval_strategy": "no",
        "save_strategy": "no",
        "bf16": "false",
        "use_cpu": "true",
        "report_to": "none",
        **options,
    }
    return [str(word) for name, x in options.items() for word in (f"--{name}", x)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("method", "kind"), TOKENS)
def test_every_shape_is_tokenised_like_its_plain_form(method, kind, tmp_path, embedded_folder):
    tokenised = []
    for name, row in zip(("mine", "plain"), example(method, kind), strict=True):
        file = write(tmp_path / f"{name}.jsonl", [row] * 2)
        trainer = build(method, parse(method, flags(tmp_path, embedded_folder, dataset_name=file)))
        columns = [c for c in trainer.train_dataset.column_names if c.endswith(("ids", "labels", "mask"))]
        tokenised.append(trainer.train_dataset.select_columns(columns).to_list())
    assert tokenised[0] == tokenised[1]


@pytest.mark.parametrize("method", METHODS)
def test_ultrafeedback_trains(method, tmp_path, embedded_folder, capsys):
    file = write(tmp_path / "mine.jsonl", [PAIRS["UltraFeedback"][0]] * 4)
    assert main([method, *flags(tmp_path, embedded_folder, dataset_name=file)]) == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("stream", ["false", "true"])
@pytest.mark.parametrize("kind", ["ShareGPT", "conversations"])
def test_conversations_train(kind, stream, tmp_path, embedded_folder, capsys):
    file = write(tmp_path / "mine.jsonl", [SUPERVISED[kind][0]] * 4)
    options = flags(tmp_path, embedded_folder, dataset_name=file, assistant_only_loss="true", dataset_streaming=stream)
    assert main(["sft", *options]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("row", [{"body": "The sky is blue."}, {"prompt": "x", "text": "y", "answer": "blue"}])
def test_dataset_text_field_selects_the_text(row, tmp_path, embedded_folder):
    field = list(row)[-1]
    file = write(tmp_path / "mine.jsonl", [row] * 4)
    options = flags(tmp_path, embedded_folder, dataset_name=file, dataset_text_field=field)
    trainer = build("sft", parse("sft", options))
    decoded = trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])
    assert decoded == row[field] + trainer.processing_class.eos_token


def test_a_missing_text_field_is_an_error(tmp_path, embedded_folder, capsys):
    file = write(tmp_path / "mine.jsonl", [{"body": "x"}])
    assert main(["sft", *flags(tmp_path, embedded_folder, dataset_name=file, dataset_text_field="story")]) == 2
    assert "or conversations or story or chosen, got" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "want"),
    [
        (["true", "false"], [True, False]),
        (["True", " FALSE"], [True, False]),
        ([1, 0], [True, False]),
        (["1", "0"], [True, False]),
        ([1.0, 0.0], [True, False]),
        (["yes", "no"], [True, False]),
    ],
)
def test_kto_labels_may_be_words_and_numbers(labels, want):
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in labels]
    got = served(Dataset.from_list(rows), "kto", "mine.jsonl")
    assert [row["label"] for row in got] == want
    assert got.features["label"] == datasets.Value("bool")
    assert [row["label"] for row in served(Dataset.from_list(rows).to_iterable_dataset(), "kto", "x")] == want


LABEL = {"prompt": "a", "completion": "b", "label": "true"}
NEITHER = "must be text or a list of messages, got"
#: name -> (method, valid row, changes that break the third row, error message)
WRONG = {
    "no prompt": ("dpo", TEXT, {"prompt": None}, f"prompt {NEITHER} None"),
    "no chosen": ("orpo", CHAT, {"chosen": None}, f"chosen {NEITHER} None"),
    "number": ("simpo", TEXT, {"rejected": 3}, f"rejected {NEITHER} 3"),
    "no messages": ("dpo", CHAT, {"chosen": []}, f"chosen {NEITHER} []"),
    "no content": ("dpo", CHAT, {"prompt": user_turn(None)}, "prompt[0].content must be text, got None"),
    "number as content": ("cpo", CHAT, {"prompt": user_turn(7)}, "prompt[0].content must be text, got 7"),
    "no role": ("dpo", CHAT, {"prompt": [{"content": "a"}]}, "prompt[0].role must be text, got None"),
    "no message": ("dpo", CHAT, {"prompt": ["a"]}, "prompt[0] must be a message with role and content, got 'a'"),
    "text and messages": ("kto", CHAT, {"chosen": "a"}, "chosen and rejected must both be text or both be messages"),
    "nothing shared": (
        "dpo",
        WHOLE,
        {"chosen": [GOOD]},
        "without a prompt, chosen and rejected must begin with the same message, got {'role': 'assistant'",
    ),
    "completion": ("sft", {"prompt": "a", "completion": "b"}, {"completion": None}, f"completion {NEITHER} None"),
    "text": ("sft", {"text": "a"}, {"text": None}, "text must be text, got None"),
    "text as number": ("sft", {"text": "a"}, {"text": 1}, "text must be text, got 1"),
    "messages as text": (
        "sft",
        {"messages": [USER]},
        {"messages": "a"},
        "messages must be a list of messages, got text",
    ),
    "no value": (
        "sft",
        SUPERVISED["ShareGPT"][0],
        {"conversations": [{"from": "gpt", "value": None}]},
        "conversations[0].content must be text",
    ),
    "chosen side": ("sft", TEXT, {"chosen": None}, f"completion {NEITHER} None"),
    "misspelt content": (
        "dpo",
        CHAT,
        {"prompt": [{"role": "user", "contnet": "Hi?"}]},
        "prompt[0].content must be text, got None, with the key contnet",
    ),
    "misspelt role": (
        "sft",
        {"messages": [USER, GOOD]},
        {"messages": [USER, {"rol": "assistant", "content": "a"}]},
        "messages[1].role must be text, got None, with the key rol",
    ),
    "text then messages": ("dpo", TEXT, CHAT, "prompt must be text as in row 1, got messages"),
    "messages then text": ("kto", CHAT, TEXT, "prompt must be messages as in row 1, got text"),
    "label": ("kto", LABEL, {"label": "maybe"}, "label must be true or false (1 or 0), got 'maybe'"),
    "label 2": ("kto", LABEL, {"label": 2}, "label must be true or false (1 or 0), got 2"),
    "label 0.7": ("kto", LABEL | {"label": 1.0}, {"label": 0.7}, "label must be true or false (1 or 0), got 0.7"),
    "no label": ("kto", LABEL | {"label": True}, {"label": None}, "label must be true or false (1 or 0), got None"),
}


@pytest.mark.parametrize("stream", ["false", "true"])
@pytest.mark.parametrize("name", WRONG)
def test_a_bad_row_is_named(name, stream, tmp_path, embedded_folder, capsys):
    method, good, change, message = WRONG[name]
    file = write(tmp_path / "mine.jsonl", [good, good, good | change])
    options = flags(tmp_path, embedded_folder, dataset_name=file, dataset_streaming=stream)
    assert main([method, *options]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fusedalign: error:")]
    assert len(errors) == 1
    assert f"{file}, row 3: {message}" in errors[0]
    assert len(errors[0]) < 400


TYPO = {"role": "asistant", "content": "Hello."}
EMPTY = {"role": "assistant", "content": " "}
ANSWERED = {"messages": [USER, GOOD]}
WRITTEN = "[{'role': 'user', 'content': 'Hi?'}, {'role': 'assistant', 'content': 'Hello.'}]"
#: name -> (method, valid row, changes that make a row doubtful, the finding in all rows of a column, may it train)
DOUBTFUL = {
    "misspelt role": ("sft", ANSWERED, {"messages": [USER, TYPO]}, "messages has the role 'asistant' in", True),
    "capital": ("kto", CHAT, {"prompt": [{**USER, "role": "User"}]}, "prompt has the role 'User' in", True),
    "another word": ("dpo", CHAT, {"rejected": [{**BAD, "role": "gpt"}]}, "rejected has the role 'gpt' in", True),
    "empty text": ("sft", {"text": "a"}, {"text": ""}, "text is empty in", False),
    "spaces": ("sft", {"prompt": "a", "completion": "b"}, {"completion": " \n"}, "completion is empty in", False),
    "empty chosen": ("simpo", TEXT, {"chosen": ""}, "chosen is empty in", False),
    "empty label": ("kto", LABEL, {"completion": ""}, "completion is empty in", False),
    "empty answer": ("dpo", CHAT, {"rejected": [EMPTY]}, "rejected has an empty answer in", False),
    "empty turn": ("sft", ANSWERED, {"messages": [USER, EMPTY]}, "messages has an empty answer in", False),
    "JSON": ("orpo", TEXT, {"chosen": json.dumps([GOOD])}, "chosen has messages written as text in", False),
    "Python": ("dpo", TEXT, {"rejected": WRITTEN}, "rejected has messages written as text in", False),
}


@pytest.mark.parametrize("stream", [False, True], ids=["", "stream"])
@pytest.mark.parametrize("name", DOUBTFUL)
def test_doubtful_text_is_a_warning_or_in_all_rows_an_error(name, stream):
    method, good, change, finding, may_train = DOUBTFUL[name]

    def found(rows):
        dataset = Dataset.from_list(rows)
        dataset = served(dataset.to_iterable_dataset() if stream else dataset, method, "mine.jsonl")
        return survey(dataset, "mine.jsonl")

    bad, scope = good | change, "the first " if stream else ""
    assert found([good] * 3) == []
    (text,) = found([good, bad, good, bad])
    assert text.startswith(f"mine.jsonl: {finding} 2 of {scope}4 rows (the first is row 2): ")
    if may_train:
        (text,) = found([bad] * 3)
        assert text.startswith(f"mine.jsonl: {finding} all {scope}3 rows: did you mean ")
    else:
        with pytest.raises(ValueError, match=re.escape(f"mine.jsonl: {finding} all {scope}3 rows: ")):
            found([bad] * 3)


def test_custom_roles_calls_of_tools_and_parts_are_not_doubtful():
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    tool = {"role": "tool", "content": "3", "name": "f"}
    for messages in (
        [{"role": "critic", "content": "a"}, GOOD],
        [USER, call, tool],
        [{"role": role, "content": [{"type": "text", "text": "a"}]} for role in ("user", "assistant")],
        [SYSTEM, {"role": "developer", "content": "Be brief."}, USER, GOOD],
    ):
        assert survey(served(Dataset.from_list([{"messages": messages}]), "sft", "x"), "x") == []
    mixed = [{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, GOOD]}] * 2
    stream = datasets.IterableDataset.from_generator(lambda: iter(mixed))
    assert survey(served(stream, "sft", "x"), "x") == []


def test_findings_of_the_text_are_printed_by_the_training_and_its_check(tmp_path, embedded_folder, capsys, caplog):
    file = write(tmp_path / "mine.jsonl", [ANSWERED, {"messages": [USER, TYPO]}])
    finding = (
        "mine.jsonl: messages has the role 'asistant' in 1 of 2 rows (the first is row 2): did you mean assistant?"
    )
    options = flags(tmp_path, embedded_folder, dataset_name=file)
    assert main(["sft", *options, "--dry_run"]) == 0
    assert finding in " ".join(capsys.readouterr().out.split())
    build("sft", parse("sft", options))
    assert finding in caplog.text


def test_messages_that_a_chat_template_leaves_out_are_named(tmp_path, embedded_folder, caplog):
    template = "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
    (tmp_path / "own.jinja").write_text(template)
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "weather"}}]}
    options = {"dataset_name": write(tmp_path / "mine.jsonl", [{"messages": [SYSTEM, USER, call, GOOD]}] * 2)}
    build("sft", parse("sft", flags(tmp_path, embedded_folder, **options)))
    texts = [x.getMessage() for x in caplog.records if "leaves out" in x.getMessage()]
    assert texts == [
        f"the chat template of {embedded_folder} leaves out messages of 'assistant', such as 'weather': the model does "
        "not see them"
    ]
    caplog.clear()
    build("sft", parse("sft", flags(tmp_path, embedded_folder, chat_template_path=tmp_path / "own.jinja", **options)))
    texts = [x.getMessage() for x in caplog.records if "leaves out" in x.getMessage()]
    assert [text.partition(" leaves out ")[2].partition(",")[0] for text in texts] == [
        "messages of 'system'",
        "messages of 'assistant'",
    ]


PARTS = {"role": "assistant", "content": [{"type": "text", "text": "a"}]}
REFUSED = {
    "parts": ("sft", {"messages": [USER, PARTS]}, "row 2, with a list of parts as content, where this template may"),
    "parts in pairs": ("dpo", {**CHAT, "chosen": [PARTS]}, "row 2, with a list of parts as content"),
    "no answer": ("sft", {"messages": [USER, TYPO]}, "row 2 with user, asistant"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_that_the_chat_template_cannot_use_is_named(name, tmp_path, embedded_folder, capsys):
    method, row, message = REFUSED[name]
    good = ANSWERED if method == "sft" else CHAT
    file = write(tmp_path / "mine.jsonl", [good, row])
    options = {"assistant_only_loss": "true"} if name == "no answer" else {}
    assert main([method, *flags(tmp_path, embedded_folder, dataset_name=file, **options)]) == 2
    assert f"got {file}, split 'train', {message}" in capsys.readouterr().err


def test_messages_with_tool_calls_and_parts_are_accepted():
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    rows = [{"messages": [USER, call]}, {"messages": user_turn([{"type": "text", "text": "a"}])}]
    for row in rows:
        dataset = Dataset.from_list([row])
        assert served(dataset, "sft", "mine.jsonl").to_list() == dataset.to_list()


def raw(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


FILES = {
    "empty.jsonl": (b"", " must have at least one row, got none"),
    "blank.jsonl": (b"\n\n", " must have at least one row, got none"),
    "empty.json": (b"[]", " must have at least one row, got none"),
    "header.csv": (b"prompt,chosen,rejected\n", " must have at least one row, got none"),
    "empty.csv": (b"", " must have at least one row, got none"),
    "empty.parquet": (b"", " must have at least one row, got none"),
    "broken.jsonl": (raw(TEXT, TEXT) + b'{"prompt": "a", \n' + raw(TEXT), ", line 3: must be one JSON object, got"),
    "cut.jsonl": (raw(TEXT) + b'{"prompt": "a", "cho', ", line 2: must be one JSON object, got"),
    "first.jsonl": (b'{"prompt": "a", "cho\n' + raw(TEXT), ", line 1: must be"),
    "broken.json": (json.dumps([TEXT, TEXT], indent=1).encode()[:-20], ", line 10: must be JSON, got"),
    "lists.jsonl": (b"[1, 2]\n[3]\n", ", line 1: must be one JSON object, got '[1, 2]'"),
    "twice.jsonl": (raw(TEXT) + b'{"prompt":"a","prompt":"b","chosen":"c","rejected":"d"}\n', "the key 'prompt' twice"),
    "latin.jsonl": (raw(TEXT) + '{"prompt": "é"}\n'.encode("latin-1"), ", line 2: text must be UTF-8, got byte 0xe9"),
    "latin.csv": ("prompt,chosen,rejected\né,b,c\n".encode("latin-1"), ", line 2: text must be UTF-8, got byte 0xe9"),
    "wide.csv": (
        b"prompt,chosen,rejected\na,b,c\na,b,c,d,e\n",
        ", line 3: must have 3 fields as the first line has, got 5",
    ),
    "short.csv": (
        b"prompt,chosen,rejected\na,b,c\na,b\n",
        ", row 2: rejected must be text or a list of messages, got None",
    ),
    "null.csv": (b"prompt,chosen,rejected\na,,c\n", ", row 1: chosen must be text or a list of messages, got None"),
    "number.csv": (b"prompt,chosen,rejected\na,1,2\n", ", row 1: chosen must be text or a list of messages, got 1"),
    "columns.csv": (b"prompt,good,bad\na,b,c\n", " with prompt, good, bad"),
    "columns.json": (json.dumps({"data": [TEXT]}).encode(), " with data"),
    "lists.json": (
        json.dumps({n: [x, x] for n, x in TEXT.items()}).encode(),
        "[0] must be a message with role and content",
    ),
    "not.parquet": (b"hello", "dataset_name must be data that can be read, got"),
    "rows.txt": (raw(TEXT), "dataset_name must be a .jsonl, .json, .parquet, .csv or .arrow file"),
    "rows": (raw(TEXT), "dataset_name must be a .jsonl, .json, .parquet, .csv or .arrow file"),
}


@pytest.mark.parametrize("stream", ["false", "true"])
@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_named_with_its_line(name, stream, tmp_path, embedded_folder, capsys):
    content, message = FILES[name]
    if (name, stream) == ("latin.jsonl", "true"):  # streams are decoded by the datasets library
        message = name = "can't decode byte 0xe9"
    (tmp_path / name).write_bytes(content)
    options = flags(tmp_path, embedded_folder, dataset_name=tmp_path / name, dataset_streaming=stream)
    assert main(["dpo", *options]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fusedalign: error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert name in errors[0]
    assert len(errors[0]) < 450


PAIR = {"chosen": "b", "rejected": "c"}
#: name -> (method, row, the end of the error)
RENAMED = {
    "other words": ("dpo", {"question": "a", "good": "b", "bad": "c"}, ": rename 'question' to 'prompt', 'good' to"),
    "capitals": ("cpo", {"Prompt": "a", "Chosen": "b", "Rejected": "c"}, ": rename 'Prompt' to 'prompt', 'Chosen' to"),
    "spaces": ("kto", {"prompt": "a", " chosen": "b", " rejected": "c"}, "prompt, ' chosen', ' rejected': rename"),
    "Alpaca": ("sft", {"instruction": "a", "input": "", "output": "b"}, ": rename 'instruction' to 'prompt', 'output'"),
    "another method": ("dpo", {"messages": [USER, GOOD]}, " with messages; these columns are for sft"),
    "tokens as text": ("sft", {"input_ids": "1 2 3"}, ": input_ids must be lists of integers, got string"),
    "tokens as floats": (
        "sft",
        {"input_ids": [1.5, 2.0]},
        ": input_ids must be lists of integers, got lists of float64",
    ),
    "large token": ("sft", {"input_ids": [1, 2, 99999]}, "the model's vocabulary, got 99999"),
}


@pytest.mark.parametrize("name", RENAMED)
def test_columns_that_cannot_be_used_are_named_with_a_remedy(name, tmp_path, embedded_folder, capsys):
    method, row, message = RENAMED[name]
    file = write(tmp_path / "mine.jsonl", [row] * 2)
    assert main([method, *flags(tmp_path, embedded_folder, dataset_name=file)]) == 2
    assert message in capsys.readouterr().err


def test_a_csv_file_without_commas_is_named(tmp_path, embedded_folder, capsys):
    (tmp_path / "mine.csv").write_text("prompt;chosen;rejected\na;b;c\n")
    assert main(["dpo", *flags(tmp_path, embedded_folder, dataset_name=tmp_path / "mine.csv")]) == 2
    assert "with prompt;chosen;rejected: a .csv file must have commas between its fields" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "warns"),
    [
        ({"question": "Hi?", **PAIR}, True),  # the columns of orca_dpo_pairs
        ({"question": "Hi?", "chosen": "Hi? b", "rejected": "Hi? c"}, False),
        ({"question": "Hi?", **TEXT}, False),
        (PAIR, False),
    ],
)
def test_pairs_with_a_question_that_is_not_read_are_warned_of(row, warns, tmp_path, embedded_folder, caplog):
    file = write(tmp_path / "mine.jsonl", [row] * 2)
    build("dpo", parse("dpo", flags(tmp_path, embedded_folder, dataset_name=file)))
    assert ("'question' is not read, so answers train without it: rename it to 'prompt'" in caplog.text) == warns


@pytest.mark.parametrize("stream", ["false", "true"])
def test_a_saved_data_set_is_read(stream, tmp_path, embedded_folder):
    Dataset.from_list([TEXT] * 3).save_to_disk(str(tmp_path / "saved"))
    options = flags(tmp_path, embedded_folder, dataset_name=tmp_path / "saved", dataset_streaming=stream)
    assert len(list(build("dpo", parse("dpo", options)).train_dataset)) == 3


def test_urls_and_missing_splits_are_errors_that_say_what_to_do(tmp_path, embedded_folder, capsys):
    assert main(["dpo", *flags(tmp_path, embedded_folder, dataset_name="https://host/d.jsonl")]) == 2
    assert "got the URL https://host/d.jsonl: download it" in capsys.readouterr().err
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "test.jsonl", [TEXT])
    assert main(["dpo", *flags(tmp_path, embedded_folder, dataset_name=tmp_path / "data")]) == 2
    assert "(test), got 'train': add --dataset_train_split test" in capsys.readouterr().err


SERVED = {
    "bom.jsonl": b"\xef\xbb\xbf" + raw(TEXT, TEXT),
    "array.json": json.dumps([TEXT, TEXT], indent=1).encode(),
    "rows.csv": b"prompt,chosen,rejected\nHi?, Hello., No.\nHi?, Hello., No.\n",
    "bom.csv": b"\xef\xbb\xbfprompt,chosen,rejected\nHi?, Hello., No.\nHi?, Hello., No.\n",
    "ROWS.JSONL": raw(TEXT, TEXT),
}


@pytest.mark.parametrize("name", SERVED)
def test_unusual_files_are_read(name, tmp_path, embedded_folder):
    (tmp_path / name).write_bytes(SERVED[name])
    trainer = build("dpo", parse("dpo", flags(tmp_path, embedded_folder, dataset_name=tmp_path / name)))
    assert trainer.processing_class.decode(trainer.train_dataset[1]["chosen_ids"]) == " Hello.<|im_end|>"


def test_folders_of_splits_are_read_or_refused(tmp_path, embedded_folder, capsys):
    data = tmp_path / "data"
    data.mkdir()
    options = flags(tmp_path, embedded_folder, dataset_name=data)
    assert main(["dpo", *options]) == 2
    assert "must be a folder with .jsonl, .json, .parquet, .csv or .arrow files, got" in capsys.readouterr().err
    (data / "README.md").write_text("what this is")
    assert main(["dpo", *options]) == 2
    assert f"got {data} with README.md" in capsys.readouterr().err
    write(data / "train.jsonl", [TEXT] * 2)
    assert len(build("dpo", parse("dpo", options)).train_dataset) == 2
    (data / "test.jsonl").write_bytes(raw(TEXT) + b"{")
    assert main(["dpo", *options]) == 2
    assert f"{data / 'test.jsonl'}, line 2: must be one JSON object" in capsys.readouterr().err


def test_a_bad_row_of_the_test_split_is_named(tmp_path, embedded_folder, capsys):
    data = tmp_path / "data"
    data.mkdir()
    write(data / "train.jsonl", [TEXT] * 2)
    write(data / "test.jsonl", [TEXT, {**TEXT, "chosen": None}])
    assert main(["dpo", *flags(tmp_path, embedded_folder, dataset_name=data, eval_strategy="epoch")]) == 2
    assert f"{data}, split 'test', row 2: chosen must be text" in capsys.readouterr().err
