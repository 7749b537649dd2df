"""What a network computes under `no_grad` is a constant, in forward mode too, which torch leaves out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class ConstantUnderNoGrad(TorchFunctionMode):
    """Forward mode in which `no_grad` makes constants, as it does in reverse mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_grad_enabled():
            return func(*args, **(kwargs or {}))
        return run_as_constant(func, args, kwargs or {})


def run_as_constant(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call returns, detached; what it was given and returns is as it was."""
    result = func(*args, **kwargs)
    given = [*args, *kwargs.values()]

    def detach(value: Any) -> Any:
        is_new = isinstance(value, Tensor) and not any(value is one for one in given)
        return value.detach() if is_new else value

    if isinstance(result, tuple):
        detached = [detach(one) for one in result]
        return type(result)(*detached) if hasattr(result, "_fields") else type(result)(detached)
    return [detach(one) for one in result] if isinstance(result, list) else detach(result)
