"""The section of other packages' networks: it passes where they are ours, and says where they are not."""

from __future__ import annotations

from unittest import SkipTest

import pytest

from parity.compare import elsewhere
from resnet_func.models import zoo
from resnet_func.models.interop.load import load_network


@pytest.fixture(autouse=True)
def forget() -> None:
    elsewhere.make.cache_clear()


def test_every_plain_resnet_of_both_packages_has_cells() -> None:
    rows = {cell.name.rpartition("/")[0] for cell in elsewhere.cells(quick=False)}
    assert rows == {f"{package}:{name}" for package in ("torchvision", "timm") for name in zoo.IMAGENET}
    assert {cell.name.rpartition("/")[0] for cell in elsewhere.cells(quick=True)} == set(elsewhere.QUICK)


@pytest.mark.parametrize("way", ["fp64-eval", "fp32-train"])
def test_torchvisions_network_is_the_zoos(way: str) -> None:
    assert "0 ULP" in elsewhere.check("torchvision:resnet18", way)


@pytest.mark.parametrize("other", ["resnet34", "wide_resnet50_2"])
def test_another_network_fails(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(spec: str):
        return load_network(spec if ":" in spec else other)

    monkeypatch.setattr(elsewhere, "load_network", load)
    with pytest.raises(AssertionError, match="the leaves do not match"):
        elsewhere.check("torchvision:resnet18", "fp64-eval")


def test_another_number_in_a_layer_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(spec: str):
        if ":" in spec:
            return load_network(spec)
        return load_network(spec, activation_order="conv-relu-norm")

    monkeypatch.setattr(elsewhere, "load_network", load)
    with pytest.raises(AssertionError, match="fp64-eval: .* of .* tensors"):
        elsewhere.check("torchvision:resnet18", "fp64-eval")


def test_a_package_that_is_not_there_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(spec: str):
        raise ImportError(f"{spec} needs a package")

    monkeypatch.setattr(elsewhere, "load_network", missing)
    with pytest.raises(SkipTest, match="timm:resnet18 needs a package"):
        elsewhere.check("timm:resnet18", "fp64-eval")
