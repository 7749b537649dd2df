"""Gram matrices of per-sample gradients between two batches, and the neural tangent kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, Unpack

import torch
from torch import Tensor

from resnet_func import tree
from resnet_func.losses import logit
from resnet_func.numerics import without_autocast
from resnet_func.per_sample.engine import capture_batch, parts, plan_ways
from resnet_func.per_sample.layers import contract
from resnet_func.per_sample.layers.contract import Way
from resnet_func.per_sample.layers.factors import Direct, Factors, num_samples
from resnet_func.per_sample.options import Options, Settings, check_options
from resnet_func.per_sample.quantities.quantity import by_layer
from resnet_func.types import LossFn, Model, Params, State

Batch: TypeAlias = tuple[Any, Any]


def gram(
    model: Model,
    loss_fn: LossFn,
    **options: Unpack[Options],
) -> Callable[..., Tensor]:
    """Inner products between the per-sample gradients of two batches, layer by layer.

    One layer's gradients at most exist at a time, and only some of its channels where it is large.

    Args:
        model, loss_fn, **options: As in `grads`. `microbatch` is samples of each batch at a time: blocks of
            the matrix are computed one by one, so the passes over the network grow with the square of the
            number of microbatches.

    Returns:
        `fn(params, state, (x_a, y_a), (x_b, y_b)) -> Tensor [N_a, N_b]`. Without the last argument it is the
        Gram matrix of the first batch, exactly symmetric, and positive semi-definite to round-off.

    >>> import torch, resnet_func as rf
    >>> model = rf.from_function(lambda params, x: x @ params["w"])  # the gradient of its logit is x
    >>> params, x, y = {"w": torch.ones(2, 1)}, torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.zeros(2)
    >>> rf.per_sample.gram(model, rf.losses.logit(0))(params, {}, (x, y))
    tensor([[25.,  4.],
            [ 4.,  1.]])
    """
    return partial(_gram, layer_grams(model, loss_fn, **options))


def _gram(
    per_layer: Callable[..., dict[str, Tensor]],
    params: Params,
    state: State,
    a: Batch,
    b: Batch | None = None,
) -> Tensor:
    total = torch.stack(list(per_layer(params, state, a, b).values())).sum(0)
    return _symmetric(total) if b is None else total


def layer_grams(
    model: Model,
    loss_fn: LossFn,
    **options: Unpack[Options],
) -> Callable[..., dict[str, Tensor]]:
    """`gram` of each layer by itself: `{layer path: Tensor [N_a, N_b]}`; they add up to `gram`.

    >>> import torch, resnet_func as rf
    >>> model = rf.from_function(lambda params, x: x @ params["fc"]["weight"])  # the logit's gradient is x
    >>> x, y = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.zeros(2)
    >>> params = {"fc": {"weight": torch.ones(2, 1)}}
    >>> rf.per_sample.layer_grams(model, rf.losses.logit(0))(params, {}, (x, y))
    {'fc': tensor([[25.,  4.],
            [ 4.,  1.]])}
    """
    return partial(_layer_grams, check_options(model, loss_fn, **options))


def _layer_grams(
    settings: Settings, params: Params, state: State, a: Batch, b: Batch | None = None
) -> dict[str, Tensor]:
    blocks_a = parts(settings, *a)
    blocks_b = blocks_a if b is None else parts(settings, *b)
    rows = []
    for i, left in enumerate(blocks_a):
        row = [
            _block(settings, params, state, left, None if b is None and i == j else right)
            for j, right in enumerate(blocks_b)
        ]
        rows.append({layer: torch.cat([block[layer] for block in row], 1) for layer in row[0]})
    grams = {layer: torch.cat([row[layer] for row in rows]) for layer in rows[0]}
    return {layer: _symmetric(g) for layer, g in grams.items()} if b is None else grams


def _symmetric(matrix: Tensor) -> Tensor:
    # products and sums of symmetric matrices are symmetric to round-off only
    return (matrix + matrix.T) / 2


def _block(settings: Settings, params: Params, state: State, a: Batch, b: Batch | None) -> dict[str, Tensor]:
    """Layer Gram matrices of two blocks, or of one with itself."""
    left = capture_batch(settings, params, state, *a).factors()
    right = left if b is None else capture_batch(settings, params, state, *b).factors()
    ways = plan_ways(settings, "gram", left, right)
    # autocast is for the network: what is summed here keeps the parameters' dtype
    with without_autocast(tree.leaves(a[0])[0].device.type):
        products = {}
        for path in list(left):
            factors_a = left.pop(path)
            factors_b = factors_a if b is None else right.pop(path)
            products[path] = _products(factors_a, factors_b, ways.get(path, "materialize"))
    return {
        layer: torch.stack([products[path] for path in paths]).sum(0)
        for layer, paths in by_layer(products).items()
    }


def _products(a: Factors, b: Factors, way: Way) -> Tensor:
    """Inner products of one leaf, `[N_a, N_b]`; either may be 0."""
    na, nb = num_samples(a), num_samples(b)
    if na and nb:
        return contract.inner_products(a, b, way)
    leaf = a.grads if isinstance(a, Direct) else a.weight
    return leaf.new_zeros((na, nb))


def ntk(model: Model, num_classes: int | None = None, **options: Unpack[Options]) -> Callable[..., Tensor]:
    """The empirical neural tangent kernel, summed over classes: `sum_c <d f_c(x_i), d f_c(x_j)>`.

    One `gram` for each logit (Jacot et al. 2018, https://arxiv.org/abs/1806.07572).

    Args:
        model: As in `grads`.
        num_classes: Logits to sum over; None means all of the model's config. Logits `[N]` are one.
        **options: Those of `gram`.

    Returns:
        `fn(params, state, x_a, x_b) -> Tensor [N_a, N_b]`, of inputs that may be trees;
        without `x_b`, of the first batch with itself.

    Raises:
        ValueError: the model came from a module and `num_classes` is None.

    >>> import torch, resnet_func as rf
    >>> model = rf.from_function(lambda params, x: x @ params["w"])  # the gradient of its logit is x
    >>> params, x, y = {"w": torch.ones(2, 1)}, torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.zeros(2)
    >>> rf.per_sample.ntk(model, num_classes=1)(params, {}, x)
    tensor([[25.,  4.],
            [ 4.,  1.]])
    """
    if num_classes is None:
        if model.config is None:
            raise ValueError("a model from a module needs the number of its logits; pass num_classes=")
        num_classes = model.config.num_classes
    grams = [gram(model, partial(_logit, index), **options) for index in range(num_classes)]

    return partial(_sum_of_grams, grams)


def _logit(index: int, logits: Tensor, targets: Any) -> Tensor:
    return logit(index)(logits.unsqueeze(1) if logits.ndim == 1 else logits, targets)


def _sum_of_grams(
    grams: list[Callable[..., Tensor]], params: Params, state: State, x_a: Any, x_b: Any = None
) -> Tensor:
    batches = [(x, _zeros_for(x)) for x in (x_a, x_b) if x is not None]
    return torch.stack([gram_fn(params, state, *batches) for gram_fn in grams]).sum(0)


def _zeros_for(x: Any) -> Tensor:
    """Targets that a logit does not look at."""
    first = tree.leaves(x)[0]
    return first.new_zeros(len(first))
