"""From what a pass leaves behind of each call to the factors of each leaf, over all calls that take it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from resnet_func.per_sample.intercept import (
    Call,
    Calls,
    Source,
    ancestors,
    derivation,
    substitute,
    tensors_of,
)
from resnet_func.per_sample.layers.any_call import any_call
from resnet_func.per_sample.layers.factors import ConvFactors, Derived, Direct, Factors, Several
from resnet_func.per_sample.layers.layer import Found, Layer
from resnet_func.per_sample.layers.layer_factors import CHOSEN, factors_of_layer
from resnet_func.per_sample.layers.rows import row_jacobian
from resnet_func.per_sample.task import Batch, Task


class Seen(NamedTuple):
    """What a pass leaves behind of a call.

    `tensors` are those among its arguments, `cotangents` the gradients of its outputs, `statistics` what the
    backward pass of a call keeps of its input beside it, where that is known.
    """

    call: Call
    tensors: list[Tensor]
    cotangents: list[Tensor]
    statistics: list[Tensor]


# Takes a call by its place in the forward pass
Receive: TypeAlias = Callable[[int, Seen], None]
FactorsOf: TypeAlias = Callable[[Layer, bool], Found]
# Takes leaves by their dotted paths, which it may keep or drop: nobody else holds their factors
Visit: TypeAlias = Callable[[dict[str, Factors]], None]


def _factors_of_call(layer: Layer, once: bool) -> Found:
    return factors_of_layer(layer) if once else any_call(layer)  # no rule knows one leaf in two places


def collect(
    task: Task,
    batch: Batch,
    calls: Calls,
    hand_over: Callable[[Receive], None],
    visit: Visit,
    factors_of: FactorsOf = _factors_of_call,
) -> None:
    """Give `visit` every trainable leaf once, as soon as all calls that it has a part in were handed over.

    Args:
        task, batch, calls: What was passed over, and how.
        hand_over: Gives its argument every call once, in any order.
        visit: Gets together what a call completes.
        factors_of: The factors of a layer's parameters; told whether each is there only once.
    """
    uses: dict[str, int] = dict.fromkeys(task.trained, 0)
    for call in calls.calls:
        for _, source in call.parameters:
            for path in source.paths:
                uses[path] += 1
    parts: dict[str, list[tuple[int, Factors]]] = {path: [] for path in task.trained}

    def receive(index: int, seen: Seen) -> None:
        complete = {}
        for path, factors in _factors_of_leaves(task, batch, calls, seen, factors_of):
            parts[path].append((index, factors))
            if len(parts[path]) == uses[path]:
                # in the order of the forward pass, whatever order they came in
                ordered = sorted(parts.pop(path), key=lambda part: part[0])
                complete[path] = _as_one(task.trained[path], [factors for _, factors in ordered])
        visit(complete)

    # leaves that the loss does not depend on
    unused = {path: leaf for path, leaf in task.trained.items() if not uses[path]}
    visit({p: Direct(leaf.new_zeros(()).expand(batch.samples, *leaf.shape)) for p, leaf in unused.items()})
    hand_over(receive)


def collect_all(
    task: Task,
    batch: Batch,
    calls: Calls,
    hand_over: Callable[[Receive], None],
    factors_of: FactorsOf = _factors_of_call,
) -> dict[str, Factors]:
    """All leaves that `collect` gives, in the order of the parameters."""
    found: dict[str, Factors] = {}
    collect(task, batch, calls, hand_over, found.update, factors_of)
    return {path: found[path] for path in task.trained}


def shapes_of_factors(task: Task, batch: Batch, calls: Calls) -> dict[str, Factors]:
    """What `collect_all` will give, on the meta device: for a plan, before the backward pass.

    Of leaves whose way no plan chooses it is a placeholder, for which nothing is computed.

    Raises:
        RuntimeError, TypeError: a call cannot run on the meta device.
    """
    return collect_all(task, batch, calls, partial(_hand_over_shapes, calls), _shapes_of_call)


def _shapes_of_call(layer: Layer, once: bool) -> Found:
    if once and layer.func in CHOSEN:
        return factors_of_layer(layer)
    return {leaf: Direct(leaf.new_empty((layer.samples, *leaf.shape))) for leaf in layer.parameters}


def _hand_over_shapes(calls: Calls, receive: Receive) -> None:
    for index, call in enumerate(calls.calls):
        inside = tensors_of(call.args, call.kwargs)
        shapes = {tensor: torch.empty_like(tensor, device="meta") for tensor in inside}
        cotangents = [torch.empty(out.shape, dtype=out.dtype, device="meta") for out in call.outputs]
        receive(index, Seen(call, [shapes[tensor] for tensor in inside], cotangents, []))


def _factors_of_leaves(
    task: Task, batch: Batch, calls: Calls, seen: Seen, factors_of: FactorsOf
) -> Iterator[tuple[str, Factors]]:
    """Of every leaf that a call depends on, once for each of its parameters that do."""
    call = seen.call
    inside = tensors_of(call.args, call.kwargs)
    values = dict(zip(inside, seen.tensors, strict=True))
    args, kwargs = substitute((call.args, call.kwargs), values)
    batched = [values[tensor] for tensor in values if tensor not in calls.sources]
    parameters = [values[tensor] for tensor, _ in call.parameters]
    layer = Layer(
        call.func,
        args,
        kwargs,
        parameters,
        batched,
        call.indices,
        seen.cotangents,
        seen.statistics,
        batch.samples,
        batch.views,
    )
    once = all(sum(tensor is other for other in inside) == 1 for tensor, _ in call.parameters)
    found = factors_of(layer, once)
    for tensor, source in call.parameters:
        factors = found[values[tensor]]
        for path in source.paths:
            yield path, factors if source.step < 0 else _derived(task, calls, tensor, source, path, factors)


def _derived(
    task: Task, calls: Calls, tensor: Tensor, source: Source, path: str, factors: Factors
) -> Derived:
    derive = derivation(calls, tensor, source, path, task.trained)
    own = {inner: task.trained[name] for name, inner in calls.leaves.items()}
    jacobian = row_jacobian(ancestors(calls, source), tensor, calls.leaves[path], own)
    return Derived(derive, task.trained[path], factors, jacobian)


def _as_one(leaf: Tensor, parts: list[Factors]) -> Factors:
    alike = parts[0]
    for part in parts[1:]:
        joined = _as_views(alike, part)
        if joined is None:
            return Several(leaf, tuple(parts))
        alike = joined
    return alike


def _as_views(a: Factors, b: Factors) -> ConvFactors | None:
    """Two uses of a weight that differ in their images only are two views of each sample."""
    if not (isinstance(a, ConvFactors) and isinstance(b, ConvFactors)) or a.spec != b.spec:
        return None
    if a.inputs.shape[1:] != b.inputs.shape[1:] or a.cotangents.dtype != b.cotangents.dtype:
        return None
    inputs, cotangents = torch.cat([a.inputs, b.inputs]), torch.cat([a.cotangents, b.cotangents])
    return ConvFactors(a.spec, a.weight, inputs, cotangents, a.views + b.views)
