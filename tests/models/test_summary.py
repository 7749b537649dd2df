"""The summary against the papers' figures, torch's own flop counter, torchvision, and real outputs."""

from __future__ import annotations

import pytest
import torch
import torchvision
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import resnet_func as rf
from resnet_func import tree
from resnet_func.models import blocks, resnet, zoo
from resnet_func.models.config import ResNetConfig
from resnet_func.models.layers import apply_layer
from resnet_func.models.summary import (
    LayerRow,
    format_count,
    summarize,
    summarize_network,
    table,
    totals,
)
from resnet_func.types import Model

TINY = {"depths": (1, 2), "widths": (8, 16), "norm_groups": 4, "num_classes": 7}
VARIANTS = {
    "basic-batch": {"block": "basic"},
    "basic-group": {"block": "basic", "norm": "group"},
    "basic-none": {"block": "basic", "norm": "none"},
    "basic-pad": {"block": "basic", "shortcut": "pad"},
    "basic-cifar": {"block": "basic", "stem": "cifar"},
    "basic-standardized": {"block": "basic", "weight_standardization": True},
    "basic-grey": {"block": "basic", "in_channels": 1},
    "preact-imagenet": {"block": "preact"},
    "preact-cifar": {"block": "preact", "stem": "cifar"},
    "bottleneck-grouped": {"block": "bottleneck", "groups": 2, "width_per_group": 32},
    "bottleneck-dilated": {"block": "bottleneck", "replace_stride_with_dilation": (True,)},
}

variants = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())


def build(fields: dict) -> Model:
    return resnet.build(ResNetConfig(**{**TINY, **fields}))


def counted_macs(model: Model, image_size: int) -> int:
    params, state = model.init(torch.Generator())
    assert model.config is not None
    images = torch.zeros(1, model.config.in_channels, image_size, image_size)
    with FlopCounterMode(display=False) as counter:
        model.apply(params, state, images, train=False)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("name", "changes", "image_size", "giga_macs", "digits"),
    [
        ("resnet18", {"stem": "cifar", "num_classes": 10}, 32, 0.555, 3),
        ("resnet20", {}, 32, 0.041, 3),
        ("wrn_28_10", {}, 32, 5.24, 2),
        ("resnet18", {}, 224, 1.81, 2),
        ("resnet50", {}, 224, 4.09, 2),
    ],
    ids=["resnet18-cifar", "resnet20", "wrn_28_10", "resnet18-224", "resnet50-224"],
)
def test_macs_are_the_published_ones(name, changes, image_size, giga_macs, digits):
    macs = totals(summarize(zoo.by_name(name, **changes), image_size)).macs
    assert round(macs / 1e9, digits) == giga_macs


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("resnet18", "ResNet18_Weights"),
        ("resnet34", "ResNet34_Weights"),
        ("resnet50", "ResNet50_Weights"),
        ("resnet101", "ResNet101_Weights"),
        ("resnext50_32x4d", "ResNeXt50_32X4D_Weights"),
        ("wide_resnet50_2", "Wide_ResNet50_2_Weights"),
    ],
)
def test_totals_are_those_torchvision_publishes(name, weights):
    meta = getattr(torchvision.models, weights).IMAGENET1K_V1.meta
    parameters, macs = totals(summarize(zoo.by_name(name), 224))
    assert parameters == meta["num_params"]
    assert round(macs / 1e9, 3) == meta["_ops"]


@variants
def test_macs_are_those_torch_counts(fields):
    model = build(fields)
    assert totals(summarize(model, 33)).macs == counted_macs(model, 33)


@variants
def test_every_parameter_is_in_a_row(fields):
    model = build(fields)
    flat = tree.flatten(model.init(torch.Generator())[0])
    layers: dict[str, int] = {}
    for path, leaf in flat.items():
        layer = path.rpartition(".")[0]
        layers[layer] = layers.get(layer, 0) + leaf.numel()
    assert {row.path: row.parameters for row in summarize(model, 32)} == layers


@variants
@pytest.mark.parametrize("image_size", [1, 32, 45])
def test_shapes_are_those_of_real_outputs(fields, image_size, monkeypatch):
    model = build(fields)
    rows = summarize(model, image_size)
    shapes = []

    def watched(spec, params, state, x, *, train):
        y, state = apply_layer(spec, params, state, x, train=train)
        if params:
            shapes.append(tuple(y.shape[1:]))
        return y, state

    monkeypatch.setattr(blocks, "apply_layer", watched)
    params, state = model.init(torch.Generator().manual_seed(0))
    assert model.config is not None
    x = torch.zeros(2, model.config.in_channels, image_size, image_size)
    logits, _ = model.apply(params, state, x, train=False)
    assert [row.shape for row in rows] == shapes
    assert rows[-1].shape == tuple(logits.shape[1:])


def test_rows_say_what_the_layers_are():
    fields = {"block": "bottleneck", "groups": 2, "replace_stride_with_dilation": (True,), "depths": (1, 1)}
    rows = {row.path: row for row in summarize(build(fields), 32)}
    assert rows["conv1"] == LayerRow("conv1", "conv 7x7/2", (8, 16, 16), 3 * 8 * 49, 3 * 8 * 49 * 256)
    assert rows["bn1"] == LayerRow("bn1", "batch norm", (8, 16, 16), 16, 0)
    assert rows["layer1.0.conv2"].kind == "conv 3x3 groups 2"
    assert rows["fc"] == LayerRow("fc", "linear", (7,), 64 * 7 + 7, 64 * 7)
    deeper = summarize(build({**fields, "depths": (1, 2), "norm": "group"}), 32)
    assert {row.kind for row in deeper} >= {"conv 3x3 dilation 2 groups 2", "group norm 4"}


