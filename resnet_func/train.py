"""Training and evaluation: one pure step, and the loops over epochs and batches around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from resnet_func import tree
from resnet_func.autodiff import value_and_grad
from resnet_func.losses import check_targets
from resnet_func.optim import Optimizer, ema
from resnet_func.types import (
    Images,
    Logits,
    LossFn,
    Metrics,
    Model,
    Params,
    PerSample,
    State,
    Targets,
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
    """

    def apply(params: Params, state: State, x: Images, *, train: bool) -> tuple[Logits, State]:
        with torch.autocast(device_type, dtype):
            logits, state = model.apply(params, state, x, train=train)
        return logits.float(), state

    return model._replace(apply=apply)


def average_flips(model: Model) -> Model:
    """The model whose logits are averaged over an image and its mirror image, for use at test time.

    Twice the cost. The state comes from the upright image.
    """

    def apply(params: Params, state: State, x: Images, *, train: bool) -> tuple[Logits, State]:
        upright, new_state = model.apply(params, state, x, train=train)
        mirrored, _ = model.apply(params, state, x.flip(3), train=train)
        return (upright + mirrored) / 2, new_state

    return model._replace(apply=apply)


# --------------------------------------------------------------------------- steps


def arrange(params: Params, memory_format: torch.memory_format) -> Params:
    """The tree with its four-dimensional leaves, convolution weights, in a memory format."""

    def place(leaf: Tensor) -> Tensor:
        return leaf.contiguous(memory_format=memory_format) if leaf.ndim == 4 else leaf

    return tree.map(place, params)


def init_train_state(params: Params, state: State, optimizer: Optimizer, *, ema: bool = False) -> TrainState:
    """What the first step takes; with `ema` the moving averages start at the parameters and the state."""
    # Copies: were they the parameters themselves, a compiled step would be traced anew once they differ.
    averages = tree.map(torch.clone, (params, state)) if ema else (None, None)
    return TrainState(params, state, optimizer.init(params), *averages)


def make_train_step(
    model: Model,
    loss_fn: LossFn,
    optimizer: Optimizer,
    *,
    microbatches: int = 1,
    ema_decay: float | None = None,
) -> Step:
    """A pure function of one training step: forward, backward, optimizer, moving average.

    The objective is the mean of `loss_fn` over the batch. `torch.compile(step, fullgraph=True)` makes it one
    graph.

    Args:
        model: The network; wrapped in `autocast` for mixed precision.
        loss_fn: A per-sample loss.
        optimizer: An `(init, update)` pair of `resnet_func.optim`.
        microbatches: Pieces the batch is cut into, one after the other, to bound memory. The gradient is that
            of the whole batch; BatchNorm sees each piece as a batch of its own.
        ema_decay: Decay of the moving average of parameters and running statistics, in [0, 1), for a state
            made with `init_train_state(..., ema=True)`; None keeps none. Early on it is `(1 + t) / (10 + t)`
            where that is smaller (t: steps done), so that the average forgets the initial network.

    Returns:
        `step(train_state, x, y) -> (train_state, metrics)`, with 0-d metrics "loss" (mean over the batch,
        before the update) and "accuracy" (share of the batch).

    Raises:
        ValueError: `microbatches` is below 1, or `ema_decay` outside [0, 1).
    """
    if microbatches < 1:
        raise ValueError(f"microbatches must be 1 or more; got {microbatches}")
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1); got {ema_decay}. Use None for no average")

    def objective(
        params: Params, state: State, x: Images, y: Targets, batch_size: int
    ) -> tuple[Tensor, tuple[State, Metrics]]:
        logits, state = model.apply(params, state, x, train=True)
        loss = loss_fn(logits, y).sum() / batch_size
        accuracy = (logits.argmax(1) == y).sum() / batch_size
        return loss, (state, {"loss": loss.detach(), "accuracy": accuracy})

    def step(train_state: TrainState, x: Images, y: Targets) -> tuple[TrainState, Metrics]:
        params, state, total = train_state.params, train_state.state, None
        for x_part, y_part in zip(x.chunk(microbatches), y.chunk(microbatches), strict=True):
            part_of = partial(objective, state=state, x=x_part, y=y_part, batch_size=len(x))
            _, grads, (state, metrics) = value_and_grad(part_of, params)
            part = (grads, metrics)
            total = part if total is None else tree.map(torch.add, total, part)
        if total is None:
            raise ValueError("a training step needs at least one sample; got an empty batch")
        grads, metrics = total
        params, opt_state = optimizer.step(grads, train_state.opt_state, params)
        ema_params, ema_state = train_state.ema_params, train_state.ema_state
        if ema_decay is not None and ema_params is not None and ema_state is not None:
            steps = opt_state.step.to(torch.float64)
            decay = torch.clamp((1 + steps) / (10 + steps), max=ema_decay)
            ema_params, ema_state = ema(ema_params, params, decay), ema(ema_state, state, decay)
        return TrainState(params, state, opt_state, ema_params, ema_state), metrics

    return step


