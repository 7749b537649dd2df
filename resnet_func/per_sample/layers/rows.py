"""Closed form of what lies between a leaf and a tensor that derives from it filter by filter.

Standardised filters, weight normalisation and gains take every row (filter) of a leaf by itself, and their
Jacobian is a diagonal plus a few outer products a row. It is composed from the calls of the derivation, by
one rule a function; where a function has no rule there is no closed form, and autograd pulls gradients back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_func.autodiff import can_read
from resnet_func.per_sample.intercept import Step, substitute, tensors_of


class RowJacobian(NamedTuple):
    """`d value[c] = diagonal[c] * d leaf[c] + sum_r left_r[c] <right_r[c], d leaf[c]>` for every row c.

    Args:
        diagonal: `[rows, D]`, or None for 0; only where a row of the value has the D entries of a leaf's.
        terms: Pairs `left [rows, K], right [rows, D]`.
    """

    diagonal: Tensor | None
    terms: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def width(self) -> int:
        """K, entries in a row of the value."""
        return (self.terms[0][0] if self.diagonal is None else self.diagonal).shape[1]

    def scale(self, by: Tensor) -> RowJacobian:
        """Of the value times `by [rows, K]`, a constant."""
        diagonal = None if self.diagonal is None else self.diagonal * by
        return RowJacobian(diagonal, tuple([(left * by, right) for left, right in self.terms]))

    def total(self) -> RowJacobian:
        """Of the sum over each row, `[rows, 1]`."""
        parts = [left.sum(1, keepdim=True) * right for left, right in self.terms]
        if self.diagonal is not None:
            parts.append(self.diagonal)
        summed = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
        return RowJacobian(None, ((torch.ones_like(summed[:, :1]), summed),))

    def expand(self, width: int) -> RowJacobian:
        """Of the value with its one column broadcast to `width`."""
        if self.width == width:
            return self
        _need(self.width == 1)
        ((one, right),) = self.total().terms
        return RowJacobian(None, ((one.expand(-1, width), right),))

    def pull_back(self, grads: Tensor) -> Tensor:
        """Gradients `[N, rows, D]` of the leaf from those of the value, `[N, *shape]`."""
        entries = self.terms[0][0] if self.diagonal is None else self.diagonal
        grads = grads.reshape(len(grads), *entries.shape)
        if not self.terms:
            assert self.diagonal is not None
            return grads * self.diagonal
        left = torch.stack([left for left, _ in self.terms], 2)
        right = torch.stack([right for _, right in self.terms], 1)
        products = torch.bmm(grads.transpose(0, 1), left)
        if self.diagonal is None:
            return torch.bmm(products, right).transpose(0, 1)
        pulled = grads * self.diagonal
        if not can_read(pulled):
            return pulled + torch.bmm(products, right).transpose(0, 1)
        pulled.transpose(0, 1).baddbmm_(products, right)  # in place: nothing is written twice
        return pulled


class _NoClosedFormError(Exception):
    """A call that no rule covers."""


def row_jacobian(
    steps: Iterable[Step], tensor: Tensor, leaf: Tensor, values: Mapping[Tensor, Tensor]
) -> RowJacobian | None:
    """The Jacobian of a derived tensor with respect to a leaf, row by row; None without a closed form.

    Args:
        steps: The calls of the derivation, in order.
        tensor: What they end in.
        leaf: As in the calls.
        values: Of the leaves, for the tensors that were in the calls.
    """
    if leaf.ndim == 0 or leaf.numel() == 0:
        return None
    values = dict(values)
    ones = torch.ones_like(values[leaf]).reshape(leaf.shape[0], -1)
    found = {leaf: RowJacobian(ones)}
    try:
        for step in steps:
            call = _replay(step, found, values)
            jacobians = _rule_of(step.func)(call) if call.known else [None] * len(call.outputs)
            for before, after, jacobian in zip(step.outputs, call.outputs, jacobians, strict=True):
                values[before] = after
                if jacobian is not None:
                    found[before] = jacobian
    except _NoClosedFormError:
        return None
    return found.get(tensor)


class _Call(NamedTuple):
    """A step replayed: arguments and outputs as values, and the Jacobians of the arguments that have one."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]
    known: dict[int | str, RowJacobian]
    rows: int

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def entries(self, value: Any) -> Tensor:
        """A number or a tensor, broadcast to the (only) output, as `[rows, K]`."""
        (out,) = self.outputs
        if not isinstance(value, Tensor):
            value = torch.as_tensor(value, dtype=out.dtype, device=out.device)
        return value.expand(out.shape).reshape(self.rows, -1)

    def flat(self, value: Tensor) -> Tensor:
        """A tensor of as many entries as its rows have together, as `[rows, K]`."""
        _need(value.ndim > 0 and value.shape[0] == self.rows)
        return value.reshape(self.rows, -1)


