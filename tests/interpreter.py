"""Triton's interpreter without work that has no effect: with the same results in half the time."""

import dataclasses
import functools

from triton.runtime import interpreter


def speed_up() -> None:
    """Leave out what is done again in every call. Internals that another version of Triton lacks stay as they are."""
    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "GridExecutor"):
        _patch_once_a_launch()
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    builder = interpreter.interpreter_builder
    if not builder.options.debug:  # sums of integers are made again in 64 bits, for an assertion that is then left out
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _patch_once_a_launch() -> None:
    """Each call of a device function patches the language: after the first of its module nothing is left to patch."""
    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(fn):
        if id(fn.__globals__) in patched:
            return None
        patched.add(id(fn.__globals__))
        return patch(fn)

    @functools.wraps(launch)
    def launch_afresh(*args, **options):
        patched.clear()
        return launch(*args, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_afresh


def _by_name(np_dtype_of):
    """It builds a table of all dtypes in each call."""
    known = {}

    def np_dtype(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = np_dtype_of(dtype)
        return known[name]

    return np_dtype
