"""Plans: right about shapes, right about which way is cheaper, and obedient to a budget."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.console import Console

import resnet_func as rf
from resnet_func import losses, tree
from resnet_func import per_sample as ps
from resnet_func.per_sample import engine
from resnet_func.per_sample.plan import Plan, plan_factors
from resnet_func.per_sample.quantities import quantity as quantity_of_leaves
from tests.per_sample.cases import batch, network, small

QUANTITIES = ("grads", "norms", "clipped_sum", "gram", "sketch", "moments")


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_plan_covers_every_weight_and_counts(quantity: str) -> None:
    model = rf.resnet20(norm="group")
    params, _ = model.init(torch.Generator().manual_seed(0))
    plan = ps.plan(model, (64, 3, 32, 32), quantity)
    weights = {path: leaf for path, leaf in tree.flatten(params).items() if leaf.ndim > 1}
    assert {entry.path: entry.weights for entry in plan.entries} == {p: w.numel() for p, w in weights.items()}
    positions = {entry.path: entry.positions for entry in plan.entries}
    assert positions["conv1.weight"] == 1024
    assert positions["layer3.0.conv1.weight"] == 64
    assert positions["fc.weight"] == 1
    if quantity in ("grads", "moments", "sketch"):
        assert {entry.way for entry in plan.entries} == {"materialize"}
        stem = plan.entries[0]
        assert stem.flops == 2 * 64 * 1024 * 432
        assert stem.bytes == 64 * 432 * 4
    if quantity == "gram":
        assert plan.entries[0].flops == 2 * 64 * 1024 * 432 + 2 * 64**2 * 432  # gradients, and their products
        assert plan.entries[-1].way == "ghost"
        assert plan.entries[-1].flops == 2 * 64**2 * (64 + 10)
        assert plan.entries[-1].bytes == 64**2 * (1 + 2) * 4
    if quantity == "norms":
        assert plan.entries[-1].way == "ghost"
        assert plan.entries[-1].flops == 2 * 64 * (64 + 10)
        assert plan.entries[-1].bytes == 64 * (1 + 2) * 4


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_transform_takes_the_ways_of_its_own_plan(quantity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, params, state = network(small(), 0)
    x, y = batch(2, 1)
    asked = []

    def note(factors: Any, quantity: str, **options: Any) -> Plan:
        asked.append(quantity)
        return plan_factors(factors, quantity, **options)

    monkeypatch.setattr(engine, "plan_factors", note)
    options = {"max_norm": 1.0} if quantity == "clipped_sum" else {}
    transform = getattr(ps, quantity)(model, losses.cross_entropy, train=False, **options)
    transform(params, state, *([(x, y)] if quantity == "gram" else [x, y]))
    assert asked == [quantity]


@pytest.mark.parametrize("quantity", ["norms", "clipped_sum"])
def test_the_ways_of_a_plan_are_taken(quantity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, params, state = network(small(), 0)
    x, y = batch(3, 1)
    made = ps.plan(model, tuple(x.shape), quantity, 600)
    assert set(made.ways.values()) >= {"ghost", "materialize"}
    first_look = "_squared_norms" if quantity == "norms" else "_first_pass"
    look, taken = getattr(quantity_of_leaves, first_look), {}

    def note(path: str, factors: Any, way: Any) -> Any:
        taken[path] = way
        return look(path, factors, way)

    monkeypatch.setattr(quantity_of_leaves, first_look, note)
    options = {"max_norm": 1.0} if quantity == "clipped_sum" else {}
    getattr(ps, quantity)(model, losses.cross_entropy, method=made, **options)(params, state, x, y)
    assert taken == {path: made.ways.get(path, "materialize") for path in tree.flatten(params)}


def test_views_count_as_pixels() -> None:
    model = rf.resnet20(norm="group")
    one, four = (ps.plan(model, shape, "norms") for shape in ((8, 3, 32, 32), (8, 4, 3, 32, 32)))
    assert [4 * e.positions for e in one.entries] == [e.positions for e in four.entries]


def test_the_measured_shapes_go_the_measured_way() -> None:
    """What `python -m benchmarks per-sample --layers` measures: ghost where maps are small."""
    ways = ps.plan(rf.resnet18(num_classes=10, stem="cifar", norm="group"), (32, 3, 32, 32), "norms").ways
    assert ways["layer4.1.conv2.weight"] == "ghost"
    assert ways["layer3.1.conv2.weight"] == "ghost"
    assert ways["layer4.0.conv1.weight"] == "ghost"
    assert ways["fc.weight"] == "ghost"
    assert ways["conv1.weight"] == "materialize"
    assert ways["layer1.0.conv1.weight"] == "materialize"
    assert ways["layer2.0.downsample.0.weight"] == "materialize"
    small_maps = ps.plan(rf.resnet20(norm="group"), (64, 3, 32, 32), "norms").ways
    assert small_maps["layer1.0.conv1.weight"] == "materialize"
    assert small_maps["layer2.1.conv1.weight"] == "materialize"
    grouped = ps.plan(rf.resnext50_32x4d(norm="group"), (8, 3, 160, 160), "norms").ways
    assert grouped["layer1.1.conv2.weight"] == "materialize"


def test_standardized_weights_are_materialized() -> None:
    model = rf.resnet18(num_classes=10, stem="cifar", norm="group", weight_standardization=True)
    ways = ps.plan(model, (32, 3, 32, 32), "norms", 0).ways
    assert {way for path, way in ways.items() if path != "fc.weight"} == {"materialize"}


def test_a_budget_is_kept() -> None:
    model = rf.resnet18(num_classes=10, stem="cifar", norm="group")
    shape = (32, 3, 32, 32)
    free = ps.plan(model, shape, "clipped_sum", 2**40)
    assert {entry.way for entry in free.entries} >= {"keep"}
    sizes = sorted(entry.bytes for entry in free.entries if entry.way == "keep")
    budget = 2**26
    for limit in (budget, sizes[0], sum(sizes[:3]), sum(sizes[:3]) - 1):
        tight = ps.plan(model, shape, "clipped_sum", limit)
        kept = sum(entry.bytes for entry in tight.entries if entry.way == "keep")
        assert 0 < kept <= limit < free.peak_bytes
    for entry in free.entries:  # the gradients, and their weighted sum
        if entry.way == "keep":
            assert entry.flops == 2 * 32 * entry.positions * entry.weights + 2 * 32 * entry.weights
    none = ps.plan(model, shape, "clipped_sum", 0)
    assert "keep" not in none.ways.values()
    with_budget = ps.plan(model, shape, "norms", budget)
    assert all(entry.bytes <= budget for entry in with_budget.entries)


def test_frozen_leaves_are_not_planned() -> None:
    plan = ps.plan(rf.build(small()), (4, 3, 8, 8), "norms", trainable=lambda path: path.startswith("fc."))
    assert list(plan.ways) == ["fc.weight"]
    plan = ps.plan(rf.build(small()), (4, 3, 8, 8), "norms", trainable=lambda path: path == "fc.bias")
    assert plan.ways == {}


def test_explain_prints_every_layer() -> None:
    model = rf.build(small())
    out = io.StringIO()
    plan = ps.plan(model, (4, 3, 8, 8), "clipped_sum")
    plan.explain(Console(file=out, width=120))
    text = out.getvalue()
    for entry in plan.entries:
        row = next(line for line in text.splitlines() if entry.path in line)
        assert entry.way in row
        assert f"{entry.weights:,}" in row
        assert f"{entry.flops / 1e6:,.1f}" in row
        assert f"{entry.cost / 1e6:.3f}" in row
    total = next(line for line in text.splitlines() if "all (bytes at most)" in line)
    assert f"{sum(e.flops for e in plan.entries) / 1e6:,.1f}" in total
    assert f"{plan.peak_bytes / 1e6:,.2f}" in total
    assert f"{sum(e.cost for e in plan.entries) / 1e6:.3f}" in total
    assert f"{sum(e.weights for e in plan.entries):,}" in total
    for header in ("layer", "T", "D", "method", "MFLOP", "MB"):
        assert header in text


def test_a_network_from_a_module_has_the_plan_of_its_config() -> None:
    config = rf.build(small())
    params, state = config.init(torch.Generator().manual_seed(0))
    function = rf.Model(None, config.init, config.apply)
    of_config = ps.plan(config, (4, 3, 8, 8), "clipped_sum")
    assert ps.plan(function, (4, 3, 8, 8), "clipped_sum", params=params, state=state) == of_config
    assert of_config.entries


def test_a_plan_of_another_network_or_image_is_refused() -> None:
    model, params, state = network(small(), 0)
    x, y = batch(4, 1)
    for other in (
        ps.plan(rf.resnet20(norm="group"), x.shape, "norms"),
        ps.plan(model, (4, 3, 6, 6), "norms"),
    ):
        with pytest.raises(ValueError, match="another network or input"):
            ps.norms(model, losses.cross_entropy, method=other)(params, state, x, y)
    fits = ps.plan(model, (9, *x.shape[1:]), "norms")  # another number of samples is no other plan
    ps.norms(model, losses.cross_entropy, method=fits)(params, state, x, y)


def test_mistakes_of_plans_are_named() -> None:
    model = rf.build(small())

    def refuse(*_: object, **__: object) -> tuple[dict[str, object], dict[str, object]]:
        raise NotImplementedError

    for arguments, message in (
        ((model, (4, 3, 8, 8), "norm"), "quantity must be one of"),
        ((model, (3, 8, 8), "norms"), "expected an input shape"),
        ((rf.Model(None, refuse, model.apply), (4, 3, 8, 8), "norms"), "params="),
    ):
        with pytest.raises(ValueError, match=message):
            ps.plan(*arguments)


def test_a_plan_of_tokens_and_of_one_logit() -> None:
    """The dtype of the inputs is told; a batch that does not fit is refused in one line."""
    module = torch.nn.Sequential(torch.nn.Embedding(9, 6), torch.nn.Flatten(), torch.nn.Linear(30, 1))
    network, params, state = rf.from_module(module)
    model = rf.from_function(lambda p, x: network.apply(p, {}, x, train=False)[0][:, 0])
    with pytest.raises(ValueError, match=r"batch \[4, 6\] of torch.int64 .* input_dtype=torch.int64"):
        ps.plan(model, (4, 6), "norms", params=params, state=state, input_dtype=torch.int64)
    plan = ps.plan(model, (4, 5), "norms", params=params, state=state, input_dtype=torch.int64)
    x, y = torch.arange(20).reshape(4, 5) % 9, torch.zeros(4)
    got, want = (
        ps.norms(model, lambda logits, y: logits.square(), method=method)(params, state, x, y)
        for method in (plan, "loop")
    )
    torch.testing.assert_close(got, want)


def test_a_kept_gradient_is_paid_for_in_memory_that_no_cache_holds() -> None:
    """Where forming and looking twice come to the same, keeping gradients of every layer is slower."""
    model = rf.resnet20(norm="group")
    plan = ps.plan(model, (64, 3, 32, 32), "clipped_sum")
    entry = {entry.path: entry for entry in plan.entries}["layer3.1.conv2.weight"]
    norms = ps.plan(model, (64, 3, 32, 32), "norms")
    formed = {entry.path: entry for entry in norms.entries}[entry.path]
    traffic = entry.costs["keep"] - formed.costs["materialize"]
    assert traffic == pytest.approx(3 * 64 * entry.weights * 4 * plan.speeds.byte)
