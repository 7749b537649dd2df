"""Plans: which way each layer's contraction goes, from shapes and a memory budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from rich.console import Console
from rich.table import Table

from resnet_func import tree
from resnet_func.per_sample.capture import Batch, capture, make_task
from resnet_func.per_sample.contract import Way
from resnet_func.per_sample.factors import (
    ConvFactors,
    Derived,
    Factors,
    LinearFactors,
    has_ghost,
    num_samples,
)
from resnet_func.types import Logits, Model, Params, PerSample, State, Trainable

QUANTITIES = ("grads", "norms", "clipped_sum", "gram", "sketch", "moments")

# Costs in nanoseconds, fitted on one Zen 3 core (`python -m benchmarks per-sample --layers` shows how well);
# what carries over to other machines is how they compare. A ghost norm reads its pixel products once per
# row of the kernel, and once per column.
NS_PER_CONV_FLOP = 0.017
NS_PER_MATMUL_FLOP = 0.0125
NS_PER_GRADIENT_BYTE = 0.4
NS_PER_PIXEL_PRODUCT_BYTE = 0.25
NS_PER_KEPT_BYTE = 0.06
NS_PER_CAPTURED_BYTE = 0.05
# the part of what the captures take that `clipped_sum` may add in kept gradients, if no budget is given
KEPT_SHARE = 0.25


@dataclass(frozen=True)
class Entry:
    """One layer of a plan.

    Args:
        path: The leaf's dotted path.
        positions: T, output pixels over all views of a sample.
        weights: D, entries of the weight.
        way: What the plan chose.
        flops: Floating-point operations of the contraction for the whole batch.
        bytes: Memory it takes for a while, or to the end of the step where `way` is "keep".
        costs: Estimated nanoseconds of every way there was.
    """

    path: str
    positions: int
    weights: int
    way: Way
    flops: int
    bytes: int
    costs: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A way for every convolution and linear layer; smaller leaves have only one."""

    quantity: str
    input_shape: tuple[int, ...]
    entries: tuple[Entry, ...]

    @property
    def ways(self) -> dict[str, Way]:
        """The way of each leaf by its dotted path."""
        return {entry.path: entry.way for entry in self.entries}

    def explain(self, console: Console | None = None) -> None:
        """Print the plan as a table: layer, T, D, method, estimated FLOPs and bytes."""
        (console or Console()).print(self.table())

    def table(self) -> Table:
        """The plan as a rich table."""
        table = Table(title=f"{self.quantity} of a batch {list(self.input_shape)}")
        for header in ("layer", "T", "D", "method", "MFLOP", "MB"):
            table.add_column(header, justify="left" if header in ("layer", "method") else "right")
        for entry in self.entries:
            sizes = (f"{entry.positions:,}", f"{entry.weights:,}")
            amounts = (f"{entry.flops / 1e6:,.1f}", f"{entry.bytes / 1e6:,.2f}")
            table.add_row(entry.path, *sizes, entry.way, *amounts)
        total = (f"{sum(e.flops for e in self.entries) / 1e6:,.1f}", f"{self.peak_bytes / 1e6:,.2f}")
        table.add_section()
        table.add_row("all (bytes at most)", "", f"{sum(e.weights for e in self.entries):,}", "", *total)
        return table

    @property
    def peak_bytes(self) -> int:
        """The most memory the contractions take at once, beyond the captures."""
        kept = sum(entry.bytes for entry in self.entries if entry.way == "keep")
        return kept + max((entry.bytes for entry in self.entries if entry.way != "keep"), default=0)


