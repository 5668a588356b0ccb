"""`replaced`: names in a module of TRL that refer to other objects while one trainer is built, for that trainer only.

TRL's modules import by name the functions that their trainers call when they are built. While a trainer of this package
is built, the name refers to a `_StandIn`. It calls the replacement in a context variable, else the original, so
trainers that are built in other threads or tasks call TRL's own functions.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

#: (module, name) -> the replacement in this thread or task.
_replacements: ContextVar[dict[tuple[str, str], Any]] = ContextVar("fusedalign_replacements")
_lock = threading.Lock()


class _StandIn:
    """The object that a name of a module refers to while trainers are built."""

    def __init__(self, key: tuple[str, str], original: Any) -> None:
        functools.update_wrapper(self, original, updated=())
        self.key, self.original = key, original
        self.users = 0
        """number of constructions that need it now"""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        replacement = _replacements.get({}).get(self.key)
        return self.original(*args, **kwargs) if replacement is None else replacement(self.original, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """For a name that refers to an object, not to a function or a class."""
        if name in ("key", "original"):  # while a copy is made, before they are set
            raise AttributeError(name)
        replacement = _replacements.get({}).get(self.key)
        return getattr(self.original if replacement is None or callable(replacement) else replacement, name)

    def __instancecheck__(self, instance: Any) -> bool:
        """For a name that refers to a class: `isinstance(instance, name)`."""
        replacement = _replacements.get({}).get(self.key)
        return isinstance(instance, self.original) if replacement is None else replacement(self.original, instance)


@contextlib.contextmanager
def replaced(module: Any, **replacements: Any) -> Iterator[None]:
    """Within this context, in this thread or task only, `module` uses `replacements` under their names.

    Args:
        module: looks these names up in its globals; names that it does not have are left out.
        replacements: for a function or a class that is called: a function of the original and the arguments of the
            call; for a class in `isinstance`: a function of the class and the object; for another object: an object.
    """
    names = [name for name in replacements if hasattr(module, name)]
    by_key = {(module.__name__, name): replacements[name] for name in names}
    with _lock:
        stand_ins = [_install(module, name) for name in names]
    token = _replacements.set(_replacements.get({}) | by_key)
    try:
        yield
    finally:
        _replacements.reset(token)
        with _lock:
            for stand_in in stand_ins:
                _release(module, stand_in)


def _install(module: Any, name: str) -> _StandIn:
    current = getattr(module, name)
    stand_in = current if isinstance(current, _StandIn) else _StandIn((module.__name__, name), current)
    stand_in.users += 1
    setattr(module, name, stand_in)
    return stand_in


def _release(module: Any, stand_in: _StandIn) -> None:
    stand_in.users -= 1
    name = stand_in.key[1]
    # If another library has replaced the name meanwhile, its object stays; a stand-in that it holds passes calls on.
    if stand_in.users == 0 and getattr(module, name, None) is stand_in:
        setattr(module, name, stand_in.original)
