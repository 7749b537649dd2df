"""Every quick cell; that a changed network is caught, and its place named; and what a match is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from parity.cell import Cell, run
from parity.sections import graphs
from parity.sections.graphs import trace
from parity.sections.isomorphism import Side, Trace, Walk, assert_isomorphic
from parity.steps import function_step
from resnet_func.models import blocks, layers, resnet, zoo
from resnet_func.models.blocks import Scope, shortcut
from resnet_func.models.config import ResNetConfig
from resnet_func.testing import generator
from resnet_func.types import Model, Params, State

# --------------------------------------------------------------------------- the cells


@pytest.mark.parametrize("cell", graphs.cells(quick=True), ids=lambda cell: cell.path)
def test_cell(cell: Cell) -> None:
    result = run(cell)
    assert result.outcome == "passed", result.said
    assert int(result.said.split()[1]) > 200
    assert ("swapped" in result.said) == (result.row != "resnet18")  # torchvision's branches run in our order
    smallest = 33 if result.row == "resnet18" else 5
    assert result.said.endswith(sizes(smallest, pools=result.row == "resnet18"))


@lru_cache
def pooling_splits_sizes() -> bool:
    """Whether torch's rule for the shape of a pooled image asks what is left over, as 2.11's does.

    A trace through a pooling then stands only for the sizes of which as much is left over.
    """

    def pool(params: Params, state: State, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
        return {"logits": F.max_pool2d(x, 3, 2, 1)}

    return any("Mod" in str(guard) for guard in traced(pool).guards)


def sizes(smallest: int, *, pools: bool) -> str:
    """How the verdict ends for images from the smallest on, as far as torch's own rules let it be said."""
    largest = max(graphs.LARGE)
    if pools and pooling_splits_sizes():
        return f", N >= 2, H, W from {largest} to {largest + 1}"
    return f", N >= 2, H, W >= {smallest}"


def test_every_network_has_its_cells() -> None:
    names = [cell.name for cell in graphs.cells(quick=False)]
    assert len(set(names)) == len(names)
    for name in zoo.ZOO:
        ways = ("", "from_module-") if name in zoo.IMAGENET else ("",)
        assert {f"{name}/{way}{mode}" for way in ways for mode in ("train", "eval")} <= set(names)


# --------------------------------------------------------------------------- changed networks

NAMES = {"basic": "resnet18", "bottleneck": "resnet50"}


def one_block_a_stage(block: str) -> Model:
    return zoo.by_name(NAMES[block], depths=(1, 1, 1, 1))


def built(block: str, images: graphs.Images = graphs.LARGE) -> Trace:
    """Our network of one block a stage."""
    model = one_block_a_stage(block)
    params, state = model.init(generator(0), device="meta")
    return trace(partial(function_step, model, train=True), params, state, images)


@lru_cache
def stock(block: str) -> Trace:
    """torchvision's network of one block a stage."""
    with torch.device("meta"):
        module = ResNet({"basic": BasicBlock, "bottleneck": Bottleneck}[block], [1, 1, 1, 1])
    params, state = one_block_a_stage(block).init(generator(0), device="meta")
    return trace(partial(graphs.module_step, module, train=True), params, state, graphs.LARGE)


def respecified(block: str, **changes: dict[str, int]) -> Any:
    """Our networks with other convolutions in one block, `layer2` for instance."""
    layer_specs = resnet.layer_specs

    def specs(config: ResNetConfig) -> resnet.Specs:
        made = layer_specs(config)
        for name, change in changes.items():
            made[block]["0"][name] = replace(made[block]["0"][name], **change)
        return made

    return mock.patch.object(resnet, "layer_specs", specs)


def reblocked(block: Callable[[Scope, Tensor], Tensor]) -> Any:
    return mock.patch.dict(blocks.BLOCKS, basic=block)


def without_last_relu(layer: Scope, x: Tensor) -> Tensor:
    y = F.relu(layer("bn1", layer("conv1", x)))
    return layer("bn2", layer("conv2", y)) + shortcut(layer, x)


def without_inner_relu(layer: Scope, x: Tensor) -> Tensor:
    y = layer("bn2", layer("conv2", layer("bn1", layer("conv1", x))))
    return F.relu(y + shortcut(layer, x))


def terms_swapped(layer: Scope, x: Tensor) -> Tensor:
    y = F.relu(layer("bn1", layer("conv1", x)))
    y = layer("bn2", layer("conv2", y))
    return F.relu(shortcut(layer, x) + y)


