"""torchvision and back: state_dicts, modules and pretrained weights."""

from __future__ import annotations

import re
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import nn

import resnet_func as rf
from parity.steps import function_step, module_step, perturbed
from resnet_func import tree
from resnet_func.testing import assert_trees_near, generator, randn


def resnet18(**changes: Any) -> tuple[rf.Model, dict, dict]:
    model = rf.resnet18(num_classes=5, **changes)
    return model, *perturbed(*model.init(generator(0)), seed=1)


def test_a_state_dict_loads_into_torchvision_in_its_order_and_comes_back() -> None:
    model, params, state = resnet18()
    state_dict = rf.to_state_dict(model, params, state)
    module = torchvision.models.resnet18(num_classes=5)
    assert list(state_dict) == list(module.state_dict())
    module.load_state_dict(state_dict, strict=True)
    back = rf.from_state_dict(model, module.state_dict())
    assert all(map(torch.equal, tree.leaves(back), tree.leaves((params, state))))
    assert list(tree.flatten(back[0])) == list(tree.flatten(params))


def test_nothing_is_shared_with_the_state_dict() -> None:
    model, params, state = resnet18()
    state_dict = rf.to_state_dict(model, params, state)
    back, _ = rf.from_state_dict(model, state_dict)
    state_dict["fc.bias"] += 1
    assert not torch.equal(back["fc"]["bias"], state_dict["fc.bias"])


def test_dtype_is_for_floats() -> None:
    model, params, state = resnet18()
    back, after = rf.from_state_dict(model, rf.to_state_dict(model, params, state), dtype=torch.float64)
    assert {leaf.dtype for leaf in tree.leaves(back)} == {torch.float64}
    assert after["bn1"]["num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "_module.", "module._orig_mod.", "_orig_mod._module.module."]
)
def test_wrappers_prefixes_are_dropped_and_reported(prefix: str) -> None:
    model, params, state = resnet18()
    wrapped = {prefix + key: leaf for key, leaf in rf.to_state_dict(model, params, state).items()}
    with pytest.warns(UserWarning, match=r"dropped '") as reported:
        back = rf.from_state_dict(model, wrapped)
    assert all(name in str(reported[0].message) for name in prefix.split(".") if name)
    assert all(map(torch.equal, tree.leaves(back), tree.leaves((params, state))))


def test_every_difference_is_listed() -> None:
    model, params, state = resnet18()
    state_dict = rf.to_state_dict(model, params, state)
    del state_dict["bn1.weight"]
    state_dict["head.weight"] = torch.zeros(2)
    state_dict["fc.bias"] = torch.zeros(7)
    with pytest.raises(ValueError, match="3 differences") as error:
        rf.from_state_dict(model, state_dict)
    for line in (
        "missing bn1.weight [64]",
        "unexpected head.weight [2]",
        "mis-shaped fc.bias: expected [5], got [7]",
    ):
        assert line in str(error.value)


def test_a_state_dict_of_another_network_is_recognised() -> None:
    other = rf.resnet20(norm="group", num_classes=100)
    state_dict = rf.to_state_dict(other, *other.init(generator(0)))
    with pytest.raises(ValueError, match=re.escape("It fits rf.resnet20(num_classes=100, norm='group')")):
        rf.from_state_dict(resnet18()[0], state_dict)


def test_a_checkpoint_around_a_state_dict_is_pointed_out() -> None:
    model, params, state = resnet18()
    checkpoint: Any = {"epoch": 3, "state_dict": rf.to_state_dict(model, params, state)}
    with pytest.raises(ValueError, match=re.escape("Pass checkpoint['state_dict']?")):
        rf.from_state_dict(model, checkpoint)


def test_checkpoints_older_than_the_batch_counter() -> None:
    model, params, state = resnet18()
    old = {k: v for k, v in rf.to_state_dict(model, params, state).items() if "num_batches" not in k}
    _, after = rf.from_state_dict(model, old)
    assert after["bn1"]["num_batches_tracked"] == 0
    assert torch.equal(after["bn1"]["running_mean"], state["bn1"]["running_mean"])


def test_params_of_another_model_have_no_state_dict() -> None:
    _, params, state = resnet18()
    with pytest.raises(ValueError, match="do not fit the model"):
        rf.to_state_dict(rf.resnet34(), params, state)


# --------------------------------------------------------------------------- modules


class Tied(nn.Module):
    """Two layers that share a weight, and a buffer that counts in place."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return self.second(self.first(x).relu())


def test_a_module_with_tied_parameters_and_counting_buffers() -> None:
    module = Tied()
    model, params, state = rf.from_module(module)
    assert set(tree.flatten(params)) == {"first.weight", "first.bias", "second.bias"}
    x = randn(3, 4, seed=0)
    y, after = model.apply(params, state, x, train=False)
    assert (float(state["calls"]), float(after["calls"]), float(module.calls)) == (0, 1, 0)
    assert torch.equal(y, module(x))
    torch.testing.assert_close(
        rf.to_state_dict(model, params, state)["second.weight"], module.second.weight.detach()
    )


def test_the_module_is_copied_not_kept() -> None:
    module = torchvision.models.resnet18(num_classes=3).double().eval()
    model, params, state = rf.from_module(module)
    x = randn(2, 3, 32, 32, seed=0, dtype=torch.float64)
    want = model.apply(params, state, x, train=True)[0]
    with torch.no_grad():
        module.fc.weight.zero_()
    assert not module.training
    assert torch.equal(model.apply(params, state, x, train=True)[0], want)


def test_a_misspelled_key_is_refused() -> None:
    """`functional_call` is not strict by default, and would use the module's own tensor without a word."""
    model, params, state = rf.from_module(nn.Linear(2, 2))
    params = {"wieght": params["weight"], "bias": params["bias"]}
    with pytest.raises(RuntimeError, match="wieght"):
        model.apply(params, state, torch.zeros(1, 2), train=False)


def test_a_module_with_another_norm() -> None:
    """Group norm put in by torchvision's own argument.

    The logits are the module's to the bit. The gradients are so only to round-off: torch.func differentiates
    group_norm by a formula that can itself be differentiated, plain autograd by a fused kernel.
    """
    module = torchvision.models.resnet18(num_classes=3, norm_layer=lambda c: nn.GroupNorm(8, c)).double()
    model, params, state = rf.from_module(module)
    x, cotangent = (randn(*shape, seed=2, dtype=torch.float64) for shape in ((2, 3, 32, 32), (2, 3)))
    got = function_step(model, params, state, x, cotangent, train=True)
    want = module_step(module, x, cotangent, train=True)
    assert torch.equal(got["logits"], want["logits"])
    assert_trees_near(got, want, rtol=1e-12)


def test_a_module_has_no_init() -> None:
    model, _, _ = rf.from_module(nn.Linear(2, 2))
    with pytest.raises(NotImplementedError, match="build the network from the zoo"):
        model.init(generator(0))


# --------------------------------------------------------------------------- pretrained


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
