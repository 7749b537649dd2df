"""The NumPy and the JAX networks agree with ours, and a changed layer is caught by both."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, get_args
from unittest import SkipTest, mock

import numpy as np
import pytest
import torch.nn.functional as F
from torch import Tensor

from parity.cell import Cell, Result, run
from parity.sections import oracle_numpy, oracles
from resnet_func import tree
from resnet_func.models import blocks, layers, resnet, zoo
from resnet_func.models.config import ActivationOrder, ResNetConfig
from resnet_func.types import Params, State


@pytest.mark.parametrize("cell", oracles.cells(quick=True), ids=lambda cell: cell.path)
def test_cell(cell: Cell) -> None:
    result = run(cell)
    assert result.outcome == "passed", result.said


def test_the_full_run_has_every_network_in_both_modes() -> None:
    names = {cell.name for cell in oracles.cells(quick=False)}
    wanted = {f"{n}/{o}-{m}" for n in zoo.ZOO for o in ("numpy", "jax") for m in ("train", "eval")}
    assert wanted <= names
    assert {f"{name}/jax-train" for name in oracles.OTHERS} <= names


def test_the_other_configs_cover_what_the_zoo_leaves_out() -> None:
    others = oracles.OTHERS.values()
    assert {config.norm for config in others} == {"batch", "group", "none"}
    assert {config.block for config in others} == {"basic", "bottleneck", "preact"}
    assert any(config.weight_standardization for config in others)
    assert any(config.standardization_affine for config in others)
    assert {config.order for config in others} == set(get_args(ActivationOrder))
    assert {config.scale_norm for config in others if config.activation_order} == {False, True}
    assert any(any(config.replace_stride_with_dilation) for config in others)
    assert any(config.groups > 1 and any(config.replace_stride_with_dilation) for config in others)
    assert any(config.block == "preact" and config.shortcut == "pad" for config in others)


# --------------------------------------------------------------------------- what must be caught


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What a changed layer made is no one else's."""
    oracles.ours.cache_clear()
    yield
    oracles.ours.cache_clear()


def outcome(name: str, oracle: str, mode: str) -> Result:
    return run(Cell("oracles", "mutant", partial(oracles.check, name, oracle, mode)))


def assert_caught(name: str, mode: str, *leaves: str) -> None:
    """Both oracles fail, and name one of these leaves as the worst."""
    for oracle in oracles.ORACLES:
        result = outcome(name, oracle, mode)
        assert result.outcome == "failed", oracle
        assert result.said.startswith(tuple(f"worst {leaf}" for leaf in leaves)), result.said


def test_the_momentum_of_batch_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "BATCH_NORM_MOMENTUM", 0.9)
    assert_caught("preact-pad", "train", "buffer ")


def test_a_biased_running_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    batch_norm = layers.batch_norm

    def biased(params: Params, state: State, x: Tensor, *, train: bool) -> tuple[Tensor, State]:
        y, after = batch_norm(params, state, x, train=train)
        if train:
            var = 0.9 * state["running_var"] + 0.1 * x.var((0, 2, 3), correction=0)
            after = {**after, "running_var": var}
        return y, after

    monkeypatch.setattr(layers, "batch_norm", biased)
    assert_caught("preact-pad", "train", "buffer ")


def test_the_epsilon_of_a_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "NORM_EPS", 1.001e-5)
    assert_caught("preact-pad", "eval", "logits", "gradient ")
    assert_caught("group-norm", "train", "logits", "gradient ")


