"""The figures that README claims, measured on this machine in ten minutes, beside the committed machines'.

    uv run python -m benchmarks here

Runs four benchmarks shortly, each in a fresh process, without looking at memory. Every figure is a ratio of
times within one run; the noise is the baseline of the same run, measured once more.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

from benchmarks.harness import conditions, markdown, measure, report
from benchmarks.harness.markdown import interval, machine_of
from benchmarks.harness.options import Threaded
from benchmarks.harness.statistics import ratio
from resnet_func.app.runtime import compile_obstacle

SECONDS = 60  # of timing in each run
COMMANDS = {
    "per-sample-resnet18-n32-32px": "per-sample --model resnet18 --batch 32 --without loop vmap module",
    "per-sample-resnet20-n64-32px": "per-sample --model resnet20 --batch 64 --without loop vmap module",
    "throughput-resnet18-n32-32px-training": (
        "throughput --model resnet18 --batch 32 --layout channels_last --without gradient JAX"
    ),
    "allocator-resnet18-n32-32px": "allocator --model resnet18 --batch 32",
}
QUICK = {
    "per-sample-resnet18-n32-32px": "per-sample --quick --no-memory",
    "per-sample-resnet20-n64-32px": "per-sample --quick --no-memory",
    "throughput-resnet18-n32-32px-training": (
        "throughput --quick --no-memory --dtype fp32 --layout channels_last --without gradient compiled JAX"
    ),
    "allocator-resnet18-n32-32px": "allocator --quick",
}

Content = Mapping[str, Any]
Pick = Callable[[Content], Mapping[str, float] | None]


class Figure(NamedTuple):
    """A ratio: what it is in words, the result file that has it, and where."""

    what: str
    stem: str
    pick: Pick


@dataclass(frozen=True)
class Options(Threaded):
    """Measure a dozen figures in ten minutes, and show them beside the committed machines'."""


def row(name: str) -> Pick:
    """The row of that name."""
    return lambda content: content["figures"].get(name, {}).get("ratio")


def quotient(of: Callable[[str], bool], over: Callable[[str], bool]) -> Pick:
    """The fastest of some rows over the fastest of others, round by round."""

    def pick(content: Content) -> Mapping[str, float] | None:
        figures, seconds = content["figures"], content.get("seconds", {})
        groups = [[name for name in seconds if wanted(name)] for wanted in (of, over)]
        if not all(groups):
            return None
        ours, theirs = (min(names, key=lambda n: figures[n]["ratio"]["median"]) for names in groups)
        return ratio(seconds[ours], seconds[theirs])._asdict()

    return pick


def _is(*words: str, dtype: str) -> Callable[[str], bool]:
    return lambda name: all(word in name for word in words) and name.endswith(dtype)


def figures() -> list[Figure]:
    """All of them, in the order of the table."""
    found = []
    for network, stem in (("ResNet-18, 32 images", "resnet18-n32"), ("ResNet-20, 64 images", "resnet20-n64")):
        for name in ("norms", "clipped_sum", "grads", "plain again"):
            what = "the noise" if name == "plain again" else f"`{name}` / ordinary step"
            found.append(Figure(f"{network}, GroupNorm: {what}", f"per-sample-{stem}-32px", row(name)))
    stem = "throughput-resnet18-n32-32px-training"
    for dtype in ("fp32", "bf16"):
        module, step = _is("module", dtype=dtype), _is("function, step compiled", dtype=dtype)
        what = f"ResNet-18, {dtype}: compiled step / fastest module"
        found.append(Figure(what, stem, quotient(step, module)))
    minimal, eager = _is("function eager, Winograd", dtype="fp32"), _is("function eager, ch", dtype="fp32")
    found.append(Figure("ResNet-18, fp32: Winograd / without, eager", stem, quotient(minimal, eager)))
    again = row("module eager again, NCHW, fp32")
    found.append(Figure("the noise of these", stem, again))
    for kind in ("eager", "compiled"):
        name = f"ours {kind}, tuned allocator"
        what = f"ResNet-18: `train`'s step, {kind} / stock loop"
        found.append(Figure(what, "allocator-resnet18-n32-32px", row(name)))
    return found