def no_gradient_through_shortcuts(layer: Scope, x: Tensor) -> Tensor:
    y = F.relu(layer("bn1", layer("conv1", x)))
    y = layer("bn2", layer("conv2", y))
    return F.relu(y + shortcut(layer, x.detach()))


def counting_twice(params: Params, state: State, x: Tensor, *, train: bool) -> tuple[Tensor, State]:
    y, after = BATCH_NORM(params, state, x, train=train)
    return y, {**after, "num_batches_tracked": after["num_batches_tracked"] + 1}


BATCH_NORM = layers.batch_norm

# The block, the change, where it is found first (from the logits backwards), and what is found.
CHANGES = {
    "padding": (
        "basic",
        respecified("layer1", conv1={"padding": 2}, conv2={"padding": 0}),
        "logits, near layer1.0.conv2.weight: argument 4.0 is 0 and 1: convolution.default(",
    ),
    "stride-of-version-1": (
        "bottleneck",
        respecified("layer3", conv1={"stride": 2}, conv2={"stride": 1}),
        "logits, near layer3.0.conv2.weight: argument 3.0 is 1 and 2: convolution.default(",
    ),
    "momentum": (
        "basic",
        mock.patch.object(layers, "BATCH_NORM_MOMENTUM", 0.9),
        "logits, near layer4.0.bn2.weight: argument 6 is 0.9 and 0.1: _native_batch_norm_legit",
    ),
    "last-relu": (
        "basic",
        reblocked(without_last_relu),
        "logits, near layer4.0.bn2.weight: the operations differ: add.Tensor(",
    ),
    "inner-relu": (
        "basic",
        reblocked(without_inner_relu),
        "logits, near layer4.0.bn1.weight: the operations differ: getitem(",
    ),
    "residual-order": (
        "basic",
        reblocked(terms_swapped),
        "logits, near layer4.0.downsample.0.weight and layer4.0.conv2.weight: argument 3.0 is 2 and 1: ",
    ),
    "counter": (
        "basic",
        mock.patch.object(layers, "batch_norm", counting_twice),
        "buffer bn1.num_batches_tracked, near bn1.num_batches_tracked: the operations differ: ",
    ),
    "gradient": (
        "basic",
        reblocked(no_gradient_through_shortcuts),
        "gradient x, near layer1.0.conv1.weight: the operations differ: getitem(",
    ),
}


@pytest.mark.parametrize("block", NAMES)
def test_networks_of_one_block_a_stage_are_torchvisions(block: str) -> None:
    assert assert_isomorphic(built(block), stock(block)).endswith(sizes(33, pools=True))


@pytest.mark.parametrize(("block", "patch", "said"), CHANGES.values(), ids=CHANGES)
def test_a_changed_network_is_caught_and_its_place_named(block: str, patch: Any, said: str) -> None:
    with patch:
        changed = built(block)
    with pytest.raises(AssertionError) as failure:
        assert_isomorphic(changed, stock(block))
    assert str(failure.value).startswith(said)


@pytest.mark.parametrize("images", [graphs.LARGE, (17, 67, 95)], ids=["few", "many"])
def test_the_kernels_of_convolutions_are_not_the_graphs_affair(images: graphs.Images) -> None:
    with mock.patch.object(graphs, "_plain_convolutions", contextlib.nullcontext):
        as_it_runs = built("basic", images)
    Walk(Side(as_it_runs), Side(stock("basic"))).everything()


# --------------------------------------------------------------------------- what a match is

PARAMS = {"fc": {"weight": torch.empty(10, 3, device="meta")}, "scale": torch.empty(3, 1, 1, device="meta")}


def traced(step: graphs.Step, params: Params = PARAMS) -> Trace:
    return trace(step, params, {}, (3, 5, 7))


