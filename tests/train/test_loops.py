"""The loops around a step: stopped and gone on with, counted, and under other global defaults."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from resnet_func import optim, tree
from resnet_func.losses import cross_entropy
from resnet_func.testing import assert_trees_equal
from resnet_func.train import (
    Progress,
    evaluate,
    fit,
    init_train_state,
    make_eval_step,
    make_train_step,
    train_epoch,
)
from tests.train.cases import BATCH, CLASSES, SIZE, make_batch, start, tiny


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
