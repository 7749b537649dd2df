"""The closed form of derivations that take filters by themselves, against autograd in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import resnet_func as rf
from resnet_func import per_sample, tree
from resnet_func.losses import cross_entropy
from resnet_func.per_sample import engine
from resnet_func.per_sample.intercept import Calls, Interception, ancestors
from resnet_func.per_sample.layers import contract, factors
from resnet_func.per_sample.layers.rows import RowJacobian, row_jacobian
from resnet_func.per_sample.options import Method
from resnet_func.testing import assert_trees_near
from tests.per_sample.cases import batch, generator, network

Leaves = dict[str, Tensor]


def leaves() -> Leaves:
    source = generator(0)
    shapes = {"weight": (4, 3, 2, 2), "gain": (4,), "wide_gain": (4, 1, 1, 1)}
    return {name: torch.randn(shape, generator=source, dtype=torch.float64) for name, shape in shapes.items()}


def standardised(p: Leaves) -> Tensor:
    variance, mean = torch.var_mean(p["weight"], dim=(1, 2, 3), correction=0, keepdim=True)
    plain = (p["weight"] - mean) * torch.rsqrt(variance + 1e-10)
    return plain * (p["gain"] * 12**-0.5).reshape(-1, 1, 1, 1)


def by_batch_norm(p: Leaves) -> Tensor:
    weight, gain = p["weight"].reshape(1, 4, -1), (p["wide_gain"] * 0.3).view(-1)
    options = {"weight": gain, "bias": p["gain"], "training": True, "momentum": 0.0, "eps": 1e-6}
    return F.batch_norm(weight, None, None, **options).reshape_as(p["weight"])


def by_steps(p: Leaves) -> Tensor:
    flat = p["weight"].flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    scaled = 1.5 * centred / flat.std(dim=1, keepdim=True) - flat.pow(3) * p["gain"].exp().unsqueeze(1)
    return (scaled / (flat.square().sum(1, keepdim=True).sqrt() + 0.1)).view_as(p["weight"])


def by_arithmetic(p: Leaves) -> Tensor:
    weight = 2 - p["weight"]
    spread = weight.var((1, 2, 3), keepdim=True).reciprocal()
    return -(weight * weight) * spread + p["wide_gain"] ** 2


def by_weight_norm(p: Leaves) -> Tensor:
    return torch._weight_norm(p["weight"], p["wide_gain"], 0)  # pyright: ignore[reportPrivateImportUsage]


CLOSED: dict[str, Callable[[Leaves], Tensor]] = {
    "standardised": standardised,
    "batch-norm": by_batch_norm,
    "steps": by_steps,
    "arithmetic": by_arithmetic,
    "weight-norm": by_weight_norm,
    "biased": lambda p: p["weight"] / p["weight"].var((1, 2, 3), unbiased=False, keepdim=True),
    "corrected": lambda p: p["weight"] / p["weight"].var((1, 2, 3), correction=3, keepdim=True),
    "doubled": lambda p: 2 * p["weight"],
}
OPEN: dict[str, Callable[[Leaves], Tensor]] = {
    "transposed": lambda p: p["weight"].transpose(0, 1) * 2,
    "over-rows": lambda p: p["weight"] / p["weight"].mean((0, 1, 2, 3), keepdim=True),
    "over-part": lambda p: p["weight"] - p["weight"].mean((2, 3), keepdim=True),
    "whole-sum": lambda p: p["weight"].flatten(1) * p["gain"].unsqueeze(1).sum((), keepdim=True),
    "own-sum": lambda p: p["weight"].flatten(1) * (p["gain"] / p["gain"].sum(())).unsqueeze(1),
    "softmax": lambda p: p["weight"].softmax(1),
    "in-place": lambda p: (p["weight"] * 2).mul_(3),
    "by-columns": lambda p: p["weight"].permute(1, 0, 2, 3)[:, :, 0, 0] * p["gain"],
}


def jacobian_of(derive: Callable[[Leaves], Tensor], path: str) -> RowJacobian | None:
    given = leaves()
    calls = Calls(given, [], batch=5)
    with Interception(calls):
        tensor = derive(given)
    return row_jacobian(
        ancestors(calls, calls.sources[tensor]), tensor, given[path], {t: t for t in given.values()}
    )


@pytest.mark.parametrize("path", ["weight", "gain", "wide_gain"])
@pytest.mark.parametrize("name", CLOSED)
def test_pull_back_is_autograds(name: str, path: str) -> None:
    given, derive = leaves(), CLOSED[name]
    value = derive(given)
    pullback = torch.func.vjp(lambda leaf: derive({**given, path: leaf}), given[path])[1]
    cotangents = torch.randn((5, *value.shape), generator=generator(1), dtype=torch.float64)
    expected = torch.stack([pullback(cotangent)[0] for cotangent in cotangents])
    jacobian = jacobian_of(derive, path)
    if jacobian is None:  # the leaf is not used
        assert not expected.any()
    else:
        torch.testing.assert_close(
            jacobian.pull_back(cotangents).reshape(expected.shape), expected, rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("name", CLOSED)
def test_closed_form_of_the_weight_is_found(name: str) -> None:
    assert jacobian_of(CLOSED[name], "weight") is not None


@pytest.mark.parametrize("name", OPEN)
def test_what_mixes_rows_has_no_closed_form(name: str) -> None:
    path = "gain" if name in ("whole-sum", "own-sum", "by-columns") else "weight"
    assert jacobian_of(OPEN[name], path) is None


class StandardisedByBatchNorm(nn.Conv2d):
    """As timm writes it."""

    def forward(self, input: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-6)
        return F.conv2d(input, weight.reshape_as(self.weight), self.bias, padding=1)


def affine(
    block: Literal["basic", "preact"] = "basic", *, standardise: bool = True, gains: bool = True
) -> rf.ResNetConfig:
    return rf.ResNetConfig(
        block=block,
        depths=(1, 1),
        widths=(4, 8),
        stem="cifar",
        norm="group",
        norm_groups=2,
        weight_standardization=standardise,
        standardization_affine=gains,
        num_classes=3,
    )


def make_network(name: str) -> tuple[rf.Model, rf.Params, rf.State]:
    if name == "affine":
        return network(affine(), 0)
    if name == "preact":
        return network(affine("preact"), 0)
    layers = StandardisedByBatchNorm(3, 4, 3), nn.ReLU(), nn.Flatten(), weight_norm(nn.Linear(4 * 6 * 7, 3))
    model, params, state = rf.from_module(nn.Sequential(*layers).double())
    source = generator(0)
    return model, tree.map(lambda p: torch.randn(p.shape, generator=source, dtype=p.dtype), params), state


@pytest.fixture
def _closed_forms_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leaf that is pulled back by autograd is a failure."""

    def refuse(derive: Callable[[Tensor], Tensor], *_: object) -> None:
        raise AssertionError("pulled back by autograd")

    monkeypatch.setattr(contract.torch.func, "vjp", refuse)