def wave(params: Params, state: State, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    sine, cosine = x.sin(), x.cos()
    return {"logits": sine * params["scale"] + cosine, "gradient x": cosine * x.shape[0]}


def in_another_order(params: Params, state: State, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    cosine = x.cos()
    gradient = cosine * x.shape[0]
    x.tan()  # dead
    return {"gradient x": gradient, "logits": x.sin() * params["scale"] + cosine}


def in_place(params: Params, state: State, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    sine, cosine = x.clone().sin_(), x.detach()[:].cos()
    return {"logits": sine.mul_(params["scale"]).add_(cosine), "gradient x": cosine * x.shape[0]}


def cosine_twice(params: Params, state: State, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    return {"logits": x.sin() * params["scale"] + x.cos(), "gradient x": x.cos() * x.shape[0]}


def swapped(params: Params, state: State, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    return {**wave(params, state, x, cotangent), "logits": x.cos() + x.sin() * params["scale"]}


def another_size(params: Params, state: State, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    return {**wave(params, state, x, cotangent), "gradient x": x.cos() * x.shape[2]}


def noisy(params: Params, state: State, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    return {"logits": torch.rand_like(x)}


@pytest.mark.parametrize("step", [wave, in_another_order, in_place])
def test_order_names_dead_nodes_copies_and_mutations_do_not_matter(step: graphs.Step) -> None:
    assert assert_isomorphic(traced(step), traced(wave)) == "isomorphic: 5 nodes, N >= 2, H, W >= 2"


@pytest.mark.parametrize("turn", [1, -1])
def test_a_value_computed_twice_is_not_the_value_computed_once(turn: int) -> None:
    with pytest.raises(AssertionError, match="one side computes once what the other computes twice"):
        assert_isomorphic(*[traced(cosine_twice), traced(wave)][::turn])


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (swapped, r"logits, near .*scale.*: the operations differ: cos\.default"),
        (another_size, r"gradient x, near no parameter: argument 1 is H and N: mul"),
        (noisy, r"only one side returns gradient x"),
    ],
)
def test_what_else_is_a_difference(step: graphs.Step, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        assert_isomorphic(traced(step), traced(wave))


def test_a_random_number_is_no_function_of_the_inputs() -> None:
    with pytest.raises(
        AssertionError, match="logits, .*the operation is no function of its arguments: rand_like"
    ):
        assert_isomorphic(traced(noisy), traced(noisy))


def test_a_layout_is_part_of_a_match() -> None:
    narrow = traced(wave, {**PARAMS, "scale": torch.empty(1, 1, 1, device="meta")})
    with pytest.raises(
        AssertionError, match=r"scale: laid out as torch\.float32\[1, 1, 1\] .* and .*\[3, 1, 1\]"
    ):
        assert_isomorphic(narrow, traced(wave))


def test_only_sums_of_gradients_commute_and_they_are_counted() -> None:
    def step(params: Params, state: State, x: Tensor, cotangent: Tensor, *, turn: int) -> dict[str, Tensor]:
        a, b = [cotangent.sin(), cotangent.cos()][::turn]
        return {"gradient x": a + b}

    one, other = (traced(partial(step, turn=turn)) for turn in (1, -1))
    assert assert_isomorphic(one, one) == "isomorphic: 3 nodes, N >= 2, H, W >= 2"
    said = "isomorphic: 3 nodes (sums of gradients swapped: 1), N >= 2, H, W >= 2"
    assert assert_isomorphic(one, other) == said


# --------------------------------------------------------------------------- for which sizes


def at_most(params: Params, state: State, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    return {"logits": x.sin() if x.shape[2] <= 12 else x.cos()}


def halved(params: Params, state: State, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    return {"logits": x.sin() if x.shape[3] // 2 > 1 else x.cos()}


def few(params: Params, state: State, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    return {"logits": x.sin() if x.shape[0] < 16 else x.cos()}


def sine(params: Params, state: State, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    return {"logits": x.sin()}


@pytest.mark.parametrize(
    ("step", "sizes"),
    [(at_most, "N >= 2, H, W from 2 to 12"), (halved, "N >= 2, H, W >= 4"), (sine, "N >= 2, H, W >= 2")],
)
def test_a_branch_on_a_size_is_in_the_figure(step: graphs.Step, sizes: str) -> None:
    assert assert_isomorphic(traced(step), traced(step)) == f"isomorphic: 1 nodes, {sizes}"
    where = "" if step is sine else " (where both traces hold)"
    assert assert_isomorphic(traced(step), traced(sine)) == f"isomorphic: 1 nodes, {sizes}{where}"


def test_a_branch_on_the_number_of_images_is_refused() -> None:
    with pytest.raises(AssertionError, match="the traces do not hold for every N: .*N < 16"):
        assert_isomorphic(traced(few), traced(few))


def test_a_size_that_has_to_be_a_number_is_refused() -> None:
    def step(params: Params, state: State, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
        return {"logits": x.sin() * len(x)}  # no symbol, unlike x.shape[0]

    with pytest.raises(AssertionError, match=r"the traces do not hold for every N: .*Eq\(N, 3\)"):
        assert_isomorphic(traced(step), traced(step))


def test_one_image_is_a_range_of_its_own() -> None:
    one = trace(sine, PARAMS, {}, (1, 5, 7))
    assert assert_isomorphic(one, one) == "isomorphic: 1 nodes, N = 1, H, W >= 2"
