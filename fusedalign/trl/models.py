"""The model that a command names: a folder, a Hub name, the embedded one, or an adapter and its base model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import GatedRepoError
from transformers.utils import cached_file

from fusedalign.embedded import EMBEDDED_NAME, build_embedded_model
from fusedalign.trl.contents import conversations, render

ADAPTER_CONFIG = "adapter_config.json"


def model_path(name: str | None, training: Any) -> str:
    """The folder or Hub name of the model; the embedded one is built first.

    Raises:
        ValueError: no name.
        FileNotFoundError: a folder that does not exist or holds no model.
    """
    if not name:
        raise ValueError(f"model_name_or_path must name a model folder, a Hub model or {EMBEDDED_NAME!r}, got nothing")
    if name == EMBEDDED_NAME:
        directory = Path(training.output_dir) / "embedded-model"
        with training.main_process_first(desc="building the embedded model"):
            if training.process_index == 0:
                build_embedded_model(directory, seed=training.seed)
        return str(directory)
    check_folder(name, "model_name_or_path", adapter=True)
    return name


def check_folder(name: str, what: str, *, adapter: bool = False) -> None:
    """Raise FileNotFoundError for a local folder that does not exist or holds no model; a Hub model's name passes.

    With `adapter` a folder with an adapter passes too.
    """
    folder, configs = Path(name), ["config.json", *([ADAPTER_CONFIG] if adapter else [])]
    if folder.is_dir() and not any((folder / file).is_file() for file in configs):
        names = sorted(p.name for p in folder.iterdir())
        checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: (len(path.name), path.name))
        hint = f"; the last checkpoint in it is {checkpoints[-1]}" if checkpoints else ""
        raise FileNotFoundError(
            f"{what} must be a folder with a {' or '.join(configs)}, got {name} "
            f"with {', '.join(names[:5]) or 'nothing'}{hint}"
        )
    if folder.is_file():
        raise FileNotFoundError(f"{what} must name a folder, got the file {name}")
    if not folder.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"{what} must name a folder that exists, got {name}{_train_first(what, name)}")


def _train_first(what: str, name: str) -> str:
    if what != "model_name_or_path":
        return ""
    return f"; if a training is to write it, run that first: fusedalign sft ... --output_dir {name}"


def check_has_head(path: str, what: str, *, revision: str | None = None, trust_remote_code: bool = False) -> None:
    """Raise unless the model's configuration names a causal LM. TRL would build another class too and fail later.

    Raises:
        ValueError: another model.
        FileNotFoundError: no model of that name, here or on the Hub.
    """
    options: Any = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        if Path(path).exists() or isinstance(error.__cause__, GatedRepoError):
            raise
        raise FileNotFoundError(
            f"{what} must name a model, got {path}: there is no such folder here, and the Hub has no such model "
            f"or cannot be reached{_train_first(what, path)}"
        ) from error
    names = config.architectures or ["no architecture in its config"]
    architecture = getattr(transformers, names[0], None)
    if architecture is None and names[0].isidentifier():
        return  # remote code
    if architecture is None or not architecture.can_generate():
        raise ValueError(f"{what} must name a causal LM with an LM head, got {path} with {names[0]}")


#: Patterns of the files of tokenizers of all families.
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")


def load_processing_class(path: str, *, auto: Any = transformers.AutoProcessor, **options: Any) -> Any:
    """The processor of a model, or its tokenizer where it has no processor, loaded as in TRL.

    Args:
        path: folder or Hub name.
        auto: the class of transformers that loads it.
        options: of `from_pretrained`.

    Raises:
        ValueError: a folder without a tokenizer; transformers may build an empty tokenizer from it.
    """
    folder = Path(path)
    if folder.is_dir() and not any(file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)):
        raise ValueError(f"the model must come with a tokenizer, got {path} without one: save it into that folder")
    return auto.from_pretrained(path, **options)


def check_ends(processing_class: Any, path: str, *, pads: bool, ends: bool) -> None:
    """Raise ValueError for a tokenizer or processor, loaded from `path`, without a token that the training needs.

    `pads`: a padding token, or an EOS token to pad with; `ends`: an EOS token.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer.eos_token is None and (ends or (pads and tokenizer.pad_token is None)):
        raise ValueError(
            f"the tokenizer of {path} must have an eos_token, got none"
            f"{' and no pad_token' if tokenizer.pad_token is None else ''}: "
            "set it in its tokenizer_config.json to the token that ends an answer"
        )


def check_has_template(processing_class: Any, path: str) -> None:
    """Raise ValueError for a tokenizer or processor, loaded from `path`, without a chat template."""
    if not getattr(processing_class, "chat_template", None):
        raise ValueError(
            f"the tokenizer of {path} must have a chat template for data with messages, got none: save one with it "
            "(chat_template.jinja in its folder), or pass text"
        )


def refused_row(processing_class: Any, splits: Mapping[str, Any]) -> str | None:
    """Split and number, from 1, of the first row with a conversation that the chat template refuses, as words."""
    for split, dataset in splits.items():
        for number, row in enumerate(dataset or (), 1):
            for messages in conversations(row):
                try:
                    render(processing_class, messages, row)
                except Exception:  # TemplateError, or what an operation in the template raises
                    return f"split {split!r}, row {number}{_with_parts(messages)}"
    return None


def _with_parts(messages: Iterable[Mapping[str, Any]]) -> str:
    has_parts = any(isinstance(message.get("content"), list) for message in messages)
    return ", with a list of parts as content, where this template may take text only" if has_parts else ""


def unanswered_row(splits: Mapping[str, Any]) -> str | None:
    """Split and number, from 1, of the first row with a conversation without a message of the assistant, as words."""
    for split, dataset in splits.items():
        for number, row in enumerate(dataset or (), 1):
            for messages in conversations(row):
                roles = [str(message.get("role")) for message in messages]
                if "assistant" not in roles:
                    return f"split {split!r}, row {number} with {', '.join(dict.fromkeys(roles))}"
    return None


def check_template(path: str | None) -> None:
    """Raise FileNotFoundError for a chat template that is neither here nor on the Hub."""
    if path is not None and not Path(path).is_file() and not has_file(path, "tokenizer_config.json"):
        raise FileNotFoundError(f"chat_template_path must name a .jinja file or a tokenizer's folder, got {path}")


def has_file(path: str, file: str, revision: str | None = None) -> bool:
    """Whether a folder or Hub repository holds a file."""
    if Path(path).is_dir():
        return (Path(path) / file).is_file()
    cases = ("gated_repo", "missing_entries", "connection_errors")
    options: Any = {f"_raise_exceptions_for_{case}": False for case in cases}
    try:
        return cached_file(path, file, revision=revision, **options) is not None
    except OSError:  # no such repository
        return False
