"""The private step: padding counts nothing, noise once and of the right size, and else the plain step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import resnet_func as rf
from resnet_func import losses, optim, privacy, tree
from resnet_func.types import Params, TrainState
from tests.per_sample.cases import batch, generator, network, small

LR = 0.5


def start(**config: Any) -> tuple[rf.Model, TrainState]:
    model, params, state = network(small(**config), 0)
    return model, rf.train.init_train_state(params, state, optim.sgd(LR))


def private(model: rf.Model, **changes: Any) -> privacy.step.PrivateStep:
    rule: dict[str, Any] = {"max_norm": 0.5, "noise_multiplier": 0.0, "expected_batch_size": 4, **changes}
    return privacy.make_private_step(model, losses.cross_entropy, optim.sgd(LR), **rule)


def zeros(params: Params) -> Params:
    return tree.map(torch.zeros_like, params)


def moved(before: TrainState, after: TrainState) -> Params:
    """What was divided by the expected batch size and handed to the optimizer."""
    return tree.map(lambda b, a: (b - a) / LR, before.params, after.params)


def close(a: Any, b: Any) -> None:
    for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("microbatch", [None, 2])
def test_padding_counts_exactly_nothing(microbatch: int | None) -> None:
    model, before = start()
    x, y = batch(5, 1)
    mask = torch.tensor([True, False, True, True, False])
    x[1] = torch.nan
    step = private(model, microbatch=microbatch)
    after, metrics = step(before, x, y, mask, zeros(before.params))
    alone, _ = private(model)(before, x[mask], y[mask], mask[mask], zeros(before.params))
    close(after.params, alone.params)
    assert metrics["not_private/share_nonfinite"] == 0


def test_the_sum_is_divided_by_the_expected_batch_size() -> None:
    model, before = start()
    x, y = batch(3, 1)
    step, ones = private(model, expected_batch_size=7), torch.ones(3, dtype=torch.bool)
    total, _ = rf.per_sample.clipped_sum(model, losses.cross_entropy, max_norm=0.5)(before.params, {}, x, y)
    after, _ = step(before, x, y, ones, zeros(before.params))
    close(moved(before, after), tree.map(lambda leaf: leaf / 7, total))


def test_an_empty_batch_takes_a_step_of_noise_alone() -> None:
    model, before = start()
    x, y = batch(3, 1)
    noise = privacy.gaussian_noise(before.params, seed=1, step=0)
    step = private(model, noise_multiplier=2.0)
    after, metrics = step(before, x, y, torch.zeros(3, dtype=torch.bool), noise)
    close(moved(before, after), tree.map(lambda z: z * 2.0 * 0.5 / 4, noise))
    assert metrics["not_private/share_clipped"] == 0


@pytest.mark.parametrize("microbatch", [None, 1, 2])
def test_noise_is_added_once_and_scaled_by_the_sensitivity(microbatch: int | None) -> None:
    model, before = start()
    x, y = batch(4, 1)
    ones, noise = torch.ones(4, dtype=torch.bool), privacy.gaussian_noise(before.params, seed=1, step=0)
    bounds = {"": 0.3, "fc": 0.4}
    silent, _ = private(model, max_norm=bounds)(before, x, y, ones, noise)
    step = private(model, max_norm=bounds, noise_multiplier=3.0, microbatch=microbatch)
    noisy, _ = step(before, x, y, ones, noise)
    difference = tree.map(torch.sub, moved(before, noisy), moved(before, silent))
    close(difference, tree.map(lambda z: z * 3.0 * 0.5 / 4, noise))  # hypot(0.3, 0.4) is 0.5


def test_without_noise_and_bound_it_is_the_plain_step_to_the_bit() -> None:
    """On small integers, where every sum is exact in float64."""
    model, _, _ = network(small(norm="none", depths=(1,), widths=(4,)), 0)
    draw = generator(0)
    params, state = model.init(draw, dtype=torch.float64)
    params = tree.map(lambda p: torch.randint(-1, 2, p.shape, generator=draw).double(), params)
    x = torch.randint(-1, 2, (4, 3, 4, 4), generator=draw).double()
    y = torch.randint(-3, 4, (4, 3), generator=draw).double()
    before = rf.train.init_train_state(params, state, optim.sgd(LR))
    plain, _ = rf.train.make_train_step(model, losses.squared_error, optim.sgd(LR))(before, x, y)
    rule = {"max_norm": math.inf, "noise_multiplier": 0.0, "expected_batch_size": 4}
    step = privacy.make_private_step(model, losses.squared_error, optim.sgd(LR), **rule)
    after, _ = step(before, x, y, torch.ones(4, dtype=torch.bool), zeros(params))
    assert any(
        not torch.equal(a, b) for a, b in zip(tree.leaves(params), tree.leaves(after.params), strict=True)
    )
    assert all(map(torch.equal, tree.leaves(after.params), tree.leaves(plain.params)))


def test_the_average_is_of_private_parameters() -> None:
    model, _ = start()
    _, params, state = network(small(), 0)
    before = rf.train.init_train_state(params, state, optim.sgd(LR), ema=True)
    x, y = batch(4, 1)
    noise = privacy.gaussian_noise(params, seed=1, step=0)
    step = private(model, noise_multiplier=2.0, ema_decay=0.9)
    after, _ = step(before, x, y, torch.ones(4, dtype=torch.bool), noise)
    decay = 2 / 11  # (1 + t) / (10 + t) after one step
    expected = tree.map(lambda old, new: decay * old + (1 - decay) * new, params, after.params)
    close(after.ema_params, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_multiplier": privacy.NoiseMultiplier(1.0, "replace-one")}, "calibrated for neighbours"),
        ({"noise_multiplier": -1.0}, "noise_multiplier must be 0 or more"),
        ({"noise_multiplier": 1.0, "max_norm": math.inf}, "finite where there is noise"),
        ({"expected_batch_size": 0}, "expected_batch_size must be above 0"),
        ({"ema_decay": 1.0}, "ema_decay must be in"),
    ],
    ids=str,
)
def test_what_costs_the_guarantee_is_refused(changes: dict[str, Any], message: str) -> None:
    model, _ = start()
    with pytest.raises(ValueError, match=message):
        private(model, **changes)


def test_noise_of_another_shape_is_refused() -> None:
    model, before = start()
    x, y = batch(2, 1)
    short = tree.map(lambda leaf: leaf[:1], zeros(before.params))
    with pytest.raises(ValueError, match="noise must be like the parameters"):
        private(model, noise_multiplier=1.0)(before, x, y, torch.ones(2, dtype=torch.bool), short)


def test_metrics_are_those_of_the_samples_that_count() -> None:
    model, before = start()
    x, y = batch(5, 1)
    mask = torch.tensor([True, True, False, True, True])
    norms = rf.per_sample.norms(model, losses.cross_entropy)(before.params, {}, x, y)
    bound = norms[mask].sort().values[1].item() * (1 + 1e-9)  # two of four are longer
    _, metrics = private(model, max_norm=bound)(before, x, y, mask, zeros(before.params))
    assert metrics["not_private/share_clipped"] == 0.5
    ordered: Tensor = norms[mask].sort().values
    assert metrics["not_private/norm_lower_quartile"] == ordered[1]
    assert metrics["not_private/norm_upper_quartile"] == ordered[2]


@pytest.mark.parametrize(
    ("neighbours", "clipping", "expected"),
    [
        ("add-or-remove-one", "flat", 2.0),
        ("replace-one", "flat", 4.0),
        ("add-or-remove-one", "per_layer", 2.0),
        ("add-or-remove-one", "automatic", 2.0),
    ],
)
def test_sensitivity_bounds_what_a_sample_can_do(neighbours: Any, clipping: Any, expected: float) -> None:
    assert privacy.sensitivity(2.0, clipping, neighbours) == expected
    model, params, state = network(small(), 0)
    x, y = batch(4, 1)
    summed = rf.per_sample.clipped_sum(model, losses.cross_entropy, max_norm=2.0, clipping=clipping)
    whole, _ = summed(params, state, x[:3], y[:3])
    other = (x[[0, 1, 3]], y[[0, 1, 3]]) if neighbours == "replace-one" else (x[:2], y[:2])
    moved, _ = summed(params, state, *other)
    assert float(tree.norm(tree.map(torch.sub, whole, moved))) <= expected * (1 + 1e-12)


def bounded(**changes: Any) -> privacy.AdaptiveNorm:
    return privacy.AdaptiveNorm(**{"start": 0.5, "quantile": 0.5, "learning_rate": 0.2, **changes})


def test_parts_joined_are_the_whole_batch() -> None:
    model, before = start()
    x, y = batch(6, 1)
    mask = torch.tensor([True, False, True, True, True, False])
    noise = privacy.gaussian_noise(before.params, seed=1, step=0)
    whole, metrics = private(model, noise_multiplier=2.0, microbatch=2)(before, x, y, mask, noise)
    summed = rf.per_sample.clipped_sum(model, losses.cross_entropy, max_norm=0.5, nonfinite="zero")
    rule = {"max_norm": 0.5, "noise_multiplier": 2.0, "expected_batch_size": 4}
    parts = privacy.make_private_parts(summed, optim.sgd(LR), **rule)
    cuts = [slice(0, 2), slice(2, 4), slice(4, 6)]
    clipped = privacy.join([parts.clip(before, x[cut], y[cut], mask[cut]) for cut in cuts])
    joined = parts.finish(before, clipped, noise)
    assert all(map(torch.equal, tree.leaves(joined.params), tree.leaves(whole.params)))
    measured = parts.measure(before, clipped)
    assert measured.keys() == metrics.keys()
    assert all(torch.equal(measured[name], metrics[name]) for name in metrics)


def test_a_transform_that_clips_otherwise_is_refused() -> None:
    model, _ = start()
    summed = rf.per_sample.clipped_sum(model, losses.cross_entropy, max_norm=2.0)
    rule = {"max_norm": 1.0, "noise_multiplier": 1.0, "expected_batch_size": 4}
    with pytest.raises(ValueError, match="scaled by max_norm=1.0, but the transform clips at 2.0"):
        privacy.make_private_parts(summed, optim.sgd(LR), **rule)


def test_an_adaptive_bound_clips_where_it_stands_and_scales_the_noise() -> None:
    """Against the fixed step with the bound of the moment, and the share of the budget left for the sum."""
    model, params, state = network(small(), 0)
    rule = bounded(budget_share=0.36)
    before = privacy.init_private_state(params, state, optim.sgd(LR), max_norm=rule)
    moved = before._replace(opt_state=before.opt_state._replace(max_norm=torch.tensor(0.25)))
    x, y = batch(4, 1)
    noise = privacy.gaussian_noise(params, seed=1, step=0, adaptive=True)
    ones = torch.ones(4, dtype=torch.bool)
    after, metrics = private(model, max_norm=rule, noise_multiplier=0.8)(moved, x, y, ones, noise)
    plain = rf.train.init_train_state(params, state, optim.sgd(LR))
    del noise["count of unclipped samples"]
    fixed, _ = private(model, max_norm=0.25, noise_multiplier=1.0)(plain, x, y, ones, noise)
    close(after.params, fixed.params)
    assert metrics["max_norm"] == 0.25


def test_the_count_moves_the_bound_towards_the_quantile() -> None:
    """Without noise, by the rule of Andrew et al.: C exp(-lr (share unclipped - quantile))."""
    model, params, state = network(small(), 0)
    x, y = batch(4, 1)
    norms = rf.per_sample.norms(model, losses.cross_entropy)(params, state, x, y)
    start = norms.sort().values[2].item() * (1 + 1e-6)  # three of four are not clipped
    rule = bounded(start=start, quantile=0.5)
    before = privacy.init_private_state(params, state, optim.sgd(LR), max_norm=rule)
    noise = {**zeros(params), "count of unclipped samples": torch.zeros(())}
    step = private(model, max_norm=rule, noise_multiplier=0.0)
    after, _ = step(before, x, y, torch.ones(4, dtype=torch.bool), noise)
    assert after.opt_state.max_norm.item() == pytest.approx(start * math.exp(-0.2 * 0.25), rel=1e-6)


def test_sum_and_count_together_are_one_mechanism_of_the_stated_noise() -> None:
    """Two Gaussian releases compose to 1 / sigma^2 = 1 / sigma_sum^2 + 1 / sigma_count^2, with the count's
    sensitivity of one half: so the accountant's epsilon holds for both."""
    for share in (0.01, 0.3):
        rule = bounded(budget_share=share)
        of_sum, of_count = rule.sum_multiplier(1.3), rule.count_std(1.3) / 0.5
        assert of_sum**-2 + of_count**-2 == pytest.approx(1.3**-2, rel=1e-12)


