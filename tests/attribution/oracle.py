"""Per-sample gradients as rows, from `vmap(grad)` alone: what the attribution tests compare with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import resnet_func as rf
from resnet_func import losses, tree
from resnet_func import per_sample as ps
from resnet_func.types import Params
from tests.per_sample.cases import batch, network, small

CE = losses.cross_entropy


def rows_of(of: Params) -> Tensor:
    """A batched tree as rows `[N, |params|]`, leaves in the order of their paths."""
    flat = tree.flatten(of)
    return torch.cat([flat[path].flatten(1) for path in sorted(flat)], 1)


def gradient_rows(
    model: rf.Model, params: Params, state: Any, x: Tensor, y: Tensor, loss: Any = CE
) -> Tensor:
    return rows_of(ps.grads(model, loss, method="vmap", train=False)(params, state, x, y))


def tiny(seed: int = 0) -> tuple[rf.Model, Params, Any]:
    return network(small(), seed)


def batches(n: int, seed: int, size: int = 2) -> list[tuple[Tensor, Tensor]]:
    x, y = batch(n, seed)
    return list(zip(x.split(size), y.split(size), strict=True))


def joined(of: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    xs, ys = zip(*of, strict=True)
    return torch.cat(xs), torch.cat(ys)


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= rtol * expected.abs().max()
