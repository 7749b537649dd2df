"""state_dicts to and from: ours, torchvision's, other people's; every wrapper around a model."""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

import resnet_func as rf
from parity.steps import perturbed
from resnet_func import tree
from resnet_func.testing import generator


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


def test_a_name_in_both_words_is_not_overwritten() -> None:
    model, params, state = resnet18()
    state_dict, extra = rf.to_state_dict(model, params, state), {"linear.bias": torch.ones(5)}
    for given in (extra | state_dict, state_dict | extra):
        with pytest.raises(ValueError, match=r"unexpected linear.bias \[5\]"):
            rf.from_state_dict(model, given)


@pytest.mark.parametrize("more", ["norm='group'", "shortcut='projection'"])
def test_a_state_dict_of_another_network_is_recognised(more: str) -> None:
    name, value = more.split("=")
    other = rf.resnet20(num_classes=100, **{name: value.strip("'")})
    state_dict = rf.to_state_dict(other, *other.init(generator(0)))
    with pytest.raises(ValueError, match=re.escape(f"It fits rf.resnet20(num_classes=100, {more})")):
        rf.from_state_dict(resnet18()[0], state_dict)


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


# --------------------------------------------------------------------------- functions put around models


class Small(nn.Module):
    """A network with a persistent buffer, a head and tied convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.again = (nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(2))
        self.again.weight = self.conv1.weight
        self.bn1, self.fc = nn.BatchNorm2d(3), nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.bn1(self.again(self.conv1(x))).relu().mean((2, 3)))


WRAPPERS = {
    "bare": lambda model: model,
    "winograd": rf.winograd.wrap,
    "flips": rf.train.average_flips,
    "autocast": lambda model: rf.train.autocast(model, "cpu", torch.bfloat16),
    "all": lambda model: rf.train.average_flips(
        rf.train.autocast(rf.winograd.wrap(model), "cpu", torch.bfloat16)
    ),
}
wrappers = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


@wrappers
@pytest.mark.parametrize("kind", ["config", "module"])
def test_what_is_around_a_model_does_not_change_its_layout(wrap: Any, kind: str) -> None:
    """Issue 13, item 8: it raised "cannot draw fresh parameters" for modules."""
    module = Small() if kind == "module" else torchvision.models.resnet18(num_classes=5)
    bare, params, state = rf.from_module(module) if kind == "module" else resnet18()
    model = wrap(bare)
    state_dict = rf.to_state_dict(model, params, state)
    module.load_state_dict(state_dict, strict=True)
    assert list(state_dict) == list(module.state_dict())
    back = rf.from_state_dict(model, module.state_dict())
    assert all(map(torch.equal, tree.leaves(back), tree.leaves((params, state))))


def test_a_function_without_init_has_the_layout_it_is_given() -> None:
    model = rf.from_function(lambda params, x: x @ params["fc"]["weight"])
    state_dict = rf.to_state_dict(model, {"fc": {"weight": torch.ones(2, 2)}}, {})
    assert list(state_dict) == ["fc.weight"]
    with pytest.raises(ValueError, match="cannot tell the names and shapes of its parameters"):
        rf.from_state_dict(model, state_dict)


# --------------------------------------------------------------------------- what others write


def saved(tmp_path: Path, name: str, content: Any) -> Path:
    save_file(content, tmp_path / name) if name.endswith(".safetensors") else torch.save(
        content, tmp_path / name
    )
    return tmp_path / name


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
def test_a_file_by_its_path(tmp_path: Path, name: str) -> None:
    model, params, state = resnet18()
    path = saved(tmp_path, name, rf.to_state_dict(model, params, state))
    for source in (path, str(path)):
        back = rf.from_state_dict(model, source)
        assert all(map(torch.equal, tree.leaves(back), tree.leaves((params, state))))


def test_a_trainers_checkpoint_of_an_averaged_compiled_model(tmp_path: Path) -> None:
    """As Lightning, SWA and torch.compile leave it, with an optimizer's tensors beside it."""
    model, params, state = resnet18()
    ours = rf.to_state_dict(model, params, state)
    theirs = {f"module._orig_mod.model.{key}": leaf for key, leaf in ours.items()}
    checkpoint = {
        "epoch": 3,
        "optimizer": {
            "state": {0: {"momentum_buffer": torch.zeros(64, 3, 7, 7)}},
            "param_groups": [{"lr": 0.1}],
        },
        "ema": {"n_averaged": torch.tensor(7), **theirs},
    }
    with pytest.warns(UserWarning, match="took checkpoint.'ema'.; left out n_averaged; dropped 'module.'"):
        back = rf.from_state_dict(model, saved(tmp_path, "last.pt", checkpoint))
    assert all(map(torch.equal, tree.leaves(back), tree.leaves((params, state))))


def test_torchs_averaged_model() -> None:
    module = torchvision.models.resnet18(num_classes=5)
    averaged = torch.optim.swa_utils.AveragedModel(module)
    with pytest.warns(UserWarning, match="left out n_averaged"):
        back = rf.from_state_dict(resnet18()[0], averaged.state_dict())
    assert torch.equal(back[0]["conv1"]["weight"], module.conv1.weight)


