"""One ordinary backward pass that leaves every leaf's factors behind, for any network.

The forward pass runs under `intercept.Interception`, and the backward pass is asked for the gradients of the
calls' outputs, not of the leaves: no weight gradient is computed. `layer_factors` makes factors of the calls.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import debug_unwrap

from resnet_func import tree
from resnet_func.autodiff import graph_of, is_differentiated, is_ordinary
from resnet_func.losses import check_per_sample
from resnet_func.per_sample.intercept import (
    Call,
    Calls,
    Interception,
    ancestors,
    derivation,
    kept_statistics,
    substitute,
    tensors_of,
)
from resnet_func.per_sample.layers.any_call import any_call
from resnet_func.per_sample.layers.factors import ConvFactors, Derived, Direct, Factors, Several
from resnet_func.per_sample.layers.layer import Layer
from resnet_func.per_sample.layers.layer_factors import factors_of_layer
from resnet_func.per_sample.layers.rows import row_jacobian
from resnet_func.train.trainable import trained_leaves
from resnet_func.types import Logits, LossFn, Model, Params, PerSample, State, Trainable


class Batch(NamedTuple):
    """A batch with its views folded in: leaves lead with `views * N`, views first."""

    x: Any
    y: Any
    samples: int
    views: int


class Captured(NamedTuple):
    """What one pass over a batch leaves behind.

    `factors` holds every trainable leaf by its dotted path, in the order of the parameters; `losses [N]` are
    averaged over views; `logits [views * N, classes]`, views first; `targets [views * N, ...]`.
    """

    losses: PerSample
    logits: Logits
    targets: Any
    factors: dict[str, Factors]
    views: int


class Task(NamedTuple):
    """What is differentiated: the loss of a network, with respect to its trainable leaves.

    `like` has the structure of the parameters; its leaves are not looked at.
    """

    model: Model
    loss_fn: LossFn
    trained: dict[str, Tensor]
    frozen: dict[str, Tensor]
    state: State
    like: Params

    def params(self, trained: dict[str, Tensor]) -> Params:
        """The parameters as the network takes them."""
        return tree.replace(self.like, {**self.frozen, **trained})


def make_task(model: Model, loss_fn: LossFn, trainable: Trainable, params: Params, state: State) -> Task:
    """Split the leaves; a frozen one costs nothing."""
    trained = trained_leaves(params, trainable)
    frozen = {path: leaf for path, leaf in tree.flatten(params).items() if path not in trained}
    return Task(model, loss_fn, trained, frozen, state, params)


def capture(task: Task, batch: Batch) -> Captured:
    """The factors of every trainable leaf.

    Running statistics are used, never updated. The result can be differentiated where the losses are being
    differentiated; otherwise the backward pass keeps no graph.

    Raises:
        ValueError: the loss is not per-sample, samples are coupled, or a leaf is used in a way that cannot be
            followed.
    """
    passed = (
        _run_with_taps(task, batch) if torch.compiler.is_compiling() else run_under_interception(task, batch)
    )
    factors = _collect(task, batch, passed)
    return Captured(passed.losses, passed.logits, batch.y, factors, batch.views)


class _Pass(NamedTuple):
    """A forward and a backward pass.

    `tensors` are the tensors of every call, `cotangents` the gradients of their outputs, `statistics` what
    the backward pass of a call kept of its input beside it, where that is known.
    """

    calls: Calls
    losses: Tensor
    logits: Tensor
    tensors: list[list[Tensor]]
    cotangents: list[Tensor]
    statistics: list[list[Tensor]]


def _forward(task: Task, batch: Batch, trained: dict[str, Tensor], calls: Calls) -> tuple[Tensor, Tensor]:
    """Losses `[N]` and logits."""
    with Interception(calls):
        logits, _ = task.model.apply(task.params(trained), task.state, batch.x, train=False)
    losses = task.loss_fn(logits, batch.y)
    check_per_sample(losses, batch.samples * batch.views)
    return losses.reshape(batch.views, batch.samples).mean(0), logits


def leaves_like(trained: dict[str, Tensor], given: Params, name: str) -> dict[str, Tensor]:
    """The leaves of a tree that have their namesake among `trained`, in that order.

    Raises:
        ValueError: one is missing, or has another shape.
    """
    flat = tree.flatten(given)
    for path, leaf in trained.items():
        if path not in flat or flat[path].shape != leaf.shape:
            got = list(flat[path].shape) if path in flat else f"leaves {', '.join(list(flat)[:3])}, ..."
            raise ValueError(
                f"expected a {name} like the trainable parameters, with {path} of {list(leaf.shape)}; "
                f"got {got}. Make one by tree.map(torch.randn_like, params)"
            )
    return {path: flat[path].to(leaf.dtype) for path, leaf in trained.items()}


def losses_of(task: Task, batch: Batch, trained: dict[str, Tensor]) -> Tensor:
    """Losses `[N]` as a function of the trained leaves, with the same refusals as `capture`'s."""
    return _forward(task, batch, trained, _make_calls(task, batch, trained, edges=False))[0]


