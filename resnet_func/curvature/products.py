"""Products of a tree of parameters with the Hessian and the Gauss-Newton matrix of the mean loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, TypedDict, Unpack

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from resnet_func import tree
from resnet_func.autodiff import detach_leaves
from resnet_func.losses import check_per_sample
from resnet_func.numerics import widen
from resnet_func.per_sample.constants import ConstantUnderNoGrad
from resnet_func.per_sample.engine import fold_batch, parts, refuse_unstated_statistics
from resnet_func.per_sample.options import Settings, check_options
from resnet_func.per_sample.task import Task, leaves_like, make_task
from resnet_func.types import Logits, LossFn, Model, Params, State, Trainable

# `product(params, state, x, y, direction) -> tree`
Product: TypeAlias = Callable[[Params, State, Any, Any, Params], Params]
Leaves: TypeAlias = dict[str, Tensor]


class Options(TypedDict, total=False):
    """What every transform of this package takes as keywords, each optional.

    Args:
        trainable: Predicate on a leaf's dotted path; frozen leaves are constants, and left out of the result.
        microbatch: Samples at a time; bounds memory. Sums over microbatches are in at least float32.
        train: A model with BatchNorm needs the explicit `train=False`: running statistics are used, and not
            updated. Other models take None and False the same.
    """

    trainable: Trainable | None
    microbatch: int | None
    train: bool | None


def check_curvature_options(model: Model, loss_fn: LossFn, options: Options) -> Settings:
    """The checked options; views of a sample have no meaning here."""
    return check_options(model, loss_fn, views=False, **options)


def hvp(model: Model, loss_fn: LossFn, **options: Unpack[Options]) -> Product:
    """Products with the Hessian of the mean loss: the derivative of its gradient along a direction.

    The gradient of `<gradient, direction>` (Pearlmutter 1994, https://doi.org/10.1162/neco.1994.6.1.147), at
    the price of a few gradients, and as one graph under `torch.compile(hvp(...), fullgraph=True)`. Reverse
    mode twice: forward mode over it costs the same, and lacks the backward passes of torch's own GroupNorm.

    Args:
        model, loss_fn: A network in evaluation mode, and a per-sample loss.
        **options: `trainable`, `microbatch`, `train`: see `Options`.

    Returns:
        `fn(params, state, x, y, direction) -> product`: the trainable leaves of the tree, in their
        dtypes. The direction is like the parameters; frozen leaves in it do not count, and may be left out.
        No samples give zeros.

    Raises:
        ValueError: options as in `per_sample.grads`; the direction lacks a leaf or has another shape.

    >>> import torch, resnet_func as rf
    >>> model, params, state = rf.from_module(torch.nn.Linear(1, 1, bias=False))
    >>> product = rf.curvature.hvp(model, rf.losses.squared_error)
    >>> x, y = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
    >>> product(params, state, x, y, {"weight": torch.tensor([[1.0]])})
    {'weight': tensor([[5.]])}
    """
    return partial(_product, check_curvature_options(model, loss_fn, options), _hessian_product)


def ggn_vp(model: Model, loss_fn: LossFn, **options: Unpack[Options]) -> Product:
    """Products with the generalised Gauss-Newton matrix: `J' H J`, the loss's Hessian H taken in the logits.

    It is positive semi-definite where the loss is convex in the logits, and for cross-entropy and squared
    error the Fisher information of the network's predictions (Martens 2014,
    https://arxiv.org/abs/1412.1193). One forward pass carries value and tangent, one backward pass follows.

    Args:
        model, loss_fn, **options: As in `hvp`.

    Returns:
        As in `hvp`.

    Raises:
        ValueError: as in `hvp`.

    >>> import torch, resnet_func as rf
    >>> model, params, state = rf.from_module(torch.nn.Linear(1, 1, bias=False))
    >>> product = rf.curvature.ggn_vp(model, rf.losses.squared_error)
    >>> x, y = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
    >>> product(params, state, x, y, {"weight": torch.tensor([[1.0]])})
    {'weight': tensor([[5.]])}
    """
    return partial(_product, check_curvature_options(model, loss_fn, options), _gauss_newton_product)


def _product(
    settings: Settings,
    product: Callable[[Task, Any, Any, Leaves], Leaves],
    params: Params,
    state: State,
    x: Any,
    y: Any,
    direction: Params,
) -> Params:
    """The mean over the samples, from sums over microbatches."""
    refuse_unstated_statistics(settings, state)
    samples = fold_batch(settings, x, y).samples
    task = make_task(settings.model, settings.loss_fn, settings.trainable, *detach_leaves((params, state)))
    along = leaves_like(task.trained, direction, "direction")
    total = {path: torch.zeros_like(widen(leaf)) for path, leaf in task.trained.items()}
    for part_x, part_y in parts(settings, x, y) if samples else []:
        found = product(task, part_x, part_y, along)
        total = {path: leaf + found[path] for path, leaf in total.items()}
    mean = {path: leaf / max(samples, 1) for path, leaf in total.items()}
    return tree.select(params, {path: leaf.to(task.trained[path].dtype) for path, leaf in mean.items()})


def _network(task: Task, x: Any) -> Callable[[Leaves], Logits]:
    """The logits as a function of the trainable leaves."""

    def logits(trained: Leaves) -> Logits:
        # the only attention with second derivatives
        with sdpa_kernel(SDPBackend.MATH), ConstantUnderNoGrad():
            return task.model.apply(task.params(trained), task.state, x, train=False)[0]

    return logits


def _total_loss(task: Task, y: Any, logits: Logits) -> Tensor:
    losses = task.loss_fn(logits, y)
    check_per_sample(losses, logits.shape[0])
    return widen(losses).sum()


def _hessian_product(task: Task, x: Any, y: Any, direction: Leaves) -> Leaves:
    network = _network(task, x)
    gradient = torch.func.grad(lambda trained: _total_loss(task, y, network(trained)))
    return torch.func.grad(lambda trained: tree.dot(gradient(trained), direction))(task.trained)


def _gauss_newton_product(task: Task, x: Any, y: Any, direction: Leaves) -> Leaves:
    network = _network(task, x)

    def both(trained: Leaves) -> Any:  # the logits, and their tangent
        try:
            return torch.func.jvp(network, (trained,), (direction,))
        except NotImplementedError:  # no forward mode: the transpose of the backward pass
            logits, pullback = torch.func.vjp(network, trained)  # type: ignore[misc]
            transposed = torch.func.vjp(pullback, torch.zeros_like(logits))[1]
            return logits, transposed((direction,))[0]

    logits, pullback, tangent = torch.func.vjp(both, task.trained, has_aux=True)  # type: ignore[misc]
    of_logits = torch.func.grad(partial(_total_loss, task, y))
    return pullback(torch.func.jvp(of_logits, (logits,), (tangent,))[1])[0]


def flat_function(
    model: Model, params: Params, state: State, *, trainable: Trainable | None = None
) -> tuple[Callable[[Leaves, Any], Logits], Leaves]:
    """The network as `f({dotted path: leaf}, x) -> logits`, as curvlinops, dattri and posteriors take it.

    Args:
        model, params, state: Any network; evaluation mode, the state as it is.
        trainable: Predicate on a leaf's dotted path; other leaves are constants of f. None leaves none out.

    Returns:
        f, and the flat dict of the trainable leaves.

    Raises:
        ValueError: `trainable` selects no leaf.

    >>> import torch, resnet_func as rf
    >>> f, flat = flat_function(*rf.from_module(torch.nn.Linear(2, 1)))
    >>> list(flat), f(flat, torch.ones(3, 2)).shape
    (['weight', 'bias'], torch.Size([3, 1]))
    """
    task = make_task(model, lambda logits, y: logits, trainable or (lambda path: True), params, state)
    return partial(_apply_flat, task), task.trained


def _apply_flat(task: Task, trained: Leaves, x: Any) -> Logits:
    return _network(task, x)(trained)
