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
from pathlib import Path
from typing import Any

import torch

from benchmarks.forms import ensemble_forms, networks
from benchmarks.forms.ensemble_forms import AGAIN, BASELINE, FORMS, Work
from benchmarks.forms.networks import Case
from benchmarks.forms.variants import FORMATS
from benchmarks.harness import conditions, measure, memory, pictures, report
from benchmarks.harness.conditions import check_words
from benchmarks.harness.report import RESULTS, Row
from benchmarks.harness.statistics import Rule
from parity import environment
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
class Options:
    """Measure the training step of K networks, by vmap and otherwise."""

    model: str = "resnet20"
    """A network of the zoo."""
    members: tuple[int, ...] = (4, 16)
    """Networks in an ensemble; each number is measured apart."""
    batch: int = 64
    """Images a step, of each network."""
    size: int = 32
    """Side of the images in pixels; up to 64 torchvision's networks get the CIFAR stem."""
    layout: tuple[str, ...] = ("NCHW", "channels_last")
    """Of images and convolution weights."""
    threads: int | None = None
    """Inside one operation, or side by side, on the CPU; as many as torch takes if left out."""
    device: str = "auto"
    """auto, cpu or cuda."""
    without: tuple[str, ...] = ()
    """Leave out the forms whose names contain one of these words, such as compiled."""
    memory: bool = True
    """Whether to look at peak memory, each form in a fresh process."""
    seconds: float = 300.0
    """Time after which timing stops, if the interquartile ranges are not under 10 % before."""
    quick: bool = False
    """A toy: two of resnet8, 2 images of 8 pixels, traced without generating code. No measurement."""
    write: bool = True
    """Whether to write the result file and the picture."""
    results: Path = RESULTS
    """The folder for both."""


def run(options: Options) -> None:
    """Measure, print a table, write a result file and a picture for each number of networks.

    Raises:
        ValueError: options that cannot be.
        Disagreement: a form computes something else.
    """
    if options.quick:
        options = replace(options, model=networks.TOY, members=(2,), batch=2, size=8)
    names = select(options)
    machine = conditions.set_up(options.device, options.threads)
    for count in options.members:
        where = environment.capture(str(machine.device)) | {"allocator": machine.allocator}
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
    lost = [word for word in options.without if not any(word in name for name in rows)]
    if lost:
        raise ValueError(f"no form has {', '.join(lost)} in its name; there are {'; '.join(rows)}")
    rows = {name: row for name, row in rows.items() if not any(word in name for word in options.without)}
    return {FIRST: (BASELINE, "NCHW"), NOISE: (AGAIN, "NCHW"), **rows}


def measure_one(
    options: Options, machine: runtime.Runtime, names: dict[str, tuple[str, str]], count: int
) -> tuple[list[Row], dict[str, Any]]:
    """Rows of an ensemble of `count`, and what else goes into the result file."""
    backend = conditions.QUICK_BACKEND if options.quick else "inductor"
    cases = make_cases(options, count, machine.device)
    works = {
        name: Work(form, layout, cases, machine.threads, backend) for name, (form, layout) in names.items()
    }
    rule = conditions.QUICK if options.quick else Rule(seconds=options.seconds)
    with conditions.empty_compiler_cache(backend, compiles=any("compiled" in name for name in names)):
        makers = {name: partial(ensemble_forms.make_variant, work) for name, work in works.items()}
        ready = measure.prepare(makers, FIRST)
        turn = 1e-3 if options.quick else 0.1
        seconds = measure.time_steps(ready.steps, FIRST, rule, threads=machine.threads, turn_seconds=turn)
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
    backend = conditions.QUICK_BACKEND if options.quick else "inductor"
    cases = make_cases(options, count, machine.device)
    return ensemble_forms.make_variant(Work(form, layout, cases, machine.threads, backend)).step


def publish(
    options: Options, where: dict[str, Any], count: int, rows: list[Row], raw: dict[str, Any]
) -> None:
    toy = ", toy run" if options.quick else ""
    title = f"{count} of {options.model}, training step, batch {options.batch} each, {options.size} px{toy}"
    report.show(report.as_table(title, rows, "one by one"))
    for name, reason in raw["skipped"].items():
        report.say(f"left out: {name}: {reason}")
    if not options.write:
        return
    stem = f"ensembles-{options.model}-k{count}-n{options.batch}-{options.size}px"
    path = options.results / f"{stem}-{environment.machine(where['device'])}.json"
    pictures.bars(
        path.with_suffix(".png"),
        [as_bar(row) for row in rows if row.name != NOISE],
        title=title,
        subtitle=conditions.describe(where),
        xlabel="time of a step of all / one after another, eager, NCHW (shorter is faster; 95 % intervals)",
        colours=COLOURS,
        noise=next(row.ratio for row in rows if row.name == NOISE),
    )
    options = replace(options, members=(count,))
    report.write(
        path, {"options": vars(options), "environment": where, "figures": report.as_json(rows), **raw}
    )


def as_bar(row: Row) -> pictures.Bar:
    note = f"{row.ratio.median:.2f}   {report.rate(row.images_per_second)} img/s"
    group = next(group for group in COLOURS if row.name.startswith(group))
    return pictures.Bar(row.name, row.ratio, note, group)
