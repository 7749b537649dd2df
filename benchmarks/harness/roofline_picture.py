"""The roofline as a picture: every operation under the machine's roofs, and the time of each stage."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from benchmarks.harness.operations import KINDS
from benchmarks.harness.peaks import Peaks
from benchmarks.harness.pictures import DPI

COLOURS = {  # Okabe and Ito's: distinct to every kind of colour vision
    "forward": "#0072B2",
    "input gradient": "#56B4E9",
    "weight gradient": "#009E73",
    "attention": "#D55E00",
    "normalisation": "#E69F00",
    "elementwise": "#CC79A7",
    "rest": "#B0B0B0",
}
REST = "the rest: dispatch, the loss"
NUMBERED = 12
NUMBER: dict[str, Any] = {"fontsize": 8.5, "color": "white", "ha": "center", "va": "center", "weight": "bold"}

Numbers = NDArray[np.float64]


def picture(result: dict[str, Any], heading: str, dtype: str) -> Figure:
    """The roofline, and beside it the time of each stage in the same colours, under a heading."""
    rows, step = result["operations"], result["step"]
    figure = Figure(figsize=(15, 7.4), dpi=DPI, layout="constrained", facecolor="white")
    figure.suptitle(heading, x=0.01, ha="left", fontsize=11)
    panels = figure.subplot_mosaic(
        [["roof", "stages"], ["roof", "key"]], width_ratios=(2, 1), height_ratios=(1.1, 1)
    )
    draw_operations(panels["roof"], rows)
    draw_roofs(panels["roof"], Peaks(**result["peaks"]), dtype)
    draw_stages(panels["stages"], result["stages"], step)
    draw_key(panels["key"], rows)
    shares = {kind: sum(row["share"] for row in rows if row["kind"] == kind) for kind in KINDS}
    shares = {kind: share for kind, share in shares.items() if share} | {
        "rest": step["rest_seconds"] / step["seconds"]
    }
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
    axes.text(1.1 * low, 1.06 * top, peaks_text, va="bottom", **text)  # on the left no bubble is as high
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
