"""TracIn and gradient cosines: products of training and test gradients, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from resnet_func import tree
from resnet_func.attribution import quantities
from resnet_func.attribution.features import Blocks, Features
from resnet_func.attribution.quantities import Checkpoint
from resnet_func.numerics import widen
from resnet_func.per_sample import grads, over_dataset
from resnet_func.per_sample.dataset import Batches
from resnet_func.per_sample.layers.factors import grad_rows
from resnet_func.per_sample.options import Options
from resnet_func.types import LossFn, Model, Params

# test gradients held at a time, in numbers: one pass over the training set for each such block
BLOCK_ELEMENTS = 2**27


def tracin(
    model: Model,
    loss_fn: LossFn,
    *,
    learning_rates: Sequence[float] | None = None,
    cosine: bool = False,
    block_elements: int = BLOCK_ELEMENTS,
    progress: bool = False,
    **options: Unpack[Options],
) -> Callable[[Sequence[Checkpoint], Batches, Batches], Tensor]:
    """TracIn: `sum_checkpoints learning_rate <gradient of train i, gradient of test j>`.

    How much a step on a training sample lowers a test sample's loss, added up over the checkpoints of a run
    (Pruthi et al. 2020, https://arxiv.org/abs/2002.08484). The gradients are exact, and never stored.

    Args:
        model, loss_fn, **options: As in `per_sample.grads`; `trainable` limits the gradients, and their cost.
        learning_rates: One for each checkpoint; None is 1 for each.
        cosine: Divide each product by the lengths of its gradients (Charpiat et al. 2019,
            https://arxiv.org/abs/2102.05262): a sample with a large gradient is not near to everything.
        block_elements: Numbers of test gradients held at a time; as many test samples as fit take one pass
            over the training set together.
        progress: Show progress bars.

    Returns:
        `fn(checkpoints, train_batches, test_batches) -> Tensor [train, test]` on the CPU: high where a
        training sample helps. Batches can be gone through once for each pass, such as a list.

    Raises:
        ValueError: no checkpoint, another number of learning rates, or as in `per_sample.over_dataset`.

    >>> import resnet_func as rf
    >>> model = rf.resnet20(depths=(1, 1, 1), norm="group")
    >>> checkpoint = model.init(torch.Generator().manual_seed(0))
    >>> train = [(torch.rand(3, 3, 8, 8), torch.tensor([0, 1, 2]))]
    >>> tracin(model, rf.losses.cross_entropy)([checkpoint], train, train).shape
    torch.Size([3, 3])
    """
    products = gradient_products(
        model, loss_fn, cosine=cosine, block_elements=block_elements, progress=progress, **options
    )
    return partial(_tracin, products, learning_rates)


def _tracin(
    products: Callable[[Checkpoint, Batches, Batches], Tensor],
    learning_rates: Sequence[float] | None,
    checkpoints: Sequence[Checkpoint],
    train_batches: Batches,
    test_batches: Batches,
) -> Tensor:
    rates = check_rates(len(checkpoints), learning_rates)
    total = torch.zeros((), dtype=torch.float32, device="cpu")
    for rate, checkpoint in zip(rates, checkpoints, strict=True):
        total = total + rate * products(checkpoint, train_batches, test_batches)
    return total


def check_rates(checkpoints: int, learning_rates: Sequence[float] | None) -> Sequence[float]:
    """A learning rate for each checkpoint.

    Raises:
        ValueError: there is no checkpoint, or another number of rates.
    """
    rates = [1.0] * checkpoints if learning_rates is None else learning_rates
    if not checkpoints or len(rates) != checkpoints:
        raise ValueError(
            f"expected at least one checkpoint and a learning rate for each; got {checkpoints} and "
            f"{len(rates)} learning rates"
        )
    return rates


def gradient_products(
    model: Model,
    loss_fn: LossFn,
    *,
    transform: Callable[[Params], Params] | None = None,
    cosine: bool = False,
    block_elements: int = BLOCK_ELEMENTS,
    progress: bool = False,
    **options: Unpack[Options],
) -> Callable[[Checkpoint, Batches, Batches], Tensor]:
    """`<gradient of train i, transform(gradient of test j)>` `[train, test]`, by a map of batched trees."""
    gradients = grads(model, loss_fn, **options)
    run = partial(over_dataset, model, loss_fn, progress=progress, **options)
    return _Products(gradients, run, transform, cosine, block_elements)


class _Products(NamedTuple):
    """`gradient_products`, bound to its arguments; `run(wanted)` goes over a data set."""

    gradients: Callable[..., Params]
    run: Callable[..., Callable[..., Any]]
    transform: Callable[[Params], Params] | None
    cosine: bool
    block_elements: int

    def __call__(self, checkpoint: Checkpoint, train_batches: Batches, test_batches: Batches) -> Tensor:
        columns = []
        parts = (self.gradients(*checkpoint, x, y) for x, y in test_batches)
        for block in _joined(parts, self.block_elements):
            moved = block if self.transform is None else self.transform(block)
            directions = tree.flatten(moved)
            quantities.check_covered("the curvature", directions, tree.flatten(block))
            wanted: dict[str, Any] = {"products": quantities.products(directions)}
            if self.cosine:
                wanted["norms"] = "norms"
            found = self.run(wanted)(*checkpoint, train_batches)
            values = found["products"]
            if self.cosine:
                lengths = found["norms"][:, None] * tree_norms(moved).cpu()
                values = values / lengths.clamp(min=torch.finfo(values.dtype).tiny)
            columns.append(values)
        if not columns:
            raise ValueError("expected at least one batch of test samples (x, y); got none")
        return torch.cat(columns, 1)


def _joined(parts: Iterable[Params], elements: int) -> Iterator[Params]:
    """Batched trees joined to blocks of about so many numbers."""
    held: list[Params] = []
    for part in parts:
        if held and sum(tree.size(other) for other in held) + tree.size(part) > elements:
            yield tree.map(lambda *leaves: torch.cat(leaves), *held)
            held = []
        held.append(part)
    if held:
        yield tree.map(lambda *leaves: torch.cat(leaves), *held)


def tree_norms(of: Params) -> Float[Tensor, "n"]:
    """The length of every sample's part of a batched tree, leaves `[N, *shape]`.

    >>> tree_norms({"a": torch.tensor([[3.0], [0.0]]), "b": torch.tensor([[4.0], [1.0]])})
    tensor([5., 1.])
    """
    squares = [widen(grad_rows(leaf)).square().sum(1) for leaf in tree.leaves(of)]
    return torch.stack(squares).sum(0).sqrt()


# --------------------------------------------------------------------------- from stored sketches


def tracin_scores(
    pairs: Iterable[tuple[Blocks, Features]], learning_rates: Sequence[float]
) -> Float[Tensor, "train test"]:
    """`tracin` of the cross-entropy, from the features of each checkpoint: an estimate by sketches.

    Args:
        pairs: For each checkpoint the training set's features, in blocks, and the test samples'.
        learning_rates: One for each checkpoint.

    >>> features = Features(torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.ones(2))
    >>> tracin_scores([([features], features)], learning_rates=[0.1])
    tensor([[0.1000, 0.3000],
            [0.3000, 2.5000]])
    """
    total = torch.zeros((), dtype=torch.float32, device="cpu")
    for rate, (blocks, test) in zip(learning_rates, pairs, strict=True):
        directions = test.loss_sketches().T
        total = total + rate * torch.cat([block.loss_sketches() @ directions for block in blocks])
    return total


def cosine_scores(blocks: Blocks, test: Features) -> Float[Tensor, "train test"]:
    """The cosines between gradients of the cross-entropy, from features: an estimate by sketches.

    A gradient of zero has cosine 0 with all.

    >>> features = Features(torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.ones(2))
    >>> cosine_scores([features], features)
    tensor([[1.0000, 0.6000],
            [0.6000, 1.0000]])
    """
    # both gradients of the loss are minus those of the log-odds, times a slack that is not negative
    directions = torch.nn.functional.normalize(test.sketches, dim=1).T
    tiny = torch.finfo(directions.dtype).tiny
    parts = []
    for block in blocks:
        lengths = torch.linalg.vector_norm(block.sketches, dim=1, keepdim=True)
        parts.append(block.sketches @ directions / lengths.clamp(min=tiny))
    return torch.cat(parts)