def results(name: str, method: Method) -> dict[str, Any]:
    model, params, state = make_network(name)
    x, y = batch(5, 1, size=6)
    grads = per_sample.grads(model, cross_entropy, method=method, check=False)(params, state, x, y)
    norms = per_sample.norms(model, cross_entropy, method=method, check=False)(params, state, x, y)
    summed = per_sample.clipped_sum(model, cross_entropy, max_norm=1.0, method=method, check=False)
    return {"grads": grads, "norms": norms, "sum": summed(params, state, x, y)[0]}


@pytest.mark.parametrize("name", ["affine", "preact", "modules"])
def test_networks_agree_with_vmap(name: str) -> None:
    expected = results(name, "vmap")
    assert_trees_near(results(name, "auto"), expected, 1e-10)


@pytest.mark.usefixtures("_closed_forms_only")
@pytest.mark.parametrize("name", ["affine", "modules"])
def test_nothing_is_pulled_back_by_autograd(name: str) -> None:
    results(name, "auto")


def weight_passes(config: rf.ResNetConfig) -> int:
    """Backward passes of convolutions in one clipped sum."""
    model, params, state = network(config, 0, torch.float32)
    x, y = batch(8, 1, dtype=torch.float32)
    summed = per_sample.clipped_sum(model, cross_entropy, max_norm=1.0, check=False)
    with torch.profiler.profile() as profile:
        summed(params, state, x, y)
    return sum(event.count for event in profile.key_averages() if event.key == "aten::convolution_backward")


def test_gains_cost_no_weight_pass() -> None:
    assert weight_passes(affine()) == weight_passes(affine(gains=False)) > 0


def test_every_sample_slice_is_pulled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not all gradients of a layer fit, leaves that derive together are looked at apart."""
    expected = results("affine", "auto")
    sliced = partial(factors.sample_slices, max_elements=100)
    monkeypatch.setattr(contract, "sample_slices", sliced)
    monkeypatch.setattr(engine, "sample_slices", sliced)
    assert_trees_near(results("affine", "auto"), expected, 1e-12)
