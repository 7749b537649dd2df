"""The layers of any network, by running it: its functional calls, in order.

A call is a layer's where it has both a parameter and something that depends on the input. What is computed
from parameters alone (a standardised weight, a reparametrised one) still counts as those parameters.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from resnet_func import tree
from resnet_func.models import winograd
from resnet_func.types import Model, Params, State

# The names of a function's arguments by position, and what kind of layer it is.
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
ARGUMENTS: dict[str, tuple[str, ...]] = {
    **{f"conv{n}d": _CONV for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _TRANSPOSED for n in (1, 2, 3)},
    "linear": ("input", "weight", "bias"),
    "bilinear": ("input1", "input2", "weight", "bias"),
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    "instance_norm": (
        "input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps",
    ),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
    "embedding": ("input", "weight", "padding_idx"),
    "prelu": ("input", "weight"),
    "multi_head_attention_forward": (
        "query", "key", "value", "embed_dim", "num_heads", "in_proj_weight", "in_proj_bias",
        "bias_k", "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias",
    ),
}  # fmt: skip
KINDS = {
    **{f"conv{n}d": "conv" for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": "transposed conv" for n in (1, 2, 3)},
    "linear": "linear",
    "batch_norm": "batch norm",
    "instance_norm": "instance norm",
    "group_norm": "group norm",
    "layer_norm": "layer norm",
    "rms_norm": "rms norm",
    "embedding": "embedding",
    "multi_head_attention_forward": "attention",
}
IN_PLACE = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "truediv": "div", "radd": "add"}


class Values(NamedTuple):
    """Copies of the tensors of a call.

    Attributes:
        inputs: Those it takes that depend on the network's input.
        weights: Those it takes that depend on parameters and buffers alone.
        outputs: Those it gave.
    """

    inputs: list[Tensor]
    weights: list[Tensor]
    outputs: list[Tensor]


class Placeholder(NamedTuple):
    """A tensor of a call: its form, and what it depends on.

    Attributes:
        shape, stride, dtype: Of the tensor.
        depends_on: "input" where on the network's input, "parameters" where on those alone; "nothing" for
            constants and buffers.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    depends_on: Literal["input", "parameters", "nothing"]


class Arguments(NamedTuple):
    """How a function was called, with a `Placeholder` for each tensor.

    Attributes:
        func: What torch or the library was asked for.
        args, kwargs: As given, however nested.
        returned: The form of the (first) tensor returned.
        storage: Whether that has "new" memory, is an argument changed "in place", or is a "view" of one.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    returned: Placeholder
    storage: Literal["new", "in place", "view"]


@dataclass(frozen=True)
class Call:
    """One call of a function that gave tensors computed from the input, or from parameters alone.

    Args:
        index: How many came before.
        paths: Dotted paths of the parameters it uses, also of those an argument was computed from.
        function: torch's name for it, whether in place or not: "conv2d", "linear", "add", ...
        kind: "conv", "transposed conv", "linear", "batch norm", ..., "embedding"; "other" for the rest.
        leaves: Which argument is which parameter, where one is itself: {"weight": "conv1.weight"}.
        options: The arguments that are no tensors, by name where the function is known: {"stride": (2, 2)}.
        weight_shape: Of the argument "weight", of attention's four projections together; None where there
            is none.
        input_shape: Of the first tensor that depends on the input, with the batch; () where none does.
        output_shape: Of the (first) tensor returned, with the batch.
        arguments: How it was called.
        sources: The calls that gave the tensors that depend on the input; None for the network's input.
        values: The tensors themselves, where they were asked for.
    """

    index: int = field(compare=False)
    paths: tuple[str, ...]
    function: str
    kind: str
    leaves: Mapping[str, str]
    options: Mapping[str, Any]
    weight_shape: tuple[int, ...] | None
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    arguments: Arguments = field(compare=False, repr=False)
    sources: tuple[Call | None, ...] = field(compare=False, repr=False)
    values: Values | None = field(default=None, compare=False, repr=False)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a convolution or linear maps, without biases; of an empty batch per image.

        Of attention only the projections count, as from and to as many tokens.
        """
        if self.weight_shape is None:
            return 0
        match self.kind:
            case "conv":  # every output pixel uses every weight once
                positions = (self.output_shape[0], *self.output_shape[-(len(self.weight_shape) - 2) :])
            case "transposed conv":
                positions = (self.input_shape[0], *self.input_shape[-(len(self.weight_shape) - 2) :])
            case "linear" | "attention":
                positions = self.output_shape[:-1]
            case _:
                return 0
        return math.prod(self.weight_shape) * math.prod(max(size, 1) for size in positions)


