"""The picture of a spectrum: how many eigenvalues there are, and where."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from resnet_func.app.output.canvas import GREY, make_figure, save, say
from resnet_func.curvature import Spectrum

POSITIVE, NEGATIVE = "#0072B2", "#D55E00"
POINTS = 2000
WIDTH = 0.005  # of a node, as a share of the axis
LABELLED = 5


def draw(spectrum: Spectrum, path: Path, title: str) -> None:
    """Draw the density of the eigenvalues, the negative ones in another colour, the extremes labelled.

    Args:
        spectrum: From `curvature.spectrum`.
        path: The PNG to write.
        title: Above the picture.
    """
    figure = make_figure(9, 4.8, title)
    axes = figure.subplots()
    low, high = min(float(spectrum.smallest()), 0.0), max(float(spectrum.largest()), 0.0)
    span = high - low
    if not np.isfinite(span) or span == 0:
        say(axes, "every eigenvalue is zero" if span == 0 else "the loss has no finite curvature here")
        save(figure, path)
        return
    places = torch.linspace(low - 0.04 * span, high + 0.08 * span, POINTS, dtype=torch.float64)
    floor, values = 0.3, places.numpy()
    for part, colour in ((spectrum, POSITIVE), (spectrum.negative_part(), NEGATIVE)):
        # how many eigenvalues a hundredth of the axis holds
        counts = (part.density(places, WIDTH * span) * spectrum.dim * span / 100).numpy()
        axes.fill_between(values, floor, np.maximum(counts, floor), color=colour, linewidth=0)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.minorticks_off()
    axes.set_ylim(floor, 3 * max(spectrum.dim, 10))
    axes.set_xlim(values[0], values[-1])
    axes.axvline(0, color=GREY, linewidth=0.8, linestyle=":")
    _label_extremes(axes, spectrum, span)
    axes.set_xlabel("eigenvalue: curvature of the loss along a direction")
    axes.set_ylabel("eigenvalues in 1/100 of the span (about)")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def _label_extremes(axes: Axes, spectrum: Spectrum, span: float) -> None:
    """A tick at each of the few largest eigenvalues and the smallest; a number where there is room."""
    largest, smallest = spectrum.largest(LABELLED).tolist(), float(spectrum.smallest())
    height, last = axes.get_ylim()[1], float("inf")
    marks = [(value, POSITIVE) for value in largest if value > 0.02 * span]
    if smallest < -0.02 * span:
        marks.append((smallest, NEGATIVE))
    for value, colour in marks:
        axes.plot(value, 1.3, marker="v", markersize=7, color=colour, markeredgecolor="white", zorder=3)
        if last - value > 0.05 * span:
            axes.annotate(
                f"{value:.3g}", (value, 1.3), (0, 10), textcoords="offset points", ha="center", fontsize=10
            )
            last = value
    share = spectrum.negative_share()
    colour = NEGATIVE if share > 0 else GREY
    axes.text(0, height / 1.6, f" {share:.1%} clearly below zero", color=colour, fontsize=10, va="top")