def _replay(step: Step, found: Mapping[Tensor, RowJacobian], values: Mapping[Tensor, Tensor]) -> _Call:
    args, kwargs = substitute((step.args, step.kwargs), values)
    outputs = tensors_of((step.func(*args, **kwargs),), {})
    known = {key: found[value] for key, value in _arguments(step) if value in found}
    inside = [tensor for tensor in tensors_of(step.args, step.kwargs) if tensor in found]
    _need(len(inside) == len(known))  # none in a list
    leaf = next(iter(found))
    return _Call(args, kwargs, outputs, known, leaf.shape[0])


def _arguments(step: Step) -> list[tuple[int | str, Tensor]]:
    pairs: list[tuple[int | str, Any]] = [*enumerate(step.args), *step.kwargs.items()]
    return [(key, value) for key, value in pairs if isinstance(value, Tensor)]


def _need(condition: bool) -> None:
    if not condition:
        raise _NoClosedFormError


def _sum(parts: list[RowJacobian]) -> RowJacobian:
    diagonals = [part.diagonal for part in parts if part.diagonal is not None]
    diagonal = sum(diagonals[1:], diagonals[0]) if diagonals else None
    return RowJacobian(diagonal, tuple([term for part in parts for term in part.terms]))


# --------------------------------------------------------------------------- rules

_Rule: TypeAlias = Callable[[_Call], list[RowJacobian | None]]


def _binary(by_first: Callable[[Any, Any], Any], by_second: Callable[[Any, Any], Any]) -> _Rule:
    """Of `f(x, y)`, entry by entry, from its derivatives."""

    def rule(call: _Call) -> list[RowJacobian | None]:
        _need(not call.kwargs and len(call.args) == 2 and len(call.outputs) == 1)
        (out,) = call.outputs
        _need(out.ndim > 0 and out.shape[0] == call.rows)
        width, parts = out.numel() // call.rows, []
        for index, derivative in enumerate((by_first, by_second)):
            if index in call.known:
                operand = call.args[index]
                _need(operand.ndim == out.ndim and operand.shape[0] == call.rows)
                factor = call.entries(derivative(*call.args))
                parts.append(call.known[index].expand(width).scale(factor))
        return [_sum(parts)]

    return rule


def _unary(derivative: Callable[[Tensor, Tensor], Tensor]) -> _Rule:
    """Of `f(x)`, entry by entry, from its derivative as a function of input and output."""

    def rule(call: _Call) -> list[RowJacobian | None]:
        _need(len(call.args) == 1 and not call.kwargs)
        return [call.known[0].scale(call.flat(derivative(call.args[0], call.outputs[0])))]

    return rule


def _power(call: _Call) -> list[RowJacobian | None]:
    _need(len(call.args) == 2 and isinstance(call.args[1], int | float))
    base, exponent = call.args
    return [call.known[0].scale(call.flat(exponent * base ** (exponent - 1)))]


def _same(call: _Call) -> list[RowJacobian | None]:
    """Of the same entries in another shape."""
    _need(call.outputs[0].numel() == call.args[0].numel())
    return [call.known.get(0)]  # what gives the shape does not count


def _reduction(*kinds: str) -> _Rule:
    """Of sums, means, variances and deviations over all of a row, in the order they are returned."""

    def rule(call: _Call) -> list[RowJacobian | None]:
        x, dims = call.args[0], call.argument(1, "dim")
        _need(set(call.known) == {0} and "dtype" not in call.kwargs)
        _need(isinstance(dims, int | tuple | list) and not isinstance(dims, bool))
        over = {dim % x.ndim for dim in ((dims,) if isinstance(dims, int) else dims)}
        _need(len(over) > 0 and over == set(range(1, x.ndim)) and x.shape[0] == call.rows)
        return [_reduced(kind, call, out) for kind, out in zip(kinds, call.outputs, strict=True)]

    return rule


def _reduced(kind: str, call: _Call, out: Tensor) -> RowJacobian:
    jacobian, entries = call.known[0], call.flat(call.args[0])
    width = entries.shape[1]
    if kind == "sum":
        return jacobian.total()
    if kind == "mean":
        return jacobian.scale(torch.full_like(entries, 1 / width)).total()
    free = width - _correction(call)
    _need(free > 0)
    centred = entries - entries.mean(1, keepdim=True)
    if kind == "var":
        return jacobian.scale(centred * (2 / free)).total()
    return jacobian.scale(centred / (free * out.reshape(-1, 1))).total()


def _correction(call: _Call) -> float:
    unbiased = call.argument(2, "unbiased", True)
    _need(len(call.args) < 4 and isinstance(unbiased, bool))
    correction = call.kwargs.get("correction", 1 if unbiased else 0)
    return 1 if correction is None else correction


