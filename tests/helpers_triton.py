"""Triton's interpreter, made fit for a test suite."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def prepare_interpreter() -> None:
    """Before the first kernel is interpreted."""
    from triton.runtime import interpreter

    _patch_the_language_once_a_launch(interpreter)
    _scalars_are_indices(interpreter)
    _convert_bfloat16_as_devices_do(interpreter)


class _Nothing:
    def restore(self) -> None:
        """The launch takes its own patches back."""


def _patch_the_language_once_a_launch(interpreter: Any) -> None:
    """The interpreter replaces the functions of `triton.language` at each call of a device function, though the launch
    around it did so already, and calls them through all these layers: 80 % of its time."""
    patch, call = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[tuple[str, ...]] = set()

    def patch_once(function: Any) -> Any:
        modules = tuple(name for name in ("tl", "core", "math") if name in function.__globals__)
        if modules in patched:
            return _Nothing()
        patched.add(modules)
        return patch(function)

    def launch(self: Any, *arguments: Any, **options: Any) -> None:
        patched.clear()
        call(self, *arguments, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch


def _scalars_are_indices(interpreter: Any) -> None:
    """The interpreter of Triton 3.6 makes an int of an array of one element, which NumPy 2.4 refuses."""
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor


def _convert_bfloat16_as_devices_do(interpreter: Any) -> None:
    """The interpreter cuts digits off instead of rounding to nearest, and reads subnormal numbers wrongly."""
    cast, language = interpreter.InterpreterBuilder.cast_impl, interpreter.tl

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        kinds = source.dtype.scalar, target.scalar
        if kinds == (language.bfloat16, language.float32):
            wide = (source.data.astype(np.uint32) << np.uint32(16)).view(np.float32)
            return interpreter.TensorHandle(wide, target.scalar)
        if kinds != (language.float32, language.bfloat16):
            return cast(self, source, target)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        bits = rounded.view(torch.int16).numpy().view(np.uint16)
        return interpreter.TensorHandle(bits, target.scalar)

    interpreter.InterpreterBuilder.cast_impl = cast_impl