def record_calls(model: Model, params: Params, state: State, x: Tensor) -> list[Call]:
    """Every call with a parameter in one forward pass, `train=False`, in order.

    A parameter used twice is in two calls; one that is not used is in none. Functions that torch composes of
    others (`F.multi_head_attention_forward`) are one call. An empty batch `x [0, ...]` has every shape and
    computes nothing, where the network can run one.

    Args:
        model: Any model whose parameters are a nested dict of tensors.
        params, state: Its parameters and state.
        x: Its input.

    >>> from resnet_func import resnet20
    >>> model = resnet20()
    >>> calls = record_calls(model, *model.init(torch.Generator()), torch.zeros(0, 3, 32, 32))
    >>> calls[0].function, calls[0].paths, calls[0].output_shape
    ('conv2d', ('conv1.weight',), (0, 16, 32, 32))
    """
    calls = record_all_calls(model, params, state, x, train=False)
    return [call for call in calls if call.paths and call.sources]


def record_all_calls(model: Model, params: Params, state: State, x: Tensor, *, train: bool) -> list[Call]:
    """Every call of a forward pass that depends on the input or on parameters, in order.

    Args:
        model, params, state, x: As in `record_calls`.
        train: The network's mode.

    >>> from resnet_func import resnet20
    >>> model = resnet20()
    >>> params, state = model.init(torch.Generator(), device="meta")
    >>> calls = record_all_calls(model, params, state, torch.zeros(2, 3, 32, 32, device="meta"), train=True)
    >>> [call.function for call in calls[:3]]
    ['conv2d', 'batch_norm', 'relu']
    """
    with torch.no_grad(), _Recorder(tree.flatten(params), x) as recorder:
        model.apply(params, state, x, train=train)
    return recorder.calls


def record_values(model: Model, params: Params, state: State, x: Tensor, *, train: bool) -> list[Call]:
    """Every call of a forward pass that depends on the input, with its tensors; the output's comes last.

    Args:
        model, params, state, x: As in `record_calls`; buffers count as parameters.
        train: The network's mode.

    >>> from resnet_func import resnet20
    >>> model = resnet20()
    >>> x = torch.zeros(2, 3, 32, 32)
    >>> *_, last = record_values(model, *model.init(torch.Generator()), x, train=False)
    >>> last.function, last.values.outputs[0].shape
    ('linear', torch.Size([2, 10]))
    """
    leaves = {**tree.flatten(params), **tree.flatten(state)}
    with torch.no_grad(), _Recorder(leaves, x, values=True) as recorder:
        model.apply(params, state, x, train=train)
    return [call for call in recorder.calls if call.sources]


