"""Training and evaluation: one pure step, and the loops over epochs and batches around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from resnet_func import tree
from resnet_func.autodiff import detach_leaves, value_and_grad
from resnet_func.losses import accuracy, are_class_indices, check_per_sample, check_targets
from resnet_func.numerics import to_float64, widen
from resnet_func.optim import Optimizer, ema
from resnet_func.types import (
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
Batches: TypeAlias = Iterable[tuple[Images, Targets]]


# --------------------------------------------------------------------------- models to models


def autocast(model: Model, device_type: str, dtype: torch.dtype) -> Model:
    """The model with its forward pass in mixed precision; parameters, logits and state stay as they are.

    Args:
        model: Any model with float32 parameters.
        device_type: "cpu" or "cuda".
        dtype: The precision of convolutions and matrix products, such as `torch.bfloat16`.

    >>> import resnet_func as rf
    >>> model = autocast(rf.resnet20(depths=(1, 1, 1)), "cpu", torch.bfloat16)
    >>> params, state = model.init(torch.Generator().manual_seed(0))
    >>> model.apply(params, state, torch.zeros(1, 3, 8, 8), train=False)[0].dtype
    torch.float32
    """

    def apply(params: Params, state: State, x: Images, *, train: bool) -> tuple[Logits, State]:
        with torch.autocast(device_type, dtype):
            logits, state = model.apply(params, state, x, train=train)
        return logits.float(), state

    return model._replace(apply=apply)


def average_flips(model: Model) -> Model:
    """The model whose logits are averaged over an image and its mirror image, for use at test time.

    Twice the cost. The state comes from the upright image.

    >>> import resnet_func as rf
    >>> model = average_flips(rf.resnet20(depths=(1, 1, 1)))
    >>> params, state = model.init(torch.Generator().manual_seed(0))
    >>> model.apply(params, state, torch.zeros(1, 3, 8, 8), train=False)[0].shape
    torch.Size([1, 10])
    """

    def apply(params: Params, state: State, x: Images, *, train: bool) -> tuple[Logits, State]:
        upright, new_state = model.apply(params, state, x, train=train)
        mirrored, _ = model.apply(params, state, x.flip(3), train=train)
        return (upright + mirrored) / 2, new_state

    return model._replace(apply=apply)


# --------------------------------------------------------------------------- steps


def to_memory_format(params: Params, memory_format: torch.memory_format) -> Params:
    """The tree with its four-dimensional leaves, convolution weights, in a memory format.

    >>> params = to_memory_format({"weight": torch.zeros(2, 3, 3, 3)}, torch.channels_last)
    >>> params["weight"].stride()
    (27, 1, 9, 3)
    """

    def place(leaf: Tensor) -> Tensor:
        return leaf.contiguous(memory_format=memory_format) if leaf.ndim == 4 else leaf

    return tree.map(place, params)


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
    return TrainState(params, state, optimizer.init(_select(params, trainable)), *averages)


def make_train_step(
    model: Model,
    loss_fn: LossFn,
    optimizer: Optimizer,
    *,
    microbatches: int = 1,
    ema_decay: float | None = None,
    metrics: Mapping[str, MetricFn] | None = None,
    trainable: Trainable | None = None,
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
        trainable: Dotted path -> whether that leaf is trained; None trains all. The others come back as the
            same tensors, without a gradient or optimizer state; give `init_train_state` the same function.
            Running statistics move all the same.

    Returns:
        `step(train_state, x, y) -> (train_state, metrics)`; targets `y` are any pytree of tensors with the
        samples first. 0-d metrics: "loss" (mean over the batch, before the update) and those of `metrics`, in
        float32 or wider.

    Raises:
        ValueError: `microbatches` is below 1, `ema_decay` outside [0, 1), a metric is called "loss"; in the
            step, an empty batch, a loss or metric that is not per-sample, targets of another length, a
            `trainable` that accepts no leaf, or another than the state was made with.

    >>> import resnet_func as rf
    >>> model, optimizer = rf.resnet20(depths=(1, 1, 1)), rf.optim.sgd(lr=0.1)
    >>> train_state = init_train_state(*model.init(torch.Generator().manual_seed(0)), optimizer)
    >>> step = make_train_step(model, rf.losses.cross_entropy, optimizer)
    >>> train_state, metrics = step(train_state, torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))
    >>> sorted(metrics)
    ['accuracy', 'loss']
    """
    _check_step_options(microbatches, ema_decay, metrics)

    def objective(
        trained: Params, params: Params, state: State, x: Images, y: Targets, batch_size: int
    ) -> tuple[Tensor, tuple[State, Metrics]]:
        params = trained if trainable is None else _replace(params, trained)
        logits, state = model.apply(params, state, x, train=True)
        losses = loss_fn(logits, y)
        check_per_sample(losses, len(x))
        loss = widen(losses).sum() / batch_size
        return loss, (state, {"loss": loss.detach(), **_measure(metrics, logits, y, batch_size)})

    def step(train_state: TrainState, x: Images, y: Targets) -> tuple[TrainState, Metrics]:
        _check_batch(x, y)
        params, state, opt_state, ema_params, ema_state = detach_leaves(train_state)
        trained, total = _select(params, trainable), None
        if trainable is not None:
            _check_opt_state(opt_state, params, trained)
        for x_part, y_part in _pieces(x, y, microbatches):
            part_of = partial(objective, params=params, state=state, x=x_part, y=y_part, batch_size=len(x))
            _, grads, (state, measured) = value_and_grad(part_of, trained)
            part = (grads, measured)
            total = part if total is None else tree.map(_add_wide, total, part)
        assert total is not None  # _check_batch refuses an empty batch
        grads, measured = tree.map(lambda g, p: g.to(p.dtype), total[0], trained), total[1]
        moved, opt_state = optimizer.step(grads, opt_state, trained)
        if ema_decay is not None and ema_params:
            steps = to_float64(opt_state.step)
            decay = torch.clamp((1 + steps) / (10 + steps), max=ema_decay)
            averages = ema(_select(ema_params, trainable), moved, decay)
            ema_params = averages if trainable is None else _replace(ema_params, averages)
            ema_state = ema(ema_state, state, decay)
        params = moved if trainable is None else _replace(params, moved)
        return TrainState(params, state, opt_state, ema_params, ema_state), measured

    return step


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
    _check_length(y, n)


