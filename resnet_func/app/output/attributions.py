"""The picture of an attribution: an image, and the training images that helped and harmed its prediction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.gridspec import GridSpec
from torch import Tensor

from resnet_func.app.output.canvas import GREY, draw_image, make_figure, save, say, shorten
from resnet_func.app.output.fonts import drawable

HELPED, HARMED = "#0072B2", "#D55E00"


class Shown(NamedTuple):
    """A training image in the picture: its label, its score as a share of the strongest, its name."""

    image: UInt8[Tensor, "c h w"]
    label: str
    share: float
    name: str


def attribution(
    image: UInt8[Tensor, "c h w"],
    caption: str,
    helpful: Sequence[Shown],
    harmful: Sequence[Shown],
    path: Path,
    title: str,
) -> None:
    """Draw an image on the left; in two rows the training images that helped most, and that harmed most.

    Args:
        image: What was predicted.
        caption: Under it, such as its class.
        helpful, harmful: The strongest first; either may be empty.
        path: The PNG to write.
        title: Above all.
    """
    columns = max(len(helpful), len(harmful), 1)
    figure = make_figure(3.2 + 1.45 * columns, 5.0, title)
    grid = GridSpec(2, columns + 2, figure=figure)
    large = figure.add_subplot(grid[:, :2])
    large.set_axis_off()
    draw_image(large, image)
    large.set_title(drawable(caption), fontsize=12, pad=6)
    for row, (shown, colour, says) in enumerate(((helpful, HELPED, "helped"), (harmful, HARMED, "harmed"))):
        for column in range(columns):
            axes = figure.add_subplot(grid[row, column + 2])
            axes.set_axis_off()
            if column < len(shown):
                _draw(axes, shown[column], colour, says if column == 0 else "")
            elif column == 0:
                say(axes, f"none\n{says}")
    save(figure, path)


def _draw(axes: Axes, shown: Shown, colour: str, says: str) -> None:
    draw_image(axes, shown.image)
    axes.set_axis_on()
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(color=colour, linewidth=2.5)
    heading = f"{says} most\n" if says else "\n"
    text = f"{heading}labelled {shorten(drawable(shown.label), 12)}"
    axes.set_title(text, fontsize=9, color=colour, pad=4)
    name = drawable(shown.name)
    name = name if len(name) <= 22 else f"…{name[-21:]}"
    axes.set_xlabel(f"{100 * shown.share:+.0f} %\n{name}", fontsize=7, color=GREY, labelpad=2)
