"""Where the time of a training step goes, layer by layer, against what the machine can do.

    uv run python -m benchmarks.roofline --model resnet18 --batch 32

The model of Williams, Waterman and Patterson (2009): a kernel of intensity I, in FLOP per byte, does at most
`min(peak, I * bandwidth)` FLOP/s. Every distinct operation of forward and backward pass is timed alone, at
its real shape, eager, and beside their sum stands the whole step. FLOPs are the model's, two for each
multiply-accumulate: what an implementation computes again does not count. Bytes are the least that can move:
what goes in and out, once. Timed alone, a small layer finds its data in the cache, and may pass the roof.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

import resnet_func as rf
from benchmarks import environment, peaks
from benchmarks.peaks import Peaks, median_seconds
from resnet_func import runtime
from resnet_func.config import ResNetConfig
from resnet_func.layers import (
    BatchNorm,
    Conv,
    GroupNorm,
    LayerSpec,
    Linear,
    Pad,
    apply_layer,
    global_average_pool,
    init_layer,
)
from resnet_func.losses import cross_entropy
from resnet_func.resnet import layer_specs
from resnet_func.train import arrange, autocast

RESULTS = Path(__file__).parent / "results"
KINDS = ("forward", "input gradient", "weight gradient", "normalisation", "elementwise")
COLOURS = {  # Okabe and Ito's: distinct to every kind of colour vision
    "forward": "#0072B2",
    "input gradient": "#56B4E9",
    "weight gradient": "#009E73",
    "normalisation": "#E69F00",
    "elementwise": "#CC79A7",
    "rest": "#B0B0B0",
}
REST = "the rest: dispatch, the loss"
NAMES = {BatchNorm: "batch norm", GroupNorm: "group norm", Pad: "pad"}
DPI, SHOWN_ROWS, NUMBERED = 130, 25, 12
NUMBER: dict[str, Any] = {"fontsize": 8.5, "color": "white", "ha": "center", "va": "center", "weight": "bold"}
# For points on the picture alone: no one counts them to a model's FLOPs. Forward: the mean, the variance
# about it, and y = x * scale + shift; backward: two sums over g, and dx from g, x and the two.
NORM_FLOPS = {"forward": 6, "backward": 8}


@dataclass(frozen=True)
class Options:
    """Time every layer of a training step, and draw it under the machine's roofs."""

    model: str = "resnet18"
    """A network of the zoo."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """3x3 and 10 classes, or 7x7, max-pool and 1000 classes."""
    batch: int = 32
    """Images a step."""
    size: int = 32
    """Side of the images in pixels."""
    norm: Literal["batch", "group", "none"] = "batch"
    """Normalisation."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the activations; bf16 is autocast over fp32 parameters."""
    layout: Literal["channels_last", "contiguous"] = "channels_last"
    """Of images and convolution weights."""
    threads: int | None = None
    """Threads of an operation on the CPU; as many as torch takes if left out."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to measure."""
    quick: bool = False
    """A look in seconds, not a measurement."""
    write: bool = True
    """Whether to write the result file and the picture."""
    results: Path = RESULTS
    """The folder for both."""


Numbers = NDArray[np.float64]
Phase = Literal["forward", "backward", "input gradient", "weight gradient"]


class Operation(NamedTuple):
    """What one layer does in one phase, for an input `shape`; equal ones are timed once."""

    layer: LayerSpec | Literal["relu", "add", "max pool", "average pool", "cast"]
    shape: tuple[int, ...]
    phase: Phase


Steps = Iterator[tuple[str, Operation]]  # each with the dotted path of its layer


def main() -> None:
    """Measure, print the table, write the result file and the picture."""
    run(tyro.cli(Options))


