"""Optimizers and schedules against torch.optim: to the bit where bits are promised."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import lr_scheduler, swa_utils

from resnet_func import optim, tree
from resnet_func.testing import assert_trees_equal

FP32, FP64 = torch.float32, torch.float64
DTYPES = pytest.mark.parametrize("dtype", [FP32, FP64], ids=["fp32", "fp64"])
seeds = st.integers(0, 2**32 - 1)

# Hyper-parameters by test id; `sgd-*` are those of torch.optim.SGD, and so on.
CASES: dict[str, dict[str, Any]] = {
    "sgd": {},
    "sgd-decay": {"weight_decay": 5e-4},
    "sgd-momentum": {"momentum": 0.9},
    "sgd-momentum-decay": {"momentum": 0.9, "weight_decay": 0.1},
    "sgd-nesterov": {"momentum": 0.9, "nesterov": True},
    "sgd-nesterov-decay": {"momentum": 0.3, "nesterov": True, "weight_decay": 5e-4},
    "adam": {},
    "adam-decay": {"weight_decay": 5e-2},
    "adam-eps": {"eps": 1e-2, "betas": (0.8, 0.99)},
    "adam-no-memory": {"betas": (0.0, 0.0)},
    "adam-large-betas": {"betas": (0.99, 0.99999), "weight_decay": 1e-3},
    "adamw": {},
    "adamw-no-decay": {"weight_decay": 0.0},
    "adamw-large-decay": {"weight_decay": 0.9, "betas": (0.4, 0.95), "eps": 1e-4},
}
TORCH = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
SCHEDULES: dict[str, optim.Schedule] = {
    "constant": optim.constant(0.1),
    "one-cycle": optim.one_cycle(0.3, 1000),
    "cosine": optim.cosine(0.3, 900, warmup_steps=20, final_lr=1e-3),
    "step": optim.step(0.3, (5, 30, 400), gamma=0.5),
}


def ours(case: str, lr: float | optim.Schedule, **more: Any) -> optim.Optimizer:
    return getattr(optim, case.split("-")[0])(lr, **CASES[case], **more)


def theirs(case: str, params: Any, lr: float) -> torch.optim.Optimizer:
    return TORCH[case.split("-")[0]](params, lr=lr, foreach=False, **CASES[case])


def make_tree(seed: int, dtype: torch.dtype = FP64, scale: float = 1.0) -> dict[str, Any]:
    """Two branches and a 0-d leaf; 37 entries: vectorised lanes and a tail."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=FP64) * scale).to(dtype)

    return {"fc": {"weight": leaf(37), "bias": leaf(3)}, "conv": {"weight": leaf(2, 2, 3, 3)}, "gain": leaf()}