def _check_length(targets: Targets, n: int) -> None:
    for leaf in tree.leaves(targets):
        if leaf.shape[:1] != (n,):
            raise ValueError(
                f"targets must have the samples first, {n} as in the images; got {list(leaf.shape)}"
            )


def _check_opt_state(opt_state: Any, params: Params, trained: Params) -> None:
    frozen = tree.flatten(params).keys() - tree.flatten(trained).keys()
    for field in opt_state if isinstance(opt_state, tuple) else (opt_state,):
        if isinstance(field, tuple):
            _check_opt_state(field, params, trained)
        elif isinstance(field, Mapping) and (kept := frozen & tree.flatten(field).keys()):
            raise ValueError(
                f"the optimizer's state holds {min(kept)!r}, which trainable refuses; "
                "give init_train_state the same trainable"
            )


def _select(params: Params, trainable: Trainable | None) -> Params:
    """The leaves that are trained."""
    if trainable is None:
        return params
    flat = tree.flatten(params)
    chosen = {path: leaf for path, leaf in flat.items() if trainable(path)}
    if not chosen:
        raise ValueError(f"trainable accepts none of {len(flat)} leaves, such as {next(iter(flat), None)!r}")
    return tree.unflatten(chosen)


def _replace(params: Params, chosen: Params) -> Params:
    """`params` with the leaves of `chosen` in place of its own."""
    flat = tree.flatten(chosen)
    return tree.map_with_path(lambda path, leaf: flat.get(path, leaf), params)


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

    @torch.no_grad()
    def step(params: Params, state: State, x: Images, y: Targets) -> tuple[PerSample, Logits]:
        logits, _ = model.apply(params, state, x, train=False)
        losses = loss_fn(logits, y)
        check_per_sample(losses, len(x))
        return losses, logits

    return step


# --------------------------------------------------------------------------- loops


class Progress(NamedTuple):
    """Where a run is, and the sums of the epoch it is in: what a resumed run needs beside its TrainState."""

    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    correct: float = 0.0
    samples: int = 0
    seconds: float = 0.0


