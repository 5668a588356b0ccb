"""What a result was computed with: versions of packages, and commits of git."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

import fusedalign
from fusedalign.reports import package_version

#: Packages that results depend on, in addition to torch.
PACKAGES = (
    *("triton", "transformers", "trl", "datasets", "accelerate", "peft", "bitsandbytes", "deepspeed"),
    *("liger-kernel", "cut-cross-entropy", "numpy"),
)
_PATIENCE = 5.0  # seconds for a git command: a repository may lie on a slow network disk


def versions() -> dict[str, str | None]:
    """The versions of Python, this package, torch and `PACKAGES`; None: not installed."""
    own = {"python": platform.python_version(), "fusedalign": fusedalign.__version__, "torch": torch.__version__}
    return {**own, **{name: package_version(name) for name in PACKAGES}}


def package_commit() -> dict[str, str | bool | None] | None:
    """The `commit` of the checkout that this package is imported from; None for an installed wheel."""
    folder = Path(__file__).resolve().parent
    # An environment may lie in a repository of the user's, which does not track the packages in it.
    is_checkout = _git(folder, "ls-files", "--error-unmatch", "__init__.py") is not None
    return commit(folder) if is_checkout else None


def commit(folder: Path) -> dict[str, str | bool | None] | None:
    """The commit of the repository that holds a folder, and whether tracked files differ from it (None: unknown).

    Returns None without a repository, without a commit in it, or without git.
    """
    head = _git(folder, "rev-parse", "HEAD")
    if head is None:
        return None
    changes = _git(folder, "--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
    return {"commit": head, "dirty": None if changes is None else bool(changes)}


def _git(folder: Path, *words: str) -> str | None:
    try:
        process = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=_PATIENCE, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout.strip()
