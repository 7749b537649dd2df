"""What networks do with their leaves: followed to the numbers of a loop in float64, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_func as rf
from resnet_func import losses, tree
from resnet_func import per_sample as ps
from resnet_func.testing import assert_trees_near, generator

N, D, T, CLASSES = 4, 6, 5, 3
Network = Callable[[dict[str, Any], Tensor], Tensor]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(sum(shape)), dtype=torch.float64)


ROWS, SEQUENCES, TOKENS = draw(N, D), draw(N, T, D), torch.arange(N * T).reshape(N, T) % 7
LEAVES = {"w": (D, D), "v": (D,), "h": (D, CLASSES), "e": (7, D)}
LSTM = {"w_ih": (4 * D, D), "w_hh": (4 * D, D), "b_ih": (4 * D,), "b_hh": (4 * D,)}


def no_grad_scale(p: dict[str, Any], x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = p["w"].abs().amax(1, keepdim=True)
    return torch.tanh(x @ (p["w"] / scale)) @ p["h"]


def no_grad_gate(p: dict[str, Any], x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = torch.sigmoid(x @ p["w"])
    return (torch.tanh(x @ p["w"]) * gate) @ p["h"]


def no_grad_parts(p: dict[str, Any], x: Tensor) -> Tensor:
    with torch.no_grad():
        left, right = p["w"].abs().chunk(2, 1)
        largest, _ = left.max(1, keepdim=True)
    return torch.tanh(x @ (p["w"] / (largest + right.mean()))) @ p["h"]


def lstm_cell(p: dict[str, Any], x: Tensor) -> Tensor:
    hidden = cell = x.new_zeros(len(x), D)
    for step in x.unbind(1):
        hidden, cell = torch.lstm_cell(step, (hidden, cell), p["w_ih"], p["w_hh"], p["b_ih"], p["b_hh"])
    return hidden @ p["h"]


def through_views_of_the_batch(p: dict[str, Any], x: Tensor) -> Tensor:
    y = x.clone()
    left = y[:, :3]
    left *= p["v"][:3]
    y[:, 3:].add_(p["v"][3:])
    return torch.tanh(y) @ p["h"]


def in_place_unbound(p: dict[str, Any], x: Tensor) -> Tensor:
    y = x @ p["w"]
    y.add_(p["v"]).mul_(p["v"].exp())
    y.view(-1, D).sub_(p["v"])
    return torch.tanh(y) @ p["h"]


def written_into_zeros(p: dict[str, Any], x: Tensor) -> Tensor:
    y = torch.zeros(len(x), D + 2, dtype=x.dtype)
    y[:, 1:-1] = x
    return torch.tanh(F.linear(y[:, 1:-1], p["w"], p["v"])) @ p["h"]


def repeated_in_place(p: dict[str, Any], x: Tensor) -> Tensor:
    w = p["w"].clone()
    w.mul_(p["w"]).add_(1.0)
    return torch.tanh(x @ w) @ p["h"]


def circular(p: dict[str, Any], x: Tensor) -> Tensor:
    kernels = p["w"].view(D, 2, 3)[:, :1].expand(-1, T, -1)
    return torch.tanh(F.conv1d(F.pad(x, (1, 1), mode="circular"), kernels)).mean(2) @ p["h"]


def attends(p: dict[str, Any], x: Tensor) -> Tensor:
    keys = p["w"].expand(len(x), -1, -1)
    return F.scaled_dot_product_attention(x, keys, p["w"].unsqueeze(0)).mean(1) @ p["h"]


FOLLOWED: dict[str, tuple[Network, Tensor, dict[str, tuple[int, ...]]]] = {
    "a view of a leaf": (lambda p, x: torch.tanh(x @ p["w"].view(-1).view(D, D).T) @ p["h"], ROWS, LEAVES),
    ".data": (lambda p, x: (torch.tanh(x @ p["w"]) * (x @ p["w"].data)) @ p["h"], ROWS, LEAVES),
    "detached": (lambda p, x: (torch.tanh(x @ p["w"]) * (x @ p["w"].detach())) @ p["h"], ROWS, LEAVES),
    "straight through": (
        lambda p, x: torch.tanh(x @ (p["w"] + (p["w"].round() - p["w"]).detach())) @ p["h"],
        ROWS,
        LEAVES,
    ),
    "a scale under no_grad": (no_grad_scale, ROWS, LEAVES),
    "parts under no_grad": (no_grad_parts, ROWS, LEAVES),
    "a gate under no_grad": (no_grad_gate, ROWS, LEAVES),
    "keywords": (
        lambda p, x: torch.tanh(torch.addmm(input=p["v"], mat1=x, mat2=p["w"])) @ p["h"],
        ROWS,
        LEAVES,
    ),
    "two outputs of a call": (lstm_cell, SEQUENCES, {**LSTM, "h": (D, CLASSES)}),
    "in place through views": (through_views_of_the_batch, ROWS, LEAVES),
    "in place, not bound": (in_place_unbound, ROWS, LEAVES),
    "samples written into zeros": (written_into_zeros, ROWS, LEAVES),
    "a copy changed in place": (repeated_in_place, ROWS, LEAVES),
    "attention to leaves": (attends, SEQUENCES, LEAVES),
    "a linear layer of one output": (lambda p, x: (x @ p["h"]) * F.linear(x, p["v"])[:, None], ROWS, LEAVES),
    "tied embedding": (lambda p, x: torch.tanh(F.embedding(x, p["e"])).mean(1) @ p["e"].T, TOKENS, LEAVES),
    "a bag of embeddings": (
        lambda p, x: torch.tanh(F.embedding_bag(x, p["e"], mode="sum")) @ p["h"],
        TOKENS,
        LEAVES,
    ),
    "rows by index": (lambda p, x: torch.tanh(p["e"][x].mean(1)) @ p["h"], TOKENS, LEAVES),
    "where, by sample": (lambda p, x: torch.where(x > 0, x * p["v"], p["v"].exp()) @ p["h"], ROWS, LEAVES),
    "a mask by index": (lambda p, x: torch.masked_fill(x, x < 0, p["v"].sum()) @ p["h"], ROWS, LEAVES),
    "distances": (lambda p, x: torch.cdist(x, p["e"]), ROWS, LEAVES),
    "a temperature": (lambda p, x: (x @ p["h"]) * p["v"].sum().exp(), ROWS, LEAVES),
    "circular padding": (
        circular,
        SEQUENCES,
        LEAVES,
    ),
    "positions": (lambda p, x: torch.tanh(x + p["e"][:T]).mean(1) @ p["h"], SEQUENCES, LEAVES),
    "a token for each sample": (
        lambda p, x: torch.cat([p["v"].expand(len(x), 1, D), x], 1).tanh().mean(1) @ p["h"],
        SEQUENCES,
        LEAVES,
    ),
}


WITHOUT_FORWARD_MODE = ("a bag of embeddings", "distances")


def parameters(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: draw(*shape) for name, shape in shapes.items()}


def loop(network: Network, params: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Single backward passes."""
    rows: list[dict[str, Tensor]] = []
    for i in range(len(x)):
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
        loss = losses.cross_entropy(network(leaves, x[i : i + 1]), y[i : i + 1]).sum()
        found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        rows.append(dict(zip(leaves, found, strict=True)))
    return {name: torch.stack([row[name] for row in rows]) for name in params}


