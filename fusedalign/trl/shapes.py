"""Rows of a data set in the shapes in which they are published, converted to the shape that TRL's trainers take.

A prompt or an answer is text or a conversation, a list of messages with `role` and `content`. TRL's trainers need both
of one kind, and the answer without the prompt. Each function here takes and returns a row, and raises ValueError with
the name of the field. Sources: TRL's "Dataset formats and types"; UltraFeedback (prompt a string, answers whole
conversations); ShareGPT (`from` and `value`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
Messages = list[dict[str, Any]]

#: The columns with text or conversations; a method keeps only those that it trains on.
TEXTS = ("prompt", "completion", "chosen", "rejected", "messages", "conversations", "text")

#: ShareGPT's names of the speakers.
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_LABELS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}


def preference(row: Row) -> Row:
    """A pair with an explicit prompt: prompt, chosen and rejected all text or all conversations.

    Without a prompt, or with a text prompt and whole conversations, the prompt is the common beginning of both answers.
    """
    chosen, rejected = value(row, "chosen"), value(row, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError(
            f"chosen and rejected must both be text or both be messages, got {_kind(chosen)} and {_kind(rejected)}"
        )
    if "prompt" not in row:
        n = _shared(chosen, rejected)
        if not n and not isinstance(chosen, str):
            raise ValueError(
                "without a prompt, chosen and rejected must begin with the same message, got "
                f"{_short(chosen[0])} and {_short(rejected[0])}"
            )
        return {**row, "prompt": chosen[:n], "chosen": chosen[n:], "rejected": rejected[n:]}
    prompt, (chosen, rejected) = _explicit(value(row, "prompt"), [chosen, rejected], _shared(chosen, rejected))
    return {**row, "prompt": prompt, "chosen": chosen, "rejected": rejected}


def unpaired(row: Row) -> Row:
    """A single answer for KTO: prompt and completion of one kind, the label a bool."""
    label = row["label"]
    word = str(int(label) if isinstance(label, float) and label.is_integer() else label).strip().lower()
    if word not in _LABELS:
        raise ValueError(f"label must be true or false (1 or 0), got {label!r}")
    return {**prompt_completion(row), "label": _LABELS[word]}


def prompt_completion(row: Row) -> Row:
    """Prompt and completion, both text or both messages; the last turn of a whole conversation is the completion."""
    completion = value(row, "completion")
    prompt, (completion,) = _explicit(value(row, "prompt"), [completion], len(completion) - 1)
    return {**row, "prompt": prompt, "completion": completion}


def chosen_side(row: Row) -> Row:
    """A pair as a row for SFT: prompt and chosen answer, or, without a prompt, the whole chosen side."""
    chosen, others = row["chosen"], {name: x for name, x in row.items() if name not in ("chosen", "rejected")}
    if "prompt" in row:
        return prompt_completion({**others, "completion": chosen})
    chosen = value(row, "chosen")
    return {**others, "text" if isinstance(chosen, str) else "messages": chosen}


def conversation(row: Row) -> Row:
    """`messages`, also from ShareGPT's `conversations`."""
    field = "messages" if "messages" in row else "conversations"
    messages = value(row, field)
    if isinstance(messages, str):
        raise ValueError(f"{field} must be a list of messages, got text: {_short(messages)}")
    return {**{name: x for name, x in row.items() if name != "conversations"}, "messages": messages}


def text(row: Row) -> Row:
    """Text in every field."""
    for field, content in row.items():
        if not isinstance(content, str):
            raise ValueError(f"{field} must be text, got {_short(content)}")
    return row


def value(row: Row, field: str) -> Any:
    """Text, or messages with `role` and `content`.

    Raises:
        ValueError: neither, naming the field or the message in it.
    """
    content = row[field]
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ValueError(f"{field} must be text or a list of messages, got {_short(content)}")
    return [_message(message, f"{field}[{i}]") for i, message in enumerate(content)]


def _message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"{name} must be a message with role and content, got {_short(message)}")
    if message.get("role") is None and message.get("from") is not None:
        others = {key: x for key, x in message.items() if key not in ("from", "value", "role", "content")}
        role = message["from"]
        message = {"role": SHAREGPT_ROLES.get(role, role), "content": message.get("value"), **others}
    if not isinstance(message.get("role"), str):
        raise ValueError(f"{name}.role must be text, got {_found(message, 'role')}")
    content = message.get("content")
    if not isinstance(content, (str, list)) and not (content is None and message.get("tool_calls")):
        raise ValueError(f"{name}.content must be text, got {_found(message, 'content')}")
    return message


def _found(message: dict[str, Any], key: str) -> str:
    """The value of a key for an error; where the message lacks it, the message's other keys."""
    others = [name for name, x in message.items() if x is not None and name not in ("role", "content")]
    is_missing = message.get(key) is None and others
    return f"None, with the key {', '.join(others)}" if is_missing else _short(message.get(key))


def _explicit(prompt: Any, answers: list[Any], n: int) -> tuple[Any, list[Any]]:
    """Prompt and answers of one kind, the prompt not repeated in them; whole conversations are split at n messages."""
    if isinstance(prompt, str) and isinstance(answers[0], str):
        return prompt, answers
    if isinstance(prompt, str):
        opening = answers[0][:n]
        if not any(message["role"] == "user" for message in opening):  # the answers do not contain the question
            opening = [*opening, {"role": "user", "content": prompt}]
        return opening, [answer[n:] for answer in answers]
    if isinstance(answers[0], str):
        return prompt, [[{"role": "assistant", "content": answer}] for answer in answers]
    if all(answer[: len(prompt)] == prompt and len(answer) > len(prompt) for answer in answers):
        return prompt, [answer[len(prompt) :] for answer in answers]
    return prompt, answers


def _shared(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """The number of common first messages or characters, as in TRL's `extract_prompt`: each side keeps at least one."""
    shortest = min(len(chosen), len(rejected))
    n = next((i for i in range(shortest) if chosen[i] != rejected[i]), None)
    if n is None:
        return max(shortest - 1, 0)
    return n - 1 if n and chosen[n - 1] == " " else n  # the space belongs to the answer


def _kind(content: Any) -> str:
    return "text" if isinstance(content, str) else "messages"


def _short(content: Any) -> str:
    text = repr(content)
    return text if len(text) <= 80 else text[:77] + "..."
