"""Gradients that can be differentiated exactly where somebody does, and hold no graph elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vmap
from torch.profiler import ProfilerActivity, profile

from resnet_func import tree
from resnet_func.autodiff import detach_leaves, is_differentiated, is_ordinary, value_and_grad

X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(2, 4, 3)
AT = torch.tensor([0.3, -0.7, 1.1, 0.2], dtype=torch.float64)
RATE = torch.tensor(0.1, dtype=torch.float64)


def normalised(weight: Tensor) -> tuple[Tensor, tuple[()]]:
    """Through GroupNorm, whose backward kernel has no forward mode."""
    return (torch.group_norm(weight[:, None] * X, 2, eps=1e-5) * X.sin()).pow(3).sum(), ()


def steps(rate: Tensor, weight: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """The loss after two steps of gradient descent on the scaled loss."""

    def loss(weight: Tensor) -> tuple[Tensor, tuple[()]]:
        return scale * normalised(weight)[0], ()

    for _ in range(2):
        weight = weight - rate * value_and_grad(loss, weight).grad
    return normalised(weight)[0]


def slope(fn: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """A central difference."""
    step = 1e-6
    return (fn(at + step) - fn(at - step)) / (2 * step)


def test_value_gradient_and_what_came_along() -> None:
    def fn(tree: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return (tree["a"] ** 2 + tree["b"]), tree["a"] + 1

    a = torch.tensor([1.0, 2.0])
    value, gradient, aux = value_and_grad(fn, {"a": a, "b": torch.tensor([3.0, 4.0])})
    assert value.tolist() == [4.0, 8.0]
    assert {name: leaf.tolist() for name, leaf in gradient.items()} == {"a": [2.0, 4.0], "b": [1.0, 1.0]}
    assert aux.tolist() == [2.0, 3.0]


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "grad": grad(lambda rate: steps(rate, AT)),
    "jacrev": jacrev(lambda rate: steps(rate, AT)),
    "jvp": lambda rate: jvp(lambda r: steps(r, AT), (rate,), (torch.ones_like(rate),))[1],
    "grad-of-vmap": grad(lambda rate: vmap(lambda w: steps(rate, w))(AT[None])[0]),
    "jvp-of-vmap": lambda rate: jvp(
        lambda r: vmap(lambda w: steps(r, w))(AT[None])[0], (rate,), (torch.ones_like(rate),)
    )[1],
    "vmap-of-grad": lambda rate: vmap(grad(lambda r: steps(r, AT)))(rate[None])[0],
    "vmap-of-jvp": lambda rate: vmap(lambda r: jvp(lambda q: steps(q, AT), (r,), (torch.ones_like(r),))[1])(
        rate[None]
    )[0],
}


@pytest.mark.parametrize("way", WAYS)
def test_an_outer_transform_differentiates_through_it(way: str) -> None:
    expected = slope(lambda rate: steps(rate, AT), RATE)
    assert expected.abs() > 0.1
    torch.testing.assert_close(WAYS[way](RATE), expected, rtol=1e-5, atol=0)


def test_what_the_function_closes_over_is_differentiated_too() -> None:
    scale = torch.tensor(1.3, dtype=torch.float64)
    expected = slope(lambda s: steps(RATE, AT, s), scale)
    torch.testing.assert_close(grad(lambda s: steps(RATE, AT, s))(scale), expected, rtol=1e-5, atol=0)
    scale.requires_grad_()
    (got,) = torch.autograd.grad(steps(RATE, AT, scale), scale)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


def test_second_derivatives_are_torchs() -> None:
    want = jacrev(grad(lambda w: normalised(w)[0]))(AT)
    got = jacrev(lambda w: value_and_grad(normalised, w).grad)(AT)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("required", [False, True])
def test_a_graph_is_kept_only_where_one_is_needed(required: bool) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        result = value_and_grad(normalised, AT.clone().requires_grad_(required))
    assert result.grad.requires_grad == required
    # autograd's own formula is a dozen operations; the kernel is what plain autograd takes
    kernel = "aten::native_group_norm_backward"
    assert (kernel in {event.key for event in watched.key_averages()}) != required


def test_no_grad_is_respected() -> None:
    with torch.no_grad():
        assert not value_and_grad(normalised, AT.clone().requires_grad_()).grad.requires_grad


# --------------------------------------------------------------------------- leaves that require grad


def test_what_requires_grad_by_itself_is_detached() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    leaf, plain = torch.ones(2, requires_grad=True), torch.ones(2)
    got = detach_leaves({"parameter": parameter, "leaf": leaf, "plain": plain, "none": None})
    assert not any(tensor.requires_grad for tensor in tree.leaves(got))
    assert got["plain"] is plain
    assert got["parameter"].data_ptr() == parameter.data_ptr()
    assert parameter.requires_grad
    assert leaf.requires_grad


def test_what_was_computed_or_is_being_differentiated_is_kept() -> None:
    leaf = torch.ones(2, dtype=torch.float64, requires_grad=True)
    computed = 2 * leaf
    assert detach_leaves({"w": computed})["w"] is computed

    def squares(w: Tensor) -> Tensor:
        return detach_leaves({"w": w})["w"].square().sum()

    at = torch.tensor([1.0, -3.0], dtype=torch.float64)
    for of in (at, torch.nn.Parameter(at)):
        assert torch.equal(grad(squares)(of).detach(), 2 * at)
        assert torch.equal(jvp(squares, (of,), (torch.ones_like(at),))[1].detach(), (2 * at).sum())
        assert torch.equal(vmap(grad(squares))(of[None])[0].detach(), 2 * at)


MODES: dict[str, Callable[[Callable[[Tensor], Tensor]], object]] = {
    "grad": lambda fn: grad(fn)(RATE),
    "jvp": lambda fn: jvp(fn, (RATE,), (torch.ones_like(RATE),)),
    "vmap-in-grad": lambda fn: grad(lambda r: vmap(fn)(r[None]).sum())(RATE),
    "vmap-of-grad": lambda fn: vmap(grad(fn))(RATE[None]),
    "autograd": lambda fn: fn(RATE.clone().requires_grad_()),
}


@pytest.mark.parametrize("mode", MODES)
def test_who_differentiates_is_noticed(mode: str) -> None:
    answers: list[bool] = []

    def fn(rate: Tensor) -> Tensor:
        answers.append(is_differentiated(rate * 2))
        return rate * 2

    MODES[mode](fn)
    assert answers == [True]


def test_nobody_who_differentiates_is_noticed() -> None:
    answers: list[bool] = []

    def fn(rate: Tensor) -> Tensor:
        answers.append(is_differentiated(rate * 2))
        return rate * 2

    fn(RATE)
    vmap(fn)(RATE[None])
    with torch.no_grad():
        fn(RATE.clone().requires_grad_())
    assert answers == [False, False, False]


# --- ordinary autograd, where nobody looks on ---


def squares(params: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    return (params["w"] * x).square().sum(), x * params["w"]


@pytest.fixture
def vjps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often `torch.func.vjp` was called."""
    calls: list[int] = []
    vjp = torch.func.vjp
    monkeypatch.setattr(torch.func, "vjp", lambda *args, **kwargs: calls.append(1) or vjp(*args, **kwargs))
    return calls