def noisy_gradients(params: Any, seed: int) -> Iterator[Any]:
    """Gradients of a quadratic around zero, whose parameters change sign all the time."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        noise = {
            path: torch.randn(p.shape, generator=generator, dtype=p.dtype)
            for path, p in tree.flatten(params).items()
        }
        params = yield tree.map(lambda p, n: 0.3 * p + n, params, tree.unflatten(noise))


def check_parity(case: str, schedule: optim.Schedule, dtype: torch.dtype, steps: int) -> None:
    params = make_tree(0, dtype, scale=0.1)
    modules = tree.map(lambda p: torch.nn.Parameter(p.clone()), params)
    reference = theirs(case, tree.leaves(modules), lr=0.1)
    optimizer = ours(case, schedule)
    opt_state = optimizer.init(params)
    gradients = noisy_gradients(params, seed=1)
    grads = next(gradients)
    for step in range(steps):
        reference.param_groups[0]["lr"] = schedule(torch.tensor(step)).item()
        for module, grad in zip(tree.leaves(modules), tree.leaves(grads), strict=True):
            module.grad = grad.clone()
        reference.step()
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optim.apply_updates(params, updates)
        if step % 50 in (0, 1) or step == steps - 1:
            assert_trees_equal(params, tree.map(lambda p: p.detach(), modules))
        grads = gradients.send(params)
    assert opt_state.step == steps
    check_state(opt_state, reference, modules)


def check_state(opt_state: Any, reference: torch.optim.Optimizer, modules: Any) -> None:
    for name in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
        buffers = getattr(opt_state, name, None)
        if buffers:
            want = tree.map(lambda m, name=name: reference.state[m][name], modules)
            assert_trees_equal(buffers, want)


# --------------------------------------------------------------------------- parity with torch.optim


@DTYPES
@pytest.mark.parametrize("schedule", ["constant", "one-cycle"])
@pytest.mark.parametrize("case", CASES)
def test_bitwise_torch_optim(case: str, schedule: str, dtype: torch.dtype) -> None:
    check_parity(case, SCHEDULES[schedule], dtype, steps=30)


@DTYPES
@pytest.mark.parametrize("case", ["sgd-nesterov-decay", "adam-decay", "adamw"])
def test_bitwise_torch_optim_over_1000_steps(case: str, dtype: torch.dtype) -> None:
    check_parity(case, SCHEDULES["one-cycle"], dtype, steps=1000)


@pytest.mark.nightly
@DTYPES
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", CASES)
def test_bitwise_torch_optim_over_1000_steps_everywhere(case: str, schedule: str, dtype: torch.dtype) -> None:
    check_parity(case, SCHEDULES[schedule], dtype, steps=1000)


@pytest.mark.parametrize("case", CASES)
def test_float_lr_is_the_constant_schedule(case: str) -> None:
    params, grads = make_tree(0), make_tree(1)
    by_float, by_schedule = ours(case, 0.1), ours(case, optim.constant(0.1))
    a, _ = by_float.update(grads, by_float.init(params), params)
    b, _ = by_schedule.update(grads, by_schedule.init(params), params)
    assert_trees_equal(a.delta, b.delta)
    assert_trees_equal(a.residue, b.residue)


@pytest.mark.parametrize("case", ["sgd-nesterov-decay", "adamw"])
def test_own_schedule_is_bitwise_lambda_lr(case: str) -> None:
    params = {"weight": make_tree(0, FP32)["fc"]["weight"]}
    module = torch.nn.Parameter(params["weight"].clone())
    reference = theirs(case, [module], lr=0.1)
    scheduler = lr_scheduler.LambdaLR(reference, lambda epoch: 0.95**epoch)
    optimizer = ours(case, lambda step: 0.1 * 0.95**step)
    opt_state = optimizer.init(params)
    for step in range(50):
        module.grad = torch.sin(params["weight"] * step)
        updates, opt_state = optimizer.update({"weight": module.grad.clone()}, opt_state, params)
        params = optim.apply_updates(params, updates)
        reference.step()
        scheduler.step()
        assert torch.equal(params["weight"], module.detach())


@DTYPES
@pytest.mark.parametrize("case", ["sgd-momentum-decay", "adam-decay", "adamw-large-decay"])
def test_decay_mask_is_a_param_group_without_decay(case: str, dtype: torch.dtype) -> None:
    params = make_tree(0, dtype)
    modules = {path: torch.nn.Parameter(p.clone()) for path, p in tree.flatten(params).items()}
    seen: set[str] = set()
    groups = [
        {"params": [m for path, m in modules.items() if path.endswith("weight")]},
        {"params": [m for path, m in modules.items() if not path.endswith("weight")], "weight_decay": 0.0},
    ]
    reference = theirs(case, groups, lr=0.1)
    optimizer = ours(case, 0.1, decay_mask=lambda path: seen.add(path) or path.endswith("weight"))
    opt_state = optimizer.init(params)
    for seed in range(5):
        grads = make_tree(seed, dtype)
        for path, grad in tree.flatten(grads).items():
            modules[path].grad = grad.clone()
        reference.step()
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optim.apply_updates(params, updates)
    assert_trees_equal(params, tree.unflatten({path: m.detach() for path, m in modules.items()}))
    assert seen == {"fc.weight", "fc.bias", "conv.weight", "gain"}


@pytest.mark.parametrize("case", ["sgd-nesterov-decay", "adamw"])
def test_bitwise_with_channels_last_parameters(case: str) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(8, 5, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    module, params = torch.nn.Parameter(start.clone()), {"weight": start}
    reference, optimizer = theirs(case, [module], lr=0.3), ours(case, 0.3)
    opt_state = optimizer.init(params)
    for _ in range(20):
        module.grad = torch.randn(8, 5, 3, 3, generator=generator)
        reference.step()
        updates, opt_state = optimizer.update({"weight": module.grad}, opt_state, params)
        params = optim.apply_updates(params, updates)
    assert torch.equal(params["weight"], module.detach())
    assert params["weight"].is_contiguous(memory_format=torch.channels_last)


# --------------------------------------------------------------------------- updates as a two-term sum


@DTYPES
@given(seed=seeds, spread=st.sampled_from([0, 1, 8, 60]), lr=st.floats(1e-6, 1e3))
@settings(max_examples=60, deadline=None)
def test_apply_updates_reaches_every_value(dtype: torch.dtype, seed: int, spread: int, lr: float) -> None:
    """Steps of any size and sign, cancelling ones included: what torch's fused kernel gives, to the bit."""
    generator = torch.Generator().manual_seed(seed)

    def values() -> Tensor:
        exponents = torch.randint(-spread, spread + 1, (1003,), generator=generator)
        return torch.randn(1003, generator=generator, dtype=FP64).mul(2.0**exponents).to(dtype)

    params, grads = {"w": values()}, {"w": values()}
    grads["w"][:300] = params["w"][:300] / lr * (1 + torch.finfo(dtype).eps * torch.arange(-150, 150))
    optimizer = optim.sgd(lr)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    assert torch.equal(optim.apply_updates(params, updates)["w"], params["w"].add(grads["w"], alpha=-lr))


