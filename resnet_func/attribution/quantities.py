"""Quantities of attribution, for `per_sample.over_dataset`: margins, guesses, products with gradients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from resnet_func.numerics import widen
from resnet_func.per_sample.capture import Captured
from resnet_func.per_sample.layers import contract
from resnet_func.per_sample.layers.contract import Way
from resnet_func.per_sample.layers.factors import Direct, Factors, grad_rows, sample_slices, split_views
from resnet_func.per_sample.quantities.quantity import Quantity, check_class_indices, of_logits
from resnet_func.types import Logits, Params, PerSample, State, Targets

Checkpoint: TypeAlias = tuple[Params, State]

# --------------------------------------------------------------------------- of the logits


def log_odds(logits: Logits, targets: Targets) -> PerSample:
    """`log(p / (1 - p))` of the target's probability p: TRAK's output function for classification.

    The gradient of the cross-entropy is `-(1 - p)` times this one's (Park et al. 2023, section 3.4,
    https://arxiv.org/abs/2303.14186).

    Args:
        logits: `[N, classes]`, two classes or more.
        targets: Class indices `[N]`, int64.

    >>> log_odds(torch.zeros(1, 4), torch.tensor([2]))  # log(0.25 / 0.75)
    tensor([-1.0986])
    """
    others = without_given(logits, targets)
    return logits.gather(1, targets[:, None])[:, 0] - others.logsumexp(1)


def without_given(logits: Logits, targets: Targets) -> Logits:
    """The logits with minus infinity in the place of each sample's target."""
    classes = torch.arange(logits.shape[1], dtype=torch.int64, device=logits.device)
    return logits.masked_fill(classes == targets[:, None], -torch.inf)


def margin() -> Quantity:
    """The given label's logit minus the largest other one `[N]`: negative where the network disagrees.

    Averaged over views (and by whoever scores several checkpoints: Pleiss et al. 2020,
    https://arxiv.org/abs/2001.10528).
    """
    return of_logits(_margin)


def _margin(captured: Captured) -> Tensor:
    logits, targets = captured.logits, captured.targets
    if not len(logits):
        return captured.losses
    check_class_indices("margin", captured)
    margins = logits.gather(1, targets[:, None])[:, 0] - without_given(logits, targets).amax(1)
    return split_views(margins, captured.views).mean(0)


def prediction() -> Quantity:
    """The likeliest class `[N]`, int64, of the probabilities averaged over views."""
    return of_logits(_prediction)


def _prediction(captured: Captured) -> Tensor:
    if not len(captured.logits):
        return captured.losses.long()
    return _mean_probabilities(captured, captured.logits).argmax(1)


def suggestion() -> Quantity:
    """The likeliest class other than the given one `[N]`, int64."""
    return of_logits(_suggestion)


def _suggestion(captured: Captured) -> Tensor:
    if not len(captured.logits):
        return captured.losses.long()
    check_class_indices("suggestion", captured)
    return _mean_probabilities(captured, without_given(captured.logits, captured.targets)).argmax(1)


def _mean_probabilities(captured: Captured, logits: Tensor) -> Tensor:
    return split_views(logits.softmax(1), captured.views).mean(0)


# --------------------------------------------------------------------------- of the gradients


def weighted_squared_norms(weights: Mapping[str, Tensor]) -> Quantity:
    """`sum_k weights[k] gradient_i[k]^2` `[N]`, for flat `{dotted path: tensor like the leaf}`.

    With the inverse of a diagonal curvature it is a sample's influence on its own loss.
    """
    return Quantity("grads", partial(_weighted_squared_norms, weights), _sum_of_leaves, torch.cat)


def _weighted_squared_norms(weights: Mapping[str, Tensor], path: str, factors: Factors, way: Way) -> Tensor:
    check_covered("the curvature", weights, [path])
    scale = widen(weights[path]).flatten()
    parts = (widen(grad_rows(contract.grads(part))) for part in sample_slices(factors))
    return torch.cat([part.square() @ scale for part in parts])


def products(directions: Mapping[str, Float[Tensor, "t ..."]]) -> Quantity:
    """`<gradient_i, direction_j>` `[N, T]`, for flat `{dotted path: [T, *leaf shape]}`.

    One layer's gradients at most exist at a time.
    """
    return Quantity("grads", partial(_products, directions), _sum_of_leaves, torch.cat)


def _products(directions: Mapping[str, Tensor], path: str, factors: Factors, way: Way) -> Tensor:
    check_covered("the directions", directions, [path])
    return contract.inner_products(factors, Direct(directions[path]), "materialize")


def self_products(inverse: Callable[[str, Tensor], Tensor]) -> Quantity:
    """`<gradient_i, inverse(gradient_i)>` `[N]`, where the inverse acts on each leaf by itself.

    Args:
        inverse: `inverse(dotted path, leaves [N, *shape])` gives leaves like them.
    """
    return Quantity("grads", partial(_self_products, inverse), _sum_of_leaves, torch.cat)


def _self_products(inverse: Callable[[str, Tensor], Tensor], path: str, factors: Factors, way: Way) -> Tensor:
    parts = (contract.grads(part) for part in sample_slices(factors))
    pairs = ((widen(grad_rows(part)), widen(grad_rows(inverse(path, part)))) for part in parts)
    return torch.cat([(a * b).sum(1) for a, b in pairs])


def check_covered(what: str, covered: Collection[str], paths: Iterable[str]) -> None:
    """Refuse gradients that have leaves which something does not cover.

    Raises:
        ValueError: names them.

    >>> check_covered("the curvature", {"fc.weight", "fc.bias"}, ["fc.bias"])
    """
    if missing := [path for path in paths if path not in covered]:
        raise ValueError(
            f"the gradients have leaves that {what} had not: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}. Give both the same trainable="
        )


def _sum_of_leaves(answers: dict[str, Tensor], captured: Captured) -> Tensor:
    return torch.stack(list(answers.values())).sum(0)
