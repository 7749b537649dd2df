"""Networks by name: every spelling, seeds that give the same network, and names that are wrong."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

import resnet_func as rf
from resnet_func import tree
from resnet_func.testing import generator, randn

CODE = """
import torch
from torch import nn
import beside
import resnet_func as rf

class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.conv = nn.Conv2d(3, beside.WIDTH, 3)
        self.fc = nn.Linear(beside.WIDTH, classes)
    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))

def model(): return rf.resnet20(num_classes=7)
def triple():
    net = rf.resnet20(num_classes=7)
    return (net, *net.init(torch.Generator().manual_seed(5)))
def nothing(): return 3
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("WIDTH = 6\n")
    (tmp_path / "mine.py").write_text(CODE)
    return tmp_path / "mine.py"


def test_a_name_of_the_zoo() -> None:
    model, params, state = rf.load_network("resnet18", num_classes=10, stem="cifar", generator=generator(3))
    want = rf.resnet18(num_classes=10, stem="cifar")
    assert model.config == want.config
    assert all(map(torch.equal, tree.leaves((params, state)), tree.leaves(want.init(generator(3)))))


def check_init(model: rf.Model, params: Any, state: Any) -> None:
    """A seed gives the same network, another seed another; torch's own generator stays as it was."""
    before = torch.get_rng_state()
    a, b, c = (model.init(generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, tree.leaves(a), tree.leaves(b)))
    assert not all(map(torch.equal, tree.leaves(a[0]), tree.leaves(c[0])))
    shapes = tree.map(lambda leaf: leaf.shape, (params, state))
    assert tree.map(lambda leaf: leaf.shape, a) == shapes
    assert tree.map(lambda leaf: leaf.shape, model.init(generator(0), device="meta")) == shapes
    wide = model.init(generator(1), dtype=torch.float64)
    assert all(
        torch.equal(x.double(), y.double()) for x, y in zip(tree.leaves(a), tree.leaves(wide), strict=True)
    )
    assert {leaf.dtype for leaf in tree.leaves(wide[0])} == {torch.float64}


def test_torchvisions_network_is_its_own() -> None:
    model, params, state = rf.load_network("torchvision:resnet18", num_classes=5)
    check_init(model, params, state)
    module = torchvision.models.resnet18(num_classes=5)
    module.load_state_dict(rf.to_state_dict(model, params, state), strict=True)
    x = randn(2, 3, 32, 32, seed=0)
    assert torch.equal(model.apply(params, state, x, train=False)[0], module.eval()(x))


def test_the_seed_is_drawn_from_the_generator() -> None:
    """Two networks from one generator differ; the generator moves on, as with networks of the zoo."""
    draw = generator(0)
    first = rf.load_network("torchvision:resnet18", num_classes=5, generator=draw)
    second = rf.load_network("torchvision:resnet18", num_classes=5, generator=draw)
    again = rf.load_network("torchvision:resnet18", num_classes=5, generator=generator(0))
    assert not torch.equal(first[1]["conv1"]["weight"], second[1]["conv1"]["weight"])
    assert torch.equal(first[1]["conv1"]["weight"], again[1]["conv1"]["weight"])


def test_timms_network() -> None:
    pytest.importorskip("timm", reason="timm is an optional extra")
    model, params, state = rf.load_network("timm:resnet18", num_classes=5)
    check_init(model, params, state)
    assert model.apply(params, state, randn(2, 3, 32, 32, seed=0), train=False)[0].shape == (2, 5)
    with pytest.raises(ValueError, match="timm has no model 'resnet19'; near it are .*resnet18"):
        rf.load_network("timm:resnet19")


def test_timm_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="needs timm .*pip install 'resnet-func\\[timm\\]'"):
        rf.load_network("timm:resnet18")


def test_a_class_in_a_file(code: Path) -> None:
    path = list(sys.path)
    model, params, state = rf.load_network(f"{code}:Net", classes=4)
    check_init(model, params, state)
    assert list(tree.flatten(params)) == ["conv.weight", "conv.bias", "fc.weight", "fc.bias"]
    assert model.apply(params, state, randn(2, 3, 8, 8, seed=0), train=False)[0].shape == (2, 4)
    assert sys.path == path


