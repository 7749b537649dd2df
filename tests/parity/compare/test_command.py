"""Equal networks are equal to the bit; of changed ones the first diverging layer is named, and how."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import resnet_func as rf
from parity.__main__ import main
from parity.compare.command import MODES, compare_step, explain, make_pair
from resnet_func.models.interop.load import load_network
from resnet_func.testing import randn

X = randn(2, 3, 33, 33, seed=1, dtype=torch.float64)


def test_resnet18_is_torchvisions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "resnet18", "torchvision:resnet18", "--image-size", "33"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "122 leaves matched by name"
    assert [line.split()[:2] for line in lines[2:8]] == [
        [variant, "equal"]
        for variant in ("fp32-eval", "fp32-train", "fp64-eval", "fp64-train", "graphs-eval", "graphs-train")
    ]
    assert lines[-1] == "equal to the bit"


# --------------------------------------------------------------------------- changed networks


class Leaky(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.leaky_relu(x)


class Detached(nn.Module):
    """An identity without a gradient: seen in the backward pass alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach()


def stride(net: nn.Module) -> None:
    net.layer2[0].conv1.stride, net.layer2[0].conv2.stride = (1, 1), (2, 2)


def dilation(net: nn.Module) -> None:
    net.layer3[1].conv1.dilation = net.layer3[1].conv1.padding = (2, 2)


def padding(net: nn.Module) -> None:
    net.layer1[1].conv2 = nn.Conv2d(64, 64, 3, padding=1, padding_mode="circular", bias=False)


def eps(net: nn.Module) -> None:
    net.layer3[1].bn2.eps = 1e-3


def momentum(net: nn.Module) -> None:
    net.layer3[1].bn2.momentum = 0.2


def activation(net: nn.Module) -> None:
    net.layer2[1].relu = Leaky()


def no_activation(net: nn.Module) -> None:
    net.layer2[1].relu = nn.Identity()


def pooling(net: nn.Module) -> None:
    net.avgpool = nn.AdaptiveMaxPool2d(1)


def stem_pooling(net: nn.Module) -> None:
    net.maxpool = nn.MaxPool2d(3, 2, 0)


def no_gradient(net: nn.Module) -> None:
    net.layer3[0].downsample.append(Detached())


CHANGES: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "stride": (
        stride,
        "layer2.0.conv1: conv2d; stride 2 in A, (1, 1) in B; output torch.float64",
    ),
    "dilation": (
        dilation,
        "layer3.1.conv1: conv2d; padding 1 in A, (2, 2) in B; dilation 1 in A",
    ),
    "padding": (padding, "before layer1.1.conv2: after layer1.1.bn1, A calls nothing, B calls pad"),
    "eps": (eps, "layer3.1.bn2: batch_norm; eps 1e-05 in A, 0.001 in B; output "),
    "momentum": (
        momentum,
        "fp64-train: layer3.1.bn2.running_mean: momentum 0.1 in A, 0.2 in B; ",
    ),
    "activation": (activation, "after layer2.1.bn1, A calls relu, B calls leaky_relu"),
    "no-activation": (
        no_activation,
        "after layer2.1.bn1, A calls relu, B calls nothing",
    ),
    "pooling": (
        pooling,
        "before fc: after layer4.1.bn2, A calls mean, flatten, B calls adaptive_max",
    ),
    "stem-pooling": (
        stem_pooling,
        "before layer1.0.conv1: after bn1, max_pool2d; padding 1 in A, 0 in B",
    ),
    "no-gradient": (
        no_gradient,
        "layer3.0.downsample.1.bias, in the backward pass alone: gradient ",
    ),
}


@pytest.mark.parametrize(("change", "said"), CHANGES.values(), ids=CHANGES)
def test_the_first_diverging_layer_is_named(change: Callable[[nn.Module], None], said: str) -> None:
    module = torchvision.models.resnet18()
    change(module)
    pair = make_pair(load_network("resnet18"), rf.from_module(module))
    rows = (compare_step(pair, X, "fp64", mode) for mode in MODES)
    differing = next(row for row in rows if not row.equal)
    assert said in explain(pair, X, [differing])


def test_leaves_that_do_not_match_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "resnet20", "resnet32"]) == 1
    out = capsys.readouterr().out
    assert "different: the leaves do not match: layer1.3.conv1.weight [16, 16, 3, 3] only in B; " in out
    assert out.count("\n") == 2


def test_leaves_under_other_names_are_matched_by_order_and_shape() -> None:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole = torchvision.models.resnet18()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.whole(x)

    pair = make_pair(load_network("resnet18"), rf.from_module(Renamed()))
    assert pair.matched == "122 leaves matched by order and shape"
    assert all(compare_step(pair, X, "fp32", mode).equal for mode in MODES)


def test_a_network_that_fails_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "nets.py"
    file.write_text(
        "from torch import nn\n"
        "def a(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())\n"
        "def b(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Unflatten(1, (7, 7)))\n"
    )
    assert main(["compare", f"{file}:a", f"{file}:b", "--image-size", "6"]) == 1
    assert "B fails: RuntimeError: " in capsys.readouterr().out


def test_bad_usage_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "resnet20", "resnet21"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: no network of the zoo is called 'resnet21'; near it are ")
