"""The models that `fusedalign score` names: finding them, and loading them with their tokenizer."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedalign.embedded import EMBEDDED_NAME, build_embedded_model


@dataclass(frozen=True)
class ModelNames:
    """Folders or Hub names of the model, its adapter and the reference model.

    Methods take `arguments`, TRL's `ModelConfig` of the command.
    """

    model: str
    adapter: str | None
    reference: str | None
    trust_remote_code: bool

    @classmethod
    def find(
        cls, arguments: Any, adapter: str | None, reference: str | None, trust_remote_code: bool, out: Path
    ) -> ModelNames:
        """Check the names of the command; the folder of an adapter is split into base model and adapter."""
        from fusedalign.trl.adapters import find_adapter
        from fusedalign.trl.models import check_folder, check_has_head

        name, revision = arguments.model_name_or_path, arguments.model_revision
        if not name:
            raise ValueError(
                f"model_name_or_path must name a model folder, a Hub model or {EMBEDDED_NAME!r}, got nothing"
            )
        path, reference = _build_if_embedded(name, out), reference and _build_if_embedded(reference, out)
        check_folder(path, "model_name_or_path", adapter=True)
        inner = find_adapter(path, revision, trust_remote_code=trust_remote_code)
        if inner is not None:
            if adapter is not None:
                raise ValueError(
                    f"--adapter must be put on a model, got {adapter} on the adapter {path}: merge it first"
                )
            path, adapter = inner.base, inner.path
        elif adapter is not None and find_adapter(adapter, trust_remote_code=trust_remote_code) is None:
            raise ValueError(f"--adapter must hold an adapter_config.json, got {adapter} without one")
        check_has_head(path, "model_name_or_path", revision=revision, trust_remote_code=trust_remote_code)
        if reference:
            check_folder(reference, "ref_model")
            check_has_head(reference, "ref_model", trust_remote_code=trust_remote_code)
        return cls(path, adapter, reference or None, trust_remote_code)

    def tokenizer(self, arguments: Any) -> Any:
        """Load the tokenizer of the adapter or the model."""
        import transformers

        from fusedalign.trl.adapters import find_adapter
        from fusedalign.trl.models import load_processing_class

        options: dict[str, Any] = {"auto": transformers.AutoTokenizer, "trust_remote_code": self.trust_remote_code}
        if self.adapter is not None:
            adapter = find_adapter(self.adapter, trust_remote_code=self.trust_remote_code)
            assert adapter is not None
            return adapter._replace(base=self.model).processing_class(**options)
        return load_processing_class(self.model, revision=arguments.model_revision, **options)

    def max_positions(self, arguments: Any) -> int | None:
        """The maximum sequence length of the model."""
        import transformers

        config = transformers.AutoConfig.from_pretrained(
            self.model, revision=arguments.model_revision, trust_remote_code=self.trust_remote_code
        )
        return getattr(config.get_text_config(), "max_position_embeddings", None)

    def load(self, arguments: Any, local_rank: int, *, reference: bool = False) -> Any:
        """Load the model, or the reference model, in eval mode on the device of this rank."""
        import torch

        from fusedalign.trl.adapters import find_adapter

        gpu = local_rank if torch.cuda.is_available() else None
        options = {
            "trust_remote_code": self.trust_remote_code,
            "attn_implementation": arguments.attn_implementation,
            "dtype": arguments.dtype,
        }
        if reference:
            return load_for_scoring(str(self.reference), None, options, arguments, gpu)
        adapter = None if self.adapter is None else find_adapter(self.adapter)
        adapter = adapter and adapter._replace(base=self.model)
        options["revision"] = arguments.model_revision
        return load_for_scoring(self.model, adapter, options, arguments, gpu)


def load_for_scoring(path: str, adapter: Any, options: Mapping[str, Any], arguments: Any, gpu: int | None) -> Any:
    """A model, or an adapter's base model with the adapter, in eval mode on a GPU or, where that is None, on the CPU.

    `arguments`: TRL's `ModelConfig`, for the quantisation.
    """
    import torch
    import trl

    from fusedalign.trl.adapters import load_adapter
    from fusedalign.trl.stock import create_model_from_path

    device_map = None if gpu is None else {"": torch.device("cuda", gpu)}
    options = {**options, "device_map": device_map, "quantization_config": trl.get_quantization_config(arguments)}
    return (create_model_from_path(path, **options) if adapter is None else load_adapter(adapter, options)).eval()


def _build_if_embedded(name: str, out: Path) -> str:
    """The folder of the embedded model, built next to `out` if it is missing; any other name is returned as it is."""
    if name != EMBEDDED_NAME:
        return name
    folder = out.absolute().parent / "embedded-model"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            built = build_embedded_model(Path(temporary) / "model")
            try:
                os.rename(built, folder)
            except OSError:  # another rank was faster
                if not folder.is_dir():
                    raise
    return str(folder)
