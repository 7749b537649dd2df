"""The first layer at which two forward passes on the same numbers part, and how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from resnet_func.models.layer_calls import Call, Values
from resnet_func.testing.assertions import describe_difference


def first_divergence(first: Sequence[Call], second: Sequence[Call]) -> str:
    """The first layer, in A's order, that gives something else in B, in a line; empty where none does.

    A layer is a call that takes a leaf. One that takes the same numbers and gives others is named with its
    options that differ; where it is given other numbers already, the calls between it and the layers before
    it are compared.
    """
    layers, others = _layers(first), _layers(second)
    for key, call in layers.items():
        if key not in others:
            return f"{_title(key)}: {call.function} in A, no such call in B"
        other = others[key]
        if _differ(tensors(call).inputs, tensors(other).inputs):
            return f"before {_title(key)}: {_between(call.sources, other.sources)}"
        if _differ(tensors(call).outputs, tensors(other).outputs):
            return f"{_title(key)}: {how(call, other)}"
    for key, call in others.items():
        if key not in layers:
            return f"{_title(key)}: {call.function} in B, no such call in A"
    if first and second and _differ(tensors(first[-1]).outputs, tensors(second[-1]).outputs):
        return f"after the last layer: {_between((first[-1],), (second[-1],))}"
    return ""


def layer_options(first: Sequence[Call], second: Sequence[Call], leaf: str) -> str:
    """How the calls that take a leaf differ in their options; for buffers, which come after all outputs."""
    layers, others = _layers(first), _layers(second)
    said = [
        line
        for key, call in layers.items()
        if leaf in call.paths and key in others
        for line in _differing_options(call, others[key])
    ]
    return ", ".join(said)


def how(call: Call, other: Call) -> str:
    """In what two calls on the same inputs differ."""
    if call.function != other.function:
        lines = [f"{call.function} in A, {other.function} in B"]
    else:
        lines = [call.function, *_differing_options(call, other)]
    weights = [
        said
        for pair in zip(tensors(call).weights, tensors(other).weights, strict=False)
        if (said := describe_difference(*pair))
    ]
    if weights:
        lines.append(f"computed with other weights: {weights[0]}")
    lines += [
        f"output {said}"
        for said in map(describe_difference, tensors(call).outputs, tensors(other).outputs)
        if said
    ][:1]
    return "; ".join(lines)


def _layers(calls: Sequence[Call]) -> dict[tuple[str, int], Call]:
    """Calls that take a leaf, by the first leaf and how many calls took it before."""
    found: dict[tuple[str, int], Call] = {}
    count: Counter[str] = Counter()
    for call in calls:
        if call.paths:
            found[call.paths[0], count[call.paths[0]]] = call
            count[call.paths[0]] += 1
    return found


def _title(key: tuple[str, int]) -> str:
    leaf, before = key
    layer = leaf.rpartition(".")[0] or leaf
    return f"{layer} (call {before + 1})" if before else layer


def _differ(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return len(ours) != len(theirs) or any(map(describe_difference, ours, theirs))


def _between(sources: Sequence[Call | None], others: Sequence[Call | None]) -> str:
    """What was called since the layers before, on either side: the first call that differs."""
    ours, theirs = _upstream(sources), _upstream(others)
    after = [call.paths[0].rpartition(".")[0] for call in ours if call.paths][-1:]
    place = f"after {after[0]}, " if after else ""
    calls, other_calls = ([call for call in side if not call.paths] for side in (ours, theirs))
    alike = 0  # calls that give the same, whatever their names
    for call, other in zip(calls, other_calls, strict=False):
        if _differ(tensors(call).outputs, tensors(other).outputs):
            if call.function == other.function:
                return f"{place}{how(call, other)}"
            break
        alike += 1
    names = [", ".join(call.function for call in side[alike:]) for side in (calls, other_calls)]
    if names[0] == names[1]:
        return f"{place}the same calls ({names[0] or 'none'}) on other tensors"
    return f"{place}A calls {names[0] or 'nothing'}, B calls {names[1] or 'nothing'}"


def _upstream(sources: Sequence[Call | None]) -> list[Call]:
    """Calls from these back to the layers before, those included, in the order they ran."""
    found: dict[int, Call] = {}

    def visit(call: Call | None) -> None:
        if call is None or call.index in found:
            return
        if not call.paths:
            for source in call.sources:
                visit(source)
        found[call.index] = call

    for source in sources:
        visit(source)
    return [found[index] for index in sorted(found)]


def _differing_options(call: Call, other: Call) -> list[str]:
    return [
        f"{key} {value!r} in A, {other.options[key]!r} in B"
        for key, value in call.options.items()
        if key in other.options and not _same_option(value, other.options[key])
    ]


def _same_option(a: Any, b: Any) -> bool:
    """1 is (1, 1) to a convolution."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return True
    wide = [value if isinstance(value, (tuple, list)) else None for value in (a, b)]
    if (wide[0] is None) != (wide[1] is None):
        many, one = (a, b) if wide[1] is None else (b, a)
        return all(entry == one for entry in many)
    return a == b if wide[0] is None else list(a) == list(b)


def tensors(call: Call) -> Values:
    """The tensors of a call of `record_values`."""
    assert call.values is not None
    return call.values
