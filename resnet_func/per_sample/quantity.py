"""Quantities: what to compute from a batch's factors, leaf by leaf, and how the answers of parts join."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_func import tree
from resnet_func.per_sample import contract
from resnet_func.per_sample.capture import Captured
from resnet_func.per_sample.contract import Direct, Factors, Way

Clipping: TypeAlias = Literal["flat", "per_layer", "automatic"]

# Bu et al. 2023 (https://arxiv.org/abs/2206.07136), AUTO-S: keeps small gradients small
AUTOMATIC_STABILITY = 0.01


def identity(value: Any) -> Any:
    """The value itself."""
    return value


class Quantity(NamedTuple):
    """One thing to know about a batch's per-sample gradients.

    `leaf(path, factors, way)` looks at one trainable leaf, whose factors are freed afterwards unless it
    returns them; `finish(answers, captured)` puts the leaves of a batch together; `join` puts batches
    together, in order; `final` makes the result. `name` is what `plan` calls it; "" means that `leaf` is
    never called.
    """

    name: str
    leaf: Callable[[str, Factors, Way], Any]
    finish: Callable[[dict[str, Any], Captured], Any]
    join: Callable[[list[Any]], Any]
    final: Callable[[Any], Any] = identity


# --------------------------------------------------------------------------- gradients and norms


def grads() -> Quantity:
    """Per-sample gradients: nested dicts, leaves `[N, *shape]`."""

    def leaf(path: str, factors: Factors, way: Way) -> Tensor:
        return contract.grads(factors)

    def join(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {path: torch.cat([part[path] for part in parts]) for path in parts[0]}

    return Quantity("grads", leaf, lambda answers, captured: answers, join, tree.unflatten)


def norms() -> Quantity:
    """Per-sample gradient norms `[N]`."""

    def finish(squares: dict[str, Tensor], captured: Captured) -> Tensor:
        return total_norm(squares, captured)

    return Quantity("norms", _squared_norms, finish, torch.cat)


def layer_norms() -> Quantity:
    """Per-sample gradient norms of each layer: `{layer path: [N]}`."""

    def finish(squares: dict[str, Tensor], captured: Captured) -> dict[str, Tensor]:
        return {
            layer: total_norm({path: squares[path] for path in paths}, captured)
            for layer, paths in by_layer(squares).items()
        }

    def join(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}

    return Quantity("norms", _squared_norms, finish, join)


def _squared_norms(path: str, factors: Factors, way: Way) -> Tensor:
    return contract.squared_norms(factors, way)


def total_norm(squares: dict[str, Tensor], captured: Captured) -> Tensor:
    """The norm over all leaves from their squared norms; zeros where nothing is trained."""
    if not squares:
        return torch.zeros_like(captured.losses)
    return torch.stack(list(squares.values())).sum(0).sqrt()


def by_layer(leaves: dict[str, Any]) -> dict[str, list[str]]:
    """The leaves' paths under the path of their layer."""
    layers: dict[str, list[str]] = {}
    for path in leaves:
        layers.setdefault(path.rpartition(".")[0], []).append(path)
    return layers


# --------------------------------------------------------------------------- clipped sums


class _Looked(NamedTuple):
    """A leaf after the first look: its squared norms, and what the sum is to be made from."""

    squares: Tensor
    factors: Factors


def clipped_sum(max_norm: float, clipping: Clipping) -> Quantity:
    """`(sum of clipped gradients, norms [N])`."""

    def leaf(path: str, factors: Factors, way: Way) -> _Looked:
        if way == "keep":
            factors = Direct(contract.grads(factors))
        return _Looked(contract.squared_norms(factors, way), factors)

    def finish(answers: dict[str, _Looked], captured: Captured) -> tuple[dict[str, Tensor], Tensor]:
        norms = total_norm({path: answer.squares for path, answer in answers.items()}, captured)
        finite = norms.isfinite()
        mask = not _known_true(finite)
        clip = _clip_factors(answers, norms, captured)
        sums = {}
        for path in list(answers):
            factors = answers.pop(path).factors
            if mask:
                factors = contract.masked(factors, finite)
            sums[path] = contract.weighted_sum(factors, torch.where(finite, clip[path], 0))
        return sums, norms

    def _clip_factors(answers: dict[str, _Looked], norms: Tensor, captured: Captured) -> dict[str, Tensor]:
        if clipping != "per_layer":
            rule = automatic_factors if clipping == "automatic" else clip_factors
            return dict.fromkeys(answers, rule(norms, max_norm))
        layers = by_layer(answers)
        share = max_norm / len(layers) ** 0.5
        factors = {}
        for paths in layers.values():
            norm = total_norm({path: answers[path].squares for path in paths}, captured)
            factors |= dict.fromkeys(paths, clip_factors(norm, share))
        return factors

    def join(parts: list[tuple[dict[str, Tensor], Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
        total = dict(parts[0][0])
        for sums, _ in parts[1:]:
            total = {path: total[path] + sums[path] for path in total}
        return total, torch.cat([norms for _, norms in parts])

    def final(result: tuple[dict[str, Tensor], Tensor]) -> tuple[dict[str, Any], Tensor]:
        return tree.unflatten(result[0]), result[1]

    return Quantity("clipped_sum", leaf, finish, join, final)


def clip_factors(norms: Tensor, max_norm: float) -> Tensor:
    """`min(1, max_norm / norm)`: exactly 1 up to `max_norm`, and `factor * norm` never rounds above it."""
    # the quotient may round up, and so may its product with the norm: a step below is safe, unless subnormal
    info = torch.finfo(norms.dtype)
    quotient = max_norm / norms.clamp(min=info.tiny) * (1 - 2 * info.eps)
    quotient = torch.where(quotient < info.tiny, 0.0, quotient)
    return torch.where(norms <= max_norm, 1.0, quotient).to(norms.dtype)


def automatic_factors(norms: Tensor, max_norm: float) -> Tensor:
    """`max_norm / (norm + 0.01)`: every gradient normalised (Bu et al. 2023)."""
    return max_norm / (norms + AUTOMATIC_STABILITY)


def _known_true(condition: Tensor) -> bool:
    """Whether all of it is True, as far as values may be read here: compiled code and `vmap` cannot."""
    if torch.compiler.is_compiling():
        return False
    try:
        return bool(condition.all())
    except RuntimeError:
        return False


# --------------------------------------------------------------------------- of the logits alone


def loss() -> Quantity:
    """Per-sample losses `[N]`, averaged over views."""
    return _of_logits(lambda captured: captured.losses)


def el2n() -> Quantity:
    """`|softmax(logits) - onehot(target)|` `[N]` (Paul et al. 2021, https://arxiv.org/abs/2107.07075)."""

    def scores(captured: Captured) -> Tensor:
        logits = captured.logits
        errors = logits.softmax(1) - F.one_hot(captured.targets, logits.shape[1]).to(logits.dtype)
        return contract.split_views(torch.linalg.vector_norm(errors, dim=1), captured.views).mean(0)

    return _of_logits(scores)


def correct() -> Quantity:
    """The share of each sample's views whose top logit is the target, `[N]`."""

    def shares(captured: Captured) -> Tensor:
        hits = (captured.logits.argmax(1) == captured.targets).to(captured.logits.dtype)
        return contract.split_views(hits, captured.views).mean(0)

    return _of_logits(shares)


def _of_logits(compute: Callable[[Captured], Tensor]) -> Quantity:
    return Quantity(
        "", lambda path, factors, way: None, lambda answers, captured: compute(captured), torch.cat
    )