def _make_calls(task: Task, batch: Batch, trained: dict[str, Tensor], **more: Any) -> Calls:
    constants = [*task.frozen.values(), *tree.leaves(task.state)]
    return Calls(trained, constants, batch.samples * batch.views, **more)


def run_under_interception(task: Task, batch: Batch) -> _Pass:
    """A forward and a backward pass to the gradient edges of the calls' outputs; nothing is added to the
    network."""
    made: list[Calls] = []

    def run(trained: dict[str, Tensor], *, ordinary: bool = False) -> tuple[Tensor, list[Tensor]]:
        calls = _make_calls(task, batch, trained)
        made.append(calls)
        losses, logits = _forward(task, batch, trained, calls)
        met = _met(calls)
        unmet = [leaf for path, leaf in trained.items() if path not in met]
        value = losses.sum()
        outputs = calls.outputs()
        statistics = [kept_statistics(output.edge) for output in outputs]  # the backward pass frees them
        if ordinary and not _is_transparent(value, [*trained.values()], calls, grad_mode):
            return value, []
        differentiable = not ordinary and is_differentiated(debug_unwrap(value, recurse=False))
        found = _gradients(value, [*[output.edge for output in outputs], *unmet], differentiable)
        unseen = zip(_unmet(trained, met), found[len(outputs) :], strict=True)
        hidden = [path for path, grad in unseen if grad is not None]
        _refuse_hidden(hidden)
        cotangents = [
            torch.zeros(output.shape, dtype=output.dtype, device=value.device) if grad is None else grad
            for output, grad in zip(outputs, found, strict=False)
        ]
        tensors = [tensors_of(call.args, call.kwargs) for call in calls.calls]
        lengths.extend([[len(some) for some in lists] for lists in (tensors, statistics)])
        # one flat list: torch walks nested ones in Python
        return value, [losses, logits, *cotangents, *_joined(tensors), *_joined(statistics)]

    lengths: list[list[int]] = []
    grad_mode, left = torch.is_grad_enabled(), []
    if is_ordinary(task.trained, task.frozen, task.state, batch.x, batch.y):  # vjp has its price
        with torch.enable_grad():
            inside = {path: leaf.detach().requires_grad_() for path, leaf in task.trained.items()}
            left = [tensor.detach() for tensor in run(inside, ordinary=True)[1]]
    if not left:
        _, _, left = torch.func.vjp(run, task.trained, has_aux=True)  # type: ignore[misc]
    losses, logits, *rest = left
    tensors, statistics = lengths
    count = len(rest) - sum(tensors) - sum(statistics)
    cotangents, *lists = _cut(rest, [count, *tensors, *statistics])
    return _Pass(made[-1], losses, logits, lists[: len(tensors)], cotangents, lists[len(tensors) :])


def _is_transparent(value: Tensor, leaves: list[Tensor], calls: Calls, grad_mode: bool) -> bool:
    """Whether ordinary autograd sees what `vjp` does: nobody else differentiates the value, and there are no
    `autograd.Function`s, which only `vjp` shows as one call."""
    graph = graph_of(value)
    if grad_mode and graph.hangs_on_others(leaves):
        return False
    return not graph.functions and all(output.edge is not None for output in calls.outputs())


def _joined(lists: list[list[Tensor]]) -> list[Tensor]:
    return [tensor for some in lists for tensor in some]


def _cut(tensors: list[Tensor], lengths: list[int]) -> list[list[Tensor]]:
    """The inverse of `_joined`."""
    rest = iter(tensors)
    return [list(islice(rest, length)) for length in lengths]


def _gradients(value: Tensor, wanted: list[Any], differentiable: bool) -> tuple[Tensor | None, ...]:
    """One for each place; None where there is no edge, as of a detached leaf, or no part in the value."""
    places = [place for place, edge in enumerate(wanted) if edge is not None]
    found: list[Tensor | None] = [None] * len(wanted)
    if places and value.requires_grad:
        edges = [wanted[place] for place in places]
        grads = torch.autograd.grad(value, edges, allow_unused=True, create_graph=differentiable)
        for place, grad in zip(places, grads, strict=True):
            found[place] = grad
    return tuple(found)


