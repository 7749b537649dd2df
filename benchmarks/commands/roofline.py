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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor

import resnet_func as rf
from benchmarks.harness import conditions, peaks, pictures, report
from benchmarks.harness.measure import Disagreement
from benchmarks.harness.operations import (
    KINDS,
    Operation,
    bytes_of,
    flops_of,
    kind_of,
    make_call,
    operations,
    what_of,
)
from benchmarks.harness.options import Threaded
from benchmarks.harness.peaks import Peaks, median_seconds
from benchmarks.harness.roofline_picture import picture
from resnet_func.app import runtime
from resnet_func.autodiff import value_and_grad
from resnet_func.losses import cross_entropy
from resnet_func.models.config import ResNetConfig
from resnet_func.models.layers import Conv, Linear
from resnet_func.train import autocast, to_memory_format

REST = "the rest: dispatch, the loss"
SHOWN_ROWS = 25


@dataclass(frozen=True)
class Options(Threaded):
    """Time every layer of a training step, and draw it under the machine's roofs."""

    model: str = "resnet18"
    """A network of the zoo."""
    batch: int = 32
    """Images a step."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """3x3 and 10 classes, or 7x7, max-pool and 1000 classes."""
    norm: Literal["batch", "group", "none"] = "batch"
    """Normalisation."""
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
    config, machine = prepare(options)
    print(runtime.describe(machine))
    where = conditions.capture(machine)
    best = peaks.measure(machine.device, quick=options.quick)
    result = {"peaks": best._asdict()} | measure(options, config, machine, best)
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


def prepare(options: Options) -> tuple[ResNetConfig, runtime.Runtime]:
    """The network, and threads, allocator and device of this process.

    Raises:
        ValueError: an option is out of range, or names what is not here.
    """
    for name in ("batch", "size"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be 1 or more; got {getattr(options, name)}. Leave it out for 32")
    if ":" in options.model:
        raise ValueError(f"roofline knows the operations of the zoo's networks only; got {options.model}")
    classes = 10 if options.stem == "cifar" else 1000
    config = rf.zoo.config(options.model, stem=options.stem, norm=options.norm, num_classes=classes)
    ops = [op for _, op in operations(config, options.batch, options.size)]
    values = min(op.shape[0] * op.shape[2] * op.shape[3] for op in ops if len(op.shape) == 4)
    if options.norm == "batch" and values == 1:
        raise ValueError("batch normalisation needs more than one value a channel. Try batch=2")
    machine = runtime.configure(
        device=options.device,
        threads=options.threads,
        precision=options.dtype,
        memory_format=options.layout,
        compile="off",
    )
    return config, machine


# --------------------------------------------------------------------------- measuring


def measure(options: Options, config: ResNetConfig, machine: runtime.Runtime, best: Peaks) -> dict[str, Any]:
    """The whole step, the rows of its distinct operations, and seconds by stage and kind."""
    steps = operations(config, options.batch, options.size, casts=options.dtype == "bf16")
    step = make_step(options, config, machine)
    step()
    enough = 0.0 if options.quick else 3.0
    before = median_seconds(step, enough)
    with torch.autocast(machine.device.type, torch.bfloat16, enabled=options.dtype == "bf16"):
        distinct = dict.fromkeys(op for _, op in steps)
        calls = ((op, make_call(op, options.dtype, machine)) for op in distinct)  # one alive at a time
        times = {op: median_seconds(call, 0.0 if options.quick else 0.3) for op, call in calls}
    after = median_seconds(step, enough)
    seconds = (before + after) / 2  # the machine may have drifted meanwhile
    counts, first = Counter(op for _, op in steps), dict(reversed([(op, path) for path, op in steps]))
    rows = [row_of(op, counts[op], first[op], times[op], seconds, options.dtype, best) for op in times]
    stages: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(KINDS, 0.0))
    for path, op in steps:
        stages[stage_of(path, config)][kind_of(op)] += times[op]
    rows.sort(key=lambda row: -row["share"])
    whole = summary(options, steps, rows, seconds, best) | {"noise_seconds": abs(after - before)}
    return {"step": whole, "operations": rows, "stages": stages}


def stage_of(path: str, config: ResNetConfig) -> str:
    """stem, layer1, ..., head; where blocks are pre-activated, the norm outside them is the last one."""
    first = path.split(".")[0]
    if first.startswith("layer"):
        return first
    return "head" if first == "fc" or (first == "bn1" and config.block == "preact") else "stem"


def row_of(
    op: Operation, count: int, path: str, seconds: float, step: float, dtype: str, best: Peaks
) -> dict[str, Any]:
    """One operation's figures; `seconds` are of one of its `count` occurrences, the share is of all."""
    flops, moved = flops_of(op), bytes_of(op, peaks.DTYPES[dtype].itemsize)
    return {
        "layer": path,
        "what": what_of(op),
        "phase": op.phase,
        "kind": kind_of(op),
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
    """The whole step: `flops` of convolutions and linear layers; the rest is what no operation explains."""
    flops = sum(flops_of(op) for _, op in steps if isinstance(op.layer, Conv | Linear))
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


def make_step(options: Options, config: ResNetConfig, machine: runtime.Runtime) -> Callable[[], Any]:
    """Forward and backward of the mean loss, as `resnet_func.train` does it, without the optimizer."""
    model, generator = rf.build(config), torch.Generator().manual_seed(0)
    params, state = model.init(generator, device=machine.device)
    params = to_memory_format(params, machine.memory_format)
    x = torch.randn(options.batch, config.in_channels, options.size, options.size, generator=generator)
    x = x.to(machine.device, memory_format=machine.memory_format)
    y = torch.randint(config.num_classes, (options.batch,), generator=generator).to(machine.device)
    model = autocast(model, machine.device.type, torch.bfloat16) if options.dtype == "bf16" else model

    def loss(params: Any) -> tuple[Tensor, Any]:
        logits, new_state = model.apply(params, state, x, train=True)
        return cross_entropy(logits, y).mean(), new_state

    return lambda: value_and_grad(loss, params)


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
    return (
        f"{options.model}, {stem} stem, {norm}: batch {options.batch}, {options.size} px, "
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
    return "-".join(["roofline", options.model, *(word for word, departs in departures.items() if departs)])
