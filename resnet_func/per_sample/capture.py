"""One forward and one ordinary backward pass that leave every leaf's factors behind, for any network.

The forward pass runs under `intercept.Interception`, and the backward pass is asked for the gradients of the
calls' outputs, not of the leaves: no weight gradient is computed. `collect` makes factors of the calls.
"""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import debug_unwrap

from resnet_func import tree
from resnet_func.autodiff import graph_of, is_differentiated, is_ordinary
from resnet_func.losses import check_per_sample
from resnet_func.per_sample.backward import Backward, gradients, refuse_hidden, with_gradient
from resnet_func.per_sample.collect import Receive, Seen, Visit, collect, collect_all, shapes_of_factors
from resnet_func.per_sample.intercept import Calls, Interception, kept_statistics, tensors_of
from resnet_func.per_sample.layers.factors import Factors
from resnet_func.per_sample.task import Batch, Task
from resnet_func.types import Logits, PerSample


class Captured(NamedTuple):
    """What one pass over a batch leaves behind.

    `losses [N]` are averaged over views; `logits [views * N, classes]`, views first; `targets [views * N,
    ...]`; `dtypes` are those that the network computed in. `leaves` holds every trainable leaf's factors by
    its dotted path; it is `{}` where `pending`, the backward pass, makes them one after another.
    """

    losses: PerSample
    logits: Logits
    targets: Any
    views: int
    dtypes: list[torch.dtype]
    leaves: dict[str, Factors]
    pending: Pending | None = None

    def factors(self) -> dict[str, Factors]:
        """All leaves, in the order of the parameters; only once where the backward pass is still to run."""
        if self.pending is None:
            return self.leaves
        task, batch, backward = self.pending
        return collect_all(task, batch, backward.calls, backward.hand_over)

    def paths(self) -> list[str]:
        """Of all trainable leaves, in the order of the parameters."""
        return list(self.leaves if self.pending is None else self.pending.task.trained)


class Pending(NamedTuple):
    """A backward pass that is still to run, once."""

    task: Task
    batch: Batch
    backward: Backward

    def visit_leaves(self, visit: Visit) -> None:
        """Run it, and give `visit` each trainable leaf as soon as its factors are there.

        What `visit` does not keep is freed, while the pass goes on: never are all leaves held at once.

        Raises:
            ValueError: a leaf is used in a way that cannot be followed; whatever `visit` raises.
        """
        collect(self.task, self.batch, self.backward.calls, self.backward.hand_over, visit)

    def shapes(self) -> dict[str, Factors] | None:
        """The factors that are to come, on the meta device; None where a call does not run there."""
        try:
            return shapes_of_factors(self.task, self.batch, self.backward.calls)
        except (RuntimeError, TypeError):
            return None

    def signature(self) -> tuple[Any, ...]:
        """Equal for passes of equal sizes, of the batch and of the leaves."""
        leaves = [(path, leaf.shape) for path, leaf in self.task.trained.items()]
        outputs = [(out.shape, out.dtype) for out in self.backward.calls.outputs()]
        return self.batch.samples, self.batch.views, *leaves, *outputs


def capture(task: Task, batch: Batch) -> Captured:
    """One pass, whose backward half is pending where no transform looks on.

    Running statistics are used, never updated. The result can be differentiated where the losses are being
    differentiated; otherwise the backward pass keeps no graph.

    Raises:
        ValueError: the loss is not per-sample, samples are coupled, or a leaf is used in a way that cannot be
            followed.
    """
    if torch.compiler.is_compiling():
        passed = _run_with_taps(task, batch)
    else:
        # vjp has its price
        ordinary = is_ordinary(task.trained, task.frozen, task.state, batch.x, batch.y)
        begun = _begin(task, batch) if ordinary else None
        if begun is not None:
            return begun
        passed = _run_under_vjp(task, batch)
    leaves = collect_all(task, batch, passed.calls, partial(_hand_over, passed))
    dtypes = _dtypes(passed.losses, passed.logits, passed.calls)
    return Captured(passed.losses, passed.logits, batch.y, batch.views, dtypes, leaves)


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


def _hand_over(passed: _Pass, receive: Receive) -> None:
    start = 0
    for index, (call, tensors) in enumerate(zip(passed.calls.calls, passed.tensors, strict=True)):
        outputs = slice(start, start + len(call.outputs))
        start = outputs.stop
        seen = Seen(call, tensors, passed.cotangents[outputs], _joined(passed.statistics[outputs]))
        receive(index, seen)


def _forward(task: Task, batch: Batch, trained: dict[str, Tensor], calls: Calls) -> tuple[Tensor, Tensor]:
    """Losses `[N]` and logits."""
    with Interception(calls):
        logits, _ = task.model.apply(task.params(trained), task.state, batch.x, train=False)
    losses = task.loss_fn(logits, batch.y)
    check_per_sample(losses, batch.samples * batch.views)
    return losses.reshape(batch.views, batch.samples).mean(0), logits


