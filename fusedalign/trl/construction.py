"""`replaced`: names in a module of TRL that mean something else while one trainer is built, and only for that trainer.

TRL's modules import by name what their trainers call when they are built. While any trainer is under construction with
this package's head, a `_StandIn` has that name. It looks in a context variable for what to call, and calls what stood
there before if there is nothing, so trainers that are built in other threads or tasks find TRL's own.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

#: (module, name) -> what this thread or task calls instead; given the original before the arguments.
_replacements: ContextVar[dict[tuple[str, str], Any]] = ContextVar("fusedalign_replacements")
_lock = threading.Lock()


class _StandIn:
    """What a name of a module refers to while trainers are under construction."""

    def __init__(self, key: tuple[str, str], original: Any) -> None:
        functools.update_wrapper(self, original, updated=())
        self.key, self.original = key, original
        self.users = 0
        """constructions that need it now"""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        replacement = _replacements.get({}).get(self.key)
        return self.original(*args, **kwargs) if replacement is None else replacement(self.original, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Of a name that refers to an object, not to a function or a class."""
        if name in ("key", "original"):  # of a copy that is not filled yet
            raise AttributeError(name)
        replacement = _replacements.get({}).get(self.key)
        return getattr(self.original if replacement is None or callable(replacement) else replacement, name)

    def __instancecheck__(self, instance: Any) -> bool:
        """`isinstance(instance, name)`, where the name is that of a class."""
        replacement = _replacements.get({}).get(self.key)
        return isinstance(instance, self.original) if replacement is None else replacement(self.original, instance)


@contextlib.contextmanager
def replaced(module: Any, **replacements: Any) -> Iterator[None]:
    """Within this context, and in this thread or task alone, `module` calls `replacements` under their names.

    Args:
        module: looks these names up in its globals; names that it does not have are left out.
        replacements: functions of the original and the arguments of the call; where the name is that of a class, of
            which it is asked whether an object is an instance, of the class and the object; where it is that of an
            object, another one.
    """
    names = [name for name in replacements if hasattr(module, name)]
    ours = {(module.__name__, name): replacements[name] for name in names}
    with _lock:
        stand_ins = [_install(module, name) for name in names]
    token = _replacements.set(_replacements.get({}) | ours)
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
    # Where another library has put its own there meanwhile, that stays, and what it keeps of ours only passes calls on.
    if stand_in.users == 0 and getattr(module, name, None) is stand_in:
        setattr(module, name, stand_in.original)
