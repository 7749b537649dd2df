"""Each layer against its formula, in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from resnet_func import tree
from resnet_func.models import layers
from resnet_func.models.layers import BatchNorm, Conv, GroupNorm, Linear, Pad
from resnet_func.testing import generator, randn

FP64 = torch.float64


def double(*shape: int, seed: int) -> Tensor:
    return randn(*shape, seed=seed, dtype=FP64)


def convolve(spec: Conv, weight: Tensor, x: Tensor) -> Tensor:
    """The definition, by loops over kernel positions and groups."""
    p, s, d = spec.padding, spec.stride, spec.dilation
    padded = torch.zeros(*x.shape[:2], x.shape[2] + 2 * p, x.shape[3] + 2 * p, dtype=x.dtype)
    padded[:, :, p : p + x.shape[2], p : p + x.shape[3]] = x
    h, w = spec.output_size(x.shape[2]), spec.output_size(x.shape[3])
    y = torch.zeros(len(x), spec.c_out, h, w, dtype=x.dtype)
    into, out = spec.c_in // spec.groups, spec.c_out // spec.groups
    for g in range(spec.groups):
        for i in range(spec.kernel):
            for j in range(spec.kernel):
                rows = slice(i * d, i * d + s * (h - 1) + 1, s)
                columns = slice(j * d, j * d + s * (w - 1) + 1, s)
                patch = padded[:, g * into : (g + 1) * into, rows, columns]
                filters = weight[g * out : (g + 1) * out, :, i, j]
                y[:, g * out : (g + 1) * out] += torch.einsum("nchw,oc->nohw", patch, filters)
    return y


@given(
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    padding=st.integers(0, 2),
    seed=st.integers(0, 2**31),
)
def test_conv_is_its_definition(
    kernel: int, stride: int, dilation: int, groups: int, padding: int, seed: int
) -> None:
    spec = Conv(4, 8, kernel, stride, padding, dilation, groups)
    weight, x = double(*spec.weight_shape, seed=seed), double(2, 4, 9, 11, seed=seed + 1)
    y = layers.conv2d(spec, {"weight": weight}, x)
    torch.testing.assert_close(y, convolve(spec, weight, x), rtol=1e-10, atol=1e-11)


def test_standardized_filters_have_mean_0_and_variance_1() -> None:
    weight = 5 + 3 * double(6, 4, 3, 3, seed=0)
    filters = layers.standardize(weight).flatten(1)
    torch.testing.assert_close(filters.mean(1), torch.zeros(6, dtype=FP64), rtol=0, atol=1e-12)
    torch.testing.assert_close(filters.square().mean(1), torch.ones(6, dtype=FP64), rtol=1e-9, atol=0)
    constant = layers.standardize(torch.full((1, 2, 3, 3), 7.0))
    assert torch.equal(constant, torch.zeros(1, 2, 3, 3))


@given(st.integers(2, 5), st.integers(0, 2**31))
def test_batch_norm_in_training(n: int, seed: int) -> None:
    x = 2 + 3 * double(n, 4, 3, 5, seed=seed)
    params = {"weight": double(4, seed=seed + 1), "bias": double(4, seed=seed + 2)}
    state = {
        "running_mean": double(4, seed=seed + 3),
        "running_var": double(4, seed=seed + 4).exp(),
        "num_batches_tracked": torch.tensor(6),
    }
    y, after = layers.batch_norm(params, state, x, train=True)
    by_channel = x.transpose(0, 1).flatten(1)
    count = by_channel.shape[1]
    mean = by_channel.mean(1)
    biased = (by_channel - mean[:, None]).square().mean(1)

    def shaped(values: Tensor) -> Tensor:
        return values[:, None, None]

    want = (x - shaped(mean)) / shaped((biased + 1e-5).sqrt()) * shaped(params["weight"]) + shaped(
        params["bias"]
    )
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-11)
    unbiased = biased * count / (count - 1)
    torch.testing.assert_close(
        after["running_mean"], 0.9 * state["running_mean"] + 0.1 * mean, rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        after["running_var"], 0.9 * state["running_var"] + 0.1 * unbiased, rtol=1e-12, atol=0
    )
    assert after["num_batches_tracked"] == 7
    evaluated, same = layers.batch_norm(params, after, x, train=False)
    assert same is after
    scale = params["weight"] / (after["running_var"] + 1e-5).sqrt()
    torch.testing.assert_close(
        evaluated,
        (x - shaped(after["running_mean"])) * shaped(scale) + shaped(params["bias"]),
        rtol=1e-9,
        atol=1e-10,
    )


@given(st.sampled_from([1, 2, 3, 6]), st.integers(0, 2**31))
def test_group_norm_is_its_formula(groups: int, seed: int) -> None:
    x = 2 + 3 * double(2, 6, 3, 5, seed=seed)
    params = {"weight": double(6, seed=seed + 1), "bias": double(6, seed=seed + 2)}
    grouped = x.reshape(2, groups, -1)
    mean, biased = grouped.mean(2, keepdim=True), grouped.var(2, correction=0, keepdim=True)
    normal = ((grouped - mean) / (biased + 1e-5).sqrt()).reshape(x.shape)
    want = normal * params["weight"][:, None, None] + params["bias"][:, None, None]
    torch.testing.assert_close(
        layers.group_norm(GroupNorm(6, groups), params, x), want, rtol=1e-10, atol=1e-11
    )


def test_pad_shortcut_keeps_every_other_pixel() -> None:
    x = double(2, 3, 5, 6, seed=0)
    y = layers.pad_shortcut(Pad(3, 8, 2), x)
    assert y.shape == (2, 8, 3, 3)
    assert torch.equal(y[:, 2:5], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 5:].any()


def test_init_follows_torchvision() -> None:
    conv, _ = layers.init_layer(Conv(64, 128, 3), generator(0), torch.device("cpu"))
    assert abs(float(conv["weight"].std()) / math.sqrt(2 / (128 * 9)) - 1) < 0.02
    linear, _ = layers.init_layer(Linear(400, 200), generator(0), torch.device("cpu"))
    for leaf in linear.values():
        assert 0.9 / 20 < float(leaf.abs().max()) <= 1 / 20


def test_meta_draws_nothing() -> None:
    source = generator(0)
    before = source.get_state()
    params, _ = layers.init_layer(Conv(3, 4, 3), source, torch.device("meta"))
    assert params["weight"].is_meta
    assert torch.equal(source.get_state(), before)


# --------------------------------------------------------------------------- derivatives of derivatives


def directional(mode: str, fn: Callable[[Tensor], Tensor], at: Tensor, along: Tensor) -> Tensor:
    """The derivative of a scalar function along a direction, by forward or by reverse mode."""
    if mode == "jvp":
        return torch.func.jvp(fn, (at,), (along,))[1]
    value, pullback = torch.func.vjp(fn, at)
    return (pullback(torch.ones_like(value))[0] * along).sum()


@pytest.mark.parametrize("wrt", ["x", "weight", "bias"])
@pytest.mark.parametrize("outer", ["jvp", "vjp"])
@pytest.mark.parametrize("inner", ["jvp", "vjp"])
@pytest.mark.parametrize("kind", ["batch-train", "batch-eval", "group"])
def test_second_derivatives_of_norms_in_every_composition(
    kind: str, inner: str, outer: str, wrt: str
) -> None:
    """Against central differences of first derivatives by reverse mode, of which torch's are right."""
    inputs = {"x": double(3, 4, 3, 3, seed=0), "weight": double(4, seed=1), "bias": double(4, seed=2)}
    state = {
        "running_mean": double(4, seed=3),
        "running_var": double(4, seed=4).exp(),
        "num_batches_tracked": torch.tensor(6),
    }
    spec = GroupNorm(4, 2) if kind == "group" else BatchNorm(4)

    def value(moved: Tensor, x: Tensor) -> Tensor:
        at = {**inputs, "x": x, wrt: moved} if wrt != "x" else {**inputs, "x": moved}
        params = {"weight": at["weight"], "bias": at["bias"]}
        y, _ = layers.apply_layer(spec, params, state, at["x"], train=kind == "batch-train")
        return (y.sin() * double(3, 4, 3, 3, seed=5)).sum() + y.pow(3).sum()

    along, x_along = double(*inputs[wrt].shape, seed=6), double(3, 4, 3, 3, seed=7)

    def first(x: Tensor, mode: str) -> Tensor:
        base = x if wrt == "x" else inputs[wrt]
        return directional(mode, lambda moved: value(moved, x), base, along)

    h = 1e-5
    x = inputs["x"]
    want = (first(x + h * x_along, "vjp") - first(x - h * x_along, "vjp")) / (2 * h)
    got = directional(outer, lambda x: first(x, inner), x, x_along)
    assert want.abs() > 1e-2
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)  # h**2 of truncation, eps / h of round-off