def test_a_sample_moves_the_count_by_a_half() -> None:
    model, params, state = network(small(), 0)
    x, y = batch(3, 1)
    summed = rf.per_sample.clipped_sum(model, losses.cross_entropy, max_norm=0.5, nonfinite="zero")
    rule = {"max_norm": 0.5, "noise_multiplier": 1.0, "expected_batch_size": 4}
    parts, begin = privacy.make_private_parts(summed, optim.sgd(LR), **rule), rf.train.init_train_state
    before = begin(params, state, optim.sgd(LR))
    x[1] = torch.nan
    masks = torch.tensor([[True, True, True], [False, True, True], [True, False, True]])
    whole, without_first, without_odd = (parts.clip(before, x, y, mask).unclipped for mask in masks)
    assert abs(whole - without_first) == 0.5
    assert whole == without_odd  # NaN counts nothing


def test_an_adaptive_bound_without_its_state_or_its_noise_is_refused() -> None:
    model, params, state = network(small(), 0)
    x, y = batch(2, 1)
    ones, noise = torch.ones(2, dtype=torch.bool), privacy.gaussian_noise(params, seed=1, step=0)
    step = private(model, max_norm=bounded(), noise_multiplier=1.0)
    with pytest.raises(ValueError, match="init_private_state"):
        step(rf.train.init_train_state(params, state, optim.sgd(LR)), x, y, ones, noise)
    begin = privacy.init_private_state(params, state, optim.sgd(LR), max_norm=bounded())
    with pytest.raises(ValueError, match="adaptive=True"):
        step(begin, x, y, ones, noise)
    with pytest.raises(ValueError, match="an adaptive bound clips flat"):
        private(model, max_norm=bounded(), clipping="automatic")


