"""Generators and tensors from a seed: one seed gives the same numbers in every dtype, up to rounding."""

from __future__ import annotations

import torch
from torch import Tensor


def generator(seed: int) -> torch.Generator:
    """A generator on the CPU with this seed.

    >>> torch.rand(1, generator=generator(3)) == torch.rand(1, generator=generator(3))
    tensor([True])
    """
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers of a shape, drawn in float64 and then rounded to a floating dtype.

    >>> randn(2, 3, seed=0).shape
    torch.Size([2, 3])
    """
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)
