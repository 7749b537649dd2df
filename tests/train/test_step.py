"""The steps against plain autograd and torch.optim, and what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import resnet_func as rf
from resnet_func import optim, tree
from resnet_func.losses import cross_entropy
from resnet_func.testing import assert_trees_equal
from resnet_func.train import (
    evaluate,
    fit,
    init_train_state,
    make_eval_step,
    make_train_step,
)
from tests.train.cases import BATCH, linear, make_batch, start, tiny


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


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.nightly)])
def test_whole_step_compiles_as_one_graph_and_does_not_recompile(backend):
    # in float64, where only a mistake is larger than any processor's rounding
    model, (x, y) = tiny(), make_batch()
    schedule = optim.one_cycle(0.5, 10, warmup_fraction=0.3)
    optimizer = optim.clipped(optim.sgd(schedule, momentum=0.9, nesterov=True, weight_decay=1e-3), 1.0)
    step = make_train_step(model, cross_entropy, optimizer, ema_decay=0.9)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend=counter)
    eager_state = compiled_state = start(model, optimizer, ema=True)
    traces = set()
    for _ in range(4):
        eager_state, eager_metrics = step(eager_state, x, y)
        compiled_state, metrics = compiled(compiled_state, x, y)
        traces.add(counter.frame_count)
        torch.testing.assert_close(metrics, eager_metrics, rtol=1e-9, atol=1e-11)
    assert len(traces) == 1  # all of it in the first call, which may trace again to specialise floats
    for a, b in zip(tree.leaves(eager_state), tree.leaves(compiled_state), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


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

    with pytest.raises(ValueError, match="trainable selects no leaf; the leaves are conv1.weight"):
        init_train_state(params, state, optimizer, trainable=nothing)
    for_all = init_train_state(params, state, optimizer)
    with pytest.raises(ValueError, match="trainable selects no leaf"):
        make_train_step(model, cross_entropy, optimizer, trainable=nothing)(for_all, x, y)
    with pytest.raises(ValueError, match="state holds .* give init_train_state the same trainable"):
        make_train_step(model, cross_entropy, optimizer, trainable=is_head)(for_all, x, y)
    for_head = init_train_state(params, state, optimizer, trainable=is_head)
    with pytest.raises(ValueError, match="state must have the leaves .* with the same trainable"):
        make_train_step(model, cross_entropy, optimizer)(for_head, x, y)
