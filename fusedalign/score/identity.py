"""Digests that identify the models, tokenizers and data of a run by their content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

#: The files that define a model or an adapter, including custom modelling code.
_FILES = ("*.safetensors", "*.bin", "*.py", "config.json", "adapter_config.json")
_CHUNK = 2**24

#: Rows of a data set that are read at a time.
_ROWS = 1000


def files_digest(name: str, revision: str | None) -> str:
    """The digest of the files in the folder of a model or adapter; for a name of the Hub, the name and revision."""
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{revision or 'main'}"
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted({path for pattern in _FILES for path in folder.glob(pattern)}):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def model_digest(model: Any) -> list[str]:
    """The digests of the weights of a model, including the active adapter, and of its configuration."""
    from fusedalign.trl import digests

    return [digests.weights_digest(model), digests.config_digest(model)]


def tokenizer_digest(tokenizer: Any) -> list[str]:
    """The digests of the tokenization of a tokenizer and of its chat template."""
    from fusedalign.trl import digests

    return [digests.tokenizer_digest(tokenizer), digests.template_digest(tokenizer)]


def dataset_digest(dataset: Any) -> str:
    """The digest of the rows, in order, of a `datasets.Dataset` or a sequence of mappings."""
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, len(dataset), _ROWS):
        digest.update(json.dumps(dataset[start : start + _ROWS], default=_plain).encode())
    return digest.hexdigest()


def _plain(x: Any) -> Any:
    """Arrays as lists, since NumPy abbreviates the text of long ones; anything else as its representation."""
    return x.tolist() if hasattr(x, "tolist") else repr(x)
