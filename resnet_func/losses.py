"""Per-sample losses: `loss_fn(logits [N, C], targets) -> Tensor [N]`. Whoever uses one owns the reduction."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float

from resnet_func.types import Logits, LossFn, PerSample, Targets


def cross_entropy(logits: Logits, targets: Targets) -> PerSample:
    """`-log softmax(logits)[target]` of each sample, in nats.

    Args:
        logits: `[N, classes]`, floating.
        targets: `[N]` class indices, int64. Out-of-range ones raise on CPU and assert on CUDA: check
            untrusted labels with `check_targets` first.
    """
    return F.cross_entropy(logits, targets, reduction="none")


def smoothed_cross_entropy(smoothing: float) -> LossFn:
    """Cross-entropy against targets mixed with the uniform distribution (Szegedy et al. 2016, section 7).

    Args:
        smoothing: Weight of the uniform distribution, in [0, 1); 0 is `cross_entropy`.

    Raises:
        ValueError: `smoothing` is outside [0, 1).
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be in [0, 1); got {smoothing}. 0.1 is common, 0 is none")

    def loss_fn(logits: Logits, targets: Targets) -> PerSample:
        return F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)

    return loss_fn


def squared_error(logits: Logits, targets: Float[torch.Tensor, "n classes"]) -> PerSample:
    """Half the squared distance `0.5 * |logits - targets|^2` of each sample; targets `[N, classes]`."""
    return 0.5 * (logits - targets).square().sum(1)


def logit(index: int) -> Callable[[Logits, Targets], PerSample]:
    """The logit of one class as a "loss", for Jacobians and neural tangent kernels; targets are ignored."""

    def loss_fn(logits: Logits, targets: Targets) -> PerSample:
        return logits[:, index]

    return loss_fn


def check_targets(targets: torch.Tensor, num_samples: int, num_classes: int) -> None:
    """Check class indices before they reach a kernel; reads values, so call it outside compiled code.

    Raises:
        ValueError: not `[num_samples]`, not integer, or a label outside `0 .. num_classes - 1`.
    """
    if targets.shape != (num_samples,):
        raise ValueError(f"expected one label per image, [{num_samples}]; got {list(targets.shape)}")
    if targets.dtype != torch.int64:
        raise ValueError(f"expected int64 class indices; got {targets.dtype}. Convert with targets.long()")
    wrong = targets[(targets < 0) | (targets >= num_classes)].unique().tolist()
    if wrong:
        raise ValueError(
            f"labels must be in 0 .. {num_classes - 1}; got {', '.join(map(str, wrong[:5]))}. "
            f"Fix the labels, or build the model with more classes"
        )


def check_per_sample(losses: torch.Tensor, num_samples: int) -> None:
    """Refuse what a loss that is not per-sample returns.

    Raises:
        ValueError: the shape is not `[num_samples]`.
    """
    if losses.shape != (num_samples,):
        raise ValueError(
            f"loss_fn must return one loss per sample, [{num_samples}]; got {list(losses.shape)}. "
            "Leave out the reduction, as in F.cross_entropy(..., reduction='none')"
        )
