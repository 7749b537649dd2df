"""What a training step does: the operations of forward and backward pass, and how to run one alone.

The operations are the calls that the network makes, recorded as it runs; so each is timed with the shapes,
the memory layout and the dtype that it has in the step. Real tensors tell all of that; meta tensors tell the
shapes and layouts, and cost nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

import optree
import torch
from torch import Tensor

from resnet_func import tree
from resnet_func.models.layer_calls import Arguments, Call, Placeholder, record_all_calls
from resnet_func.models.summary import describe
from resnet_func.types import Model, Params, State

Phase = Literal["forward", "backward", "input gradient", "weight gradient"]

KINDS = ("forward", "input gradient", "weight gradient", "attention", "normalisation", "elementwise")
MATRIX_LAYERS = ("conv", "transposed conv", "linear")
NORMS = ("batch norm", "group norm", "instance norm", "layer norm", "rms norm")
PRODUCTS = ("scaled_dot_product_attention", "matmul", "bmm", "baddbmm", "einsum")  # of activations
# Each argument's gradient is the cotangent, or a part of it, as it is.
PASS_THROUGH = ("add", "sub", "cat")
# The gradient needs no argument's values.
LINEAR_MAPS = (
    "mean", "sum", "pad", "getitem", "expand", "to", "float", "avg_pool2d", "adaptive_avg_pool2d", "clone",
)  # fmt: skip
# For points on the picture alone: no one counts them to a model's FLOPs. Forward: the mean, the variance
# about it, and y = x * scale + shift; backward: two sums over g, and dx from g, x and the two.
NORM_FLOPS = {"forward": 6, "backward": 8}


@dataclass(frozen=True)
class Operation:
    """What one call does in one phase; equal ones, which are timed once, have the same arguments.

    Args:
        function: The call's, as `Call` names it.
        phase: Which gradients are computed in the backward ones: all, or the inputs' or the weights' alone.
        layer: The call's kind, as `Call` names it.
        what: The layer and its input in a few words.
        macs: Multiply-accumulates, of layers that are matrix products.
        arguments: How to call it.
    """

    function: str
    phase: Phase
    layer: str
    what: str = field(compare=False)
    macs: int = field(compare=False)
    arguments: Arguments = field(compare=False, repr=False)
    key: str = field(repr=False)  # the arguments, comparable

    @property
    def kind(self) -> str:
        """One of `KINDS`; pooling, padding and casts count as elementwise."""
        if self.layer in MATRIX_LAYERS:
            return self.phase
        if self.layer == "attention" or self.function in PRODUCTS:
            return "attention"
        return "normalisation" if self.layer in NORMS else "elementwise"

    @property
    def placeholders(self) -> list[Placeholder]:
        """The tensors among the arguments."""
        return list(_placeholders((self.arguments.args, self.arguments.kwargs)))

    @property
    def inputs(self) -> list[Placeholder]:
        """Those that depend on the network's input; where none does, those that depend on parameters."""
        on_input = [each for each in self.placeholders if each.depends_on == "input"]
        return on_input or self.weights

    @property
    def weights(self) -> list[Placeholder]:
        """Those that depend on parameters alone."""
        return [each for each in self.placeholders if each.depends_on == "parameters"]


Steps = Iterator[tuple[str, Operation]]  # each with the dotted path of its layer


def operations(
    model: Model, params: Params, state: State, x: Tensor, *, casts: bool = False
) -> list[tuple[str, Operation]]:
    """Every operation of forward and backward pass with its layer's path; the loss is left out.

    A call without parameters has the path of the layer before it, and its own name after a space. Nobody
    asks for the gradient of `x`, and a gradient that is the cotangent as it is takes no operation; where a
    tensor is used twice, its gradients are added up. Views take none, but for the gradient of a part.

    Args:
        model, params, state: Any network.
        x: A batch; on meta tensors nothing is computed.
        casts: With the casts of weights, which autocast makes once a step, and those of their gradients.

    >>> import resnet_func as rf
    >>> model = rf.resnet20()
    >>> params, state = model.init(torch.Generator(), device="meta")
    >>> ops = operations(model, params, state, torch.zeros(2, 3, 32, 32, device="meta"))
    >>> [(path, op.function, op.phase) for path, op in ops[:4]]
    [('conv1', 'conv2d', 'forward'), ('conv1', 'conv2d', 'weight gradient'), \
('bn1', 'batch_norm', 'forward'), ('bn1', 'batch_norm', 'backward')]
    """
    calls = record_all_calls(model, params, state, x, train=True)
    trained = _calls_with_gradient(calls)
    uses = Counter(
        source.index for call in calls if call.index in trained for source in call.sources if source
    )
    steps: list[tuple[str, Operation]] = []
    layer, cast = "", set[str]()
    for call in calls:
        if call.paths and call.sources:
            layer = call.paths[0].rpartition(".")[0] or call.function
        path = layer if call.paths else f"{layer} {call.function}"
        if casts and _is_cast(call):
            own = set(call.leaves.values())
            steps += [] if own and own <= cast else _casts(path, call)
            cast |= own
            call = _with_narrow_weights(call)
        steps += [(path, _operation(call, phase)) for phase in _phases(call, trained)]
        if call.index in trained and not _is_part(call):
            added = _sum_of(call.arguments.returned)
            steps += [(f"{path} branches", added)] * (uses[call.index] - 1)
    return steps


