"""Interception: which function calls of a network's forward pass take a trainable leaf.

A `TorchFunctionMode` around the forward pass sees every call of a torch function, whatever wrote the network.
What is computed from leaves alone (a standardised weight, a transposed one) is *derived*: the calls that made
it are kept, so that a gradient can be pulled back. Where a leaf or what derives from it meets the batch, that
is a `Call`: one place where the loss depends on the leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from resnet_func.per_sample.constants import run_as_constant
from resnet_func.per_sample.in_place import is_in_place, may_be_view, out_of_place, version_of

# Calls that align dimensions from the last one, by their names without underscores
BROADCASTING = {
    *("add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "multiply", "subtract"),
    *("div", "truediv", "rtruediv", "itruediv", "divide", "where", "maximum", "minimum", "matmul", "rmatmul"),
    "scaled_dot_product_attention",
}
EXPANDING = (Tensor.expand, Tensor.repeat, torch.broadcast_to, Tensor.broadcast_to, torch.tile, Tensor.tile)


class Source(NamedTuple):
    """Where a tensor without samples comes from: the leaves it depends on, and the step that made it.

    A leaf depends on itself, and no step made it (-1); a constant depends on no leaf.
    """

    paths: tuple[str, ...]
    step: int = -1


class Step(NamedTuple):
    """A call on tensors without samples."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Source]
    outputs: list[Tensor]


class Output(NamedTuple):
    """What a call returned, to differentiate by: its gradient edge (None with taps), shape and dtype."""

    edge: GradientEdge | None
    shape: tuple[int, ...]
    dtype: torch.dtype


