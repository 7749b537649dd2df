"""Throughput of the training step against the size of the batch and the number of threads.

    uv run python -m benchmarks scaling --model resnet20

At each point the forms take turns, interleaved, and are checked against each other first. One point follows
the other, so between points the machine may drift; the ratios within one do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.forms import networks, variants
from benchmarks.forms.step import BASELINE, FORMATS, Setting, Spec, allowed_distances
from benchmarks.forms.variants import TRAIN
from benchmarks.harness import conditions, measure, pictures, report
from benchmarks.harness.options import Step, check_words, toy
from benchmarks.harness.pictures import Line, Panel
from benchmarks.harness.statistics import Seconds
from resnet_func.app import runtime
from resnet_func.machine import available_cores

COMPILED = "function, step compiled"
COLOURS = (pictures.ORANGE, pictures.SKY, pictures.PURPLE, pictures.BLUE, pictures.GREEN, pictures.GREY)
Points = dict[int, Seconds]


@dataclass(frozen=True)
class Options(Step):
    """Measure throughput against batch size and threads."""

    batches: tuple[int, ...] = (1, 4, 16, 64, 256)
    """Images a step."""
    threads: tuple[int, ...] = ()
    """Inside one operation; powers of two up to the cores if left out. The largest is for the batches."""
    forms: tuple[str, ...] = ("module eager", "function eager", COMPILED)
    """Of `throughput`."""
    layout: tuple[str, ...] = ("channels_last",)
    """Of images and convolution weights, beside the eager module's NCHW."""
    ema: bool = True
    """Whether the step keeps a moving average of parameters and running statistics."""
    seconds: float = 40.0
    """Time after which a point stops, if the interquartile ranges are not under 10 % before."""


def run(options: Options) -> None:
    """Measure, print the table, write the result file and the picture.

    Raises:
        ValueError: options that cannot be.
        Disagreement: a form computes something else.
    """
    options = as_toy(options)
    specs = select(options)
    machine = conditions.set_up(options.device, None)
    counts = thread_counts(options, machine)
    machine = conditions.set_up(options.device, counts[-1])
    where = conditions.capture(machine)
    compiles = any("compiled" in spec.form for spec in specs)
    with conditions.empty_compiler_cache("inductor", compiles=compiles):
        by_batch = {n: measure_point(options, specs, n, counts[-1]) for n in options.batches}
        by_threads = {n: measure_point(options, specs, options.batch, n) for n in counts}
    publish(options, where, by_batch, by_threads)


def as_toy(options: Options) -> Options:
    """One thread, and only eager forms."""
    forms = tuple(form for form in options.forms if "compiled" not in form)
    return toy(options, batches=(2, 4), threads=(1,), batch=2, forms=forms)


def select(options: Options) -> list[Spec]:
    """The rows at every point, the baseline first.

    Raises:
        ValueError: a form or layout that is none, or a number below 1.
    """
    check_words("forms", options.forms, tuple(form for form in TRAIN if "again" not in form))
    check_words("layout", options.layout, tuple(FORMATS))
    for name, numbers in (("batches", options.batches), ("threads", options.threads or (1,))):
        if not numbers or min(numbers) < 1:
            raise ValueError(f"--{name} must be numbers of 1 or more; got {numbers or 'nothing'}")
    wanted = [Spec(form, layout) for form in options.forms for layout in options.layout]
    return [BASELINE, *(spec for spec in wanted if spec != BASELINE)]


def thread_counts(options: Options, machine: runtime.Runtime) -> list[int]:
    """In rising order; on a GPU, one."""
    if machine.device.type != "cpu":
        return [machine.threads]
    cores = available_cores()
    powers = {2**power for power in range(cores.bit_length())} | {cores}
    return sorted(set(options.threads) or powers)


def measure_point(options: Options, specs: list[Spec], batch: int, threads: int) -> Seconds:
    """Seconds a step of every form, with that batch and that many threads."""
    measure.progress.print(f"batch {batch}, threads {threads}")
    machine = conditions.set_up(options.device, threads)
    case = networks.make_case(options.model, batch, options.size, machine.device)
    setting = Setting(train=True, ema=options.ema, backend="inductor")
    makers = {spec.name: partial(variants.make_variant, spec, case, setting) for spec in specs}
    steps = measure.prepare(makers, BASELINE.name, allowed_distances(case, train=True)).steps
    return measure.time_steps(
        steps,
        BASELINE.name,
        options.stopping_rule(options.seconds),
        threads=threads,
        turn_seconds=options.turn_seconds,
    )


# --------------------------------------------------------------------------- results


def publish(options: Options, where: dict[str, Any], by_batch: Points, by_threads: Points) -> None:
    """A table for every point, the result file and the picture."""
    title = f"{options.model}, training step, {options.size} px{options.toy_note}"
    points = [("by_batch", n, n, f"batch {n}", seconds) for n, seconds in by_batch.items()]
    points += [
        ("by_threads", n, options.batch, f"batch {options.batch}, threads {n}", seconds)
        for n, seconds in by_threads.items()
    ]
    figures: dict[str, dict[int, Any]] = {"by_batch": {}, "by_threads": {}}
    tables = []
    for axis, n, images, name, seconds in points:
        rows = report.rows(seconds, BASELINE.name, images=images)
        figures[axis][n] = report.as_json(rows)
        tables.append(report.as_table(f"{title}, {name}", rows, "module"))
    report.publish(
        options,
        where,
        f"scaling-{networks.slug(options.model)}-{options.size}px",
        {"figures": figures, "seconds": {"by_batch": by_batch, "by_threads": by_threads}},
        tables=tables,
        draw=lambda path: draw(path, options, where, title, by_batch, by_threads),
    )


def draw(
    path: Path, options: Options, where: dict[str, Any], title: str, by_batch: Points, by_threads: Points
) -> None:
    threads = f"{where['threads']} thread{'s' if where['threads'] > 1 else ''}"
    panels = [Panel(f"batch size, {threads}", "images a step", as_lines(by_batch, {n: n for n in by_batch}))]
    if len(by_threads) > 1:
        images = dict.fromkeys(by_threads, options.batch)
        lines = as_lines(by_threads, images)
        panels.append(Panel(f"threads, batch {options.batch}", "threads", lines, ideal=True))
    names = [line.name for line in panels[0].lines]
    pictures.lines(
        path,
        panels,
        title=f"{title}: throughput",
        subtitle=f"{conditions.describe(where)}; bands are quartiles",
        colours=dict(zip(names, COLOURS * len(names), strict=False)),
    )


def as_lines(points: Points, images: Mapping[int, int]) -> list[Line]:
    """Images a second of every form: the median with its quartiles, at every point where it ran."""
    lines = []
    for name in dict.fromkeys(name for seconds in points.values() for name in seconds):
        at = [n for n in points if name in points[n]]
        quartiles = [images[n] / np.quantile(points[n][name], (0.75, 0.5, 0.25)) for n in at]
        low, middle, high = (list(map(float, values)) for values in zip(*quartiles, strict=True))
        lines.append(Line(name, at, middle, low, high))
    return lines