def plan(
    model: Model,
    input_shape: Sequence[int],
    quantity: str,
    memory_budget: int | None = None,
    *,
    trainable: Trainable | None = None,
    params: Params | None = None,
    state: State | None = None,
) -> Plan:
    """Choose, layer by layer, how to contract; pass the result to a transform as `method=`.

    The network runs once on the meta device, where tensors have shapes and no values.

    Args:
        model: Any network.
        input_shape: Of a batch, `[N, ...]`; of a network built from a config `[N, C, H, W]`, or
            `[N, views, C, H, W]`.
        quantity: "grads", "norms", "clipped_sum", "gram", "sketch" or "moments".
        memory_budget: Bytes that the contractions may take beyond the captures; None means what pays. A plan
            goes as low as it can where even that does not fit: use `microbatch=` then.
        trainable: Predicate on a leaf's dotted path; None means every leaf.
        params, state: Of a network that cannot draw its own (`from_module`); only their shapes are read.

    Raises:
        ValueError: an unknown quantity, a shape of the wrong rank, or no params for a model that draws none.

    >>> import resnet_func as rf
    >>> plan = rf.per_sample.plan(rf.resnet20(norm="group"), (64, 3, 32, 32), "norms")
    >>> plan.ways["layer3.2.conv2.weight"]
    'ghost'
    """
    if quantity not in QUANTITIES:
        raise ValueError(f"quantity must be one of {', '.join(QUANTITIES)}; got {quantity!r}")
    shape, views = tuple(input_shape), 1
    if model.config is not None:
        if len(shape) not in (4, 5):
            raise ValueError(
                f"expected an input shape [N, C, H, W] or [N, views, C, H, W]; got {list(shape)}"
            )
        views = shape[1] if len(shape) == 5 else 1
    samples, rest = shape[0], shape[2:] if views > 1 or (len(shape) == 5 and model.config) else shape[1:]
    if params is None:
        try:
            params, state = model.init(torch.Generator(), device="meta")
        except NotImplementedError as error:
            raise ValueError("this model draws no parameters; pass plan(..., params=, state=)") from error
    shapes, statistics = tree.map(_as_meta, params), tree.map(_as_meta, state or {})
    first = next(leaf for leaf in tree.leaves(shapes) if leaf.is_floating_point())
    x = torch.empty(views * samples, *rest, device="meta", dtype=first.dtype)
    targets = torch.empty(views * samples, device="meta", dtype=torch.float32)
    task = make_task(model, _any_loss, trainable or (lambda path: True), shapes, statistics)
    captured = capture(task, Batch(x, targets, samples, views))
    return plan_factors(captured.factors, quantity, memory_budget, input_shape=shape)