def _run_with_taps(task: Task, batch: Batch) -> _Pass:
    """By zeros added to the calls' outputs, which a compiler can trace; their shapes come from a forward pass
    of which nothing else is used, so that no code is generated for it."""
    trained = {
        path: leaf.view_as(leaf) for path, leaf in task.trained.items()
    }  # one tensor may have two names
    shapes = _make_calls(task, batch, trained, edges=False)
    _forward(task, batch, trained, shapes)
    first = next(iter(trained.values()))
    taps = [first.new_zeros((), dtype=out.dtype).expand(out.shape) for out in shapes.outputs()]
    made: list[Calls] = []

    def run(taps: list[Tensor]) -> tuple[Tensor, tuple[Any, ...]]:
        calls = _make_calls(task, batch, trained, taps=taps)
        made.append(calls)
        losses, logits = _forward(task, batch, trained, calls)
        # values cannot be looked at: what became something that never met the batch may hide in the loss
        derived = {path for source in calls.sources.values() if source.step >= 0 for path in source.paths}
        _refuse_hidden([path for path in _unmet(trained, _met(calls)) if path in derived])
        tensors = [tensors_of(call.args, call.kwargs) for call in calls.calls]
        return losses.sum(), (losses, logits, tensors)

    value, pullback, (losses, logits, tensors) = torch.func.vjp(run, taps, has_aux=True)  # type: ignore[misc]
    (cotangents,) = pullback(torch.ones_like(value))
    return _Pass(made[0], losses, logits, tensors, cotangents, [[] for _ in cotangents])


def _refuse_hidden(paths: list[str]) -> None:
    if paths:
        raise ValueError(
            f"the loss depends on {', '.join(paths)} in a way that cannot be followed. "
            "Use method='vmap', or leave it out by trainable="
        )


def _met(calls: Calls) -> set[str]:
    return {path for call in calls.calls for _, source in call.parameters for path in source.paths}


def _unmet(trained: dict[str, Tensor], met: set[str]) -> list[str]:
    return [path for path in trained if path not in met]


# --------------------------------------------------------------------------- factors


def _collect(task: Task, batch: Batch, passed: _Pass) -> dict[str, Factors]:
    """Every leaf's factors, from all calls that it has a part in."""
    parts: dict[str, list[Factors]] = {path: [] for path in task.trained}
    start = 0
    for call, tensors in zip(passed.calls.calls, passed.tensors, strict=True):
        outputs = slice(start, start + len(call.outputs))
        start = outputs.stop
        of_outputs = passed.cotangents[outputs], _joined(passed.statistics[outputs])
        _add_call(task, batch, passed.calls, call, tensors, of_outputs, parts)
    return {path: _as_one(task.trained[path], found, batch.samples) for path, found in parts.items()}


def _add_call(
    task: Task,
    batch: Batch,
    calls: Calls,
    call: Call,
    tensors: list[Tensor],
    of_outputs: tuple[list[Tensor], list[Tensor]],
    parts: dict[str, list[Factors]],
) -> None:
    """`of_outputs`: their cotangents, and the statistics that were kept."""
    inside = tensors_of(call.args, call.kwargs)
    values = dict(zip(inside, tensors, strict=True))
    args, kwargs = substitute((call.args, call.kwargs), values)
    batched = [values[tensor] for tensor in values if tensor not in calls.sources]
    parameters = [values[tensor] for tensor, _ in call.parameters]
    layer = Layer(
        call.func, args, kwargs, parameters, batched, call.indices, *of_outputs, batch.samples, batch.views
    )
    once = all(sum(tensor is other for other in inside) == 1 for tensor, _ in call.parameters)
    found = factors_of_layer(layer) if once else any_call(layer)  # no rule knows one leaf in two places
    for tensor, source in call.parameters:
        factors = found[values[tensor]]
        for path in source.paths:
            leaf = task.trained[path]
            if source.step < 0:
                parts[path].append(factors)
            else:
                derive = derivation(calls, tensor, source, path, task.trained)
                own = {inner: task.trained[name] for name, inner in calls.leaves.items()}
                jacobian = row_jacobian(ancestors(calls, source), tensor, calls.leaves[path], own)
                parts[path].append(Derived(derive, leaf, factors, jacobian))


def _as_one(leaf: Tensor, parts: list[Factors], samples: int) -> Factors:
    if not parts:  # the loss does not depend on it
        return Direct(leaf.new_zeros(()).expand(samples, *leaf.shape))
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
