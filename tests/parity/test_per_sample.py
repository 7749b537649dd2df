"""Per-sample quantities of any network agree with single backward passes, and wrong ones are caught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from parity.cell import run
from parity.sections import per_sample
from parity.sections.per_sample_networks import HAND_WRITTEN, TIMM, TORCHVISION
from resnet_func.per_sample import collect
from resnet_func.per_sample.layers import contract, layer_factors

CELLS = {cell.name: cell for cell in per_sample.cells(quick=False)}
FAST = [name for name in CELLS if name in HAND_WRITTEN or name.startswith("wrapped-")]


@pytest.mark.parametrize("name", FAST)
def test_cell(name: str) -> None:
    result = run(CELLS[name])
    assert result.outcome == "passed", result.said


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in CELLS if name not in FAST])
def test_networks_of_others(name: str) -> None:
    result = run(CELLS[name])
    assert result.outcome == "passed", result.said


def test_the_full_run_has_every_network() -> None:
    for name in TORCHVISION:
        assert {f"torchvision:{name}-batch", f"torchvision:{name}-group"} <= CELLS.keys()
    assert {f"timm:{name}" for name in TIMM} <= CELLS.keys()


def wrong(function: Callable[..., Tensor], factor: float) -> Callable[..., Tensor]:
    return lambda *given, **more: factor * function(*given, **more)


@pytest.mark.parametrize("name", ["grads", "squared_norms", "weighted_sum", "inner_products"])
def test_a_billionth_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, name, wrong(getattr(contract, name), 1 + 1e-9))
    result = run(CELLS["conv1d"])
    assert result.outcome == "failed"
    assert "allowed 1e-10" in result.said


def test_a_tied_weight_that_is_counted_once_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = collect._as_one
    monkeypatch.setattr(collect, "_as_one", lambda leaf, parts: whole(leaf, parts[:1]))
    assert run(CELLS["tied-autoencoder"]).outcome == "failed"


def test_the_row_of_padding_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_padding(layer: Any, *tensors: Any, padding_idx: int | None = None, **more: Any) -> Any:
        return rule(layer, *tensors[:2], **more)

    rule = layer_factors.RULES[torch.nn.functional.embedding]
    monkeypatch.setitem(layer_factors.RULES, torch.nn.functional.embedding, without_padding)
    assert "embed.weight" in run(CELLS["embedding"]).said
