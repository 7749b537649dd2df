"""Minimal filtering against the definition: exact where its maps are, else in float64; transforms too."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import resnet_func as rf
from parity.rounding import LayerNoise, assert_rounded
from parity.steps import function_step
from resnet_func import tree
from resnet_func.models import winograd
from resnet_func.testing import assert_trees_close, assert_trees_near, batches, dyadic_tensors, models, randn

FP64 = torch.float64
COTANGENT = randn(4, 3, seed=0, dtype=FP64)
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))


def both(function: Any, *arguments: Tensor) -> dict[str, Tensor]:
    """The result for a random cotangent, and both gradients."""
    leaves = [leaf.clone().requires_grad_() for leaf in arguments]
    y = function(*leaves)
    grads = torch.autograd.grad(y, leaves, randn(*y.shape, seed=9, dtype=y.dtype))
    return {"y": y.detach(), "x": grads[0], "weight": grads[1]}


def direct(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=1)


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it paid for every convolution that it can do."""
    monkeypatch.setattr(winograd, "cheapest_tile", lambda *_: 4)
    monkeypatch.setattr(winograd, "product_pays", lambda *_: True)


# --- one convolution ---


@given(st.data(), SHAPES, st.integers(1, 5))
def test_tile_2_is_exact_on_integers(data: st.DataObject, shape: tuple[int, ...], c_out: int) -> None:
    x = data.draw(dyadic_tensors(shape, largest=16))
    weight = data.draw(dyadic_tensors((c_out, shape[1], 3, 3), largest=16))
    assert torch.equal(winograd.conv2d(x, weight, 2), direct(x, weight))


