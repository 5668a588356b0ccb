"""The flags of the commands that take TRL's configurations, known before torch or TRL is imported."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

from fusedalign.methods import METHODS
from fusedalign.sources import Field, base_names, field_flags, own_fields, package_file, parser_flags, spellings

#: Class -> its source file. A trainer's configuration lies in one of `_CONFIGS`.
_FILES = {
    "TrainingArguments": "transformers/training_args.py",
    "_BaseConfig": "trl/trainer/base_config.py",
    "ModelConfig": "trl/trainer/model_config.py",
    "ScriptArguments": "trl/scripts/utils.py",
    "DatasetMixtureConfig": "trl/scripts/utils.py",
    "HeadArguments": "fusedalign/trl/arguments.py",
    "FusedArguments": "fusedalign/trl/arguments.py",
    "ScoreArguments": "fusedalign/score/command.py",
}
_CONFIGS = ("trl/trainer/{0}_config.py", "trl/experimental/{0}/{0}_config.py")
#: Fields that transformers 5.23 renamed: old name -> new name.
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
#: Flags of the launcher that have no meaning here.
NOT_PASSED_ON = {"--help", "--module", "--no_python", "--no-python"}
#: A package with other source files than those known here is imported.
_UNLIKE = (LookupError, OSError, SyntaxError, ValueError)


class Fields(NamedTuple):
    """The fields of a command by name; a later class redefines those of an earlier one."""

    every: dict[str, Field]
    own: tuple[str, ...]
    """those that the method's configuration adds to transformers' `TrainingArguments`"""
    ours: tuple[str, ...]
    """this package's"""

    @property
    def flags(self) -> set[str]:
        """All spellings of all flags."""
        return {flag for field in self.every.values() for flag in field.flags}


def training_fields(method: str) -> Fields:
    """The fields of a training command, in the parser's order. ModuleNotFoundError: TRL is not installed."""
    config = METHODS[method].config
    inherited = class_fields("TrainingArguments")
    own, ours = class_fields(config), class_fields("FusedArguments")
    every = class_fields("ScriptArguments") | own | class_fields("ModelConfig")
    every |= class_fields("DatasetMixtureConfig") | ours
    for name, value in METHODS[method].defaults.items():
        every[name] = every[name]._replace(default=value)
    return Fields(every, tuple(name for name in own if name not in inherited), tuple(ours))


def score_fields() -> Fields:
    """The fields of `fusedalign score`. ModuleNotFoundError: TRL is not installed."""
    head, own = class_fields("HeadArguments"), class_fields("ScoreArguments")
    every = class_fields("ScriptArguments") | class_fields("ModelConfig") | head | own
    every["dtype"] = every["dtype"]._replace(default="auto")
    return Fields(every, tuple(own), tuple(head))


def launcher_flags() -> set[str]:
    """The flags of `accelerate launch` itself, with underscores and with hyphens."""
    try:
        flags = parser_flags(package_file("accelerate/commands/launch.py"))
    except _UNLIKE:
        from fusedalign.trl.arguments import launch_flags

        return launch_flags()
    return {spelling for flag in flags - NOT_PASSED_ON for spelling in spellings(flag[2:])}


def class_fields(name: str) -> dict[str, Field]:
    """The fields of a dataclass with those of its bases, as `dataclasses.fields` orders them."""
    try:
        file = _file(name)
        fields: dict[str, Field] = {}
        for base in reversed(base_names(file, name)):
            fields |= class_fields(base)
        return fields | {field.name: field for field in own_fields(file, name)}
    except _UNLIKE:
        return _imported(name)


def _imported(name: str) -> dict[str, Field]:
    """The fields of a class that is imported, which takes seconds."""
    import transformers

    from fusedalign.trl.arguments import trl_class

    cls = transformers.TrainingArguments if name == "TrainingArguments" else trl_class(name)
    fields = [field for field in dataclasses.fields(cls) if field.init]
    return {
        field.name: Field(
            field.name,
            field.metadata.get("help", ""),
            None if field.default is dataclasses.MISSING else field.default,
            field_flags(field.name, field.default, str(getattr(field.type, "__name__", field.type))),
        )
        for field in fields
    }


def _file(class_name: str) -> Path:
    if class_name in _FILES:
        return package_file(_FILES[class_name])
    folder = re.sub("Config$", "", class_name).lower()
    for form in _CONFIGS:
        with contextlib.suppress(FileNotFoundError):
            return package_file(form.format(folder))
    raise FileNotFoundError(f"expected the source of TRL's {class_name}, got none in {' or '.join(_CONFIGS)}")