@pytest.mark.parametrize("wants", [False, True] if torch.__version__ >= "2.15" else [True])
def test_forward_mode_through_group_norm_takes_any_layout(
    wants: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "GROUP_NORM_WANTS_CONTIGUOUS", wants)
    spec, params = layers.GroupNorm(8, 4), {"weight": double(8, seed=0), "bias": double(8, seed=1)}
    x, direction = double(3, 8, 5, 4, seed=2), double(3, 8, 5, 4, seed=3)

    def derivative(layout: torch.memory_format) -> Tensor:
        at = x.contiguous(memory_format=layout)
        return torch.func.jvp(lambda x: layers.group_norm(spec, params, x), (at,), (direction,))[1]

    plain, channels_last = derivative(torch.contiguous_format), derivative(torch.channels_last)
    torch.testing.assert_close(channels_last, plain, rtol=1e-12, atol=1e-13)
    one_by_one = torch.vmap(lambda row: layers.group_norm(spec, params, row.permute(0, 3, 1, 2)))
    mapped = one_by_one(x.permute(0, 2, 3, 1).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(mapped, layers.group_norm(spec, params, x), rtol=1e-12, atol=1e-13)


def test_forward_mode_gives_the_values_of_the_kernel() -> None:
    params, state = {"weight": double(4, seed=1), "bias": double(4, seed=2)}, statistics(3)
    x = double(3, 4, 3, 3, seed=0)

    def fn(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return layers.batch_norm(params, state, x, train=True)

    y, after = fn(x)
    by_forward, _, after_forward = torch.func.jvp(fn, (x,), (x.cos(),), has_aux=True)
    torch.testing.assert_close(by_forward, y, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(after_forward, after, rtol=1e-12, atol=1e-13)
    narrow, _ = torch.func.jvp(
        lambda x: layers.batch_norm(
            tree.map(Tensor.float, params), tree.map(Tensor.float, state), x, train=True
        )[0],
        (x.bfloat16(),),
        (x.bfloat16(),),
    )
    assert narrow.dtype == torch.bfloat16


# --------------------------------------------------------------------------- ensembles and tasks


def statistics(seed: int) -> dict[str, Tensor]:
    return {
        "running_mean": double(4, seed=seed),
        "running_var": double(4, seed=seed + 1).exp(),
        "num_batches_tracked": torch.tensor(seed),
    }


@pytest.mark.parametrize("mapped", list(itertools.product([True, False], repeat=3))[:-1], ids=str)
def test_batch_norm_in_training_under_vmap_is_the_loop(mapped: tuple[bool, bool, bool]) -> None:
    """Over any of parameters, state and batches, the others shared."""
    members = [
        (
            {"weight": double(4, seed=k), "bias": double(4, seed=k + 9)},
            statistics(k),
            double(3, 4, 2, 2, seed=k),
        )
        for k in range(2)
    ]
    shared = members[0]

    def run(params: Any, state: Any, x: Tensor) -> Any:
        return layers.batch_norm(params, state, x, train=True)

    stacked = [
        tree.map(lambda *leaves: torch.stack(leaves), *(m[i] for m in members)) if mapped[i] else shared[i]
        for i in range(3)
    ]
    got = torch.func.vmap(run, tuple(0 if m else None for m in mapped))(*stacked)
    each = [run(*(m[i] if mapped[i] else shared[i] for i in range(3))) for m in members]
    want = tree.map(lambda *leaves: torch.stack(leaves), *each)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_single_samples_under_vmap_are_no_batches() -> None:
    params, state = {"weight": double(4, seed=1), "bias": double(4, seed=2)}, statistics(3)
    x = double(3, 4, 2, 2, seed=0)
    with pytest.raises(ValueError, match="instance norm"):
        torch.func.vmap(lambda xi: layers.batch_norm(params, state, xi[None], train=True))(x)
    layers.batch_norm(params, state, x[:1], train=True)


# --------------------------------------------------------------------------- torch's defaults


@pytest.mark.parametrize("spec", [Conv(3, 4, 3), Linear(3, 4), BatchNorm(4), GroupNorm(4, 2)], ids=str)
def test_no_default_of_torchs_changes_a_layer(spec: Any) -> None:
    want = layers.init_layer(spec, generator(0), torch.device("cpu"))
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(FP64)
        torch.set_default_device("meta")
        got = layers.init_layer(spec, torch.Generator("cpu").manual_seed(0), torch.device("cpu"))
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    for a, b in zip(tree.leaves(got), tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
