"""Quantities: what to compute from a batch's factors, leaf by leaf, and how the answers of parts join."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_func import tree
from resnet_func.autodiff import can_read
from resnet_func.numerics import accumulation_dtype
from resnet_func.per_sample.capture import Captured
from resnet_func.per_sample.layers import contract
from resnet_func.per_sample.layers.contract import Way
from resnet_func.per_sample.layers.factors import Derived, Direct, Factors, masked, split_views
from resnet_func.types import Params

Clipping: TypeAlias = Literal["flat", "per_layer", "automatic"]

# Bu et al. 2023 (https://arxiv.org/abs/2206.07136), AUTO-S: keeps small gradients small
AUTOMATIC_STABILITY = 0.01


def identity(value: Any, *_: Any) -> Any:
    """The value itself."""
    return value


class Quantity(NamedTuple):
    """One thing to know about a batch's per-sample gradients.

    `leaf(path, factors, way)` looks at one trainable leaf, whose factors are freed afterwards unless it
    returns them; `finish(answers, captured)` puts the leaves of a batch together; `join` puts batches
    together, in order; `final` makes the result. `name` is what `plan` calls it; "" means that `leaf` is
    never called. `accumulate` says that `join` adds up, so that a pass over a data set holds one part only.
    `like_params(result, params)` puts what is by dotted path into the structure of the parameters.
    `as_captured` says that `leaf` wants the factors themselves, not gradients that were formed for several
    quantities together. Made of a module's functions it can be pickled, and so sent to other processes.

    The largest entry of every sample's gradient, for instance:

    >>> import torch
    >>> from resnet_func.per_sample import Quantity
    >>> from resnet_func.per_sample.layers import contract
    >>> largest = Quantity(
    ...     name="grads",
    ...     leaf=lambda path, factors, way: contract.grads(factors).flatten(1).abs().amax(1),
    ...     finish=lambda answers, captured: torch.stack(list(answers.values())).amax(0),
    ...     join=torch.cat,
    ... )
    """

    name: str
    leaf: Callable[[str, Factors, Way], Any]
    finish: Callable[[dict[str, Any], Captured], Any]
    join: Callable[[list[Any]], Any]
    final: Callable[[Any], Any] = identity
    accumulate: bool = False
    as_captured: bool = False
    like_params: Callable[[Any, Params], Any] = identity

    def result(self, joined: Any, params: Params) -> Any:
        """What the caller gets."""
        return self.like_params(self.final(joined), params)


# --------------------------------------------------------------------------- gradients and norms


def grads() -> Quantity:
    """Per-sample gradients: the trainable leaves of the parameters' tree, each `[N, *shape]`."""
    return Quantity("grads", _grads, _as_they_are, _join_each, like_params=select_leaves)


def select_leaves(leaves: dict[str, Tensor], params: Params) -> Params:
    """Leaves by dotted path in the structure of the parameters."""
    return tree.select(params, leaves)


def norms() -> Quantity:
    """Per-sample gradient norms `[N]`."""
    return Quantity("norms", _squared_norms, total_norm, torch.cat)


def layer_norms() -> Quantity:
    """Per-sample gradient norms of each layer: `{layer path: [N]}`."""
    return Quantity("norms", _squared_norms, _norms_by_layer, _join_each)


def _grads(path: str, factors: Factors, way: Way) -> Tensor:
    return contract.grads(factors)


def _as_they_are(answers: dict[str, Tensor], captured: Captured) -> dict[str, Tensor]:
    return answers


