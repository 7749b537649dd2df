"""Where the time of per-sample norms and clipped sums goes, part by part, as ratios to the plain step.

Parts are differences of runs that share a beginning, round by round: forward; forward and backward without
any weight gradient; the same under interception; with the factors of every leaf; the whole. Contractions are
timed alone, on captured factors. What is left is Python, planning and what parts cost each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from benchmarks.forms.networks import Case
from benchmarks.harness import markdown, measure, report
from benchmarks.harness.options import Compared
from benchmarks.harness.statistics import Ratio, Seconds, ratio
from resnet_func import tree
from resnet_func.calibration import Speeds
from resnet_func.losses import cross_entropy
from resnet_func.per_sample.capture import capture
from resnet_func.per_sample.collect import Seen
from resnet_func.per_sample.layers import contract
from resnet_func.per_sample.layers.factors import Direct, Factors
from resnet_func.per_sample.plan import plan_factors
from resnet_func.per_sample.task import Batch, make_task

Step = Callable[[], Any]
PLAIN, AGAIN, QUANTITIES = "plain", "plain again", ("norms", "clipped_sum")
WHOLE = (PLAIN, AGAIN, *QUANTITIES)
FORWARD, BACKWARD, INTERCEPTED, CAPTURED = "forward", "no weight gradients", "intercepted", "captured"
REST = "the rest: Python, planning"


def run(options: Compared, case: Case, where: dict[str, Any], whole: dict[str, Step], speeds: Speeds) -> None:
    """Measure, print the table, and write the result file.

    Args:
        options: Of the benchmark.
        case: The network and its batch.
        where: From `conditions.capture`.
        whole: The plain step, the same once more, and the quantities, by name.
        speeds: What plans choose by.

    Raises:
        Disagreement: parts come to more than the whole, by more than the noise.
    """
    steps = whole | make_parts(case) | make_contractions(case, speeds)
    seconds = measure.time_steps(
        steps,
        PLAIN,
        options.stopping_rule(options.seconds),
        threads=torch.get_num_threads(),
        turn_seconds=options.turn_seconds,
    )
    shares = split(seconds)
    if not options.quick:
        check_rest(shares, seconds)
    title = f"{case.name}, batch {options.batch}, {options.size} px: share of the plain step"
    name = f"phases-{case.name}-n{options.batch}-{options.size}px"
    result = {"shares": {part: share._asdict() for part, share in shares.items()}, "seconds": seconds}
    table = as_table(f"{title}{options.toy_note}", shares)
    report.publish(options, where, name, result, tables=[table], notes=[speeds.describe()])


class _FirstConvolution(TorchFunctionMode):
    """Keeps the gradient edge of the first convolution's output: a backward pass to it needs no weights."""

    edge: Any = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.edge is None and func is torch.conv2d:
            self.edge = get_gradient_edge(result)
        return result


def make_parts(case: Case) -> dict[str, Step]:
    """The runs whose differences are the parts before contraction."""
    model, state, x, y = case.model, case.state, case.x, case.y
    task = make_task(model, cross_entropy, lambda path: True, case.params, state)
    batch = Batch(x, y, len(x), 1)

    def forward() -> Tensor:
        leaves = tree.map(lambda leaf: leaf.detach().requires_grad_(), case.params)
        return cross_entropy(model.apply(leaves, state, x, train=False)[0], y).mean()

    def backward() -> Any:
        with _FirstConvolution() as first:
            loss = forward()
        return torch.autograd.grad(loss, [first.edge])

    def intercepted() -> None:
        pending = capture(task, batch).pending
        assert pending is not None
        pending.backward.hand_over(_drop)

    return {
        FORWARD: forward,
        BACKWARD: backward,
        INTERCEPTED: intercepted,
        CAPTURED: lambda: capture(task, batch).factors(),
    }


def _drop(index: int, seen: Seen) -> None: ...