@pytest.mark.parametrize("name", FOLLOWED)
@pytest.mark.parametrize("check", [None, False], ids=["checked", "unchecked"])
def test_gradients_are_those_of_single_backward_passes(name: str, check: bool | None) -> None:
    network, x, shapes = FOLLOWED[name]
    params, y = parameters(shapes), torch.arange(N) % CLASSES
    want, model = loop(network, params, x, y), rf.from_function(network)
    loss, options = losses.cross_entropy, {"check": check}
    assert_trees_near(ps.grads(model, loss, **options)(params, {}, x, y), want, 1e-10)
    norms = torch.stack([leaf.flatten(1).square().sum(1) for leaf in want.values()]).sum(0).sqrt()
    torch.testing.assert_close(ps.norms(model, loss, **options)(params, {}, x, y), norms, rtol=1e-10, atol=0)
    bound = float(norms.median())
    factors = (bound / norms).clamp(max=1)
    total, _ = ps.clipped_sum(model, loss, max_norm=bound, **options)(params, {}, x, y)
    assert_trees_near(total, tree.map(lambda leaf: torch.einsum("n,n...->...", factors, leaf), want), 1e-10)


@pytest.mark.parametrize("name", [name for name in FOLLOWED if name not in WITHOUT_FORWARD_MODE])
@pytest.mark.parametrize("grad_mode", [True, False], ids=["grad", "no_grad"])
def test_forward_mode_sees_the_same_constants(name: str, grad_mode: bool) -> None:
    """torch's forward mode goes through `no_grad`: `dot` and Gauss-Newton products were others."""
    network, x, shapes = FOLLOWED[name]
    params, y = parameters(shapes), torch.arange(N) % CLASSES
    along, model = tree.map(torch.cos, params), rf.from_function(network)
    want = loop(network, params, x, y)
    products = torch.stack([(want[path] * along[path]).flatten(1).sum(1) for path in want]).sum(0)
    with torch.set_grad_enabled(grad_mode):
        found = ps.dot(model, losses.cross_entropy)(params, {}, x, y, along)
    assert not found.requires_grad
    torch.testing.assert_close(found, products, rtol=1e-10, atol=1e-12)


