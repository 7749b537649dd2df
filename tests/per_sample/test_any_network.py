"""The fast path on networks that know nothing of it, against a loop of single backward passes in float64."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import resnet_func as rf
from resnet_func import losses, tree
from resnet_func import per_sample as ps
from resnet_func.per_sample import dataset
from resnet_func.per_sample.capture import capture
from resnet_func.per_sample.layers import contract, layer_factors
from resnet_func.per_sample.layers.factors import ConvFactors, sample_slices
from resnet_func.per_sample.layers.layer import Found, Layer
from resnet_func.per_sample.task import Batch, make_task
from resnet_func.testing import assert_trees_near, randn
from resnet_func.types import Model, Params, State
from tests.per_sample.cases import batch, generator, network, small

CLASSES = 5
N = 4


def images(channels: int, *sides: int) -> Tensor:
    return torch.randn(N, channels, *sides, generator=generator(0), dtype=torch.float64)


def head(features: int) -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(features, CLASSES)]


class Tokens(nn.Module):
    """Embedding, positions, a class token, attention, RMS norm, a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.positions = nn.Parameter(torch.randn(1, 6, 8))
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.attend = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.norm, self.head = nn.RMSNorm(8), nn.Linear(8, CLASSES)
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions
        x = torch.cat([self.token.expand(len(tokens), -1, -1), x], 1)
        return self.head((self.norm(self.attend(x)) * self.gain)[:, 0])


class TiedConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.conv(x))
        return self.head(x.mean((2, 3)))


class TiedAutoencoder(nn.Module):
    """A weight that is used as it is, and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 7)), nn.Parameter(torch.randn(4))
        self.head = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(torch.tanh(F.linear(x, self.weight, self.bias)), self.weight.T))


class InPlace(nn.Module):
    """Leaves that are added and multiplied in place; one derived; one module never used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.unused = nn.Linear(7, CLASSES), nn.Linear(3, 3)
        self.shift, self.scale = nn.Parameter(torch.randn(CLASSES)), nn.Parameter(torch.randn(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y.add_(self.shift)  # the result is not bound: it must be y itself that changes
        y *= torch.exp(self.scale)
        return F.relu_(y)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "convolutions with biases": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, (3, 2), stride=(2, 1), padding="valid", dilation=(1, 2)), nn.GELU(), *head(112),
        ),
        images(3, 9, 9),
    ),
    "paddings": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, (3, 5), padding="same", dilation=(2, 1)), nn.Tanh(),
            nn.Conv2d(4, 6, 3, groups=2, padding_mode="reflect", padding=1),
            nn.AdaptiveAvgPool2d(1), *head(6),
        ),
        images(3, 9, 9),
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(),
            nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
            nn.AdaptiveAvgPool2d(1), *head(6),
        ),
        images(3, 9, 9),
    ),
    "one dimension": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 4, 3, stride=2), nn.BatchNorm1d(4), nn.PReLU(4), nn.ConvTranspose1d(4, 6, 3),
            nn.GroupNorm(2, 6), nn.AdaptiveAvgPool1d(1), *head(6),
        ),
        images(3, 17),
    ),
    "three dimensions": (
        lambda: nn.Sequential(
            nn.Conv3d(2, 4, 3, padding=1, bias=False), nn.InstanceNorm3d(4, affine=True), nn.ReLU(),
            nn.Conv3d(4, 6, 2, stride=2), nn.ConvTranspose3d(6, 4, 2), nn.AdaptiveAvgPool3d(1), *head(4),
        ),
        images(2, 6, 5, 6),
    ),
    "layer norms": (
        lambda: nn.Sequential(
            nn.LayerNorm((3, 9, 9)), nn.Conv2d(3, 4, 3), nn.LayerNorm([7, 7]), nn.Tanh(), *head(196)
        ),
        images(3, 9, 9),
    ),
    "tokens": (Tokens, torch.randint(0, 11, (N, 6), generator=generator(0))),
    "tied convolution": (TiedConvolution, images(3, 9, 9)),
    "tied autoencoder": (TiedAutoencoder, images(7)),
    "weight norm and spectral norm": (
        lambda: nn.Sequential(
            parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(),
            parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)), nn.Flatten(),
            parametrizations.weight_norm(nn.Linear(100, CLASSES)),
        ),
        images(3, 9, 9),
    ),
    "in place, and unused": (InPlace, images(7)),
    "a linear layer over positions": (
        lambda: nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3), *head(36)),
        torch.randn(N, 3, 4, 7, generator=generator(0), dtype=torch.float64),
    ),
}  # fmt: skip


