"""Modules and functions as models: shared leaves, purity, what is unwrapped, what is refused, pickling."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import resnet_func as rf
from parity.steps import function_step, module_step
from resnet_func import tree
from resnet_func.models.interop.modules import unwrap_module
from resnet_func.testing import assert_trees_near, generator, randn


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


def test_a_model_holds_no_numbers_of_its_module() -> None:
    model, params, _ = rf.from_module(nn.Linear(500, 500))
    assert len(pickle.dumps(model)) < 10_000 < len(pickle.dumps(params))


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


def test_the_shapes_of_a_module_need_no_init() -> None:
    model, params, _ = rf.from_module(nn.Linear(2, 3))
    shapes, state = model.init(generator(0), device="meta", dtype=torch.float64)
    assert tree.map(lambda leaf: tuple(leaf.shape), shapes) == tree.map(
        lambda leaf: tuple(leaf.shape), params
    )
    assert {(leaf.device.type, leaf.dtype) for leaf in tree.leaves(shapes)} == {("meta", torch.float64)}
    assert state == {}


# --------------------------------------------------------------------------- what is unwrapped and refused


def same_function(got: nn.Module, module: nn.Module) -> None:
    model, params, state = rf.from_module(got)
    x = randn(2, 4, seed=1)
    assert set(tree.flatten(params)) == {name for name, _ in module.named_parameters()}
    assert torch.equal(model.apply(params, state, x, train=False)[0], module(x))


def test_a_parallel_wrapper_is_taken_off() -> None:
    module = nn.Sequential(nn.Linear(4, 3))
    same_function(nn.DataParallel(module), module)


def test_a_distributed_wrapper_is_taken_off() -> None:
    # its constructor needs a process group; what is looked at is the class and its `module`
    module = nn.Sequential(nn.Linear(4, 3))
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = module
    same_function(wrapper, module)


def test_a_compiled_module_is_unwrapped() -> None:
    module = nn.Sequential(nn.Linear(4, 3))
    compiled: Any = torch.compile(module)  # compiles nothing until it is called
    same_function(compiled, module)
    same_function(nn.DataParallel(compiled), module)


def test_a_module_compiled_in_place_is_its_own_function() -> None:
    module, plain = nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 3))
    plain.load_state_dict(module.state_dict())
    module.compile()
    same_function(module, plain)


def test_a_plain_module_is_not_unwrapped() -> None:
    module = nn.Linear(2, 2)
    assert unwrap_module(module) is module


@pytest.mark.filterwarnings("ignore")  # of deprecation
def test_a_scripted_module_is_one_line() -> None:
    scripted: Any = torch.jit.script(nn.Linear(2, 2))
    for module in (scripted, nn.Sequential(scripted)):
        with pytest.raises(ValueError, match="cannot run scripted modules") as error:
            rf.from_module(module)
        assert "\n" not in str(error.value)


def test_a_lazy_module_is_one_line_until_it_has_run() -> None:
    module = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(
        ValueError, match="lazy module has no parameters yet .*LazyLinear at '0'.*module\\(x\\)"
    ):
        rf.from_module(module)
    module(torch.zeros(1, 4))
    same_function(module, module)


def test_a_quantised_module_is_one_line() -> None:
    quantised = pytest.importorskip("torch.ao.nn.quantized", reason="this torch has no quantised modules")
    module = quantised.Linear.__new__(quantised.Linear)  # its constructor wants a quantising backend
    nn.Module.__init__(module)
    with pytest.raises(ValueError, match="cannot run quantised modules"):
        rf.from_module(nn.Sequential(module))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": torch.zeros(1)}, "takes an nn.Module; got dict$"),
        (None, "takes an nn.Module; got NoneType$"),
        (torch.sin, "got builtin_function_or_method. For a function use from_function"),
    ],
    ids=["dict", "none", "function"],
)
def test_what_is_no_module_is_one_line(given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        rf.from_module(given)


# --------------------------------------------------------------------------- functions


def linear(params: Any, x: torch.Tensor) -> torch.Tensor:
    return x @ params["weight"]


def counting(params: Any, state: Any, x: torch.Tensor, *, train: bool) -> Any:
    return linear(params, x), {"calls": state["calls"] + int(train)}


def draw(generator: torch.Generator, *, device: Any = None, dtype: torch.dtype = torch.float32) -> Any:
    if torch.device(device or "cpu").type == "meta":
        return {"weight": torch.empty(4, 3, device="meta", dtype=dtype)}, {}
    return {"weight": torch.randn(4, 3, generator=generator).to(device, dtype)}, {}


def test_a_function_of_parameters_and_input() -> None:
    model = rf.from_function(linear, init=draw)
    params, state = model.init(generator(0))
    x = randn(2, 4, seed=1)
    logits, after = model.apply(params, state, x, train=True)
    assert torch.equal(logits, x @ params["weight"])
    assert after == {}
    assert model.config is None


def test_a_function_with_state() -> None:
    model = rf.from_function(counting)
    _, after = model.apply(
        {"weight": torch.ones(4, 3)}, {"calls": torch.tensor(2)}, randn(2, 4, seed=1), train=True
    )
    assert after["calls"] == 3
    with pytest.raises(NotImplementedError, match="from_function\\(apply, init=...\\)"):
        model.init(generator(0))


@pytest.mark.parametrize("given", [lambda x: x, lambda a, b, c: a, lambda: 0, "linear"])
def test_other_signatures_are_one_line(given: Any) -> None:
    with pytest.raises(
        ValueError, match="takes apply\\(params, state, x, train=\\) or f\\(params, x\\); got"
    ):
        rf.from_function(given)


# --------------------------------------------------------------------------- pickling


def trained(model: rf.Model, params: Any, state: Any, x: torch.Tensor) -> Any:
    return tree.leaves(model.apply(params, state, x, train=True))


@pytest.mark.parametrize("kind", ["config", "module", "function"])
def test_a_pickled_model_is_the_same_function(kind: str) -> None:
    x = randn(2, 3, 32, 32, seed=0)
    if kind == "config":
        model = rf.resnet20()
        triple = (model, *model.init(generator(0)))
    elif kind == "module":
        triple = rf.from_module(torchvision.models.resnet18(num_classes=3))
    else:
        x = randn(2, 4, seed=0)
        triple = (rf.from_function(linear, init=draw), *draw(generator(0)))
    again = pickle.loads(pickle.dumps(triple))
    assert all(map(torch.equal, trained(*again, x), trained(*triple, x)))
    assert again[0].config == triple[0].config
    if kind != "module":
        fresh = again[0].init(generator(3))
        assert all(map(torch.equal, tree.leaves(fresh), tree.leaves(triple[0].init(generator(3)))))


def test_a_pickled_tied_module_stays_tied() -> None:
    model, params, state = pickle.loads(pickle.dumps(rf.from_module(Tied())))
    assert list(rf.to_state_dict(model, params, state)) == list(Tied().state_dict())