def train_epoch(
    step: Step, train_state: TrainState, batches: Batches, progress: Progress, clock: Callable[[], float]
) -> Iterator[tuple[TrainState, Progress]]:
    """Train over the batches, handing back the state and the sums so far after every step.

    A caller may stop after any step: what it was last handed is consistent, and training goes on from it with
    the batches that were not seen. `progress.correct` is NaN where the step has no metric "accuracy".

    >>> def step(total, x, y):
    ...     return total + x.sum(), {"loss": y.mean(), "accuracy": y.mean()}
    >>> batches = [(torch.ones(2), torch.ones(2))] * 3
    >>> [progress.samples for _, progress in train_epoch(step, 0, batches, Progress(), lambda: 0.0)]
    [2, 4, 6]
    """
    before = clock()
    for x, y in batches:
        train_state, metrics = step(train_state, x, y)
        # NaN, not a number that means nothing, for a step that does not tell
        loss, share = float(metrics["loss"]), float(metrics.get("accuracy", math.nan))
        now = clock()
        progress = Progress(
            progress.epoch,
            progress.batch + 1,
            progress.loss_sum + loss * len(x),
            progress.correct + share * len(x),
            progress.samples + len(x),
            progress.seconds + now - before,
        )
        before = now
        yield train_state, progress


class Evaluation(NamedTuple):
    """What a network makes of a data set, on the CPU: `losses [N]`, `logits [N, classes]`, `targets`."""

    losses: Tensor
    logits: Tensor
    targets: Targets

    @property
    def loss(self) -> float:
        """Mean loss."""
        return float(self.losses.double().mean())

    @property
    def accuracy(self) -> float:
        """Share of the samples whose largest logit is the target's.

        Raises:
            ValueError: the targets are not class indices, `[N]` and integer.
        """
        return float(accuracy(self.logits, self.targets).double().mean())


def evaluate(eval_step: EvalStep, params: Params, state: State, batches: Batches) -> Evaluation:
    """Run `eval_step` over all batches.

    Raises:
        ValueError: there are no samples, or the losses of a batch are not per-sample.

    >>> def eval_step(params, state, x, y):
    ...     return (x - y) ** 2, x[:, None]
    >>> evaluate(eval_step, {}, {}, [(torch.ones(2), torch.zeros(2)), (torch.ones(1), torch.ones(1))]).losses
    tensor([1., 1., 0.])
    """
    results = []
    for x, y in batches:
        losses, logits = eval_step(params, state, x, y)
        check_per_sample(losses, len(x))
        _check_length(y, len(x))
        results.append((losses, logits, y))
    if not sum(len(losses) for losses, _, _ in results):
        raise ValueError("cannot evaluate on an empty data set")
    losses, logits, targets = tree.map(lambda *parts: torch.cat(parts).cpu(), *results)
    return Evaluation(losses, logits.float(), targets)


def fit(
    step: Step,
    train_state: TrainState,
    images: Images,
    targets: Targets,
    *,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
) -> tuple[TrainState, list[dict[str, float]]]:
    """Train on tensors in memory, a fresh permutation each epoch: the loop for scripts and notebooks.

    Args:
        step: From `make_train_step`, compiled or not.
        train_state: From `init_train_state`.
        images: `[N, C, H, W]`, ready for the network.
        targets: A pytree of tensors with N first, such as `[N]` class indices, int64.
        epochs: Passes over the data.
        batch_size: Samples a step; a smaller last batch is left out, so N must be at least this.
        generator: Draws the permutations, on its device.

    Returns:
        The last state, and for each epoch `{"epoch": 1, "train_loss": ..., "train_accuracy": ...}`: the means
        over its batches of all metrics of the step, computed in float64.

    Raises:
        ValueError: fewer samples than a batch, targets of another length, class indices that are negative or
            not int64.

    >>> def step(total, x, y):
    ...     return total + x.sum(), {"loss": y.mean()}
    >>> fit(step, 0, torch.ones(4), torch.ones(4), epochs=1, batch_size=2, generator=torch.Generator())
    (tensor(4.), [{'epoch': 1, 'train_loss': 1.0}])
    """
    n = len(images)
    if not 1 <= batch_size <= n:
        raise ValueError(f"batch_size must be 1 to {n}, the number of images; got {batch_size}")
    _check_length(targets, n)
    if are_class_indices(targets, n):
        check_targets(targets, n, max(int(targets.max()) + 1, 1))
    records = []
    for epoch in range(epochs):
        order = torch.randperm(n, generator=generator, dtype=torch.int64, device=generator.device)
        picks = [pick for pick in order.to(images.device).split(batch_size) if len(pick) == batch_size]
        measured = []
        for pick in picks:
            train_state, latest = step(
                train_state, images[pick], tree.map(lambda leaf, p=pick: leaf[p], targets)
            )
            measured.append(latest)
        means = {f"train_{name}": _mean([m[name] for m in measured]) for name in measured[0]}
        records.append({"epoch": epoch + 1, **means})
    return train_state, records


def _mean(values: list[Tensor]) -> float:
    return float(torch.stack(values).cpu().double().mean())
