"""torchvision's trained weights, without a network."""

from __future__ import annotations

from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision

import resnet_func as rf
from resnet_func import tree


@pytest.fixture
def weights_server(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Stands in for the download: serves fresh weights of torchvision's module."""
    served = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: served)
    return served


def test_pretrained_are_torchvisions_weights(weights_server: dict[str, torch.Tensor]) -> None:
    model, params, state, weights = rf.pretrained("resnet18", "IMAGENET1K_V1")
    leaves = {**tree.flatten(params), **tree.flatten(state)}
    assert all(torch.equal(leaves[key], value) for key, value in weights_server.items())
    assert model.config == rf.resnet18().config
    assert len(weights.meta["categories"]) == 1000


def test_pretrained_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(ConnectionError, match="could not download .*no route to host.*put the file in"):
        rf.pretrained("resnet18")


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet20", "DEFAULT", "torchvision has no weights for 'resnet20'; it has resnet18"),
        ("resnet18", "V9", "resnet18 has no weights 'V9'; it has IMAGENET1K_V1, DEFAULT"),
    ],
)
def test_pretrained_names(name: str, weights: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rf.pretrained(name, weights)
