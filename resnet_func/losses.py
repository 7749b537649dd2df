"""Per-sample losses: `loss_fn(logits [N, C], targets) -> Tensor [N]`. Whoever uses one owns the reduction.

Targets are any pytree of tensors with the samples first; each loss says what it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float

from resnet_func.types import Logits, LossFn, PerSample, Targets


def cross_entropy(logits: Logits, targets: Targets) -> PerSample:
    """`-log softmax(logits)[target]` of each sample, in nats.

    Args:
        logits: `[N, classes]`, floating.
        targets: `[N]` class indices, int64; or `[N, classes]` probabilities, floating, which weigh the
            classes. A sample of index -100, torch's `ignore_index`, has loss 0; other indices out of range
            raise on CPU and assert on CUDA: check untrusted labels with `check_targets` first.

    Raises:
        ValueError: targets of another shape or dtype.

    >>> cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))
    tensor([1.3863, 1.3863])
    """
    _check_class_targets(logits, targets)
    return F.cross_entropy(logits, targets, reduction="none")


def smoothed_cross_entropy(smoothing: float) -> LossFn:
    """Cross-entropy against targets mixed with the uniform distribution (Szegedy et al. 2016, section 7).

    Args:
        smoothing: Weight of the uniform distribution, in [0, 1); 0 is `cross_entropy`.

    Returns:
        A loss with the targets of `cross_entropy`.

    Raises:
        ValueError: `smoothing` is outside [0, 1); in the loss, targets of a wrong shape or dtype.

    >>> smoothed_cross_entropy(0.5)(torch.tensor([[0.0, 100.0]]), torch.tensor([1]))
    tensor([25.])
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be in [0, 1); got {smoothing}. 0.1 is common, 0 is none")
    return partial(_smoothed_cross_entropy, smoothing)


def _smoothed_cross_entropy(smoothing: float, logits: Logits, targets: Targets) -> PerSample:
    _check_class_targets(logits, targets)
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)


def squared_error(logits: Logits, targets: Float[torch.Tensor, "n classes"]) -> PerSample:
    """Half the squared distance `0.5 * |logits - targets|^2` of each sample; targets `[N, classes]`.

    Raises:
        ValueError: targets of another shape than the logits, which would broadcast.

    >>> squared_error(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 5.0]]))
    tensor([4.5000])
    """
    if targets.shape != logits.shape:
        raise ValueError(
            f"squared_error needs targets of the logits' shape, {list(logits.shape)}; "
            f"got {list(targets.shape)}. Try targets[:, None] for one output, F.one_hot for class indices"
        )
    return 0.5 * (logits - targets).square().sum(1)


def logit(index: int) -> Callable[[Logits, Targets], PerSample]:
    """The logit of one class as a "loss", for Jacobians and neural tangent kernels; targets are ignored.

    >>> logit(1)(torch.tensor([[1.0, 2.0]]), None)
    tensor([2.])
    """
    return partial(_logit, index)


def _logit(index: int, logits: Logits, targets: Targets) -> PerSample:
    return logits[:, index]


# --------------------------------------------------------------------------- metrics


def accuracy(logits: Logits, targets: Targets) -> PerSample:
    """1 for each sample whose largest logit is the target's, else 0; float32 `[N]`.

    Raises:
        ValueError: targets that are not `[N]` class indices, for which it has no meaning.

    >>> accuracy(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([1, 1]))
    tensor([1., 0.])
    """
    if not are_class_indices(targets, len(logits)):
        got = f"{list(targets.shape)} of {targets.dtype}" if isinstance(targets, torch.Tensor) else "a tree"
        raise ValueError(
            f"accuracy needs class indices, one integer per sample, [{len(logits)}]; got {got}. "
            "Compute a metric of your own, such as (logits.argmax(1) == targets.argmax(1)).float()"
        )
    return (logits.argmax(1) == targets).to(torch.float32)


def calibration_error(
    probabilities: Float[torch.Tensor, "n classes"], targets: Targets, *, bins: int = 15
) -> float:
    """The expected calibration error: by how much confidence and accuracy differ, on average over samples.

    Samples are put in `bins` equal ranges of their largest probability, and means taken in each (Guo et al.
    2017, https://arxiv.org/abs/1706.04599).

    Raises:
        ValueError: bins are below 1, there are no samples, or targets are not class indices.

    >>> calibration_error(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1]))  # half are right
    0.25
    """
    if bins < 1 or not len(probabilities):
        raise ValueError(f"expected bins >= 1 and samples; got {bins} bins, {len(probabilities)} samples")
    right = accuracy(probabilities, targets).double()
    confidence = probabilities.amax(1).double()
    places = (confidence * bins).ceil().clamp(1, bins).long() - 1  # a range includes its upper end
    gaps = torch.zeros(bins, dtype=torch.float64, device=places.device)
    gaps = gaps.index_add(0, places, confidence - right)
    return float(gaps.abs().sum()) / len(probabilities)


def are_class_indices(targets: Targets, num_samples: int) -> bool:
    """Whether targets are one integer per sample; looks at shape and dtype only.

    >>> are_class_indices(torch.tensor([3, 1]), 2), are_class_indices(torch.tensor([0.5, 1.0]), 2)
    (True, False)
    """
    if not isinstance(targets, torch.Tensor) or targets.shape != (num_samples,):
        return False
    return not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)


# --------------------------------------------------------------------------- checks


def check_per_sample(values: torch.Tensor, n: int, name: str = "loss_fn") -> None:
    """Refuse what is not one number per sample, such as a loss that was reduced.

    Raises:
        ValueError: `values` is not `[n]`.

    >>> check_per_sample(torch.zeros(2), n=2)
    """
    if not isinstance(values, torch.Tensor) or values.shape != (n,):
        got = list(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        what = "loss" if name == "loss_fn" else "value"
        raise ValueError(
            f"{name} must return one {what} per sample, [{n}]; got {got}. "
            "Leave out the reduction, as in F.cross_entropy(..., reduction='none')"
        )


def _check_class_targets(logits: Logits, targets: Targets) -> None:
    """Class indices or probabilities; static, so that it costs nothing in compiled code."""
    n, shape, dtype = len(logits), targets.shape, targets.dtype
    if shape == (n,) and dtype != torch.int64:
        raise ValueError(f"expected int64 class indices; got {dtype}. Convert with targets.long()")
    if shape != (n,) and (shape != logits.shape or not dtype.is_floating_point):
        raise ValueError(
            f"expected class indices [{n}], int64, or probabilities {list(logits.shape)}, floating; "
            f"got {list(shape)} of {dtype}"
        )


def check_targets(targets: torch.Tensor, num_samples: int, num_classes: int) -> None:
    """Check class indices before they reach a kernel; reads values, so call it outside compiled code.

    Raises:
        ValueError: not `[num_samples]`, not int64, or a label outside `0 .. num_classes - 1`.

    >>> check_targets(torch.tensor([0, 2]), num_samples=2, num_classes=3)
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