def test_views_of_a_sample_are_averaged_before_they_are_clipped() -> None:
    """K views inside the clip: a sample adds no more than the bound, however many views it has."""
    model, before = start()
    x, y = batch(2, 1)
    views = torch.stack([x, x.flip(3), x.flip(2)], 1)
    ones = torch.ones(2, dtype=torch.bool)
    after, _ = private(model, max_norm=0.1)(before, views, y, ones, zeros(before.params))
    grads = rf.per_sample.grads(model, losses.cross_entropy)
    each = [grads(before.params, {}, view, y) for view in views.unbind(1)]
    means = tree.map(lambda *g: torch.stack(g).mean(0), *each)
    clipped = []
    for i in range(2):
        mine = tree.map(lambda g, i=i: g[i], means)
        factor = 0.1 / float(tree.norm(mine))
        clipped.append(tree.map(lambda g, f=factor: g * f, mine))
    total = tree.map(torch.add, *clipped)
    close(moved(before, after), tree.map(lambda g: g / 4, total))


@pytest.mark.nightly
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_step_is_one_graph(adaptive: bool) -> None:
    model, params, state = network(small(), 0)
    x, y = batch(4, 1)
    bound = bounded() if adaptive else 0.5
    before = privacy.init_private_state(params, state, optim.sgd(LR), max_norm=bound, ema=True)
    noise = privacy.gaussian_noise(params, seed=1, step=0, adaptive=adaptive)
    step = private(model, max_norm=bound, noise_multiplier=1.0, ema_decay=0.9)
    mask = torch.tensor([True, True, False, True])
    eager, _ = step(before, x, y, mask, noise)
    compiled, _ = torch.compile(step, fullgraph=True)(before, x, y, mask, noise)
    for a, b in zip(tree.leaves(eager), tree.leaves(compiled), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_frozen_leaves_are_refused_before_a_step() -> None:
    model = rf.resnet20(norm="group", depths=(1, 1, 1))
    head: dict[str, Any] = {"max_norm": 1.0, "nonfinite": "zero", "trainable": lambda path: path[:2] == "fc"}
    summed = rf.per_sample.clipped_sum(model, losses.cross_entropy, **head)
    rule = {"max_norm": 1.0, "noise_multiplier": 1.0, "expected_batch_size": 4}
    with pytest.raises(ValueError, match="a private step moves every leaf"):
        privacy.make_private_parts(summed, optim.sgd(0.1), **rule)
