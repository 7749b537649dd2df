"""Products with a batch's Hessian and Gauss-Newton matrix, against curvlinops and JAX.

    uv run --extra bench python -m benchmarks curvature --model resnet20 --batch 64

All forms run in one process, interleaved, and must give the same product before anything is timed. The ratios
are to our product, eager; the row of the gradient says what a product costs in gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from benchmarks.forms import curvature_forms, networks
from benchmarks.forms.curvature_forms import AGAIN, BASELINE, FORMS, PRODUCTS, Work
from benchmarks.harness import conditions, measure, memory, pictures, report
from benchmarks.harness.options import Compared, check_without, check_words, toy
from benchmarks.harness.report import Row
from resnet_func.app import runtime

GRADIENT = "the gradient, eager"
COLOURS = {
    "ours": pictures.BLUE,
    "curvlinops": pictures.ORANGE,
    "JAX": pictures.GREEN,
    "the gradient": pictures.PURPLE,
}
TITLES = {"hessian": "Hessian product", "ggn": "Gauss-Newton product"}


@dataclass(frozen=True)
class Options(Compared):
    """Measure products with the Hessian and the Gauss-Newton matrix."""

    product: tuple[str, ...] = ("hessian", "ggn")
    """Of which matrix; each is measured apart."""
    batch: int = 64
    """Images in the batch."""


def run(options: Options) -> None:
    """Measure, print a table, write a result file and a picture for each product.

    Raises:
        ValueError: options that cannot be.
        Disagreement: a form computes something else.
    """
    options = toy(options)
    check_words("product", options.product, tuple(PRODUCTS))
    forms = select(options)
    machine = conditions.set_up(options.device, options.threads)
    for product in options.product:
        where = conditions.capture(machine)
        rows, raw = measure_one(options, machine, forms, product)
        publish(options, where, product, rows, raw)


def select(options: Options) -> list[str]:
    """The forms that are not left out.

    Raises:
        ValueError: a word of `without` that is in no name.
    """
    names = [form for form in (*FORMS, GRADIENT) if form not in (BASELINE, AGAIN)]
    check_without(options.without, names, "form")
    return [BASELINE, AGAIN, *(n for n in names if not any(word in n for word in options.without))]


def measure_one(
    options: Options, machine: runtime.Runtime, forms: list[str], product: str
) -> tuple[list[Row], dict[str, Any]]:
    """Rows of one product, and what else goes into the result file."""
    case = networks.make_case(options.model, options.batch, options.size, machine.device)
    direction = curvature_forms.make_direction(case)
    works = {
        form: Work(form, product, case, direction, options.backend) for form in forms if form != GRADIENT
    }
    with conditions.empty_compiler_cache(options.backend, compiles=any("compiled" in form for form in forms)):
        makers = {form: partial(curvature_forms.make_variant, work) for form, work in works.items()}
        ready = measure.prepare(makers, BASELINE, curvature_forms.allowed_distances(works[BASELINE]))
        gradient = {GRADIENT: curvature_forms.make_gradient(case)} if GRADIENT in forms else {}
        seconds = measure.time_steps(
            {**ready.steps, **gradient},
            BASELINE,
            options.stopping_rule(options.seconds),
            threads=machine.threads,
            turn_seconds=options.turn_seconds,
        )
        looked_at = list(seconds)[: 1 if options.quick else None] if options.memory else []
        kind = machine.device.type
        peaks = {form: memory.peak_bytes(alone, options, product, form, device=kind) for form in looked_at}
    rows = report.rows(
        seconds,
        BASELINE,
        images=options.batch,
        compile_seconds=measure.compile_seconds(ready.first_call, {n: seconds[n] for n in ready.steps}),
        peak_bytes=peaks,
    )
    return rows, {"seconds": seconds, "skipped": ready.skipped}


def alone(options: Options, product: str, form: str) -> Callable[[], Any]:
    """A form in a process of its own."""
    machine = conditions.set_up_alone(options.device, options.threads)
    case = networks.make_case(options.model, options.batch, options.size, machine.device)
    if form == GRADIENT:
        return curvature_forms.make_gradient(case)
    direction = curvature_forms.make_direction(case)
    return curvature_forms.make_variant(Work(form, product, case, direction, options.backend)).step


def publish(
    options: Options, where: dict[str, Any], product: str, rows: list[Row], raw: dict[str, Any]
) -> None:
    """Table, result file and picture of one product."""
    title = (
        f"{TITLES[product]} of {options.model}, batch {options.batch}, {options.size} px{options.toy_note}"
    )
    report.publish(
        replace(options, product=(product,)),
        where,
        f"curvature-{options.model}-n{options.batch}-{options.size}px-{product}",
        {"figures": report.as_json(rows), **raw},
        tables=[report.as_table(title, rows, "ours")],
        notes=report.left_out(raw["skipped"]),
        draw=lambda path: report.draw_bars(path, title, where, rows, STYLE),
    )


STYLE = report.Bars(
    AGAIN,
    "time of a product / ours, eager (shorter is faster; 95 % intervals)",
    COLOURS,
    group=lambda name: next(group for group in COLOURS if name.startswith(group)),
)
