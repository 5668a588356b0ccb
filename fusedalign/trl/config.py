"""The YAML file that `--config` names: read once, strictly, with errors that name the file and the line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def read_config(path: str) -> dict[str, Any]:
    """The fields of a YAML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, not UTF-8, not YAML, not a mapping of names to values, or a name that occurs twice.
    """
    if Path(path).is_dir():
        raise ValueError(f"--config must name a YAML file, got the folder {path}")
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise FileNotFoundError(f"--config must name a YAML file that exists, got {path}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--config must name a YAML file in UTF-8, got {path} with other bytes: {error}") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise ValueError(f"--config must name a valid YAML file, got {path}{line}: {problem or error}") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"--config must name a YAML file of `field: value` lines, got {path}")
    return content


class _Loader(yaml.SafeLoader):
    """YAML's own loader takes the last of two equal names in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE]
        for key, _ in reversed(node.value):
            if isinstance(key, yaml.ScalarNode) and names.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} occurs twice", key.start_mark)
        return super().construct_mapping(node, deep)


_MERGE = "tag:yaml.org,2002:merge"
