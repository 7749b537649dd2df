"""The backward pass that hands over calls as it goes: the same bits, less memory, nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_func as rf
from resnet_func import losses, tree
from resnet_func import per_sample as ps
from resnet_func.per_sample import capture, engine
from resnet_func.per_sample.task import Batch, make_task
from resnet_func.testing import assert_trees_equal, assert_trees_near, randn
from tests.per_sample.cases import batch, flops, network, small
from tests.per_sample.test_any_network import CLASSES, NETWORKS, N, build, quantities


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of batching rules
@pytest.mark.parametrize("name", NETWORKS)
def test_the_bits_are_those_of_a_pass_that_contracts_at_its_end(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, params, state, x = build(name)
    transforms = {quantity: make(model) for quantity, make in quantities("auto").items()}

    def apply() -> dict[str, Any]:
        return {
            quantity: transform(params, state, x, torch.arange(N) % CLASSES)
            for quantity, transform in transforms.items()
        }

    found = apply()
    monkeypatch.setattr(capture, "_begin", lambda task, batch: None)
    assert_trees_equal(apply(), found)


def test_so_they_are_where_no_plan_can_be_made_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    model, params, state = network(small(), 0)
    x, y = batch(3, 1)

    def apply() -> Any:
        return ps.clipped_sum(model, losses.cross_entropy, max_norm=0.1)(params, state, x, y)

    found = apply()

    def refuse(*_: Any) -> None:
        raise NotImplementedError("no meta kernel")

    monkeypatch.setattr(capture, "shapes_of_factors", refuse)
    assert_trees_equal(apply(), found)


class _Live(TorchDispatchMode):
    """The most bytes that were alive at once, of what was made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree.leaves(result):
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                storage = leaf.untyped_storage()
                self.alive.setdefault(StorageWeakRef(storage), storage.nbytes())
        self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def peak(apply: Callable[[], Any]) -> int:
    with _Live() as live:
        apply()
    return live.peak


def test_norms_take_hardly_more_memory_than_a_plain_step() -> None:
    """A pass that contracts at its end holds every cotangent beside every input: it fails this by a half."""
    model = rf.resnet20(norm="group")
    params, state = model.init(torch.Generator().manual_seed(0))
    x, y = randn(8, 3, 32, 32, seed=1), torch.arange(8)

    def plain() -> None:
        leaves = tree.map(lambda leaf: leaf.detach().requires_grad_(), params)
        loss = losses.cross_entropy(model.apply(leaves, state, x, train=False)[0], y).mean()
        torch.autograd.grad(loss, tree.leaves(leaves))

    norms = ps.norms(model, losses.cross_entropy, check=False)
    clipped = ps.clipped_sum(model, losses.cross_entropy, max_norm=1.0, check=False)
    assert peak(lambda: norms(params, state, x, y)) < 1.15 * peak(plain)
    assert peak(lambda: clipped(params, state, x, y)) < 1.4 * peak(plain)


def test_what_looks_at_logits_only_has_no_backward_pass() -> None:
    model, params, state = network(small(), 0)
    x, y = batch(3, 1)
    forward = flops(lambda: model.apply(params, state, x, train=False))
    looks = ps.over_dataset(model, losses.cross_entropy, ["el2n", "loss", "correct"], check=False)
    assert flops(lambda: looks(params, state, [(x, y)])) == forward


def test_a_plan_is_made_once_for_each_size_of_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, params, state = network(small(), 0)
    made, choose = [], engine.plan_factors
    monkeypatch.setattr(
        engine,
        "plan_factors",
        lambda factors, *more, **options: made.append(1) or choose(factors, *more, **options),
    )
    norms = ps.norms(model, losses.cross_entropy)
    for size, plans in ((3, 1), (3, 1), (2, 2), (3, 2)):
        norms(params, state, *batch(size, size))
        assert len(made) == plans


