"""Muon against torch.optim to the bit, its orthogonalisation, and a tree shared by two optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import resnet_func as rf
from resnet_func import optim, tree
from resnet_func.optim.muon import orthogonalized
from resnet_func.train import init_train_state, make_train_step, to_memory_format

SHAPES = {"wide": (3, 8), "tall": (9, 2), "square": (4, 4), "row": (1, 5)}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def is_convolution(path: str) -> bool:
    return "conv" in path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(
    "options", [{}, {"nesterov": False}, {"momentum": 0.0}, {"weight_decay": 0.0}], ids=str
)
def test_bitwise_torchs(options: dict[str, Any], dtype: torch.dtype) -> None:
    params = {name: normal(*shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(SHAPES.items())}
    modules = {name: torch.nn.Parameter(leaf.clone()) for name, leaf in params.items()}
    schedule = optim.one_cycle(0.05, 200)
    reference = torch.optim.Muon(modules.values(), lr=0.1, **options)
    optimizer = optim.muon(schedule, precision=torch.bfloat16, **options)
    opt_state = optimizer.init(params)
    for step in range(200):
        grads = {
            n: 0.3 * p + normal(*p.shape, seed=7 * step + len(n), dtype=dtype) for n, p in params.items()
        }
        for name, module in modules.items():
            module.grad = grads[name].clone()
        reference.param_groups[0]["lr"] = schedule(torch.tensor(step)).item()
        reference.step()
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optim.apply_updates(params, updates)
        for name, module in modules.items():
            assert torch.equal(params[name], module.detach()), f"step {step}, {name}"
    assert opt_state.step == 200


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 1.0, 1e3]))
def test_orthogonalized_keeps_singular_vectors_and_levels_values(
    m: int, n: int, seed: int, scale: float
) -> None:
    u, _, vh = torch.linalg.svd(normal(m, n, seed=seed), full_matrices=False)
    values = torch.linspace(0.05, 1, min(m, n), dtype=torch.float64)  # no smaller: five steps lift no more
    made = orthogonalized(scale * u @ values.diag() @ vh, torch.float64)
    core = u.T @ made @ vh.T
    levels = core.diagonal()
    assert (core - levels.diag()).abs().max() < 1e-10
    assert ((levels > 0.3) & (levels < 1.3)).all()


def test_a_convolution_is_a_matrix_of_its_filters() -> None:
    weight, grad = normal(6, 2, 3, 3, seed=0), normal(6, 2, 3, 3, seed=1)
    optimizer = optim.muon(0.1)
    moved = []
    for p, g in ((weight, grad), (weight.flatten(1), grad.flatten(1))):
        updates, _ = optimizer.update({"w": g}, optimizer.init({"w": p}), {"w": p})
        moved.append(updates.delta["w"])
    assert torch.equal(moved[0].flatten(1), moved[1])


def test_a_zero_gradient_only_decays() -> None:
    params = {"w": normal(3, 4, seed=0)}
    optimizer = optim.muon(0.5, weight_decay=0.1)
    updates, _ = optimizer.update(
        {"w": torch.zeros(3, 4, dtype=torch.float64)}, optimizer.init(params), params
    )
    assert torch.equal(optim.apply_updates(params, updates)["w"], params["w"] * 0.95)


def test_what_is_no_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got bn\.bias of fewer than two .* partition"):
        optim.muon(0.1).init({"bn": {"bias": torch.zeros(3)}, "w": torch.zeros(2, 2)})
    for wrong in ({"momentum": 1.0}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError, match="must be"):
            optim.muon(0.1, **wrong)


# --------------------------------------------------------------------------- partition


def mixed() -> tuple[dict[str, Any], dict[str, Any]]:
    params = {"conv": {"weight": normal(4, 3, 3, 3, seed=0)}, "fc": {"weight": normal(2, 4, seed=1)}}
    return params, tree.map(lambda p: 0.1 * p.sin(), params)


def test_each_leaf_moves_as_its_optimizer_says() -> None:
    params, grads = mixed()
    sgd, adam = optim.sgd(0.3, momentum=0.9), optim.adam(1e-2)
    both = optim.partition(is_convolution, sgd, adam)
    states = [both.init(params), sgd.init({"conv": params["conv"]}), adam.init({"fc": params["fc"]})]
    alone = params
    for _ in range(3):
        updates, states[0] = both.update(grads, states[0], params)
        params = optim.apply_updates(params, updates)
        halves = []
        for i, (optimizer, name) in enumerate(((sgd, "conv"), (adam, "fc")), start=1):
            mine = {name: alone[name]}
            updates, states[i] = optimizer.update({name: grads[name]}, states[i], mine)
            halves.append(optim.apply_updates(mine, updates))
        alone = {**halves[0], **halves[1]}
        for ours, theirs in zip(tree.leaves(params), tree.leaves(alone), strict=True):
            assert torch.equal(ours, theirs)
    assert states[0].step == 3


@pytest.mark.parametrize("where", [lambda path: True, lambda path: False], ids=["all", "none"])
def test_one_half_may_be_empty(where: Any) -> None:
    params, grads = mixed()
    both = optim.partition(where, optim.adam(0.1), optim.adam(0.1))
    updates, _ = both.update(grads, both.init(params), params)
    adam = optim.adam(0.1)
    expected, _ = adam.update(grads, adam.init(params), params)
    moved, wanted = (optim.apply_updates(params, u) for u in (updates, expected))
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(moved), tree.leaves(wanted), strict=True))


def test_gradients_of_another_tree_are_refused() -> None:
    params, grads = mixed()
    both = optim.partition(is_convolution, optim.muon(0.1), optim.sgd(0.1))
    with pytest.raises(ValueError, match="grads must have the leaves"):
        both.update({"conv": grads["conv"]}, both.init(params), params)


def test_a_training_step_keeps_the_memory_format_and_learns() -> None:
    model = rf.resnet20(depths=(1, 1, 1))
    params, state = model.init(generator(0))
    optimizer = optim.partition(is_convolution, optim.muon(0.02), optim.sgd(0.1, momentum=0.9))
    step = make_train_step(model, rf.losses.cross_entropy, optimizer)
    train_state = init_train_state(to_memory_format(params, torch.channels_last), state, optimizer)
    x, y = normal(8, 3, 8, 8, seed=1, dtype=torch.float32), torch.arange(8)
    x = x.contiguous(memory_format=torch.channels_last)
    losses = []
    for _ in range(8):
        train_state, metrics = step(train_state, x, y)
        losses.append(metrics["loss"].item())
    assert losses[-1] < 0.5 * losses[0]
    weight = train_state.params["layer1"]["0"]["conv1"]["weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.nightly
def test_it_compiles_as_one_graph_and_once() -> None:
    params, grads = mixed()
    both = optim.partition(is_convolution, optim.muon(optim.one_cycle(0.1, 10)), optim.sgd(0.1, momentum=0.9))

    def move(params: Any, grads: Any, opt_state: Any) -> tuple[Any, Any]:
        updates, opt_state = both.update(grads, opt_state, params)
        return optim.apply_updates(params, updates), opt_state

    torch._dynamo.reset()
    compiled = torch.compile(move, fullgraph=True)
    ours, theirs = (params, both.init(params)), (params, both.init(params))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            ours, theirs = compiled(ours[0], grads, ours[1]), move(theirs[0], grads, theirs[1])
    for a, b in zip(tree.leaves(ours[0]), tree.leaves(theirs[0]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# --------------------------------------------------------------------------- transforms and defaults


def two_steps(nesterov: bool, params: Tensor, grads: Tensor, hyper: Any) -> Tensor:
    optimizer, moved = optim.muon(*hyper, nesterov=nesterov), {"w": params}
    opt_state = optimizer.init(moved)
    for _ in range(2):
        moved, opt_state = optimizer.step({"w": grads}, opt_state, moved)
    return moved["w"]


HYPER = torch.tensor([0.1, 0.8, 0.3], dtype=torch.float64)  # lr, momentum, weight decay


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("zeros", ["none", "a-row", "all"])
def test_every_derivative_of_a_step_is_finite_and_a_central_difference(zeros: str, nesterov: bool) -> None:
    """With respect to params, grads and 0-d hyper-parameters."""
    params, grads, weights = (normal(2, 3, seed=seed) for seed in (0, 1, 2))
    grads = grads if zeros == "none" else grads * torch.tensor([[0.0], [float(zeros == "a-row")]])

    def loss(params: Tensor, grads: Tensor, hyper: Tensor) -> Tensor:
        return (two_steps(nesterov, params, grads, hyper.unbind()) * weights).sum()

    at = params, grads, HYPER
    got = torch.func.grad(loss, argnums=(0, 1, 2))(*at)
    assert all(
        leaf.isfinite().all() for leaf in tree.leaves(torch.func.hessian(loss, argnums=(0, 1, 2))(*at))
    )
    twice = torch.func.jacrev(torch.func.grad(loss, argnums=1), argnums=1)(*at)
    assert twice.isfinite().all()
    for i, slot in enumerate(at):
        # at zero gradients what divides is the smallest norm allowed, 1e-7: a step must be shorter by far
        h = 1e-12 if zeros == "all" and i == 1 else 1e-6
        numeric = []
        for bump in h * torch.eye(slot.numel(), dtype=torch.float64):
            up, down = (loss(*at[:i], slot + s * bump.reshape(slot.shape), *at[i + 1 :]) for s in (1, -1))
            numeric.append((up - down) / (2 * h))
        want = torch.stack(numeric).reshape(slot.shape)
        torch.testing.assert_close(got[i], want, rtol=1e-3, atol=1e-6 * float(want.abs().max()) + 1e-7)


@pytest.mark.parametrize("nesterov", [True, False])
def test_mapping_over_hyper_parameters_is_the_loop(nesterov: bool) -> None:
    params, grads = normal(2, 3, seed=0), normal(2, 3, seed=1)
    factors = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)
    by_lr = torch.func.vmap(lambda lr: two_steps(nesterov, params, grads, (lr, 0.8, 0.3)))(0.1 * factors)
    by_all = torch.func.vmap(lambda hyper: two_steps(nesterov, params, grads, hyper.unbind()))(
        factors[:, None] * HYPER
    )
    for i, f in enumerate(factors.tolist()):
        one = two_steps(nesterov, params, grads, (0.1 * f, 0.8, 0.3))
        torch.testing.assert_close(by_lr[i], one, rtol=1e-11, atol=1e-12)
        every = two_steps(nesterov, params, grads, [value * f for value in HYPER.tolist()])
        torch.testing.assert_close(by_all[i], every, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("setting", ["dtype", "device"])
@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=str)
def test_global_defaults_change_no_bit(setting: str, precision: torch.dtype | None) -> None:
    params, grads = ({"w": normal(4, 3, 2, seed=s, dtype=torch.float32)} for s in (0, 1))

    def run() -> list[Tensor]:
        optimizer, moved = optim.muon(0.1, precision=precision), params
        opt_state = optimizer.init(moved)
        for _ in range(3):
            moved, opt_state = optimizer.step(grads, opt_state, moved)
        return tree.leaves((moved, opt_state))

    want, before = run(), torch.get_default_dtype()
    try:
        if setting == "dtype":
            torch.set_default_dtype(torch.float64)
        else:
            torch.set_default_device("meta")
        got = run()
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    for a, b in zip(got, want, strict=True):
        assert (a.dtype, a.device) == (b.dtype, b.device)
        assert torch.equal(a, b)


def test_a_state_of_other_leaves_is_refused() -> None:
    params, other = {"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, {"a": torch.ones(2, 2)}
    optimizer = optim.muon(0.1)
    with pytest.raises(ValueError, match="the optimizer's state must have the leaves and shapes of params"):
        optimizer.step(params, optimizer.init(other), params)
