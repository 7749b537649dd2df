"""Every way of every convolution that minimal filtering or a matrix product can do, against what was chosen.

    uv run python -m benchmarks winograd --model resnet18 --batch 32

Times are of one convolution with both of its gradients, in float32, channels_last. The ways take turns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.forms import networks
from benchmarks.harness import conditions, markdown, measure, report
from benchmarks.harness.options import Threaded, toy
from resnet_func import calibration
from resnet_func.calibration import Speeds
from resnet_func.models import winograd

DEFINITION = "definition"
WAYS = (DEFINITION, "tile 2", "tile 4", "product")
CHOOSERS = ("chosen", "typical", DEFINITION)
SIGNATURE = inspect.signature(winograd.convolution)  # F.conv2d itself has none


@dataclass(frozen=True)
class Options(Threaded):
    """Measure what choosing Winograd's algorithm by speeds gains, and what it costs where it is wrong."""

    batch: int = 32
    """Images a step."""
    seconds: float = 3.0
    """Of timing for each kind of convolution."""


class _Shapes(TorchFunctionMode):
    """Counts the kinds of convolutions that have another way."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[tuple[int, ...], tuple[int, ...], int], int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.conv2d:
            bound = SIGNATURE.bind(*args, **(kwargs or {}))
            bound.apply_defaults()
            of = bound.arguments
            stride, padding, dilation = (_number(of[name]) for name in ("stride", "padding", "dilation"))
            form = (*of["weight"].shape[2:], padding, dilation, of["groups"])
            if form == (1, 1, 0, 1, 1) or (form == (3, 3, 1, 1, 1) and stride == 1):
                kind = (tuple(of["input"].shape), tuple(of["weight"].shape), stride)
                self.found[kind] = self.found.get(kind, 0) + 1
        return func(*args, **(kwargs or {}))


def _number(pair: Any) -> Any:
    """Two equal numbers as one."""
    return pair[0] if isinstance(pair, tuple) and len(set(pair)) == 1 else pair


def run(options: Options) -> None:
    """Measure, print the table, and write the result file.

    Raises:
        ValueError: no such network, or none of its convolutions has another way.
    """
    options = toy(options)
    machine = conditions.set_up("cpu", options.threads)
    case = networks.make_case(options.model, options.batch, options.size)
    with _Shapes() as shapes, torch.no_grad():
        case.model.apply(case.params, case.state, case.x, train=False)
    if not shapes.found:
        raise ValueError(f"{options.model} has no 3x3 convolution of stride 1 with padding, and no 1x1")
    speeds, rows = calibration.measured("cpu", torch.float32), []
    rule = options.stopping_rule(options.seconds)
    for (image, filters, stride), times in shapes.found.items():
        steps = make_steps(image, filters, stride)
        seconds = measure.time_steps(
            steps, DEFINITION, rule, threads=machine.threads, turn_seconds=options.turn_seconds
        )
        row: dict[str, Any] = {"image": image, "filters": filters, "stride": stride, "times": times}
        row |= {name: float(np.median(of)) * 1e3 for name, of in seconds.items()}
        rows.append(row | {"chosen": choose(row, speeds), "typical": choose(row, calibration.TYPICAL)})
    title = f"{case.name}, batch {options.batch}, {options.size} px: a convolution with its gradients, ms"
    report.publish(
        options,
        conditions.capture(machine),
        f"winograd-{networks.slug(options.model)}-n{options.batch}-{options.size}px",
        {"layers": rows, "speeds": speeds.as_numbers()},
        tables=[as_table(f"{title}{options.toy_note}", rows)],
        notes=[speeds.describe(), as_sentence(rows)],
    )


def make_steps(image: Sequence[int], filters: Sequence[int], stride: int) -> dict[str, Callable[[], Any]]:
    """A convolution with both gradients, by each way that can do it."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(*image, generator=draw).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(*filters, generator=draw).requires_grad_()
    ways: dict[str, Callable[[], Tensor]]
    if filters[2] == 1:
        ways = {
            DEFINITION: lambda: F.conv2d(x, weight, stride=stride),
            "product": lambda: winograd.as_product(x, weight, (stride, stride)),
        }
    else:
        ways = {
            DEFINITION: lambda: F.conv2d(x, weight, padding=1),
            "tile 2": lambda: winograd.conv2d(x, weight, 2),
            "tile 4": lambda: winograd.conv2d(x, weight, 4),
        }
    out = torch.randn_like(ways[DEFINITION]())
    return {name: lambda way=way: torch.autograd.grad(way(), (x, weight), out) for name, way in ways.items()}


def choose(row: Mapping[str, Any], speeds: Speeds) -> str:
    """The way that `winograd.wrap` takes in training with these speeds."""
    n, c_in, height, width = row["image"]
    c_out, _, kernel, _ = row["filters"]
    if kernel == 1:
        side = -(-height // row["stride"]), -(-width // row["stride"])
        return "product" if winograd.product_pays(c_in, c_out, *side, speeds) else DEFINITION
    tile = winograd.cheapest_tile(n, c_in, c_out, height, width, speeds)
    return f"tile {tile}" if tile else DEFINITION


# --------------------------------------------------------------------------- results


def regret(rows: Sequence[Mapping[str, Any]], by: str) -> float:
    """Time of what was chosen over that of the best, of all convolutions together; by definition alone, too.

    >>> row = {"times": 2, "definition": 3.0, "tile 4": 2.0, "chosen": "tile 4"}
    >>> regret([row], "chosen"), regret([row], "definition")
    (1.0, 1.5)
    """
    taken = sum(row["times"] * row[by if by == DEFINITION else row[by]] for row in rows)
    best = sum(row["times"] * min(row[way] for way in WAYS if way in row) for row in rows)
    return taken / best


def as_sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    words = ("by the machine's speeds", "by constants", "never")
    found = [f"{word} {regret(rows, by):.3f}" for word, by in zip(words, CHOOSERS, strict=True)]
    return f"time / the best way's, where minimal filtering is chosen: {', '.join(found)}"


def table_rows(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A line for each kind of convolution."""
    found = []
    for row in rows:
        c_out, c_in, kernel, _ = row["filters"]
        what = f"{kernel}x{kernel}, {c_in} to {c_out}, {row['image'][2]} px, stride {row['stride']}"
        times = [f"{row[way]:.2f}" if way in row else "" for way in WAYS]
        found.append([what, str(row["times"]), *times, row["chosen"], f"{regret([row], 'chosen'):.2f}"])
    return found


HEADS = ("convolution", "times", *WAYS, "chosen", "chosen / best")


def as_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(*HEADS, title=title, title_justify="left")
    for cells in table_rows(rows):
        table.add_row(*cells)
    return table


def section(contents: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """The tables of RESULTS.md, one for each machine."""
    lines = []
    for machine, content in contents:
        lines += [f"{machine}, milliseconds; {as_sentence(content['layers'])}.", ""]
        lines += markdown.table(HEADS, table_rows(content["layers"]))
    return lines
