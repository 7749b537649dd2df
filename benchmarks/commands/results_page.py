"""benchmarks/RESULTS.md, written from the result files: every figure with its machine, date and command.

    uv run python -m benchmarks report

Files of the same measurement on several machines share a table, their columns side by side.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from benchmarks.commands import (
    allocator,
    contractions,
    curvature,
    ensembles,
    here,
    lds,
    per_sample,
    phases,
    private,
    processes,
    pruning,
    roofline,
    scaling,
    scores,
    throughput,
    winograd,
)
from benchmarks.harness import report
from benchmarks.harness.markdown import command_of, interval, machine_of, table
from benchmarks.harness.options import RESULTS
from resnet_func import files
from resnet_func.app.names import counted

PAGE = RESULTS.parent / "RESULTS.md"
OPERATIONS = 12  # rows of a roofline
Section: TypeAlias = "Callable[[Sequence[Result]], list[str]]"


@dataclass(frozen=True)
class Options:
    """Write RESULTS.md from the result files."""

    results: Path = RESULTS
    """The folder of the result files."""
    page: Path = PAGE
    """The file to write."""


class Result(NamedTuple):
    """A result file: its benchmark ("per-sample"), what was measured, and its content."""

    path: Path
    kind: str
    case: str
    content: dict[str, Any]

    @property
    def machine(self) -> str:
        return machine_of(self.content["environment"])


def run(options: Options) -> None:
    """Write the page.

    Raises:
        ValueError: a result file cannot be read.
    """
    files.write_whole(options.page, document(options.results).encode())
    report.say(f"written: {options.page}")


def document(folder: Path) -> str:
    """The page as text; it depends on nothing but the files of the folder."""
    results = read(folder)
    preface = folder / "preface.md"
    lines = ["# Results", "", "<!-- written by `python -m benchmarks report`; do not edit -->", ""]
    lines += [preface.read_text(encoding="utf-8")] if preface.exists() else []
    lines += machines(results)
    for kind, of in KINDS.items():
        cases: dict[str, list[Result]] = defaultdict(list)
        for result in results:
            if result.kind == kind:
                cases[result.case].append(result)
        if not cases:
            continue
        lines += [f"## {of.title}", "", (of.module.__doc__ or "").split("\n\n")[0].strip(), ""]
        for case, group in cases.items():
            lines += [f"### {case}", "", *(provenance(result) for result in group), ""]
            lines += of.section(group)
    lines += accuracy(folder)
    return "\n".join(lines).rstrip() + "\n"


def read(folder: Path) -> list[Result]:
    """Every measurement of the folder, by the names of the files; toys are passed over.

    Raises:
        ValueError: a file is not what a benchmark writes; it is named.
    """
    results = []
    for path in sorted(folder.glob("*.json")):
        kind = next((kind for kind in KINDS if path.name.startswith(f"{kind}-")), None)
        if kind is None:
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            machine = machine_of(content["environment"])
            options = content["options"]
            date = content["date"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path.name} is no result file of a benchmark: {error!r}") from error
        if not path.stem.endswith(machine) or not date:
            raise ValueError(f"{path.name} is of {machine}, which its name does not say, or has no date")
        if not options.get("quick"):
            case = path.stem.removeprefix(f"{kind}-").removesuffix(machine).removesuffix("-")
            results.append(Result(path, kind, in_words(case), content))
    return results


def in_words(stem: str) -> str:
    """What the name of a file says.

    >>> in_words("resnet18-k4-n32-32px-training")
    'resnet18, 4 networks, 32 images, 32 px, training'
    """
    words = (re.sub(r"^k(\d+)$", r"\1 networks", word) for word in stem.split("-"))
    words = (re.sub(r"^n(\d+)$", r"\1 images", word) for word in words)
    return ", ".join(re.sub(r"^(\d+)px$", r"\1 px", word) for word in words)


def machines(results: Sequence[Result]) -> list[str]:
    """What the short names of machines stand for."""
    rows = {}
    for result in results:
        where = result.content["environment"]
        cpu = " ".join(filter(None, (where["cpu"], where["microarchitecture"])))
        gpu = where["gpu"] if str(where["device"]).startswith("cuda") else None
        flags = ", ".join(where["cpu_flags"])
        rows[result.machine] = [
            result.machine,
            f"{gpu}, {cpu}" if gpu else cpu,
            str(where["cores"]),
            f"{where['vector_extensions']} ({flags})",
            f"{where['memory_gib']:g} GiB",
            where["system"],
        ]
    heads = ["machine", "processor", "cores", "vector extensions", "memory", "system"]
    return ["## Machines", "", *table(heads, list(rows.values()))]


def provenance(result: Result) -> str:
    """Machine, date, conditions and command of a result file, with links to file and picture."""
    where, options = result.content["environment"], result.content["options"]
    threads = counted(where["threads"], "thread")
    picture = result.path.with_suffix(".png")
    links = [f"[figures](results/{result.path.name})"]
    links += [f"[picture](results/{picture.name})"] if picture.exists() else []
    kind = KINDS[result.kind]
    command = command_of(kind.command or result.kind, options, kind.options)
    return (
        f"- {result.machine}, {result.content['date']}, commit {where['commit']}, {threads}, "
        f"torch {where['torch']}; {' and '.join(links)}; `{command}`"
    )


# --------------------------------------------------------------------------- the kinds of tables

COLUMNS: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
    "time / baseline (95 % interval)": lambda row: interval(row["ratio"]),
    "images/s": lambda row: report.rate(row["images_per_second"]),
    "compile s": lambda row: None if row["compile_seconds"] is None else f"{row['compile_seconds']:,.0f}",
    "peak MB": lambda row: None if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f}",
    "page faults a step": lambda row: None if "faults" not in row else f"{row['faults']:,.0f}",
}


def comparison(group: Sequence[Result]) -> list[str]:
    """Rows of variants, the columns of every machine that measured the case."""
    figures = [with_faults(result.content) for result in group]
    names = list(dict.fromkeys(name for of in figures for name in of))
    heads, columns = ["what"], []
    for result, of in zip(group, figures, strict=True):
        for head, cell in COLUMNS.items():
            if any(cell(row) is not None for row in of.values()):
                heads.append(f"{result.machine}: {head}" if len(group) > 1 else head)
                columns.append([(cell(of[name]) or "") if name in of else "" for name in names])
    lines = table(heads, [list(cells) for cells in zip(names, *columns, strict=True)])
    for result in group:
        for best in result.content.get("best", ()):
            ratio = interval(best["ratio"])
            lines += [
                f"{result.machine}, fastest: {best['function']} / {best['other']}: {ratio}",
                "",
            ]
    return lines


def with_faults(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The figures by variant, the allocator's page faults among them."""
    faults = content.get("page_faults", {})
    more = {name: {"faults": count} for name, count in faults.items()}
    return {name: {**row, **more.get(name, {})} for name, row in content["figures"].items()}


