"""The model card of a run, written by TRL's own function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model

from fusedalign.commandline import one_line

#: What TRL writes for a base model that is a folder.
_NO_LINK = "[None](https://huggingface.co/None)"


class Card:
    """The README.md of an output directory; one that is there already and is no model card stays as it is.

    Args:
        folder: the output directory, before the training.
        base_model: the folder or Hub name that the training starts from.
        dataset_name: of the Hub; None for other data.
    """

    def __init__(self, folder: Path, base_model: str, dataset_name: str | None) -> None:
        self.path = folder / "README.md"
        self.dataset_name, self._base_model = dataset_name, base_model
        self._is_free = not self.path.is_file() or _is_card(self.path)

    def failure(self, trainer: Any) -> str | None:
        """Write the card of a saved model.

        Args:
            trainer: one of TRL's, in the first process.

        Returns:
            None or, because a card must not cost the results, why there is none, in one line.
        """
        if not self._is_free:
            return f"the model card was left out: {self.path} is another text"
        try:
            self._write(trainer)
        except Exception as error:
            return f"the model card was left out: {type(error).__name__}: {one_line(error)}"
        return None

    def _write(self, trainer: Any) -> None:
        folder, repository = self.path.parent, trainer.hub_model_id
        name = repository or str(folder)
        trainer.hub_model_id = name  # the card's example loads the model from there
        try:
            title = Path(name).name or folder.resolve().name
            trainer.create_model_card(model_name=title, dataset_name=self.dataset_name)
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
