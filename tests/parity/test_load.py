"""Every spelling of a network, and one line for what is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from parity.load import load_network
from resnet_func import tree
from resnet_func.testing import assert_trees_equal

FILE = """
from torch import nn
import resnet_func as rf

def module(width=3):
    return nn.Linear(width, 2)

def network():
    return rf.from_module(module())
"""


@pytest.mark.parametrize("spec", ["resnet20", "torchvision:resnet18", "torch.nn:Identity"])
def test_a_network_has_one_seed_and_leaves_the_global_generator(spec: str) -> None:
    before = torch.get_rng_state()
    first, second = (load_network(spec)[1:] for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert_trees_equal(first, second)


def test_a_callable_in_a_file_gives_a_module_or_a_network(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    for name in ("module", "network"):
        model, params, state = load_network(f"{path}:{name}")
        assert model.apply(params, state, torch.ones(1, 3), train=False)[0].shape == (1, 2)
    assert tree.size(load_network(f"{path}:module", width=5)[1]) == 12


@pytest.mark.parametrize(
    "spec", ["resnet19", "torchvision:resnet19", "nosuchpackage:net", "nosuch.py:net", "torch.nn:Nosuch"]
)
def test_what_is_no_network_is_one_line(spec: str) -> None:
    with pytest.raises(ValueError, match="resnet19|nosuch|Nosuch") as error:
        load_network(spec)
    assert "\n" not in str(error.value)