@pytest.mark.parametrize("tile", winograd.POINTS)
@given(shape=SHAPES, c_out=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_is_the_convolution_and_its_gradients(
    tile: winograd.Tile, shape: tuple[int, ...], c_out: int, seed: int
) -> None:
    x, weight = randn(*shape, seed=seed, dtype=FP64), randn(c_out, shape[1], 3, 3, seed=seed + 1, dtype=FP64)
    got = both(lambda x, weight: winograd.conv2d(x, weight, tile), x, weight)
    assert_trees_near(got, both(direct, x, weight), rtol=1e-12)


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def amplification(maps: winograd.Maps) -> float:
    """How much larger a relative error of the tile's products is in the output, for white images and filters.

    A product's variance is that of its image times that of its filter; the map to the output adds variances.
    """
    into, filters, out = (one.square() for one in maps)
    return (out @ (into.sum(1) * filters.sum(1))).mean().div(9).sqrt().item()


def rounding_limit(maps: winograd.Maps, channels: int, tiles: int) -> float:
    """What the steps round, each measured alone on this machine, amplified by the steps after it."""

    def error(left: Tensor, right: Tensor) -> float:
        return relative_error(left.float() @ right.float(), left @ right)

    def random(*shape: int) -> Tensor:
        return randn(*shape, seed=len(shape)).double()

    points = len(maps.input)
    transforms = error(maps.input, random(points, tiles)) + error(maps.weight, random(9, channels**2))
    products = error(random(points, tiles, channels), random(points, channels, channels))
    return amplification(maps) * (transforms + products) + error(maps.output, random(points, tiles))


@pytest.mark.parametrize("tile", winograd.POINTS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_rounds_no_more_than_its_steps_do(tile: winograd.Tile, layout: torch.memory_format) -> None:
    x = randn(4, 128, 16, 16, seed=0).contiguous(memory_format=layout)
    weight = randn(128, 128, 3, 3, seed=1).contiguous(memory_format=layout)
    got = relative_error(winograd.conv2d(x, weight, tile), direct(x.double(), weight.double()))
    assert got <= rounding_limit(winograd.MAPS[tile], 128, 4 * (16 // tile) ** 2)


def usual_maps(monkeypatch: pytest.MonkeyPatch) -> winograd.Maps:
    with monkeypatch.context() as patch:
        patch.setitem(winograd.POINTS, 4, (0, 1, -1, 2, -2))
        return winograd._maps(4)


def test_the_points_amplify_less_than_half_of_what_the_usual_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert amplification(winograd.MAPS[4]) < amplification(usual_maps(monkeypatch)) / 2


def test_the_limit_tells_other_points_and_other_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = randn(4, 128, 16, 16, seed=0), randn(128, 128, 3, 3, seed=1)
    oracle, limit = direct(x.double(), weight.double()), rounding_limit(winograd.MAPS[4], 128, 64)
    assert relative_error(winograd.conv2d(x.bfloat16().float(), weight), oracle) > limit
    monkeypatch.setitem(winograd.MAPS, 4, usual_maps(monkeypatch))
    assert relative_error(winograd.conv2d(x, weight), oracle) > limit


@pytest.mark.parametrize("tile", winograd.POINTS)
def test_under_every_transform(tile: winograd.Tile) -> None:
    x, weight = randn(3, 2, 4, 5, 6, seed=0, dtype=FP64), randn(3, 4, 4, 3, 3, seed=1, dtype=FP64)

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return winograd.conv2d(x, weight, tile)

    def derived(function: Any) -> dict[str, Tensor]:
        def loss(x: Tensor, weight: Tensor) -> Tensor:
            return function(x, weight).pow(3).sum()

        return {
            "vmap": torch.func.vmap(function)(x, weight),
            "vmap(grad)": torch.func.vmap(torch.func.grad(loss, 1))(x, weight),
            "jvp": torch.func.jvp(function, (x[0], weight[0]), (x[1], weight[1]))[1],
            "hessian": torch.func.hessian(loss, 1)(x[0], weight[0]),
        }

    assert_trees_near(derived(convolve), derived(direct), rtol=1e-11)


def test_gradient_is_checked_by_differences() -> None:
    x = randn(1, 2, 3, 5, seed=0, dtype=FP64).requires_grad_()
    weight = randn(2, 2, 3, 3, seed=1, dtype=FP64).requires_grad_()
    assert torch.autograd.gradcheck(winograd.conv2d, (x, weight))
    assert torch.autograd.gradgradcheck(winograd.conv2d, (x, weight))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("side", [8, 9])
def test_the_result_lies_in_memory_as_that_of_a_convolution(n: int, side: int) -> None:
    x = torch.ones(n, 3, side, side).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(4, 3, 3, 3)
    wanted = F.conv2d(x, weight.contiguous(memory_format=torch.channels_last), padding=1).stride()
    assert winograd.conv2d(x, weight, 4).stride() == wanted


def test_no_image_is_no_error() -> None:
    assert winograd.conv2d(torch.zeros(0, 3, 8, 8), torch.ones(5, 3, 3, 3)).shape == (0, 5, 8, 8)


# --- the choice ---


@given(st.integers(1, 128), st.integers(1, 512), st.integers(1, 512), st.integers(1, 64))
def test_choice_saves_multiplications(n: int, c_in: int, c_out: int, size: int) -> None:
    tile = winograd.cheapest_tile(n, c_in, c_out, size, size)
    if tile:
        points, tiles = (tile + 2) ** 2, n * (-(-size // tile)) ** 2
        assert points * tiles < 9 * n * size * size


def test_choice_follows_the_measurements() -> None:
    assert winograd.cheapest_tile(128, 16, 16, 32, 32) is None
    assert winograd.cheapest_tile(128, 64, 64, 8, 8) is None  # so a ResNet-20 keeps its bits
    assert winograd.cheapest_tile(500, 64, 64, 8, 8) is None
    assert winograd.cheapest_tile(32, 64, 64, 32, 32) is None
    assert winograd.cheapest_tile(32, 128, 128, 16, 16) == 4
    assert winograd.cheapest_tile(32, 256, 256, 8, 8) == 4
    assert winograd.cheapest_tile(32, 512, 512, 4, 4) == 2  # the filters are the most of it
    assert winograd.cheapest_tile(1, 512, 512, 4, 4) is None


def test_choice_of_products_follows_the_measurements() -> None:
    assert winograd.product_pays(1024, 256, 14, 14)
    assert winograd.product_pays(2048, 512, 7, 7)
    assert winograd.product_pays(128, 256, 8, 8)
    assert not winograd.product_pays(512, 128, 28, 28)
    assert not winograd.product_pays(128, 512, 28, 28)
    assert not winograd.product_pays(64, 256, 56, 56)
    assert not winograd.product_pays(64, 128, 16, 16)
    assert not winograd.product_pays(32, 64, 8, 8)  # so a ResNet-20 with projections keeps its bits


@given(SHAPES, st.integers(1, 5), st.sampled_from([1, 2, 3, (1, 2), [2, 1]]))
def test_a_product_is_the_1x1_convolution(shape: tuple[int, ...], c_out: int, stride: Any) -> None:
    x, weight = randn(*shape, seed=0, dtype=FP64), randn(c_out, shape[1], 1, 1, seed=1, dtype=FP64)
    asked: list[tuple[int, ...]] = []

    def record(*given: Any) -> bool:
        asked.append(given[:-1])  # not the speeds
        return True

    def product(x: Tensor, weight: Tensor) -> Tensor:
        with winograd._Convolutions(products=True):
            return F.conv2d(x, weight, stride=stride)

    def convolution(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, stride=stride)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "product_pays", record)
        got = both(product, x, weight)
    want = both(convolution, x, weight)
    assert asked == [(shape[1], c_out, *want["y"].shape[2:])]
    assert_trees_near(got, want, rtol=1e-12)


def test_products_are_for_training(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(winograd, "product_pays", lambda *given: bool(asked.append(given[:-1])))
    model = winograd.wrap(rf.resnet20(norm="group", shortcut="projection"))
    params, state = model.init(torch.Generator().manual_seed(0))
    model.apply(params, state, randn(2, 3, 32, 32, seed=0), train=False)
    assert not asked
    model.apply(params, state, randn(2, 3, 32, 32, seed=0), train=True)
    assert asked == [(16, 32, 16, 16), (32, 64, 8, 8)]


# --- networks ---


@settings(max_examples=15)
@given(models(dtype=FP64), batches(dtype=FP64), st.booleans())
def test_wrapped_networks_are_the_same(network: Any, batch: Any, train: bool) -> None:
    """As near as the network's condition allows: BatchNorm of two pixels amplifies any rounding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "cheapest_tile", lambda *_: 4)
        patch.setattr(winograd, "product_pays", lambda *_: True)
        model, params, state = network
        step = partial(
            function_step,
            params=params,
            state=state,
            x=batch.x,
            cotangent=COTANGENT[: len(batch.x)],
            train=train,
        )
        got = step(winograd.wrap(model))
        assert_rounded(got, lambda: step(model), 1e-12)  # the bound of one convolution alone, above


def test_modules_are_wrapped_too(everywhere: None) -> None:
    model, params, state = rf.from_module(torchvision.models.resnet18(num_classes=4).double().eval())
    x = randn(2, 3, 33, 40, seed=0, dtype=FP64)
    want, _ = model.apply(params, state, x, train=False)
    got, _ = winograd.wrap(model).apply(params, state, x, train=False)
    assert not torch.equal(got, want)  # it did take them
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_per_sample_gradients_of_a_wrapped_network(everywhere: None) -> None:
    model = rf.resnet20(norm="group", num_classes=4)
    params, state = model.init(torch.Generator().manual_seed(0), dtype=FP64)
    x, y = randn(3, 3, 8, 8, seed=0, dtype=FP64), torch.tensor([0, 1, 3])
    for transform in (rf.per_sample.norms, rf.per_sample.grads):
        want = transform(model, rf.losses.cross_entropy)(params, state, x, y)
        got = transform(winograd.wrap(model), rf.losses.cross_entropy)(params, state, x, y)
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((4, 4, 3, 3), {"padding": 1, "stride": 2}),
        ((4, 4, 3, 3), {"padding": 1, "stride": (1, 2)}),
        ((4, 4, 3, 3), {"padding": 2, "dilation": 2}),
        ((4, 4, 3, 3), {"padding": 0}),
        ((4, 4, 3, 3), {"padding": "same"}),
        ((4, 2, 3, 3), {"padding": 1, "groups": 2}),
        ((4, 4, 5, 5), {"padding": 1}),
        ((4, 4, 3, 1), {"padding": 1}),
        ((4, 4, 1, 1), {"padding": 1}),
        ((4, 4, 1, 1), {"padding": "same"}),
        ((4, 2, 1, 1), {"groups": 2}),
        ((4, 4, 1, 3), {}),
    ],
)
def test_other_convolutions_stay(everywhere: None, shape: tuple[int, ...], settings: dict[str, Any]) -> None:
    x, weight = randn(2, 4, 8, 8, seed=0), randn(*shape, seed=1)
    with winograd._Convolutions(products=True):
        got = F.conv2d(x, weight, **settings)
    assert torch.equal(got, F.conv2d(x, weight, **settings))


@pytest.mark.parametrize("padding", [1, (1, 1), [1, 1]])
def test_a_convolution_is_taken_however_it_is_called(everywhere: None, padding: Any) -> None:
    x, weight, bias = (randn(*shape, seed=0, dtype=FP64) for shape in ((2, 4, 7, 8), (5, 4, 3, 3), (5,)))
    with winograd._Convolutions(products=True):
        got = F.conv2d(x, weight, bias, padding=padding)
    want = F.conv2d(x, weight, bias, padding=padding)
    assert not torch.equal(got, want)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_half_precision_stays(everywhere: None) -> None:
    x, weight = randn(2, 4, 8, 8, seed=0), randn(4, 4, 3, 3, seed=1)
    for dtype in (torch.bfloat16, torch.float16):
        with winograd._Convolutions(products=True):
            got = F.conv2d(x.to(dtype), weight.to(dtype), padding=1)
        assert torch.equal(got, F.conv2d(x.to(dtype), weight.to(dtype), padding=1))
    with torch.autocast("cpu", torch.bfloat16), winograd._Convolutions(products=True):
        got = F.conv2d(x, weight, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(got, F.conv2d(x, weight, padding=1))


@pytest.mark.parametrize(("channels", "groups"), [(3, 1), (4, 2)])
def test_errors_are_those_of_torch(everywhere: None, channels: int, groups: int) -> None:
    with winograd._Convolutions(products=True), pytest.raises(RuntimeError, match="channels"):
        F.conv2d(torch.zeros(1, channels, 8, 8), torch.zeros(4, 4, 3, 3), padding=1, groups=groups)


@pytest.mark.nightly
def test_a_compiled_step_is_one_graph_and_the_same() -> None:
    model = rf.build(rf.ResNetConfig(block="basic", depths=(1,), widths=(128,), stem="cifar", num_classes=4))
    optimizer = rf.optim.sgd(0.1, momentum=0.9)
    params, state = model.init(torch.Generator().manual_seed(0))
    train_state = rf.train.init_train_state(params, state, optimizer)
    x, y = randn(8, 3, 16, 16, seed=0), torch.arange(8) % 4
    assert winograd.cheapest_tile(8, 128, 128, 16, 16)

    def compiled(model: rf.Model) -> rf.Params:
        step = rf.train.make_train_step(model, rf.losses.cross_entropy, optimizer)
        return torch.compile(step, fullgraph=True, dynamic=False)(train_state, x, y)[0].params

    exact = tree.map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, train_state)
    plain = rf.train.make_train_step(model, rf.losses.cross_entropy, optimizer)
    want = plain(exact, x.double(), y)[0].params
    with LayerNoise(rounding_limit(winograd.MAPS[4], 128, 8 * (16 // 4) ** 2)):
        noisy = plain(exact, x.double(), y)[0].params
    # what the compiler does to the network as it is, and what tiles round beyond that
    allowed = tree.map(
        lambda want, same, noisy: (want + (same - want).abs().max() + (noisy - want).abs().max()).float(),
        *(want, compiled(model), noisy),
    )
    assert_trees_close(compiled(winograd.wrap(model)), allowed, want)