def gradient_of_squares(w: Tensor, x: Tensor, hidden: Tensor | None = None) -> Tensor:
    def fn(params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        value, aux = squares(params, x)
        return (value if hidden is None else value * hidden), aux

    return value_and_grad(fn, {"w": w, "unused": w.clone()}, others=x).grad["w"]


def test_ordinary_autograd_gives_the_same(vjps: list[int]) -> None:
    w, x = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5])
    value, grad, aux = value_and_grad(lambda p: squares(p, x), {"w": w, "unused": w}, others=x)
    assert not vjps
    assert torch.equal(grad["w"], 2 * w * x * x)
    assert torch.equal(grad["unused"], torch.zeros(2))
    assert not any(tensor.requires_grad for tensor in (value, grad["w"], grad["unused"], aux))
    assert not w.requires_grad
    with torch.no_grad():
        assert torch.equal(gradient_of_squares(w, x), grad["w"])
        assert torch.equal(gradient_of_squares(w, x.clone().requires_grad_()), grad["w"])
    constant = value_and_grad(lambda p: (x.sum(), x), {"w": w}, others=x)
    assert torch.equal(constant.grad["w"], torch.zeros(2))
    assert not vjps


def test_whoever_looks_on_gets_the_derivative(vjps: list[int]) -> None:
    """Through the primals, through what was named, and through what was not."""
    w, x, one = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5]), torch.ones(())
    want = 4 * w * x
    assert torch.equal(torch.func.jacrev(lambda x: gradient_of_squares(w, x).sum())(x), want)
    assert torch.equal(torch.func.jvp(lambda x: gradient_of_squares(w, x), (x,), (x,))[1], want * x)
    assert torch.equal(torch.func.grad(lambda w: gradient_of_squares(w, x).sum())(w), 2 * x * x)
    by_hidden = (2 * w * x * x).sum()
    assert torch.equal(torch.func.grad(lambda h: gradient_of_squares(w, x, h).sum())(one), by_hidden)
    leaf, hidden = x.clone().requires_grad_(), one.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(gradient_of_squares(w, leaf).sum(), leaf)[0], want)
    assert torch.equal(torch.autograd.grad(gradient_of_squares(w, x, hidden).sum(), hidden)[0], by_hidden)
    stacked = torch.func.vmap(lambda h: gradient_of_squares(w, x, h))(torch.tensor([1.0, 2.0]))
    assert torch.equal(stacked, torch.stack([2 * w * x * x, 4 * w * x * x]))
    assert len(vjps) >= 7


def test_inference_tensors_are_left_to_vjp() -> None:
    with torch.inference_mode():
        w = torch.ones(2)
    assert not is_ordinary(w)


def test_a_parameter_that_requires_grad_is_differentiated() -> None:
    """As any tensor that does, where it is a primal and where it was named."""
    w, x = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5])
    owned, named = torch.nn.Parameter(w), torch.nn.Parameter(x)
    assert not is_ordinary({"w": owned})
    assert is_ordinary(torch.nn.Parameter(w, requires_grad=False))
    assert torch.equal(torch.autograd.grad(gradient_of_squares(owned, x).sum(), owned)[0], 2 * x * x)
    assert torch.equal(torch.autograd.grad(gradient_of_squares(w, named).sum(), named)[0], 4 * w * x)


class TimesItself(torch.autograd.Function):
    """Half the square, whose backward pass gives the very tensor that it kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x * x).sum() / 2

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return ctx.saved_tensors[0]


def test_no_gradient_requires_grad_itself() -> None:
    w = torch.tensor([1.0, -2.0])
    found = value_and_grad(lambda p: (TimesItself.apply(p), p), w, others=())
    assert torch.equal(found.grad, w)
    assert not any(tensor.requires_grad for tensor in found)