def test_a_missing_relu(monkeypatch: pytest.MonkeyPatch) -> None:
    def basic_block(layer: blocks.Scope, x: Tensor) -> Tensor:
        y = layer("bn2", layer("conv2", layer("bn1", layer("conv1", x))))
        return F.relu(y + blocks.shortcut(layer, x))

    monkeypatch.setitem(blocks.BLOCKS, "basic", basic_block)
    assert_caught("no-norm", "train", "logits", "gradient ")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("dilated", {"padding": 2, "dilation": 2}),
        ("dilated-groups", {"padding": 1, "dilation": 1}),
        ("standardized", {"standardize": False}),
    ],
)
def test_one_convolution_of_layer3(
    name: str, change: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another padding and dilation give maps of the same size."""
    made = resnet.layer_specs

    def changed(config: ResNetConfig) -> resnet.Specs:
        specs = made(config)
        block = specs["layer3"]["1"]
        assert replace(block["conv2"], **change) != block["conv2"]
        block["conv2"] = replace(block["conv2"], **change)
        return specs

    monkeypatch.setattr(resnet, "layer_specs", changed)
    assert_caught(name, "train", "logits", "gradient ", "buffer ")


def test_a_shortcut_that_pads_at_one_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def pad_shortcut(spec: layers.Pad, x: Tensor) -> Tensor:
        x = x[:, :, :: spec.stride, :: spec.stride]
        return F.pad(x, (0, 0, 0, 0, 0, spec.c_out - spec.c_in))

    monkeypatch.setattr(layers, "pad_shortcut", pad_shortcut)
    assert_caught("preact-pad", "eval", "logits", "gradient ")


def test_a_gradient_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits are right: JAX sees what NumPy cannot."""
    linear = layers.linear

    def halved(params: Params, x: Tensor) -> Tensor:
        y = linear(params, x)
        return y / 2 + y.detach() / 2

    monkeypatch.setattr(layers, "linear", halved)
    assert outcome("no-norm", "numpy", "train").outcome == "passed"
    result = outcome("no-norm", "jax", "train")
    assert (result.outcome, result.said.partition(":")[0][:15]) == ("failed", "worst gradient ")


def test_float32_is_no_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = oracle_numpy.apply

    def single(*inputs: Any, train: bool) -> tuple[oracle_numpy.Array, dict[str, Any]]:
        logits, after = apply(*inputs, train=train)
        return logits.astype(np.float32), after

    monkeypatch.setattr(oracle_numpy, "apply", single)
    result = outcome("no-norm", "numpy", "train")
    assert result.said == "logits is torch.float32: the comparison needs torch.float64"


def test_jax_without_its_switch_is_float32_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jax")
    monkeypatch.setattr(oracles, "float64", lambda jax: jax.enable_x64(False))
    result = outcome("no-norm", "jax", "train")
    assert result.outcome == "failed"
    assert "torch.float32: the comparison needs torch.float64" in result.said


def test_the_switch_does_not_leak() -> None:
    jax = pytest.importorskip("jax")
    assert outcome("no-norm", "jax", "train").outcome == "passed"
    assert jax.numpy.zeros(1).dtype == jax.numpy.float32


def test_without_jax_its_cells_say_so() -> None:
    with mock.patch.dict(sys.modules, {"jax": None}):
        with pytest.raises(SkipTest, match="no JAX here"):
            oracles.jax_and_oracle()
        result = outcome("no-norm", "jax", "train")
    assert result.outcome == "skipped"


# --------------------------------------------------------------------------- the JAX network on its own


@pytest.mark.parametrize("name", ["dilated-groups", "group-norm", "preact-pad"])
def test_the_layouts_agree_under_jit(name: str) -> None:
    jax = pytest.importorskip("jax")
    from parity.sections import oracle_jax

    config = oracles.OTHERS[name]
    (params, state, x, _), want = oracles.ours(config, train=True)
    apply = jax.jit(oracle_jax.apply, static_argnames=("config", "train", "layout"))
    params, state, x = tree.map(lambda leaf: jax.numpy.asarray(leaf.numpy()), (params, state, x))
    nchw, after = apply(config, params, state, x, train=True)
    nhwc, again = apply(config, params, state, x.transpose(0, 2, 3, 1), train=True, layout="NHWC")
    assert nchw.dtype == nhwc.dtype == jax.numpy.float32
    assert jax.tree.structure(after) == jax.tree.structure(again)
    for logits in (nchw, nhwc):
        np.testing.assert_allclose(logits, want["logits"].numpy(), rtol=1e-3, atol=1e-3)