def build(name: str) -> tuple[Model, Params, State, Tensor]:
    make, x = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make().double().eval()
    for leaf in module.parameters():  # also those that start at zero or one
        leaf.data += 0.1 * torch.randn(leaf.shape, generator=generator(leaf.numel()), dtype=leaf.dtype)
    return *rf.from_module(module), x


def quantities(method: Any) -> dict[str, Callable[[Model], Callable[..., Any]]]:
    options: dict[str, Any] = {"train": False, "method": method}
    loss = losses.cross_entropy
    return {
        "grads": lambda model: ps.grads(model, loss, **options),
        "norms": lambda model: ps.norms(model, loss, **options),
        "layer_norms": lambda model: ps.layer_norms(model, loss, **options),
        "clipped_sum": lambda model: ps.clipped_sum(model, loss, max_norm=0.3, **options),
        "moments": lambda model: tuple_of(ps.moments(model, loss, **options)),
        "sketch": lambda model: ps.sketch(model, loss, dim=8, projection="dense", **options),
        "gram": lambda model: lambda p, s, x, y: ps.gram(model, loss, **options)(p, s, (x, y)),
    }


def tuple_of(moments: Callable[..., ps.Moments]) -> Callable[..., Any]:
    return lambda *arguments: (moments(*arguments).mean, moments(*arguments).second_moment)


