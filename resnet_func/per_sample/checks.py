"""Comparisons with the definition, where values can be read: never a silent wrong number."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from resnet_func import tree
from resnet_func.autodiff import can_read
from resnet_func.per_sample.capture import Captured, capture
from resnet_func.per_sample.layers import contract
from resnet_func.per_sample.layers.factors import split_views
from resnet_func.per_sample.reference import reference
from resnet_func.per_sample.task import Batch, Task

SAMPLES = 2


class _Compared(NamedTuple):
    """The losses that a network was compared with: on two different samples, or on what cannot tell."""

    apart: WeakSet[Any]
    alike: WeakSet[Any]


# The networks that were compared, with their losses: both as long as they live.
_COMPARED: WeakKeyDictionary[Any, _Compared] = WeakKeyDictionary()


class Checks:
    """What a transform compares after a pass: once for a network and a loss (None), always, or never."""

    def __init__(self, wanted: bool | None) -> None:
        self.wanted = wanted

    def after(self, task: Task, batch: Batch, captured: Captured) -> None:
        """Compare the loss, and the gradients of two samples, with what the samples give alone.

        Raises:
            ValueError: they differ: the loss is not per-sample, or samples are coupled.
        """
        few = self._due(task, batch)
        if few is None or not can_read(captured.losses):
            return
        with torch.no_grad():
            _check_loss(task, batch, captured)
            _check_gradients(task, few)
        done = _compared_losses(task.model.apply)
        with suppress(TypeError):  # a loss that nothing can refer to weakly
            (done.apart if _tells_samples_apart(few) else done.alike).add(task.loss_fn)

    def before(self, task: Task, batch: Batch) -> None:
        """The same for what does without such a pass: the first samples get one, where a check is due."""
        few = self._due(task, batch)
        if few is not None:
            self.after(task, few, capture(task, few))

    def _due(self, task: Task, batch: Batch) -> Batch | None:
        """The samples to compare; None where nothing is due, or values cannot be read.

        What cannot tell samples apart is compared once, too, and not with every batch of one.
        """
        if self.wanted is False or torch.compiler.is_compiling():
            return None
        done = _compared_losses(task.model.apply)
        alike = self.wanted is None and task.loss_fn in done.alike
        if (self.wanted is None and task.loss_fn in done.apart) or (alike and batch.samples < SAMPLES):
            return None
        tensors = [*task.trained.values(), *tree.leaves((batch.x, batch.y, task.state))]
        if not all(can_read(tensor) for tensor in tensors):
            return None
        few = _first_samples(batch, SAMPLES)
        return None if alike and not _tells_samples_apart(few) else few


def _compared_losses(apply: Any) -> _Compared:
    nothing = _Compared(WeakSet(), WeakSet())
    try:
        return _COMPARED.setdefault(apply, nothing)
    except TypeError:  # a network that nothing can refer to weakly is compared every time
        return nothing


def _check_loss(task: Task, batch: Batch, captured: Captured) -> None:
    """The first sample's loss alone against its entry, on the logits."""
    if batch.samples * batch.views < 2:
        return
    whole = task.loss_fn(captured.logits, batch.y)[:1]
    alone = task.loss_fn(captured.logits[:1], tree.map(lambda leaf: leaf[:1], batch.y))
    if _differ(whole, alone, _finite_norm(whole), _coarsest(captured)):
        raise ValueError(
            f"loss_fn is not per-sample: the first sample's loss is {float(alone):.6g} alone and "
            f"{float(whole):.6g} in its batch. Do logits {list(captured.logits.shape)} and targets "
            f"{[list(leaf.shape) for leaf in tree.leaves(batch.y)]} broadcast?"
        )


def _check_gradients(task: Task, few: Batch) -> None:
    """The gradients of two samples together against those of each alone.

    Rounding may open a ReLU in the one alone, and then all gradients before it differ: float64 tells this
    from samples that meet.
    """
    path = _first_that_differs(task, few)
    if path is not None:
        with suppress(RuntimeError, TypeError):  # a device or a network without float64
            path = _first_that_differs(*_in_float64(task, few))
    if path is not None:
        raise ValueError(
            f"the gradient of {path} is another in a batch than sample by sample. Are samples coupled "
            "(attention or statistics across the batch) or brought into another order, or is the network "
            "random? Use method='vmap' if each sample's own gradient is meant"
        )


def _in_float64(task: Task, batch: Batch) -> tuple[Task, Batch]:
    def widen(values: Any) -> Any:
        return tree.map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, values)

    wide = task._replace(trained=widen(task.trained), frozen=widen(task.frozen), state=widen(task.state))
    return wide, batch._replace(x=widen(batch.x), y=widen(batch.y))


def _first_that_differs(task: Task, few: Batch) -> str | None:
    """The first leaf whose gradients are others in the batch than sample by sample.

    Two samples come in an order that is no other one turned, sorted or shifted.
    """
    order = [0, 1, 0, 1, 1] if few.samples > 1 else [0]
    with torch.enable_grad():
        try:
            ours = capture(task, _in_order(few, order))
            leaves = ours.factors()
        except RuntimeError as error:
            raise ValueError(
                f"the network takes no batch of {len(order)} samples to compare ({error}). Does it depend on "
                "the size of the batch? Pass check=False if that is meant"
            ) from error
        alone = reference(task, few, how="loop").leaves
    scale = math.hypot(*[_finite_norm(contract.grads(factors)) for factors in alone.values()])
    dtype = _coarsest(ours)
    for path, factors in alone.items():
        if _differ(contract.grads(leaves[path]), contract.grads(factors)[order], scale, dtype):
            return path
    return None


def _finite_norm(tensor: Tensor) -> float:
    """Over the largest entry, since the squares of what a saturated loss leaves underflow."""
    finite = torch.where(tensor.isfinite(), tensor, 0).double().flatten()
    largest = torch.linalg.vector_norm(finite, math.inf)
    return float(largest * torch.linalg.vector_norm(finite / largest)) if finite.any() else 0.0


def _first_samples(batch: Batch, count: int) -> Batch:
    return _in_order(batch, list(range(min(count, batch.samples))))


def _in_order(batch: Batch, order: list[int]) -> Batch:
    def take(leaf: Tensor) -> Tensor:
        return split_views(leaf, batch.views)[:, order].flatten(0, 1)

    return Batch(tree.map(take, batch.x), tree.map(take, batch.y), len(order), batch.views)


def _tells_samples_apart(few: Batch) -> bool:
    """Whether there are two samples, and they differ: one, or two equal ones, may hide that they meet."""
    if few.samples < SAMPLES:
        return False
    rows = [split_views(leaf, few.views).unbind(1) for leaf in tree.leaves((few.x, few.y))]
    return any(not torch.equal(*pair) for pair in rows)


def _differ(a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> bool:
    """Whether tensors differ by more than rounding of that dtype explains; what is odd in both agrees.

    Half of the digits must agree; in half precision, where layers leave few, a quarter.
    """
    if a.shape != b.shape:
        return True
    eps = torch.finfo(dtype).eps
    allowed = scale * (math.sqrt(eps) if dtype in (torch.float32, torch.float64) else eps**0.25)
    both_odd = ~a.isfinite() & ~b.isfinite()
    return bool((~((a.double() - b.double()).abs() <= allowed) & ~both_odd).any())


def _coarsest(captured: Captured) -> torch.dtype:
    """The dtype of least precision that the pass computed in."""
    dtypes = [dtype for dtype in captured.dtypes if dtype.is_floating_point]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