def test_sides_that_differ_are_all_said():
    layers = nn.Conv2d(3, 4, (3, 1), stride=(2, 1), padding=(1, 0)), nn.Conv2d(4, 4, 3, dilation=(1, 2))
    rows = summarize_network(*rf.from_module(nn.Sequential(*layers)), (3, 9, 9))
    assert [row.kind for row in rows] == ["conv 3x1/2x1", "conv 3x3 dilation 1x2"]


def test_an_example_of_a_network_with_statistics():
    module = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 2))
    rows = summarize_network(*rf.from_module(module), torch.tensor([[0, 3, 6]]))
    assert [(row.path, row.parameters) for row in rows] == [("0", 28), ("2", 24), ("3", 26)]


@pytest.mark.parametrize("image_size", [0, -4])
def test_too_small_an_image_is_one_clear_error(image_size):
    with pytest.raises(ValueError, match=rf"image_size must be 1 pixel or more; got {image_size}"):
        summarize(zoo.resnet20(), image_size)


def test_a_network_without_a_config_is_refused():
    with pytest.raises(ValueError, match="Use summarize_network"):
        summarize(zoo.resnet20()._replace(config=None), 32)


# --------------------------------------------------------------------------- any network


@variants
def test_a_config_and_its_module_have_the_same_rows(fields):
    """Two ways to the rows: on an empty batch of the function, on one image through torch's modules."""
    model = build(fields)
    params, state = model.init(torch.Generator())
    module = rf.to_module(model, params, state)
    shape = (fields.get("in_channels", 3), 33, 33)
    rows = summarize(model, 33)
    assert summarize_network(model, params, state, shape) == rows
    assert summarize_network(*rf.from_module(module), shape) == rows


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "googlenet", "convnext_tiny", "vit_b_32", "swin_t"])
def test_torchvisions_networks_against_its_own_figures(name):
    """Its parameters and MACs, as it publishes them."""
    size = 224
    keywords = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model, params, state = rf.load_network(f"torchvision:{name}", **keywords)
    meta = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].meta
    parameters, macs = totals(summarize_network(model, params, state, (3, size, size)))
    assert parameters == meta["num_params"]
    # attention's own products are in torchvision's figure and not in ours
    assert 0.9 * meta["_ops"] <= macs / 1e9 <= 1.001 * meta["_ops"]


def test_a_layer_that_runs_twice_is_one_row_and_counted_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.idle = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.inner(self.inner(x))

    rows = summarize_network(*rf.from_module(Twice()), (4,))
    assert rows == [
        LayerRow("inner", "linear", (4,), 20, 32),
        LayerRow("idle.weight", "unused", (), 8, 0),
        LayerRow("idle.bias", "unused", (), 2, 0),
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_input_of_a_shape_has_the_parameters_dtype_and_device(dtype, device):
    module = nn.Linear(4, 2, dtype=dtype, device=device)
    expected = [LayerRow("linear", "linear", (2,), 10, 8)]
    assert summarize_network(*rf.from_module(module), (4,)) == expected


def test_numbers_of_tokens_as_input():
    net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3))
    rows = summarize_network(*rf.from_module(net), torch.zeros(1, 7, dtype=torch.int64))
    assert rows == [LayerRow("0", "embedding", (7, 4), 40, 0), LayerRow("1", "linear", (7, 3), 15, 7 * 12)]
    with pytest.raises(ValueError, match=r"a batch of one; got \[2, 7\]. Try x\[:1\]"):
        summarize_network(*rf.from_module(net), torch.zeros(2, 7, dtype=torch.int64))


@pytest.mark.parametrize("wrap", [rf.winograd.wrap, rf.train.average_flips])
def test_what_is_around_a_config_is_not_its_layers(wrap):
    assert summarize(wrap(zoo.resnet20()), 32) == summarize(zoo.resnet20(), 32)


@pytest.mark.parametrize("name", ["resnet20", "resnext50_32x4d"])
def test_table_shows_every_row_and_the_totals_in_80_columns(name):
    rows = summarize(zoo.by_name(name), 224)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table(rows))
    text = capture.get()
    assert "…" not in text
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert lines["layer"] == ["layer", "kind", "output", "parameters", "MACs"]
    for row in rows:
        macs = format_count(row.macs).split() if row.macs else []
        shape = "x".join(str(side) for side in row.shape)
        assert lines[row.path] == [row.path, *row.kind.split(), shape, f"{row.parameters:,}", *macs]
    parameters, macs = totals(rows)
    assert lines["total"][1:] == [f"{parameters:,}", *format_count(macs).split()]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.000 k"),
        (555_422_720, "555.4 M"),
        (999_960, "1.000 M"),
        (5_243_328_768, "5.243 G"),
        (10**13, "10.00 T"),
    ],
)
def test_counts_have_four_digits(count, text):
    assert format_count(count) == text


def test_another_default_dtype_is_no_matter() -> None:
    want = summarize(zoo.by_name("resnet20"), 32)
    try:
        torch.set_default_dtype(torch.float64)
        assert summarize(zoo.by_name("resnet20"), 32) == want
    finally:
        torch.set_default_dtype(torch.float32)
