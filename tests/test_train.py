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
