"""The zoo: published parameter counts, and names. That each is its module: test_parity_bitwise.py."""

from __future__ import annotations

import inspect
import re
from typing import Unpack, get_type_hints

import pytest
import torch
from torchvision.models import get_model_weights

import resnet_func as rf
from parity import reference
from resnet_func import tree
from resnet_func.models import zoo
from resnet_func.models.config import ConfigChanges
from resnet_func.testing import generator
from resnet_func.types import Model


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


@pytest.mark.parametrize("shortcut", ["pad", "projection"])
@pytest.mark.parametrize("name", zoo.CIFAR)
def test_parameter_count_is_the_modules(name: str, shortcut: str) -> None:
    with torch.device("meta"):
        module = reference.module(name, "A" if shortcut == "pad" else "B")
    assert count(zoo.by_name(name, shortcut=shortcut)) == sum(p.numel() for p in module.parameters())


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


@pytest.mark.parametrize("name", zoo.ZOO)
def test_an_editor_sees_what_each_network_takes(name: str) -> None:
    fn = getattr(rf, name)
    assert inspect.isfunction(fn)
    assert fn.__name__ == name
    assert fn.__doc__
    assert re.search(r"^\w.* parameters\.$", fn.__doc__.splitlines()[0])
    (changes,) = inspect.signature(fn).parameters.values()
    assert changes.kind is inspect.Parameter.VAR_KEYWORD
    assert get_type_hints(fn)["changes"] == Unpack[ConfigChanges]
    assert fn(num_classes=7).config == zoo.config(name, num_classes=7)


def test_the_keywords_are_the_fields_of_the_config() -> None:
    hints = get_type_hints(rf.ResNetConfig)
    assert get_type_hints(ConfigChanges) == hints
    assert not ConfigChanges.__required_keys__


@pytest.mark.parametrize("name", zoo.ZOO)
def test_the_docstring_counts_right(name: str) -> None:
    """The millions of parameters that the first line states, to its digits."""
    (stated,) = re.findall(r"([0-9.]+) million", str(getattr(rf, name).__doc__))
    decimals = len(stated.partition(".")[2])
    assert f"{count(zoo.by_name(name)) / 1e6:.{decimals}f}" == stated