def test_a_plan_is_refused_for_leaves_of_another_size_that_give_the_same_outputs() -> None:
    def apply(params: Any, state: Any, x: Tensor, *, train: bool) -> tuple[Tensor, Any]:
        padding = params["conv"].shape[2] // 2
        return F.conv2d(x, params["conv"], padding=padding).mean((2, 3)), state

    model, x, y = rf.from_function(apply), randn(2, 3, 5, 5, seed=0), torch.tensor([0, 1])
    wide, narrow = ({"conv": randn(4, 3, side, side, seed=1)} for side in (3, 1))
    plan = ps.plan(model, tuple(x.shape), "norms", params=wide)
    norms = ps.norms(model, losses.cross_entropy, method=plan)
    norms(wide, {}, x, y)
    with pytest.raises(ValueError, match="made for another network"):
        norms(narrow, {}, x, y)


def test_a_backward_pass_runs_once() -> None:
    model, params, state = network(small(), 0)
    x, y = batch(3, 1)
    task = make_task(model, losses.cross_entropy, lambda path: True, params, state)
    captured = capture.capture(task, Batch(x, y, 3, 1))
    assert list(captured.factors()) == list(tree.flatten(params))
    with pytest.raises(AssertionError, match="once"):
        captured.factors()


@pytest.mark.parametrize("name", NETWORKS)
def test_plans_made_ahead_are_those_of_the_factors(name: str) -> None:
    """Though nothing is computed for leaves that have no choice: not even on the meta device."""
    model, params, state, x = build(name)
    task = make_task(model, losses.cross_entropy, lambda path: True, params, state)

    def captured() -> capture.Captured:
        return capture.capture(task, Batch(x, torch.arange(N) % CLASSES, N, 1))

    for quantity in ("norms", "clipped_sum", "gram"):
        pending = captured().pending
        assert pending is not None
        shapes = pending.shapes()
        assert shapes is not None
        ahead, after = (engine.plan_factors(f, quantity) for f in (shapes, captured().factors()))
        assert ahead.ways == after.ways


def test_an_error_of_a_quantity_comes_out_as_it_is_and_leaves_nothing_behind() -> None:
    model, params, state = network(small(), 0)
    x, y = batch(3, 1)

    def leaf(path: str, factors: Any, way: Any) -> None:
        if path == "layer1.0.conv1.weight":
            raise LookupError("stop here")

    broken = ps.Quantity("norms", leaf, lambda answers, captured: None, lambda parts: None)
    with pytest.raises(LookupError, match="stop here"):
        ps.over_dataset(model, losses.cross_entropy, {"broken": broken})(params, state, [(x, y)])
    norms = ps.norms(model, losses.cross_entropy)(params, state, x, y)
    assert_trees_near(norms, ps.norms(model, losses.cross_entropy, method="loop")(params, state, x, y))


@pytest.mark.parametrize("taken", [(0, 1), (1,)])
def test_calls_that_return_several_tensors_or_have_no_part_in_the_loss(taken: tuple[int, ...]) -> None:
    def apply(params: Any, state: Any, x: Tensor, *, train: bool) -> tuple[Tensor, Any]:
        aside = F.linear(x, params["aside"])  # goes nowhere
        both = torch.lerp(x, aside.detach(), params["share"])
        parts = torch.var_mean(both * params["gain"], 1, keepdim=True)
        return F.linear(sum(parts[i] for i in taken) * x, params["head"]), state

    params = {
        "aside": randn(7, 7, seed=0, dtype=torch.float64),
        "share": randn(7, seed=1, dtype=torch.float64),
        "gain": randn(7, seed=2, dtype=torch.float64),
        "head": randn(CLASSES, 7, seed=3, dtype=torch.float64),
    }
    model, x, y = rf.from_function(apply), randn(N, 7, seed=4, dtype=torch.float64), torch.arange(N) % CLASSES
    expected = ps.grads(model, losses.cross_entropy, method="loop")(params, {}, x, y)
    found = ps.grads(model, losses.cross_entropy)(params, {}, x, y)
    assert_trees_near(found, expected)
    assert not found["aside"].any()
    assert found["gain"].any()
