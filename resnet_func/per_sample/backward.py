"""An ordinary backward pass that hands over each call as soon as the gradients of its outputs are there.

A hook before the node of each output sees its gradient. What autograd is asked for is the gradients of the
calls that no other call comes before: so it computes no weight gradient, and holds no call's longer than it
needs it itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_func.autodiff import Graph
from resnet_func.per_sample.collect import Receive, Seen
from resnet_func.per_sample.intercept import Call, Calls, kept_statistics, tensors_of


class Backward(NamedTuple):
    """The backward pass from `value`, the sum of the losses; `unmet` are the leaves that no call took."""

    calls: Calls
    value: Tensor
    graph: Graph
    unmet: dict[str, Tensor]

    def hand_over(self, receive: Receive) -> None:
        """Run it, once. `receive` gets the calls, last ones first, which are forgotten here.

        Raises:
            ValueError: the value depends on a leaf in a way that cannot be followed.
        """
        assert self.calls.calls or not self.calls.count, "a backward pass runs once"
        calls = dict(enumerate(self.calls.calls))
        self.calls.calls.clear()
        outputs = [
            (index, place, output.edge)
            for index, call in calls.items()
            for place, output in enumerate(call.outputs)
            if output.edge is not None and output.edge.node in self.graph.following
        ]
        arrivals = _Arrivals(calls, Counter([index for index, _, _ in outputs]), self.value.device, receive)
        first = _reaching_no_other(self.graph, {edge.node for _, _, edge in outputs})
        asked = [output for output in outputs if output[2].node in first]
        hooks = [
            edge.node.register_prehook(partial(arrivals.take_from, index, place, edge.output_nr))
            for index, place, edge in outputs
            if edge.node not in first
        ]
        try:
            wanted = [*[edge for _, _, edge in asked], *self.unmet.values()]
            found = list(gradients(self.value, wanted, differentiable=False))
        finally:
            for hook in hooks:
                hook.remove()
        refuse_hidden(with_gradient(self.unmet, found[len(asked) :]))
        del found[len(asked) :]
        while asked:
            index, place, _ = asked.pop()
            arrivals.take(index, place, found.pop())
        arrivals.take_rest()


class _Arrivals:
    """The gradients of outputs that are there, until those of all outputs of their call are."""

    def __init__(
        self, calls: dict[int, Call], awaited: Counter[int], device: torch.device, receive: Receive
    ) -> None:
        self.calls = calls
        self.awaited = awaited
        self.device = device
        self.receive = receive
        # read now: the backward pass frees them
        self.statistics = {
            index: [kept.detach() for output in call.outputs for kept in kept_statistics(output.edge)]
            for index, call in calls.items()
        }
        self.found: dict[int, dict[int, Tensor | None]] = {index: {} for index in calls}

    def take_from(self, index: int, place: int, output_nr: int, grads: tuple[Tensor | None, ...]) -> None:
        """`take`, as a hook before the node of the output."""
        self.take(index, place, grads[output_nr])

    def take(self, index: int, place: int, grad: Tensor | None) -> None:
        """The gradient of an output of a call; None is zero."""
        self.found[index][place] = grad
        if len(self.found[index]) >= self.awaited[index]:
            self.pass_on(index)

    def pass_on(self, index: int) -> None:
        call, found = self.calls.pop(index), self.found.pop(index)
        cotangents = []
        for place, output in enumerate(call.outputs):
            grad = found.get(place)
            if grad is None:  # what was returned there has no part in the value
                grad = torch.zeros(output.shape, dtype=output.dtype, device=self.device)
            cotangents.append(grad)
        tensors = [tensor.detach() for tensor in tensors_of(call.args, call.kwargs)]
        self.receive(index, Seen(call, tensors, cotangents, self.statistics.pop(index)))

    def take_rest(self) -> None:
        """Calls that have no part in the value."""
        for index in list(self.calls):
            assert not self.awaited[index], f"autograd left out {self.calls[index].func}"
            self.pass_on(index)


def _reaching_no_other(graph: Graph, nodes: set[Any]) -> set[Any]:
    """The ones of these nodes that no other of them comes before, in the forward pass."""
    return {node for node in nodes if not _reaches(graph, node, nodes)}


def _reaches(graph: Graph, start: Any, nodes: set[Any]) -> bool:
    """Whether gradients that leave a node pass another one of `nodes`; few steps away, where they do."""
    waiting, seen = [start], {start}
    for node in waiting:
        for one in graph.following[node]:
            if one in nodes:
                return True
            if one not in seen:
                seen.add(one)
                waiting.append(one)
    return False


def gradients(value: Tensor, wanted: Sequence[Any], differentiable: bool) -> tuple[Tensor | None, ...]:
    """One for each place; None where there is no edge, as of a detached leaf, or no part in the value."""
    places = [place for place, edge in enumerate(wanted) if edge is not None]
    found: list[Tensor | None] = [None] * len(wanted)
    if places and value.requires_grad:
        edges = [wanted[place] for place in places]
        grads = torch.autograd.grad(value, edges, allow_unused=True, create_graph=differentiable)
        for place, grad in zip(places, grads, strict=True):
            found[place] = grad
    return tuple(found)


def with_gradient(leaves: Iterable[str], found: Iterable[Tensor | None]) -> list[str]:
    """Those leaves of which the value has a gradient."""
    return [path for path, grad in zip(leaves, found, strict=True) if grad is not None]


def refuse_hidden(paths: list[str]) -> None:
    """Refuse leaves that no call took, and that the loss depends on all the same."""
    if paths:
        raise ValueError(
            f"the loss depends on {', '.join(paths)} in a way that cannot be followed. "
            "Use method='vmap', or leave it out by trainable="
        )
