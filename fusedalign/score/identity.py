"""What a run is of: digests of weights, tokenizers and data by their content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

#: The files of a folder that make its model or adapter; code is among them where a model brings its own.
_FILES = ("*.safetensors", "*.bin", "*.py", "config.json", "adapter_config.json")
_CHUNK = 2**24

#: Of a data set, that are read at a time.
_ROWS = 1000


def files_digest(name: str, revision: str | None) -> str:
    """The digest of the files of a model's or adapter's folder; of the Hub its name and revision."""
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
    """The digests of a model's weights, with the active adapter's, and of its configuration."""
    from fusedalign.trl import digests

    return [digests.weights_digest(model), digests.config_digest(model)]


def tokenizer_digest(tokenizer: Any) -> list[str]:
    """The digests of how a tokenizer makes tokens, and of its chat template."""
    from fusedalign.trl import digests

    return [digests.tokenizer_digest(tokenizer), digests.template_digest(tokenizer)]


def dataset_digest(dataset: Any) -> str:
    """The digest of the rows of a `datasets.Dataset`, or of a sequence of mappings, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, len(dataset), _ROWS):
        digest.update(json.dumps(dataset[start : start + _ROWS], default=_plain).encode())
    return digest.hexdigest()


def _plain(x: Any) -> Any:
    """Arrays as lists, whose text would leave out the middle of a long one; anything else as its text."""
    return x.tolist() if hasattr(x, "tolist") else repr(x)