def test_kuangliu_names() -> None:
    """github.com/kuangliu/pytorch-cifar: linear for fc, shortcut for downsample."""
    model = rf.resnet18(stem="cifar", num_classes=10)
    params, state = model.init(generator(0))
    ours = rf.to_state_dict(model, params, state)
    theirs = {k.replace("downsample", "shortcut").replace("fc.", "linear."): leaf for k, leaf in ours.items()}
    assert theirs.keys() != ours.keys()
    with pytest.warns(UserWarning, match="read 'shortcut' as 'downsample'; read 'linear' as 'fc'"):
        back = rf.from_state_dict(model, {"net": theirs, "acc": 95.0})
    assert all(map(torch.equal, tree.leaves(back), tree.leaves((params, state))))


@pytest.mark.parametrize("name", ["fc", "linear", "model.head", "backbone.classifier", None])
def test_a_new_head_of_another_size(name: str | None) -> None:
    theirs = rf.resnet18(num_classes=100)
    params, state = theirs.init(generator(0))
    state_dict = rf.to_state_dict(theirs, params, state)
    head = {key: state_dict.pop(f"fc.{key}") for key in ("weight", "bias")}
    state_dict |= {f"{name}.{key}": leaf for key, leaf in head.items()} if name else {}
    model = resnet18()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        got, after = rf.from_state_dict(model, state_dict, head="new", generator=generator(7))
    fresh, _ = model.init(generator(7))
    assert all(torch.equal(got["fc"][key], fresh["fc"][key]) for key in ("weight", "bias"))
    rest = [{key: value for key, value in one.items() if key != "fc"} for one in (got, params)]
    assert all(map(torch.equal, tree.leaves(rest[0]), tree.leaves(rest[1])))
    assert all(map(torch.equal, tree.leaves(after), tree.leaves(state)))


def test_a_new_head_inside_another_module() -> None:
    head = nn.Sequential(OrderedDict(norm=nn.BatchNorm1d(4), fc=nn.Linear(4, 3)))
    module = nn.Sequential(OrderedDict(body=nn.Linear(2, 4), head=head))
    _, params, state = rf.from_module(module)
    fresh = tree.map(torch.zeros_like, params), tree.map(torch.zeros_like, state)
    model = rf.from_module(module)[0]._replace(init=lambda *args, **options: fresh)
    got, after = rf.from_state_dict(model, module.state_dict(), head="new", generator=generator(0))
    assert got["head"]["fc"]["weight"].eq(0).all()
    assert got["head"]["norm"]["weight"].eq(1).all()
    assert after["head"]["norm"]["running_var"].eq(1).all()


def test_a_new_head_needs_a_generator_and_a_known_word() -> None:
    model, params, state = resnet18()
    state_dict = rf.to_state_dict(model, params, state)
    with pytest.raises(ValueError, match="pass generator="):
        rf.from_state_dict(model, state_dict, head="new")
    with pytest.raises(ValueError, match="head must be 'strict' or 'new'; got 'fresh'"):
        rf.from_state_dict(model, state_dict, head="fresh")  # pyright: ignore[reportArgumentType]


# --------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_one_floating_dtype_stays(dtype: torch.dtype) -> None:
    model, params, state = resnet18()
    state_dict = {
        k: v.to(dtype) if v.is_floating_point() else v
        for k, v in rf.to_state_dict(model, params, state).items()
    }
    back, after = rf.from_state_dict(model, state_dict)
    assert {leaf.dtype for leaf in tree.leaves(back)} == {dtype}
    assert {leaf.dtype for leaf in tree.leaves(after)} == {dtype, torch.int64}


def test_mixed_dtypes_become_the_widest() -> None:
    """Half convolutions beside float norms: the network could not run on them as they are."""
    model, params, state = resnet18()
    state_dict = rf.to_state_dict(model, params, state)
    state_dict = {key: leaf.half() if leaf.ndim > 1 else leaf for key, leaf in state_dict.items()}
    with pytest.warns(UserWarning, match="made torch.float16 torch.float32"):
        back, after = rf.from_state_dict(model, state_dict)
    assert {leaf.dtype for leaf in tree.leaves(back)} == {torch.float32}
    assert torch.equal(back["conv1"]["weight"], params["conv1"]["weight"].half().float())
    model.apply(back, after, torch.zeros(1, 3, 32, 32), train=False)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_what_is_no_floating_point_number_is_refused(dtype: torch.dtype) -> None:
    model, params, state = resnet18()
    state_dict = rf.to_state_dict(model, params, state)
    state_dict["layer1.0.conv1.weight"] = state_dict["layer1.0.conv1.weight"].to(dtype)
    with pytest.raises(
        ValueError, match=f"layer1.0.conv1.weight holds {dtype}, where floating-point numbers belong"
    ):
        rf.from_state_dict(model, state_dict)


# --------------------------------------------------------------------------- what is no state_dict


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (nn.Linear(1, 1), TypeError, "got a module. Pass module.state_dict\\(\\)"),
        (None, TypeError, "expected a state_dict or the path of one; got NoneType"),
        ([torch.zeros(1)], TypeError, "expected a state_dict or the path of one; got list"),
        ("nowhere.pth", FileNotFoundError, "no file of weights at nowhere.pth"),
        ({}, ValueError, "expected a dict of tensors; these are none: it is empty"),
        ({"epoch": 3, "lr": 0.1}, ValueError, "these are none: epoch, lr"),
    ],
    ids=["module", "none", "list", "no-file", "empty", "numbers"],
)
def test_what_is_no_state_dict_is_one_line(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        rf.from_state_dict(rf.resnet20(), given)
    assert "\n" not in str(caught.value)