def _as_meta(leaf: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(leaf, device="meta")


def _any_loss(logits: Logits, targets: torch.Tensor) -> PerSample:
    return logits.flatten(1).sum(1)


def plan_factors(
    factors: Mapping[str, Factors],
    quantity: str,
    memory_budget: int | None = None,
    *,
    other: Mapping[str, Factors] | None = None,
    input_shape: tuple[int, ...] = (),
) -> Plan:
    """The plan of what was captured; `other` are the factors of a second batch, of a Gram matrix.

    Under torch.compile it runs while tracing.
    """
    layers = _layers(factors, other or factors)
    entries = [_choose(layer, quantity, memory_budget) for layer in layers]
    if quantity == "clipped_sum":
        entries = _keep_what_pays(layers, entries, memory_budget)
    return Plan(quantity, input_shape, tuple(entries))


def check_plan(plan: Plan, factors: Mapping[str, Factors]) -> None:
    """Refuse a plan that was made for another network, other images or other trainable leaves."""
    ours = {layer.path: (layer.positions, layer.weights) for layer in _layers(factors, factors)}
    theirs = {entry.path: (entry.positions, entry.weights) for entry in plan.entries}
    if ours != theirs:
        wrong = [path for path in {**ours, **theirs} if ours.get(path) != theirs.get(path)]
        raise ValueError(
            f"the plan was made for another network or input {list(plan.input_shape)}: {len(wrong)} layers "
            f"differ, {wrong[0]} first. Make it anew with per_sample.plan"
        )


# --------------------------------------------------------------------------- what each way costs


@dataclass(frozen=True)
class _Layer:
    """The sizes of a convolution or linear layer; `pairs` of samples that a ghost Gram matrix takes."""

    path: str
    n: int
    pairs: int
    positions: int
    pixels: int
    weights: int
    c_in: int
    c_out: int
    groups: int
    kernel: int
    element_size: int
    has_ghost: bool

    @property
    def gradient_bytes(self) -> int:
        return self.n * self.weights * self.element_size

    @property
    def capture_bytes(self) -> int:
        elements = self.pixels * self.c_in + self.positions * self.c_out
        return self.n * elements * self.element_size


def _layers(factors: Mapping[str, Factors], other: Mapping[str, Factors]) -> list[_Layer]:
    layers = []
    for path, leaf in factors.items():
        inner = leaf.factors if isinstance(leaf, Derived) else leaf
        if isinstance(inner, ConvFactors | LinearFactors):
            pairs = _static(num_samples(leaf)) * _static(num_samples(other[path]))
            layers.append(_layer(path, inner, pairs, ghost=has_ghost(leaf)))
    return layers


def _layer(path: str, factors: ConvFactors | LinearFactors, pairs: int, *, ghost: bool) -> _Layer:
    n, size = _static(num_samples(factors)), factors.cotangents.element_size()
    if isinstance(factors, LinearFactors):
        c_out, c_in = factors.weight.shape
        return _Layer(
            path, n, pairs, factors.views, factors.views, c_in * c_out, c_in, c_out, 1, 1, size, ghost
        )
    spec = factors.spec
    positions = factors.views * prod([_static(side) for side in factors.cotangents.shape[2:]])
    pixels = factors.views * prod([_static(side) for side in factors.inputs.shape[2:]])
    return _Layer(
        path,
        n,
        pairs,
        positions,
        positions if spec.is_pointwise else pixels,
        prod(spec.weight_shape),
        spec.c_in,
        spec.c_out,
        spec.groups,
        spec.kernel[0],
        size,
        ghost,
    )


def _static(size: int) -> int:
    """A size as a number: a compiler that has made a symbol of it compiles for this size."""
    return len(range(size))


def _materialize_flops(layer: _Layer) -> int:
    return 2 * layer.n * layer.positions * layer.weights


def _materialize_cost(layer: _Layer) -> float:
    return _weight_pass_cost(layer) + layer.gradient_bytes * NS_PER_GRADIENT_BYTE


def _weight_pass_cost(layer: _Layer) -> float:
    return _materialize_flops(layer) * NS_PER_CONV_FLOP + layer.capture_bytes * NS_PER_CAPTURED_BYTE


def _ghost_pairs(layer: _Layer, quantity: str) -> int:
    return layer.pairs if quantity == "gram" else layer.n


def _ghost_flops(layer: _Layer, quantity: str) -> int:
    grams = layer.pixels**2 * layer.c_in + layer.positions**2 * layer.c_out
    return 2 * _ghost_pairs(layer, quantity) * grams


def _ghost_bytes(layer: _Layer, quantity: str) -> int:
    groups = layer.groups
    elements = layer.pixels**2 + 2 * layer.positions**2
    return _ghost_pairs(layer, quantity) * groups * elements * max(layer.element_size, 4)


def _ghost_cost(layer: _Layer, quantity: str) -> float:
    kernel = layer.kernel
    groups = layer.groups
    products = layer.pixels**2 + layer.positions**2 * 2 * kernel
    products *= _ghost_pairs(layer, quantity) * groups * max(layer.element_size, 4)
    traffic = products * NS_PER_PIXEL_PRODUCT_BYTE + layer.capture_bytes * NS_PER_CAPTURED_BYTE
    return _ghost_flops(layer, quantity) * NS_PER_MATMUL_FLOP + traffic


def _choose(layer: _Layer, quantity: str, memory_budget: int | None) -> Entry:
    """The cheaper of the ways that fit the budget; where none does, the smaller."""
    flops = {"materialize": _materialize_flops(layer)}
    costs = {"materialize": _materialize_cost(layer)}
    sizes = {"materialize": layer.gradient_bytes}
    if quantity in ("norms", "clipped_sum", "gram") and layer.has_ghost:
        if quantity == "gram":
            flops["materialize"] += 2 * layer.pairs * layer.weights
            costs["materialize"] += 2 * layer.pairs * layer.weights * NS_PER_MATMUL_FLOP
        flops["ghost"] = _ghost_flops(layer, quantity)
        costs["ghost"] = _ghost_cost(layer, quantity)
        sizes["ghost"] = _ghost_bytes(layer, quantity)
    way: Way = "materialize"
    if "ghost" in costs:
        fits = {way: memory_budget is None or size <= memory_budget for way, size in sizes.items()}
        if fits["ghost"] == fits["materialize"]:
            by = costs if fits["ghost"] else sizes
            way = "ghost" if by["ghost"] < by["materialize"] else "materialize"
        else:
            way = "ghost" if fits["ghost"] else "materialize"
    return Entry(layer.path, layer.positions, layer.weights, way, flops[way], sizes[way], costs)


def _keep_what_pays(layers: list[_Layer], entries: list[Entry], memory_budget: int | None) -> list[Entry]:
    """Hold on to gradients, instead of a second weight pass, where that is cheap in memory.

    A kept gradient replaces the layer's captures, so that small layers with many pixels give memory back.
    """
    left = memory_budget
    if left is None:
        left = int(KEPT_SHARE * sum(layer.capture_bytes for layer in layers))
    kept = {}
    extra = {layer.path: layer.gradient_bytes - layer.capture_bytes for layer in layers}
    for layer, entry in sorted(zip(layers, entries, strict=True), key=lambda pair: extra[pair[0].path]):
        keep_cost = _materialize_cost(layer) + layer.gradient_bytes * NS_PER_KEPT_BYTE
        costs = {way: cost + _weight_pass_cost(layer) for way, cost in entry.costs.items()} | {
            "keep": keep_cost
        }
        need = layer.gradient_bytes if memory_budget is not None else extra[layer.path]
        if keep_cost < costs[entry.way] and need <= left:
            left -= need
            flops = _materialize_flops(layer) + 2 * layer.n * layer.weights
            kept[layer.path] = Entry(
                layer.path, layer.positions, layer.weights, "keep", flops, layer.gradient_bytes, costs
            )
        else:
            flops = entry.flops + _materialize_flops(layer)
            kept[layer.path] = Entry(
                layer.path, layer.positions, layer.weights, entry.way, flops, entry.bytes, costs
            )
    return [kept[layer.path] for layer in layers]
