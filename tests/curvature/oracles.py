"""Dense curvature by the definitions, in float64, for tiny networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import resnet_func as rf
from resnet_func import tree
from resnet_func.curvature.kronecker import Block
from resnet_func.testing import generator
from resnet_func.types import LossFn, Model, Params, State, Trainable
from tests.per_sample.cases import CLASSES, batch, network


def tiny(seed: int = 0, **changes: Any) -> tuple[Model, Params, State]:
    """About 500 parameters, one block, every parameter random."""
    fields: dict[str, Any] = {
        "block": "basic",
        "depths": (1,),
        "widths": (3,),
        "stem": "cifar",
        "norm": "group",
        "norm_groups": 1,
        "num_classes": CLASSES,
    }
    return network(rf.ResNetConfig(**{**fields, **changes}), seed)


def images(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return batch(n, seed, size=4)


def random_like(params: Params, seed: int, n: int | None = None) -> Params:
    """A tree of normal numbers, or a batch of n."""
    source = generator(seed)
    lead = () if n is None else (n,)
    return tree.map(lambda p: torch.randn(*lead, *p.shape, generator=source, dtype=p.dtype), params)


def flat(values: Params) -> Tensor:
    """As one vector, in the order of the dotted paths."""
    return parameters_to_vector(list(tree.flatten(values).values()))


def unflat(vector: Tensor, like: Params) -> Params:
    leaves = tree.flatten(like)
    pieces = vector.split([leaf.numel() for leaf in leaves.values()])
    return tree.unflatten(
        {path: piece.reshape(leaf.shape) for (path, leaf), piece in zip(leaves.items(), pieces, strict=True)}
    )


def kept(values: Params, trainable: Trainable) -> Params:
    """The leaves whose paths are trainable."""
    return tree.unflatten({path: leaf for path, leaf in tree.flatten(values).items() if trainable(path)})


def logits_of(model: Model, params: Params, state: State, x: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda vector: model.apply(unflat(vector, params), state, x, train=False)[0]


def hessian(model: Model, loss_fn: LossFn, params: Params, state: State, x: Tensor, y: Any) -> Tensor:
    """Reverse over reverse."""
    logits = logits_of(model, params, state, x)
    slope = torch.func.grad(lambda vector: loss_fn(logits(vector), y).mean())
    return torch.func.jacrev(slope, chunk_size=64)(flat(params))


def jacobian(model: Model, params: Params, state: State, x: Tensor) -> Tensor:
    """`[N, classes, D]`."""
    return torch.func.jacrev(logits_of(model, params, state, x))(flat(params))


def ggn(model: Model, loss_fn: LossFn, params: Params, state: State, x: Tensor, y: Any) -> Tensor:
    jac = jacobian(model, params, state, x)
    outputs = model.apply(params, state, x, train=False)[0]
    of_all = torch.func.hessian(lambda logits: loss_fn(logits, y).sum())(outputs)
    own = torch.stack([of_all[i, :, i] for i in range(len(x))])
    return torch.einsum("nci,ncd,ndj->ij", jac, own, jac) / len(x)


def empirical_fisher(
    model: Model, loss_fn: LossFn, params: Params, state: State, x: Tensor, y: Any
) -> Tensor:
    grads = rf.per_sample.grads(model, loss_fn, method="loop", train=False)(params, state, x, y)
    rows = torch.cat([leaf.flatten(1) for leaf in tree.flatten(grads).values()], 1)
    return rows.T @ rows / len(rows)


def blocks(dense: Tensor, like: Params) -> dict[str, Tensor]:
    """The diagonal block of every leaf."""
    found, start = {}, 0
    for path, leaf in tree.flatten(like).items():
        stop = start + leaf.numel()
        found[path], start = dense[start:stop, start:stop], stop
    return found


def assert_close(actual: Tensor, expected: Tensor, rtol: float) -> None:
    """To `rtol` of the largest entry."""
    scale = expected.abs().max().item()
    error = (actual - expected).abs().max().item()
    assert error <= rtol * scale, f"{error:.2g} off, of {scale:.2g}"


def dense(block: Block) -> Tensor:
    """A block as a matrix, by its products with unit vectors."""
    size = block.eigenvalues.numel()
    units = torch.eye(size, dtype=torch.float64).reshape(size, *block.shape)
    return block.product(units).reshape(size, size)


def module(*layers: nn.Module, seed: int = 0) -> tuple[rf.Model, Any, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in layers:
            for parameter in layer.parameters():
                nn.init.normal_(parameter, std=0.5)
    return rf.from_module(nn.Sequential(*layers).double())


def data(*shape: int, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    source = generator(seed)
    x = torch.randn(shape, generator=source, dtype=torch.float64)
    return x, torch.randint(0, classes, shape[:1], generator=source)