def _calls_with_gradient(calls: list[Call]) -> set[int]:
    """The calls, by index, whose outputs have a gradient: a parameter is behind them."""
    found: set[int] = set()
    for call in calls:
        behind = bool(call.paths) or any(source.index in found for source in call.sources if source)
        if behind and call.arguments.returned.dtype.is_floating_point:
            found.add(call.index)
    return found


def _phases(call: Call, trained: set[int]) -> Iterator[Phase]:
    view = call.arguments.storage == "view"
    if not view:
        yield "forward"
    if call.index not in trained or (view and not _is_part(call)) or _passes_through(call):
        return
    if call.kind not in MATRIX_LAYERS:
        yield "backward"
        return
    if any(source is not None and source.index in trained for source in call.sources):
        yield "input gradient"
    if call.paths:
        yield "weight gradient"


def _is_part(call: Call) -> bool:
    """Whether a view has fewer or more entries than what it is of."""
    arguments = call.arguments
    first = next(_placeholders((arguments.args, arguments.kwargs)))
    return arguments.storage == "view" and prod(first.shape) != prod(arguments.returned.shape)


def _passes_through(call: Call) -> bool:
    tensors = _placeholders((call.arguments.args, call.arguments.kwargs))
    alike = all(tensor.shape == call.output_shape for tensor in tensors)
    return call.function in PASS_THROUGH and (alike or call.function == "cat")


def _operation(call: Call, phase: Phase) -> Operation:
    arguments, macs = call.arguments, call.macs
    key = repr((arguments.args, arguments.kwargs, arguments.returned, arguments.storage))
    return Operation(call.function, phase, call.kind, _what(call), macs, arguments, key)


def _what(call: Call) -> str:
    """The layer and its input in a few words, such as `conv 3x3/2 64→128, 32 px`."""
    given = call.input_shape or call.output_shape
    side = f", {given[2]} px" if len(given) == 4 else ""
    if call.kind in MATRIX_LAYERS and call.weight_shape is not None:
        channel = -1 if call.kind == "linear" else 1
        return f"{describe(call)} {given[channel]}→{call.output_shape[channel]}{side}"
    shape = given[1] if len(given) == 4 else "x".join(map(str, given[1:]))
    return f"{describe(call).replace('_', ' ')} {shape}{side}"


def _sum_of(tensor: Placeholder) -> Operation:
    """Two gradients of a tensor added up."""
    tensor = tensor._replace(depends_on="input")
    arguments = Arguments(torch.add, (tensor, tensor), {}, tensor, "new")
    return _operation(_call("add", arguments), "forward")


# --------------------------------------------------------------------------- autocast


def _is_cast(call: Call) -> bool:
    """Whether autocast narrows a layer's parameters: normalisation takes them as they are."""
    wide = [each for each in _placeholders(call.arguments.args) if each.depends_on == "parameters"]
    narrow = call.arguments.returned.dtype.itemsize
    return call.kind in MATRIX_LAYERS and any(each.dtype.itemsize > narrow for each in wide)


def _casts(path: str, call: Call) -> list[tuple[str, Operation]]:
    steps: list[tuple[str, Operation]] = []
    arguments = call.arguments
    for weight in _placeholders((arguments.args, arguments.kwargs)):
        if weight.depends_on == "parameters":
            weight = weight._replace(depends_on="input")
            narrow = weight._replace(dtype=arguments.returned.dtype)
            made = _call("to", Arguments(Tensor.to, (weight, narrow.dtype), {}, narrow, "new"))
            steps += [(f"{path} cast", _operation(made, phase)) for phase in ("forward", "backward")]
    return steps


def _with_narrow_weights(call: Call) -> Call:
    dtype = call.arguments.returned.dtype

    def narrow(value: Any) -> Any:
        parameter = _is_placeholder(value) and value.depends_on == "parameters"
        return value._replace(dtype=dtype) if parameter else value

    both: Any = (call.arguments.args, call.arguments.kwargs)
    args, kwargs = optree.tree_map(narrow, both, is_leaf=_is_placeholder)
    return replace(call, arguments=call.arguments._replace(args=args, kwargs=kwargs))


def _call(function: str, arguments: Arguments) -> Call:
    """A call that autograd or autocast makes, not the network."""
    shapes = (arguments.args[0].shape, arguments.returned.shape)
    return Call(0, (), function, "other", {}, {}, None, *shapes, arguments, ())