def make_eval_step(model: Model, loss_fn: LossFn) -> EvalStep:
    """A pure function `(params, state, x, y) -> (losses [N], logits [N, classes])`, in evaluation mode."""

    @torch.no_grad()
    def step(params: Params, state: State, x: Images, y: Targets) -> tuple[PerSample, Logits]:
        logits, _ = model.apply(params, state, x, train=False)
        return loss_fn(logits, y), logits

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
    the batches that were not seen.
    """
    before = clock()
    for x, y in batches:
        train_state, metrics = step(train_state, x, y)
        loss, accuracy = float(metrics["loss"]), float(metrics["accuracy"])
        now = clock()
        progress = Progress(
            progress.epoch,
            progress.batch + 1,
            progress.loss_sum + loss * len(x),
            progress.correct + accuracy * len(x),
            progress.samples + len(x),
            progress.seconds + now - before,
        )
        before = now
        yield train_state, progress


class Evaluation(NamedTuple):
    """What a network makes of a data set, on the CPU: `losses [N]`, `logits [N, classes]`, `targets [N]`."""

    losses: Tensor
    logits: Tensor
    targets: Tensor

    @property
    def loss(self) -> float:
        """Mean loss."""
        return float(self.losses.double().mean())

    @property
    def accuracy(self) -> float:
        """Share of the samples whose largest logit is the target's."""
        return float((self.logits.argmax(1) == self.targets).double().mean())


def evaluate(eval_step: EvalStep, params: Params, state: State, batches: Batches) -> Evaluation:
    """Run `eval_step` over all batches.

    Raises:
        ValueError: there are no batches.
    """
    results = [(*eval_step(params, state, x, y), y) for x, y in batches]
    if not results:
        raise ValueError("cannot evaluate on an empty data set")
    losses, logits, targets = (torch.cat(parts).cpu() for parts in zip(*results, strict=True))
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
        targets: `[N]`, int64 class indices.
        epochs: Passes over the data.
        batch_size: Samples a step; a smaller last batch is left out, so N must be at least this.
        generator: Draws the permutations, on the CPU.

    Returns:
        The last state, and for each epoch `{"epoch", "train_loss", "train_accuracy"}`.

    Raises:
        ValueError: fewer samples than a batch, or labels that are not one int64 index per image.
    """
    if not 1 <= batch_size <= len(images):
        raise ValueError(f"batch_size must be 1 to {len(images)}, the number of images; got {batch_size}")
    check_targets(targets, len(images), int(targets.max()) + 1)
    records = []
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator).to(images.device)
        picks = [pick for pick in order.split(batch_size) if len(pick) == batch_size]
        metrics = []
        for pick in picks:
            train_state, latest = step(train_state, images[pick], targets[pick])
            metrics.append(latest)
        loss, accuracy = (float(torch.stack([m[k] for m in metrics]).mean()) for k in ("loss", "accuracy"))
        records.append({"epoch": epoch + 1, "train_loss": loss, "train_accuracy": accuracy})
    return train_state, records
