"""A training step, and inference, every way it can be written, as a ratio to the eager module.

    uv run --extra bench python -m benchmarks throughput --model resnet20 --batch 128

All variants run in one process under one allocator and take turns in an order that reverses every round. Each
starts from the same parameters on the same batch, and what its first step computes is checked against the
eager module's before anything is timed. Compilation is timed apart, with empty caches; peak memory too, each
variant in a fresh process. FLOPs are the model's: two a multiply-accumulate, three forward passes a training
step. With more than 64 pixels torchvision's networks have their own stem and 1000 classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from benchmarks.forms import networks, variants
from benchmarks.forms.step import AGAIN, BASELINE, FORMATS, JAX, Setting, Spec, allowed_distances
from benchmarks.harness import conditions, measure, memory, pictures, report
from benchmarks.harness.options import Compared, check_words, toy
from benchmarks.harness.report import Row
from benchmarks.harness.statistics import Seconds, ratio
from resnet_func.app import runtime
from resnet_func.machine import has_bf16

COLOURS = {
    "module": pictures.ORANGE,
    "function": pictures.SKY,
    "function, compiled": pictures.BLUE,
    "module, compiled": pictures.PURPLE,
    "function, Winograd": pictures.YELLOW,
    "function, compiled, Winograd": pictures.BLACK,
    "JAX": pictures.GREEN,
}


@dataclass(frozen=True)
class Options(Compared):
    """Measure a training step, or inference, of every form, layout and precision."""

    task: str = "training"
    """training or inference."""
    dtype: tuple[str, ...] = ("auto",)
    """fp32, bf16 (autocast) or both; auto is fp32, and bf16 where the hardware multiplies it."""
    layout: tuple[str, ...] = ("NCHW", "channels_last")
    """Of images and convolution weights."""
    ema: bool = True
    """Whether the step keeps a moving average of parameters and running statistics."""


def run(options: Options) -> None:
    """Measure, print the table, write the result file and the picture.

    Raises:
        ValueError: options that cannot be.
        Disagreement: a variant computes something else.
    """
    options = toy(options)
    check(options)
    machine = conditions.set_up(options.device, options.threads)
    case = networks.make_case(options.model, options.batch, options.size, machine.device)
    wanted = select(options, machine)
    where = conditions.capture(machine)
    compiles = any("compiled" in spec.form for spec in wanted)
    with conditions.empty_compiler_cache(setting(options).backend, compiles=compiles):
        makers = {spec.name: partial(variants.make_variant, spec, case, setting(options)) for spec in wanted}
        ready = measure.prepare(
            makers, BASELINE.name, allowed_distances(case, train=options.task == "training")
        )
        seconds = measure.time_steps(
            ready.steps,
            BASELINE.name,
            options.stopping_rule(options.seconds),
            threads=machine.threads,
            turn_seconds=options.turn_seconds,
        )
        timed = [spec for spec in wanted if spec.name in seconds]
        looked_at = timed[: 1 if options.quick else None] if options.memory else []
        peaks = look_at_memory(options, looked_at, machine)
    flops = networks.flops_per_image(case, train=options.task == "training") * options.batch
    rows = report.rows(
        seconds,
        BASELINE.name,
        images=options.batch,
        flops=flops,
        compile_seconds=measure.compile_seconds(ready.first_call, seconds),
        peak_bytes=peaks,
    )
    publish(options, where, rows, seconds, ready.skipped)


def check(options: Options) -> None:
    """Refuse words that no option has."""
    check_words("task", (options.task,), ("training", "inference"))
    check_words("dtype", options.dtype, ("auto", "fp32", "bf16"))
    check_words("layout", options.layout, tuple(FORMATS))


def setting(options: Options) -> Setting:
    return Setting(options.task == "training", options.ema, options.backend)


def select(options: Options, machine: runtime.Runtime) -> list[Spec]:
    """The rows; bf16 by itself only where it is not emulated."""
    dtypes = options.dtype
    if "auto" in dtypes:
        dtypes = ("fp32", "bf16") if has_bf16(machine.device) else ("fp32",)
    return variants.specs(
        train=options.task == "training",
        layouts=options.layout,
        dtypes=dtypes,
        device=str(machine.device),
        without=options.without,
    )


# --------------------------------------------------------------------------- memory


def look_at_memory(options: Options, timed: list[Spec], machine: runtime.Runtime) -> dict[str, int | None]:
    """Peak bytes of every variant that was timed; JAX's allocator on a GPU cannot be asked like torch's."""
    peaks = {}
    for spec in timed:
        if spec.form == JAX and machine.device.type == "cuda":
            continue
        peaks[spec.name] = memory.peak_bytes(prepare_alone, options, spec, device=machine.device.type)
        measure.progress.print(f"{spec.name}: peak {(peaks[spec.name] or 0) / 1e6:,.0f} MB")
    return peaks


def prepare_alone(options: Options, spec: Spec) -> Callable[[], Any]:
    """The variant's step in a process of its own."""
    machine = conditions.set_up_alone(options.device, options.threads)
    case = networks.make_case(options.model, options.batch, options.size, machine.device)
    return variants.make_variant(spec, case, setting(options)).step


# --------------------------------------------------------------------------- results


def publish(
    options: Options, where: dict[str, Any], rows: list[Row], seconds: Seconds, skipped: dict[str, str]
) -> None:
    """Table, result file and picture; in words, the fastest function against the fastest of the others."""
    title = f"{options.model}, {options.task}, batch {options.batch}, {options.size} px{options.toy_note}"
    bests = against_the_function(seconds)
    ratios = ["{:.2f} ({:.2f}-{:.2f})".format(*best["ratio"]) for best in bests]
    compared = [
        f"{best['function']} / {best['other']}: {text}" for best, text in zip(bests, ratios, strict=True)
    ]
    report.publish(
        options,
        where,
        f"throughput-{networks.slug(options.model)}-n{options.batch}-{options.size}px-{options.task}",
        {
            "figures": report.as_json(rows),
            "best": [best | {"ratio": best["ratio"]._asdict()} for best in bests],
            "seconds": seconds,
            "skipped": skipped,
        },
        tables=[report.as_table(title, rows, "module")],
        notes=[*report.left_out(skipped), *compared],
        draw=lambda path: report.draw_bars(path, title, where, rows, STYLE),
    )


def against_the_function(seconds: Seconds) -> list[dict[str, Any]]:
    """The fastest function of each precision against the fastest module and the fastest JAX of the same."""
    found = []
    for dtype in ("fp32", "bf16"):
        fastest = {}
        for kind in ("function", "module", JAX):
            rows = [row for row in seconds if row.startswith(kind) and row.endswith(dtype)]
            timed = [row for row in rows if row != AGAIN.name]
            if timed:
                fastest[kind] = min(timed, key=lambda row: float(np.median(seconds[row])))
        for kind in ("module", JAX):
            if "function" in fastest and kind in fastest:
                ours, other = fastest["function"], fastest[kind]
                found.append(
                    {"function": ours, "other": other, "ratio": ratio(seconds[ours], seconds[other])}
                )
    return found


def group(name: str) -> str:
    if name.startswith(JAX):
        return "JAX"
    kind = name.split()[0].rstrip(",")
    kind = f"{kind}, compiled" if "compiled" in name else kind
    return f"{kind}, Winograd" if "Winograd" in name else kind


STYLE = report.Bars(
    AGAIN.name,
    "time of a step / module eager, NCHW, fp32 (shorter is faster; bars: 95 % intervals)",
    COLOURS,
    group,
)
