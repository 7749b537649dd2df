"""The training step against plain autograd and torch.optim, and the loops around it."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import resnet_func as rf
from resnet_func import optim, tree
from resnet_func.losses import cross_entropy
from resnet_func.train import (
    Progress,
    autocast,
    average_flips,
    evaluate,
    fit,
    init_train_state,
    make_eval_step,
    make_train_step,
    train_epoch,
)

SIZE, CLASSES, BATCH = 8, 4, 6


def tiny(norm="batch"):
    return rf.build(
        rf.ResNetConfig(
            block="basic",
            depths=(1, 1),
            # 8 or more: oneDNN (torch 2.15, AVX2) writes out of bounds in the weight gradient of a strided
            # 1x1 convolution of fewer input channels in channels_last, which inductor chooses.
            widths=(8, 16),
            stem="cifar",
            norm=norm,
            norm_groups=2,
            num_classes=CLASSES,
        )
    )


def make_batch(seed=0, size=BATCH, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, SIZE, SIZE, generator=generator, dtype=dtype)
    return x, torch.randint(CLASSES, (size,), generator=generator)


def start(model, optimizer, *, ema=False, dtype=torch.float64):
    params, state = model.init(torch.Generator().manual_seed(1), dtype=dtype)
    return init_train_state(params, state, optimizer, ema=ema)


def assert_trees_equal(a, b):
    a, b = tree.leaves(a), tree.leaves(b)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def test_step_is_autograd_and_torch_sgd_to_the_bit():
    model, (x, y) = tiny(), make_batch(dtype=torch.float32)
    optimizer = optim.sgd(0.1, momentum=0.9, weight_decay=1e-2, nesterov=True)
    train_state = start(model, optimizer, dtype=torch.float32)
    step = make_train_step(model, cross_entropy, optimizer)

    leaves = {k: v.clone().requires_grad_() for k, v in tree.flatten(train_state.params).items()}
    torch_optimizer = torch.optim.SGD(leaves.values(), 0.1, momentum=0.9, weight_decay=1e-2, nesterov=True)
    state = train_state.state
    for _ in range(5):
        train_state, metrics = step(train_state, x, y)
        logits, state = model.apply(tree.unflatten(leaves), state, x, train=True)
        state = tree.map(torch.Tensor.detach, state)
        # the step's objective is the sum over the batch size, as one division
        loss = F.cross_entropy(logits, y, reduction="none").sum() / BATCH
        torch_optimizer.zero_grad()
        loss.backward()
        torch_optimizer.step()
        assert torch.equal(metrics["loss"], loss)
        assert torch.equal(metrics["accuracy"], (logits.argmax(1) == y).float().mean())
        assert_trees_equal(train_state.params, tree.unflatten(dict(leaves)))
        assert_trees_equal(train_state.state, state)


def test_step_mutates_nothing():
    model, (x, y) = tiny(), make_batch()
    optimizer = optim.adamw(1e-2)
    train_state = start(model, optimizer, ema=True)
    before = tree.map(torch.clone, (train_state, x, y))
    make_train_step(model, cross_entropy, optimizer, ema_decay=0.9)(train_state, x, y)
    assert_trees_equal((train_state, x, y), before)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.integers(2, 9), pieces=st.integers(1, 4))
def test_microbatches_give_the_gradient_of_the_whole_batch(seed, size, pieces):
    model, (x, y) = tiny(norm="group"), make_batch(seed, size)
    optimizer = optim.sgd(1.0)
    whole, whole_metrics = make_train_step(model, cross_entropy, optimizer)(start(model, optimizer), x, y)
    step = make_train_step(model, cross_entropy, optimizer, microbatches=pieces)
    cut, cut_metrics = step(start(model, optimizer), x, y)
    for a, b in zip(tree.leaves(whole.params), tree.leaves(cut.params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(whole_metrics["loss"], cut_metrics["loss"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole_metrics["accuracy"], cut_metrics["accuracy"])  # a float32 share


def test_ema_follows_its_formula():
    model, (x, y) = tiny(), make_batch()
    optimizer = optim.sgd(0.1)
    step = make_train_step(model, cross_entropy, optimizer, ema_decay=0.3)
    train_state = start(model, optimizer, ema=True)
    expected, expected_state = train_state.params, train_state.state
    for t in (1, 2, 3, 4):
        train_state, _ = step(train_state, x, y)
        decay = min(0.3, (1 + t) / (10 + t))
        expected = tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, expected, train_state.params)
        mean = expected_state["bn1"]["running_mean"]
        new = train_state.state["bn1"]["running_mean"]
        expected_state = {"bn1": {"running_mean": decay * mean + (1 - decay) * new}}
    for a, b in zip(tree.leaves(expected), tree.leaves(train_state.ema_params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    ema_state = train_state.ema_state
    torch.testing.assert_close(
        ema_state["bn1"]["running_mean"], expected_state["bn1"]["running_mean"], rtol=1e-12, atol=1e-14
    )
    assert ema_state["bn1"]["num_batches_tracked"] == 4


def test_whole_step_compiles_as_one_graph_and_does_not_recompile():
    model, (x, y) = tiny(), make_batch(dtype=torch.float32)
    schedule = optim.one_cycle(0.5, 10, warmup_fraction=0.3)
    optimizer = optim.clipped(optim.sgd(schedule, momentum=0.9, nesterov=True, weight_decay=1e-3), 1.0)
    step = make_train_step(model, cross_entropy, optimizer, ema_decay=0.9)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend=counter)
    eager_state = compiled_state = start(model, optimizer, ema=True, dtype=torch.float32)
    traces = set()
    for _ in range(4):
        eager_state, eager_metrics = step(eager_state, x, y)
        compiled_state, metrics = compiled(compiled_state, x, y)
        traces.add(counter.frame_count)
        torch.testing.assert_close(metrics, eager_metrics, rtol=1e-4, atol=1e-5)
    assert len(traces) == 1  # all of it in the first call, which may trace again to specialise floats
    for a, b in zip(tree.leaves(eager_state), tree.leaves(compiled_state), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_autocast_computes_in_bf16_and_returns_float32():
    model, (x, _) = tiny(), make_batch(dtype=torch.float32)
    params, state = model.init(torch.Generator().manual_seed(0))
    exact, _ = model.apply(params, state, x, train=True)
    mixed, mixed_state = autocast(model, "cpu", torch.bfloat16).apply(params, state, x, train=True)
    assert mixed.dtype == torch.float32
    assert 0 < (mixed - exact).norm() / exact.norm() < 0.05
    assert {leaf.dtype for leaf in tree.leaves(mixed_state)} == {torch.float32, torch.int64}


def test_average_flips_is_invariant_under_mirroring():
    model, (x, _) = tiny(), make_batch()
    params, state = model.init(torch.Generator().manual_seed(0), dtype=torch.float64)
    averaged = average_flips(model)
    a, _ = averaged.apply(params, state, x, train=False)
    b, _ = averaged.apply(params, state, x.flip(3), train=False)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(a, model.apply(params, state, x, train=False)[0])


def test_train_epoch_stopped_and_gone_on_with_is_the_same():
    model, batches = tiny(), [make_batch(seed) for seed in range(4)]
    optimizer = optim.adam(1e-2)
    step = make_train_step(model, cross_entropy, optimizer)
    clock = itertools.count().__next__
    *_, (whole, whole_progress) = train_epoch(step, start(model, optimizer), batches, Progress(2), clock)
    first = list(itertools.islice(train_epoch(step, start(model, optimizer), batches, Progress(2), clock), 2))
    half, progress = first[-1]
    assert (progress.epoch, progress.batch, progress.samples) == (2, 2, 2 * BATCH)
    *_, (resumed, progress) = train_epoch(step, half, batches[2:], progress, clock)
    assert_trees_equal(whole, resumed)
    assert whole_progress[:5] == progress[:5]


def test_evaluate_counts_every_sample():
    model = tiny()
    params, state = model.init(torch.Generator().manual_seed(0), dtype=torch.float64)
    x, y = make_batch(size=7)
    parts = list(zip(x.split(3), y.split(3), strict=True))
    evaluation = evaluate(make_eval_step(model, cross_entropy), params, state, parts)
    logits, _ = model.apply(params, state, x, train=False)
    assert evaluation.accuracy == (logits.argmax(1) == y).double().mean()
    assert evaluation.loss == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-6)
    with pytest.raises(ValueError, match="empty"):
        evaluate(make_eval_step(model, cross_entropy), params, state, [])


def test_fit_learns_and_leaves_the_global_generator_alone():
    model = tiny()
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(CLASSES, (64,), generator=generator)
    x = torch.randn(64, 3, SIZE, SIZE, generator=generator) * 0.1 + y[:, None, None, None] - 1.5
    optimizer = optim.sgd(0.1, momentum=0.9)
    step = make_train_step(model, cross_entropy, optimizer)
    before = torch.get_rng_state()
    train_state = start(model, optimizer, dtype=torch.float32)
    _, records = fit(step, train_state, x, y, epochs=30, batch_size=16, generator=generator)
    assert torch.equal(before, torch.get_rng_state())
    assert [record["epoch"] for record in records] == list(range(1, 31))
    assert records[-1]["train_accuracy"] > 0.9 > records[0]["train_accuracy"]


def test_mistakes_are_refused():
    model, optimizer = tiny(), optim.sgd(0.1)
    with pytest.raises(ValueError, match="microbatches must be 1 or more; got 0"):
        make_train_step(model, cross_entropy, optimizer, microbatches=0)
    with pytest.raises(ValueError, match=r"ema_decay must be in \[0, 1\); got 1"):
        make_train_step(model, cross_entropy, optimizer, ema_decay=1.0)
    step = make_train_step(model, cross_entropy, optimizer)
    train_state, (x, y) = start(model, optimizer), make_batch()
    generator = torch.Generator()
    with pytest.raises(ValueError, match="batch_size must be 1 to 6"):
        fit(step, train_state, x, y, epochs=1, batch_size=7, generator=generator)
    with pytest.raises(ValueError, match="int64"):
        fit(step, train_state, x, y.float(), epochs=1, batch_size=2, generator=generator)


# --------------------------------------------------------------------------- refusals and targets


def linear(dtype: torch.dtype = torch.float64) -> rf.types.Model:
    """Logits `x @ weight + bias`, for questions that need no ResNet."""

    def init(generator, *, device=None, dtype=dtype):
        return {"weight": torch.zeros(3, 2, dtype=dtype), "bias": torch.zeros(2, dtype=dtype)}, {}

    def apply(params, state, x, *, train):
        return x @ params["weight"] + params["bias"], state

    return rf.types.Model(None, init, apply)


@pytest.mark.parametrize("microbatches", [1, 3])
def test_an_empty_batch_is_refused_before_anything_is_computed(microbatches):
    calls = []

    def apply(params, state, x, *, train):
        calls.append(len(x))
        return linear().apply(params, state, x, train=train)

    optimizer = optim.adamw(0.1, weight_decay=0.5)
    train_state = init_train_state(*linear().init(torch.Generator()), optimizer)
    model = linear()._replace(apply=apply)
    step = make_train_step(model, cross_entropy, optimizer, microbatches=microbatches)
    x, y = torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="at least one sample; got an empty batch"):
        step(train_state, x, y)
    assert not calls


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_reduced_loss_is_refused_by_whoever_takes_one(reduction):
    model, optimizer = linear(), optim.sgd(0.1)
    params, state = model.init(torch.Generator())
    x, y = torch.ones(4, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1])

    def loss_fn(logits, targets):
        return F.cross_entropy(logits, targets, reduction=reduction)

    with pytest.raises(ValueError, match=r"one loss per sample, \[4\]; got \[\]\. Leave out the reduction"):
        make_train_step(model, loss_fn, optimizer)(init_train_state(params, state, optimizer), x, y)
    with pytest.raises(ValueError, match=r"one loss per sample, \[4\]; got \[\]"):
        make_eval_step(model, loss_fn)(params, state, x, y)
    with pytest.raises(ValueError, match=r"one loss per sample, \[4\]; got \[\]"):
        evaluate(lambda p, s, x, y: (loss_fn(x @ p["weight"], y), x), params, state, [(x, y)])


def test_a_metric_is_per_sample_and_has_a_name_of_its_own():
    model, optimizer = linear(), optim.sgd(0.1)
    train_state = init_train_state(*model.init(torch.Generator()), optimizer)
    x, y = torch.ones(4, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1])
    mean = {"top1": lambda logits, y: (logits.argmax(1) == y).double().mean()}
    with pytest.raises(ValueError, match=r"the metric 'top1' must return one value per sample, \[4\]; got"):
        make_train_step(model, cross_entropy, optimizer, metrics=mean)(train_state, x, y)
    with pytest.raises(ValueError, match="call yours by another name"):
        make_train_step(model, cross_entropy, optimizer, metrics={"loss": rf.losses.accuracy})


# N = classes among them, where soft targets were taken for class indices
@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_soft_targets_have_no_accuracy_but_what_metrics_say(n, microbatches):
    model, optimizer = linear(), optim.sgd(1.0)
    train_state = init_train_state(*model.init(torch.Generator()), optimizer)
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    y = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    _, metrics = make_train_step(model, rf.losses.squared_error, optimizer)(train_state, x, y)
    assert metrics.keys() == {"loss"}
    ours = {"top1": lambda logits, y: logits.argmax(1) == y.argmax(1), "largest": lambda _, y: y.amax(1)}
    step = make_train_step(model, rf.losses.squared_error, optimizer, metrics=ours, microbatches=microbatches)
    new_state, metrics = step(train_state, x, y)
    # all logits are 0 at first, so that the first class is predicted and the residual is -y
    assert metrics["loss"].item() == pytest.approx(0.5 * y.square().sum().item() / n, rel=1e-12)
    assert metrics["largest"].item() == pytest.approx(y.amax(1).mean().item(), rel=1e-12)
    assert metrics["top1"].item() == pytest.approx((y.argmax(1) == 0).double().mean().item(), rel=1e-6)
    torch.testing.assert_close(new_state.params["weight"], x.T @ y / n, rtol=1e-12, atol=1e-14)
    evaluation = evaluate(
        make_eval_step(model, rf.losses.squared_error), train_state.params, {}, [(x, y), (x, y)]
    )
    assert torch.equal(evaluation.targets, torch.cat([y, y]))
    with pytest.raises(ValueError, match="accuracy needs class indices"):
        _ = evaluation.accuracy


@pytest.mark.parametrize("microbatches", [1, 2, 5, 9])
def test_targets_may_be_a_tree_and_every_leaf_is_cut(microbatches):
    model, optimizer = linear(), optim.sgd(1.0)
    train_state = init_train_state(*model.init(torch.Generator()), optimizer)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    y = {
        "goal": torch.randn(5, 2, generator=generator, dtype=torch.float64),
        "more": (torch.rand(5, generator=generator, dtype=torch.float64),),
    }

    def weighted(logits, targets):
        return targets["more"][0] * rf.losses.squared_error(logits, targets["goal"])

    new_state, metrics = make_train_step(model, weighted, optimizer, microbatches=microbatches)(
        train_state, x, y
    )
    pull = y["more"][0][:, None] * y["goal"]
    torch.testing.assert_close(new_state.params["weight"], x.T @ pull / 5, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(new_state.params["bias"], pull.mean(0), rtol=1e-12, atol=1e-14)
    assert metrics.keys() == {"loss"}
    _, records = fit(
        make_train_step(model, weighted, optimizer),
        train_state,
        x,
        y,
        epochs=1,
        batch_size=5,
        generator=generator,
    )
    assert records[0]["train_loss"] == pytest.approx(metrics["loss"].item(), rel=1e-12)
    evaluation = evaluate(make_eval_step(model, weighted), train_state.params, {}, [(x, y), (x, y)])
    assert_trees_equal(evaluation.targets, tree.map(lambda leaf: torch.cat([leaf, leaf]), y))
    short = {**y, "more": (y["more"][0][:4],)}
    with pytest.raises(ValueError, match=r"the samples first, 5 as in the images; got \[4\]"):
        make_train_step(model, weighted, optimizer)(train_state, x, short)


# --------------------------------------------------------------------------- narrow sums, graphs, stacks


def test_a_thousand_microbatches_in_bfloat16_take_the_right_step():
    """A sum of a thousand equal parts, kept in bfloat16, stops at about a third of it."""
    model, n, bf16 = linear(torch.bfloat16), 1000, torch.bfloat16
    optimizer = optim.sgd(1.0)
    params, _ = model.init(torch.Generator())
    row, goal = torch.tensor([1.0, -2.0, 0.5], dtype=bf16), torch.tensor([0.75, -1.5], dtype=bf16)
    x, y = row.expand(n, 3).contiguous(), goal.expand(n, 2).contiguous()
    share = {"all": lambda logits, y: torch.ones(len(y), dtype=bf16)}
    step = make_train_step(model, rf.losses.squared_error, optimizer, microbatches=n, metrics=share)
    new_state, metrics = step(init_train_state(params, {}, optimizer), x, y)
    # from zeros the step is the outer product; a part's gradient, its sum and the move are rounded
    want = torch.outer(row.double(), goal.double())
    close = 3 * torch.finfo(bf16).eps
    torch.testing.assert_close(new_state.params["weight"].double(), want, rtol=close, atol=0)
    torch.testing.assert_close(new_state.params["bias"].double(), goal.double(), rtol=close, atol=0)
    assert new_state.params["weight"].dtype == bf16
    at_once = make_train_step(model, rf.losses.squared_error, optimizer, metrics=share)
    for measured in (metrics, at_once(init_train_state(params, {}, optimizer), x, y)[1]):
        assert {value.dtype for value in measured.values()} == {torch.float32}
    summed = n * torch.finfo(torch.float32).eps
    assert metrics["all"].item() == pytest.approx(1.0, rel=summed)
    loss = 0.5 * goal.double().square().sum().item()
    assert metrics["loss"].item() == pytest.approx(loss, rel=summed + close)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_no_graph_grows_from_parameters_that_require_grad(microbatches):
    model, optimizer = linear(), optim.adamw(0.1)
    params, _ = model.init(torch.Generator())
    params = tree.map(torch.nn.Parameter, params)
    train_state = init_train_state(params, {}, optimizer, ema=True)
    # one that a user made by hand, too
    train_state = train_state._replace(params=params)
    plain = train_state._replace(params=tree.map(torch.Tensor.detach, params))
    x, y = torch.ones(4, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 1])
    step = make_train_step(model, cross_entropy, optimizer, microbatches=microbatches, ema_decay=0.9)
    for _ in range(20):
        train_state, metrics = step(train_state, x, y)
        plain, _ = step(plain, x, y)
        for leaf in tree.leaves((train_state, metrics)):
            assert leaf.grad_fn is None
            assert not leaf.requires_grad
    assert_trees_equal(train_state, plain)
    losses, logits = make_eval_step(model, cross_entropy)(params, {}, x, y)
    assert losses.grad_fn is logits.grad_fn is None


def test_a_gradient_through_a_step_is_still_taken():
    """What is detached is what requires grad by itself, not what a transform differentiates."""
    model, (x, y) = linear(), (torch.eye(3, dtype=torch.float64), torch.tensor([0, 1, 1]))
    optimizer = optim.sgd(0.5)
    step = make_train_step(model, cross_entropy, optimizer)

    def after(params):
        train_state, _ = step(init_train_state(params, {}, optimizer), x, y)
        return tree.norm(train_state.params)

    params = tree.map(lambda leaf: leaf + 0.3, model.init(torch.Generator())[0])
    grads, h = torch.func.grad(after)(params), 1e-6
    bump = torch.zeros(3, 2, dtype=torch.float64)
    bump[1, 0] = h
    up, down = ({**params, "weight": params["weight"] + sign * bump} for sign in (1, -1))
    assert grads["weight"][1, 0].item() == pytest.approx(
        ((after(up) - after(down)) / (2 * h)).item(), rel=1e-6
    )


@pytest.mark.parametrize("shared_state", [False, True])
@pytest.mark.parametrize("ema", [False, True])
def test_vmap_over_stacked_states_is_the_loop(ema, shared_state):
    model, (x, y) = tiny(), make_batch()
    optimizer = optim.adamw(1e-2)
    step = make_train_step(model, cross_entropy, optimizer, ema_decay=0.9 if ema else None)
    members = [model.init(torch.Generator().manual_seed(s), dtype=torch.float64) for s in range(3)]
    states = [init_train_state(params, members[0][1], optimizer, ema=ema) for params, _ in members]
    stacked = tree.map(lambda *leaves: torch.stack(leaves), *states)
    dims = tree.map(lambda _: 0, stacked)
    if shared_state:
        stacked = stacked._replace(state=members[0][1])
        dims = dims._replace(state=None)
    got, metrics = torch.func.vmap(step, (dims, None, None))(stacked, x, y)
    wanted = [step(train_state, x, y) for train_state in states]
    for i, (train_state, wanted_metrics) in enumerate(wanted):
        a, b = tree.leaves((got, metrics)), tree.leaves((train_state, wanted_metrics))
        for leaf, want in zip(a, b, strict=True):
            torch.testing.assert_close(leaf[i], want, rtol=1e-8, atol=1e-10)


# --------------------------------------------------------------------------- trainable


def is_head(path):
    return path.startswith("fc.")


@pytest.mark.parametrize("microbatches", [1, 2])
def test_frozen_leaves_come_back_as_they_are(microbatches):
    model, (x, y) = tiny(norm="group"), make_batch()
    optimizer = optim.adamw(1e-2, weight_decay=0.5)
    params, state = model.init(torch.Generator().manual_seed(1), dtype=torch.float64)
    train_state = init_train_state(params, state, optimizer, ema=True, trainable=is_head)
    assert tree.flatten(train_state.opt_state.exp_avg).keys() == {"fc.weight", "fc.bias"}
    step = make_train_step(
        model, cross_entropy, optimizer, trainable=is_head, ema_decay=0.9, microbatches=microbatches
    )
    got, _ = step(train_state, x, y)
    before, after = tree.flatten(train_state.params), tree.flatten(got.params)
    assert list(after) == list(before)
    assert {path for path in after if after[path] is not before[path]} == {"fc.weight", "fc.bias"}
    assert tree.flatten(got.opt_state.exp_avg).keys() == {"fc.weight", "fc.bias"}
    # what is trained moves as it would among the others, for adam looks at one leaf at a time
    whole, _ = make_train_step(model, cross_entropy, optimizer, ema_decay=0.9)(
        init_train_state(params, state, optimizer, ema=True), x, y
    )
    for path in ("fc.weight", "fc.bias"):
        for field in ("params", "ema_params"):
            a, b = (tree.flatten(getattr(s, field))[path] for s in (got, whole))
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    for path, leaf in tree.flatten(got.ema_params).items():
        assert is_head(path) or torch.equal(leaf, before[path])


def test_running_statistics_move_in_a_frozen_network():
    model, (x, y) = tiny(), make_batch()
    optimizer = optim.sgd(0.1, momentum=0.9)
    params, state = model.init(torch.Generator().manual_seed(1), dtype=torch.float64)
    step = make_train_step(model, cross_entropy, optimizer, trainable=is_head)
    got, _ = step(init_train_state(params, state, optimizer, trainable=is_head), x, y)
    assert got.state["bn1"]["num_batches_tracked"] == 1
    assert not torch.equal(got.state["bn1"]["running_mean"], state["bn1"]["running_mean"])


@pytest.mark.parametrize("make", [optim.adam, lambda lr: optim.sgd(lr, momentum=0.9)], ids=["adam", "sgd"])
def test_a_trainable_that_selects_nothing_or_something_else_is_refused(make):
    model, (x, y) = tiny(norm="group"), make_batch()
    optimizer = make(0.1)
    params, state = model.init(torch.Generator().manual_seed(1), dtype=torch.float64)

    def nothing(path):
        return path.startswith("layer9")

    with pytest.raises(ValueError, match=r"trainable accepts none of \d+ leaves, such as 'conv1.weight'"):
        init_train_state(params, state, optimizer, trainable=nothing)
    for_all = init_train_state(params, state, optimizer)
    with pytest.raises(ValueError, match="trainable accepts none"):
        make_train_step(model, cross_entropy, optimizer, trainable=nothing)(for_all, x, y)
    with pytest.raises(ValueError, match="state holds .* give init_train_state the same trainable"):
        make_train_step(model, cross_entropy, optimizer, trainable=is_head)(for_all, x, y)
    for_head = init_train_state(params, state, optimizer, trainable=is_head)
    with pytest.raises(ValueError, match="state must have the leaves .* with the same trainable"):
        make_train_step(model, cross_entropy, optimizer)(for_head, x, y)


# --------------------------------------------------------------------------- global defaults


def whole_training():
    """Everything from a seed to an evaluation, all of it that is a tensor."""
    model, (x, y) = tiny(), make_batch(dtype=torch.float32)
    params, state = model.init(torch.Generator().manual_seed(3))
    optimizer = optim.clipped(optim.adamw(optim.one_cycle(0.1, 9)), 1.0)
    step = make_train_step(model, cross_entropy, optimizer, ema_decay=0.9, microbatches=2)
    train_state = init_train_state(params, state, optimizer, ema=True)
    train_state, records = fit(
        step, train_state, x, y, epochs=2, batch_size=3, generator=torch.Generator().manual_seed(5)
    )
    evaluation = evaluate(
        make_eval_step(model, cross_entropy), train_state.params, train_state.state, [(x, y)]
    )
    return (params, train_state, tuple(evaluation)), records


@pytest.mark.parametrize("setting", ["dtype", "device"])
def test_global_defaults_change_no_bit_of_a_training(setting, monkeypatch):
    x, y = make_batch(dtype=torch.float32)
    monkeypatch.setitem(globals(), "make_batch", lambda dtype: (x, y))
    want, want_records = whole_training()
    before = torch.get_default_dtype()
    try:
        if setting == "dtype":
            torch.set_default_dtype(torch.float64)
        else:
            torch.set_default_device("meta")
        got, records = whole_training()
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    assert records == want_records
    for a, b in zip(tree.leaves(got), tree.leaves(want), strict=True):
        assert (a.dtype, a.device) == (b.dtype, b.device)
        assert torch.equal(a, b)
