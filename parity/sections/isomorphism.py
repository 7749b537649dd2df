"""Whether two traced steps are one graph: the same operations on the same inputs give the same outputs.

From every output, matched by name, both graphs are walked at once. Two nodes match when their operations do,
and every argument in its place: tensors as matching nodes, inputs by name, sizes as expressions in N, H, W,
all else as written. The match is one to one on the nodes that some output needs (a value computed once on one
side and twice on the other is a difference); nodes that none needs do not count. What matched also has the
same dtype, shape and strides. `bare` and `Side.commutes` are all that is forgiven.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, NoReturn

import sympy
import torch
from torch import Tensor
from torch.fx import Node, map_arg
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

aten: Any = torch.ops.aten
ALL = torch.iinfo(torch.int64).max  # the end of `x[:]`


@dataclass(frozen=True)
class Trace:
    """A step as a graph without mutations.

    Args:
        inputs: The names of the placeholders.
        outputs: The nodes of the results, by name.
        images: The example's N, H and W.
        symbols: The trace's own symbols, and N, H and W for them.
        guards: What the trace took to be true of N, H and W; it holds where all of them are.
    """

    inputs: dict[Node, str]
    outputs: dict[str, Node]
    images: tuple[int, int, int]
    symbols: dict[Any, sympy.Symbol]
    guards: frozenset[Any]


def assert_isomorphic(got: Trace, want: Trace) -> str:
    """The figure: nodes, sums of gradients with their terms swapped, and the sizes for which it holds.

    Raises:
        AssertionError: they differ. It names the output walked from, the first two nodes that differ, what of
            them does, and the nearest parameter.
    """
    walk = Walk(Side(got), Side(want))
    walk.everything()
    nodes = sum(node.op == "call_function" for node in walk.match)
    swapped = f" (sums of gradients swapped: {walk.swapped})" if walk.swapped else ""
    return f"isomorphic: {nodes} nodes{swapped}, {extent(got, want)}"


def bare(node: Node) -> Node:
    """The node whose value this one passes on, to the bit."""
    while _passes_on(node):
        source = node.args[0]
        assert isinstance(source, Node)
        node = source
    return node


def _passes_on(node: Node) -> bool:
    # Nothing is mutated, so it makes no difference whether two names share memory.
    if node.target in (aten.alias.default, aten.detach.default):
        return True
    # A copy has the same bits and, where no memory format is asked for, the same strides.
    if node.target is aten.clone.default:
        return not node.kwargs
    # All of a dimension, `x[:]`; and its gradient, copied over all of a tensor of zeros.
    if node.target is aten.slice.Tensor:
        return node.args[2:] in ((0, ALL), (0, ALL, 1))
    return node.target is aten.slice_backward.default and node.args[3:] == (0, ALL, 1)


class Side:
    """A trace, and what the walk asks of its nodes."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.backward: set[Node] = set()  # nodes that depend on the cotangent
        self.digests: dict[Node, int] = {}  # equal where equal things are computed, but for terms swapped
        for node in next(iter(trace.inputs)).graph.nodes:
            if trace.inputs.get(node) == "cotangent" or not self.backward.isdisjoint(node.all_input_nodes):
                self.backward.add(node)
            terms = {path: self.describe_argument(value) for path, value in self.arguments(node).items()}
            order = sorted(terms.values()) if self.commutes(node) else terms.items()
            self.digests[node] = hash((self.operation(node), *order))

    def operation(self, node: Node) -> str:
        return self.trace.inputs.get(node, str(node.target))

    def describe_argument(self, argument: Any) -> str:
        return f"#{self.digests[argument]}" if isinstance(argument, Node) else repr(argument)

    def commutes(self, node: Node) -> bool:
        # Only where autograd sums gradients, in an order that hangs on which branch ran first. IEEE addition
        # commutes to the bit (save which of two NaNs comes out). Sums of the forward pass keep their order.
        return node.target is aten.add.Tensor and node in self.backward and len(node.all_input_nodes) == 2

    def arguments(self, node: Node) -> dict[str, Any]:
        """Arguments by position or keyword, items of lists one by one; tensors as bare nodes."""
        found: dict[str, Any] = {}

        def visit(path: str, value: Any) -> None:
            if isinstance(value, (list, tuple)):
                found[path] = f"{len(value)} items"
                for index, item in enumerate(value):
                    visit(f"{path}.{index}", item)
            elif isinstance(value, Node):
                size = self.size(value.meta.get("val"))
                found[path] = bare(value) if size is None else size
            else:
                found[path] = value

        for key, value in {**dict(enumerate(node.args)), **node.kwargs}.items():
            visit(str(key), value)
        return found

    def size(self, value: Any) -> sympy.Basic | None:
        """A symbolic number in terms of N, H and W; None for all else."""
        symbolic = isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))
        return value.node.expr.xreplace(self.trace.symbols) if symbolic else None

    def layout(self, node: Node) -> str:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):  # several results: the layout of each is compared where it is used
            return ""
        shape, strides = (
            [self.size(size) or size for size in sizes] for sizes in (value.shape, value.stride())
        )
        return f"{value.dtype}{shape} with strides {strides}"

    def describe(self, node: Node) -> str:
        """`convolution.default(relu_3, layer3.0.conv1.weight, None, ...)`."""
        if node in self.trace.inputs:
            return self.trace.inputs[node]

        def name(source: Node) -> Any:
            return self.size(source.meta.get("val")) or self.trace.inputs.get(bare(source)) or bare(source)

        arguments = [*map_arg(node.args, name), *map_arg(node.kwargs, name).items()]
        return f"{getattr(node.target, '__name__', node.target)}({', '.join(map(str, arguments))})"

    def nearest(self, node: Node) -> str:
        """The name of the parameter or buffer in the fewest steps upstream."""
        queue, seen = deque([node]), {node}
        while queue:
            name = self.trace.inputs.get(queue[0], "x")
            if name not in ("x", "cotangent"):
                return name
            sources = [bare(source) for source in queue.popleft().all_input_nodes]
            queue.extend(source for source in sources if source not in seen)
            seen.update(sources)
        return "no parameter"


