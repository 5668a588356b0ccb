"""Hides passwords and access tokens in what a run records."""

from __future__ import annotations

import dataclasses
import enum
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

HIDDEN = "<redacted>"
_SECRET = re.compile(
    r"(token|password|passwd|passphrase|secret|(api|access|secret|private|account)[-_]?key|credential)s?$",
    re.IGNORECASE,
)
#: Fields that name a token of the vocabulary.
_VOCABULARY = frozenset(["eos_token", "pad_token", "bos_token", "unk_token", "image_token"])
#: An access token of the Hub, and the user and password of a URL, wherever they occur in a text.
_IN_TEXT = re.compile(r"\bhf_[A-Za-z0-9]{8,}|(?<=://)[^/\s@]+(?=@)")
#: A name and its value in JSON or in the query of a URL.
_NAMED = re.compile(
    r'(?P<start>"(?P<key>[^"]+)"\s*:\s*"|[?&](?P<field>[\w-]+)=)(?P<value>(?(key)(\\.|[^"\\])|[^&\s])+)'
)
#: Shorter values are hidden under their name only: replaced in a text they would take away words.
_SHORTEST = 6


class Redactor:
    """Replaces secrets in plain data and texts.

    Secrets are: text under a name like `hub_token` or `password`, in data, in JSON or in the query of a URL, and the
    same text elsewhere; the value of an environment variable with a name like these; an access token of the Hub; the
    user and password of a URL.

    Args:
        sources: data that may hold secrets; environment variables are added.
    """

    def __init__(self, *sources: Any) -> None:
        found = {value for source in (*sources, dict(os.environ)) for value in _secrets(source)}
        self._values = sorted((value for value in found if len(value) >= _SHORTEST), key=len, reverse=True)

    def data(self, value: Any, name: str = "") -> Any:
        """Data with secrets replaced: dataclasses become dictionaries, enumerations their values."""
        value = _unwrapped(value)
        if isinstance(value, str):
            return HIDDEN if value and _is_secret(name) else self.text(value)
        if isinstance(value, Mapping):
            return {str(key): self.data(entry, str(key)) for key, entry in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self.data(entry, name) for entry in value]
        return value

    def words(self, words: Sequence[str]) -> list[str]:
        """The words of a command, with the values of flags such as `--hub_token` replaced."""
        shown, flag = [], ""
        for word in words:
            if word.startswith("--"):
                flag, equals, value = word.partition("=")
                hides = bool(value) and _is_secret(flag)
                shown.append(f"{flag}={HIDDEN}" if hides else self.text(word))
                flag = "" if equals else flag
            else:
                shown.append(HIDDEN if _is_secret(flag) else self.text(word))
        return shown

    def text(self, text: str) -> str:
        """A text without the secrets in it."""
        for value in self._values:
            text = text.replace(value, HIDDEN)
        return _NAMED.sub(_without_value, _IN_TEXT.sub(HIDDEN, text))


def flag_values(words: Sequence[str]) -> list[dict[str, str]]:
    """The values of a command's flags, as a source for `Redactor`."""
    found, flag = [], ""
    for word in words:
        if word.startswith("--"):
            flag, _, value = word.partition("=")
            found.append({flag: value})
        else:
            found.append({flag: word})
    return found


def _without_value(match: re.Match[str]) -> str:
    """A match of `_NAMED`, its value hidden if that is a secret by its name."""
    return match["start"] + (HIDDEN if _is_secret(match["key"] or match["field"]) else match["value"])


def _is_secret(name: str) -> bool:
    """Whether a field, an environment variable or a flag of this name holds a secret."""
    return name.lstrip("-").replace("-", "_") not in _VOCABULARY and _SECRET.search(name) is not None


def _unwrapped(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value


def _secrets(value: Any, name: str = "") -> Iterator[str]:
    value = _unwrapped(value)
    if isinstance(value, str):
        if value and _is_secret(name):
            yield value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _secrets(entry, str(key))
    elif isinstance(value, (list, tuple, set, frozenset)):
        for entry in value:
            yield from _secrets(entry, name)
