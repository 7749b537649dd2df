"""What rounding may do to a network, measured on it: how far noise on every layer's output moves its results.

Whether results that differ are the same up to rounding depends on the network: a BatchNorm over two pixels
amplifies any rounding, a ReLU near its kink moves a whole gradient. So the network itself is computed again,
with noise of the size that rounding has, and what that moves is the limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from resnet_func import tree
from resnet_func.testing import generator, named_leaves

LAYERS = (
    *(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear),
    *(F.batch_norm, F.group_norm, F.layer_norm, F.instance_norm, F.rms_norm),
)
DRAWS = 8


class LayerNoise(TorchFunctionMode):
    """Every layer's output, and the gradient that comes back to it, off by about so much.

    Args:
        size: Standard deviation of the noise, relative to each entry, and to the output's root mean square:
            a sum that cancels is off by as much as others.
        seed: Of the noise.
    """

    def __init__(self, size: float, seed: int = 0) -> None:
        super().__init__()
        self.size, self.source = size, generator(seed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        if func not in LAYERS:
            return y
        factor, shift = (self.size * self._draw(y) for _ in range(2))
        return y * (1 + factor) + shift * y.detach().square().mean().sqrt()

    def _draw(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.source, dtype=like.dtype).to(like.device)


def rounding_noise(params: Any, dtype: torch.dtype) -> float:
    """The noise that bounds what a layer in `dtype` rounds.

    In float32 its eps, times the root of the longest sum of one output. Narrower dtypes are summed in
    float32, and round image, weight, output and what follows it: four times half an eps.
    """
    if torch.finfo(dtype).bits < 32:
        return 2 * torch.finfo(dtype).eps
    terms = max((leaf[0].numel() for leaf in tree.leaves(params) if leaf.ndim > 1), default=1)
    return torch.finfo(dtype).eps * math.sqrt(terms)


def moved_by_noise(compute: Callable[[], Any], size: float, draws: int = DRAWS) -> dict[str, float]:
    """How far every leaf of what `compute` returns moves under `LayerNoise`, at most, in its largest entry.

    Several draws, so that none of a few entries is still by chance.
    """
    exact = named_leaves(compute())
    moved = dict.fromkeys(exact, 0.0)
    for seed in range(draws):
        with LayerNoise(size, seed):
            noisy = named_leaves(compute())
        for name, leaf in exact.items():
            if leaf.numel():
                moved[name] = max(moved[name], (noisy[name] - leaf).abs().max().item())
    return moved


def assert_rounded(got: Any, compute: Callable[[], Any], size: float) -> str:
    """`got` is what `compute` returns, in float64, up to what noise of this size moves.

    No leaf may be further off than its move, or than `size` times its largest entry.

    Returns:
        The largest share of its limit that a leaf takes, as a figure.

    Raises:
        AssertionError: naming the worst leaf.
    """
    ours, want, moved = named_leaves(got), named_leaves(compute()), moved_by_noise(compute, size)
    assert ours.keys() == want.keys(), f"leaves {sorted(ours)}, not {sorted(want)}"
    shares = {}
    for name, leaf in want.items():
        if leaf.numel():
            off = (ours[name].double() - leaf).abs().max().item()
            limit = max(moved[name], size * leaf.abs().max().item())
            shares[name] = off / limit if limit else math.inf if off else 0.0
    worst = max(shares, key=lambda name: (shares[name] != shares[name], shares[name]))
    assert shares[worst] <= 1, f"worst {worst}: off by {shares[worst]:.3g} times what rounding moves it"
    return f"{shares[worst]:.2f} of what rounding may move"