def test_a_callable_of_a_package() -> None:
    model, params, _ = rf.load_network("torch.nn:Linear", in_features=4, out_features=2)
    assert tuple(params["weight"].shape) == (2, 4)
    assert torch.equal(model.init(generator(1))[0]["bias"], model.init(generator(1))[0]["bias"])


def test_models_and_triples(code: Path) -> None:
    model, params, state = rf.load_network(f"{code}:model", generator=generator(5))
    assert model.config == rf.resnet20(num_classes=7).config
    triple = rf.load_network(f"{code}:triple")
    assert triple[0].config == model.config
    assert all(map(torch.equal, tree.leaves((params, state)), tree.leaves(triple[1:])))


def test_another_process_can_unpickle_what_a_file_made(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot import the file, and runs in another folder: the name goes over, not the class."""
    monkeypatch.chdir(code.parent)
    model, params, state = rf.load_network("mine.py:Net")
    x = randn(2, 3, 8, 8, seed=0)
    pickled = code.with_name("network.pickle")
    pickled.write_bytes(
        pickle.dumps((model, params, state, x, model.apply(params, state, x, train=False)[0]))
    )
    script = (
        "import pickle, sys, torch\n"
        "model, params, state, x, want = pickle.load(open(sys.argv[1], 'rb'))\n"
        "assert torch.equal(model.apply(params, state, x, train=False)[0], want)\n"
        "assert model.init(torch.Generator())[0].keys() == params.keys()\n"
    )
    (code.parent / "elsewhere").mkdir()
    monkeypatch.chdir(code.parent / "elsewhere")
    subprocess.run([sys.executable, "-c", script, pickled], check=True, timeout=120)


def test_a_wrapped_module_is_unwrapped(code: Path) -> None:
    code.write_text(code.read_text() + "\ndef parallel(): return nn.DataParallel(Net())\n")
    model, params, state = rf.load_network(f"{code}:parallel")
    check_init(model, params, state)
    assert "module" not in params


# --------------------------------------------------------------------------- names that are wrong


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (
            "resnet21",
            ValueError,
            "no network of the zoo is called 'resnet21'; near it are .*resnet20.*timm:NAME",
        ),
        ("torchvision:resnet19", ValueError, "torchvision has no model 'resnet19'; near it are .*resnet18"),
        ("torch.nn:Liner", ValueError, "torch.nn has no function or class 'Liner'; near it are .*Linear"),
        ("no_such_package.net:Net", ImportError, "no package or module 'no_such_package.net'"),
        ("nowhere.py:Net", FileNotFoundError, "no Python file at nowhere.py"),
        (":resnet18", ValueError, "':resnet18' names no network; expected a name of the zoo"),
    ],
)
def test_wrong_names_are_one_line(spec: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        rf.load_network(spec)
    assert "\n" not in str(caught.value)


def test_a_callable_that_returns_no_network(code: Path) -> None:
    with pytest.raises(TypeError, match="must return an nn.Module, a Model or .*; got int"):
        rf.load_network(f"{code}:nothing")


def test_an_error_inside_the_file_is_the_files(tmp_path: Path) -> None:
    """Not "no package": what is missing is something the file imports. Mended, it can be loaded."""
    path = tmp_path / "broken.py"
    path.write_text("import no_such_dependency\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        rf.load_network(f"{path}:Net")
    path.write_text(
        "from torch import nn\nclass Net(nn.Linear):\n    def __init__(self): super().__init__(2, 3)\n"
    )
    assert tuple(rf.load_network(f"{path}:Net")[1]["weight"].shape) == (3, 2)


def test_a_lazy_network_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="lazy module has no parameters yet"):
        rf.load_network("torch.nn:LazyLinear", out_features=2)


def test_default_devices_do_not_matter() -> None:
    """Under another default device the constructor's numbers would come from that device's generator."""
    with torch.device("meta"):
        _, params, _ = rf.load_network("torch.nn:Linear", in_features=4, out_features=2)
    assert params["weight"].device.type == "cpu"
