"""The calls of a network: against torch's own counter, its modules' attributes, and networks made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import resnet_func as rf
from resnet_func.models.layer_calls import Call, record_all_calls, record_calls


def calls_of(module: nn.Module, x: Tensor) -> list[Call]:
    return record_calls(*rf.from_module(module), x)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A convolution of any kind, and its input."""
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    sizes = st.integers(1, 3)
    transposed = draw(st.booleans())
    make: Any = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    kernel, stride, dilation = (tuple(draw(sizes) for _ in range(dims)) for _ in range(3))
    c_in, c_out = (groups * draw(sizes) for _ in range(2))
    module = make(c_in, c_out, kernel, stride, dilation=dilation, groups=groups, bias=draw(st.booleans()))
    return module, torch.zeros(draw(st.integers(0, 1)), c_in, *(draw(st.integers(7, 9)) for _ in range(dims)))


@given(convolutions())
def test_a_convolution_is_what_the_module_says(drawn: tuple[nn.Module, Tensor]) -> None:
    module, x = drawn
    made: Any = module
    (call,) = calls_of(module, x)
    assert call.function in type(module).__name__.lower().replace("transpose", "_transpose")
    assert call.kind == ("transposed conv" if "Transpose" in type(module).__name__ else "conv")
    assert call.paths == tuple(name for name, _ in module.named_parameters())
    assert call.leaves == {path: path for path in call.paths}
    for name in ("stride", "dilation", "groups"):
        assert call.options[name] == getattr(made, name)
    assert call.weight_shape == tuple(made.weight.shape)
    assert (call.input_shape, call.output_shape) == (tuple(x.shape), tuple(module(x).shape))
    with FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, *x.shape[1:]))
    assert call.macs == counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("module", "kind", "options"),
    [
        (nn.BatchNorm2d(4, eps=0.1), "batch norm", {"eps": 0.1}),
        (nn.InstanceNorm2d(4, affine=True), "instance norm", {"eps": 1e-5}),
        (nn.GroupNorm(2, 4), "group norm", {"num_groups": 2}),
        (nn.LayerNorm((4, 6, 6)), "layer norm", {"normalized_shape": (4, 6, 6)}),
        (nn.PReLU(4), "other", {}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_norms(module: nn.Module, kind: str, options: dict[str, Any]) -> None:
    (call,) = calls_of(module, torch.zeros(1, 4, 6, 6))
    assert (call.kind, call.macs) == (kind, 0)
    assert {key: call.options[key] for key in options} == options
    assert call.paths == tuple(name for name, _ in module.named_parameters())


def test_layers_without_parameters_are_no_calls() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4, elementwise_affine=False))
    assert [call.paths for call in calls_of(module, torch.zeros(0, 4))] == [("0.weight", "0.bias")]


def test_options_have_the_names_of_the_functions_signature() -> None:
    def apply(params: Any, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool1d(F.dropout((x @ params["w"]).split(2, 1)[0], 0.25, False), 2)

    model = rf.from_function(apply)
    calls = record_all_calls(model, {"w": torch.ones(3, 4)}, {}, torch.zeros(2, 3), train=False)
    options = {call.function: call.options for call in calls}
    assert options["split"] == {"split_size": 2, "dim": 1}
    assert options["dropout"] == {"p": 0.25, "training": False}
    assert options["adaptive_avg_pool1d"] == {"1": 2}  # built in


class Odd(nn.Module):
    """A standardised weight, a class token, a position added in place, and a parameter that only scales."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 1))
        self.token, self.position = nn.Parameter(torch.ones(1, 1, 4)), nn.Parameter(torch.ones(1, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean(1, keepdim=True)) * self.gain
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x += self.position
        return F.linear(x, weight).relu()


def test_what_is_made_of_parameters_counts_as_them() -> None:
    calls = [(call.function, call.paths, call.leaves) for call in calls_of(Odd(), torch.zeros(1, 2, 4))]
    assert calls == [
        ("cat", ("token",), {}),
        ("add", ("position",), {"1": "position"}),
        ("linear", ("weight", "gain"), {}),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_is_its_four_projections(dtype: torch.dtype) -> None:
    module = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dtype=dtype)
    calls = calls_of(module, torch.zeros(1, 5, 8, dtype=dtype))
    assert [call.kind for call in calls] == ["attention", "layer norm", "linear", "linear", "layer norm"]
    assert [call.macs for call in calls if call.macs] == [5 * 4 * 64, 5 * 8 * 16, 5 * 16 * 8]


def test_the_batch_multiplies() -> None:
    one, three = (calls_of(nn.Linear(4, 2), torch.zeros(n, 4))[0].macs for n in (1, 3))
    assert (one, three) == (8, 24)


def test_the_network_is_run_as_it_is() -> None:
    """The recording changes nothing: no state, no gradient, and the wrappers' passes are all recorded."""
    model = rf.resnet20()
    params, state = model.init(torch.Generator())
    x = torch.zeros(1, 3, 32, 32)
    bare, twice = (record_calls(m, params, state, x) for m in (model, rf.train.average_flips(model)))
    assert twice == [*bare, *bare]
    fast = record_calls(rf.winograd.wrap(model), params, state, x)
    assert [(c.paths, c.kind, c.output_shape, c.macs) for c in fast] == [
        (c.paths, c.kind, c.output_shape, c.macs) for c in bare
    ]
    assert state["bn1"]["num_batches_tracked"] == 0


def test_every_call_tells_its_arguments_and_its_memory() -> None:
    def apply(params: Any, x: Tensor) -> Tensor:
        weight = params["weight"] * 2
        y = F.linear(x.T, weight)
        return F.relu_(y)[:1]

    model, weight = rf.from_function(apply), torch.zeros(3, 2)
    calls = record_all_calls(model, {"weight": weight}, {}, torch.zeros(2, 4), train=True)
    assert [(call.function, call.arguments.storage) for call in calls] == [
        ("mul", "new"),
        ("get", "view"),
        ("linear", "new"),
        ("relu", "in place"),
        ("getitem", "view"),
    ]
    given, by = calls[2].arguments.args
    assert (given.shape, given.stride, given.depends_on) == ((4, 2), (1, 4), "input")
    assert (by.shape, by.dtype, by.depends_on) == ((3, 2), torch.float32, "parameters")
    assert calls[2].sources == (calls[1],)
    assert calls[0].sources == ()
    assert record_calls(model, {"weight": weight}, {}, torch.zeros(2, 4)) == [calls[2]]