class Call(NamedTuple):
    """A call in which leaves, or what derives from them, meet the batch.

    Args:
        func, args, kwargs: As the network called.
        parameters: The tensors that hang on trainable leaves, each with its source.
        indices: Which of what it returned are tensors (0 where it returned one tensor alone).
        outputs: Those.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parameters: list[tuple[Tensor, Source]]
    indices: list[int]
    outputs: list[Output]


@dataclass
class Calls:
    """What a forward pass did with its leaves.

    Args:
        leaves: The trainable leaves by their dotted paths, the very tensors the network is given.
        constants: Other tensors without samples: frozen leaves, buffers.
        batch: Samples times views: the first dimension of every tensor that carries samples.
        taps: Zeros to add to the calls' outputs, one each; None keeps the outputs' gradient edges instead.
        edges: Whether to keep those: not where only shapes are asked for.
    """

    leaves: Mapping[str, Tensor]
    constants: list[Tensor]
    batch: int
    taps: list[Tensor] | None = None
    edges: bool = True
    calls: list[Call] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    sources: dict[Tensor, Source] = field(default_factory=dict)
    versions: dict[Tensor, int] = field(default_factory=dict)
    expanded: dict[Tensor, tuple[str, ...]] = field(default_factory=dict)  # as many rows as the batch has
    count: int = 0
    grad_mode: bool = field(default_factory=torch.is_grad_enabled)

    def __post_init__(self) -> None:
        for path, leaf in self.leaves.items():
            self.sources[leaf] = Source((path,))
        for constant in self.constants:
            self.sources[constant] = Source(())

    def outputs(self) -> list[Output]:
        """Those of all calls, in order."""
        return [output for call in self.calls for output in call.outputs]

    def meet(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call, and keep what it says about the leaves."""
        tensors = list(dict.fromkeys(tensors_of(args, kwargs)))
        if func is F.batch_norm or func is torch.batch_norm:
            refuse_coupling(args, kwargs, self.sources)
        if self.grad_mode and not torch.is_grad_enabled():
            result = run_as_constant(func, args, kwargs)
            if all(tensor in self.sources for tensor in tensors):
                for output in tensors_of((result,), {}):
                    self.sources.setdefault(output, Source(()))
            return result
        expanded = [tensor for tensor in tensors if tensor in self.expanded] if self.expanded else []
        if not expanded:
            return self._run(func, args, kwargs, tensors)
        carriers = [tensor for tensor in tensors if tensor not in self.sources]
        refuse_unaligned(func, expanded[0], carriers, self.expanded[expanded[0]])
        result = self._run(func, args, kwargs, tensors)
        if all(tensor in self.expanded for tensor in carriers):
            for output in tensors_of((result,), {}):
                self.expanded[output] = self.expanded[expanded[0]]
        return result

    def _run(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> Any:
        found = [(tensor, self.sources.get(tensor)) for tensor in tensors]
        known = [(tensor, source) for tensor, source in found if source is not None]
        parameters = [(tensor, source) for tensor, source in known if source.paths]
        if parameters:
            self._refuse_unseen_changes(func, args, parameters)
        if len(known) == len(tensors) and not (parameters and self._expands(func, args, kwargs)):
            return self._derive(func, args, kwargs, parameters)
        in_place = is_in_place(func)
        if not parameters:
            if in_place or func is Tensor.__setitem__:
                self.sources.pop(args[0], None)  # a constant that samples are written into is none
            return func(*args, **kwargs)
        pure, before = func, args
        if in_place:  # what comes in is overwritten: keep it as it was
            pure, before = out_of_place(func), (args[0].clone(), *args[1:])
        result = pure(*before, **kwargs)
        if func is F.embedding:
            result = _without_padding(result, *args, **kwargs)
        alone = isinstance(result, Tensor)
        outputs = [result] if alone else list(result) if isinstance(result, tuple) else []
        indices = [i for i, one in enumerate(outputs) if isinstance(one, Tensor) and one.is_floating_point()]
        if not indices:
            return result
        kept = [self._keep(outputs, index) for index in indices]
        self.calls.append(Call(pure, before, kwargs, parameters, indices, kept))
        if in_place:  # written back: what shares its memory, as a view does, changes too
            return args[0].copy_(outputs[0])
        if len(known) == len(tensors):
            self.expanded[outputs[0]] = parameters[0][1].paths
        return outputs[0] if alone else type(result)(outputs)

    def _keep(self, outputs: list[Any], index: int) -> Output:
        """One output of a call: its edge, or, with taps, the output plus its tap in its place."""
        output: Tensor = outputs[index]
        edge = None
        if self.taps is not None:
            output = outputs[index] = output + self.taps[self.count]
        elif len(outputs) > 1:  # one may be made from another inside the call: as an alias it is an end
            output = outputs[index] = output.view_as(output)
        # what comes of a detached leaf requires no grad
        if self.taps is None and self.edges and output.requires_grad:
            edge = get_gradient_edge(output)  # not the tensor: a later call may overwrite it
        self.count += 1
        return Output(edge, tuple(output.shape), output.dtype)

    def _expands(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a leaf becomes a batch here, as a class token does."""
        if func not in EXPANDING or self.batch == 1:
            return False
        sizes = args[1] if len(args) == 2 and isinstance(args[1], tuple | list) else args[1:]
        first = sizes[0] if sizes else next(iter(kwargs.values()))[0]
        before = args[0].shape[0] if args[0].ndim == len(sizes) else 1
        return first == self.batch and before == 1

    def _derive(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        parameters: list[tuple[Tensor, Source]],
    ) -> Any:
        result = func(*args, **kwargs)
        outputs = tensors_of((result,), {})
        if outputs:
            paths = tuple(dict.fromkeys([path for _, source in parameters for path in source.paths]))
            for output in outputs:
                self.versions[output] = version_of(output)
                if output not in self.sources or is_in_place(func):  # `contiguous` may return its argument
                    self.sources[output] = Source(paths, len(self.steps) if paths else -1)
            if paths:
                self.steps.append(Step(func, args, kwargs, [source for _, source in parameters], outputs))
        return result

    def _refuse_unseen_changes(
        self, func: Callable[..., Any], args: tuple[Any, ...], parameters: list[tuple[Tensor, Source]]
    ) -> None:
        """Refuse what derives from a leaf and was changed by other means than calls on itself."""
        for tensor, source in parameters:
            if func is Tensor.__setitem__:
                raise ValueError(
                    f"{' and '.join(source.paths)}, or what derives from it, is in an assignment by index, "
                    "t[i] = value, which cannot be followed. Use torch.cat, torch.where or index_put, "
                    "or method='vmap'"
                )
            # compiled code counts no versions: there, any change of what may be a view is refused
            changes = source.step >= 0 and tensor is args[0] and is_in_place(func)
            hides = changes and torch.compiler.is_compiling() and may_be_view(self.steps[source.step].func)
            if hides or (tensor in self.versions and version_of(tensor) != self.versions[tensor]):
                raise ValueError(
                    f"a tensor that derives from {' and '.join(source.paths)} was changed in place through a "
                    "view, which cannot be followed. Change it by calls that return a new tensor, or use "
                    "method='vmap'"
                )


class Interception(TorchFunctionMode):
    """Hands every call to `calls`."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.calls.meet(func, args, kwargs or {})


def kept_statistics(edge: GradientEdge | None) -> list[Tensor]:
    """Means and inverse deviations that a group normalisation keeps for its backward pass; else nothing."""
    if edge is None or edge.node.name() != "NativeGroupNormBackward0":
        return []
    return [edge.node._saved_result1, edge.node._saved_result2]  # type: ignore[attr-defined]


def tensors_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among a call's arguments, and in lists and tuples among them."""
    found = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend([one for one in value if isinstance(one, Tensor)])
    return found


def refuse_unaligned(
    func: Callable[..., Any], expanded: Tensor, carriers: list[Tensor], paths: tuple[str, ...]
) -> None:
    """Refuse a leaf expanded to as many rows as the batch has samples, where the rows are no samples."""
    if getattr(func, "__name__", "").strip("_") in BROADCASTING and any(
        tensor.ndim > expanded.ndim for tensor in carriers
    ):
        raise ValueError(
            f"{' and '.join(paths)} is expanded to {expanded.shape[0]} rows, as many as the batch has, but "
            "they are no samples. Use another batch size or microbatch=, or method='vmap'"
        )


def _without_padding(
    embedded: Tensor, indices: Tensor, weight: Tensor, padding_idx: int | None = None, *_: Any, **__: Any
) -> Tensor:
    """Constant where it is padding: torch's reverse mode has it so, but not its forward mode."""
    if padding_idx is None:
        return embedded
    is_padding = (indices == padding_idx % weight.shape[0]).unsqueeze(-1)
    return torch.where(is_padding, embedded.detach(), embedded)


def refuse_coupling(args: tuple[Any, ...], kwargs: dict[str, Any], sources: Mapping[Tensor, Source]) -> None:
    """Refuse a batch normalisation by the statistics of the batch."""
    position = 5
    training = args[position] if len(args) > position else kwargs.get("training", False)
    if training and args[0] not in sources:
        raise ValueError(
            "a batch normalisation of this network uses the statistics of the batch (training mode, or "
            "track_running_stats=False), which couples samples: per-sample gradients do not exist. "
            "Use running statistics, or GroupNorm"
        )


def derivation(
    calls: Calls, tensor: Tensor, source: Source, path: str, leaves: Mapping[str, Tensor]
) -> Callable[[Tensor], Tensor]:
    """The function from the leaf `path` to a derived tensor, with the other leaves as in `leaves`."""
    needed = ancestors(calls, source)

    def derive(leaf: Tensor) -> Tensor:
        values: dict[Tensor, Tensor] = {own: leaves[name] for name, own in calls.leaves.items()}
        values[calls.leaves[path]] = leaf
        for step in needed:
            args, kwargs = substitute((step.args, step.kwargs), values)
            outputs = tensors_of((step.func(*args, **kwargs),), {})
            for before, after in zip(step.outputs, outputs, strict=True):
                values[before] = after
        return values[tensor]

    return derive


def ancestors(calls: Calls, source: Source) -> list[Step]:
    """The steps that a derived tensor is made by, in order."""
    wanted, indices = [source], []
    while wanted:
        index = wanted.pop().step
        if index >= 0 and index not in indices:
            indices.append(index)
            wanted.extend(calls.steps[index].inputs)
    return [calls.steps[index] for index in sorted(indices)]


def substitute(value: Any, values: Mapping[Tensor, Tensor]) -> Any:
    """Arguments with tensors exchanged."""
    if isinstance(value, Tensor):
        return values.get(value, value)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple([substitute(one, values) for one in value])
    if isinstance(value, list):
        return [substitute(one, values) for one in value]
    if isinstance(value, dict):
        return {key: substitute(one, values) for key, one in value.items()}
    return value