def _join_each(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _squared_norms(path: str, factors: Factors, way: Way) -> Tensor:
    return contract.squared_norms(factors, way)


def _norms_by_layer(squares: dict[str, Tensor], captured: Captured) -> dict[str, Tensor]:
    return {
        layer: total_norm({path: squares[path] for path in paths}, captured)
        for layer, paths in by_layer(squares).items()
    }


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


class _FirstPass(NamedTuple):
    """A leaf after the first pass: its squared norms, and what the sum is to be made from."""

    squares: Tensor
    factors: Factors


def clipped_sum(
    max_norm: float | Tensor | Mapping[str, float], clipping: Clipping, *, masked_targets: bool = False
) -> Quantity:
    """`(sum of clipped gradients, norms [N])`.

    With `masked_targets` the targets are `(targets, mask)`; where the mask is False, a sample adds nothing
    and has norm 0.
    """
    finish = partial(_clip_and_sum, max_norm, clipping, masked_targets)
    return Quantity(
        "clipped_sum",
        _first_pass,
        finish,
        _join_sums,
        _rounded,
        accumulate=True,
        like_params=_sum_like_params,
    )


class Sum(NamedTuple):
    """A sum in at least float32, and the dtype of what is summed."""

    value: Tensor
    dtype: torch.dtype


def _first_pass(path: str, factors: Factors, way: Way) -> _FirstPass:
    if way == "keep":
        factors = Direct(contract.grads(factors))
    squares = contract.squared_norms(factors, way)
    if isinstance(factors, Derived):
        factors = factors._replace(formed=None)  # not kept: a weighted sum needs none
    return _FirstPass(squares, factors)


def _clip_and_sum(
    max_norm: float | Tensor | Mapping[str, float],
    clipping: Clipping,
    masked_targets: bool,
    answers: dict[str, _FirstPass],
    captured: Captured,
) -> tuple[dict[str, Sum], Tensor]:
    norms = total_norm({path: answer.squares for path, answer in answers.items()}, captured)
    finite = norms.isfinite()
    all_finite = _known_true(finite)
    # of the first view: the mask came along with the targets
    mask = captured.targets[1][: len(norms)] if masked_targets else torch.ones_like(finite)
    kept = finite & mask
    clip = _factors_by_leaf(answers, norms, captured, max_norm, clipping)
    sums = {}
    for path in list(answers):
        factors = answers.pop(path).factors
        if not all_finite:
            factors = masked(factors, kept)
        total = contract.weighted_sum(factors, torch.where(kept, clip[path], 0))
        sums[path] = Sum(total.to(accumulation_dtype(total.dtype)), total.dtype)
    return sums, torch.where(mask, norms, 0)


def _join_sums(parts: list[tuple[dict[str, Sum], Tensor]]) -> tuple[dict[str, Sum], Tensor]:
    total = dict(parts[0][0])
    for sums, _ in parts[1:]:
        total = {path: Sum(total[path].value + sums[path].value, total[path].dtype) for path in total}
    return total, torch.cat([norms for _, norms in parts])


def _rounded(result: tuple[dict[str, Sum], Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    return {path: sum.value.to(sum.dtype) for path, sum in result[0].items()}, result[1]


def _sum_like_params(result: tuple[dict[str, Tensor], Tensor], params: Params) -> tuple[Params, Tensor]:
    return tree.select(params, result[0]), result[1]


def _factors_by_leaf(
    answers: dict[str, _FirstPass],
    norms: Tensor,
    captured: Captured,
    max_norm: float | Tensor | Mapping[str, float],
    clipping: Clipping,
) -> dict[str, Tensor]:
    """Every leaf's clip factors `[N]`."""
    if isinstance(max_norm, Mapping):
        groups = by_prefix(list(answers), max_norm)
        bounds = {prefix: (max_norm[prefix], paths) for prefix, paths in groups.items()}
    elif clipping == "per_layer":
        layers = by_layer(answers)
        bounds = {layer: (max_norm / len(layers) ** 0.5, paths) for layer, paths in layers.items()}
    else:
        rule = automatic_factors if clipping == "automatic" else clip_factors
        return dict.fromkeys(answers, rule(norms, max_norm))
    found = {}
    for bound, paths in bounds.values():
        norm = total_norm({path: answers[path].squares for path in paths}, captured)
        found |= dict.fromkeys(paths, clip_factors(norm, bound))
    return found


def by_prefix(paths: list[str], prefixes: Mapping[str, Any]) -> dict[str, list[str]]:
    """The leaves below each prefix; the longest that fits has a leaf, and "" fits all.

    Raises:
        ValueError: a leaf has no prefix, or a prefix no leaf.
    """
    groups: dict[str, list[str]] = {prefix: [] for prefix in prefixes}
    for path in paths:
        fitting = [p for p in prefixes if p == "" or path == p or path.startswith(f"{p}.")]
        if not fitting:
            raise ValueError(f'max_norm has no bound for {path}; give one by a prefix of it, or by ""')
        groups[max(fitting, key=len)].append(path)
    empty = [prefix for prefix, found in groups.items() if not found]
    if empty:
        raise ValueError(f"max_norm bounds {', '.join(map(repr, empty))}, where no trainable leaf is")
    return groups


def clip_factors(norms: Tensor, max_norm: float | Tensor) -> Tensor:
    """`min(1, max_norm / norm)`: exactly 1 up to `max_norm`, and `factor * norm` never rounds above it."""
    return torch.where(norms <= max_norm, 1.0, _rounded_down(max_norm, norms)).to(norms.dtype)


def automatic_factors(norms: Tensor, max_norm: float | Tensor) -> Tensor:
    """`max_norm / (norm + 0.01)`: every gradient normalised (Bu et al. 2023).

    As in `clip_factors`, `factor * norm` never rounds above `max_norm`.
    """
    return _rounded_down(max_norm, norms + AUTOMATIC_STABILITY)


def _rounded_down(max_norm: float | Tensor, norms: Tensor) -> Tensor:
    """`max_norm / norm`, so that neither it nor its product with the norm rounds up."""
    # the quotient may round up, and so may its product with the norm: a step below is safe, unless subnormal
    info = torch.finfo(norms.dtype)
    quotient = max_norm / norms.clamp(min=info.tiny) * (1 - 2 * info.eps)
    return torch.where(quotient < info.tiny, 0.0, quotient).to(norms.dtype)


def _known_true(condition: Tensor) -> bool:
    """Whether all of it is True, as far as values may be read here: compiled code and `vmap` cannot."""
    return can_read(condition) and bool(condition.all())


# --------------------------------------------------------------------------- of the logits alone


def loss() -> Quantity:
    """Per-sample losses `[N]`, averaged over views."""
    return of_logits(_losses)


def el2n() -> Quantity:
    """`|softmax(logits) - onehot(target)|` `[N]` (Paul et al. 2021, https://arxiv.org/abs/2107.07075)."""
    return of_logits(_el2n)


def correct() -> Quantity:
    """The share of each sample's views whose top logit is the target, `[N]`."""
    return of_logits(_correct)


def of_logits(compute: Callable[[Captured], Tensor]) -> Quantity:
    """A quantity `[N]` that needs no gradient."""
    return Quantity("", _no_leaf, partial(_finish_by, compute), torch.cat)


def _no_leaf(path: str, factors: Factors, way: Way) -> None: ...


def _finish_by(compute: Callable[[Captured], Tensor], answers: dict[str, Any], captured: Captured) -> Tensor:
    return compute(captured)


def _losses(captured: Captured) -> Tensor:
    return captured.losses


def _el2n(captured: Captured) -> Tensor:
    logits = captured.logits
    if not len(logits):
        return captured.losses
    check_class_indices("el2n", captured)
    errors = logits.softmax(1) - F.one_hot(captured.targets, logits.shape[1]).to(logits.dtype)
    return split_views(torch.linalg.vector_norm(errors, dim=1), captured.views).mean(0)


def _correct(captured: Captured) -> Tensor:
    if not len(captured.logits):
        return captured.losses
    check_class_indices("correct", captured)
    hits = (captured.logits.argmax(1) == captured.targets).to(captured.logits.dtype)
    return split_views(hits, captured.views).mean(0)


def check_class_indices(name: str, captured: Captured) -> None:
    """Refuse targets that are not one class index per sample."""
    targets, logits = captured.targets, captured.logits
    if not isinstance(targets, Tensor) or targets.shape != logits.shape[:1] or targets.is_floating_point():
        shown = list(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(
            f"{name} needs class indices [N], int64, and logits [N, classes]; got targets {shown} and logits "
            f"{list(logits.shape)}"
        )
