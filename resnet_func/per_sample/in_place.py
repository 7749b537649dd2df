"""Calls that overwrite their first argument, and calls whose result shares the memory of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# By their names without underscores
VIEWS = {
    *("getitem", "view", "reshape", "flatten", "unflatten", "select", "narrow", "diagonal", "expand", "get"),
    *("expand_as", "view_as", "transpose", "permute", "movedim", "swapaxes", "numpy_T", "t", "squeeze"),
    *("unsqueeze", "unbind", "chunk", "split", "contiguous", "detach", "to"),
}


def may_be_view(func: Callable[..., Any]) -> bool:
    """Whether what a function returns may share its argument's memory."""
    return getattr(func, "__name__", "").strip("_") in VIEWS


def is_in_place(func: Callable[..., Any]) -> bool:
    """Whether a function overwrites its first argument: `add_`, `__iadd__`."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name.startswith("__i") and name not in ("__index__", "__int__", "__invert__", "__init__")
    return name.endswith("_")


def out_of_place(func: Callable[..., Any]) -> Callable[..., Any]:
    """`add` for `add_` and `__iadd__`; a function that overwrites nothing as it is.

    Raises:
        ValueError: there is none.
    """
    if not is_in_place(func):
        return func
    name = func.__name__
    found = getattr(Tensor, f"__{name[3:-2]}__" if name.startswith("__i") else name[:-1], None)
    if found is None:
        raise ValueError(
            f"a trainable leaf is written into a tensor by {name}, which cannot be followed. Use torch.where "
            "or torch.cat, or method='vmap'"
        )
    return found


def version_of(tensor: Tensor) -> int:
    """How often a tensor's memory was changed in place, where that is counted."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version