def test_gauss_newton_products_see_what_is_constant() -> None:
    network, x, shapes = FOLLOWED["a scale under no_grad"]
    params, y = parameters(shapes), draw(N, CLASSES)
    along = tree.map(torch.cos, params)
    jacobians = torch.func.jacrev(lambda p: network(p, x))(params)
    tangent = sum(torch.tensordot(jacobians[k], along[k], along[k].ndim) for k in params)
    want = {k: torch.tensordot(tangent, jacobians[k], 2) / N for k in params}
    product = rf.curvature.ggn_vp(rf.from_function(network), losses.squared_error)
    assert_trees_near(product(params, {}, x, y, along), want, 1e-10)


def index_into_copy(p: dict[str, Any], x: Tensor) -> Tensor:
    w = p["w"].clone()
    w[0] = w[1] * 2
    return x @ w @ p["h"]


def view_of_copy(p: dict[str, Any], x: Tensor) -> Tensor:
    w = p["w"].clone()
    w[0].mul_(2.0)
    return x @ w @ p["h"]


def leaf_into_batch(p: dict[str, Any], x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 2:4] = p["v"][2:4]
    return x @ p["h"]


def copied_into_batch(p: dict[str, Any], x: Tensor) -> Tensor:
    return x.clone().copy_(p["v"]) @ p["h"]


