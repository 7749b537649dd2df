"""The four orders of norm, ReLU and convolution, gains of standardised filters, norms after the sum: against
blocks written out with torch's functions; and the defaults, which they leave as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import resnet_func as rf
from resnet_func import losses, tree
from resnet_func.models import layers, resnet
from resnet_func.testing import generator, randn
from tests.per_sample.cases import network

ORDERS = ("conv-norm-relu", "conv-relu-norm", "norm-relu-conv", "relu-norm-conv")
SMALL: dict[str, Any] = {
    "depths": (1, 2),
    "widths": (4, 8),
    "stem": "cifar",
    "norm": "group",
    "norm_groups": 2,
    "num_classes": 3,
}


def written_out(config: rf.ResNetConfig, params: Any, x: Tensor) -> Tensor:
    """The logits of a config of SMALL's kind, unit by unit."""

    def conv(p: Any, x: Tensor, stride: int) -> Tensor:
        weight = p["weight"]
        if config.weight_standardization:
            flat = weight.flatten(1)
            flat = flat - flat.mean(1, keepdim=True)
            flat = flat / (flat.var(1, keepdim=True, correction=0) + 1e-10).sqrt()
            if config.standardization_affine:
                flat = flat / flat.shape[1] ** 0.5 * p["gain"][:, None]
            weight = flat.reshape(weight.shape)
        return F.conv2d(x, weight, p.get("bias"), stride, weight.shape[-1] // 2)

    def norm(p: Any, x: Tensor) -> Tensor:
        return F.group_norm(x, 2, p["weight"], p["bias"])

    def unit(p: Any, number: str, x: Tensor, stride: int, *, last: bool) -> Tensor:
        for part in config.order.split("-"):
            if part == "conv":
                x = conv(p[f"conv{number}"], x, stride)
            elif part == "norm":
                x = norm(p[f"bn{number}"], x)
            elif not (last and config.order == "conv-norm-relu"):  # its last ReLU comes after the sum
                x = x.relu()
        return x

    def outside(x: Tensor) -> Tensor:
        for part in config.order.replace("-conv", "").replace("conv-", "").split("-"):
            x = norm(params["bn1"], x) if part == "norm" else x.relu()
        return x

    x = conv(params["conv1"], x, 1)
    pre = config.order.endswith("conv")
    x = x if pre else outside(x)
    for stage, depth in enumerate(config.depths):
        for index in range(depth):
            p, stride = params[f"layer{stage + 1}"][str(index)], 2 if stage and not index else 1
            count = sum(name.startswith("conv") for name in p)
            strides = {2: (stride, 1), 3: (1, stride, 1)}[count]
            y, skip = x, x
            for i, s in enumerate(strides):
                y = unit(p, str(i + 1), y, s, last=i + 1 == count)
            if "downsample" in p:
                if pre:
                    first = (lambda z, p=p: norm(p["bn1"], z)), torch.relu
                    for act in first if config.order.startswith("norm") else reversed(first):
                        skip = act(skip)
                skip = conv(p["downsample"]["0"], skip, stride)
                skip = skip if pre else norm(p["downsample"]["1"], skip)
            x = y + skip
            x = norm(p["scale_norm"], x) if config.scale_norm else x
            x = x.relu() if config.order == "conv-norm-relu" else x
    x = outside(x) if pre else x
    return x.mean((2, 3)) @ params["fc"]["weight"].T + params["fc"]["bias"]


AFFINE = {"weight_standardization": True, "standardization_affine": True}
EXTRAS: list[dict[str, Any]] = [
    {},
    {"scale_norm": True},
    AFFINE,
]


@pytest.mark.parametrize("extra", EXTRAS, ids=str)
@pytest.mark.parametrize("block", ["basic", "bottleneck", "preact"])
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_is_what_its_name_says(order: Any, block: Any, extra: dict[str, Any]) -> None:
    config = rf.ResNetConfig(block=block, activation_order=order, **SMALL, **extra)
    model, params, state = network(config, 0)
    x = randn(2, 3, 8, 8, seed=1, dtype=torch.float64)
    logits, _ = model.apply(params, state, x, train=True)
    torch.testing.assert_close(logits, written_out(config, params, x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_per_sample_gradients_are_those_of_each_sample_alone(order: Any) -> None:
    extra = {**AFFINE, "scale_norm": True}
    model, params, state = network(
        rf.ResNetConfig(block="basic", activation_order=order, **SMALL, **extra), 0
    )
    x, y = randn(3, 3, 8, 8, seed=1, dtype=torch.float64), torch.tensor([0, 1, 2])
    found, wanted = (
        rf.per_sample.grads(model, losses.cross_entropy, method=method)(params, state, x, y)
        for method in ("contract", "vmap")
    )
    scale = float(tree.norm(wanted))
    for a, b in zip(tree.leaves(found), tree.leaves(wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize(("block", "order"), [("basic", "conv-norm-relu"), ("preact", "norm-relu-conv")])
def test_the_blocks_own_order_changes_nothing(block: Any, order: Any) -> None:
    models = [rf.build(rf.ResNetConfig(block=block, activation_order=o, **SMALL)) for o in (None, order)]
    x, made = randn(2, 3, 8, 8, seed=1), [model.init(generator(0)) for model in models]
    assert all(map(torch.equal, tree.leaves(made[0]), tree.leaves(made[1])))
    outs = [model.apply(*parts, x, train=True)[0] for model, parts in zip(models, made, strict=True)]
    assert torch.equal(*outs)


def test_the_order_and_not_the_block_decides() -> None:
    """A "preact" network with the basic order is the basic network, names and all."""
    models = [
        rf.build(rf.ResNetConfig(block=block, activation_order="conv-norm-relu", **SMALL))
        for block in ("basic", "preact")
    ]
    made = [model.init(generator(0)) for model in models]
    assert list(tree.flatten(made[0][0])) == list(tree.flatten(made[1][0]))
    x = randn(2, 3, 8, 8, seed=1)
    assert torch.equal(*(m.apply(*parts, x, train=True)[0] for m, parts in zip(models, made, strict=True)))


def test_gains_start_at_one_and_filters_at_variance_one_over_fan_in() -> None:
    config = rf.ResNetConfig(block="basic", weight_standardization=True, standardization_affine=True, **SMALL)
    params, _ = rf.build(config).init(generator(0))
    spec = resnet.layer_specs(config)["layer1"]["0"]["conv1"]
    x = randn(64, 4, 8, 8, seed=0)
    y = layers.conv2d(spec, params["layer1"]["0"]["conv1"], x)
    assert 0.5 < float(y.var()) < 1.1  # of the inputs' variance 1, less what the border pads away


def test_zero_initialisation_takes_the_gain() -> None:
    config = rf.ResNetConfig(
        block="preact",
        weight_standardization=True,
        standardization_affine=True,
        zero_init_residual=True,
        **SMALL,
    )
    block = rf.build(config).init(generator(0))[0]["layer1"]["0"]
    assert not block["conv2"]["gain"].any()
    assert block["conv2"]["weight"].any()


@pytest.mark.parametrize("extra", [{"activation_order": "relu-norm-conv"}, {"scale_norm": True}], ids=str)
def test_as_a_module_it_is_the_same_function(extra: dict[str, Any]) -> None:
    model, params, state = network(rf.ResNetConfig(block="basic", **SMALL, **extra), 0)
    x = randn(2, 3, 8, 8, seed=1, dtype=torch.float64)
    module = rf.to_module(model, params, state)
    assert torch.equal(module(x), model.apply(params, state, x, train=True)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_order": "relu-conv-norm"}, "activation_order must be one of"),
        ({"standardization_affine": True}, "needs weight_standardization=True"),
        ({"scale_norm": True, "norm": "none"}, "scale_norm=True needs a norm"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rf.ResNetConfig(block="basic", **{**SMALL, **changes})