# --------------------------------------------------------------------------- FLOPs and bytes


def flops_of(op: Operation) -> int:
    """Two for each multiply-accumulate of convolutions and linear layers; else a nominal few an element.

    Of attention the products of all phases count, of `einsum` the entries alone.
    """
    times = 2 if op.phase == "backward" else 1
    if op.layer in (*MATRIX_LAYERS, "attention"):
        return 2 * op.macs * (times if op.layer == "attention" else 1)
    shapes = [each.shape for each in op.placeholders]
    if op.function == "scaled_dot_product_attention":  # queries by keys, weights by values
        return times * 4 * prod(shapes[0]) * shapes[1][-2]
    if op.function in ("matmul", "bmm"):
        return times * 2 * prod(op.arguments.returned.shape) * shapes[0][-1]
    count = prod(op.inputs[0].shape)
    return NORM_FLOPS[op.phase] * count if op.kind == "normalisation" else count


def bytes_of(op: Operation) -> int:
    """The least bytes that move: inputs, outputs and weights once; pixels that a stride skips do not."""
    x, y = sum(map(_bytes, op.inputs)), _bytes(op.arguments.returned)
    weights = sum(map(_bytes, op.weights)) if op.inputs is not op.weights else 0
    if op.layer == "conv":
        (given, *_), (weight, *_) = op.inputs, op.weights
        groups = given.shape[1] // weight.shape[1]
        read = y // weight.shape[0] * weight.shape[1] * groups * prod(weight.shape[2:])
        return weights + y + (x if op.phase == "input gradient" else min(x, read))
    if op.function == "max_pool2d":  # keeps the index of each maximum, in 8 bytes
        return x + y + 8 * prod(op.arguments.returned.shape)
    if op.layer in MATRIX_LAYERS or op.phase == "forward":
        return x + y + weights
    # the cotangent, the gradients, and the values that they need
    kept = 0 if op.function in LINEAR_MAPS else x + sum(map(_bytes, op.weights[:1]))
    return y + x + weights + kept


def _bytes(tensor: Placeholder) -> int:
    return prod(tensor.shape) * tensor.dtype.itemsize


def _placeholders(arguments: Any) -> Iterator[Placeholder]:
    leaves = optree.tree_leaves(arguments, is_leaf=_is_placeholder)
    return (leaf for leaf in leaves if _is_placeholder(leaf))


def _is_placeholder(value: Any) -> bool:
    return isinstance(value, Placeholder)


# --------------------------------------------------------------------------- one alone


def make_call(op: Operation, device: torch.device) -> Callable[[], Any]:
    """One operation on random tensors of its own form; a backward phase computes the gradients it names."""
    generator = torch.Generator().manual_seed(0)
    arguments, backward = op.arguments, op.phase != "forward"
    in_place = arguments.storage == "in place"

    def make(value: Any) -> Any:
        if not isinstance(value, Placeholder):
            return value
        tensor = _random(value, generator, device)
        differentiable = value.dtype.is_floating_point and value.depends_on != "nothing"
        # what is changed in place must not be a leaf of autograd
        return tensor.requires_grad_(differentiable and (backward or not in_place))

    both: Any = (arguments.args, arguments.kwargs)
    args, kwargs = optree.tree_map(make, both, is_leaf=_is_placeholder)
    if not backward:
        return lambda: arguments.func(*args, **kwargs)
    leaves = _wanted(op, [leaf for leaf in tree.leaves((args, kwargs)) if isinstance(leaf, Tensor)])
    args = tree.map(_clone, args) if in_place else args
    result = arguments.func(*args, **kwargs)
    y = next(tensor for tensor in tree.leaves(result) if isinstance(tensor, Tensor))
    cotangent = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, leaves, cotangent, retain_graph=True)


def _wanted(op: Operation, tensors: list[Tensor]) -> list[Tensor]:
    """The tensors whose gradients a phase computes."""
    origins = {"input gradient": ["input"], "weight gradient": ["parameters"]}.get(
        op.phase, ["input", "parameters"]
    )
    pairs = zip(op.placeholders, tensors, strict=True)
    return [leaf for place, leaf in pairs if leaf.requires_grad and place.depends_on in origins]


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _random(tensor: Placeholder, generator: torch.Generator, device: torch.device) -> Tensor:
    """Numbers where the network has numbers; ones in masks, zeros in indices."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride, strict=True))
    memory = torch.zeros(max(size, 0), dtype=tensor.dtype)
    if tensor.dtype is torch.bool:
        memory.fill_(True)
    elif tensor.dtype.is_floating_point:
        positive = tensor.depends_on == "nothing"  # running variances, say
        memory.uniform_(generator=generator) if positive else memory.normal_(generator=generator)
    return memory.to(device).as_strided(tensor.shape, tensor.stride)
