"""What the library returns can be sent to a spawned process, and computes there what it computes here."""

from __future__ import annotations

import multiprocessing
import pickle
from dataclasses import is_dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import resnet_func as rf
from resnet_func import attribution, curvature, losses, optim, privacy, tree
from resnet_func import per_sample as ps
from resnet_func.attribution import quantities
from resnet_func.attribution.fisher import diagonal_fisher, sampled_ekfac
from resnet_func.distributed import Ranks, sync_batch_norm
from resnet_func.types import Model

SCHEDULES = {
    "constant": optim.constant(0.1),
    "cosine": optim.cosine(0.1, total_steps=9, warmup_steps=2),
    "one_cycle": optim.one_cycle(0.1, total_steps=9, anneal="cos"),
    "step": optim.step(0.1, milestones=(1, 2)),
}


def is_bias(path: str) -> bool:
    return path.endswith("bias")


OPTIMIZERS = {
    "sgd": optim.sgd(optim.cosine(0.1, total_steps=9), 0.9, 1e-4, nesterov=True, decay_mask=is_bias),
    "plain sgd": optim.sgd(0.1),
    "adam": optim.adam(optim.one_cycle(0.1, total_steps=9), weight_decay=1e-4),
    "adamw": optim.adamw(0.1),
    "adamw without decay": optim.adamw(0.1, weight_decay=0.0),
    "partition": optim.partition(is_bias, optim.sgd(0.1), optim.muon(optim.step(0.1, (1,)))),
    "clipped": optim.clipped(optim.sgd(0.1, 0.9), 0.5),
}


def again(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule(name: str) -> None:
    steps = torch.arange(12)
    assert torch.equal(again(SCHEDULES[name])(steps), SCHEDULES[name](steps))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer(name: str) -> None:
    optimizer, sent = OPTIMIZERS[name], again(OPTIMIZERS[name])
    params = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}
    grads, opt_state = {"weight": torch.full((3, 2), 0.5), "bias": torch.ones(3)}, optimizer.init(params)
    assert equal(sent.init(params), opt_state)
    assert equal(sent.step(grads, opt_state, params), optimizer.step(grads, opt_state, params))
    assert equal(sent.update(grads, opt_state, params), optimizer.update(grads, opt_state, params))


