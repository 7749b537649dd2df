"""The networks as functions: pure, and open to every transform of torch.func."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import resnet_func as rf
from resnet_func import tree
from resnet_func.losses import cross_entropy
from resnet_func.testing import assert_trees_near, generator, randn
from resnet_func.types import Model, Params
from tests.per_sample.cases import CLASSES
from tests.per_sample.cases import small as small_config

FP64 = torch.float64
SIZE = 8


def small(**changes: Any) -> Model:
    return rf.build(small_config(**changes))


def batch(n: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    return randn(n, 3, SIZE, SIZE, seed=seed, dtype=FP64), torch.arange(n) % CLASSES


def start(model: Model, seed: int = 0) -> tuple[Params, Params]:
    return model.init(generator(seed), dtype=FP64)


def objective(model: Model, *, train: bool) -> Callable[[Params], Tensor]:
    """The mean loss as a function of the parameters alone."""
    (x, y), (_, state) = batch(), start(model)
    return lambda params: cross_entropy(model.apply(params, state, x, train=train)[0], y).mean()


def direction(params: Params, seed: int) -> Params:
    draw = generator(seed)
    return tree.map(lambda leaf: torch.randn(leaf.shape, generator=draw, dtype=leaf.dtype), params)


@pytest.mark.parametrize("block", ["basic", "bottleneck", "preact"])
def test_a_zero_initialised_block_is_its_shortcut(block: str) -> None:
    """With all blocks the identity (and the stem's output not negative), the depth does not matter."""
    kind = {"block": block, "shortcut": "pad", "norm": "group", "zero_init_residual": True}
    shallow, deep = (small(**kind, depths=depths) for depths in ((1, 1), (3, 2)))
    params, state = start(deep)
    kept = {
        path: leaf for path, leaf in tree.flatten(params).items() if ".1." not in path and ".2." not in path
    }
    x, _ = batch()
    want, _ = shallow.apply(tree.unflatten(kept), state, x, train=True)
    got, _ = deep.apply(params, state, x, train=True)
    assert torch.equal(got, want)
    away = tree.map(lambda leaf: leaf + 0.1, params)
    assert not torch.equal(deep.apply(away, state, x, train=True)[0], want)


# --------------------------------------------------------------------------- transforms


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_an_ensemble_by_vmap_is_the_loop(norm: str, train: bool) -> None:
    model, (x, _) = small(norm=norm), batch()
    members = [start(model, seed) for seed in range(3)]
    params, state = tree.map(lambda *leaves: torch.stack(leaves), *members)
    logits, after = vmap(lambda p, s: model.apply(p, s, x, train=train))(params, state)
    for k, member in enumerate(members):
        want, want_state = model.apply(*member, x, train=train)
        torch.testing.assert_close(logits[k], want, rtol=1e-10, atol=1e-12)
        for got, leaf in zip(tree.leaves(after), tree.leaves(want_state), strict=True):
            torch.testing.assert_close(got[k], leaf, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_grad_is_plain_autograd(train: bool) -> None:
    model = small(norm="batch")
    params, _ = start(model)
    leaves = tree.map(lambda leaf: leaf.clone().requires_grad_(), params)
    objective(model, train=train)(leaves).backward()
    got = grad(objective(model, train=train))(params)
    assert all(torch.equal(a, b.grad) for a, b in zip(tree.leaves(got), tree.leaves(leaves), strict=True))


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_forward_mode_is_the_limit_of_differences(norm: str) -> None:
    """`Jv` is the limit of differences; that `<u, Jv> = <J'u, v>` is a law (testing/laws.py)."""
    model, (x, _) = small(norm=norm), batch()
    params, state = start(model)

    def f(params: Params) -> Tensor:
        return model.apply(params, state, x, train=True)[0]

    v = direction(params, 2)
    _, forward = jvp(f, (params,), (v,))
    step = 1e-6
    ahead, behind = (f(tree.map(lambda p, d, s=s: p + s * d, params, v)) for s in (step, -step))
    torch.testing.assert_close(forward, (ahead - behind) / (2 * step), rtol=1e-4, atol=1e-4)


def test_jacobians_agree_with_rows_of_gradients() -> None:
    model, (x, _) = small(), batch(2)
    params, state = start(model)
    head, body = params["fc"], {name: leaf for name, leaf in params.items() if name != "fc"}

    def f(head: Params) -> Tensor:
        return model.apply({**body, "fc": head}, state, x, train=False)[0]

    backward, forward = jacrev(f)(head), jacfwd(f)(head)
    assert_trees_near(backward, forward)
    row = grad(lambda p: f(p)[1, 2])(head)
    assert_trees_near(tree.map(lambda j: j[1, 2], backward), row)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_hessian_vector_products(norm: str) -> None:
    """Forward over reverse, reverse over reverse, and double backward agree; the Hessian is symmetric."""
    model = small(norm=norm)
    f, (params, _) = objective(model, train=True), start(model)
    u, v = direction(params, 4), direction(params, 5)

    def product(v: Params) -> Params:
        return jvp(grad(f), (params,), (v,))[1]

    hv = product(v)
    assert_trees_near(hv, grad(lambda p: tree.dot(grad(f)(p), v))(params))
    torch.testing.assert_close(tree.dot(u, hv), tree.dot(v, product(u)), rtol=1e-9, atol=1e-11)
    leaves = tree.map(lambda leaf: leaf.clone().requires_grad_(), params)
    first = torch.autograd.grad(f(leaves), tree.leaves(leaves), create_graph=True)
    pairing = torch.stack([(g * d).sum() for g, d in zip(first, tree.leaves(v), strict=True)]).sum()
    second = torch.autograd.grad(pairing, tree.leaves(leaves))
    for got, want in zip(tree.leaves(hv), second, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_hessian_of_the_head() -> None:
    model = small()
    f, (params, _) = objective(model, train=False), start(model)
    full = hessian(lambda bias: f({**params, "fc": {**params["fc"], "bias": bias}}))(params["fc"]["bias"])
    torch.testing.assert_close(full, full.T, rtol=0, atol=1e-14)
    assert float(torch.linalg.eigvalsh(full).min()) > -1e-12  # cross-entropy is convex in the logits


def test_batch_statistics_refuse_vmap_over_samples() -> None:
    model, (x, y) = small(norm="batch"), batch()
    params, state = start(model)

    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model.apply(params, state, x[None], train=True)[0], y[None]).sum()

    with pytest.raises(ValueError, match="instance norm.*norm='group'"):
        vmap(grad(loss), in_dims=(None, 0, 0))(params, x, y)


def test_functional_call_of_a_module_around_it() -> None:
    """A network of ours inside somebody's module: its parameters are `functional_call`'s."""

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones((), dtype=FP64))

        def forward(self, params: Params, state: Params, x: Tensor) -> Tensor:
            return self.scale * model.apply(params, state, x, train=False)[0]

    model, (x, _) = small(), batch()
    params, state = start(model)
    doubled = functional_call(
        Scaled(), {"scale": torch.tensor(2.0, dtype=FP64)}, (params, state, x), strict=True
    )
    assert torch.equal(doubled, 2 * model.apply(params, state, x, train=False)[0])


# --------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 1, 8, 8), "3"),
        (torch.zeros(3, 8, 8), "[3, 8, 8]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "uint8"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.float16), "float16"),
    ],
    ids=["channels", "rank", "integers", "half"],
)
def test_wrong_images_are_named(x: Tensor, message: str) -> None:
    model = small()
    params, state = model.init(generator(0))
    with pytest.raises(ValueError, match=re.escape(message)):
        model.apply(params, state, x, train=False)


def test_one_sample_of_one_pixel_has_no_batch_statistics() -> None:
    model = small(norm="batch", depths=(1, 1, 1, 1), widths=(4, 4, 4, 4))
    params, state = model.init(generator(0))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model.apply(params, state, torch.zeros(1, 3, 8, 8), train=True)
    model.apply(params, state, torch.zeros(1, 3, 8, 8), train=False)


def test_an_empty_batch_has_empty_logits() -> None:
    model = small()
    params, state = model.init(generator(0))
    assert model.apply(params, state, torch.zeros(0, 3, 8, 8), train=False)[0].shape == (0, CLASSES)