REFUSED: dict[str, tuple[Network, Tensor, str]] = {
    "assignment into a copy": (index_into_copy, ROWS, r"w, or what derives from it, .* t\[i\] = value"),
    "a view of a copy": (view_of_copy, ROWS, "derives from w was changed in place through a view"),
    "assignment into the batch": (leaf_into_batch, ROWS, r"v, or what derives from it, .* t\[i\] = value"),
    "a copy into the batch": (copied_into_batch, ROWS, "written into a tensor by copy_"),
    "as many positions as samples": (
        lambda p, x: torch.tanh(x[:, :N] + p["v"][None].expand(N, D)).mean(1) @ p["h"],
        SEQUENCES,
        "v is expanded to 4 rows, as many as the batch has, but they are no samples",
    ),
    "the same, after a layer": (
        lambda p, x: torch.tanh(x[:, :N] + p["v"][None].expand(N, D) @ p["w"]).mean(1) @ p["h"],
        SEQUENCES,
        "v is expanded to 4 rows",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("check", [None, False], ids=["checked", "unchecked"])
def test_what_cannot_be_followed_is_refused_in_one_line(name: str, check: bool | None) -> None:
    network, x, message = REFUSED[name]
    params, y = parameters(LEAVES), torch.arange(N) % CLASSES
    model = rf.from_function(network)
    with pytest.raises(ValueError, match=message):
        ps.grads(model, losses.cross_entropy, check=check)(params, {}, x, y)


COMPILED = (
    "two outputs of a call",
    "in place through views",
    "a scale under no_grad",
    "a token for each sample",
)


@pytest.mark.nightly
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_networks_are_followed_alike(name: str) -> None:
    network, x, shapes = FOLLOWED[name]
    params, y = parameters(shapes), torch.arange(N) % CLASSES
    compiled = torch.compile(ps.grads(rf.from_function(network), losses.cross_entropy), fullgraph=True)
    assert_trees_near(compiled(params, {}, x, y), loop(network, params, x, y), 1e-10)


@pytest.mark.nightly
def test_compiled_code_refuses_what_it_does_not_see() -> None:
    """Dynamo hides assignments by index from the interception, and has no versions of tensors."""
    params, y = parameters(LEAVES), torch.arange(N) % CLASSES
    for network in (written_into_zeros, view_of_copy):
        torch.compiler.reset()
        run = ps.grads(rf.from_function(network), losses.cross_entropy)
        with pytest.raises(Exception, match="cannot be followed|Observed exception"):
            torch.compile(run, backend="aot_eager", fullgraph=True)(params, {}, ROWS, y)


def sorted_and_back(p: dict[str, Any], x: Tensor) -> Tensor:
    order = x[:, 0].argsort()
    return torch.tanh(x[order] @ p["w"])[order.argsort()] @ p["h"]


COUPLED: dict[str, Network] = {
    "sorted, and back": sorted_and_back,
    "turned, and back": lambda p, x: torch.tanh(x.flip(0) @ p["w"]).flip(0) @ p["h"],
    "turned": lambda p, x: torch.tanh(x.flip(0) @ p["w"]) @ p["h"],
    "less their mean": lambda p, x: torch.tanh((x - x.mean(0)) @ p["w"]) @ p["h"],
    "less their mean, detached": lambda p, x: torch.tanh((x - x.mean(0)).detach() @ p["w"]) @ p["h"],
    "by those beyond the second": lambda p, x: torch.tanh(x @ p["w"] + x[2:].sum(0)) @ p["h"],
}


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("turned", [False, True])
def test_samples_that_meet_or_change_places_are_refused(name: str, turned: bool) -> None:
    """In any order of the first two samples: one of them is sorted already."""
    x, y = (ROWS.flip(0) if turned else ROWS), torch.arange(N) % CLASSES
    with pytest.raises(ValueError, match="is another in a batch than sample by sample"):
        ps.grads(rf.from_function(COUPLED[name]), losses.cross_entropy)(parameters(LEAVES), {}, x, y)


def test_a_network_of_one_batch_size_is_told() -> None:
    model = rf.from_function(lambda p, x: (x.view(N, D) @ p["w"])[:, :CLASSES])
    with pytest.raises(ValueError, match="takes no batch of 5 samples to compare"):
        ps.norms(model, losses.cross_entropy)(parameters(LEAVES), {}, ROWS, torch.zeros(N, dtype=torch.int64))


def test_a_call_without_forward_mode_is_told() -> None:
    network, x, _ = FOLLOWED["distances"]
    params, y = parameters(LEAVES), torch.arange(N)
    with pytest.raises(ValueError, match="dot is a forward-mode pass"):
        ps.dot(rf.from_function(network), losses.cross_entropy)(params, {}, x, y, params)


MODULES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "attention, batch second": (lambda: Turned(nn.MultiheadAttention(D, 2)), SEQUENCES),
    "attention, other keys": (lambda: Crossed(), SEQUENCES),
    "lstm cell": (lambda: Recurrent(), SEQUENCES),
    "bilinear": (lambda: Twice(nn.Bilinear(D, D, CLASSES)), ROWS),
}


class Turned(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.head = attention, nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.head(self.attention(x, x, x)[0].mean(0))


class Crossed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, kdim=3, vdim=4, batch_first=True, add_bias_kv=True)
        self.head = nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x[..., :3], x[..., :4])[0].mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(D, D), nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = cell = x.new_zeros(len(x), D)
        for step in x.unbind(1):
            hidden, cell = self.cell(step, (hidden, cell))
        return self.head(hidden)


class Twice(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x)


@pytest.mark.parametrize("name", MODULES)
def test_modules_have_the_gradients_of_a_loop(name: str) -> None:
    make, x = MODULES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make().double().eval()
    model, params, state = rf.from_module(module)
    y = torch.arange(N) % CLASSES
    got, want = (
        ps.grads(model, losses.cross_entropy, method=method, check=False)(params, state, x, y)
        for method in ("contract", "loop")
    )
    assert_trees_near(got, want, 1e-10)
