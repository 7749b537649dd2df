"""The loops of training and evaluation around a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from resnet_func import tree
from resnet_func.losses import accuracy, are_class_indices, check_per_sample, check_targets
from resnet_func.train.step import EvalStep, Step, check_length
from resnet_func.types import Images, Params, State, Targets, TrainState

Batches: TypeAlias = Iterable[tuple[Images, Targets]]


class Progress(NamedTuple):
    """Where a run is, and the sums of the epoch it is in: what a resumed run needs beside its TrainState."""

    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    correct: float = 0.0
    samples: int = 0
    seconds: float = 0.0


def train_epoch(
    step: Step,
    train_state: TrainState,
    batches: Batches,
    progress: Progress,
    clock: Callable[[], float],
    *,
    batch_size: int | None = None,
) -> Iterator[tuple[TrainState, Progress]]:
    """Train over the batches, handing back the state and the sums so far after every step.

    A caller may stop after any step: what it was last handed is consistent, and training goes on from it with
    the batches that were not seen. `progress.correct` is NaN where the step has no metric "accuracy". Where
    the batches are a rank's parts, `batch_size` is that of the whole.

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
        now, samples = clock(), batch_size or len(x)
        progress = Progress(
            progress.epoch,
            progress.batch + 1,
            progress.loss_sum + loss * samples,
            progress.correct + share * samples,
            progress.samples + samples,
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
        check_length(y, len(x))
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
    check_length(targets, n)
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