def make_contractions(case: Case, speeds: Speeds) -> dict[str, Step]:
    """Of each quantity and kind of leaf, what is done with captured factors."""
    task = make_task(case.model, cross_entropy, lambda path: True, case.params, case.state)
    factors = capture(task, Batch(case.x, case.y, len(case.x), 1)).factors()
    steps: dict[str, Step] = {}
    for quantity in QUANTITIES:
        ways = plan_factors(factors, quantity, speeds=speeds).ways
        kinds: dict[str, list[tuple[Factors, Any]]] = defaultdict(list)
        for path, leaf in factors.items():
            way = ways.get(path, "materialize")
            kind = type(leaf).__name__.removesuffix("Factors").lower()
            name = f"{kind}, {way}" if path in ways else "small leaves"
            kinds[f"{quantity}: {name}"].append((leaf, way))
        for kind, leaves in kinds.items():
            each = contract_norms if quantity == "norms" else contract_clipped
            steps[f"{kind}, {len(leaves)} of them"] = partial(each, leaves)
    return steps


def contract_norms(leaves: list[tuple[Factors, Any]]) -> list[Tensor]:
    """The squared norms of some leaves."""
    return [contract.squared_norms(leaf, way) for leaf, way in leaves]


def contract_clipped(leaves: list[tuple[Factors, Any]]) -> list[Tensor]:
    """Squared norms of some leaves, and their weighted sums."""
    weights, sums = None, []
    kept = [Direct(contract.grads(leaf)) if way == "keep" else leaf for leaf, way in leaves]
    for leaf, (_, way) in zip(kept, leaves, strict=True):
        squares = contract.squared_norms(leaf, way)
        weights = torch.ones_like(squares) if weights is None else weights
        sums.append(contract.weighted_sum(leaf, weights))
    return sums


# --------------------------------------------------------------------------- results


def split(seconds: Seconds) -> dict[str, Ratio]:
    """The share of every part, round by round, with the sums of both quantities."""
    times = {name: np.asarray(of) for name, of in seconds.items()}
    parts = {
        "forward": times[FORWARD],
        "backward without weight gradients": times[BACKWARD] - times[FORWARD],
        "interception": times[INTERCEPTED] - times[BACKWARD],
        "factors of small leaves": times[CAPTURED] - times[INTERCEPTED],
    }
    for quantity in QUANTITIES:
        own = {name: of for name, of in times.items() if name.startswith(f"{quantity}:")}
        parts |= own
        parts[f"{quantity}: {REST}"] = times[quantity] - times[CAPTURED] - sum(own.values())
        parts[quantity] = times[quantity]
    parts[AGAIN] = times[AGAIN]
    return {name: ratio(list(of), seconds[PLAIN]) for name, of in parts.items()}


def check_rest(shares: dict[str, Ratio], seconds: Seconds) -> None:
    """Refuse parts that come to more than the whole.

    Raises:
        Disagreement: the upper end of a remainder's interval is below 0 by more than the baseline's noise.
    """
    again = ratio(seconds[AGAIN], seconds[PLAIN])
    noise = max(again.high - 1, 1 - again.low, 0.02)
    for name, share in shares.items():
        if REST in name and share.high < -noise:
            raise measure.Disagreement(
                f"the parts of {name.partition(':')[0]} come to more than the whole, by {-share.median:.2f} "
                f"plain steps (noise {noise:.2f}): others use the machine. Measure again"
            )


def section(contents: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """The table of RESULTS.md: a row for each part, the columns of every machine."""
    names = list(dict.fromkeys(name for _, content in contents for name in content["shares"]))
    cells = [
        [
            name,
            *(
                markdown.interval(content["shares"][name]) if name in content["shares"] else ""
                for _, content in contents
            ),
        ]
        for name in names
    ]
    return markdown.table(
        ["part", *(f"{machine}: time / plain (95 % interval)" for machine, _ in contents)], cells
    )


def as_table(title: str, shares: dict[str, Ratio]) -> Table:
    table = Table("part", title=title, title_justify="left")
    for header in ("time / plain", "95 % interval"):
        table.add_column(header, justify="right")
    for name, share in shares.items():
        table.add_row(name, f"{share.median:.3f}", f"{share.low:.3f} to {share.high:.3f}")
        if name in QUANTITIES or name == "factors of small leaves":
            table.add_section()
    return table
