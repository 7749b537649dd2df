"""Plans: which way each layer's contraction goes, from shapes and a memory budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table

from resnet_func import tree
from resnet_func.calibration import TYPICAL, Speeds
from resnet_func.per_sample.capture import capture
from resnet_func.per_sample.layers.contract import Way
from resnet_func.per_sample.layers.costs import (
    Layer,
    ghost_bytes,
    ghost_cost,
    ghost_flops,
    kept_cost,
    layers_of,
    materialize_cost,
    materialize_flops,
    weighted_sum_cost,
)
from resnet_func.per_sample.layers.factors import Factors
from resnet_func.per_sample.task import Batch, make_task
from resnet_func.types import Logits, Model, Params, PerSample, State, Trainable

QUANTITIES = ("grads", "norms", "clipped_sum", "gram", "sketch", "moments")

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

    @property
    def cost(self) -> float:
        """Estimated nanoseconds of the way that was chosen."""
        return self.costs[self.way]


@dataclass(frozen=True)
class Plan:
    """A way for every convolution and linear layer; smaller leaves have only one."""

    quantity: str
    input_shape: tuple[int, ...]
    entries: tuple[Entry, ...]
    speeds: Speeds

    @property
    def ways(self) -> dict[str, Way]:
        """The way of each leaf by its dotted path."""
        return {entry.path: entry.way for entry in self.entries}

    def explain(self, console: Console | None = None) -> None:
        """Print the plan as a table: layer, T, D, method, estimated FLOPs, bytes and time; and the speeds."""
        console = console or Console()
        console.print(self.table())
        console.print(self.speeds.describe(), highlight=False)

    def table(self) -> Table:
        """The plan as a rich table."""
        table = Table(title=f"{self.quantity} of a batch {list(self.input_shape)}")
        for header in ("layer", "T", "D", "method", "MFLOP", "MB", "ms"):
            table.add_column(header, justify="left" if header in ("layer", "method") else "right")
        for entry in self.entries:
            sizes = (f"{entry.positions:,}", f"{entry.weights:,}")
            amounts = (f"{entry.flops / 1e6:,.1f}", f"{entry.bytes / 1e6:,.2f}", f"{entry.cost / 1e6:.3f}")
            table.add_row(entry.path, *sizes, entry.way, *amounts)
        total = (
            f"{sum(e.flops for e in self.entries) / 1e6:,.1f}",
            f"{self.peak_bytes / 1e6:,.2f}",
            f"{sum(e.cost for e in self.entries) / 1e6:.3f}",
        )
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
    input_dtype: torch.dtype | None = None,
    speeds: Speeds = TYPICAL,
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
        input_dtype: Of the batch; None is that of the parameters. Tokens are `torch.int64`.
        speeds: What the ways are weighed by; `calibration.measured()` has this machine's.

    Raises:
        ValueError: an unknown quantity, a shape of the wrong rank, no params for a model that draws none, or
            the network does not take such a batch.

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
    x = torch.empty(views * samples, *rest, device="meta", dtype=input_dtype or first.dtype)
    targets = torch.empty(views * samples, device="meta", dtype=torch.float32)
    task = make_task(model, _any_loss, trainable or (lambda path: True), shapes, statistics)
    try:
        captured = capture(task, Batch(x, targets, samples, views))
    except RuntimeError as error:
        raise ValueError(
            f"the network does not take a batch {list(x.shape)} of {x.dtype} ({str(error)[:120]}). Look at "
            "the shape, and pass plan(..., input_dtype=torch.int64) where it takes tokens"
        ) from error
    return plan_factors(captured.factors(), quantity, memory_budget, speeds=speeds, input_shape=shape)


def _as_meta(leaf: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(leaf, device="meta")


def _any_loss(logits: Logits, targets: torch.Tensor) -> PerSample:
    return logits.reshape(len(logits), -1).sum(1)


def plan_factors(
    factors: Mapping[str, Factors],
    quantity: str,
    memory_budget: int | None = None,
    *,
    other: Mapping[str, Factors] | None = None,
    speeds: Speeds = TYPICAL,
    input_shape: tuple[int, ...] = (),
) -> Plan:
    """The plan of what was captured; `other` are the factors of a second batch, of a Gram matrix.

    Under torch.compile it runs while tracing.
    """
    layers = layers_of(factors, other or factors)
    entries = [_choose(layer, quantity, memory_budget, speeds) for layer in layers]
    if quantity == "clipped_sum":
        entries = _keep_what_pays(layers, entries, memory_budget, speeds)
    return Plan(quantity, input_shape, tuple(entries), speeds)


def check_plan(plan: Plan, factors: Mapping[str, Factors]) -> None:
    """Refuse a plan that was made for another network, other images or other trainable leaves."""
    ours = {layer.path: (layer.positions, layer.weights) for layer in layers_of(factors, factors)}
    theirs = {entry.path: (entry.positions, entry.weights) for entry in plan.entries}
    if ours != theirs:
        wrong = [path for path in {**ours, **theirs} if ours.get(path) != theirs.get(path)]
        raise ValueError(
            f"the plan was made for another network or input {list(plan.input_shape)}: {len(wrong)} layers "
            f"differ, {wrong[0]} first. Make it anew with per_sample.plan"
        )


# --------------------------------------------------------------------------- choosing


def _choose(layer: Layer, quantity: str, memory_budget: int | None, speeds: Speeds) -> Entry:
    """The cheaper of the ways that fit the budget; where none does, the smaller."""
    flops = {"materialize": materialize_flops(layer)}
    costs = {"materialize": materialize_cost(layer, speeds)}
    sizes = {"materialize": layer.gradient_bytes}
    if quantity in ("norms", "clipped_sum", "gram") and layer.has_ghost:
        if quantity == "gram":
            flops["materialize"] += 2 * layer.pairs * layer.weights
            costs["materialize"] += 2 * layer.pairs * layer.weights * speeds.matmul_flop
        flops["ghost"] = ghost_flops(layer, quantity)
        costs["ghost"] = ghost_cost(layer, quantity, speeds)
        sizes["ghost"] = ghost_bytes(layer, quantity)
    way: Way = "materialize"
    if "ghost" in costs:
        fits = {way: memory_budget is None or size <= memory_budget for way, size in sizes.items()}
        if fits["ghost"] == fits["materialize"]:
            by = costs if fits["ghost"] else sizes
            way = "ghost" if by["ghost"] < by["materialize"] else "materialize"
        else:
            way = "ghost" if fits["ghost"] else "materialize"
    return Entry(layer.path, layer.positions, layer.weights, way, flops[way], sizes[way], costs)


def _keep_what_pays(
    layers: list[Layer], entries: list[Entry], memory_budget: int | None, speeds: Speeds
) -> list[Entry]:
    """Hold on to gradients, instead of a second weight pass, where that is cheap in memory.

    A kept gradient replaces the layer's captures, so that small layers with many pixels give memory back.
    """
    left = memory_budget
    if left is None:
        left = int(KEPT_SHARE * sum(layer.capture_bytes for layer in layers))
    kept = {}
    extra = {layer.path: layer.gradient_bytes - layer.capture_bytes for layer in layers}
    for layer, entry in sorted(zip(layers, entries, strict=True), key=lambda pair: extra[pair[0].path]):
        keep_cost = materialize_cost(layer, speeds) + kept_cost(layer, speeds)
        costs = {way: cost + weighted_sum_cost(layer, speeds) for way, cost in entry.costs.items()} | {
            "keep": keep_cost
        }
        need = layer.gradient_bytes if memory_budget is not None else extra[layer.path]
        if keep_cost < costs[entry.way] and need <= left:
            left -= need
            flops = materialize_flops(layer) + 2 * layer.n * layer.weights
            kept[layer.path] = Entry(
                layer.path, layer.positions, layer.weights, "keep", flops, layer.gradient_bytes, costs
            )
        else:
            flops = entry.flops + materialize_flops(layer)
            kept[layer.path] = Entry(
                layer.path, layer.positions, layer.weights, entry.way, flops, entry.bytes, costs
            )
    return [kept[layer.path] for layer in layers]
