"""What a benchmark leaves behind: a table on the terminal, a result file, and the picture beside it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.harness import conditions, pictures
from benchmarks.harness.options import Output
from benchmarks.harness.statistics import Ratio, Seconds, ratio
from parity import environment
from resnet_func import files
from resnet_func.app.names import printable

WIDE = 140


class Row(NamedTuple):
    """One variant's figures; what was not measured is None.

    Args:
        name: Of the variant.
        ratio: Time to the baseline's.
        seconds: The median step.
        images_per_second: At the median step.
        tflops: Model TFLOP/s at the median step.
        compile_seconds: The first call beyond an ordinary one, of compiled variants, with cold caches.
        peak_bytes: Beyond parameters and batch.
    """

    name: str
    ratio: Ratio
    seconds: float
    images_per_second: float
    tflops: float | None = None
    compile_seconds: float | None = None
    peak_bytes: int | None = None


def rows(
    seconds: Seconds,
    baseline: str,
    *,
    images: int,
    flops: float | None = None,
    compile_seconds: Mapping[str, float] | None = None,
    peak_bytes: Mapping[str, int | None] | None = None,
) -> list[Row]:
    """A row for every variant.

    Args:
        seconds: Of a step, in every round.
        baseline: The variant that the ratios are to.
        images: Of a step.
        flops: Model FLOPs of a step.
        compile_seconds, peak_bytes: By variant.
    """
    table = []
    for name, times in seconds.items():
        median = float(np.median(times))
        table.append(
            Row(
                name,
                ratio(times, seconds[baseline]),
                median,
                images / median,
                flops / median / 1e12 if flops else None,
                (compile_seconds or {}).get(name),
                (peak_bytes or {}).get(name),
            )
        )
    return table


def as_table(
    title: str, rows: list[Row], baseline: str, more: Mapping[str, Mapping[str, str]] | None = None
) -> Table:
    """The rows in their order; columns that nobody measured are left out.

    Args:
        title: Above the table.
        rows: From `rows`.
        baseline: What the ratios are to, in a word or two.
        more: Further columns: by their heads, texts by variant.
    """
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    table.add_column("variant", no_wrap=True)
    columns: dict[str, Callable[[Row], str | None]] = {
        f"time / {baseline}": lambda row: f"{row.ratio.median:.3f}",
        "95 % interval": lambda row: f"{row.ratio.low:.3f}-{row.ratio.high:.3f}",
        "ms": lambda row: f"{row.seconds * 1e3:,.1f}",
        "images/s": lambda row: rate(row.images_per_second),
        "TFLOP/s": lambda row: None if row.tflops is None else f"{row.tflops:.3g}",
        "compile s": lambda row: None if row.compile_seconds is None else f"{row.compile_seconds:,.0f}",
        "peak MB": lambda row: None if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}",
    }
    for head, texts in (more or {}).items():
        columns[head] = lambda row, texts=texts: texts.get(row.name)
    shown = {head: cell for head, cell in columns.items() if any(cell(row) is not None for row in rows)}
    for head in shown:
        table.add_column(head, justify="right", min_width=len(max(head.split(), key=len)))
    for row in rows:
        table.add_row(row.name, *(cell(row) or "-" for cell in shown.values()))
    return table


def rate(images_per_second: float) -> str:
    """Two digits at least."""
    return f"{images_per_second:.2g}" if images_per_second < 10 else f"{images_per_second:,.0f}"


def speed(row: Row) -> str:
    """Ratio and images a second, as they stand beside a bar."""
    return f"{row.ratio.median:.2f}   {rate(row.images_per_second)} img/s"


def as_json(rows: list[Row]) -> dict[str, Any]:
    """Figures by variant."""
    return {row.name: {**row._asdict(), "ratio": row.ratio._asdict()} for row in rows}


class Bars(NamedTuple):
    """How rows become a picture of bars.

    Args:
        again: The row that repeats the baseline: the noise floor.
        xlabel: What the length of a bar is.
        colours: Of each group.
        group: The group of a row by its name.
        label, note: What stands beside a bar, and after it; the name, and ratio and speed, if left out.
        hidden: Rows that have no bar, beside `again`.
    """

    again: str
    xlabel: str
    colours: Mapping[str, str]
    group: Callable[[str], str]
    label: Callable[[str], str] = str
    note: Callable[[Row], str] = lambda row: speed(row)
    hidden: tuple[str, ...] = ()


def draw_bars(path: Path, title: str, where: Mapping[str, Any], rows: Sequence[Row], style: Bars) -> None:
    """The picture of a comparison: its rows as bars, the baseline's repetition as the noise floor."""
    shown = [row for row in rows if row.name not in (style.again, *style.hidden)]
    pictures.bars(
        path,
        [
            pictures.Bar(style.label(row.name), row.ratio, style.note(row), style.group(row.name))
            for row in shown
        ],
        title=title,
        subtitle=conditions.describe(dict(where)),
        xlabel=style.xlabel,
        colours=style.colours,
        noise=next(row.ratio for row in rows if row.name == style.again),
    )


def publish(
    options: Output,
    where: Mapping[str, Any],
    stem: str,
    result: Mapping[str, Any],
    *,
    tables: Sequence[Table],
    notes: Sequence[str] = (),
    draw: Callable[[Path], None] | None = None,
) -> None:
    """Print the tables; where the options say so, write the result file, and draw its picture beside it.

    Args:
        options: Of the run; the result file holds them.
        where: From `conditions.capture`.
        stem: The files' name, to which the machine is added.
        result: What the file holds beside options, date and environment.
        tables, notes: For the terminal, the notes below.
        draw: Draws the picture into the file that it is given.
    """
    for table in tables:
        show(table)
    for note in notes:
        say(note)
    if not options.write:
        return
    path = options.results / f"{stem}-{environment.machine(where['device'])}.json"
    if draw is not None:
        draw(path.with_suffix(".png"))
    today = datetime.now(UTC).date().isoformat()
    write(path, {"options": vars(options), "date": today, "environment": where, **result})


def left_out(skipped: Mapping[str, str]) -> list[str]:
    """A note on each variant that could not run, with the reason."""
    return [f"left out: {name}: {reason}" for name, reason in skipped.items()]


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write the result file whole or not at all, and say where it is.

    Its "options" are what was measured, so not where it was written to.
    """
    options = {k: v for k, v in result.get("options", {}).items() if k not in ("write", "results")}
    result = {**result, "options": options} if options else result
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(path, (json.dumps(result, indent=1) + "\n").encode())
    picture = path.with_suffix(".png")
    say(f"written: {_shown(path)}{f' and {picture.name}' if picture.exists() else ''}")


def show(table: Table) -> None:
    """Print a table; where no terminal says how wide it is, as wide as it needs."""
    console = Console()
    if not console.is_terminal:
        console.width = WIDE
    console.print(table)


def say(text: str) -> None:
    Console(soft_wrap=True, highlight=False).print(text, markup=False)


def usage(error: Exception | str) -> int:
    """One line on stderr about a mistake in the options; the exit code."""
    print(f"benchmarks: {printable(' '.join(str(error).split()))}", file=sys.stderr)
    return 2


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
