"""Plans: which way each layer's contraction goes, from shapes and a memory budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from resnet_func.models.config import ResNetConfig
from resnet_func.models.layers import Conv, Linear
from resnet_func.per_sample.capture import Trainable, output_sizes, trained_specs
from resnet_func.per_sample.contract import Way
from resnet_func.types import Model

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
) -> Plan:
    """Choose, layer by layer, how to contract; pass the result to a transform as `method=`.

    Args:
        model: A model built from a config.
        input_shape: `[N, C, H, W]`, or `[N, views, C, H, W]`.
        quantity: "grads", "norms", "clipped_sum", "gram", "sketch" or "moments".
        memory_budget: Bytes that the contractions may take beyond the captures; None means what pays. A plan
            goes as low as it can where even that does not fit: use `microbatch=` then.
        trainable: Predicate on a leaf's dotted path; None means every leaf.

    Raises:
        ValueError: an unknown quantity, a shape of the wrong rank, or a model without a config.
    """
    if model.config is None:
        raise ValueError("a plan needs a model built from a config; for a module use method='vmap'")
    if quantity not in QUANTITIES:
        raise ValueError(f"quantity must be one of {', '.join(QUANTITIES)}; got {quantity!r}")
    shape = tuple(input_shape)
    if len(shape) not in (4, 5):
        raise ValueError(f"expected an input shape [N, C, H, W] or [N, views, C, H, W]; got {list(shape)}")
    shape = shape if len(shape) == 5 else (shape[0], 1, *shape[1:])
    return plan_layers(model.config, shape, quantity, trainable or (lambda path: True), 4, memory_budget)


def plan_layers(
    config: ResNetConfig,
    shape: tuple[int, ...],
    quantity: str,
    trainable: Trainable,
    element_size: int,
    memory_budget: int | None = None,
) -> Plan:
    """`plan` for a checked shape `(N, views, C, H, W)`; under torch.compile it runs while tracing."""
    n, views, _, height, width = shape
    layers = []
    sizes = output_sizes(config, height, width)
    for path, (spec, names) in trained_specs(config, trainable).items():
        if isinstance(spec, Conv | Linear) and "weight" in names:
            outputs = sizes.get(path, (1, 1))
            layers.append(_Layer(f"{path}.weight", spec, n, views, outputs, element_size))
    entries = [_choose(layer, quantity, memory_budget) for layer in layers]
    if quantity == "clipped_sum":
        entries = _keep_what_pays(layers, entries, memory_budget)
    return Plan(quantity, shape, tuple(entries))


# --------------------------------------------------------------------------- what each way costs


@dataclass(frozen=True)
class _Layer:
    path: str
    spec: Conv | Linear
    n: int
    views: int
    outputs: tuple[int, int]
    element_size: int

    @property
    def positions(self) -> int:
        return self.views * self.outputs[0] * self.outputs[1]

    @property
    def pixels(self) -> int:
        """Input pixels that a ghost norm pairs, over all views, to within the last stride."""
        stride = self.spec.stride if isinstance(self.spec, Conv) and self.spec.kernel > 1 else 1
        return self.positions * stride * stride

    @property
    def weights(self) -> int:
        if isinstance(self.spec, Linear):
            return self.spec.c_in * self.spec.c_out
        c_out, c_in, height, width = self.spec.weight_shape
        return c_out * c_in * height * width

    @property
    def gradient_bytes(self) -> int:
        return self.n * self.weights * self.element_size

    @property
    def capture_bytes(self) -> int:
        elements = self.pixels * self.spec.c_in + self.positions * self.spec.c_out
        return self.n * elements * self.element_size


def _materialize_flops(layer: _Layer) -> int:
    return 2 * layer.n * layer.positions * layer.weights


def _materialize_cost(layer: _Layer) -> float:
    return _weight_pass_cost(layer) + layer.gradient_bytes * NS_PER_GRADIENT_BYTE


def _weight_pass_cost(layer: _Layer) -> float:
    return _materialize_flops(layer) * NS_PER_CONV_FLOP + layer.capture_bytes * NS_PER_CAPTURED_BYTE


def _ghost_pairs(layer: _Layer, quantity: str) -> int:
    return layer.n**2 if quantity == "gram" else layer.n


def _ghost_flops(layer: _Layer, quantity: str) -> int:
    grams = layer.pixels**2 * layer.spec.c_in + layer.positions**2 * layer.spec.c_out
    return 2 * _ghost_pairs(layer, quantity) * grams


def _ghost_bytes(layer: _Layer, quantity: str) -> int:
    groups = layer.spec.groups if isinstance(layer.spec, Conv) else 1
    elements = layer.pixels**2 + 2 * layer.positions**2
    return _ghost_pairs(layer, quantity) * groups * elements * max(layer.element_size, 4)


def _ghost_cost(layer: _Layer, quantity: str) -> float:
    kernel = layer.spec.kernel if isinstance(layer.spec, Conv) else 1
    groups = layer.spec.groups if isinstance(layer.spec, Conv) else 1
    products = layer.pixels**2 + layer.positions**2 * 2 * kernel
    products *= _ghost_pairs(layer, quantity) * groups * max(layer.element_size, 4)
    traffic = products * NS_PER_PIXEL_PRODUCT_BYTE + layer.capture_bytes * NS_PER_CAPTURED_BYTE
    return _ghost_flops(layer, quantity) * NS_PER_MATMUL_FLOP + traffic


def _choose(layer: _Layer, quantity: str, memory_budget: int | None) -> Entry:
    """The cheaper of the ways that fit the budget; where none does, the smaller."""
    flops = {"materialize": _materialize_flops(layer)}
    costs = {"materialize": _materialize_cost(layer)}
    sizes = {"materialize": layer.gradient_bytes}
    standardized = isinstance(layer.spec, Conv) and layer.spec.standardize
    if quantity in ("norms", "clipped_sum", "gram") and not standardized:
        if quantity == "gram":
            flops["materialize"] += 2 * layer.n**2 * layer.weights
            costs["materialize"] += 2 * layer.n**2 * layer.weights * NS_PER_MATMUL_FLOP
        flops["ghost"] = _ghost_flops(layer, quantity)
        costs["ghost"] = _ghost_cost(layer, quantity)
        sizes["ghost"] = _ghost_bytes(layer, quantity)
    fitting = [way for way in costs if memory_budget is None or sizes[way] <= memory_budget]
    way: Way = min(fitting, key=lambda w: costs[w]) if fitting else min(sizes, key=lambda w: sizes[w])  # type: ignore[assignment]
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
