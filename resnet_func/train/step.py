"""The pure steps of training and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from resnet_func import tree
from resnet_func.autodiff import detach_leaves, value_and_grad
from resnet_func.distributed import Ranks, sum_over_ranks
from resnet_func.distributed import sync_batch_norm as over_ranks
from resnet_func.losses import accuracy, are_class_indices, check_per_sample
from resnet_func.numerics import to_float64, widen
from resnet_func.optim import Optimizer, ema
from resnet_func.train.trainable import check_opt_state, put_trained, select_trained, trained_leaves
from resnet_func.types import (
    Apply,
    Images,
    Logits,
    LossFn,
    MetricFn,
    Metrics,
    Model,
    Params,
    PerSample,
    State,
    Targets,
    Trainable,
    TrainState,
)

Step: TypeAlias = Callable[[TrainState, Images, Targets], tuple[TrainState, Metrics]]
EvalStep: TypeAlias = Callable[[Params, State, Images, Targets], tuple[PerSample, Logits]]


def init_train_state(
    params: Params,
    state: State,
    optimizer: Optimizer,
    *,
    ema: bool = False,
    trainable: Trainable | None = None,
) -> TrainState:
    """What the first step takes; with `ema` the moving averages start at the parameters and the state.

    Args:
        params, state: From `model.init`. What requires grad, such as an `nn.Parameter`, is detached.
        optimizer: The one of the step.
        ema: Whether to keep moving averages.
        trainable: The `trainable` of the step: the optimizer keeps nothing for leaves that it refuses.

    Raises:
        ValueError: `trainable` accepts no leaf.

    >>> from resnet_func.optim import sgd
    >>> optimizer, params = sgd(0.1, 0.9), {"fc": {"weight": torch.ones(2, 3), "bias": torch.ones(2)}}
    >>> train_state = init_train_state(params, {}, optimizer, trainable=lambda path: path == "fc.bias")
    >>> train_state.opt_state.momentum_buffer
    {'fc': {'bias': tensor([0., 0.])}}
    """
    params, state = detach_leaves((params, state))
    # Copies: were they the parameters themselves, a compiled step would be traced anew once they differ.
    averages = tree.map(torch.clone, (params, state)) if ema else ({}, {})
    return TrainState(
        params, state, optimizer.init(select_trained(params, trained_leaves(params, trainable))), *averages
    )


def make_train_step(
    model: Model,
    loss_fn: LossFn,
    optimizer: Optimizer,
    *,
    microbatches: int = 1,
    ema_decay: float | None = None,
    metrics: Mapping[str, MetricFn] | None = None,
    trainable: Trainable | None = None,
    ranks: Ranks | None = None,
    sync_batch_norm: bool = False,
) -> Step:
    """A pure function of one training step: forward, backward, optimizer, moving average.

    The objective is the mean of `loss_fn` over the batch. `torch.compile(step, fullgraph=True)` makes it one
    graph. To differentiate through a step use `torch.func`: leaves of the state that require grad by
    themselves, such as an `nn.Parameter`, are taken as constants, so that no graph grows from step to step.

    Args:
        model: The network; wrapped in `autocast` for mixed precision.
        loss_fn: A per-sample loss.
        optimizer: An `(init, update)` pair of `resnet_func.optim`.
        microbatches: Pieces the batch is cut into, one after the other, to bound memory. The gradient is that
            of the whole batch, summed in float32 or wider; BatchNorm sees each piece as a batch of its own.
        ema_decay: Decay of the moving average of parameters and running statistics, in [0, 1), for a state
            made with `init_train_state(..., ema=True)`; None keeps none. Early on it is `(1 + t) / (10 + t)`
            where that is smaller (t: steps done), so that the average forgets the initial network.
        metrics: Functions `(logits, targets) -> [N]` by name, which are averaged over the batch. None means
            "accuracy" where targets are class indices, `[N]` and integer, and nothing for other targets.
        trainable: Dotted path -> whether that leaf is trained; None trains all but leaves of whole numbers.
            The others come back as the same tensors, without a gradient or optimizer state; give
            `init_train_state` the same function. Running statistics move all the same.
        ranks: Of `distributed.join`: the processes that each take a part of the batch, one sample at least.
            Gradients, metrics and sample counts are summed in one all-reduce, inside the graph, and divided
            then: on dyadic data every world gives the same bits. Every rank returns the same state.
        sync_batch_norm: Whether BatchNorm takes its statistics over the parts of all ranks (as
            `distributed.sync_batch_norm` says); else each part is a batch of its own to it, and running
            statistics are averaged over the ranks.

    Returns:
        `step(train_state, x, y) -> (train_state, metrics)`; targets `y` are any pytree of tensors with the
        samples first. 0-d metrics: "loss" (mean over the batch, before the update) and those of `metrics`, in
        float32 or wider.

    Raises:
        ValueError: `microbatches` is below 1, `ema_decay` outside [0, 1), a metric is called "loss",
            `sync_batch_norm` without ranks; in the step, an empty batch, a loss or metric that is not
            per-sample, targets of another length, a `trainable` that accepts no leaf, or another than the
            state was made with.

    >>> import resnet_func as rf
    >>> model, optimizer = rf.resnet20(depths=(1, 1, 1)), rf.optim.sgd(lr=0.1)
    >>> train_state = init_train_state(*model.init(torch.Generator().manual_seed(0)), optimizer)
    >>> step = make_train_step(model, rf.losses.cross_entropy, optimizer)
    >>> train_state, metrics = step(train_state, torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))
    >>> sorted(metrics)
    ['accuracy', 'loss']
    """
    _check_step_options(microbatches, ema_decay, metrics)
    if sync_batch_norm:
        if ranks is None:
            raise ValueError("sync_batch_norm needs ranks=, of distributed.join()")
        model = over_ranks(model, ranks)

    options = (microbatches, ema_decay, metrics, trainable, ranks, sync_batch_norm)
    return _TrainStep(model, loss_fn, optimizer, *options)


@dataclass(frozen=True)
class _TrainStep:
    """What `make_train_step` returns: its arguments, as a function that other processes can be sent."""

    model: Model
    loss_fn: LossFn
    optimizer: Optimizer
    microbatches: int
    ema_decay: float | None
    metrics: Mapping[str, MetricFn] | None
    trainable: Trainable | None
    ranks: Ranks | None
    sync_batch_norm: bool

    def objective(
        self,
        leaves: dict[str, Tensor],
        params: Params,
        state: State,
        x: Images,
        y: Targets,
        batch_size: int,
    ) -> tuple[Tensor, tuple[State, Metrics]]:
        """The loss of a piece, over the size of the batch."""
        logits, state = self.model.apply(tree.replace(params, leaves), state, x, train=True)
        losses = self.loss_fn(logits, y)
        check_per_sample(losses, len(x))
        loss = widen(losses).sum() / batch_size
        return loss, (state, {"loss": loss.detach(), **_measure(self.metrics, logits, y, batch_size)})

    def __call__(self, train_state: TrainState, x: Images, y: Targets) -> tuple[TrainState, Metrics]:
        _check_batch(x, y)
        params, state, opt_state, ema_params, ema_state = detach_leaves(train_state)
        leaves = trained_leaves(params, self.trainable)
        trained = select_trained(params, leaves)
        if trained is not params:
            check_opt_state(opt_state, params, trained)
        total = None
        # over ranks sums are divided last: exact where sums are
        divisor = len(x) if self.ranks is None else 1
        for x_part, y_part in _pieces(x, y, self.microbatches):
            part_of = partial(
                self.objective, params=params, state=state, x=x_part, y=y_part, batch_size=divisor
            )
            others = (params, state, x_part, y_part)
            _, grads, (state, measured) = value_and_grad(part_of, leaves, others)
            part = (grads, measured)
            total = part if total is None else tree.map(_add_wide, total, part)
        assert total is not None  # _check_batch refuses an empty batch
        if self.ranks is not None:
            *total, state = _mean_over_ranks(
                total[0], total[1], state, len(x), self.ranks, average_state=not self.sync_batch_norm
            )
        grads, measured = total
        if self.microbatches > 1 or self.ranks is not None:  # which sum in wider dtypes
            grads = {path: grad.to(leaves[path].dtype) for path, grad in grads.items()}
        moved, opt_state = self.optimizer.step(tree.replace(trained, grads), opt_state, trained)
        if self.ema_decay is not None and tree.flatten(ema_params):
            steps = to_float64(opt_state.step)
            decay = torch.clamp((1 + steps) / (10 + steps), max=self.ema_decay)
            before = select_trained(ema_params, leaves)
            ema_params = put_trained(ema_params, ema(before, moved, decay), before)
            ema_state = ema(ema_state, state, decay)
        params = put_trained(params, moved, trained)
        return TrainState(params, state, opt_state, ema_params, ema_state), measured


def _mean_over_ranks(
    grads: dict[str, Tensor],
    measured: Metrics,
    state: State,
    samples: int,
    ranks: Ranks,
    *,
    average_state: bool,
) -> tuple[dict[str, Tensor], Metrics, State]:
    """Sums of the parts to means over the batch, in one collective; running statistics to those of all."""
    flat = {("grads", path): widen(leaf) for path, leaf in grads.items()}
    flat |= {("metrics", name): widen(leaf) for name, leaf in measured.items()}
    flat["samples", ""] = torch.full((), samples, dtype=torch.float32, device=measured["loss"].device)
    statistics = {
        path: leaf for path, leaf in tree.flatten(state).items() if average_state and leaf.is_floating_point()
    }
    sums = sum_over_ranks([*flat.values(), *map(widen, statistics.values())], ranks)
    summed = dict(zip(flat, sums, strict=False))
    count = summed.pop(("samples", ""))
    means = {key: leaf / count.to(leaf.dtype) for key, leaf in summed.items()}
    averages = zip(statistics.items(), sums[len(flat) :], strict=True)
    moved = {path: (leaf / ranks.world).to(like.dtype) for (path, like), leaf in averages}
    return (
        {path: leaf for (kind, path), leaf in means.items() if kind == "grads"},
        {name: leaf for (kind, name), leaf in means.items() if kind == "metrics"},
        tree.replace(state, moved),
    )


def _check_step_options(
    microbatches: int, ema_decay: float | None, metrics: Mapping[str, MetricFn] | None
) -> None:
    if microbatches < 1:
        raise ValueError(f"microbatches must be 1 or more; got {microbatches}")
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1); got {ema_decay}. Use None for no average")
    if "loss" in (metrics or {}):
        raise ValueError('the metric "loss" is the mean of loss_fn; call yours by another name')


def _check_batch(x: Images, y: Targets) -> None:
    """Before anything is computed: an empty batch would give NaN, and decay the parameters."""
    n = len(x)
    if n == 0:
        raise ValueError("a training step needs at least one sample; got an empty batch")
    check_length(y, n)


def check_length(targets: Targets, n: int) -> None:
    """Refuse targets of which a leaf does not lead with the N samples.

    >>> check_length({"label": torch.tensor([0, 1])}, 2)
    """
    for leaf in tree.leaves(targets):
        if leaf.shape[:1] != (n,):
            raise ValueError(
                f"targets must have the samples first, {n} as in the images; got {list(leaf.shape)}"
            )


def _pieces(x: Images, y: Targets, pieces: int) -> list[tuple[Images, Targets]]:
    """The batch in at most as many pieces, each with its targets."""
    parts = x.chunk(pieces)
    return [(part, tree.map(lambda leaf, i=i: leaf.chunk(pieces)[i], y)) for i, part in enumerate(parts)]


def _add_wide(total: Tensor, part: Tensor) -> Tensor:
    """In bfloat16 a sum of a thousand equal parts would stop at about a third of them."""
    return widen(total) + part


def _measure(
    metrics: Mapping[str, MetricFn] | None, logits: Logits, targets: Targets, batch_size: int
) -> Metrics:
    """Each metric's sum over the piece, over the size of the batch."""
    if metrics is None:
        metrics = {"accuracy": accuracy} if are_class_indices(targets, len(logits)) else {}
    means = {}
    for name, metric in metrics.items():
        values = metric(logits.detach(), targets)
        check_per_sample(values, len(logits), f"the metric {name!r}")
        values = widen(values) if values.is_floating_point() else values.to(torch.float32)
        means[name] = values.sum() / batch_size
    return means


def make_eval_step(model: Model, loss_fn: LossFn) -> EvalStep:
    """A pure function `(params, state, x, y) -> (losses [N], logits [N, classes])`, in evaluation mode.

    It keeps no graph, whatever requires grad.

    Raises:
        ValueError: in the step, a loss that is not per-sample.

    >>> import resnet_func as rf
    >>> model = rf.resnet20(depths=(1, 1, 1))
    >>> params, state = model.init(torch.Generator().manual_seed(0))
    >>> eval_step = make_eval_step(model, rf.losses.cross_entropy)
    >>> [list(r.shape) for r in eval_step(params, state, torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))]
    [[2], [2, 10]]
    """

    return partial(_evaluate, model.apply, loss_fn)


@torch.no_grad()
def _evaluate(
    apply: Apply, loss_fn: LossFn, params: Params, state: State, x: Images, y: Targets
) -> tuple[PerSample, Logits]:
    logits, _ = apply(params, state, x, train=False)
    losses = loss_fn(logits, y)
    check_per_sample(losses, len(x))
    return losses, logits
