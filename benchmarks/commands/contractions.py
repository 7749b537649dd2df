"""The two ways of every layer's norm, ghost and materialised, against what the plan chose between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.benchmark import Timer

from benchmarks.forms.networks import Case
from benchmarks.harness import report
from parity import environment
from resnet_func import tree
from resnet_func.models.layers import Conv, LayerSpec
from resnet_func.models.resnet import layer_specs
from resnet_func.per_sample import contract, plan

HOPELESS = 20  # times the other way's estimated cost: not tried, and more memory than there is
WAYS = ("ghost", "materialize")


def run(case: Case, where: dict[str, Any], results: Path | None, *, quick: bool) -> None:
    """Measure, print the table, and write the result file where a folder is given."""
    rows = measure(case, min_run_time=1e-3 if quick else 0.3)
    n, _, _, width = case.x.shape
    Console().print(as_table(f"norms of {case.name}, batch {n}, {width} px, milliseconds", rows))
    if results is not None:
        name = f"layers-{case.name}-n{n}-{width}px-{environment.machine(where['device'])}.json"
        report.write(results / name, {"environment": where, "layers": rows})


def measure(case: Case, min_run_time: float) -> list[dict[str, Any]]:
    """Milliseconds of both ways of every distinct convolution's norm, and what the plan chose."""
    assert case.model.config is not None
    specs: dict[str, LayerSpec] = tree.flatten(layer_specs(case.model.config))
    entries = {entry.path: entry for entry in plan(case.model, case.x.shape, "norms").entries}
    seen, rows = set(), []
    for path, spec in specs.items():
        entry = entries.get(f"{path}.weight")
        if not isinstance(spec, Conv) or entry is None or (spec, entry.positions) in seen:
            continue
        seen.add((spec, entry.positions))
        factors = random_factors(spec, len(case.x), round(entry.positions**0.5), case.x.device)
        row: dict[str, Any] = {"layer": path, "T": entry.positions, "D": entry.weights, "plan": entry.way}
        for way in WAYS:
            hopeless = entry.costs[way] > HOPELESS * min(entry.costs.values())
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


def random_factors(spec: Conv, n: int, side: int, device: torch.device) -> contract.ConvFactors:
    """Inputs and cotangents of a convolution with `side` output pixels along each side."""
    generator = torch.Generator().manual_seed(0)
    size = side * spec.stride
    shapes = spec.weight_shape, (n, spec.c_in, size, size), (n, spec.c_out, side, side)
    weight, inputs, cotangents = (torch.randn(s, generator=generator).to(device) for s in shapes)
    return contract.ConvFactors(spec, weight, inputs, cotangents, 1)


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