class _Recorder(TorchFunctionMode):
    """Follows what comes from the input and what from parameters alone, by the tensors' ids."""

    def __init__(self, leaves: Mapping[str, Tensor], x: Tensor, *, values: bool = False) -> None:
        super().__init__()
        self.values = values
        self.leaf = {id(leaf): path for path, leaf in leaves.items()}
        self.derived = {id(leaf): (path,) for path, leaf in leaves.items()}  # of what parameters alone make
        self.source: dict[int, Call | None] = {id(x): None}  # of what depends on the input
        self.kept: list[Any] = [*leaves.values(), x]  # an id is a tensor's only as long as it lives
        self.calls: list[Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs)))
        inputs = [tensor for tensor in given if id(tensor) in self.source]
        weights = [tensor for tensor in given if id(tensor) in self.derived and id(tensor) not in self.source]
        paths = tuple(dict.fromkeys(path for tensor in weights for path in self.derived[id(tensor)]))
        # before the call, which may work in place
        sources = tuple([self.source[id(tensor)] for tensor in inputs])
        shape, written = _shape_of(inputs), [_version(tensor) for tensor in given]
        placed = tree.map(self._placeholder, (args, kwargs))
        before = (_copies(inputs), _copies(weights)) if self.values else None
        result = func(*args, **kwargs)
        returned = list(_tensors(result))
        self.kept += returned
        if returned and (inputs or paths):
            changed = written != [_version(tensor) for tensor in given]
            storage = "in place" if changed else "view" if _shares_memory(returned[0], given) else "new"
            values = None if before is None else Values(*before, _copies(returned))
            output = self._placeholder(returned[0])._replace(depends_on="input" if inputs else "parameters")
            arguments = Arguments(func, placed[0], placed[1], output, storage)
            shapes = (shape, tuple(returned[0].shape))
            self.calls.append(self._call(func, args, kwargs, paths, *shapes, arguments, sources, values))
        if inputs:
            self.source |= {id(tensor): self.calls[-1] for tensor in returned}
        elif paths:
            self.derived |= {id(tensor): paths for tensor in returned if id(tensor) not in self.leaf}
        return result

    def _placeholder(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        on_parameters = "parameters" if id(value) in self.derived else "nothing"
        depends_on = "input" if id(value) in self.source else on_parameters
        return Placeholder(tuple(value.shape), value.stride(), value.dtype, depends_on)

    def _call(
        self,
        func: Callable[..., Any],
        args: Any,
        kwargs: Any,
        paths: tuple[str, ...],
        input_shape: tuple[int, ...],
        output_shape: tuple[int, ...],
        arguments: Arguments,
        sources: tuple[Call | None, ...],
        values: Values | None,
    ) -> Call:
        name = _name(func)
        bound = _bind(func, name, args, kwargs)
        leaves = {key: self.leaf[id(value)] for key, value in bound.items() if id(value) in self.leaf}
        ignored = {"inplace", "out"}
        options = {
            key: value
            for key, value in bound.items()
            if value is not None and key not in ignored and not _has_tensor(value)
        }
        kind = KINDS.get(name, "other")
        weight = bound.get("weight")
        weight_shape = tuple(weight.shape) if isinstance(weight, Tensor) else None
        if kind == "attention":
            weight_shape = (4 * bound["embed_dim"], bound["embed_dim"])
        shapes = (weight_shape, input_shape, output_shape)
        return Call(len(self.calls), paths, name, kind, leaves, options, *shapes, arguments, sources, values)


def _name(func: Callable[..., Any]) -> str:
    if func is winograd.convolution:  # takes what F.conv2d takes
        return "conv2d"
    name = getattr(func, "__name__", str(func)).strip("_")
    return IN_PLACE.get(name, name)


def _bind(func: Callable[..., Any], name: str, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments by name, with defaults where the function tells; by position where it tells nothing."""
    if name in ARGUMENTS:
        names = ARGUMENTS[name]
        return {**dict(zip((*names, *map(str, range(len(names), len(args)))), args, strict=False)), **kwargs}
    try:
        arguments = inspect.signature(func).bind(*args, **kwargs)
    except (TypeError, ValueError):  # built in
        return {**{str(index): value for index, value in enumerate(args)}, **kwargs}
    arguments.apply_defaults()
    passed_on = arguments.arguments.pop("kwargs", {})  # of functions that only pass them on
    return {**arguments.arguments, **passed_on}


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def _shape_of(tensors: list[Tensor]) -> tuple[int, ...]:
    return tuple(tensors[0].shape) if tensors else ()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _shares_memory(tensor: Tensor, others: list[Tensor]) -> bool:
    memory = tensor.untyped_storage()._cdata
    return any(other.untyped_storage()._cdata == memory for other in others)


def _has_tensor(value: Any) -> bool:
    return next(_tensors(value), None) is not None


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in arguments or results, however nested in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
