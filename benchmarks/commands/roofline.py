"""Where the time of a training step goes, layer by layer, against what the machine can do.

    uv run python -m benchmarks roofline --model resnet18 --batch 32

The model of Williams, Waterman and Patterson (2009): a kernel of intensity I, in FLOP per byte, does at most
`min(peak, I * bandwidth)` FLOP/s. Every distinct operation of forward and backward pass is timed alone, at
its real shape, eager, and beside their sum stands the whole step. FLOPs are the model's, two for each
multiply-accumulate: what an implementation computes again does not count. Bytes are the least that can move:
what goes in and out, once. Timed alone, a small layer finds its data in the cache, and may pass the roof.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor

from benchmarks.forms import networks
from benchmarks.harness import conditions, peaks, pictures, report
from benchmarks.harness.measure import Disagreement
from benchmarks.harness.operations import (
    KINDS,
    Operation,
    bytes_of,
    flops_of,
    make_call,
    operations,
)
from benchmarks.harness.options import Threaded
from benchmarks.harness.peaks import Peaks, median_seconds
from benchmarks.harness.roofline_picture import picture
from resnet_func.app import runtime
from resnet_func.autodiff import value_and_grad
from resnet_func.losses import cross_entropy
from resnet_func.train import autocast, to_memory_format

REST = "the rest: dispatch, the loss"
SHOWN_ROWS = 25


@dataclass(frozen=True)
class Options(Threaded):
    """Time every layer of a training step, and draw it under the machine's roofs."""

    model: str = "resnet18"
    """A network of the zoo, torchvision:NAME, timm:NAME, FILE.py:CALLABLE or pkg.mod:CALLABLE."""
    batch: int = 32
    """Images a step."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """3x3 and 10 classes, or 7x7, max-pool and 1000 classes; of the zoo's networks."""
    norm: Literal["batch", "group", "none"] = "batch"
    """Normalisation of the zoo's networks."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the activations; bf16 is autocast over fp32 parameters."""
    layout: Literal["channels_last", "contiguous"] = "channels_last"
    """Of images and convolution weights."""


def run(options: Options) -> None:
    """Measure, print the table, write the result file and the picture.

    Raises:
        ValueError: options that cannot be.
        Disagreement: the parts come to more than the whole.
    """
    case, machine = prepare(options)
    print(runtime.describe(machine))
    where = conditions.capture(machine)
    best = peaks.measure(machine.device, quick=options.quick)
    result = {"peaks": best._asdict()} | measure(options, case, machine, best)
    if not options.quick:
        check_parts(result["step"])
    heading = "\n".join([title_of(options), conditions.describe(where), as_sentence(result["step"])])
    report.publish(
        options,
        where,
        stem_of(options),
        result,
        tables=[as_table(options, result)],
        notes=[as_sentence(result["step"])],
        draw=lambda path: pictures.save(picture(result, heading, options.dtype), path),
    )


