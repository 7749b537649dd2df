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
@pytest.mark.parametrize("head", [False, True], ids=["all", "head"])
def test_a_step_is_one_graph(adaptive: bool, head: bool) -> None:
    model, params, state = network(small(), 0)
    x, y = batch(4, 1)
    bound, chosen = bounded() if adaptive else 0.5, {"trainable": is_head} if head else {}
    before = privacy.init_private_state(params, state, optim.sgd(LR), max_norm=bound, ema=True, **chosen)
    noise = privacy.gaussian_noise(params, seed=1, step=0, adaptive=adaptive, **chosen)
    step = private(model, max_norm=bound, noise_multiplier=1.0, ema_decay=0.9, **chosen)
    mask = torch.tensor([True, True, False, True])
    eager, _ = step(before, x, y, mask, noise)
    compiled, _ = torch.compile(step, fullgraph=True)(before, x, y, mask, noise)
    for a, b in zip(tree.leaves(eager), tree.leaves(compiled), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


# --------------------------------------------------------------------------- a head alone


def is_head(path: str) -> bool:
    return path.startswith("fc.")


def head_start(optimizer: rf.optim.Optimizer) -> tuple[rf.Model, TrainState, Tensor, Tensor]:
    model, params, state = network(small(), 0)
    begin = privacy.init_private_state(params, state, optimizer, ema=True, trainable=is_head)
    return model, begin, *batch(4, 1)


@pytest.mark.parametrize("microbatch", [None, 2])
def test_without_noise_and_bound_a_head_takes_the_plain_step(microbatch: int | None) -> None:
    optimizer = optim.adamw(0.1, weight_decay=0.5)
    model, begin, x, y = head_start(optimizer)
    loss, options = losses.cross_entropy, {"ema_decay": 0.9, "trainable": is_head}
    plain, _ = rf.train.make_train_step(model, loss, optimizer, **options)(begin, x, y)
    rule = {"max_norm": math.inf, "noise_multiplier": 0.0, "expected_batch_size": 4, "microbatch": microbatch}
    step = privacy.make_private_step(model, loss, optimizer, **rule, **options)
    noise = privacy.gaussian_noise(begin.params, seed=1, step=0, trainable=is_head)
    after, _ = step(begin, x, y, torch.ones(4, dtype=torch.bool), noise)
    close(after, plain)


def test_frozen_leaves_and_their_average_stay_the_same_tensors() -> None:
    optimizer = optim.adamw(0.1, weight_decay=0.5)
    model, begin, x, y = head_start(optimizer)
    begin = begin._replace(ema_params=tree.map(lambda leaf: leaf + 1, begin.params))
    options = {"noise_multiplier": 1.0, "ema_decay": 0.9, "trainable": is_head}
    rule: dict[str, Any] = {"max_norm": 0.5, "expected_batch_size": 4, **options}
    step = privacy.make_private_step(model, losses.cross_entropy, optimizer, **rule)
    noise = privacy.gaussian_noise(begin.params, seed=1, step=0, trainable=is_head)
    after, _ = step(begin, x, y, torch.ones(4, dtype=torch.bool), noise)
    for before, now in ((begin.params, after.params), (begin.ema_params, after.ema_params)):
        old, new = tree.flatten(before), tree.flatten(now)
        assert list(old) == list(new)
        assert {path for path in old if old[path] is not new[path]} == {"fc.weight", "fc.bias"}
    assert tree.flatten(after.opt_state.exp_avg).keys() == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic"])
def test_a_head_is_the_whole_of_a_network_with_its_body_closed_over(clipping: Any) -> None:
    """To the bit, metrics too: sensitivity and noise know nothing of the frozen rest."""
    optimizer = optim.sgd(LR, momentum=0.9, weight_decay=0.1)
    model, begin, x, y = head_start(optimizer)
    body = begin.params

    def apply(head: Params, state: Params, x: Tensor, *, train: bool) -> Any:
        return model.apply({**body, "fc": head["fc"]}, state, x, train=train)

    alone = rf.from_function(apply)
    only = privacy.init_private_state({"fc": body["fc"]}, begin.state, optimizer, ema=True)
    rule: dict[str, Any] = {"max_norm": 0.5, "noise_multiplier": 1.0, "expected_batch_size": 4}
    rule |= {"ema_decay": 0.9, "clipping": clipping}
    ones, loss = torch.ones(4, dtype=torch.bool), losses.cross_entropy
    noises = (
        privacy.gaussian_noise(body, seed=3, step=5, trainable=is_head),
        privacy.gaussian_noise({"fc": body["fc"]}, seed=3, step=5),
    )
    assert all(map(torch.equal, tree.leaves(noises[0]), tree.leaves(noises[1])))
    step = privacy.make_private_step(model, loss, optimizer, trainable=is_head, **rule)
    closed = privacy.make_private_step(alone, loss, optimizer, **rule)
    got, metrics = step(begin, x, y, ones, noises[0])
    want, wanted = closed(only, x, y, ones, noises[1])
    pairs = zip(tree.leaves(got.params["fc"]), tree.leaves(want.params["fc"]), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    close((got.ema_params["fc"], got.opt_state, metrics), (want.ema_params["fc"], want.opt_state, wanted))


def test_an_adaptive_bound_on_a_head() -> None:
    adaptive = bounded()
    model, params, state = network(small(), 0)
    begin = privacy.init_private_state(params, state, optim.sgd(LR), max_norm=adaptive, trainable=is_head)
    noise = privacy.gaussian_noise(params, seed=1, step=0, adaptive=True, trainable=is_head)
    head = privacy.gaussian_noise({"fc": params["fc"]}, seed=1, step=0, adaptive=True)
    assert all(map(torch.equal, tree.leaves(noise), tree.leaves(head)))
    step = private(model, max_norm=adaptive, noise_multiplier=1.0, trainable=is_head)
    after, metrics = step(begin, *batch(4, 1), torch.ones(4, dtype=torch.bool), noise)
    assert after.opt_state.max_norm != metrics["max_norm"]
    assert after.params["conv1"]["weight"] is params["conv1"]["weight"]


def test_noise_or_state_of_all_leaves_is_refused_for_a_head() -> None:
    """Noise on what is frozen would hide nothing, and momentum of it would be lost."""
    optimizer = optim.sgd(LR, momentum=0.9)
    model, begin, x, y = head_start(optimizer)
    rule: dict[str, Any] = {"max_norm": 0.5, "noise_multiplier": 1.0, "expected_batch_size": 4}
    step = privacy.make_private_step(model, losses.cross_entropy, optimizer, trainable=is_head, **rule)
    ones = torch.ones(4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"'conv1.weight' must be None; got .* the trainable= of the step"):
        step(begin, x, y, ones, privacy.gaussian_noise(begin.params, seed=1, step=0))
    noise = privacy.gaussian_noise(begin.params, seed=1, step=0, trainable=is_head)
    for_all = privacy.init_private_state(begin.params, begin.state, optimizer)
    with pytest.raises(ValueError, match="state holds .* give init_train_state the same trainable"):
        step(for_all, x, y, ones, noise)


def test_without_noise_and_samples_the_signal_is_none() -> None:
    model, before = start()
    x, y = batch(3, 1)
    nobody, everybody = torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    _, of_nobody = private(model)(before, x, y, nobody, zeros(before.params))
    assert {name: float(value) for name, value in of_nobody.items() if value != 0} == {}
    _, of_all = private(model)(before, x, y, everybody, zeros(before.params))
    assert of_all["not_private/signal_to_noise"] == math.inf