@pytest.mark.parametrize(
    "name",
    [
        "convolutions with biases",
        "paddings",
        "transposed",
        "three dimensions",
        "layer norms",
        "a linear layer over positions",
    ],
)
def test_layers_of_a_known_kind_need_no_vmap(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule for any call would give the same, at the price of one pass per sample."""

    def refuse(layer: Layer) -> Found:
        raise AssertionError(f"{layer.name} is of a known kind")

    monkeypatch.setattr(layer_factors, "any_call", refuse)
    model, params, state, x = build(name)
    norms = ps.norms(model, losses.cross_entropy, train=False)(params, state, x, torch.arange(N) % CLASSES)
    assert norms.shape == (N,)


def test_uses_of_a_convolution_that_differ_in_images_only_are_views() -> None:
    model, params, state, x = build("tied convolution")
    task = make_task(model, losses.cross_entropy, lambda path: True, params, state)
    factors = capture(task, Batch(x, torch.arange(N) % CLASSES, N, 1)).factors()["conv.weight"]
    assert isinstance(factors, ConvFactors)
    assert factors.views == 3


@pytest.mark.parametrize("name", NETWORKS)
def test_every_quantity_is_that_of_a_loop(name: str) -> None:
    model, params, state, x = build(name)
    y = torch.arange(N) % CLASSES
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")  # of batching rules
        for quantity, make in quantities("auto").items():
            expected = quantities("loop")[quantity](model)(params, state, x, y)
            assert_trees_near(make(model)(params, state, x, y), expected)


def test_leaves_of_one_derived_weight_are_formed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model, params, state, x = build("weight norm and spectral norm")
    form_derived, together = contract.form_derived, []

    def note(leaves: dict[str, Any]) -> dict[str, Any]:
        together.append(list(leaves))
        return form_derived(leaves)

    monkeypatch.setattr(contract, "form_derived", note)
    ps.norms(model, losses.cross_entropy)(params, state, x, torch.arange(N) % CLASSES)
    pairs = [sorted(path.rpartition(".")[2] for path in paths) for paths in together if len(paths) > 1]
    assert pairs == [["original0", "original1"]] * 2


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_slices_of_factors_are_those_samples(name: str, views: int) -> None:
    model, params, state, x = build(name)
    task = make_task(model, losses.cross_entropy, lambda path: True, params, state)
    y = torch.arange(N) % CLASSES
    folded = Batch(torch.cat([x, x.flip(0)][:views]), y.repeat(views), N, views)
    for factors in capture(task, folded).factors().values():
        parts = sample_slices(factors, max_elements=1)
        assert len(parts) == N or not contract.grads(factors).numel()
        assert_trees_near(torch.cat([contract.grads(part) for part in parts]), contract.grads(factors))


@pytest.mark.parametrize("name", ["convolutions with biases", "weight norm and spectral norm"])
def test_norms_can_be_differentiated_by_the_input_alone(name: str) -> None:
    model, params, state, x = build(name)
    y, towards = torch.arange(N) % CLASSES, x.flip(0)
    fast, loop = (quantities(method)["norms"](model) for method in ("contract", "loop"))

    def of_input(norms: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: norms(params, state, x, y)

    by_jvp = [torch.func.jvp(of_input(norms), (x,), (towards,)) for norms in (fast, loop)]
    assert_trees_near(*by_jvp)
    with torch.no_grad():
        assert_trees_near(torch.func.jvp(of_input(fast), (x,), (towards,)), by_jvp[1])
    by_vjp = [torch.func.vjp(of_input(norms), x)[1](torch.ones(N, dtype=x.dtype)) for norms in (fast, loop)]
    assert_trees_near(*by_vjp)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "tokens"])  # whose input has no NaN
def test_a_broken_sample_is_left_out_of_any_network(name: str) -> None:
    """With two views of each sample: both are left out."""
    model, params, state, x = build(name)
    views, y = torch.stack([x, x.flip(0)], 1), torch.arange(N) % CLASSES
    clipped = ps.clipped_sum(
        model, losses.cross_entropy, max_norm=0.3, nonfinite="zero", views=True, train=False
    )
    expected, norms = clipped(params, state, views[1:], y[1:])
    views[0, 1] = torch.nan
    total, found = clipped(params, state, views, y)
    assert_trees_near(total, expected)
    assert not found[0].isfinite()
    assert_trees_near(found[1:], norms)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_torchvisions_module_and_our_config_give_the_same(norm: str) -> None:
    groups = {"norm_layer": lambda c: nn.GroupNorm(32, c)} if norm == "group" else {}
    module = torchvision.models.resnet18(num_classes=CLASSES, **groups).double().eval()
    model, params, state = rf.from_module(module)
    config = rf.resnet18(num_classes=CLASSES, norm=norm)  # type: ignore[arg-type]
    x, y = images(3, 32, 32), torch.arange(N) % CLASSES
    for name in ("norms", "clipped_sum"):
        make = quantities("auto")[name]
        assert_trees_near(make(model)(params, state, x, y), make(config)(params, state, x, y), 1e-12)


@pytest.mark.parametrize(
    "expand",
    [
        lambda token, n: token.expand(n, -1, -1),
        lambda token, n: token.expand((n, -1, -1)),
        lambda token, n: token.expand(size=(n, -1, -1)),
        lambda token, n: token.repeat(n, 1, 1),
        lambda token, n: token[0].expand(n, -1, -1),
        lambda token, n: torch.broadcast_to(token, (n, 1, 7)),
        lambda token, n: torch.tile(token, dims=(n, 1, 1)),
    ],
    ids=["sizes", "tuple", "keyword", "repeat", "new dimension", "broadcast", "tile"],
)
def test_a_class_token_becomes_a_batch(expand: Callable[[Tensor, int], Tensor]) -> None:
    def apply(params: Params, x: Tensor) -> Tensor:
        together = torch.cat([expand(params["token"], len(x)), x.unsqueeze(1)], 1)
        return torch.tanh(together).mean(1) @ params["head"]

    params = {"token": images(7)[:1].unsqueeze(1), "head": images(CLASSES, 7)[0].T}
    arguments = params, {}, images(7), torch.arange(N) % CLASSES
    for name in ("grads", "norms"):
        fast, loop = (quantities(method)[name](rf.from_function(apply)) for method in ("contract", "loop"))
        assert_trees_near(fast(*arguments), loop(*arguments))


class Attention(nn.Module):
    """Fused attention, whose kernels have no forward mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 24), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.first(x).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v).mean(1))


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (Attention(), torch.randn(N, 5, 8, generator=generator(0), dtype=torch.float64)),
        (nn.Sequential(nn.Embedding(5, 3, padding_idx=1), *head(6)), torch.tensor([[0, 1], [1, 1]] * 2)),
    ],
    ids=["attention", "embedding"],
)
def test_dot_where_forward_mode_is_not_what_reverse_mode_is(module: nn.Module, x: Tensor) -> None:
    model, params, state = rf.from_module(module.double())
    y = torch.arange(N) % CLASSES
    grads = ps.grads(model, losses.cross_entropy, method="loop")(params, state, x, y)
    products = [(g * p).flatten(1).sum(1) for g, p in zip(*map(tree.leaves, (grads, params)), strict=True)]
    got = ps.dot(model, losses.cross_entropy)(params, state, x, y, params)
    assert_trees_near(got, torch.stack(products).sum(0))


