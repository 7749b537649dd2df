"""The transforms: `transform(model, loss_fn, ...) -> function`, per sample where training takes the mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor

from resnet_func.per_sample.clipping import ClippedSum, NonFinite
from resnet_func.per_sample.engine import directional_derivatives, evaluate, parts
from resnet_func.per_sample.options import Options, Settings, check_options
from resnet_func.per_sample.quantities import quantity
from resnet_func.per_sample.quantities.noise_scale import Moments, moments_quantity
from resnet_func.per_sample.quantities.projections import Projection, sketch_quantity
from resnet_func.per_sample.quantities.quantity import Clipping, Quantity
from resnet_func.types import LossFn, Model, Params, State


def grads(
    model: Model,
    loss_fn: LossFn,
    **options: Unpack[Options],
) -> Callable[[Params, State, Any, Any], Params]:
    """The gradient of every sample's loss.

    Args:
        model: A model of the zoo, of any config, or one from a module.
        loss_fn: Per-sample loss, `(logits, targets) -> [N]`; each loss may depend on its own logits only.
        **options: See `Options`.

    Returns:
        `fn(params, state, x, y)`: the trainable leaves of the parameters' tree (`tree.select`), each
        `[N, *shape]`. `x [N, C, H, W]`,
        or `x [N, views, C, H, W]` for gradients averaged over augmented views that share a target `y [N,
        ...]` (De et al. 2022, https://arxiv.org/abs/2204.13650). No samples give leaves `[0, *shape]`; a
        sample with NaN has NaN in its own gradient only.

    Raises:
        ValueError: an option is out of range, the model has BatchNorm and `train` is not False, the shapes do
            not fit together, or the loss is not per-sample.

    >>> import torch, resnet_func as rf
    >>> model = rf.from_function(lambda params, x: x @ params["w"])  # the gradient of its logit is x
    >>> params, x, y = {"w": torch.ones(2, 1)}, torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.zeros(2)
    >>> rf.per_sample.grads(model, rf.losses.logit(0))(params, {}, x, y)["w"][..., 0]
    tensor([[3., 4.],
            [0., 1.]])
    """
    settings = check_options(model, loss_fn, **options)
    return partial(_transform, settings, quantity.grads)


def norms(
    model: Model,
    loss_fn: LossFn,
    **options: Unpack[Options],
) -> Callable[[Params, State, Any, Any], Tensor]:
    """The L2 norm of every sample's gradient, over all trainable leaves.

    At most one layer's gradients exist at a time, and none where the ghost identity is cheaper
    (Goodfellow 2015, https://arxiv.org/abs/1510.01799; Bu et al. 2022, https://arxiv.org/abs/2205.10683).

    Args:
        model, loss_fn, **options: As in `grads`.

    Returns:
        `fn(params, state, x, y) -> Tensor [N]`. A sample with NaN has a NaN norm; no samples give `[0]`.

    >>> import torch, resnet_func as rf
    >>> model = rf.from_function(lambda params, x: x @ params["w"])  # the gradient of its logit is x
    >>> params, x, y = {"w": torch.ones(2, 1)}, torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.zeros(2)
    >>> rf.per_sample.norms(model, rf.losses.logit(0))(params, {}, x, y)
    tensor([5., 1.])
    """
    settings = check_options(model, loss_fn, **options)
    return partial(_transform, settings, quantity.norms)


def layer_norms(
    model: Model,
    loss_fn: LossFn,
    **options: Unpack[Options],
) -> Callable[[Params, State, Any, Any], dict[str, Tensor]]:
    """`norms` of each layer by itself: `fn(params, state, x, y) -> {layer path: Tensor [N]}`.

    >>> import torch, resnet_func as rf
    >>> model = rf.from_function(lambda params, x: x @ params["fc"]["weight"])  # the logit's gradient is x
    >>> x, y = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.zeros(2)
    >>> params = {"fc": {"weight": torch.ones(2, 1)}}
    >>> rf.per_sample.layer_norms(model, rf.losses.logit(0))(params, {}, x, y)
    {'fc': tensor([5., 1.])}
    """
    settings = check_options(model, loss_fn, **options)
    return partial(_transform, settings, quantity.layer_norms)


def clipped_sum(
    model: Model,
    loss_fn: LossFn,
    *,
    max_norm: float | Mapping[str, float],
    clipping: Clipping = "flat",
    nonfinite: NonFinite = "raise",
    **options: Unpack[Options],
) -> ClippedSum:
    """The sum of per-sample gradients, each clipped to norm `max_norm` (Abadi et al. 2016).

    Replacing one sample changes the sum by at most `2 max_norm`, adding one by `max_norm`, up to rounding:
    factors are float32 or wider and never rounded up, whatever the clipping, but what they multiply has the
    cotangents' dtype, whose relative rounding is 6e-8 in float32, 1e-16 in float64 and 4e-3 under bfloat16
    autocast.

    Args:
        model, loss_fn, **options: As in `grads`.
        max_norm: Bound on the norm of one sample's contribution, >= 0; or a bound for every prefix of the
            leaves' paths, such as `{"": 1.0, "fc": 0.1}`, where the longest that fits has a leaf: each part
            is clipped by itself, and the whole is bounded by the root of the sum of their squares.
        clipping: "flat" multiplies by `min(1, max_norm / norm)`, which is exactly 1 for norms up to
            `max_norm`. "per_layer" does so in each layer with `max_norm / sqrt(layers)`, so the bound on the
            whole stays. "automatic" normalises, `max_norm / (norm + 0.01)` (Bu et al. 2023,
            https://arxiv.org/abs/2206.07136). All factors are a relative 2 eps of the norms' dtype low (2e-7
            in float32, 4e-16 in float64), so that factor times norm is never above the bound.
        nonfinite: What a sample with NaN or Inf in its gradient does: "raise" names it, "zero" leaves it out
            of the sum. Its norm is returned as it is, and no other sample is touched. Compiled code cannot
            raise, and leaves it out: look at the norms.

    Returns:
        `fn(params, state, x, y, mask=None) -> (sum, norms)`: the trainable leaves of the tree, and the
        norms `[N]` before clipping. `max_norm=0` gives zeros; a zero gradient stays zero; no samples give
        zeros and `[0]`. Where `mask [N]`, of bools, is False, a sample is padding: it adds exactly nothing,
        whatever it holds, and its norm is 0. `fn(..., max_norm=)` takes another bound for the call, a 0-d
        tensor, which is not checked. `fn.bound` is the most that one sample can add, from `max_norm`.

    Raises:
        ValueError: `max_norm` is negative or NaN, an unknown name, a sample is not finite, or as in `grads`.

    >>> import torch, resnet_func as rf
    >>> model = rf.from_function(lambda params, x: x @ params["w"])  # the gradient of its logit is x
    >>> params, x, y = {"w": torch.ones(2, 1)}, torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.zeros(2)
    >>> total, norms = rf.per_sample.clipped_sum(model, rf.losses.logit(0), max_norm=2.5)(params, {}, x, y)
    >>> total["w"].T, norms
    (tensor([[1.5000, 3.0000]]), tensor([5., 1.]))
    """
    settings = check_options(model, loss_fn, **options)
    return ClippedSum(settings, max_norm, clipping, nonfinite)


def sketch(
    model: Model,
    loss_fn: LossFn,
    *,
    dim: int = 4096,
    seed: int = 0,
    projection: Projection = "factorized",
    **options: Unpack[Options],
) -> Callable[[Params, State, Any, Any], Tensor]:
    """A random linear projection of every sample's gradient: `E[<s_i, s_j>] = <g_i, g_j>`.

    The projection depends on `dim`, `seed`, `projection` and the leaves' paths and shapes only: not on the
    batch, its split, or the machine.

    Args:
        model, loss_fn, **options: As in `grads`.
        dim: Length of a sketch.
        seed: Of the projection.
        projection: "dense" draws a sign for every entry of a gradient and dimension, at a cost of
            `N * |params| * dim`. The error of an inner product, relative to `|g_i| |g_j|`, is about
            `1 / sqrt(dim)`: measured on ResNet-20, 0.067 at dim 256 and 0.037 at 1024. "factorized" projects
            a layer's input and cotangent to about `sqrt(dim)` each before their outer product, at about the
            cost of one more forward pass; give it a `dim` with a divisor near its root. Its error falls as
            slowly as `dim ** -0.25` where gradients are nearly of rank one: measured, 0.16 at 256, 0.10 at
            1024, 0.08 at 4096.

    Returns:
        `fn(params, state, x, y) -> Tensor [N, dim]`.

    Raises:
        ValueError: `dim` is below 1, an unknown projection, or as in `grads`.

    >>> import torch, resnet_func as rf
    >>> model = rf.from_function(lambda params, x: x @ params["w"])  # the gradient of its logit is x
    >>> params, x, y = {"w": torch.ones(2, 1)}, torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.zeros(2)
    >>> rf.per_sample.sketch(model, rf.losses.logit(0), dim=16)(params, {}, x, y).shape
    torch.Size([2, 16])
    """
    settings = check_options(model, loss_fn, **options)
    make = partial(sketch_quantity, dim, seed, projection)
    make()  # an error now, not at the first batch
    return partial(_transform, settings, make)


def moments(
    model: Model,
    loss_fn: LossFn,
    **options: Unpack[Options],
) -> Callable[[Params, State, Any, Any], Moments]:
    """The mean gradient, its diagonal second moment, and the gradient noise scale.

    The second moment is the diagonal of the empirical Fisher matrix; the noise scale estimates the batch size
    beyond which averaging more samples stops helping (McCandlish et al. 2018,
    https://arxiv.org/abs/1812.06162).

    Args:
        model, loss_fn, **options: As in `grads`.

    Returns:
        `fn(params, state, x, y) -> Moments`. One sample has no noise scale (NaN); no samples give zeros, and
        NaN. The estimate of the squared gradient norm, and with it the noise scale, can come out negative
        where the batch is small against the noise.

    >>> import torch, resnet_func as rf
    >>> model = rf.from_function(lambda params, x: x @ params["w"])  # the gradient of its logit is x
    >>> params, x, y = {"w": torch.ones(2, 1)}, torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.zeros(2)
    >>> found = rf.per_sample.moments(model, rf.losses.logit(0))(params, {}, x, y)
    >>> found.mean["w"].T
    tensor([[1.5000, 2.5000]])
    """
    settings = check_options(model, loss_fn, **options)
    return partial(_transform, settings, moments_quantity)


def dot(
    model: Model,
    loss_fn: LossFn,
    **options: Unpack[Options],
) -> Callable[[Params, State, Any, Any, Params], Tensor]:
    """The inner product of every sample's gradient with one direction, in one forward-mode pass.

    Args:
        model, loss_fn, **options: As in `grads`; the method makes no difference, no gradient is formed.

    Returns:
        `fn(params, state, x, y, direction) -> Tensor [N]`, with a direction like the parameters. With
        `trainable` the frozen leaves of the direction do not count.

    >>> import torch, resnet_func as rf
    >>> model = rf.resnet20(norm="group")
    >>> params, state = model.init(torch.Generator().manual_seed(0))
    >>> x, y = torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])
    >>> rf.per_sample.dot(model, rf.losses.cross_entropy)(params, state, x, y, params).shape
    torch.Size([2])
    """
    settings = check_options(model, loss_fn, **options)

    return partial(_dot, settings)


# What the transforms return: partials of these, which other processes can be sent.


def _transform(
    settings: Settings, make: Callable[[], Quantity], params: Params, state: State, x: Any, y: Any
) -> Any:
    wanted = make()
    (joined,) = evaluate(settings, [wanted], params, state, x, y)
    return wanted.result(joined, params)


def _dot(settings: Settings, params: Params, state: State, x: Any, y: Any, direction: Params) -> Tensor:
    found = [
        directional_derivatives(settings, params, state, *part, direction) for part in parts(settings, x, y)
    ]
    return torch.cat(found)