OPTIMIZERS: dict[str, optim.Optimizer] = {
    **{case: ours(case, optim.cosine(0.1, 10)) for case in CASES},
    "masked": optim.sgd(0.1, momentum=0.9, weight_decay=0.1, decay_mask=lambda path: path == "fc.weight"),
    "clipped": optim.clipped(optim.sgd(0.1, momentum=0.9), 0.5),
    "partition": optim.partition(lambda path: path == "conv.weight", optim.muon(0.1), optim.adamw(0.1)),
    "partition-one-plain": optim.partition(lambda path: path == "gain", optim.adam(0.1), optim.sgd(0.1)),
    "written-by-a-user": optim.Optimizer(optim.sgd(0.1).init, optim.sgd(0.1).update),
}


@DTYPES
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_an_update_applied_to_the_bit(name: str, dtype: torch.dtype) -> None:
    optimizer, params = OPTIMIZERS[name], make_tree(0, dtype)
    opt_state = optimizer.init(params)
    for seed in range(1, 5):
        grads = make_tree(seed, dtype)
        before = [leaf.clone() for leaf in tree.leaves((params, grads, opt_state))]
        updates, expected_state = optimizer.update(grads, opt_state, params)
        expected = optim.apply_updates(params, updates)
        moved, new_state = optimizer.step(grads, opt_state, params)
        for a, b in zip(before, tree.leaves((params, grads, opt_state)), strict=True):
            assert torch.equal(a, b), "an input was mutated"
        results, wanted = tree.leaves((moved, new_state)), tree.leaves((expected, expected_state))
        assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))
        assert list(tree.flatten(moved)) == list(tree.flatten(params))
        assert any(
            not torch.equal(a, b) for a, b in zip(tree.leaves(moved), tree.leaves(params), strict=True)
        )
        params, opt_state = moved, new_state


def test_a_step_that_overflows_is_infinite_as_in_torch() -> None:
    params = {"w": torch.tensor([3e38, 1.0])}
    moved, _ = optim.sgd(1.0).step({"w": torch.tensor([-3e38, 1.0])}, optim.sgd(1.0).init(params), params)
    assert moved["w"].tolist() == [math.inf, 0.0]


def test_one_term_would_not_reach_every_value() -> None:
    """Why `residue` exists: where torch adds a multiple in one rounding, as CPUs with FMA do."""
    params, grads = {"w": torch.tensor([-1.0])}, {"w": torch.tensor([-(1 + 2**-23)])}
    optimizer = optim.sgd(1 - 2**-24)
    (delta, residue), _ = optimizer.update(grads, optimizer.init(params), params)
    target = params["w"].add(grads["w"], alpha=-(1 - 2**-24))
    fuses = target != params["w"] + grads["w"] * -(1 - 2**-24)
    assert torch.equal(params["w"] + delta["w"] != target, fuses)
    assert params["w"] + delta["w"] + residue["w"] == target


def test_updates_are_linear() -> None:
    params, grads = make_tree(0), make_tree(1)
    optimizer = optim.sgd(0.1)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    halved = optim.apply_updates(params, tree.map(lambda u: u / 2, updates))
    expected = tree.map(lambda p, g: p - 0.05 * g, params, grads)
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15), halved, expected)


