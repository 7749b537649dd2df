"""The layers of any network, by running it: every call that takes a parameter, in order.

A call is a layer's where it has both a parameter and something that depends on the input. What is computed
from parameters alone (a standardised weight, a reparametrised one) still counts as those parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Call:
    """One call of a function with parameters in it.

    Args:
        paths: Dotted paths of the parameters it uses, also of those an argument was computed from.
        function: torch's name for it: "conv2d", "linear", "add", ...
        kind: "conv", "transposed conv", "linear", "batch norm", ..., "embedding"; "other" for the rest.
        leaves: Which argument is which parameter, where one is itself: {"weight": "conv1.weight"}.
        options: The arguments that are no tensors, by name where the function is known: {"stride": (2, 2)}.
        weight_shape: Of the argument "weight", of attention's four projections together; None where there
            is none.
        input_shape: Of the first tensor that depends on the input, with the batch.
        output_shape: Of the (first) tensor returned, with the batch.
    """

    paths: tuple[str, ...]
    function: str
    kind: str
    leaves: Mapping[str, str]
    options: Mapping[str, Any]
    weight_shape: tuple[int, ...] | None
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

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
    with torch.no_grad(), _Recorder(tree.flatten(params), x) as recorder:
        model.apply(params, state, x, train=False)
    return recorder.calls


class _Recorder(TorchFunctionMode):
    """Follows what comes from the input and what from parameters alone, by the tensors' ids."""

    def __init__(self, leaves: Mapping[str, Tensor], x: Tensor) -> None:
        super().__init__()
        self.leaf = {id(leaf): path for path, leaf in leaves.items()}
        self.sources = {id(leaf): (path,) for path, leaf in leaves.items()}  # of what parameters alone make
        self.data = {id(x)}
        self.kept: list[Any] = [*leaves.values(), x]  # an id is a tensor's only as long as it lives
        self.calls: list[Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs)))
        data = [tensor for tensor in given if id(tensor) in self.data]
        paths = tuple(dict.fromkeys(path for t in given for path in self.sources.get(id(t), ())))
        shape = tuple(data[0].shape) if data else ()
        result = func(*args, **kwargs)
        returned = list(_tensors(result))
        self.kept += returned
        if data:
            self.data |= {id(tensor) for tensor in returned}
            # an in-place call may have put data into what was a parameter's
            for tensor in returned:
                self.sources.pop(id(tensor), None)
        elif paths:
            self.sources |= {id(tensor): paths for tensor in returned if id(tensor) not in self.leaf}
        if data and paths and returned:
            self.calls.append(self._call(func, args, kwargs, paths, shape, tuple(returned[0].shape)))
        return result

    def _call(
        self, func: Any, args: Any, kwargs: Any, paths: tuple[str, ...], input_shape: Any, output_shape: Any
    ) -> Call:
        # the convolution of winograd.wrap takes what F.conv2d takes
        name = "conv2d" if func is winograd.convolution else getattr(func, "__name__", str(func)).strip("_")
        names = ARGUMENTS.get(name, ())
        bound = {**dict(zip((*names, *map(str, range(len(names), len(args)))), args, strict=False)), **kwargs}
        leaves = {key: self.leaf[id(value)] for key, value in bound.items() if id(value) in self.leaf}
        options = {key: value for key, value in bound.items() if value is not None and not _has_tensor(value)}
        kind = KINDS.get(name, "other")
        weight = bound.get("weight")
        weight_shape = tuple(weight.shape) if isinstance(weight, Tensor) else None
        if kind == "attention":
            weight_shape = (4 * bound["embed_dim"], bound["embed_dim"])
        return Call(paths, name, kind, leaves, options, weight_shape, input_shape, output_shape)


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