def scaling_tables(group: Sequence[Result]) -> list[str]:
    """Of every machine, a row for each batch size or number of threads, a column for each form."""
    lines = []
    for result in group:
        for axis, head in (("by_batch", "batch"), ("by_threads", "threads")):
            points = result.content["figures"][axis]
            names = list(dict.fromkeys(name for of in points.values() for name in of))
            rows = [[n, *(scaling_cell(of.get(name)) for name in names)] for n, of in points.items()]
            lines += table([f"{result.machine}: {head}", *names], rows)
    return [*lines, "Images/s, and in brackets the time as a ratio to the first column's.", ""]


def scaling_cell(row: Mapping[str, Any] | None) -> str:
    return "" if row is None else f"{report.rate(row['images_per_second'])} ({row['ratio']['median']:.2f})"


def roofline_tables(group: Sequence[Result]) -> list[str]:
    """Of every machine, the whole step and the operations that take longest."""
    lines = []
    for result in group:
        content = result.content
        best, step = content["peaks"], content["step"]
        dtype = content["options"]["dtype"]
        lines += [
            f"{result.machine}: {roofline.as_sentence(step)}. Peaks: GEMM {best['gemm'][dtype] / 1e9:,.0f} "
            f"GFLOP/s, convolution {best['conv'][dtype] / 1e9:,.0f} GFLOP/s, "
            f"memory {best['memory'] / 1e9:,.1f} GB/s.",
            "",
        ]
        rows = [
            [
                row["what"],
                row["phase"],
                str(row["count"]),
                f"{row['share']:.1%}",
                f"{row['flops_per_second'] / 1e9:,.1f}",
                f"{row['roof_share']:.0%}",
            ]
            for row in content["operations"][:OPERATIONS]
        ]
        lines += table(["operation", "phase", "times", "share of the step", "GFLOP/s", "of the roof"], rows)
    return lines


