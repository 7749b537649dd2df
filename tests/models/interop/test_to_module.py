"""`to_module`: the same network to the bit, as a module that hooks, exporters and other tools can use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import resnet_func as rf
from parity.steps import module_step, perturbed
from resnet_func import tree
from resnet_func.models.interop.to_module import ResNetModule
from resnet_func.testing import assert_trees_equal, generator, randn
from tests.models.interop.test_modules import Tied

TINY: dict[str, Any] = {"depths": (1, 2), "widths": (8, 16), "norm_groups": 4, "num_classes": 5}
CONFIGS: dict[str, dict[str, Any]] = {
    "basic": {"block": "basic"},
    "basic-group": {"block": "basic", "norm": "group"},
    "basic-none": {"block": "basic", "norm": "none"},
    "basic-pad-cifar": {"block": "basic", "shortcut": "pad", "stem": "cifar"},
    "basic-standardized-grey": {"block": "basic", "weight_standardization": True, "in_channels": 1},
    "preact": {"block": "preact", "stem": "cifar", "stem_width": 4},
    "preact-none-standardized": {"block": "preact", "norm": "none", "weight_standardization": True},
    "bottleneck-grouped-dilated": {
        "block": "bottleneck",
        "groups": 2,
        "width_per_group": 32,
        "replace_stride_with_dilation": (True,),
    },
    "bottleneck-standardized-group": {"block": "bottleneck", "norm": "group", "weight_standardization": True},
}
modes = pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])


def function_by_autograd(
    model: rf.Model, params: Any, state: Any, x: Tensor, cotangent: Tensor, *, train: bool
) -> dict[str, Tensor]:
    """`parity.compare.module_step` of the function: by plain autograd, whose kernels the module uses too."""
    x = x.clone().requires_grad_()
    leaves = {path: leaf.detach().requires_grad_() for path, leaf in tree.flatten(params).items()}
    logits, after = model.apply(tree.unflatten(leaves), state, x, train=train)
    grads = torch.autograd.grad(logits, [x, *leaves.values()], cotangent)
    return {
        "logits": logits.detach(),
        "gradient x": grads[0],
        **{f"gradient {path}": grad for path, grad in zip(leaves, grads[1:], strict=True)},
        **{f"buffer {path}": leaf for path, leaf in tree.flatten(after).items()},
    }


def check_equal(model: rf.Model, params: Any, state: Any, x: Tensor, *, train: bool) -> nn.Module:
    module = rf.to_module(model, params, state)
    cotangent = randn(*model.apply(params, state, x, train=False)[0].shape, seed=2, dtype=x.dtype)
    want = function_by_autograd(model, params, state, x, cotangent, train=train)
    assert_trees_equal(module_step(module, x, cotangent, train=train), want, finite=True)
    return module


@modes
@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_a_config_as_a_module_of_torchs_layers(fields: dict[str, Any], train: bool) -> None:
    model = rf.build(rf.ResNetConfig(**{**TINY, **fields}))
    params, state = perturbed(*model.init(generator(0)), seed=1)
    x = randn(3, fields.get("in_channels", 3), 33, 32, seed=3)
    module = check_equal(model, params, state, x, train=train)
    assert isinstance(module, ResNetModule)
    assert list(module.state_dict()) == list(rf.to_state_dict(model, params, state))


@modes
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvisions_class_where_there_is_one(name: str, train: bool) -> None:
    dilated = {"replace_stride_with_dilation": (False, False, True)} if name == "resnet50" else {}
    model = rf.zoo.by_name(name, num_classes=5, **dilated)
    params, state = perturbed(*model.init(generator(0)), seed=1)
    module = check_equal(model, params, state, randn(2, 3, 64, 64, seed=3), train=train)
    assert type(module) is torchvision.models.ResNet


def test_dtypes_devices_and_trainability_are_the_parameters() -> None:
    model = rf.resnet20()
    module = rf.to_module(model, *model.init(generator(0), dtype=torch.float64))
    assert {leaf.dtype for leaf in module.parameters()} == {torch.float64}
    assert all(leaf.requires_grad and leaf.is_leaf for leaf in module.parameters())
    assert module.training


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "wrn_16_4"])
def test_nothing_is_shared(name: str) -> None:
    model = rf.zoo.by_name(name, num_classes=5)
    params, state = model.init(generator(0))
    kept = tree.map(torch.clone, (params, state))
    module = rf.to_module(model, params, state)
    with torch.no_grad():
        for leaf in (*module.parameters(), *module.buffers()):
            leaf.add_(1)
    assert all(map(torch.equal, tree.leaves((params, state)), tree.leaves(kept)))


@modes
def test_a_module_comes_back_as_itself(train: bool) -> None:
    module = torchvision.models.mobilenet_v3_small(num_classes=5)
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0  # which would draw
    model, params, state = rf.from_module(module)
    params = tree.map(lambda leaf: leaf * 1.25, params)
    again = check_equal(model, params, state, randn(2, 3, 64, 64, seed=0), train=train)
    assert type(again) is type(module)
    assert list(again.state_dict()) == list(module.state_dict())


def test_tied_parameters_stay_tied() -> None:
    again = rf.to_module(*rf.from_module(Tied()))
    assert isinstance(again, Tied)
    assert again.first.weight is again.second.weight


WRAPPERS: dict[str, Any] = {
    "winograd": rf.winograd.wrap,
    "flips": rf.train.average_flips,
    "autocast": lambda model: rf.train.autocast(model, "cpu", torch.bfloat16),
}


@modes
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("kind", ["config", "module"])
def test_a_function_put_around_a_model_is_in_the_module(wrap: Any, kind: str, train: bool) -> None:
    bare = rf.resnet18(
        num_classes=5, widths=(128, 128, 128, 128), stem_width=16, stem="cifar", depths=(1, 1, 1, 1)
    )
    params, state = perturbed(*bare.init(generator(0)), seed=1)
    if kind == "module":
        bare, params, state = rf.from_module(rf.to_module(bare, params, state))
    model, x = wrap(bare), randn(2, 3, 32, 32, seed=3)
    module = check_equal(model, params, state, x, train=train)
    bare_logits = bare.apply(params, state, x, train=False)[0]
    assert not torch.equal(module.eval()(x), bare_logits), (
        "the wrapper changes nothing here: nothing is tested"
    )
    assert module.state_dict().keys() == rf.to_state_dict(model, params, state).keys()


def test_a_function_of_your_own() -> None:
    model = rf.from_function(lambda params, x: x @ params["inner"]["weight"])
    module = rf.to_module(model, {"inner": {"weight": torch.ones(2, 3)}}, {})
    assert list(module.state_dict()) == ["inner.weight"]
    module(torch.ones(1, 2)).sum().backward()
    assert torch.equal(module.get_parameter("inner.weight").grad, torch.ones(2, 3))


def test_params_of_another_model_are_listed() -> None:
    with pytest.raises(ValueError, match="do not fit the model"):
        rf.to_module(rf.resnet18(), *rf.resnet20().init(generator(0)))


# --------------------------------------------------------------------------- what it is for


@pytest.mark.parametrize("name", ["resnet20", "wrn_16_4"])
def test_backward_hooks_reach_every_layer(name: str) -> None:
    """Full backward hooks refuse in-place operations on what a layer returns."""
    model = rf.zoo.by_name(name)
    module = rf.to_module(model, *model.init(generator(0)))
    layers = {path for path, part in module.named_modules() if part._parameters}
    reached = set()
    for path in layers:
        module.get_submodule(path).register_full_backward_hook(lambda *_, path=path: reached.add(path))
    module(randn(2, 3, 32, 32, seed=0).requires_grad_()).sum().backward()
    assert reached == layers


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "wrn_16_4"])
def test_it_can_be_exported(name: str) -> None:
    """torch.export is the first half of an ONNX export."""
    model = rf.zoo.by_name(name, num_classes=5)
    module = rf.to_module(model, *model.init(generator(0))).eval()
    x = randn(2, 3, 32, 32, seed=0)
    exported = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(exported(x), module(x))
