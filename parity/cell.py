"""A cell: one claim of the suite, the check behind it, and what came of it."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal
from unittest import SkipTest


@dataclass(frozen=True)
class Cell:
    """One claim.

    Args:
        section: The part of the suite, "bitwise" for instance.
        name: Unique within the section: "resnet18/fp64-train-nchw", a row of the report and a column.
        check: Returns the figure that the table prints ("0 ULP, 124 leaves"); raises AssertionError with
            the worst leaf where the claim is false, and `unittest.SkipTest` with the reason where it cannot
            be checked.
    """

    section: str
    name: str
    check: Callable[[], str]

    @property
    def path(self) -> str:
        return f"{self.section}/{self.name}"


@dataclass(frozen=True)
class Result:
    """What came of a cell; `said` is its figure, its failure or its reason to be skipped."""

    section: str
    name: str
    outcome: Literal["passed", "failed", "skipped"]
    said: str
    seconds: float

    @property
    def path(self) -> str:
        return f"{self.section}/{self.name}"

    @property
    def row(self) -> str:
        return row_of(self.name)

    @property
    def failed(self) -> bool:
        return self.outcome == "failed"

    @property
    def command(self) -> str:
        return f"python -m parity --only {self.path}"


def row_of(name: str) -> str:
    """The row of the report that a cell of this name is in."""
    return name.rpartition("/")[0] or name


def run(cell: Cell) -> Result:
    """Check a cell. An error of any kind is a failure, told in one line."""
    start = time.perf_counter()
    outcome: Literal["passed", "failed", "skipped"]
    try:
        outcome, said = "passed", cell.check()
    except SkipTest as reason:
        outcome, said = "skipped", str(reason)
    except AssertionError as failure:
        outcome, said = "failed", str(failure)
    except Exception as error:
        outcome, said = "failed", traceback.format_exception_only(error)[-1].strip()
    return Result(cell.section, cell.name, outcome, said, time.perf_counter() - start)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a table in Markdown."""
    cells = [[str(value).replace("|", "\\|").replace("\n", " ") for value in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [list(head), ["---"] * len(head), *cells]]
