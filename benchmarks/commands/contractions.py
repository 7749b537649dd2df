"""Every way of every layer's contraction, against what the plan chose among them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from rich.table import Table
from torch.utils.benchmark import Timer

from benchmarks.forms.networks import Case
from benchmarks.harness import markdown, report
from benchmarks.harness.options import Step
from resnet_func import calibration
from resnet_func.calibration import Speeds
from resnet_func.losses import cross_entropy
from resnet_func.per_sample import plan
from resnet_func.per_sample.capture import capture
from resnet_func.per_sample.layers import contract
from resnet_func.per_sample.layers.factors import ConvFactors, Direct, num_samples
from resnet_func.per_sample.task import Batch, make_task

HOPELESS = 20  # times the other way's estimated cost: not tried, and more memory than there is
BY = {"the machine's speeds": "chosen", "constants": "typical"}
WAYS = {"norms": ("ghost", "materialize"), "clipped_sum": ("ghost", "materialize", "keep")}


def run(options: Step, case: Case, where: dict[str, Any], speeds: Speeds) -> None:
    """Measure, print the tables, and write the result file."""
    found, tables = {}, []
    for quantity in WAYS:
        rows = measure(case, quantity, speeds, min_run_time=1e-3 if options.quick else 0.2)
        title = f"{quantity} of {case.name}, batch {options.batch}, {options.size} px, milliseconds"
        tables.append(as_table(f"{title}{options.toy_note}", quantity, rows))
        found[quantity] = rows
    name = f"{case.name}-n{options.batch}-{options.size}px"
    result = {"layers": found, "speeds": speeds.as_numbers()}
    report.publish(options, where, f"layers-{name}", result, tables=tables, notes=[speeds.describe()])


def measure(case: Case, quantity: str, speeds: Speeds, min_run_time: float) -> list[dict[str, Any]]:
    """Milliseconds of all ways of every distinct convolution, and what was chosen by which speeds."""
    model, params, state, x, y = case.model, case.params, case.state, case.x, case.y
    by_speeds = {
        "chosen": plan(model, x.shape, quantity, params=params, state=state, speeds=speeds),
        "typical": plan(model, x.shape, quantity, params=params, state=state, speeds=calibration.TYPICAL),
    }
    entries = {entry.path: entry for entry in by_speeds["chosen"].entries}
    task = make_task(model, cross_entropy, lambda path: path in entries, params, state)
    found = capture(task, Batch(x, y, len(x), 1)).factors()
    done: dict[Any, dict[str, Any]] = {}
    for path, factors in found.items():
        entry = entries[path]
        if not isinstance(factors, ConvFactors):
            continue
        kind = (factors.spec, entry.positions)
        if kind in done:
            done[kind]["times"] += 1
            continue
        done[kind] = {"layer": path, "T": entry.positions, "D": entry.weights, "times": 1}
        done[kind] |= {name: of.ways[path] for name, of in by_speeds.items()}
        for way in WAYS[quantity]:
            hopeless = way not in entry.costs or entry.costs[way] > HOPELESS * min(entry.costs.values())
            call = make_call(quantity, factors, way)
            done[kind][way] = None if hopeless else milliseconds(call, min_run_time)
    return list(done.values())


def make_call(quantity: str, factors: ConvFactors, way: Any) -> Callable[[], Any]:
    """One layer's part of a quantity."""
    if quantity == "norms":
        return lambda: contract.squared_norms(factors, way)
    weights = factors.cotangents.new_ones(num_samples(factors))

    def clipped() -> Any:
        kept = Direct(contract.grads(factors)) if way == "keep" else factors
        return contract.squared_norms(kept, way), contract.weighted_sum(kept, weights)

    return clipped


def milliseconds(call: Callable[[], Any], min_run_time: float) -> float:
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=min_run_time).median * 1e3


def regret(rows: Iterable[dict[str, Any]], quantity: str, by: str) -> float:
    """Time of what was chosen over that of the best, of all layers together."""
    chosen, best = 0.0, 0.0
    for row in rows:
        tried = [row[way] for way in WAYS[quantity] if row[way] is not None]
        chosen += row["times"] * (row[row[by]] if row[row[by]] is not None else max(tried))
        best += row["times"] * min(tried)
    return chosen / best


def as_table(title: str, quantity: str, rows: list[dict[str, Any]]) -> Table:
    table = Table("layer", title=title, title_justify="left")
    for header in ("times", "T", "D", *WAYS[quantity], "chosen", "chosen / best", "typical / best"):
        table.add_column(header, justify="right")
    for row in rows:
        times = ["-" if row[way] is None else f"{row[way]:.2f}" for way in WAYS[quantity]]
        table.add_row(
            row["layer"],
            str(row["times"]),
            f"{row['T']:,}",
            f"{row['D']:,}",
            *times,
            row["chosen"],
            *(f"{regret([row], quantity, by):.2f}" for by in ("chosen", "typical")),
        )
    table.add_section()
    blank = [""] * (4 + len(WAYS[quantity]))
    table.add_row("all", *blank, *(f"{regret(rows, quantity, by):.3f}" for by in ("chosen", "typical")))
    return table


def section(contents: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """The table of RESULTS.md: the time of what was chosen over that of the best, of all layers together."""
    heads, rows = ["machine", "speeds"], []
    for machine, content in contents:
        found = {
            f"{q}, by {by}": regret(of, q, key)
            for q, of in content["layers"].items()
            for by, key in BY.items()
        }
        heads = [*heads[:2], *(f"{name}: chosen / best" for name in found)]
        rows.append(
            [machine, Speeds(**content["speeds"]).describe(), *(f"{value:.3f}" for value in found.values())]
        )
    return markdown.table(heads, rows)
