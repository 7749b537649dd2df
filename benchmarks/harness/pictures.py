"""The pictures of results: bars with intervals against a baseline, and lines of throughput."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.harness.statistics import Ratio
from resnet_func import files

DPI = 150
GREY, BAND = "#595959", "#d9d9d9"
# Okabe and Ito's colours, distinct to every kind of colour vision
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"
YELLOW, BLACK = "#E69F00", "#000000"
MARKERS = "os^DvP"


class Bar(NamedTuple):
    """One bar: its length with an interval, what to print after it, and the group whose colour it has."""

    name: str
    ratio: Ratio
    note: str
    group: str


def bars(
    path: Path,
    bars: Sequence[Bar],
    *,
    title: str,
    subtitle: str,
    xlabel: str,
    colours: Mapping[str, str],
    noise: Ratio | None = None,
) -> None:
    """Draw horizontal bars, the shortest on top, with a line at 1 and the noise floor as a grey band.

    Args:
        path: The PNG to write.
        bars: In any order.
        title, subtitle: Above.
        xlabel: What the length is.
        colours: Of each group; the legend names the groups that are there.
        noise: The interval of the baseline against itself.
    """
    ordered = sorted(bars, key=lambda bar: -bar.ratio.median)
    figure, axes = _figure(9.5, 1.7 + 0.34 * len(bars), title, subtitle)
    if noise is not None:
        axes.axvspan(noise.low, noise.high, color=BAND, linewidth=0, zorder=0, label="noise floor")
    axes.axvline(1, color="black", linewidth=1.2, zorder=1)
    longest = max(1.0, *(bar.ratio.high for bar in bars))
    seen: set[str] = set()
    for y, bar in enumerate(ordered):
        median, low, high = bar.ratio
        label = bar.group if bar.group not in seen else "_"
        seen.add(bar.group)
        axes.barh(y, median, height=0.66, color=colours[bar.group], zorder=2, label=label)
        error = [[max(0.0, median - low)], [max(0.0, high - median)]]
        axes.errorbar(median, y, xerr=error, color="black", linewidth=1.1, capsize=2.5, zorder=3)
        note = axes.text(max(high, median) + 0.012 * longest, y, bar.note, va="center", fontsize=8.5)
        note.set_path_effects([withStroke(linewidth=3, foreground="white")])
    axes.set_yticks(range(len(ordered)), [bar.name for bar in ordered], fontsize=9)
    axes.set_ylim(-0.6, len(ordered) - 0.4)
    # room for the notes, whose letters take a hundredth of the width each
    axes.set_xlim(0, max(max(bar.ratio[0], bar.ratio.high) / (0.97 - 0.0098 * len(bar.note)) for bar in bars))
    axes.set_xlabel(xlabel, fontsize=10)
    axes.grid(axis="x", color="#ebebeb", linewidth=0.8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    _legend(figure, axes)
    save(figure, path)


class Line(NamedTuple):
    """A series of throughput: `x`, the median, and the quartiles around it."""

    name: str
    x: Sequence[float]
    middle: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


class Panel(NamedTuple):
    """One set of axes; `ideal` draws what proportional growth from the best first point would be."""

    title: str
    xlabel: str
    lines: Sequence[Line]
    ideal: bool = False


def lines(
    path: Path, panels: Sequence[Panel], *, title: str, subtitle: str, colours: Mapping[str, str]
) -> None:
    """Draw throughput over a logarithmic axis, a panel beside the other, each line named once below."""
    figure = _sheet(5.4 * len(panels) + 0.6, 5.2, title, subtitle)
    for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        _draw_panel(axes, panel, colours)
    axes = figure.axes[0]
    axes.set_ylabel("images / second", fontsize=10)
    _legend(figure, axes)
    save(figure, path)


def _draw_panel(axes: Axes, panel: Panel, colours: Mapping[str, str]) -> None:
    for line, marker in zip(panel.lines, MARKERS * len(panel.lines), strict=False):
        colour = colours[line.name]
        axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(line.x, line.middle, marker=marker, markersize=5, color=colour, label=line.name)
    ticks = sorted({x for line in panel.lines for x in line.x})
    if panel.ideal and panel.lines:
        first = max(line.middle[0] for line in panel.lines if line.x[0] == ticks[0])
        proportional = [first * x / ticks[0] for x in ticks]
        axes.plot(ticks, proportional, "--", color=GREY, linewidth=1, label="in proportion")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_title(panel.title, loc="left", fontsize=10.5)
    axes.set_xlabel(panel.xlabel, fontsize=10)
    axes.grid(color="#ebebeb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _figure(width: float, height: float, title: str, subtitle: str) -> tuple[Figure, Axes]:
    figure = _sheet(width, height, title, subtitle)
    return figure, figure.subplots()


def _sheet(width: float, height: float, title: str, subtitle: str) -> Figure:
    """An empty figure of this size in inches, with two lines of text in its left corner."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained")
    wrapped = textwrap.wrap(subtitle, int(13 * width))
    top = 1 - (0.72 + 0.17 * (len(wrapped) - 1)) / height
    layout: Any = figure.get_layout_engine()
    layout.set(rect=(0, 0, 1, top))
    figure.text(0.012, 1 - 0.12 / height, title, ha="left", va="top", fontsize=12.5, fontweight="bold")
    text = "\n".join(wrapped)
    figure.text(0.012, 1 - 0.40 / height, text, ha="left", va="top", fontsize=9, color=GREY)
    return figure


def _legend(figure: Figure, axes: Axes) -> None:
    """One row below all axes, of every label that is there."""
    handles = {}
    for one in figure.axes or [axes]:
        handles.update(dict(zip(*reversed(one.get_legend_handles_labels()), strict=True)))
    shown = {label: handle for label, handle in handles.items() if not label.startswith("_")}
    letters = 11 * figure.get_size_inches()[0]  # that fit beside each other
    columns = max(1, min(len(shown), int(letters / (6 + max(map(len, shown))))))
    figure.legend(
        shown.values(), shown.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )


def save(figure: Figure, path: Path) -> None:
    """Write the PNG whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    files.write_whole(path, buffer.getvalue())