def prepare(options: Options) -> tuple[networks.Case, runtime.Runtime]:
    """The network with a batch as the step takes them; threads, allocator and device of this process.

    Raises:
        ValueError: an option is out of range, or names what is not here.
    """
    for name in ("batch", "size"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be 1 or more; got {getattr(options, name)}. Leave it out for 32")
    changes: dict[str, Any] = {"stem": options.stem, "norm": options.norm}
    changes |= {"num_classes": 10 if options.stem == "cifar" else 1000}
    if ":" in options.model:
        if (options.stem, options.norm) != (Options.stem, Options.norm):
            raise ValueError(f"stem and norm are of the zoo's networks; {options.model} has its own")
        changes = {}
    machine = runtime.configure(
        device=options.device,
        threads=options.threads,
        precision=options.dtype,
        memory_format=options.layout,
        compile="off",
    )
    case = networks.make_case(options.model, options.batch, options.size, machine.device, **changes)
    model = case.model
    return case._replace(
        model=autocast(model, machine.device.type, torch.bfloat16) if options.dtype == "bf16" else model,
        params=to_memory_format(case.params, machine.memory_format),
        x=case.x.contiguous(memory_format=machine.memory_format),
    ), machine


# --------------------------------------------------------------------------- measuring


def measure(options: Options, case: networks.Case, machine: runtime.Runtime, best: Peaks) -> dict[str, Any]:
    """The whole step, the rows of its distinct operations, and seconds by stage and kind."""
    network = (case.model, case.params, case.state, case.x)
    steps = operations(*network, casts=options.dtype == "bf16")
    step = make_step(case)
    step()
    enough = 0.0 if options.quick else 3.0
    before = median_seconds(step, enough)
    with torch.autocast(machine.device.type, torch.bfloat16, enabled=options.dtype == "bf16"):
        distinct = dict.fromkeys(op for _, op in steps)
        calls = ((op, make_call(op, machine.device)) for op in distinct)  # one alive at a time
        times = {op: median_seconds(call, 0.0 if options.quick else 0.3) for op, call in calls}
    after = median_seconds(step, enough)
    seconds = (before + after) / 2  # the machine may have drifted meanwhile
    counts, first = Counter(op for _, op in steps), dict(reversed([(op, path) for path, op in steps]))
    rows = [row_of(op, counts[op], first[op], times[op], seconds, options.dtype, best) for op in times]
    stages: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(KINDS, 0.0))
    for (_, op), stage in zip(steps, stages_of([path for path, _ in steps]), strict=True):
        stages[stage][op.kind] += times[op]
    rows.sort(key=lambda row: -row["share"])
    whole = summary(options, steps, rows, seconds, best) | {"noise_seconds": abs(after - before)}
    return {"step": whole, "operations": rows, "stages": stages}


def stages_of(paths: Sequence[str]) -> list[str]:
    """The part of the network that each dotted path belongs to, in the order they run.

    A stage's name ends at the first number, and has a layer below it; what has no stage is the stem before
    the first, and the head after it.

    >>> stages_of(["conv1", "layer1.0.conv1", "layer1.0.bn1 relu", "stages.1.blocks.0.norm", "fc"])
    ['stem', 'layer1', 'layer1', 'stages.1', 'head']
    """
    found: list[str] = []
    for path in paths:
        words = path.split()[0].split(".")
        numbered = [index for index, word in enumerate(words[:-1]) if word[-1:].isdigit()]
        outside = "head" if found and found[-1] != "stem" else "stem"
        found.append(".".join(words[: numbered[0] + 1]) if numbered else outside)
    return found


def row_of(
    op: Operation, count: int, path: str, seconds: float, step: float, dtype: str, best: Peaks
) -> dict[str, Any]:
    """One operation's figures; `seconds` are of one of its `count` occurrences, the share is of all."""
    flops, moved = flops_of(op), bytes_of(op)
    return {
        "layer": path,
        "what": op.what,
        "phase": op.phase,
        "kind": op.kind,
        "count": count,
        "seconds": seconds,
        "share": count * seconds / step,
        "flops": flops,
        "bytes": moved,
        "intensity": flops / moved,
        "flops_per_second": flops / seconds,
        "bytes_per_second": moved / seconds,
        "roof_share": flops / seconds / best.roof(dtype, flops / moved),
    }


def summary(
    options: Options,
    steps: list[tuple[str, Operation]],
    rows: list[dict[str, Any]],
    seconds: float,
    best: Peaks,
) -> dict[str, float]:
    """The whole step: `flops` of matrix products; the rest is what no operation explains."""
    flops = sum(flops_of(op) for _, op in steps if op.kind not in ("normalisation", "elementwise"))
    moved = sum(row["count"] * row["bytes"] for row in rows)
    parts = sum(row["count"] * row["seconds"] for row in rows)
    return {
        "seconds": seconds,
        "parts_seconds": parts,
        "rest_seconds": seconds - parts,
        "images_per_second": options.batch / seconds,
        "flops": flops,
        "flops_per_second": flops / seconds,
        "gemm_share": flops / seconds / best.gemm[options.dtype],
        "conv_share": flops / seconds / best.conv[options.dtype],
        "bytes": moved,
        "bytes_per_second": moved / seconds,
    }