def calls() -> list[tuple[Any, tuple[Any, ...]]]:
    """Functions that the library returns, with arguments."""
    model = rf.resnet20(depths=(1, 1, 1), norm="group")
    params, state = model.init(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(4, 3, 8, 8, generator=generator), torch.arange(4)
    data, batches = (params, state, x, y), [(x, y)]
    optimizer = optim.sgd(optim.cosine(0.1, total_steps=9), 0.9)
    begin = rf.train.init_train_state(params, state, optimizer, ema=True)
    step = rf.train.make_train_step(model, losses.cross_entropy, optimizer, microbatches=2, ema_decay=0.9)
    rule: Any = {"noise_multiplier": 1.0, "expected_batch_size": 4}
    adaptive = privacy.AdaptiveNorm()
    private = privacy.make_private_step(model, losses.cross_entropy, optimizer, max_norm=1.0, **rule)
    adapting = privacy.make_private_step(model, losses.cross_entropy, optimizer, max_norm=adaptive, **rule)
    noise = privacy.gaussian_noise(params, seed=0, step=0)
    adaptive_noise = privacy.gaussian_noise(params, seed=0, step=0, adaptive=True)
    mask = torch.ones(4, dtype=torch.bool)
    synchronised = sync_batch_norm(rf.resnet20(depths=(1, 1, 1)), Ranks(0, 1))
    wanted = {
        "margin": quantities.margin(),
        "prediction": quantities.prediction(),
        "suggestion": quantities.suggestion(),
        "weighted": quantities.weighted_squared_norms(tree.flatten(params)),
        "products": quantities.products({path: leaf[None] for path, leaf in tree.flatten(params).items()}),
    }
    return [
        (step, (begin, x, y)),
        (rf.train.make_eval_step(model, losses.cross_entropy), data),
        (private, (begin, x, y, mask, noise)),
        (
            adapting,
            (
                privacy.init_private_state(params, state, optimizer, max_norm=adaptive),
                *(x, y, mask, adaptive_noise),
            ),
        ),
        (ps.ntk(model, 2), (params, state, x)),
        (ps.gram(model, losses.cross_entropy), (params, state, (x, y))),
        (ps.clipped_sum(model, losses.cross_entropy, max_norm=1.0), data),
        (ps.over_dataset(model, losses.cross_entropy, wanted), (params, state, batches)),
        (diagonal_fisher(model, losses.cross_entropy), (params, state, batches)),
        (losses.logit(1), (x.flatten(1), y)),
        *answers(model, (params, state), batches),
        (partial(synchronised.apply, train=True), (*synchronised.init(generator), x)),
    ]


def answers(model: Model, checkpoint: Any, batches: Any) -> list[tuple[Any, tuple[Any, ...]]]:
    """What `attribution` and `curvature` return, with arguments."""
    task, sketch = (model, losses.cross_entropy), attribution.Sketch(dim=8)
    names = ["loss", "grand", "self_influence_diagonal", "self_influence_ekfac"]
    fisher = diagonal_fisher(*task)(*checkpoint, batches)
    direction = tree.map(torch.ones_like, checkpoint[0])
    canaries = privacy.insert_canaries(*task, *checkpoint, 2)
    images = {"x": batches[0][0], "canary": torch.tensor([-1, 0, 1, -1])}
    return [
        (attribution.score_dataset(*task, names), ([checkpoint], batches)),
        (attribution.make_features(model, sketch), (*checkpoint, batches)),
        (attribution.trak(model, sketch), ([checkpoint], batches, batches)),
        (attribution.tracin(*task, cosine=True), ([checkpoint], batches, batches)),
        (attribution.influence(*task, fisher), (checkpoint, batches, batches)),
        (attribution.in_run_values(*task, order=2), (*checkpoint, batches[0], batches[0], 0.1)),
        (curvature.hvp(*task), (*checkpoint, *batches[0], direction)),
        (curvature.ggn_vp(*task), (*checkpoint, *batches[0], direction)),
        (curvature.kfac(*task), (*checkpoint, batches)),
        (curvature.ekfac(*task), (*checkpoint, batches)),
        (partial(seeded, curvature.trace(*task, probes=2)), (*checkpoint, batches)),
        (partial(seeded, curvature.spectrum(*task, steps=3)), (*checkpoint, batches)),
        (curvature.laplace(*task), (*checkpoint, batches)),
        (partial(canaries.model.apply, train=True), (canaries.params, canaries.state, images)),
        (canaries.loss_fn, (torch.ones(4, 3), (batches[0][1] % 2, images["canary"]))),
    ]


def seeded(function: Any, *given: Any) -> Any:
    return function(*given, generator=torch.Generator().manual_seed(0))


def compute(pickled: bytes) -> bytes:
    """In the worker: what each function returns."""
    torch.set_num_threads(1)
    return pickle.dumps([function(*given) for function, given in pickle.loads(pickled)])


def test_a_spawned_worker_computes_the_same_bits() -> None:
    listed = calls()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pickle.loads(pool.apply(compute, (pickle.dumps(listed),)))
    for (function, given), theirs in zip(listed, found, strict=True):
        assert same(function(*given), theirs), function


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal to the bit, whatever they are made of."""
    match a:
        case Tensor():
            return torch.equal(a, b)
        case dict():
            return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
        case tuple() | list():
            return len(a) == len(b) and all(map(same, a, b))
    return same(vars(a), vars(b)) if is_dataclass(a) else a == b


def test_an_estimate_of_curvature_is_sent_with_its_inverse() -> None:
    model, params, state = rf.from_module(torch.nn.Linear(3, 2))
    x, y = torch.eye(3), torch.zeros(3, 2)
    estimate = sampled_ekfac(model, losses.squared_error)
    assert equal(again(estimate)(params, state, [(x, y)]).trace(), estimate(params, state, [(x, y)]).trace())
