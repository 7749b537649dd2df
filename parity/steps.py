"""One network twice, with the same tensors: one step of the function, and the same step of the module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from resnet_func import tree
from resnet_func.testing import generator
from resnet_func.types import Model, Params, State

BRANCH = 0.2  # the factor of the last weight of a residual branch


def perturbed(params: Params, state: State, seed: int) -> tuple[Params, State]:
    """Affine parameters and running statistics away from 0 and 1, where mistakes could hide."""
    draw = generator(seed)

    def shift(path: str, leaf: Tensor) -> Tensor:
        if leaf.ndim != 1:
            return leaf + 3 if path.endswith("num_batches_tracked") else leaf
        noise = torch.rand(leaf.shape, generator=draw).to(leaf.dtype)
        return leaf + 0.3 * noise

    return tree.map_with_path(shift, params), tree.map_with_path(shift, state)


def with_small_branches(params: Params) -> Params:
    """The last norm's weight of every block times `BRANCH`, the last convolution's before pre-activation.

    As in trained networks: else depth amplifies rounding, and in evaluation the activations themselves.
    """
    last = {}
    for path in tree.flatten(params):
        block, _, layer = path.removesuffix(".weight").rpartition(".")
        if block.startswith("layer") and layer[:-1] in ("conv", "bn"):
            last[block] = path if path.endswith("weight") else last[block]
    ends = set(last.values())
    return tree.map_with_path(lambda path, leaf: leaf * BRANCH if path in ends else leaf, params)


def loaded(construct: Callable[[], nn.Module], params: Params, state: State) -> nn.Module:
    """The module with these parameters (shared) and this state (copied)."""
    with torch.device("meta"):
        module = construct()
    leaves = {**tree.flatten(params), **{name: leaf.clone() for name, leaf in tree.flatten(state).items()}}
    module.load_state_dict(leaves, strict=True, assign=True)
    return module.requires_grad_()


def module_step(module: nn.Module, x: Tensor, cotangent: Tensor, *, train: bool) -> dict[str, Tensor]:
    """Logits, all gradients of `<logits, cotangent>`, and the buffers afterwards, by plain autograd.

    The module's buffers are put back.
    """
    buffers = {name: leaf.clone() for name, leaf in module.named_buffers()}
    module.train(train)
    x = x.clone().requires_grad_()
    logits = module(x)
    params = dict(module.named_parameters())
    grads = torch.autograd.grad(logits, [x, *params.values()], cotangent)
    after = {name: leaf.clone() for name, leaf in module.named_buffers()}
    module.load_state_dict(buffers, strict=False)
    return _named(logits.detach(), grads[0], dict(zip(params, grads[1:], strict=True)), after)


def function_step(
    model: Model, params: Params, state: State, x: Tensor, cotangent: Tensor, *, train: bool
) -> dict[str, Tensor]:
    """The same by `torch.func.vjp` of `apply`."""

    def forward(x: Tensor, params: Params) -> tuple[Tensor, State]:
        return model.apply(params, state, x, train=train)

    logits, pullback, after = cast(Any, torch.func.vjp(forward, x, params, has_aux=True))
    with torch.no_grad():  # else the gradients' own graph is built, of other kernels
        grad_x, grads = pullback(cotangent)
    return _named(logits, grad_x, tree.flatten(grads), tree.flatten(after))


def _named(
    logits: Tensor, grad_x: Tensor, grads: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    return {
        "logits": logits,
        **{f"gradient {name}": leaf for name, leaf in {"x": grad_x, **grads}.items()},
        **{f"buffer {name}": leaf for name, leaf in buffers.items()},
    }