def by(module: Any) -> Section:
    """The section that a benchmark's module writes."""
    return lambda group: module.section([(result.machine, result.content) for result in group])


class Kind(NamedTuple):
    """A kind of result file.

    Args:
        module: The benchmark's; its first sentence stands below the title.
        title: Of the section.
        section: Its tables, of one case on every machine.
        command: What measures it; the kind's own name if left out.
        owner: The module whose options the command has; the benchmark's own if left out.
    """

    module: Any
    title: str
    section: Section = comparison
    command: str = ""
    owner: Any = None

    @property
    def options(self) -> type[Any]:
        return (self.owner or self.module).Options


KINDS = {
    "here": Kind(here, "The figures of README", by(here)),
    "per-sample": Kind(per_sample, "Gradients one sample at a time"),
    "phases": Kind(
        phases, "Where the time of per-sample gradients goes", by(phases), "per-sample", per_sample
    ),
    "layers": Kind(
        contractions, "What the plan chose, layer by layer", by(contractions), "per-sample", per_sample
    ),
    "private": Kind(private, "The private step against the ordinary one"),
    "allocator": Kind(allocator, "The training step against a stock loop"),
    "throughput": Kind(throughput, "Every form of a step"),
    "winograd": Kind(winograd, "Minimal filtering, convolution by convolution", by(winograd)),
    "ensembles": Kind(ensembles, "Several networks at once"),
    "scaling": Kind(scaling, "Batch size and threads", scaling_tables),
    "processes": Kind(processes, "Processes, and a simulation of many GPUs", by(processes)),
    "curvature": Kind(curvature, "Curvature"),
    "roofline": Kind(roofline, "The roofline", roofline_tables),
    "scores": Kind(scores, "Scores of every sample"),
    "lds": Kind(lds, "Attribution against retraining", by(lds)),
    "pruning": Kind(pruning, "What may be left out of a training set", by(pruning)),
}


# --------------------------------------------------------------------------- accuracy


def accuracy(folder: Path) -> list[str]:
    """The trained networks: folders with `about.json` beside what `resnet-func train` wrote."""
    lines = []
    for path in sorted(folder.glob("*/about.json")):
        about = json.loads(path.read_text(encoding="utf-8"))
        text = path.with_name("metrics.jsonl").read_text(encoding="utf-8")
        epochs = [json.loads(line) for line in text.splitlines()]
        name = path.parent.name
        last, minutes = epochs[-1], about["wall_seconds"] / 60
        rows = [
            [
                f"after {counted(len(epochs), 'epoch')}",
                f"{last['test_accuracy']:.2%}",
                f"`{about['command']}`",
            ]
        ]
        rows += [
            [more["what"], f"{more['test_accuracy']:.2%}", f"`{more['command']}`"] for more in about["also"]
        ]
        lines += [
            f"### {in_words(name)}",
            "",
            f"- {about['machine']}, {about['date']}, {counted(about['threads'], 'thread')}, "
            f"torch {about['torch']}, {counted(round(minutes), 'minute')} with the start of Python; "
            f"[figures](results/{name}/metrics.jsonl), [settings](results/{name}/config.json)",
            "",
            about["note"],
            "",
            *table(["what", "test accuracy", "command"], rows),
            f"![Loss and accuracy by epoch](results/{name}/curves.png)",
            *[f"![{says}](results/{name}/{picture})" for picture, says in about.get("pictures", {}).items()],
            "",
        ]
    return ["## Accuracy", "", *lines] if lines else []
