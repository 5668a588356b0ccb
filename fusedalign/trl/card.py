"""The model card of a run, written by TRL's own function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model

from fusedalign.commandline import one_line

#: What TRL writes for a base model that is a folder.
_NO_LINK = "[None](https://huggingface.co/None)"


class Card:
    """The README.md of an output directory; one that is there already and is no model card stays as it is.

    TRL writes it at each checkpoint and on a push too, PEFT with each adapter: `attach` makes these keep to it.

    Args:
        folder: the output directory, before the training.
        base_model: the folder or Hub name that the training starts from.
        dataset_name: of the Hub; None for other data.
    """

    def __init__(self, folder: Path, base_model: str, dataset_name: str | None) -> None:
        self.path = folder / "README.md"
        self.dataset_name, self._base_model = dataset_name, base_model
        self._other_text = self.path.read_bytes() if self.path.is_file() and not _is_card(self.path) else None
        self._create: Callable[..., None] | None = None

    def attach(self, trainer: Any) -> None:
        """Let a trainer of TRL's write this card wherever it writes one."""

        def write(*_: Any, tags: Any = None, **__: Any) -> None:
            if trainer.is_world_process_zero():
                self.failure(trainer, tags)  # the end of the run tells of it

        self._create, trainer.create_model_card = trainer.create_model_card, write

    def failure(self, trainer: Any, tags: Any = None) -> str | None:
        """Write the card of a saved model.

        Args:
            trainer: one of TRL's, in the first process.
            tags: in addition to the trainer's own.

        Returns:
            None or, because a card must not cost the results, why there is none, in one line.
        """
        try:
            if self._other_text is not None:
                if self.path.read_bytes() != self._other_text:  # PEFT adds to it what it knows of an adapter
                    self.path.write_bytes(self._other_text)
                return f"the model card was left out: {self.path} is another text"
            self._write(trainer, tags)
        except Exception as error:
            return f"the model card was left out: {type(error).__name__}: {one_line(error)}"
        return None

    def _write(self, trainer: Any, tags: Any) -> None:
        folder, repository = self.path.parent, trainer.hub_model_id
        name = repository or str(folder)
        trainer.hub_model_id = name  # the card's example loads the model from there
        try:
            title = Path(name).name or folder.resolve().name
            create = self._create or trainer.create_model_card
            create(model_name=title, dataset_name=self.dataset_name, tags=tags)
        finally:
            trainer.hub_model_id = repository
        text = self.path.read_text(encoding="utf-8")
        if _NO_LINK in text:
            self.path.write_text(text.replace(_NO_LINK, f"`{self._base_model}`"), encoding="utf-8")
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        if is_peft_model(model):  # TRL has replaced the card that PEFT wrote with the adapter
            model.create_or_update_model_card(str(folder))


def _is_card(path: Path) -> bool:
    """Whether a file starts with the metadata of a card."""
    return path.read_text(encoding="utf-8", errors="replace").startswith("---\n")
