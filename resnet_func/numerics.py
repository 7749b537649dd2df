"""Arithmetic at its edges: roots at zero, sums in narrow dtypes, devices without float64 or autocast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

DEVICES_WITHOUT_FLOAT64 = frozenset({"mps"})
# asked here once: torch 2.11 cannot compile the question
DEVICES_WITHOUT_AUTOCAST = frozenset(
    kind for kind in ("meta", "lazy", "vulkan", "fpga", "ve") if not torch.amp.is_autocast_available(kind)
)


def safe_sqrt(x: Tensor) -> Tensor:
    """The square root to the bit, with derivatives of every order 0 at 0, where torch's are inf and NaN.

    >>> torch.func.grad(safe_sqrt)(torch.tensor(0.0))
    tensor(0.)
    """
    # the root of a stand-in: an infinite derivative behind a `where` becomes NaN, times zero
    is_zero = x == 0
    return torch.where(is_zero, torch.zeros_like(x), torch.where(is_zero, torch.ones_like(x), x).sqrt())


def safe_norm(x: Tensor) -> Tensor:
    """The L2 norm of all entries, 0-d, as `torch.linalg.vector_norm` to the bit, with derivatives 0 at 0.

    >>> torch.func.hessian(safe_norm)(torch.zeros(1))
    tensor([[0.]])
    """
    is_zero = (x == 0).all()
    norm = torch.linalg.vector_norm(torch.where(is_zero, torch.ones_like(x), x))
    return torch.where(is_zero, torch.zeros_like(norm), norm)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to sum many values of `dtype` in: float32 for floating dtypes that are narrower.

    >>> accumulation_dtype(torch.bfloat16), accumulation_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def widen(x: Tensor) -> Tensor:
    """The tensor in its `accumulation_dtype`; itself where that is its own.

    >>> widen(torch.ones(2, dtype=torch.float16)).dtype
    torch.float32
    """
    return x.to(accumulation_dtype(x.dtype))


def to_float64(x: Tensor) -> Tensor:
    """The tensor in float64: where it is, or on the CPU if its device has no float64.

    >>> to_float64(torch.tensor(3)).dtype
    torch.float64
    """
    if x.device.type in DEVICES_WITHOUT_FLOAT64:
        x = x.to("cpu")
    return x.to(torch.float64)


def is_autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a kind of device; False where there is none, of which torch raises.

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     is_autocast_enabled("cpu"), is_autocast_enabled("meta")
    (True, False)
    """
    return device_type not in DEVICES_WITHOUT_AUTOCAST and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context in which a kind of device does not narrow; nothing where autocast is off anyway.

    >>> with torch.autocast("cpu", torch.bfloat16), without_autocast("cpu"):
    ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
    torch.float32
    """
    if not is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def cast_like(value: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that casts `value`, a 0-d tensor, to dtype and device of a leaf; once for each of those.

    >>> cast_like(torch.tensor(0.1, dtype=torch.float64))(torch.ones(3, dtype=torch.float16)).dtype
    torch.float16
    """
    casts: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def cast(leaf: Tensor) -> Tensor:
        key = leaf.dtype, leaf.device
        if key not in casts:
            # a 0-d leaf would become float64, and under vmap every one; narrow first: see `to_float64`
            casts[key] = value.to(leaf.dtype).to(leaf.device)
        return casts[key]

    return cast
