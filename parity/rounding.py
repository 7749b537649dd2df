"""What rounding may do to a network, measured on it: noise on the output of every layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from resnet_func.testing import generator

LAYERS = (F.conv2d, F.linear, F.batch_norm, F.group_norm)


class LayerNoise(TorchFunctionMode):
    """Every layer's output, and the gradient that comes back to it, off by about so much, relatively.

    How far results move is what a network's condition makes of rounding of that size: a limit for another
    way to compute the same network.

    Args:
        size: Standard deviation of the noise, relative to each entry.
    """

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size, self.source = size, generator(0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        if func not in LAYERS:
            return y
        return y * (1 + self.size * torch.randn(y.shape, generator=self.source, dtype=y.dtype))