def run(options: Options) -> None:
    """Measure, print, write; wrong options exit with 2 and one line."""
    try:
        config, machine = prepare(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(runtime.describe(machine))
    where = environment.capture(str(machine.device)) | {"allocator": machine.allocator}
    best = peaks.measure(machine.device, quick=options.quick)
    result = {"options": vars(options) | {"results": options.results.name}, "environment": where}
    result |= {"peaks": best._asdict()} | measure(options, config, machine, best)
    console = Console()
    console.width = max(console.width, 150)  # in a file or a pipe too
    console.print(as_table(options, result))
    console.print(as_sentence(result["step"]), highlight=False)
    if options.write:
        write(options, result)


def prepare(options: Options) -> tuple[ResNetConfig, runtime.Runtime]:
    """The network, and threads, allocator and device of this process.

    Raises:
        ValueError: an option is out of range, or names what is not here.
    """
    for name in ("batch", "size"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be 1 or more; got {getattr(options, name)}. Leave it out for 32")
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


# --------------------------------------------------------------------------- what a step does


def operations(
    config: ResNetConfig, batch: int, size: int, *, casts: bool = False
) -> list[tuple[str, Operation]]:
    """Every operation of forward and backward pass with its layer's path; the loss is left out.

    With `casts` the weights' casts, which autocast makes once a step, and those of their gradients.
    """
    specs = layer_specs(config)
    preact, x = config.block == "preact", (batch, config.in_channels, size, size)
    steps = _trained("conv1", specs["conv1"], x)
    found = [(path, op) for path, op in steps if op.phase != "input gradient"]  # nobody asks for the images'
    x = _after(specs["conv1"], x)
    found += [] if preact else _norm_relu("bn1", specs, x)
    if config.stem == "imagenet":
        found += _both("conv1.pool", "max pool", x)
        x = _after_pool(x)
    for stage in (name for name in specs if name.startswith("layer")):
        for index, block in specs[stage].items():
            found += _block(f"{stage}.{index}", block, x, preact)
            x = _after(block["conv2"], _after(block["conv1"], x))
            x = _after(block["conv3"], x) if "conv3" in block else x
    found += _norm_relu("bn1", specs, x) if preact else []
    found += [*_both("fc.pool", "average pool", x), *_trained("fc", specs["fc"], x[:2])]
    return [(path, op) for path, op in found if casts or op.layer != "cast"]


def _block(path: str, block: dict[str, Any], x: tuple[int, ...], preact: bool) -> Steps:
    y, last = x, "conv3" if "conv3" in block else "conv2"
    for name, spec in block.items():
        at = f"{path}.{name}"
        if isinstance(spec, dict):
            yield from _trained(f"{at}.0", spec["0"], x)
            yield from _both(f"{at}.1", spec["1"], y) if "1" in spec else ()
        elif isinstance(spec, Conv):
            yield from _both(f"{at}.relu", "relu", y) if preact else ()
            yield from _trained(at, spec, y)
            y = _after(spec, y)
            yield from _both(f"{at}.relu", "relu", y) if name != last and not preact else ()
        else:
            yield from _both(at, spec, x if isinstance(spec, Pad) else y)
    yield f"{path}.add", Operation("add", y, "forward")
    # its own gradient is the cotangent as it is; but the two of the block's input are added up
    yield f"{path}.branch", Operation("add", x, "forward")
    yield from () if preact else _both(f"{path}.relu", "relu", y)


def _norm_relu(name: str, specs: dict[str, Any], x: tuple[int, ...]) -> Steps:
    yield from _both(name, specs[name], x) if name in specs else ()
    yield from _both(f"{name}.relu", "relu", x)


def _trained(path: str, spec: Conv | Linear, x: tuple[int, ...]) -> Steps:
    weight = spec.weight_shape if isinstance(spec, Conv) else (spec.c_out, spec.c_in)
    for phase in ("forward", "input gradient", "weight gradient"):
        yield path, Operation(spec, x, phase)
    yield from _both(f"{path}.cast", "cast", weight)


def _both(path: str, layer: Any, x: tuple[int, ...]) -> Steps:
    yield path, Operation(layer, x, "forward")
    yield path, Operation(layer, x, "backward")


def _after(spec: Conv, x: tuple[int, ...]) -> tuple[int, ...]:
    return (x[0], spec.c_out, spec.output_size(x[2]), spec.output_size(x[3]))


def _after_pool(x: tuple[int, ...]) -> tuple[int, ...]:
    return (*x[:2], (x[2] - 1) // 2 + 1, (x[3] - 1) // 2 + 1)  # 3x3, stride 2, padding 1


def kind_of(op: Operation) -> str:
    """One of `KINDS`; pooling, padding and casts count as elementwise."""
    if isinstance(op.layer, BatchNorm | GroupNorm):
        return "normalisation"
    return op.phase if isinstance(op.layer, Conv | Linear) else "elementwise"


def flops_of(op: Operation) -> int:
    """Two for each multiply-accumulate of convolutions and linear layers; else a nominal few an element."""
    match op.layer:
        case Conv() as spec:
            return 2 * prod(_after(spec, op.shape)) * prod(spec.weight_shape[1:])
        case Linear() as spec:
            return 2 * op.shape[0] * spec.c_in * spec.c_out
        case BatchNorm() | GroupNorm():
            return NORM_FLOPS[op.phase] * prod(op.shape)
        case _:
            return prod(op.shape)


def bytes_of(op: Operation, itemsize: int) -> int:
    """The least bytes that move: inputs, outputs and weights once; pixels that a stride skips do not."""
    x = prod(op.shape)
    match op.layer:
        case Conv() as spec:
            y, weight = prod(_after(spec, op.shape)), prod(spec.weight_shape)
            read = min(x, y // spec.c_out * spec.c_in * spec.kernel**2)
            return itemsize * (weight + y + (x if op.phase == "input gradient" else read))
        case Linear() as spec:
            return itemsize * (x + op.shape[0] * spec.c_out + spec.c_in * spec.c_out)
        case BatchNorm() | GroupNorm():  # x and y; x, the cotangent and dx; affine parameters are fp32
            return (
                2 * itemsize * x + 8 * op.shape[1]
                if op.phase == "forward"
                else 3 * itemsize * x + 12 * op.shape[1]
            )
        case Pad() as spec:
            kept = x // spec.stride**2
            return itemsize * (kept + (kept * spec.c_out // spec.c_in if op.phase == "forward" else x))
        case "max pool":  # keeps the index of each maximum, in 8 bytes
            return itemsize * x + (itemsize + 8) * prod(_after_pool(op.shape))
        case "average pool":
            return itemsize * (x + prod(op.shape[:2]))
        case "cast":
            return (4 + itemsize) * x
        case "relu":
            return itemsize * x * (2 if op.phase == "forward" else 3)
        case _:
            return itemsize * x * 3


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
    seconds = (before + median_seconds(step, enough)) / 2  # the machine may have drifted meanwhile
    counts, first = Counter(op for _, op in steps), dict(reversed([(op, path) for path, op in steps]))
    rows = [row_of(op, counts[op], first[op], times[op], seconds, options.dtype, best) for op in times]
    stages: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(KINDS, 0.0))
    for path, op in steps:
        stages[stage_of(path, config)][kind_of(op)] += times[op]
    rows.sort(key=lambda row: -row["share"])
    return {"step": summary(options, steps, rows, seconds, best), "operations": rows, "stages": stages}


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


def what_of(op: Operation) -> str:
    """The layer and its input in a few words, such as `conv 3x3/2 64→128, 32 px`."""
    side = f", {op.shape[2]} px" if len(op.shape) == 4 else ""
    match op.layer:
        case Conv() as spec:
            stride = f"/{spec.stride}" if spec.stride > 1 else ""
            return f"conv {spec.kernel}x{spec.kernel}{stride} {spec.c_in}→{spec.c_out}{side}"
        case Linear() as spec:
            return f"linear {spec.c_in}→{spec.c_out}"
        case "cast":
            return f"cast of a weight {'x'.join(map(str, op.shape))}"
        case str() as name:
            return f"{name} {op.shape[1]}{side}"
        case spec:
            return f"{NAMES[type(spec)]} {op.shape[1]}{side}"


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
    params = arrange(params, machine.memory_format)
    x = torch.randn(options.batch, config.in_channels, options.size, options.size, generator=generator)
    x = x.to(machine.device, memory_format=machine.memory_format)
    y = torch.randint(config.num_classes, (options.batch,), generator=generator).to(machine.device)
    model = autocast(model, machine.device.type, torch.bfloat16) if options.dtype == "bf16" else model

    def loss(params: Any) -> tuple[Tensor, Any]:
        logits, new_state = model.apply(params, state, x, train=True)
        return cross_entropy(logits, y).mean(), new_state

    gradient = torch.func.grad(loss, has_aux=True)
    return lambda: gradient(params)


def make_call(op: Operation, dtype: str, machine: runtime.Runtime) -> Callable[[], Any]:
    """One operation on random tensors; a backward phase computes the gradients that it names."""
    generator = torch.Generator().manual_seed(0)

    def place(leaf: Tensor, dtype: torch.dtype) -> Tensor:
        leaf = leaf.to(machine.device, dtype)
        leaf = leaf.contiguous(memory_format=machine.memory_format) if leaf.ndim == 4 else leaf
        return leaf.requires_grad_()

    narrow = peaks.DTYPES[dtype]
    x = torch.randn(op.shape, generator=generator)
    if op.layer == "cast":
        source, target = (torch.float32, narrow) if op.phase == "forward" else (narrow, torch.float32)
        x = place(x, source).detach()
        return lambda: x.to(target)
    x, params, state = place(x, narrow), {}, {}
    if not isinstance(op.layer, str):
        # autocast leaves the parameters of normalisation as they are
        wide = isinstance(op.layer, BatchNorm | GroupNorm)
        params, state = init_layer(op.layer, generator, generator.device)
        params = {name: place(leaf, torch.float32 if wide else narrow) for name, leaf in params.items()}
        state = {name: leaf.to(machine.device) for name, leaf in state.items()}
    run = make_forward(op, params, state, x)
    if op.phase == "forward":
        return run
    y = run()
    leaves = {"input gradient": [x], "weight gradient": [*params.values()]}.get(
        op.phase, [x, *params.values()]
    )
    cotangent = torch.randn_like(y)
    # As torch.func.grad asks for it: some kernels, GroupNorm's, are others where a graph is to be kept.
    return lambda: torch.autograd.grad(y, leaves, cotangent, create_graph=True)


def make_forward(op: Operation, params: Any, state: Any, x: Tensor) -> Callable[[], Tensor]:
    match op.layer:
        case "relu":
            return lambda: F.relu(x)
        case "add":
            other = torch.randn_like(x)
            return lambda: x + other
        case "max pool":
            return lambda: F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        case "average pool":
            return lambda: global_average_pool(x)
        case spec:
            assert not isinstance(spec, str)
            return lambda: apply_layer(spec, params, state, x, train=True)[0]


# --------------------------------------------------------------------------- showing


def as_sentence(step: Mapping[str, Any]) -> str:
    """The whole step in one line."""
    return (
        f"{step['seconds'] * 1e3:.4g} ms a step: {step['images_per_second']:,.4g} images/s, "
        f"{step['flops_per_second'] / 1e12:.3g} TFLOP/s of the model "
        f"({step['gemm_share']:.0%} of the GEMM peak, {step['conv_share']:.0%} of the conv peak), "
        f"{step['bytes_per_second'] / 1e9:.3g} GB/s at least"
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


def write(options: Options, result: dict[str, Any]) -> None:
    """roofline-MODEL-MACHINE.json and .png; the name says what departs from the defaults."""
    departures = {
        "group": options.norm == "group",
        "no-norm": options.norm == "none",
        f"{options.size}px": options.size != Options.size,
        options.dtype: options.dtype != Options.dtype,
        options.layout: options.layout != Options.layout,
        "quick": options.quick,
    }
    name = "-".join(["roofline", options.model, *(word for word, departs in departures.items() if departs)])
    path = options.results / f"{name}-{environment.machine(result['environment']['device'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    picture(options, result).savefig(path.with_suffix(".png"), dpi=DPI)
    print(f"written: {path.name} and .png")


def picture(options: Options, result: dict[str, Any]) -> Figure:
    """The roofline, and beside it the time of each stage in the same colours."""
    rows, machine, step = result["operations"], result["environment"], result["step"]
    figure = Figure(figsize=(15, 7.4), dpi=DPI, layout="constrained", facecolor="white")
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    cpu = f"{machine['cpu']} ({machine['vector_extensions']}, {threads})"
    where = f"{cpu if machine['device'] == 'cpu' else machine['gpu']}, torch {machine['torch']}"
    text = f"{title_of(options)}\n{where}\n{as_sentence(step)}"
    figure.suptitle(text, x=0.01, ha="left", fontsize=11)
    panels = figure.subplot_mosaic(
        [["roof", "stages"], ["roof", "key"]], width_ratios=(2, 1), height_ratios=(1.1, 1)
    )
    draw_operations(panels["roof"], rows)
    draw_roofs(panels["roof"], Peaks(**result["peaks"]), options.dtype)
    draw_stages(panels["stages"], result["stages"], step)
    draw_key(panels["key"], rows)
    shares = {kind: sum(row["share"] for row in rows if row["kind"] == kind) for kind in KINDS}
    shares |= {"rest": step["rest_seconds"] / step["seconds"]}
    handles = [Patch(color=COLOURS[kind], label=f"{kind}  {share:.0%}") for kind, share in shares.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=10)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # numbers are placed by pixels: nothing moves from here on
    draw_numbers(panels["roof"], rows)
    return figure


def draw_operations(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """A bubble for each operation, where its intensity and its rate put it."""
    axes.scatter(
        [row["intensity"] for row in rows],
        [row["flops_per_second"] / 1e9 for row in rows],
        [area_of(row) for row in rows],
        [COLOURS[row["kind"]] for row in rows],
        alpha=0.8,
        edgecolors="white",
        linewidths=0.7,
    )
    axes.set(xscale="log", yscale="log", xlabel="intensity, FLOP per byte", ylabel="GFLOP/s")
    axes.set_title(
        "Operations under the roofs of the machine; area: share of the step's time", loc="left", fontsize=10
    )
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def area_of(row: dict[str, Any]) -> float:
    return max(8.0, 7000 * row["share"])  # square points


def draw_roofs(axes: Axes, best: Peaks, dtype: str) -> None:
    """The slopes of memory and cache, and the two peaks."""
    (low, high), (bottom, above), top = axes.get_xlim(), axes.get_ylim(), best.compute(dtype) / 1e9
    low, high, line = low / 1.5, high * 1.5, {"color": "#404040", "linewidth": 1.2}
    text: dict[str, Any] = {"fontsize": 9, "color": "#404040"}
    for name, rate, style in (("memory", best.memory / 1e9, "-"), ("cache", best.cache / 1e9, ":")):
        axes.plot([low, top / rate], [low * rate, top], style, **line)
        x, y = 1.2 * low, 1.2 * 1.15 * low * rate
        # the direction in data units there, turned as the logarithmic axes turn it
        along = {"rotation": math.degrees(math.atan2(y, x)), "transform_rotates_text": True}
        axes.text(x, y, f"{name} {rate:,.3g} GB/s", rotation_mode="anchor", **along, **text)
    for rate, style in ((best.conv[dtype], "-"), (best.gemm[dtype], "--")):
        axes.plot([rate / best.cache, high], [rate / 1e9] * 2, style, **line)
    conv, gemm = best.conv[dtype] / 1e9, best.gemm[dtype] / 1e9
    peaks_text = f"convolution {conv:,.4g} GFLOP/s (solid), GEMM {gemm:,.4g} GFLOP/s (dashed)"
    axes.text(high, 1.06 * top, peaks_text, ha="right", va="bottom", **text)
    axes.set(xlim=(low, high), ylim=(min(bottom, 0.8 * low * best.memory / 1e9), max(above, 1.6 * top)))


def draw_numbers(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Number the operations that take longest, inside their bubbles, away from the other numbers."""
    points = axes.transData.transform([(row["intensity"], row["flops_per_second"] / 1e9) for row in rows])
    angles = np.linspace(0, 2 * math.pi, 12, endpoint=False)
    circle = np.concatenate([np.zeros((1, 2)), np.stack([np.cos(angles), np.sin(angles)], 1)])
    taken: list[Numbers] = []
    for number, (row, point) in enumerate(zip(rows[:NUMBERED], points, strict=False), 1):
        radius = DPI / 72 * (area_of(row) / math.pi) ** 0.5
        places = point + 0.6 * radius * circle  # the middle first
        away = [min([np.hypot(*(place - other)) for other in taken] + [DPI / 7]) for place in places]
        place = places[int(np.argmax(away))]
        taken.append(place)
        x, y = axes.transData.inverted().transform(place)
        text = axes.text(x, y, f"{number}", **NUMBER)
        text.set_path_effects([withStroke(linewidth=2, foreground="#303030")])


def draw_key(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """What the numbers stand for."""
    axes.set_axis_off()
    axes.set_title("What takes longest", loc="left", fontsize=10)
    for number, row in enumerate(rows[:NUMBERED], 1):
        y = 1 - (number - 0.5) / NUMBERED
        axes.plot(
            0.02, y, "s", color=COLOURS[row["kind"]], markersize=7, transform=axes.transAxes, clip_on=False
        )
        times = f" ×{row['count']}" if row["count"] > 1 else ""
        cells = (
            (0.1, "right", f"{number}"),
            (0.13, "left", row["what"] + times),
            (0.67, "left", row["phase"]),
        )
        for x, ha, text in (*cells, (1.0, "right", f"{row['share']:.1%}")):
            axes.text(x, y, text, ha=ha, va="center", fontsize=9, transform=axes.transAxes)


def draw_stages(axes: Axes, stages: dict[str, dict[str, float]], step: dict[str, float]) -> None:
    """Milliseconds of each stage by kind, from the stem down, and what the operations leave."""
    bars = {stage: {**times} for stage, times in stages.items()} | {"rest": {"rest": step["rest_seconds"]}}
    names, widest = list(bars), max(sum(times.values()) for times in bars.values()) * 1e3
    for row, times in enumerate(bars.values()):
        start = 0.0
        for kind, seconds in times.items():
            axes.barh(row, seconds * 1e3, 0.7, start, color=COLOURS[kind], edgecolor="white", linewidth=0.5)
            start += seconds * 1e3
        share = start / 1e3 / step["seconds"]
        amount = f"{start:,.3g}" if abs(start) < 100 else f"{start:,.0f}"
        axes.text(max(start, 0) + 0.015 * widest, row, f"{amount} ms, {share:.0%}", va="center", fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(right=1.3 * widest)
    axes.set_xlabel("milliseconds of a step")
    axes.set_title("Where the time goes", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
