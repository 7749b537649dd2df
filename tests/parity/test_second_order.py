"""Second derivatives agree with double backward, and wrong ones are caught."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from parity.cell import Cell, Result, run
from parity.sections import second_order
from parity.sections.second_order import Case
from resnet_func import tree
from resnet_func.models import layers, zoo
from resnet_func.types import Params


@pytest.mark.parametrize("cell", second_order.cells(quick=True), ids=lambda cell: cell.path)
def test_cell(cell: Cell) -> None:
    result = run(cell)
    assert result.outcome == "passed", result.said


def test_the_full_run_has_every_network_in_both_modes() -> None:
    names = {cell.name for cell in second_order.cells(quick=False)}
    assert names == {
        f"{name}/{product}-{mode}"
        for name in zoo.ZOO
        for product in ("hessian", "gauss-newton")
        for mode in ("train", "eval")
    }


def outcome(product: str, mode: str = "train") -> Result:
    second_order.drawn.cache_clear()
    return run(Cell("second-order", "mutant", partial(second_order.check, "resnet20", product, mode)))


def changed(monkeypatch: pytest.MonkeyPatch, product: str, by: Callable[[Params], Any]) -> Result:
    """What comes of a function whose product is another."""
    ours, theirs = second_order.PRODUCTS[product]

    def wrong(case: Case) -> tuple[Params, str, float]:
        value, identity, off = ours(case)
        return by(value), identity, off

    monkeypatch.setitem(second_order.PRODUCTS, product, (wrong, theirs))
    return outcome(product)


@pytest.mark.parametrize("product", ["hessian", "gauss-newton"])
@pytest.mark.parametrize("factor", [-1.0, 2.0, 1 + 1e-9])
def test_a_wrong_factor(product: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sign, the mean against the sum of two samples, a billionth."""
    result = changed(monkeypatch, product, lambda value: tree.map(lambda leaf: factor * leaf, value))
    assert result.outcome == "failed"
    assert result.said.startswith("worst ")
    assert f"relative error {abs(factor - 1):.3g}, allowed" in result.said


def test_one_entry_of_one_leaf(monkeypatch: pytest.MonkeyPatch) -> None:
    def nudged(value: Params) -> Params:
        def nudge(path: str, leaf: Tensor) -> Tensor:
            if path != "layer3.1.bn1.weight":
                return leaf
            return leaf + 1e-8 * leaf.norm() * torch.eye(len(leaf), dtype=leaf.dtype)[3]

        return tree.map_with_path(nudge, value)

    result = changed(monkeypatch, "hessian", nudged)
    assert result.said.startswith("worst layer3.1.bn1.weight: relative error 1e-08")


def test_the_gauss_newton_matrix_is_not_the_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    gauss_newton = second_order.PRODUCTS["gauss-newton"]
    monkeypatch.setitem(
        second_order.PRODUCTS, "gauss-newton", (second_order.hessian_product, gauss_newton[1])
    )
    assert outcome("gauss-newton").outcome == "failed"


def test_a_product_that_is_not_symmetric(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right along v and wrong along u: only symmetry tells."""
    jvp, calls = second_order.jvp, []

    def forgetful(fn: Any, primals: Any, tangents: Any) -> Any:
        calls.append(fn)
        value, product = jvp(fn, primals, tangents)
        return value, tree.map(lambda leaf: leaf * (1 + 1e-6), product) if len(calls) == 1 else product

    monkeypatch.setattr(second_order, "jvp", forgetful)
    result = outcome("hessian")
    assert result.outcome == "failed"
    assert result.said.startswith("<u,Hv> = <v,Hu> only to 1e-06")


def test_a_cotangent_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits are right, but half of every gradient does not pass a norm."""
    batch_norm = layers.batch_norm

    def detached(params: Params, state: Params, x: Tensor, *, train: bool) -> tuple[Tensor, Params]:
        y, after = batch_norm(params, state, x, train=train)
        frozen, _ = batch_norm(params, state, x.detach(), train=train)
        return (y + frozen) / 2, after

    monkeypatch.setattr(layers, "batch_norm", detached)
    for product in second_order.PRODUCTS:
        assert outcome(product).outcome == "failed"


def test_another_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module with running statistics, the function with the batch's."""
    loaded = second_order.loaded

    def frozen(*inputs: Any) -> Any:
        module = loaded(*inputs)
        monkeypatch.setattr(module, "train", lambda train: module.requires_grad_())
        return torch.nn.Module.train(module, False)

    monkeypatch.setattr(second_order, "loaded", frozen)
    assert outcome("hessian").outcome == "failed"
