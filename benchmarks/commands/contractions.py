"""The two ways of every layer's norm, ghost and materialised, against what the plan chose between them."""

from __future__ import annotations

from typing import Any

import torch
from rich.table import Table
from torch.utils.benchmark import Timer

from benchmarks.forms.networks import Case
from benchmarks.harness import report
from benchmarks.harness.options import Step
from resnet_func.losses import cross_entropy
from resnet_func.per_sample import contract, plan
from resnet_func.per_sample.capture import Batch, capture, make_task
from resnet_func.per_sample.factors import ConvFactors

HOPELESS = 20  # times the other way's estimated cost: not tried, and more memory than there is
WAYS = ("ghost", "materialize")


def run(options: Step, case: Case, where: dict[str, Any]) -> None:
    """Measure, print the table, and write the result file."""
    rows = measure(case, min_run_time=1e-3 if options.quick else 0.3)
    name = f"{case.name}-n{options.batch}-{options.size}px"
    title = f"norms of {case.name}, batch {options.batch}, {options.size} px, milliseconds{options.toy_note}"
    report.publish(options, where, f"layers-{name}", {"layers": rows}, tables=[as_table(title, rows)])


def measure(case: Case, min_run_time: float) -> list[dict[str, Any]]:
    """Milliseconds of both ways of every distinct convolution's norm, and what the plan chose."""
    model, params, state, x, y = case.model, case.params, case.state, case.x, case.y
    entries = {e.path: e for e in plan(model, x.shape, "norms", params=params, state=state).entries}
    task = make_task(model, cross_entropy, lambda path: path in entries, params, state)
    found = capture(task, Batch(x, y, len(x), 1)).factors
    done, rows = set(), []
    for path, factors in found.items():
        entry = entries[path]
        if not isinstance(factors, ConvFactors) or (factors.spec, entry.positions) in done:
            continue
        done.add((factors.spec, entry.positions))
        row: dict[str, Any] = {"layer": path, "T": entry.positions, "D": entry.weights, "plan": entry.way}
        for way in WAYS:
            hopeless = way not in entry.costs or entry.costs[way] > HOPELESS * min(entry.costs.values())
            row[way] = None if hopeless else milliseconds(factors, way, min_run_time)
        rows.append(row)
    return rows


def milliseconds(factors: contract.ConvFactors, way: str, min_run_time: float) -> float:
    timer = Timer(
        "norms(factors, way)",
        globals={"norms": contract.squared_norms, "factors": factors, "way": way},
        num_threads=torch.get_num_threads(),
    )
    return timer.blocked_autorange(min_run_time=min_run_time).median * 1e3


def regret(row: dict[str, Any]) -> float:
    """Time of the plan's choice over that of the best."""
    best = min(row[way] for way in WAYS if row[way] is not None)
    return row[row["plan"]] / best


def as_table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table("layer", title=title, title_justify="left")
    for header in ("T", "D", *WAYS, "plan", "plan / best"):
        table.add_column(header, justify="right")
    for row in rows:
        times = ["-" if row[way] is None else f"{row[way]:.2f}" for way in WAYS]
        table.add_row(
            row["layer"], f"{row['T']:,}", f"{row['D']:,}", *times, row["plan"], f"{regret(row):.2f}"
        )
    return table