# --------------------------------------------------------------------------- purity and transforms


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_mutated_and_nothing_remembered(case: str) -> None:
    params, grads = make_tree(0), make_tree(1)
    optimizer = ours(case, optim.one_cycle(0.1, 10))
    opt_state = optimizer.init(params)
    _, opt_state = optimizer.update(grads, opt_state, params)
    inputs = (params, grads, opt_state)
    before = [x.clone() for x in tree.leaves(inputs)]
    results = []
    for _ in range(2):
        updates, new_state = optimizer.update(grads, opt_state, params)
        results.append(tree.leaves((updates, new_state, optim.apply_updates(params, updates))))
    assert all(torch.equal(a, b) for a, b in zip(before, tree.leaves(inputs), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_vmap_over_an_ensemble_equals_the_loop(case: str) -> None:
    optimizer = ours(case, optim.cosine(0.1, 10))
    members = [make_tree(seed, FP32) for seed in range(3)]
    gradients = [make_tree(seed, FP32) for seed in range(3, 6)]

    def two_steps(params: Any, grads: Any) -> Any:
        opt_state = optimizer.init(params)
        for _ in range(2):
            updates, opt_state = optimizer.update(grads, opt_state, params)
            params = optim.apply_updates(params, updates)
        return params, opt_state

    def stack(trees: list[Any]) -> Any:
        return tree.map(lambda *xs: torch.stack(xs), *trees)

    got = torch.func.vmap(two_steps)(stack(members), stack(gradients))
    wanted = stack([two_steps(p, g) for p, g in zip(members, gradients, strict=True)])
    for x, y in zip(tree.leaves(got), tree.leaves(wanted), strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


def test_vmap_over_step_counters() -> None:
    optimizer = optim.adamw(optim.one_cycle(0.1, 10))
    params, grads = {"w": torch.ones(3, 2)}, {"w": torch.ones(3, 2)}
    opt_state = torch.func.vmap(optimizer.init)(params)._replace(step=torch.tensor([0, 3, 7]))
    updates, _ = torch.func.vmap(optimizer.update)(grads, opt_state, params)
    assert updates.delta["w"].dtype == FP32
    assert len(updates.delta["w"][:, 0].unique()) == 3


@pytest.mark.parametrize("case", ["sgd-nesterov-decay", "adam-decay", "adamw-large-decay"])
def test_gradient_through_two_updates(case: str) -> None:
    """Hyper-gradients: the derivative with respect to lr, against central differences."""
    start, grads = make_tree(0), make_tree(1)

    def loss(lr: Tensor) -> Tensor:
        optimizer = ours(case, lambda step: lr * (1 + step))
        params, opt_state = start, optimizer.init(start)
        for _ in range(2):
            updates, opt_state = optimizer.update(grads, opt_state, params)
            params = optim.apply_updates(params, updates)
        return tree.dot(params, params)

    lr, h = torch.tensor(0.1, dtype=FP64), 1e-6
    numeric = (loss(lr + h) - loss(lr - h)) / (2 * h)
    torch.testing.assert_close(torch.func.grad(loss)(lr), numeric, rtol=1e-7, atol=1e-7)


def test_compiled_step_is_one_graph_and_never_recompiles() -> None:
    optimizer = optim.clipped(
        optim.adamw(optim.one_cycle(0.1, 5), decay_mask=lambda path: path != "gain"), max_norm=1.0
    )
    nesterov = optim.sgd(optim.cosine(0.1, 5, warmup_steps=2), momentum=0.9, nesterov=True, weight_decay=0.1)

    def step(params: Any, states: Any, average: Any) -> Any:
        grads = torch.func.grad(lambda p: tree.norm(p))(params)
        new_states = []
        for opt, opt_state in zip((optimizer, nesterov), states, strict=True):
            updates, opt_state = opt.update(grads, opt_state, params)
            params = optim.apply_updates(params, updates)
            new_states.append(opt_state)
        return params, tuple(new_states), optim.ema(average, params, 0.9)

    params = make_tree(0)
    # Another tree for the average: were it `params` itself, the second step would not alias, and recompile.
    eager = compiled = (params, (optimizer.init(params), nesterov.init(params)), make_tree(0))
    counter = CompileCounterWithBackend("aot_eager")
    compiled_step = torch.compile(step, fullgraph=True, backend=counter)
    traces = set()
    for _ in range(5):
        eager, compiled = step(*eager), compiled_step(*compiled)
        traces.add(counter.frame_count)
    assert len(traces) == 1  # all of it in the first call, which may trace again to specialise floats
    for x, y in zip(tree.leaves(eager), tree.leaves(compiled), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


# --------------------------------------------------------------------------- trees


@pytest.mark.parametrize("case", ["sgd", "sgd-nesterov-decay", "adam-decay", "adamw"])
@pytest.mark.parametrize(
    "params",
    [{}, {"a": {}}, {"a": None}, {"a": None, "b": {"c": torch.ones(2)}, "d": {}}, {"a": torch.ones(0, 3)}],
    ids=["empty", "empty-branch", "none", "mixed", "no-elements"],
)
def test_none_leaves_and_empty_trees(case: str, params: Any) -> None:
    optimizer = ours(case, 0.1, decay_mask=lambda path: path != "a")
    updates, opt_state = optimizer.update(params, optimizer.init(params), params)
    moved = optim.apply_updates(params, updates)
    assert tree.map(lambda x: x.shape, moved) == tree.map(lambda x: x.shape, params)
    assert opt_state.step == 1


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ({"a": torch.ones(1)}, r"'a' must be torch.Size\(\[2\]\); got torch.Size\(\[1\]\)"),
        ({"a": torch.ones(5, 2)}, r"'a' must be torch.Size\(\[2\]\); got torch.Size\(\[5, 2\]\)"),
        ({}, "'a' must be .* got None"),
        ({"a": None}, "'a' must be .* got None"),
        ({"a": torch.ones(2), "b": torch.ones(1)}, "'b' must be None; got"),
    ],
    ids=["would-broadcast", "per-sample", "missing", "none", "unexpected"],
)
@pytest.mark.parametrize("case", ["sgd", "adam"])
def test_gradients_of_another_tree_are_refused(case: str, grads: Any, message: str) -> None:
    params = {"a": torch.ones(2)}
    optimizer = ours(case, 0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.update(grads, optimizer.init(params), params)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.sgd(-0.1), r"lr must be finite and >= 0; got -0.1. Try"),
        (lambda: optim.sgd(math.nan), "lr must be finite"),
        (lambda: optim.sgd(0.1, momentum=1.0), r"momentum must be in \[0, 1\); got 1.0. Try momentum=0.9"),
        (lambda: optim.sgd(0.1, nesterov=True), "momentum must be > 0 with nesterov=True; got 0.0"),
        (lambda: optim.sgd(0.1, weight_decay=-1), "weight_decay must be finite and >= 0; got -1"),
        (lambda: optim.adam(math.inf), "lr must be finite"),
        (lambda: optim.adam(0.1, betas=(0.9, 1.0)), r"betas must be both in \[0, 1\); got \(0.9, 1.0\)"),
        (lambda: optim.adam(0.1, betas=(-0.1, 0.9)), "betas must be both"),
        (lambda: optim.adam(0.1, eps=-1e-8), "eps must be finite and >= 0"),
        (lambda: optim.adamw(0.1, weight_decay=math.inf), "weight_decay must be finite"),
        (lambda: optim.clipped(optim.sgd(0.1), -1.0), "max_norm must be >= 0; got -1.0"),
        (lambda: optim.clip_by_global_norm({}, math.nan), "max_norm must be >= 0; got nan"),
        (lambda: optim.ema({}, {}, 1.5), r"decay must be in \[0, 1\]; got 1.5"),
        (lambda: optim.cosine(0.1, 5, warmup_steps=5), "total_steps must be above warmup_steps=5; got 5"),
        (lambda: optim.cosine(0.1, 5, warmup_steps=-1), "warmup_steps must be >= 0; got -1"),
        (lambda: optim.cosine(0.1, 5, final_lr=-1.0), "final_lr must be finite and >= 0"),
        (lambda: optim.one_cycle(0.1, 1), "total_steps must be >= 2; got 1"),
        (lambda: optim.one_cycle(0.1, 9, warmup_fraction=1.0), r"warmup_fraction must be in \[0, 1\)"),
        (lambda: optim.one_cycle(0.1, 9, start_div=0), "start_div must be > 0; got 0"),
        (lambda: optim.one_cycle(0.1, 9, anneal="cosine"), 'anneal must be "linear" or "cos"'),  # type: ignore[arg-type]
        (lambda: optim.adam(0.1, (torch.ones(2), 0.9)), "betas must be"),
        (lambda: optim.step(0.1, (3, -1)), r"milestones must be steps >= 0; got \(3, -1\)"),
        (lambda: optim.step(0.1, (3,), gamma=0.0), "gamma must be finite and > 0; got 0.0"),
    ],
)
def test_hyper_parameters_are_checked(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --------------------------------------------------------------------------- clipping and averaging


@DTYPES
@given(seed=seeds, max_norm=st.floats(0, 1e3))
@settings(max_examples=50, deadline=None)
def test_clip_is_bitwise_clip_grad_norm(dtype: torch.dtype, seed: int, max_norm: float) -> None:
    grads = make_tree(seed, dtype)
    clipped, norm = optim.clip_by_global_norm(grads, max_norm)
    holders = tree.map(torch.nn.Parameter, grads)
    for holder, grad in zip(tree.leaves(holders), tree.leaves(grads), strict=True):
        holder.grad = grad.clone()
    expected = torch.nn.utils.clip_grad_norm_(tree.leaves(holders), max_norm, foreach=False)
    assert torch.equal(norm, expected)
    assert_trees_equal(clipped, tree.map(lambda h: h.grad, holders))


def test_clip_edge_cases() -> None:
    grads = {"a": torch.tensor([3.0, 0.0]), "b": {"c": torch.tensor(4.0)}}
    clipped, norm = optim.clip_by_global_norm(grads, 1.0)
    assert norm == 5
    assert tree.norm(clipped) <= 1
    assert_trees_equal(optim.clip_by_global_norm(grads, 6.0)[0], grads)
    assert_trees_equal(optim.clip_by_global_norm(grads, math.inf)[0], grads)
    assert_trees_equal(optim.clip_by_global_norm(grads, 0.0)[0], tree.map(torch.zeros_like, grads))
    zeros = tree.map(torch.zeros_like, grads)
    assert_trees_equal(optim.clip_by_global_norm(zeros, 1.0)[0], zeros)
    empty, norm = optim.clip_by_global_norm({"a": None}, 1.0)
    assert empty == {"a": None}
    assert norm == 0
    poisoned, _ = optim.clip_by_global_norm({**grads, "d": torch.tensor(math.nan)}, 1.0)
    assert all(x.isnan().all() for x in tree.leaves(poisoned))
    infinite, _ = optim.clip_by_global_norm({**grads, "d": torch.tensor(math.inf)}, 1.0)
    assert infinite["b"]["c"] == 0
    assert infinite["d"].isnan()


def test_clipped_optimizer_sees_clipped_gradients() -> None:
    params, grads = make_tree(0), make_tree(1)
    plain, wrapped = optim.adam(0.1), optim.clipped(optim.adam(0.1), 0.5)
    small, _ = optim.clip_by_global_norm(grads, 0.5)
    a, _ = plain.update(small, plain.init(params), params)
    b, _ = wrapped.update(grads, wrapped.init(params), params)
    assert_trees_equal(a.delta, b.delta)


@DTYPES
@given(seed=seeds, decay=st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_ema_is_bitwise_swa_utils(dtype: torch.dtype, seed: int, decay: float) -> None:
    average, params = make_tree(seed, dtype), make_tree(seed + 1, dtype)
    expected = tree.map(torch.clone, average)
    swa_utils.get_ema_multi_avg_fn(decay)(tuple(tree.leaves(expected)), tuple(tree.leaves(params)), 1)
    assert_trees_equal(optim.ema(average, params, decay), expected)
    by_tensor = optim.ema(average, params, torch.tensor(decay, dtype=FP64))
    assert_trees_equal(by_tensor, expected)


def test_ema_takes_the_newest_counter_and_changes_nothing() -> None:
    average, new = {"n": torch.tensor(3), "m": torch.ones(2)}, {"n": torch.tensor(7), "m": torch.zeros(2)}
    result = optim.ema(average, new, 0.75)
    assert result["n"] == 7
    assert torch.equal(result["m"], torch.full((2,), 0.75))
    assert average["n"] == 3
    assert torch.equal(average["m"], torch.ones(2))


# --------------------------------------------------------------------------- schedules


def curve(make: Callable[[torch.optim.Optimizer], Any], lr: float, steps: int) -> Tensor:
    """The learning rates of a torch scheduler."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return torch.tensor(rates, dtype=FP64)


def assert_curve(schedule: optim.Schedule, expected: Tensor, peak: float = 1.0) -> None:
    """To 1e-12 of each rate, and to round-off of the peak, where torch itself interpolates down from it."""
    got = torch.stack([schedule(torch.tensor(float(t), dtype=FP64)) for t in range(len(expected))])
    assert got.dtype == FP64
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15 * peak)


@pytest.mark.parametrize("total", [1, 2, 7, 100])
@pytest.mark.parametrize("final", [0.0, 0.01])
def test_cosine_is_torch_closed_form(total: int, final: float) -> None:
    base = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    reference = lr_scheduler.CosineAnnealingLR(base, total, eta_min=final)
    expected = []
    for t in range(total + 1):
        reference.last_epoch = t
        expected += reference._get_closed_form_lr()
    assert_curve(optim.cosine(0.3, total, final_lr=final), torch.tensor(expected, dtype=FP64))


@pytest.mark.parametrize("warmup", [1, 3, 19])
def test_cosine_warmup_is_lambda_lr(warmup: int) -> None:
    def factor(t: int) -> float:
        if t < warmup:
            return (t + 1) / (warmup + 1)
        return (1 + math.cos(math.pi * min(1, (t - warmup) / (20 - warmup)))) / 2

    expected = curve(lambda o: lr_scheduler.LambdaLR(o, factor), 0.3, 30)
    assert_curve(optim.cosine(0.3, 20, warmup), expected)
    assert optim.cosine(0.3, 20, warmup)(torch.tensor(warmup)) == 0.3


@pytest.mark.parametrize("anneal", ["linear", "cos"])
@pytest.mark.parametrize(("total", "fraction"), [(10, 0.3), (100, 0.25), (97, 0.61), (5, 0.9), (1000, 0.5)])
def test_one_cycle_is_torch(anneal: Any, total: int, fraction: float) -> None:
    def reference(optimizer: torch.optim.Optimizer) -> Any:
        return lr_scheduler.OneCycleLR(
            optimizer,
            0.4,
            total_steps=total + 1,
            pct_start=fraction * total / (total + 1),
            anneal_strategy=anneal,
            div_factor=20.0,
            final_div_factor=1e4,
            cycle_momentum=False,
        )

    # torch's last step of total + 1 lies one further, so ask for a cycle of exactly that length.
    schedule = optim.one_cycle(0.4, total + 1, fraction * total / (total + 1), 20.0, 0.4 / 20 / 1e4, anneal)
    assert_curve(schedule, curve(reference, 0.1, total), peak=0.4)


def test_one_cycle_of_two_steps() -> None:
    schedule = optim.one_cycle(1.0, 2, warmup_fraction=0.0)
    assert schedule(torch.arange(3)).tolist() == [1.0, 0.0, 0.0]
    falling = optim.one_cycle(1.0, 3, warmup_fraction=2 / 3, start_div=0.5)
    assert falling(torch.arange(3)).tolist() == [2.0, 1.0, 0.0]


def test_one_cycle_default_is_a_triangle_to_zero() -> None:
    schedule = optim.one_cycle(1.0, 21, warmup_fraction=11 / 21, start_div=math.inf)
    expected = torch.cat([torch.arange(11.0), torch.arange(9.0, -1, -1)]).double() / 10
    assert_curve(schedule, expected)


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.1])
def test_one_cycle_without_warmup_starts_at_the_peak(fraction: float) -> None:
    schedule = optim.one_cycle(0.5, 10, warmup_fraction=fraction)
    assert_curve(schedule, torch.linspace(0.5, 0, 10, dtype=FP64))


@pytest.mark.parametrize("milestones", [(), (0,), (3, 7), (7, 3), (4, 4, 9)], ids=str)
def test_step_is_multi_step_lr(milestones: tuple[int, ...]) -> None:
    if 0 in milestones:  # torch never sees step 0, and so keeps the first rate
        expected = torch.full((5,), 0.06, dtype=FP64)
    else:
        expected = curve(lambda o: lr_scheduler.MultiStepLR(o, milestones, 0.2), 0.3, 12)
    assert_curve(optim.step(0.3, milestones, 0.2), expected)


@pytest.mark.parametrize(
    ("schedule", "final"),
    [
        (optim.constant(0.3), 0.3),
        (optim.cosine(0.3, 50, 10, final_lr=0.01), 0.01),
        (optim.one_cycle(0.3, 50, final_lr=0.01), 0.01),
        (optim.one_cycle(0.3, 50, final_lr=0.01, anneal="cos"), 0.01),
        (optim.step(0.25, (10, 20), gamma=0.5), 0.0625),
    ],
    ids=["constant", "cosine", "one-cycle-linear", "one-cycle-cos", "step"],
)
def test_schedules_stay_at_their_final_value(schedule: optim.Schedule, final: float) -> None:
    assert (schedule(torch.tensor([50, 51, 1000, 10**9])) == final).all()


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_schedules_are_elementwise_and_positive(schedule: optim.Schedule) -> None:
    steps = torch.arange(1200)
    rates = schedule(steps)
    assert rates.dtype == FP64
    assert torch.equal(rates[::7], torch.stack([schedule(t) for t in steps[::7]]))
    assert (rates >= 0).all()
    assert (rates <= 0.3).all()


# --------------------------------------------------------------------------- hyper-parameters as 0-d tensors

# Where gradients are zero, torch's own root has an infinite derivative: zeros in params and grads.
PARAMS = torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0], dtype=FP64)
SOME_ZEROS = torch.tensor([0.3, 0.0, 0.0, -0.2, 0.7], dtype=FP64)
GRADIENTS = pytest.mark.parametrize("grads", [SOME_ZEROS, torch.zeros(5, dtype=FP64)], ids=["some", "all"])
# name -> values of the hyper-parameters, and the optimizer they make
OF_TENSORS: dict[str, tuple[list[float], Callable[..., optim.Optimizer]]] = {
    "sgd": ([0.1], optim.sgd),
    "sgd-all": ([0.1, 0.9, 0.2], lambda lr, m, wd: optim.sgd(lr, m, wd)),
    "sgd-nesterov": ([0.1, 0.9, 0.2], lambda lr, m, wd: optim.sgd(lr, m, wd, nesterov=True)),
    # a large eps: the moves bend within eps of a zero gradient, and a difference must be shorter
    "adam": ([0.1, 0.8, 0.9, 0.05, 0.2], lambda lr, a, b, eps, wd: optim.adam(lr, (a, b), eps, wd)),
    "adam-no-decay": ([0.1, 0.8, 0.9, 0.05], lambda lr, a, b, eps: optim.adam(lr, (a, b), eps)),
    "adamw": ([0.1, 0.8, 0.9, 0.05, 0.2], lambda lr, a, b, eps, wd: optim.adamw(lr, (a, b), eps, wd)),
}


def after_two_steps(
    make: Callable[..., optim.Optimizer], params: Tensor, grads: Tensor, hyper: Any
) -> Tensor:
    optimizer, moved = make(*hyper), {"w": params}
    opt_state = optimizer.init(moved)
    for _ in range(2):
        moved, opt_state = optimizer.step({"w": grads}, opt_state, moved)
    return moved["w"]


def central_differences(fn: Callable[[Tensor], Tensor], at: Tensor, h: float) -> Tensor:
    bumps = h * torch.eye(len(at), dtype=FP64)
    return torch.stack([(fn(at + bump) - fn(at - bump)) / (2 * h) for bump in bumps])


@GRADIENTS
@pytest.mark.parametrize("name", OF_TENSORS)
def test_every_derivative_of_a_step_is_finite_and_a_central_difference(name: str, grads: Tensor) -> None:
    """With respect to params, grads and hyper-parameters, in reverse and forward mode, and by autograd."""
    values, make = OF_TENSORS[name]
    weights = torch.tensor([0.7, -1.1, 0.4, 1.3, -0.6], dtype=FP64)

    def loss(everything: Tensor) -> Tensor:
        params, grads, hyper = everything[:5], everything[5:10], everything[10:]
        return after_two_steps(make, params, grads, hyper.unbind()) @ weights

    at = torch.cat([PARAMS, grads, torch.tensor(values, dtype=FP64)])
    numeric = central_differences(loss, at, 1e-6)
    assert numeric.isfinite().all()
    # a zero gradient's move bends by h / eps = 2e-5 of itself
    close = {"rtol": 1e-4, "atol": 1e-7}
    torch.testing.assert_close(torch.func.grad(loss)(at), numeric, **close)
    torch.testing.assert_close(torch.func.jacfwd(loss)(at), numeric, **close)
    leaf = at.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(loss(leaf), leaf)[0], numeric, **close)
    assert torch.func.hessian(loss)(at).isfinite().all()


@GRADIENTS
@pytest.mark.parametrize("name", OF_TENSORS)
def test_mapping_over_hyper_parameters_is_the_loop(name: str, grads: Tensor) -> None:
    """Over the learning rate alone, and over all at once; a tensor computes as the number it holds."""
    values, make = OF_TENSORS[name]
    factors = torch.tensor([0.25, 0.5, 1.0], dtype=FP64)
    rates, others = factors * values[0], values[1:]
    by_lr = torch.func.vmap(lambda lr: after_two_steps(make, PARAMS, grads, (lr, *others)))(rates)
    by_all = torch.func.vmap(lambda hyper: after_two_steps(make, PARAMS, grads, hyper.unbind()))(
        factors[:, None] * torch.tensor(values, dtype=FP64)
    )
    for i, factor in enumerate(factors.tolist()):
        for got, hyper in (
            (by_lr[i], (values[0] * factor, *others)),
            (by_all[i], [v * factor for v in values]),
        ):
            want = after_two_steps(make, PARAMS, grads, hyper)
            torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)


@DTYPES
@pytest.mark.parametrize("name", OF_TENSORS)
def test_mapping_keeps_the_dtype_of_the_parameters(name: str, dtype: torch.dtype) -> None:
    values, make = OF_TENSORS[name]
    params = {"w": PARAMS.to(dtype), "gain": torch.ones((), dtype=dtype)}
    grads = tree.map(torch.sin, params)

    def move(lr: Tensor) -> Any:
        optimizer = make(lr, *values[1:])
        return optimizer.step(grads, optimizer.init(params), params)[0]

    moved = torch.func.vmap(move)(torch.tensor([0.1, 0.2]))
    assert {leaf.dtype for leaf in tree.leaves(moved)} == {dtype}


@pytest.mark.parametrize("value", [torch.ones(1), torch.tensor(1)], ids=["one-d", "integer"])
def test_a_tensor_that_is_no_scalar_is_refused(value: Tensor) -> None:
    for make in (
        lambda: optim.sgd(value),
        lambda: optim.sgd(0.1, momentum=value),
        lambda: optim.adam(0.1, betas=(0.9, value)),
        lambda: optim.adam(0.1, eps=value),
        lambda: optim.adamw(0.1, weight_decay=value),
        lambda: optim.muon(0.1, momentum=value),
        lambda: optim.clipped(optim.sgd(0.1), value),
    ):
        with pytest.raises(ValueError, match="must be a number or a 0-d floating tensor; got"):
            make()


# --------------------------------------------------------------------------- global defaults


@pytest.fixture(params=["dtype", "device"])
def other_defaults(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Sets a global default that is not torch's own; it is set back at the end."""
    before = torch.get_default_dtype()

    def change() -> None:
        if request.param == "dtype":
            torch.set_default_dtype(FP64)
        else:
            torch.set_default_device("meta")

    yield change
    torch.set_default_dtype(before)
    torch.set_default_device(None)


def make_optimizer(name: str) -> optim.Optimizer:
    """As in OPTIMIZERS, made anew: what is created then must be right, too."""
    if name in CASES:
        return ours(name, optim.one_cycle(0.1, 10))
    if name == "partition":
        return optim.partition(lambda path: path == "conv.weight", optim.muon(0.1), optim.adamw(0.1))
    return optim.clipped(optim.sgd(0.1, momentum=0.9), 0.5)


@DTYPES
@pytest.mark.parametrize("name", [*CASES, "partition", "clipped"])
def test_global_defaults_change_no_bit_of_a_step(
    name: str, dtype: torch.dtype, other_defaults: Callable[[], None]
) -> None:
    params, grads = make_tree(0, dtype), make_tree(1, dtype)

    def run() -> list[Tensor]:
        optimizer, moved = make_optimizer(name), params
        opt_state = optimizer.init(moved)
        for _ in range(3):
            moved, opt_state = optimizer.step(grads, opt_state, moved)
        updates, _ = optimizer.update(grads, opt_state, moved)
        empty = optimizer.init({}) if name != "partition" else ()
        return tree.leaves((moved, opt_state, updates, optim.ema(params, moved, 0.9), empty))

    want = run()
    other_defaults()
    got = run()
    assert [(leaf.dtype, leaf.device) for leaf in got] == [(leaf.dtype, leaf.device) for leaf in want]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", SCHEDULES)
def test_global_defaults_change_no_bit_of_a_schedule(name: str, other_defaults: Callable[[], None]) -> None:
    makers: dict[str, Callable[[], optim.Schedule]] = {
        "constant": lambda: optim.constant(0.1),
        "one-cycle": lambda: optim.one_cycle(0.3, 1000),
        "cosine": lambda: optim.cosine(0.3, 900, warmup_steps=20, final_lr=1e-3),
        "step": lambda: optim.step(0.3, (5, 30, 400), gamma=0.5),
    }
    steps = torch.arange(1000)
    want = makers[name]()(steps)
    other_defaults()
    got = makers[name]()(steps)
    assert (got.dtype, got.device) == (want.dtype, want.device)
    assert torch.equal(got, want)


# --------------------------------------------------------------------------- states of other leaves


@pytest.mark.parametrize("name", ["sgd-momentum", "adam", "adamw"])
@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.ones(2)},
        {"a": torch.ones(2), "c": torch.ones(2)},
        {"a": torch.ones(1), "b": torch.ones(2)},
    ],
    ids=["fewer", "others", "would-broadcast"],
)
def test_a_state_of_other_leaves_is_refused(name: str, other: Any) -> None:
    params = {"a": torch.ones(2), "b": torch.ones(2)}
    optimizer = ours(name, 0.1)
    with pytest.raises(ValueError, match="the optimizer's state must have the leaves and shapes of params"):
        optimizer.step(params, optimizer.init(other), params)
