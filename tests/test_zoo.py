"""The zoo: published parameter counts, and equality to the bit with torchvision's modules."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import get_model_weights

import resnet_func as rf
from parity.compare import assert_bitwise, function_step, generator, loaded, module_step, perturbed, randn
from parity.reference import CifarResNet, WideResNet
from resnet_func import interop, tree, zoo
from resnet_func.types import Model, Params, State

MODES = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])


def count(model: Model) -> int:
    params, _ = model.init(generator(0), device="meta")
    return tree.size(params)


# --------------------------------------------------------------------------- parameter counts


@pytest.mark.parametrize("name", zoo.IMAGENET)
def test_parameter_count_is_torchvisions(name: str) -> None:
    counts = {weights.meta["num_params"] for weights in get_model_weights(name)}
    assert counts == {count(zoo.by_name(name))}


# He et al. 2015, table 6; Zagoruyko and Komodakis 2016, table 4. In millions, as printed there.
PUBLISHED = {
    "resnet20": "0.27",
    "resnet32": "0.46",
    "resnet44": "0.66",
    "resnet56": "0.85",
    "resnet110": "1.7",
    "wrn_16_4": "2.7",
    "wrn_28_10": "36.5",
    "wrn_40_4": "8.9",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_articles(name: str) -> None:
    printed = PUBLISHED[name]
    decimals = len(printed.partition(".")[2])
    assert f"{count(zoo.by_name(name)) / 1e6:.{decimals}f}" == printed


def cifar_module(name: str, option: str = "A") -> nn.Module:
    depth, *widen = [int(number) for number in name.removeprefix("resnet").removeprefix("wrn_").split("_")]
    return WideResNet((depth - 4) // 6, *widen) if widen else CifarResNet((depth - 2) // 6, option)


@pytest.mark.parametrize("shortcut", ["pad", "projection"])
@pytest.mark.parametrize("name", zoo.CIFAR)
def test_parameter_count_is_the_modules(name: str, shortcut: str) -> None:
    with torch.device("meta"):
        module = cifar_module(name, "A" if shortcut == "pad" else "B")
    assert count(zoo.by_name(name, shortcut=shortcut)) == sum(p.numel() for p in module.parameters())


# --------------------------------------------------------------------------- torchvision's ten


class Pair(NamedTuple):
    """One network twice, with the same parameters."""

    model: Model
    params: Params
    state: State
    module: nn.Module

    def check(self, *, size: tuple[int, int], train: bool) -> None:
        """Through `build` and through `from_module`: logits, every gradient, every buffer."""
        leaf = self.params["fc"]["weight"]
        x = randn(2, 3, *size, seed=1, dtype=leaf.dtype)
        cotangent = randn(2, leaf.shape[0], seed=2, dtype=leaf.dtype)
        want = module_step(self.module, x, cotangent, train=train)
        assert_bitwise(function_step(self.model, self.params, self.state, x, cotangent, train=train), want)
        model, params, state = interop.from_module(self.module)
        assert_bitwise(function_step(model, params, state, x, cotangent, train=train), want)


def pair(name: str, dtype: torch.dtype = torch.float32) -> Pair:
    model = getattr(rf, name)()
    params, state = perturbed(*model.init(generator(0), dtype=dtype), seed=3)
    construct = getattr(torchvision.models, name) if name in zoo.IMAGENET else lambda: cifar_module(name)
    return Pair(model, params, state, loaded(construct, params, state))


@pytest.fixture(scope="module", params=zoo.IMAGENET)
def imagenet(request: pytest.FixtureRequest) -> Pair:
    return pair(request.param)


@pytest.mark.parametrize("train", [True, False], ids=["fp32-train", "fp32-eval"])
def test_torchvisions_ten_to_the_bit(imagenet: Pair, train: bool) -> None:
    imagenet.check(size=(33, 32), train=train)


@MODES
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"], ids=lambda name: f"{name}-fp64")
def test_torchvision_in_float64_to_the_bit(name: str, train: bool) -> None:
    pair(name, torch.float64).check(size=(32, 39), train=train)


@MODES
@pytest.mark.parametrize("name", ["resnet20", "resnet56", "wrn_16_4"])
def test_cifar_networks_to_the_bit(name: str, train: bool) -> None:
    pair(name).check(size=(16, 15), train=train)


@MODES
@pytest.mark.nightly
@pytest.mark.parametrize("name", ["resnet32", "resnet44", "resnet110", "wrn_28_10", "wrn_40_4"])
def test_other_cifar_networks_to_the_bit(name: str, train: bool) -> None:
    pair(name).check(size=(32, 32), train=train)


@MODES
@pytest.mark.nightly
@pytest.mark.parametrize("name", zoo.IMAGENET)
def test_torchvisions_ten_at_full_size(name: str, train: bool) -> None:
    pair(name).check(size=(224, 224), train=train)


# --------------------------------------------------------------------------- names


def test_every_network_has_a_function_of_its_name() -> None:
    for name in zoo.ZOO:
        assert getattr(zoo, name)().config == zoo.config(name) == getattr(rf, name)().config


def test_changes_reach_the_config() -> None:
    config = rf.resnet18(num_classes=10, stem="cifar", norm="group").config
    assert config == rf.ResNetConfig(
        block="basic", depths=(2, 2, 2, 2), num_classes=10, stem="cifar", norm="group"
    )


@pytest.mark.parametrize("name", zoo.ZOO)
def test_group_norm_fits_every_network(name: str) -> None:
    zoo.by_name(name, norm="group")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("resnet19", {}, "no network is called 'resnet19'; the zoo has resnet18, resnet34"),
        ("resnet18", {"classes": 10}, "no field classes; its fields are block, depths"),
        ("resnet18", {"groups": 2}, "groups=2 needs block='bottleneck'"),
    ],
)
def test_wrong_names_say_what_there_is(name: str, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zoo.by_name(name, **changes)