WRAPPERS: dict[str, Callable[[Model], Model]] = {
    "flips": rf.train.average_flips,
    "winograd": rf.winograd.wrap,
    "flips of winograd": lambda model: rf.train.average_flips(rf.winograd.wrap(model)),
    "a user's own": lambda model: model._replace(
        apply=lambda params, state, x, *, train: (
            2 * model.apply(params, state, x.square(), train=train)[0],
            state,
        )
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_model_has_the_gradients_of_what_it_computes(name: str) -> None:
    model, params, state = network(small(widths=(128, 4), norm_groups=1), 0)
    model, (x, y) = WRAPPERS[name](model), batch(3, 1)
    for quantity, make in quantities("auto").items():
        assert_trees_near(
            make(model)(params, state, x, y), quantities("vmap")[quantity](model)(params, state, x, y)
        )


# --------------------------------------------------------------------------- never a silent wrong number


class Mean(nn.Module):
    """Attention across the batch, at its simplest."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return y - y.mean(0, keepdim=True)


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(7, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x.transpose(0, 1))).mean(0))


def refused(module: nn.Module, x: Tensor, message: str, **options: Any) -> None:
    model, params, state = rf.from_module(module.double())
    with pytest.raises(ValueError, match=message):
        ps.norms(model, losses.cross_entropy, train=False, **options)(
            params, state, x, torch.arange(len(x)) % 2
        )


def test_hidden_batch_statistics_are_refused() -> None:
    hidden = nn.BatchNorm2d(4, track_running_stats=False)
    refused(nn.Sequential(nn.Conv2d(3, 4, 3), hidden, *head(196)), images(3, 9, 9), "statistics of the batch")
    plain = nn.BatchNorm2d(4, affine=False, track_running_stats=False)  # no leaf of its own
    refused(nn.Sequential(nn.Conv2d(3, 4, 3), plain, *head(196)), images(3, 9, 9), "statistics of the batch")


def test_coupled_samples_are_refused() -> None:
    refused(Mean(), images(7), "Are samples coupled")


class Kink(nn.Module):
    """A ReLU on the edge, which float32's rounding opens in a batch and shuts for a sample alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(7, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        rounding = 0.0 if y.dtype == torch.float64 else 1e-9 if len(x) > 1 else -1e-9
        return self.head(torch.tanh(y) + torch.relu(y - y.detach() + rounding))


def test_a_relu_that_rounding_opens_is_no_coupling() -> None:
    model, params, state = rf.from_module(Kink())
    x, y = images(7).float(), torch.arange(N)
    assert ps.norms(model, losses.cross_entropy, check=True)(params, state, x, y).shape == (N,)
    model, params, state = rf.from_module(Mean().float())
    with pytest.raises(ValueError, match="Are samples coupled"):
        ps.norms(model, losses.cross_entropy, check=True)(params, state, x, y)


class Flattened(nn.Module):
    """Positions of all samples as one batch, `[N * T, C]`, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(7, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x.flatten(0, 1)))
        return self.head(y.unflatten(0, x.shape[:2]).mean(1))


def test_positions_folded_into_the_batch_are_refused() -> None:
    x = torch.randn(N, 6, 7, generator=generator(0), dtype=torch.float64)
    refused(Flattened(), x, r"linear takes a trainable leaf.*batch dimension in front, or use method='vmap'")


def test_a_lost_batch_dimension_is_refused() -> None:
    x = torch.randn(N, 6, 7, generator=generator(0), dtype=torch.float64)
    refused(SequenceFirst(), x, "batch dimension in front, or use method='vmap'")
    refused(SequenceFirst(), x[:, :N], ".", check=None)  # as many positions as samples: found all the same


def test_an_embedding_that_counts_over_the_batch_is_refused() -> None:
    module = nn.Sequential(nn.Embedding(5, 4, scale_grad_by_freq=True), *head(12))
    refused(module, torch.randint(0, 5, (N, 3), generator=generator(0)), "scale_grad_by_freq")


def test_a_loss_that_broadcasts_over_the_batch_is_refused() -> None:
    model, params, state = rf.from_module(nn.Linear(7, 1).double())
    x, y = images(7), torch.arange(N, dtype=torch.float64)

    def broadcast(logits: Tensor, targets: Tensor) -> Tensor:
        return (logits - targets).square().mean(1)  # [N, 1] - [N] is [N, N]

    with pytest.raises(ValueError, match="not per-sample: the first sample's loss"):
        ps.norms(model, broadcast)(params, state, x, y)


def test_a_call_that_cannot_be_seen_is_refused() -> None:
    def apply(params: Params, state: State, x: Tensor, *, train: bool) -> tuple[Tensor, State]:
        with torch._C.DisableTorchFunction():
            return x @ params["weight"], state

    model = Model(None, lambda generator, **_: ({}, {}), apply)
    params = {"weight": torch.randn(7, CLASSES, generator=generator(1), dtype=torch.float64)}
    with pytest.raises(
        ValueError, match=r"depends on weight in a way that cannot be followed\. .*method='vmap'"
    ):
        ps.norms(model, losses.cross_entropy)(params, {}, images(7), torch.arange(N) % CLASSES)


def test_a_call_without_a_batching_rule_is_named() -> None:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor, weight: Tensor) -> Tensor:
            return x @ weight

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
            x, weight = ctx.saved_tensors
            return g @ weight.T, x.T @ g

    def apply(params: Params, state: State, x: Tensor, *, train: bool) -> tuple[Tensor, State]:
        return Product.apply(x, params["weight"]), state

    model = Model(None, lambda generator, **_: ({}, {}), apply)
    params = {"weight": torch.randn(7, CLASSES, generator=generator(1), dtype=torch.float64)}
    with pytest.raises(ValueError, match="no batching rule"):
        ps.norms(model, losses.cross_entropy)(params, {}, images(7), torch.arange(N) % CLASSES)


def test_the_comparison_is_made_once_or_always_or_never() -> None:
    model, params, state = network(small(), 0)
    x, y = batch(3, 1)
    calls: list[int] = []

    def counting() -> Model:
        def apply(params: Params, state: State, x: Tensor, *, train: bool) -> tuple[Tensor, State]:
            calls.append(len(x))
            return model.apply(params, state, x, train=train)

        return model._replace(apply=apply)

    for check, passes in ((None, [4, 1, 1]), (True, [4, 4, 4]), (False, [1, 1, 1])):
        counted = counting()
        for transform, expected in zip((ps.norms, ps.norms, ps.grads), passes, strict=True):
            calls.clear()  # the batch; then two samples together, and each alone
            transform(counted, losses.cross_entropy, check=check)(params, state, x, y)
            assert len(calls) == expected
        calls.clear()
        ps.norms(counted, losses.smoothed_cross_entropy(0.1), check=check)(params, state, x, y)
        assert len(calls) == (1 if check is False else 4)  # another loss


# --------------------------------------------------------------------------- inputs, targets, bounds


def test_inputs_and_targets_are_trees() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, CLASSES), nn.Linear(4, CLASSES)

    two = Two().double()

    def apply(params: Params, state: State, x: Any, *, train: bool) -> tuple[Tensor, State]:
        a = F.linear(x["a"], params["a"]["weight"], params["a"]["bias"])
        return a * F.linear(x["b"], params["b"]["weight"], params["b"]["bias"]), state

    def loss(logits: Tensor, targets: Any) -> Tensor:
        return targets["weight"] * F.cross_entropy(logits, targets["label"], reduction="none")

    model = Model(None, lambda generator, **_: ({}, {}), apply)
    params = tree.unflatten({name: leaf.detach() for name, leaf in two.named_parameters()})
    x = {"a": images(3), "b": images(4)}
    y = {"label": torch.arange(N) % CLASSES, "weight": torch.rand(N, generator=generator(2)).double()}
    expected = ps.grads(model, loss, method="loop")(params, {}, x, y)
    assert_trees_near(ps.grads(model, loss)(params, {}, x, y), expected)
    assert_trees_near(ps.grads(model, loss, microbatch=3)(params, {}, x, y), expected)
    assert_trees_near(ps.grads(model, loss, method="vmap")(params, {}, x, y), expected)


def test_bounds_by_prefix_clip_each_part() -> None:
    model, params, state = network(small(), 0)
    x, y = batch(3, 1)
    bounds = {"": 0.2, "layer1": 0.1, "layer1.0.conv1": 0.05}
    total, norms = ps.clipped_sum(model, losses.cross_entropy, max_norm=bounds)(params, state, x, y)
    grads = tree.flatten(ps.grads(model, losses.cross_entropy)(params, state, x, y))

    def prefix_of(path: str) -> str:
        return max((p for p in bounds if not p or path == p or path.startswith(f"{p}.")), key=len)

    expected = {}
    for prefix, bound in bounds.items():
        part = {path: g for path, g in grads.items() if prefix_of(path) == prefix}
        norm = torch.stack([g.flatten(1).square().sum(1) for g in part.values()]).sum(0).sqrt()
        factor = (bound / norm).clamp(max=1)
        expected |= {path: torch.einsum("n,n...->...", factor, g) for path, g in part.items()}
    assert_trees_near({path: expected[path] for path in grads}, tree.flatten(total))
    assert_trees_near(norms, ps.norms(model, losses.cross_entropy)(params, state, x, y))


@pytest.mark.parametrize(
    ("bounds", "message"),
    [({"layer1": 1.0}, "no bound for conv1.weight"), ({"": 1.0, "layer9": 1.0}, "'layer9', where no")],
)
def test_bounds_that_do_not_fit_the_network_are_named(bounds: dict[str, float], message: str) -> None:
    model, params, state = network(small(), 0)
    with pytest.raises(ValueError, match=message):
        ps.clipped_sum(model, losses.cross_entropy, max_norm=bounds)(params, state, *batch(3, 1))


def test_dot_is_the_inner_product_with_a_direction() -> None:
    model, params, state = network(small(), 0)
    x, y = batch(3, 1)
    direction = tree.map(
        lambda leaf: torch.randn(leaf.shape, generator=generator(3), dtype=leaf.dtype), params
    )
    grads = ps.grads(model, losses.cross_entropy, method="loop")(params, state, x, y)
    products = tree.map(lambda g, d: (g * d).flatten(1).sum(1), grads, direction)
    expected = torch.stack(tree.leaves(products)).sum(0)
    assert_trees_near(ps.dot(model, losses.cross_entropy)(params, state, x, y, direction), expected)
    only = ps.dot(model, losses.cross_entropy, trainable=lambda path: path.startswith("fc."))
    assert_trees_near(only(params, state, x, y, direction), products["fc"]["weight"] + products["fc"]["bias"])
    none = ps.dot(model, losses.cross_entropy)(params, state, x[:0], y[:0], direction)
    assert torch.equal(none, x.new_zeros(0))


OUR_WRAPPERS: dict[str, Callable[[Model], Model]] = {
    "plain": lambda model: model,
    "flips": rf.train.average_flips,
    "autocast": partial(rf.train.autocast, device_type="cpu", dtype=torch.bfloat16),
    "winograd": rf.winograd.wrap,
    "both": lambda model: rf.winograd.wrap(rf.train.average_flips(model)),
}


def sent(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("name", ["grads", "norms", "clipped_sum", "moments", "sketch", "gram", "dot"])
def test_what_a_transform_returns_can_be_sent_to_another_process(name: str) -> None:
    model, params, state = rf.from_module(nn.Sequential(nn.Flatten(), nn.Linear(27, CLASSES)).double())
    x, y = images(3, 3, 3), torch.arange(N) % CLASSES
    more: dict[str, Any] = {"clipped_sum": {"max_norm": 1.0}, "sketch": {"dim": 4}}.get(name, {})
    arguments = {"gram": ((x, y),), "dot": (x, y, params)}.get(name, (x, y))
    function = getattr(ps, name)(model, losses.smoothed_cross_entropy(0.1), **more)
    expected, actual = (one(params, state, *arguments) for one in (function, sent(function)))
    assert all(map(torch.equal, tree.leaves(actual), tree.leaves(expected)))


@pytest.mark.parametrize("wrapper", OUR_WRAPPERS)
def test_wrapped_networks_can_be_sent_to_another_process(wrapper: str) -> None:
    model = OUR_WRAPPERS[wrapper](rf.resnet20(depths=(1, 1, 1), norm="group"))
    params, state = model.init(torch.Generator().manual_seed(0))
    x, y = images(3, 8, 8).float(), torch.arange(N)
    wanted = {**{name: name for name in dataset.NAMED}, "sketch": ps.sketch_quantity(4, 0, "factorized")}
    function = ps.over_dataset(model, losses.logit(1), wanted)
    expected, actual = (one(params, state, [(x, y), (x, y)]) for one in (function, sent(function)))
    assert all(map(torch.equal, tree.leaves(actual), tree.leaves(expected)))
    evaluate = rf.train.make_eval_step(model, losses.logit(1))
    assert all(map(torch.equal, sent(evaluate)(params, state, x, y), evaluate(params, state, x, y)))


# --------------------------------------------------------------------------- what a check sees

FEW = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3).sin()
LABELS = torch.tensor([0, 1, 2, 0])
SQUARE: Params = {"w": torch.linspace(-1, 2, 9, dtype=torch.float64).reshape(3, 3).cos()}


def centred(params: Params, x: Tensor) -> Tensor:
    return (x - x.mean(0) / 2) @ params["w"]


@pytest.mark.parametrize("first", [FEW[:1], FEW[[0, 0, 0, 0]]], ids=["one-sample", "equal-samples"])
def test_a_first_batch_that_cannot_tell_does_not_end_the_checks(first: Tensor) -> None:
    model = rf.from_function(lambda params, x: centred(params, x))
    ps.norms(model, losses.cross_entropy)(SQUARE, {}, first, torch.zeros(len(first), dtype=torch.int64))
    with pytest.raises(ValueError, match="Are samples coupled"):
        ps.norms(model, losses.cross_entropy)(SQUARE, {}, FEW, LABELS)


def test_what_cannot_tell_samples_apart_is_compared_once_too() -> None:
    calls = 0

    def counting(params: Params, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x @ params["w"]

    norms, made = ps.norms(rf.from_function(counting), losses.cross_entropy), []
    for batch_of in ([0], [0], [0, 0], [0, 1], [2, 3]):
        before = calls
        norms(SQUARE, {}, FEW[batch_of], LABELS[batch_of])
        made.append(calls - before)
    assert made[0] > 1  # with its comparison
    assert made[3] > 1  # the first that tells
    assert made[1] == made[2] == made[4] == 1


def test_dot_refuses_coupled_samples_and_other_directions() -> None:
    model = rf.from_function(lambda params, x: centred(params, x))
    with pytest.raises(ValueError, match="Are samples coupled"):
        ps.dot(model, losses.cross_entropy)(SQUARE, {}, FEW, LABELS, SQUARE)
    products = ps.dot(rf.from_function(lambda params, x: x @ params["w"]), losses.cross_entropy)
    expected = "expected a direction like the trainable parameters, with w of"
    for direction, got in (({"v": torch.ones(3)}, "leaves v"), ({"w": torch.ones(3, 1)}, r"\[3, 1\]")):
        with pytest.raises(ValueError, match=rf"{expected} \[3, 3\]; got {got}"):
            products(SQUARE, {}, FEW, LABELS, direction)


MET_TWICE = {
    "einsum": lambda p, x: torch.einsum("ni,ij,jk->nk", x, p["w"], p["w"]),
    "layer-norm": lambda p, x: F.layer_norm(x @ p["w"], (3,), p["w"][0], p["w"][0]),
    "detached": lambda p, x: F.linear(F.linear(x, p["w"].detach()), p["w"]) + F.linear(x, p["w"].data),
}


@pytest.mark.parametrize("name", MET_TWICE)
def test_a_leaf_twice_in_one_call_or_detached_in_one_is_counted_as_it_is(name: str) -> None:
    model = rf.from_function(MET_TWICE[name])
    fast, slow = (
        ps.grads(model, losses.cross_entropy, method=method, check=False)(SQUARE, {}, FEW, LABELS)
        for method in ("auto", "loop")
    )
    torch.testing.assert_close(fast["w"], slow["w"], rtol=1e-12, atol=1e-13)


def test_gram_of_batches_with_other_numbers_of_views() -> None:
    model = rf.resnet20(norm="group", depths=(1, 1, 1))
    params, state = model.init(generator(0), dtype=torch.float64)
    x = randn(8, 3, 8, 8, seed=1, dtype=torch.float64)
    viewed, plain = (x[:4].reshape(2, 2, 3, 8, 8), torch.tensor([0, 1])), (x[4:], LABELS)
    products = ps.gram(model, losses.cross_entropy)(params, state, viewed, plain)
    gradients = ps.grads(model, losses.cross_entropy)
    a, b = (
        torch.cat([leaf.flatten(1) for leaf in tree.leaves(gradients(params, state, *part))], 1)
        for part in (viewed, plain)
    )
    torch.testing.assert_close(products, a @ b.T, rtol=1e-10, atol=1e-12)