def _batch_norm(call: _Call) -> list[RowJacobian | None]:
    """Of filters that are standardised as the channels of one image `[1, rows, ...]`."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    known = {names[key] if isinstance(key, int) else key: value for key, value in call.known.items()}
    x, weight = given["input"], given.get("weight")
    _need(set(known) <= {"input", "weight", "bias"})
    _need(bool(given.get("training", False)) and x.ndim > 2 and x.shape[:2] == (1, call.rows))
    entries = x.reshape(call.rows, -1)
    variance, mean = torch.var_mean(entries, 1, correction=0, keepdim=True)
    inverse = torch.rsqrt(variance + given.get("eps", 1e-5))
    plain, width = (entries - mean) * inverse, entries.shape[1]
    parts = []
    if "input" in known:
        jacobian = known["input"]
        scale = inverse if weight is None else inverse * weight.reshape(-1, 1)
        parts.append(jacobian.scale(scale.expand_as(entries)))
        for direction in (torch.ones_like(plain), plain):
            towards = jacobian.scale(direction / width).total().expand(width)
            parts.append(towards.scale(-scale * direction))
    if "weight" in known:
        parts.append(known["weight"].expand(width).scale(plain))
    if "bias" in known:
        parts.append(known["bias"].expand(width))
    return [_sum(parts)]


def _weight_norm(call: _Call) -> list[RowJacobian | None]:
    """Of `v * g / |v|`, the norm of each row by itself."""
    direction, gain = call.args[:2]
    _need(call.argument(2, "dim", 0) == 0 and gain.numel() == call.rows)
    entries, gains = call.flat(direction), gain.reshape(-1, 1)
    norm = torch.linalg.vector_norm(entries, dim=1, keepdim=True)
    unit, parts = entries / norm, []
    if 0 in call.known:
        jacobian = call.known[0]
        parts.append(jacobian.scale((gains / norm).expand_as(entries)))
        along = jacobian.scale(unit).total().expand(entries.shape[1])
        parts.append(along.scale(-unit * gains / norm))
    if 1 in call.known:
        parts.append(call.known[1].expand(entries.shape[1]).scale(unit))
    return [_sum(parts)]


def _functions(*names: str) -> list[Callable[..., Any]]:
    """What `torch` and its tensors call by these names."""
    found = [getattr(owner, name, None) for owner in (torch, Tensor) for name in names]
    return [function for function in found if function is not None]


def _one(x: Any, y: Any) -> float:
    return 1.0


RULES: dict[Callable[..., Any], _Rule] = {
    **dict.fromkeys(_functions("add", "__add__", "__radd__"), _binary(_one, _one)),
    **dict.fromkeys(_functions("sub", "subtract", "__sub__"), _binary(_one, lambda x, y: -1.0)),
    **dict.fromkeys(_functions("__rsub__"), _binary(lambda x, y: -1.0, _one)),
    **dict.fromkeys(
        _functions("mul", "multiply", "__mul__", "__rmul__"), _binary(lambda x, y: y, lambda x, y: x)
    ),
    **dict.fromkeys(
        _functions("div", "divide", "true_divide", "__truediv__", "__div__"),
        _binary(lambda x, y: 1 / y, lambda x, y: -x / y**2),
    ),
    **dict.fromkeys(_functions("neg", "negative", "__neg__"), _unary(lambda x, out: -torch.ones_like(x))),
    **dict.fromkeys(_functions("sqrt"), _unary(lambda x, out: 0.5 / out)),
    **dict.fromkeys(_functions("rsqrt"), _unary(lambda x, out: -0.5 * out**3)),
    **dict.fromkeys(_functions("reciprocal"), _unary(lambda x, out: -(out**2))),
    **dict.fromkeys(_functions("square"), _unary(lambda x, out: 2 * x)),
    **dict.fromkeys(_functions("exp"), _unary(lambda x, out: out)),
    **dict.fromkeys(_functions("pow", "__pow__"), _power),
    **dict.fromkeys(
        _functions(
            "reshape",
            "view",
            "reshape_as",
            "view_as",
            "flatten",
            "unsqueeze",
            "squeeze",
            "contiguous",
            "clone",
        ),
        _same,
    ),
    **dict.fromkeys(_functions("sum"), _reduction("sum")),
    **dict.fromkeys(_functions("mean"), _reduction("mean")),
    **dict.fromkeys(_functions("var"), _reduction("var")),
    **dict.fromkeys(_functions("std"), _reduction("std")),
    **dict.fromkeys(_functions("var_mean"), _reduction("var", "mean")),
    **dict.fromkeys(_functions("std_mean"), _reduction("std", "mean")),
    **dict.fromkeys((F.batch_norm, torch.batch_norm), _batch_norm),
    torch._weight_norm: _weight_norm,  # pyright: ignore[reportPrivateImportUsage]
}


def _rule_of(function: Callable[..., Any]) -> _Rule:
    rule = RULES.get(function)
    if rule is None:
        raise _NoClosedFormError
    return rule
