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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.forms import networks, variants
from benchmarks.forms.variants import AGAIN, BASELINE, JAX, Setting, Spec
from benchmarks.harness import conditions, measure, memory, pictures, report
from benchmarks.harness.conditions import check_words
from benchmarks.harness.report import RESULTS, Row
from benchmarks.harness.statistics import Rule, Seconds, ratio
from parity import environment
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
class Options:
    """Measure a training step, or inference, of every form, layout and precision."""

    model: str = "resnet20"
    """A network of the zoo."""
    batch: int = 128
    """Images a step."""
    size: int = 32
    """Side of the images in pixels; up to 64 torchvision's networks get the CIFAR stem."""
    task: str = "training"
    """training or inference."""
    dtype: tuple[str, ...] = ("auto",)
    """fp32, bf16 (autocast) or both; auto is fp32, and bf16 where the hardware multiplies it."""
    layout: tuple[str, ...] = ("NCHW", "channels_last")
    """Of images and convolution weights."""
    threads: int | None = None
    """Inside one operation, on the CPU; as many as torch takes if left out."""
    device: str = "auto"
    """auto, cpu or cuda."""
    ema: bool = True
    """Whether the step keeps a moving average of parameters and running statistics."""
    without: tuple[str, ...] = ()
    """Leave out the variants whose names contain one of these words, such as compiled or JAX."""
    memory: bool = True
    """Whether to look at peak memory, each variant in a fresh process."""
    seconds: float = 300.0
    """Time after which timing stops, if the interquartile ranges are not under 10 % before."""
    quick: bool = False
    """A toy: resnet8, 4 images of 8 pixels, traced without generating code. No measurement."""
    write: bool = True
    """Whether to write the result file and the picture."""
    results: Path = RESULTS
    """The folder for both."""


def run(options: Options) -> None:
    """Measure, print the table, write the result file and the picture.

    Raises:
        ValueError: options that cannot be.
        Disagreement: a variant computes something else.
    """
    options = toy(options) if options.quick else options
    check(options)
    machine = conditions.set_up(options.device, options.threads)
    case = networks.make_case(options.model, options.batch, options.size, machine.device)
    wanted = select(options, machine)
    where = environment.capture(str(machine.device)) | {"allocator": machine.allocator}
    rule = conditions.QUICK if options.quick else Rule(seconds=options.seconds)
    compiles = any("compiled" in spec.form for spec in wanted)
    with conditions.empty_compiler_cache(setting(options).backend, compiles=compiles):
        makers = {spec.name: partial(variants.make_variant, spec, case, setting(options)) for spec in wanted}
        ready = measure.prepare(makers, BASELINE.name)
        seconds = measure.time_steps(
            ready.steps,
            BASELINE.name,
            rule,
            threads=machine.threads,
            turn_seconds=1e-3 if options.quick else 0.1,
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
    publish(options, machine, where, rows, {"seconds": seconds, "skipped": ready.skipped})


def toy(options: Options) -> Options:
    return replace(options, model=networks.TOY, batch=4, size=8)


def check(options: Options) -> None:
    """Refuse words that no option has."""
    check_words("task", (options.task,), ("training", "inference"))
    check_words("dtype", options.dtype, ("auto", "fp32", "bf16"))
    check_words("layout", options.layout, tuple(variants.FORMATS))


def setting(options: Options) -> Setting:
    return Setting(
        options.task == "training", options.ema, conditions.QUICK_BACKEND if options.quick else "inductor"
    )


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
    options: Options, machine: runtime.Runtime, where: dict[str, Any], rows: list[Row], raw: dict[str, Any]
) -> None:
    title = (
        f"{options.model}, {options.task}, batch {options.batch}, {options.size} px"
        f"{', toy run' if options.quick else ''}"
    )
    report.show(report.as_table(title, rows, "module"))
    for name, reason in raw["skipped"].items():
        report.say(f"left out: {name}: {reason}")
    bests = against_the_function(raw["seconds"])
    for best in bests:
        median, low, high = best["ratio"]
        report.say(f"{best['function']} / {best['other']}: {median:.2f} ({low:.2f}-{high:.2f})")
    if not options.write:
        return
    stem = f"throughput-{options.model}-n{options.batch}-{options.size}px-{options.task}"
    path = options.results / f"{stem}-{environment.machine(str(machine.device))}.json"
    noise = next(row.ratio for row in rows if row.name == AGAIN.name)
    pictures.bars(
        path.with_suffix(".png"),
        [
            pictures.Bar(
                row.name,
                row.ratio,
                f"{row.ratio.median:.2f}   {report.rate(row.images_per_second)} img/s",
                group(row),
            )
            for row in rows
            if row.name != AGAIN.name
        ],
        title=title,
        subtitle=conditions.describe(where),
        xlabel="time of a step / module eager, NCHW, fp32 (shorter is faster; bars: 95 % intervals)",
        colours=COLOURS,
        noise=noise,
    )
    report.write(
        path,
        {
            "options": vars(options),
            "environment": where,
            "figures": report.as_json(rows),
            "best": [best | {"ratio": best["ratio"]._asdict()} for best in bests],
            **raw,
        },
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


def group(row: Row) -> str:
    if row.name.startswith(JAX):
        return "JAX"
    kind = row.name.split()[0].rstrip(",")
    kind = f"{kind}, compiled" if "compiled" in row.name else kind
    return f"{kind}, Winograd" if "Winograd" in row.name else kind
