"""Pictures of scores: the likeliest wrong labels, and the curve of planted ones found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from resnet_func.app.output.canvas import GREY, draw_image, make_figure, save, shorten
from resnet_func.app.output.fonts import drawable

COLUMNS = 8
PLANTED = "#D55E00"
# Okabe and Ito's colours, and two more for as many scores
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7f7f7f")


def suspects(
    images: UInt8[Tensor, "k c h w"],
    given: Int[Tensor, "k"],
    suggested: Int[Tensor, "k"],
    names: Sequence[str],
    classes: Sequence[str],
    path: Path,
    title: str,
    *,
    planted: Bool[Tensor, "k"] | None = None,
) -> None:
    """Draw images in a grid, the most suspicious first: the label each has, and the one suggested.

    Args:
        images: [K, C, H, W], uint8, K at least 1.
        given, suggested: Class indices [K].
        names: What a user knows each image by.
        classes: Names of the classes.
        path: The PNG to write.
        title: Above the grid.
        planted: Which labels were planted; they get a frame.
    """
    classes = [drawable(name) for name in classes]
    rows = -(-len(images) // COLUMNS)
    figure = make_figure(1.55 * COLUMNS, 0.9 + 1.95 * rows, title)
    grid = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for axes in grid:
        axes.set_axis_off()
    for place, (axes, image) in enumerate(zip(grid, images, strict=False)):
        draw_image(axes, image)
        label, other = (shorten(classes[int(of[place])], 13) for of in (given, suggested))
        axes.set_title(f"labelled {label}\nlooks like {other}", fontsize=8.5, pad=3, linespacing=1.1)
        name = drawable(names[place])
        axes.text(
            0.5,
            -0.03,
            _tail(name, 22),
            transform=axes.transAxes,
            fontsize=6,
            color=GREY,
            ha="center",
            va="top",
        )
        if planted is not None and bool(planted[place]):
            axes.set_axis_on()
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set(color=PLANTED, linewidth=3)
    save(figure, path)


def _tail(name: str, length: int) -> str:
    """The end of a file's name, which tells more than its beginning."""
    return name if len(name) <= length else f"…{name[1 - length :]}"


def found(curves: Mapping[str, Float[Tensor, "n"]], share: float, path: Path, title: str) -> None:
    """Draw the share of planted labels found against the share of images inspected, a line for each score.

    Args:
        curves: By score, as `attribution.found_curve` gives them, `[N]`.
        share: Of the labels that were planted.
        path: The PNG to write.
        title: Above the picture.
    """
    figure = make_figure(8, 5.4, title)
    axes = figure.subplots()
    best = sorted(curves, key=lambda name: -float(curves[name].mean()))
    for place, name in enumerate(best):
        curve = curves[name].numpy()
        inspected = 100 * np.arange(len(curve) + 1) / len(curve)
        tenth, fifth = (100 * curve[max(round(s * len(curve)) - 1, 0)] for s in (0.1, 0.2))
        label = f"{name}: {tenth:.1f} % found in 10 %, {fifth:.1f} % in 20 %"
        style = ("-", "--", "-.", ":")[place // 2 % 4]
        axes.plot(
            inspected, 100 * np.append(0, curve), color=COLOURS[place % 8], linestyle=style, label=label
        )
    axes.plot(
        [0, 100 * share, 100], [0, 100, 100], color="#bfbfbf", linewidth=1, label="the best there can be"
    )
    axes.plot([0, 100], [0, 100], color="#bfbfbf", linewidth=1, linestyle=":", label="at random")
    axes.set_xlim(0, min(100, max(50, 500 * share)))
    axes.set_ylim(0, 102)
    axes.set_xlabel("images inspected, the most suspicious first (%)")
    axes.set_ylabel("planted wrong labels found (%)")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", fontsize=9, frameon=True, framealpha=0.9, edgecolor="none")
    save(figure, path)
