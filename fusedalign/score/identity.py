"""What a run is of: digests of weights, tokenizers and data by their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

#: The files of a folder that make its model.
_WEIGHTS = ("*.safetensors", "*.bin", "config.json", "adapter_config.json", "generation_config.json")
_CHUNK = 2**24


def of_files(name: str, revision: str | None) -> str:
    """Of a model's or adapter's folder the digest of its files; of the Hub its name and revision."""
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{revision or 'main'}"
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)}):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def of_model(model: Any) -> str:
    """The digest of a model's parameters and buffers, adapters too."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(type(model).__name__.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().contiguous().view(-1)
        for part in flat.split(_CHUNK):
            digest.update(part.cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def of_tokenizer(tokenizer: Any) -> str:
    """The digest of a tokenizer's vocabulary, its way to split text, its special tokens and its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    parts: Iterable[Any] = (words, tokenizer.special_tokens_map, getattr(tokenizer, "chat_template", None))
    return hashlib.blake2b(repr(tuple(parts)).encode(), digest_size=16).hexdigest()


def of_dataset(dataset: Any) -> str:
    """The digest of the rows of a `datasets.Dataset`, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(str(dataset.features).encode())
    for batch in dataset.with_format(None).iter(1000):
        digest.update(json.dumps(batch, default=str).encode())
    return digest.hexdigest()
