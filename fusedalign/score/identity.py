"""What a run is of: digests of weights, tokenizers and data by their content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

#: The files of a folder that make its model or adapter.
_FILES = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")
_CHUNK = 2**24


def of_files(name: str, revision: str | None) -> str:
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


def of_model(model: Any) -> list[str]:
    """The digests of a model's weights, with the active adapter's, and of its configuration."""
    from fusedalign.trl.digests import config_digest, weights_digest

    return [weights_digest(model), config_digest(model)]


def of_tokenizer(tokenizer: Any) -> list[str]:
    """The digests of how a tokenizer makes tokens, and of its chat template."""
    from fusedalign.trl.digests import template_digest, tokenizer_digest

    return [tokenizer_digest(tokenizer), template_digest(tokenizer)]


def of_dataset(dataset: Any) -> str:
    """The digest of the rows of a `datasets.Dataset`, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(str(dataset.features).encode())
    for batch in dataset.with_format(None).iter(1000):
        digest.update(json.dumps(batch, default=str).encode())
    return digest.hexdigest()