def losses_of(task: Task, batch: Batch, trained: dict[str, Tensor]) -> Tensor:
    """Losses `[N]` as a function of the trained leaves, with the same refusals as `capture`'s."""
    return _forward(task, batch, trained, _make_calls(task, batch, trained, edges=False))[0]


def _make_calls(task: Task, batch: Batch, trained: dict[str, Tensor], **more: Any) -> Calls:
    constants = [*task.frozen.values(), *tree.leaves(task.state)]
    return Calls(trained, constants, batch.samples * batch.views, **more)


def _begin(task: Task, batch: Batch) -> Captured | None:
    """A forward pass by ordinary autograd; None where only `vjp` would do.

    That is where somebody else differentiates the losses, and where there are `autograd.Function`s, which
    only `vjp` shows as one call.
    """
    outside = torch.is_grad_enabled()
    with torch.enable_grad():
        inside = {path: leaf.detach().requires_grad_() for path, leaf in task.trained.items()}
        calls = _make_calls(task, batch, inside)
        losses, logits = _forward(task, batch, inside, calls)
        value = losses.sum()
    graph = graph_of(value)
    others = outside and graph.hangs_on_others([*inside.values()])
    if others or graph.functions or any(output.edge is None for output in calls.outputs()):
        return None
    backward = Backward(calls, value, graph, _unmet(calls))
    pending = Pending(task, batch, backward)
    dtypes = _dtypes(losses, logits, calls)
    return Captured(losses.detach(), logits.detach(), batch.y, batch.views, dtypes, {}, pending)


def _dtypes(losses: Tensor, logits: Tensor, calls: Calls) -> list[torch.dtype]:
    return [losses.dtype, logits.dtype, *[output.dtype for output in calls.outputs()]]


def _run_under_vjp(task: Task, batch: Batch) -> _Pass:
    """A forward and a backward pass to the gradient edges of the calls' outputs, seen by the transforms
    around; nothing is added to the network."""
    made: list[Calls] = []

    def run(trained: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        calls = _make_calls(task, batch, trained)
        made.append(calls)
        losses, logits = _forward(task, batch, trained, calls)
        value = losses.sum()
        outputs = calls.outputs()
        statistics = [kept_statistics(output.edge) for output in outputs]  # the backward pass frees them
        unmet = _unmet(calls)
        differentiable = is_differentiated(debug_unwrap(value, recurse=False))
        found = gradients(value, [*[output.edge for output in outputs], *unmet.values()], differentiable)
        refuse_hidden(with_gradient(unmet, found[len(outputs) :]))
        cotangents = [
            torch.zeros(output.shape, dtype=output.dtype, device=value.device) if grad is None else grad
            for output, grad in zip(outputs, found, strict=False)
        ]
        tensors = [tensors_of(call.args, call.kwargs) for call in calls.calls]
        lengths.extend([[len(some) for some in lists] for lists in (tensors, statistics)])
        # one flat list: torch walks nested ones in Python
        return value, [losses, logits, *cotangents, *_joined(tensors), *_joined(statistics)]

    lengths: list[list[int]] = []
    _, _, (losses, logits, *rest) = torch.func.vjp(run, task.trained, has_aux=True)  # type: ignore[misc]
    tensors, statistics = lengths
    count = len(rest) - sum(tensors) - sum(statistics)
    cotangents, *lists = _cut(rest, [count, *tensors, *statistics])
    return _Pass(made[0], losses, logits, lists[: len(tensors)], cotangents, lists[len(tensors) :])


def _joined(lists: list[list[Tensor]]) -> list[Tensor]:
    return [tensor for some in lists for tensor in some]


def _cut(tensors: list[Tensor], lengths: list[int]) -> list[list[Tensor]]:
    """The inverse of `_joined`."""
    rest = iter(tensors)
    return [list(islice(rest, length)) for length in lengths]


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
        refuse_hidden([path for path in _unmet(calls) if path in derived])
        tensors = [tensors_of(call.args, call.kwargs) for call in calls.calls]
        return losses.sum(), (losses, logits, tensors)

    value, pullback, (losses, logits, tensors) = torch.func.vjp(run, taps, has_aux=True)  # type: ignore[misc]
    (cotangents,) = pullback(torch.ones_like(value))
    return _Pass(made[0], losses, logits, tensors, cotangents, [[] for _ in cotangents])


def _unmet(calls: Calls) -> dict[str, Tensor]:
    """The leaves that no call took."""
    met = {path for call in calls.calls for _, source in call.parameters for path in source.paths}
    return {path: leaf for path, leaf in calls.leaves.items() if path not in met}
