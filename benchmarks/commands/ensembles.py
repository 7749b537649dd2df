"""Training K networks at once against training them one after another.

    uv run python -m benchmarks ensembles --model resnet20 --members 4 16

Every network has parameters and a batch of its own. All forms run in one process, interleaved, and must move
every network's parameters alike before anything is timed. The ratios are to K eager steps, NCHW, one after
another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.forms import ensemble_forms, networks
from benchmarks.forms.ensemble_forms import AGAIN, BASELINE, FORMS, Work
from benchmarks.forms.networks import Case
from benchmarks.forms.step import FORMATS, allowed_distances
from benchmarks.harness import conditions, measure, memory, pictures, report
from benchmarks.harness.options import Compared, check_without, check_words, toy
from benchmarks.harness.report import Row
from resnet_func.app import runtime

COLOURS = {
    "one after another": pictures.ORANGE,
    "side by side": pictures.GREEN,
    "unrolled": pictures.PURPLE,
    "vmap": pictures.BLUE,
}
FIRST = f"{BASELINE}, NCHW"
NOISE = f"{AGAIN}, NCHW"


@dataclass(frozen=True)
class Options(Compared):
    """Measure the training step of K networks, by vmap and otherwise."""

    members: tuple[int, ...] = (4, 16)
    """Networks in an ensemble; each number is measured apart."""
    batch: int = 64
    """Images a step, of each network."""
    layout: tuple[str, ...] = ("NCHW", "channels_last")
    """Of images and convolution weights."""


def run(options: Options) -> None:
    """Measure, print a table, write a result file and a picture for each number of networks.

    Raises:
        ValueError: options that cannot be.
        Disagreement: a form computes something else.
    """
    options = toy(options, members=(2,), batch=2)
    names = select(options)
    machine = conditions.set_up(options.device, options.threads)
    for count in options.members:
        where = conditions.capture(machine)
        rows, raw = measure_one(options, machine, names, count)
        publish(options, where, count, rows, raw)


def select(options: Options) -> dict[str, tuple[str, str]]:
    """Form and layout by the name of the row.

    Raises:
        ValueError: a layout that is none, no members, or a word of `without` that is in no name.
    """
    check_words("layout", options.layout, tuple(FORMATS))
    if not options.members or min(options.members) < 1:
        raise ValueError(f"--members must be numbers of 1 or more; got {options.members or 'nothing'}")
    rows = {f"{form}, {layout}": (form, layout) for form in FORMS for layout in options.layout}
    rows = {name: row for name, row in rows.items() if row[0] != AGAIN}
    check_without(options.without, list(rows), "form")
    rows = {name: row for name, row in rows.items() if not any(word in name for word in options.without)}
    return {FIRST: (BASELINE, "NCHW"), NOISE: (AGAIN, "NCHW"), **rows}


def measure_one(
    options: Options, machine: runtime.Runtime, names: dict[str, tuple[str, str]], count: int
) -> tuple[list[Row], dict[str, Any]]:
    """Rows of an ensemble of `count`, and what else goes into the result file."""
    cases = make_cases(options, count, machine.device)
    works = {
        name: Work(form, layout, cases, machine.threads, options.backend)
        for name, (form, layout) in names.items()
    }
    with conditions.empty_compiler_cache(options.backend, compiles=any("compiled" in name for name in names)):
        makers = {name: partial(ensemble_forms.make_variant, work) for name, work in works.items()}
        ready = measure.prepare(makers, FIRST, allowed_distances(cases[0], train=True))
        seconds = measure.time_steps(
            ready.steps,
            FIRST,
            options.stopping_rule(options.seconds),
            threads=machine.threads,
            turn_seconds=options.turn_seconds,
        )
        looked_at = list(seconds)[: 1 if options.quick else None] if options.memory else []
        kind = machine.device.type
        peaks = {
            name: memory.peak_bytes(alone, options, count, *names[name], device=kind) for name in looked_at
        }
    rows = report.rows(
        seconds,
        FIRST,
        images=count * options.batch,
        flops=count * options.batch * networks.flops_per_image(cases[0], train=True),
        compile_seconds=measure.compile_seconds(ready.first_call, seconds),
        peak_bytes=peaks,
    )
    return rows, {"seconds": seconds, "skipped": ready.skipped}


def make_cases(options: Options, count: int, device: torch.device) -> tuple[Case, ...]:
    """As many networks, each with its own parameters and batch."""
    return tuple(
        networks.make_case(options.model, options.batch, options.size, device, seed=2 * member)
        for member in range(count)
    )


def alone(options: Options, count: int, form: str, layout: str) -> Callable[[], Any]:
    """A form's step in a process of its own."""
    machine = conditions.set_up_alone(options.device, options.threads)
    cases = make_cases(options, count, machine.device)
    return ensemble_forms.make_variant(Work(form, layout, cases, machine.threads, options.backend)).step


def publish(
    options: Options, where: dict[str, Any], count: int, rows: list[Row], raw: dict[str, Any]
) -> None:
    """Table, result file and picture of one ensemble."""
    title = (
        f"{count} of {options.model}, training step, batch {options.batch} each, "
        f"{options.size} px{options.toy_note}"
    )
    report.publish(
        replace(options, members=(count,)),
        where,
        f"ensembles-{networks.slug(options.model)}-k{count}-n{options.batch}-{options.size}px",
        {"figures": report.as_json(rows), **raw},
        tables=[report.as_table(title, rows, "one by one")],
        notes=report.left_out(raw["skipped"]),
        draw=lambda path: report.draw_bars(path, title, where, rows, STYLE),
    )


STYLE = report.Bars(
    NOISE,
    "time of a step of all / one after another, eager, NCHW (shorter is faster; 95 % intervals)",
    COLOURS,
    group=lambda name: next(group for group in COLOURS if name.startswith(group)),
)
