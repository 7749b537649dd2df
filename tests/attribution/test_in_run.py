"""In-run values against products of gradients, the Hessian, and the step itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_func import tree
from resnet_func.attribution import in_run_values
from tests.attribution.oracle import CE, close, gradient_rows, tiny
from tests.per_sample.cases import batch

RATE = 0.03


def validation_loss(flat: Tensor, like: Any, model: Any, state: Any, x: Tensor, y: Tensor) -> Tensor:
    """As a function of the parameters in a row, leaves in the order of their paths."""
    leaves = tree.flatten(like)
    parts = flat.split([leaves[path].numel() for path in sorted(leaves)])
    named = dict(zip(sorted(leaves), parts, strict=True))
    params = tree.unflatten({path: named[path].view(leaf.shape) for path, leaf in leaves.items()})
    return CE(model.apply(params, state, x, train=False)[0], y).mean()


def test_values_are_the_products_of_the_taylor_series() -> None:
    model, params, state = tiny()
    ours, validation = batch(4, 1), batch(3, 2)
    rows = gradient_rows(model, params, state, *ours)
    flat = torch.cat([leaf.flatten() for _, leaf in sorted(tree.flatten(params).items())])
    args = (params, model, state, *validation)
    gradient = torch.func.grad(validation_loss)(flat, *args)
    first = in_run_values(model, CE)(params, state, ours, validation, RATE)
    close(first, RATE * rows @ gradient)
    _, curved = torch.func.jvp(
        lambda at: torch.func.grad(validation_loss)(at, *args), (flat,), (rows.sum(0),)
    )
    second = in_run_values(model, CE, order=2)(params, state, ours, validation, RATE)
    close(second, rows @ (RATE * gradient - RATE**2 / 2 * curved))


def test_values_add_up_to_what_the_step_does() -> None:
    """The order of the error: halving the rate divides it by 4, and by 8."""
    model, params, state = tiny()
    ours, validation = batch(4, 1), batch(3, 2)
    rows = gradient_rows(model, params, state, *ours)
    flat = torch.cat([leaf.flatten() for _, leaf in sorted(tree.flatten(params).items())])

    def error(order: Any, rate: float) -> float:
        args = (params, model, state, *validation)
        drop = validation_loss(flat, *args) - validation_loss(flat - rate * rows.sum(0), *args)
        values = in_run_values(model, CE, order=order)(params, state, ours, validation, rate)
        return float((drop - values.sum()).abs())

    rate = 1e-5
    assert error(1, rate) / error(1, rate / 2) == pytest.approx(4, rel=0.1)
    assert error(2, rate) / error(2, rate / 2) == pytest.approx(8, rel=0.1)


def test_trainable_limits_them_and_odd_orders_are_refused() -> None:
    model, params, state = tiny()
    ours, validation = batch(4, 1), batch(3, 2)
    head = in_run_values(model, CE, trainable=lambda path: path.startswith("fc."))
    rest = in_run_values(model, CE, trainable=lambda path: not path.startswith("fc."))
    whole = in_run_values(model, CE)(params, state, ours, validation, RATE)
    parts = [run(params, state, ours, validation, RATE) for run in (head, rest)]
    close(parts[0] + parts[1], whole)
    with pytest.raises(ValueError, match="order must be 1 or 2; got 3"):
        in_run_values(model, CE, order=3)  # type: ignore[arg-type]
