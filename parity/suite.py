"""All cells of the suite, and what came of them as a table, as JSON and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from parity import museum, properties
from parity.cell import Cell, Result, markdown_table
from parity.compare import elsewhere
from parity.sections import (
    bitwise,
    graphs,
    oracles,
    per_sample,
    privacy,
    second_order,
    shadow,
    trajectory,
)

SECTIONS = {
    "bitwise": bitwise,
    "elsewhere": elsewhere,
    "trajectory": trajectory,
    "graphs": graphs,
    "oracles": oracles,
    "second-order": second_order,
    "fp64-shadow": shadow,
    "per-sample": per_sample,
    "properties": properties,
    "privacy": privacy,
    "museum": museum,
}


def cells(*, quick: bool, only: str = "") -> list[Cell]:
    """The cells whose path starts with `only`, section after section.

    Raises:
        ValueError: there is none.
    """
    every = [cell for section in SECTIONS.values() for cell in section.cells(quick)]
    chosen = [cell for cell in every if cell.path.startswith(only)]
    if not chosen:
        kind = "quick cell" if quick else "cell"
        raise ValueError(f"no {kind} starts with {only!r}; sections are {', '.join(SECTIONS)}")
    return chosen


def rows(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Results by section and row (the name up to its last slash), each with its counts and seconds."""
    grouped: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        grouped.setdefault((result.section, result.row), []).append(result)
    return [
        {
            "section": section,
            "row": row,
            "passed": sum(result.outcome == "passed" for result in group),
            "failed": sum(result.outcome == "failed" for result in group),
            "skipped": sum(result.outcome == "skipped" for result in group),
            "figures": "; ".join(dict.fromkeys(r.said for r in group if r.outcome == "passed")),
            "seconds": sum(result.seconds for result in group),
        }
        for (section, row), group in grouped.items()
    ]


def as_table(results: list[Result]) -> Table:
    table = Table("section", "row", title="parity")
    for column in ("passed", "failed", "skipped"):
        table.add_column(column, justify="right")
    table.add_column("figures")
    table.add_column("seconds", justify="right")
    for row in rows(results):
        counts = [str(row[outcome] or "") for outcome in ("passed", "failed", "skipped")]
        table.add_row(row["section"], row["row"], *counts, row["figures"], f"{row['seconds']:.1f}")
    return table


def exceptions(results: list[Result]) -> list[str]:
    """A line for each failure, with the command that repeats it, and for each reason to skip."""
    failures = [f"FAILED {r.section}/{r.name}: {r.said}\n  {r.command}" for r in results if r.failed]
    reasons: dict[str, int] = {}
    for result in results:
        if result.outcome == "skipped":
            reasons[result.said] = reasons.get(result.said, 0) + 1
    return failures + [f"skipped {count}: {reason}" for reason, count in reasons.items()]


def summary(results: list[Result]) -> str:
    counts = {o: sum(r.outcome == o for r in results) for o in ("passed", "failed", "skipped")}
    said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    return f"{len(results)} cells: {said}; {sum(r.seconds for r in results):.0f} s"


def write_json(path: Path, results: list[Result], machine: dict[str, Any]) -> None:
    report = {"machine": machine, "cells": [asdict(result) for result in results]}
    path.write_text(json.dumps(report, indent=1) + "\n")


def write_markdown(path: Path, results: list[Result], machine: dict[str, Any]) -> None:
    """The report: the outcome, then each section with what it establishes and its rows, then the machine."""
    lines = ["# Parity", "", summary(results), "", *(f"- {line}" for line in exceptions(results))]
    for section in dict.fromkeys(result.section for result in results):
        lines += ["", f"## {section}", "", *_explained(SECTIONS[section]), ""]
        table = rows(result for result in results if result.section == section)
        head = ("row", "passed", "failed", "skipped", "figures")
        lines += markdown_table(head, [[row[key] for key in head] for row in table])
    lines += [
        "",
        "## machine",
        "",
        *(f"- {name.replace('_', ' ')}: {value}" for name, value in machine.items()),
    ]
    path.write_text("\n".join(lines) + "\n")


def _explained(section: Any) -> list[str]:
    """A section's docstring, and the table of what it holds if it has one."""
    lines = str(section.__doc__).strip().splitlines()
    describe = getattr(section, "describe", None)
    return [*lines, "", *markdown_table(*describe())] if describe else lines