class Walk:
    """Both graphs at once, from their outputs up to their inputs."""

    def __init__(self, got: Side, want: Side) -> None:
        self.got, self.want = got, want
        self.match: dict[Node, Node] = {}  # one to one: `back` is its inverse
        self.back: dict[Node, Node] = {}
        self.swapped = 0

    def everything(self) -> None:
        got, want = self.got.trace.outputs, self.want.trace.outputs
        differing = sorted(got.keys() ^ want.keys())
        assert not differing, f"only one side returns {', '.join(differing)}"
        for name in sorted(want, key=lambda name: name.startswith("gradient")):  # the forward pass first
            self.from_output(name)
        for a, b in self.match.items():
            ours, theirs = self.got.layout(a), self.want.layout(b)
            if ours != theirs:
                self.fail("results", a, b, f"laid out as {ours} and {theirs}")

    def from_output(self, name: str) -> None:
        stack = [(bare(self.got.trace.outputs[name]), bare(self.want.trace.outputs[name]))]
        while stack:
            a, b = stack.pop()
            if a not in self.match and b not in self.back:
                self.match[a], self.back[b] = b, a
                stack.extend(reversed(self.sources(a, b, name)))
            elif self.match.get(a) is not b:
                self.fail(name, a, b, "one side computes once what the other computes twice")

    def sources(self, a: Node, b: Node, output: str) -> list[tuple[Node, Node]]:
        """The tensors that two nodes take, in pairs, where all else about the two agrees."""
        if a.op != b.op or self.got.operation(a) != self.want.operation(b):
            self.fail(output, a, b, "the operations differ")
        if a.op not in ("placeholder", "call_function") or _impure(a):
            self.fail(output, a, b, "the operation is no function of its arguments")
        ours, theirs = self.got.arguments(a), self.want.arguments(b)
        if self.got.commutes(a) and self._crossed(ours, theirs):
            ours["0"], ours["1"] = ours["1"], ours["0"]
            self.swapped += 1
        if ours.keys() != theirs.keys():
            self.fail(output, a, b, "they have different arguments")
        pairs = []
        for path, one in ours.items():
            other = theirs[path]
            if isinstance(one, Node) and isinstance(other, Node):
                pairs.append((one, other))
            elif repr(one) != repr(other):  # repr tells 1 from 1.0 and from True
                self.fail(output, a, b, f"argument {path} is {one} and {other}")
        return pairs

    def _crossed(self, ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
        a, b = (self.got.describe_argument(ours[path]) for path in "01")
        c, d = (self.want.describe_argument(theirs[path]) for path in "01")
        return (a, b) != (c, d) and (a, b) == (d, c)

    def fail(self, output: str, a: Node, b: Node, why: str) -> NoReturn:
        near = " and ".join(dict.fromkeys((self.got.nearest(a), self.want.nearest(b))))
        raise AssertionError(
            f"{output}, near {near}: {why}: {self.got.describe(a)} against {self.want.describe(b)}"
        )


def _impure(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)  # getitem has none
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return random or (schema is not None and schema.is_mutable)


def extent(got: Trace, want: Trace) -> str:
    """The sizes for which every guard of both traces holds, by interval arithmetic: "N >= 2, H, W >= 33".

    One range for both H and W, the widest around the example's longer side; the guards may hold elsewhere.
    """
    guards, side = got.guards | want.guards, max(want.images[1:])

    def hold(low: Any, high: Any) -> bool:
        ranges = {"N": (2, int_oo), "H": (low, high), "W": (low, high)}
        bounds = {symbol: ValueRanges(*ranges[symbol.name]) for symbol in want.symbols.values()}
        return all(bound_sympy(guard, bounds).lower is sympy.true for guard in guards)

    assert hold(side, side), f"the traces do not hold for every N: {sorted(map(str, guards))}"
    high = next(high for high in (int_oo, *range(2 * side, side - 1, -1)) if hold(side, high))
    low = next(low for low in range(2, side + 1) if hold(low, high))
    n = "N >= 2" if want.images[0] > 1 else "N = 1"
    sizes = f"{n}, H, W >= {low}" if high == int_oo else f"{n}, H, W from {low} to {high}"
    return sizes if got.guards == want.guards else f"{sizes} (where both traces hold)"
