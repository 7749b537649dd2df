"""A network and a batch, their results in float64, and how far rounding carries through that network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple
from unittest import SkipTest

import torch
from torch import Tensor

from resnet_func import tree
from resnet_func.testing.assertions import named_leaves
from resnet_func.types import LossFn, Model, Params, State

SLACK = 64  # another order of the same sums, by another kernel: a few times the error that was measured
EPS = torch.finfo(torch.float64).eps


def bounded_loss(logits: Any, y: Any) -> Tensor:
    """A smooth per-sample loss of outputs of any shape; it needs no targets, and is flat almost nowhere."""
    each = [(leaf - 0.5).square().log1p().flatten(1).sum(1) for leaf in tree.leaves(logits)]
    return torch.stack(each).sum(0)


@dataclass(frozen=True)
class Case:
    """A network, a batch, and the same in float64."""

    model: Model
    params: Params
    state: State
    x: Tensor
    y: Any
    loss_fn: LossFn

    def __len__(self) -> int:
        return len(self.x)

    @cached_property
    def double(self) -> Case:
        return self.converted(torch.float64)

    def converted(self, dtype: torch.dtype) -> Case:
        params, state, x = (cast_floating(part, dtype) for part in (self.params, self.state, self.x))
        return Case(self.model, params, state, x, self.y, self.loss_fn)

    def logits(self, x: Tensor | None = None, params: Params | None = None) -> Any:
        """The output in evaluation."""
        given = self.params if params is None else params
        return self.model.apply(given, self.state, self.x if x is None else x, train=False)[0]

    def total_loss(self, params: Params) -> Tensor:
        return self.loss_fn(self.logits(params=params), self.y).sum()

    def gradient(self) -> Params:
        """Of the summed loss, at the parameters."""
        return torch.func.grad(self.total_loss)(self.params)

    @cached_property
    def outputs(self) -> Shadow:
        return Shadow.of(self, lambda case: case.logits())

    @cached_property
    def gradients(self) -> Shadow:
        return Shadow.of(self, Case.gradient)


class Shadow(NamedTuple):
    """A result in float64, and how many roundings the float32 result is away from it, leaf by leaf."""

    exact: Any
    roundings: dict[str, float]

    @classmethod
    def of(cls, case: Case, compute: Callable[[Case], Any]) -> Shadow:
        try:
            exact = compute(case.double)
        except RuntimeError as error:
            raise SkipTest(f"not computed in float64: {first_line(error)}") from error
        single, double = named_leaves(compute(case.converted(torch.float32))), named_leaves(exact)
        unit = torch.finfo(torch.float32).eps
        roundings = {
            name: max(1.0, _largest(single[name] - leaf) / (unit * _scale(leaf)))
            for name, leaf in double.items()
        }
        return cls(exact, roundings)

    def check(self, got: Any, want: Any = None) -> str:
        """`got` is `want` (or the exact result) to rounding: the figure, or an error that names the leaf."""
        a, b = named_leaves(got), named_leaves(self.exact if want is None else want)
        assert a.keys() == b.keys(), f"leaves {', '.join(sorted(a.keys() ^ b.keys()))} on one side only"
        figures = []
        for name, leaf in b.items():
            assert a[name].shape == leaf.shape, f"{name} is {list(a[name].shape)}, not {list(leaf.shape)}"
            error = _largest(a[name] - leaf)
            allowed = self.allowed(name, leaf)
            figures.append((error / allowed if error == error else float("inf"), name, error, allowed))
        assert figures, "there is nothing to compare"
        ratio, name, error, allowed = max(figures)
        subject = "the output" if name == "leaf" else name
        said = f"{subject} is off by {error:.2g}, allowed {allowed:.2g}"
        assert ratio <= 1, said
        return f"at most {error:.2g}, allowed {allowed:.2g}"

    def allowed(self, name: str, leaf: Tensor) -> float:
        return SLACK * EPS * self.roundings[name] * _scale(leaf)

    @property
    def worst(self) -> float:
        return max(self.roundings.values())


def _largest(leaf: Tensor) -> float:
    return leaf.abs().max().item() if leaf.numel() else 0.0


def _scale(leaf: Tensor) -> float:
    return _largest(leaf) or 1.0


def cast_floating(values: Any, dtype: torch.dtype) -> Any:
    """A pytree with its floating leaves in another dtype; whole numbers stay."""
    return tree.map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, values)


def first_line(error: BaseException) -> str:
    """An error in one line of at most 200 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
