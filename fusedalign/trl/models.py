"""The model that a command names: a folder, a Hub name, or the embedded one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from fusedalign.embedded import EMBEDDED_NAME, build_embedded_model


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
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        inside = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
        raise FileNotFoundError(f"model_name_or_path must be a folder with a config.json, got {name} with {inside}")
    if not folder.exists() and name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"model_name_or_path must name a folder that exists, got {name}")
    return name


def check_has_head(path: str, model: Any, training: Any) -> None:
    """Raises ValueError unless the model's configuration names a causal LM.

    TRL would build whatever class is named and fail later, elsewhere.
    """
    remote = {"revision": model.model_revision, "trust_remote_code": getattr(training, "trust_remote_code", False)}
    names = transformers.AutoConfig.from_pretrained(path, **remote).architectures or ["no architecture in its config"]
    architecture = getattr(transformers, names[0], None)
    if architecture is None and names[0].isidentifier():
        return  # remote code
    if architecture is None or not architecture.can_generate():
        raise ValueError(f"model_name_or_path must name a causal LM with an LM head, got {path} with {names[0]}")
