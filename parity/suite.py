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
from resnet_func.app.names import counted

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
    return f"{counted(len(results), 'cell')}: {said}; {sum(r.seconds for r in results):.0f} s"


def write_json(path: Path, results: list[Result], machine: dict[str, Any]) -> None:
    report = {"machine": machine, "cells": [asdict(result) for result in results]}
    path.write_text(json.dumps(report, indent=1) + "\n")


def write_markdown(path: Path, results: list[Result], machine: dict[str, Any]) -> None:
    """The report: the outcome, then each section with what it establishes and its rows, then the machine."""
    lines = ["# Parity", "", summary(results), "", *(f"- {line}" for line in exceptions(results))]
    for section in dict.fromkeys(result.section for result in results):
        lines += ["", f"## {section}", "", *_table_of(section, results)]
    path.write_text("\n".join([*lines, "", "## machine", "", *_list_of(machine)]) + "\n")


def _table_of(section: str, results: Iterable[Result]) -> list[str]:
    head = ("row", "passed", "failed", "skipped", "figures")
    table = rows(result for result in results if result.section == section)
    return [
        *_explained(SECTIONS[section]),
        "",
        *markdown_table(head, [[row[key] for key in head] for row in table]),
    ]


def _list_of(machine: dict[str, Any]) -> list[str]:
    return [f"- {name.replace('_', ' ')}: {value}" for name, value in machine.items()]


# --------------------------------------------------------------------------- tables within a page


def block(section: str, results: list[Result], machine: dict[str, Any]) -> list[str]:
    """What stands between a section's marks on a page: the outcome, the table, the machine."""
    own = [result for result in results if result.section == section]
    outcome = [summary(own), *(f"- {line}" for line in exceptions(own))]
    return [*outcome, "", *_table_of(section, own), "", "### Machine", "", *_list_of(machine)]


def marks(section: str, page: Path) -> tuple[str, str]:
    """The lines before and after a section's block on a page."""
    command = f"python -m parity --only {section}/ --within parity/{page.name}"
    return f"<!-- {section}: begin, by `{command}` -->", f"<!-- {section}: end -->"


def split_page(section: str, page: Path) -> tuple[list[str], list[str], list[str]]:
    """The lines of a page up to a section's first mark, those of its block, and the rest.

    Raises:
        ValueError: the page lacks the marks.
    """
    lines, (begin, end) = page.read_text().splitlines(), marks(section, page)
    if lines.count(begin) != 1 or lines.count(end) != 1 or lines.index(begin) > lines.index(end):
        raise ValueError(f"{page} needs the lines {begin} and {end}, once, to write the section between them")
    start, stop = lines.index(begin) + 1, lines.index(end)
    return lines[:start], lines[start:stop], lines[stop:]


def write_within(page: Path, results: list[Result], machine: dict[str, Any]) -> None:
    """Write each section of the results anew between its marks on a page."""
    for section in dict.fromkeys(result.section for result in results):
        before, _, after = split_page(section, page)
        lines = [*before, "", *block(section, results, machine), "", *after]
        page.write_text("\n".join(lines) + "\n")


def _explained(section: Any) -> list[str]:
    """A section's docstring, and the table of what it holds if it has one."""
    lines = str(section.__doc__).strip().splitlines()
    describe = getattr(section, "describe", None)
    return [*lines, "", *markdown_table(*describe())] if describe else lines