def run(options: Options) -> None:
    """Measure, and print the table.

    Raises:
        Disagreement: a run failed; the others are shown.
    """
    machine = conditions.set_up(options.device, options.threads)
    where, failed = conditions.capture(machine), []
    name = machine_of(where)
    with tempfile.TemporaryDirectory() as folder:
        for stem, words in (QUICK if options.quick else COMMANDS).items():
            if not measure_one(options, words, Path(folder) / stem):
                failed.append(words)
        here = {stem: read(next((Path(folder) / stem).glob("*.json"), None)) for stem in COMMANDS}
        machines = {name: here} | committed(options.results, name)
        found = {what: values for what, values in rows(machines).items() if any(values.values())}
    content = {"figures": {what: values[name] for what, values in found.items()}}
    report.publish(options, where, "here", content, tables=[as_table(found, list(machines))])
    if failed:
        raise measure.Disagreement(f"{len(failed)} runs failed: {'; '.join(failed)}")


def measure_one(options: Options, words: str, folder: Path) -> bool:
    """Run a benchmark in a fresh process; whether it ended well."""
    common = ["--results", str(folder)]
    if not options.quick:
        common += ["--seconds", str(SECONDS)]
        common += [] if words.startswith("allocator") else ["--no-memory"]
        if words.startswith("throughput") and compile_obstacle(torch.device("cpu")):
            common += ["--without", "compiled"]
    common += ["--threads", str(options.threads)] if options.threads else []
    measure.progress.print(f"[bold]python -m benchmarks {words}")
    start = time.monotonic()
    status = subprocess.run([sys.executable, "-m", "benchmarks", *words.split(), *common]).returncode
    measure.progress.print(
        f"{words.split()[0]}: exit status {status} after {time.monotonic() - start:,.0f} s"
    )
    return status == 0


def committed(folder: Path, but: str) -> dict[str, dict[str, Content | None]]:
    """The result files of other machines, by machine and stem."""
    found: dict[str, dict[str, Content | None]] = {}
    for stem in COMMANDS:
        for path in sorted(folder.glob(f"{stem}-*.json")):
            content = read(path)
            name = machine_of(content["environment"]) if content else but
            if name != but and path.stem == f"{stem}-{name}":
                found.setdefault(name, dict.fromkeys(COMMANDS))[stem] = content
    return found


def read(path: Path | None) -> Content | None:
    return None if path is None else json.loads(path.read_text(encoding="utf-8"))


def rows(
    machines: Mapping[str, Mapping[str, Content | None]],
) -> dict[str, dict[str, Mapping[str, float] | None]]:
    """Every figure on every machine, None where it was not measured."""

    def value(figure: Figure, files: Mapping[str, Content | None]) -> Mapping[str, float] | None:
        content = files.get(figure.stem)
        return None if content is None else figure.pick(content)

    return {f.what: {name: value(f, files) for name, files in machines.items()} for f in figures()}


def as_table(found: Mapping[str, Mapping[str, Any]], machines: list[str]) -> Table:
    title = "The figures of README, here and elsewhere"
    table = Table("time / time (95 % interval)", title=title, title_justify="left")
    for name in machines:
        table.add_column(name, justify="right")
    for what, values in found.items():
        cells = [values[name] for name in machines]
        table.add_row(what, *("-" if cell is None else interval(cell) for cell in cells))
    return table


def section(contents: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """The table of RESULTS.md: a row for each figure, a column for each machine."""
    names = list(dict.fromkeys(what for _, content in contents for what in content["figures"]))
    found = [[content["figures"].get(name) for _, content in contents] for name in names]
    cells = [["" if cell is None else interval(cell) for cell in row] for row in found]
    heads = ["time / time (95 % interval)", *(machine for machine, _ in contents)]
    return markdown.table(heads, [[name, *row] for name, row in zip(names, cells, strict=True)])