def make_step(case: networks.Case) -> Callable[[], Any]:
    """Forward and backward of the mean loss, as `resnet_func.train` does it, without the optimizer."""

    def loss(params: Any) -> tuple[Tensor, Any]:
        logits, new_state = case.model.apply(params, case.state, case.x, train=True)
        return cross_entropy(logits, case.y).mean(), new_state

    return lambda: value_and_grad(loss, case.params)


# --------------------------------------------------------------------------- showing


def as_sentence(step: Mapping[str, Any]) -> str:
    """The whole step in one line."""
    return (
        f"{step['seconds'] * 1e3:.4g} ms a step: {step['images_per_second']:,.4g} images/s, "
        f"{step['flops_per_second'] / 1e12:.3g} TFLOP/s of the model "
        f"({peak_share(step)}), "
        f"{step['bytes_per_second'] / 1e9:.3g} GB/s at least"
    )


def peak_share(step: Mapping[str, Any]) -> str:
    """The step's share of the higher of the two peaks, which is the one that can be reached.

    >>> peak_share({"gemm_share": 1.79, "conv_share": 0.76})
    '76% of the conv peak, the higher of the two'
    """
    share, name = min((step["gemm_share"], "GEMM"), (step["conv_share"], "conv"))
    return f"{share:.0%} of the {name} peak, the higher of the two"


def check_parts(step: Mapping[str, Any]) -> None:
    """Refuse parts that come to more than the whole: they do not run in the step as they do alone.

    Raises:
        Disagreement: the remainder is below 0 by more than the step's own times differ.
    """
    noise = max(step["noise_seconds"], 0.02 * step["seconds"])
    if step["rest_seconds"] < -noise:
        raise Disagreement(
            f"the operations, each timed alone, come to {step['parts_seconds'] / step['seconds']:.0%} of the "
            f"step, whose own times differ by {noise / step['seconds']:.0%}: they do not run in it as they "
            "do alone. The shares are of no use, and nothing is written"
        )


def as_table(options: Options, result: dict[str, Any]) -> Table:
    """The operations by their share of the step's time, and what they leave unexplained."""
    rows, step = result["operations"], result["step"]
    table = Table(title=title_of(options), box=SIMPLE)
    for column in ("first layer", "what", "phase"):
        table.add_column(column, no_wrap=True)
    for column in ("times", "ms each", "share", "FLOP/B", "GFLOP/s", "GB/s", "of roof"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows[:SHOWN_ROWS]:
        numbers = (
            f"{row['count']}",
            f"{row['seconds'] * 1e3:.3f}",
            f"{row['share']:.1%}",
            f"{row['intensity']:.2f}",
            f"{row['flops_per_second'] / 1e9:,.1f}",
            f"{row['bytes_per_second'] / 1e9:,.1f}",
            f"{row['roof_share']:.0%}",
        )
        table.add_row(row["layer"], row["what"], row["phase"], *numbers)
    table.add_section()
    others = sum(row["share"] for row in rows[SHOWN_ROWS:])
    table.add_row("", f"{len(rows[SHOWN_ROWS:])} others", "", "", "", f"{others:.1%}")
    rest = step["rest_seconds"]
    table.add_row("", REST, "", "", f"{rest * 1e3:.3f}", f"{rest / step['seconds']:.1%}")
    return table


def title_of(options: Options) -> str:
    stem = "CIFAR" if options.stem == "cifar" else "ImageNet"
    norm = {"batch": "BatchNorm", "group": "GroupNorm", "none": "no norm"}[options.norm]
    own = "" if ":" in options.model else f", {stem} stem, {norm}"
    return (
        f"{options.model}{own}: batch {options.batch}, {options.size} px, "
        f"{options.dtype}, {options.layout}, eager"
    )


def stem_of(options: Options) -> str:
    """roofline-MODEL, and what departs from the defaults."""
    departures = {
        f"{options.stem}-stem": options.stem != Options.stem,
        "group": options.norm == "group",
        "no-norm": options.norm == "none",
        f"n{options.batch}": options.batch != Options.batch,
        f"{options.size}px": options.size != Options.size,
        options.dtype: options.dtype != Options.dtype,
        options.layout: options.layout != Options.layout,
        "quick": options.quick,
    }
    return "-".join(
        ["roofline", networks.slug(options.model), *(word for word, departs in departures.items() if departs)]
    )
