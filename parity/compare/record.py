"""The functional calls of a forward pass, whatever wrote the network: leaves, options, inputs, outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from resnet_func import tree
from resnet_func.types import Model, Params, State

CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
# built into torch, without a signature to inspect
ARGUMENTS = {f"conv{rank}d": CONVOLUTION for rank in (1, 2, 3)} | {
    f"conv_transpose{rank}d": TRANSPOSED for rank in (1, 2, 3)
}
IN_PLACE = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "truediv": "div", "radd": "add"}


@dataclass(frozen=True, eq=False)
class Call:
    """One call that gave tensors computed from the images.

    Args:
        index: How many came before.
        name: Of the function, without the underscores that say it works in place.
        leaves: The parameters and buffers it takes, as they are or derived, in the order of its arguments.
        options: Its other arguments by name, or position.
        inputs: Copies of the tensors it takes that depend on the images.
        weights: Copies of those that depend on leaves alone.
        sources: The calls that gave the inputs; None for the images.
        outputs: Copies of what it gave.
    """

    index: int
    name: str
    leaves: tuple[str, ...]
    options: dict[str, Any]
    inputs: list[Tensor]
    weights: list[Tensor]
    sources: list[Call | None]
    outputs: list[Tensor]


class Recorder(TorchFunctionMode):
    """Keeps a `Call` for every outermost functional call; what a call does inside is not looked at."""

    def __init__(self, leaves: Mapping[str, Tensor], x: Tensor) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.source: dict[int, Call | None] = {id(x): None}  # of tensors that depend on the images
        self.derived: dict[int, tuple[str, ...]] = {id(leaf): (name,) for name, leaf in leaves.items()}
        self.alive: list[Any] = [x, *leaves.values()]  # so that no id is given twice

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree.leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        inputs = [leaf for leaf in given if id(leaf) in self.source]
        weights = [leaf for leaf in given if id(leaf) in self.derived and id(leaf) not in self.source]
        # before the call, which may work in place; outside this mode, which is off in here
        sources = [self.source[id(leaf)] for leaf in inputs]
        copies, derived = _copies(inputs), _copies(weights)
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree.leaves(result) if isinstance(leaf, Tensor)]
        leaves = tuple(dict.fromkeys(name for leaf in weights for name in self.derived[id(leaf)]))
        self.alive.append(made)
        if inputs and made:
            options = _options(func, args, kwargs)
            call = Call(
                len(self.calls), _name(func), leaves, options, copies, derived, sources, _copies(made)
            )
            self.calls.append(call)
            self.source.update({id(leaf): call for leaf in made})
        elif leaves:
            self.derived.update({id(leaf): leaves for leaf in made})
        return result


def record(model: Model, params: Params, state: State, x: Tensor, *, train: bool) -> list[Call]:
    """The calls of a forward pass, in order, the output's last."""
    leaves = {**tree.flatten(params), **tree.flatten(state)}
    with torch.no_grad(), Recorder(leaves, x) as recorder:
        model.apply(params, state, x, train=train)
    return recorder.calls


def _copies(leaves: list[Tensor]) -> list[Tensor]:
    return [leaf.detach().clone() for leaf in leaves]


def _name(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", str(func)).strip("_")
    return IN_PLACE.get(name, name)


def _options(func: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments that are no tensors, by name."""
    name = _name(func)
    if name in ARGUMENTS:
        bound = {**dict(zip(ARGUMENTS[name], args, strict=False)), **kwargs}
    else:
        try:
            arguments = inspect.signature(func).bind(*args, **kwargs)
            arguments.apply_defaults()
            passed_on = arguments.arguments.pop("kwargs", {})  # of functions that only pass them on
            bound = {**arguments.arguments, **passed_on}
        except (TypeError, ValueError):  # built in
            bound = {**{str(index): value for index, value in enumerate(args)}, **kwargs}
    ignored = {"inplace", "out"}
    return {
        key: value
        for key, value in bound.items()
        if key not in ignored and not any(isinstance(leaf, Tensor) for leaf in tree.leaves(value))
    }
