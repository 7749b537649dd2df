"""Throughput of the training step against the number of processes, and what many GPUs would make of it.

    uv run python -m benchmarks processes --model resnet18 --batch 64

The batch stays the same, and the processes share it, with one thread each; beside them stands one process
with as many threads, which the column "over as many threads" divides by. Each takes its turn in every round,
in fresh processes started by torchrun. The all-reduce is timed by itself, after the steps: its share of a
step is what communication costs where nothing of it is hidden. The simulation is arithmetic on a measured
step: a ring within each node, then one between nodes, nothing hidden behind the backward pass.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.forms.rank_step import Timed, Work
from benchmarks.harness import conditions, markdown, measure, pictures, report
from benchmarks.harness.options import Step, toy
from benchmarks.harness.pictures import Line, Panel
from resnet_func.app.names import counted

LIMIT_SECONDS = 600.0  # of one start
GIGA = 1e9


@dataclass(frozen=True)
class Options(Step):
    """Measure throughput against processes."""

    processes: tuple[int, ...] = (1, 2)
    """How many share the batch, each with one thread."""
    rounds: int = 5
    """How often each takes its turn."""
    seconds: float = 10.0
    """Time of a turn."""
    gpus: tuple[int, ...] = (8, 64, 512)
    """Of the simulation."""
    per_node: int = 8
    """GPUs of a node, of the simulation."""
    node_link: float = 300.0
    """GB/s that a GPU sends to others of its node, of the simulation."""
    net_link: float = 25.0
    """GB/s that a GPU sends to other nodes, of the simulation."""
    latency: float = 1e-5
    """Seconds of one message, of the simulation."""
    step_seconds: float = 0.0
    """Of one GPU's step, of the simulation; 0 takes one process's step as measured here."""
    private_ratio: float = 1.0
    """Time of a private step over an ordinary one, such as `per-sample` measures, of the simulation."""


class Simulated(NamedTuple):
    """What a number of GPUs would do: seconds of communication, and the share of a step that is no wait."""

    gpus: int
    communication: float
    efficiency: float
    private_efficiency: float


def run(options: Options) -> None:
    """Measure, print the tables, write the result file and the picture.

    Raises:
        ValueError: options that cannot be.
        Disagreement: a process failed.
    """
    options = toy(options, processes=(2,), rounds=2, seconds=0.05)
    _check(options)
    machine = conditions.set_up(options.device, None)
    where = conditions.capture(machine)
    turns = {name: work for count in options.processes for name, work in _turns(options, count).items()}
    found: dict[str, list[Timed]] = {name: [] for name in turns}
    for _ in range(options.rounds):
        for name, (count, work) in turns.items():
            found[name].append(start(count, work))
    baseline = next(iter(turns))
    seconds = {name: [timed.step for timed in timings] for name, timings in found.items()}
    rows = report.rows(seconds, baseline, images=options.batch)
    figures = {
        name: {**row, **_figures(turns[name][0], found[name])} for name, row in report.as_json(rows).items()
    }
    for count in options.processes:
        if count > 1:
            threads, processes = (found[name] for name in _turns(options, count))
            figures[_name(count)]["over_threads"] = _over(threads, processes)
    more = {name: _communication(figures[name]) for name in found}
    bytes_sent = max(timed.bytes for timings in found.values() for timed in timings)
    step = options.step_seconds or float(np.median(seconds[baseline]))
    simulated = [simulate(options, gpus, step, bytes_sent) for gpus in options.gpus]
    title = f"{options.model}, training step, batch {options.batch}, {options.size} px{options.toy_note}"
    heads = next(iter(more.values()))
    columns = {head: {name: texts[head] for name, texts in more.items()} for head in heads}
    report.publish(
        options,
        where,
        f"processes-{options.model}-n{options.batch}-{options.size}px",
        {"figures": figures, "simulated": [row._asdict() for row in simulated], "simulated_step": step},
        tables=[report.as_table(title, rows, baseline, columns), as_table(simulated, step, bytes_sent)],
        draw=lambda path: draw(path, options, where, title, found),
    )


def _check(options: Options) -> None:
    for name in ("processes", "gpus"):
        if not getattr(options, name) or min(getattr(options, name)) < 1:
            got = getattr(options, name) or "nothing"
            raise ValueError(f"--{name} must be numbers of 1 or more; got {got}")
    for name in ("rounds", "per_node", "node_link", "net_link", "private_ratio"):
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0; got {getattr(options, name)}")
    if options.batch < (most := max(options.processes)):
        raise ValueError(f"--batch {options.batch} leaves some of {most} processes without an image")


def _turns(options: Options, count: int) -> dict[str, tuple[int, Work]]:
    """One process with so many threads, and so many processes with one."""

    def work(threads: int) -> Work:
        return Work(options.model, options.batch, options.size, options.device, threads, options.seconds)

    both = {f"1 process, threads {count}": (1, work(count)), _name(count): (count, work(1))}
    return both if count > 1 else dict([next(iter(both.items()))])


def _name(count: int) -> str:
    return f"processes {count}, 1 thread"


def start(count: int, work: Work) -> Timed:
    """Time a step on so many processes.

    Raises:
        Disagreement: one of them failed, or took too long.
    """
    measure.progress.print(
        f"{counted(count, 'process', 'processes')}, {counted(work.threads, 'thread')} each"
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    module = ["-m", "benchmarks.forms.rank_step", json.dumps(work._asdict())]
    command = [sys.executable, *(launcher if count > 1 else []), *module]
    environment = {**os.environ, "OMP_NUM_THREADS": str(work.threads)}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=True
        )
    except subprocess.SubprocessError as error:
        raise measure.Disagreement(f"{counted(count, 'process', 'processes')}: {error}") from error
    timings = [json.loads(found) for found in re.findall(r"{.*?}", done.stdout)]  # two may share a line
    slowest = max(timings, key=lambda timed: timed["step"])
    return Timed(**slowest)


# --------------------------------------------------------------------------- simulation


def simulate(options: Options, gpus: int, step: float, bytes_sent: int) -> Simulated:
    """Data parallel training with a fixed batch for each GPU; nothing is sent during the backward pass.

    A sum over `n` by a ring sends `2 (n - 1) / n` of the bytes in `2 (n - 1)` messages. Within a node first;
    then each GPU sums its share of the bytes with its fellows of other nodes.
    """
    local = min(gpus, options.per_node)
    nodes = -(-gpus // options.per_node)
    communication = _ring(local, bytes_sent, options.node_link, options.latency)
    communication += _ring(nodes, bytes_sent / local, options.net_link, options.latency)
    private = step * options.private_ratio
    return Simulated(gpus, communication, step / (step + communication), private / (private + communication))


def _ring(members: int, size: float, link: float, latency: float) -> float:
    return 2 * (members - 1) * (size / members / (link * GIGA) + latency)


def as_table(simulated: list[Simulated], step: float, bytes_sent: int) -> Table:
    """What the simulation says, with what it assumes in the title."""
    title = f"simulated: a step of {step * 1e3:,.1f} ms, {bytes_sent / 1e6:,.1f} MB to sum, no overlap"
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for head in ("GPUs", "communication ms", "efficiency", "private"):
        table.add_column(head, justify="right")
    for row in simulated:
        shares = f"{row.efficiency:.1%}", f"{row.private_efficiency:.1%}"
        table.add_row(str(row.gpus), f"{row.communication * 1e3:.2f}", *shares)
    return table


# --------------------------------------------------------------------------- results


def _figures(count: int, timings: list[Timed]) -> dict[str, float]:
    """Of so many processes; by a ring, each sends `2 (count - 1) / count` of the bytes that are summed."""
    step, summed = (float(np.median([getattr(t, name) for t in timings])) for name in ("step", "all_reduce"))
    sent = 2 * (count - 1) / count * timings[0].bytes
    share = {"all_reduce_seconds": summed, "all_reduce_share": summed / step}
    return {**share, "bytes": timings[0].bytes, "bytes_sent": sent}


def _over(threads: list[Timed], processes: list[Timed]) -> float:
    """Throughput of processes over that of as many threads of one, the median of the rounds."""
    pairs = zip(threads, processes, strict=True)
    return float(np.median([one.step / many.step for one, many in pairs]))


def _communication(of: Mapping[str, Any]) -> dict[str, str]:
    return {
        "over as many threads": f"{of['over_threads']:.3f}" if "over_threads" in of else "",
        "MB sent": f"{of['bytes_sent'] / 1e6:,.1f}",
        "all-reduce ms": f"{of['all_reduce_seconds'] * 1e3:.2f}",
        "of the step": f"{of['all_reduce_share']:.1%}",
    }


def draw(
    path: Path, options: Options, where: dict[str, Any], title: str, found: dict[str, list[Timed]]
) -> None:
    """Images a second by the number of processes, and of threads."""
    lines = []
    for word, name in (("process", "threads of one process"), ("processes", "processes of one thread")):
        points = {
            max(int(part) for part in key.replace(",", "").split() if part.isdigit()): timings
            for key, timings in found.items()
            if key.startswith("1 process,") == (word == "process")
        }
        if points:
            rates = [
                options.batch / np.quantile([timed.step for timed in of], (0.75, 0.5, 0.25))
                for of in points.values()
            ]
            low, middle, high = (list(map(float, values)) for values in zip(*rates, strict=True))
            lines.append(Line(name, list(points), middle, low, high))
    pictures.lines(
        path,
        [Panel("threads or processes", "at once", lines, ideal=True)],
        title=f"{title}: throughput",
        subtitle=f"{conditions.describe(where)}; bands are quartiles",
        colours=dict(zip([line.name for line in lines], (pictures.ORANGE, pictures.BLUE), strict=False)),
    )


def section(contents: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """The tables of RESULTS.md: for each machine and its result, the measured and the simulated."""
    lines = []
    for machine, content in contents:
        rows = [
            [
                name,
                report.rate(of["images_per_second"]),
                f"{of['ratio']['median']:.3f}",
                *_communication(of).values(),
            ]
            for name, of in content["figures"].items()
        ]
        heads = [
            machine,
            "images/s",
            "time / the first",
            *_communication(next(iter(content["figures"].values()))),
        ]
        lines += markdown.table(heads, rows)
        options = content["options"]
        lines += [
            f"Simulated on a step of {content['simulated_step'] * 1e3:,.1f} ms, {options['per_node']} GPUs a "
            f"node, {options['node_link']:g} GB/s within and {options['net_link']:g} GB/s between nodes and "
            f"{options['latency'] * 1e6:g} us a message, a private step taking {options['private_ratio']:g} "
            "times as long: a ring within each node, then one between nodes; nothing is hidden behind the "
            "backward pass, and no rank waits for a slower one.",
            "",
        ]
        shown = []
        for row in content["simulated"]:
            shares = f"{row['efficiency']:.1%}", f"{row['private_efficiency']:.1%}"
            shown.append([str(row["gpus"]), f"{row['communication'] * 1e3:.2f}", *shares])
        lines += markdown.table(["GPUs", "communication ms", "efficiency", "private"], shown)
    return lines
