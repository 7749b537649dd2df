"""What every picture is made with: a figure with a title, images, messages, a PNG written whole.

Drawn on matplotlib's objects alone: no display, no pyplot, no global state, so safe in any thread.
"""

from __future__ import annotations

import io
import textwrap
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from resnet_func.app.output.fonts import drawable, fonts_of
from resnet_func.files import write_whole

DPI = 150
GREY = "#595959"


def draw_image(axes: Axes, image: UInt8[Tensor, "c h w"]) -> None:
    """Draw an image: three channels are RGB, else their mean is shown in grey."""
    pixels = image.permute(1, 2, 0).cpu().numpy()
    if pixels.shape[2] != 3:
        pixels = pixels.mean(2)
    small = max(pixels.shape[:2]) < 200  # pixels on paper per image
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest" if small else "antialiased")


def make_figure(width: float, height: float, title: str) -> Figure:
    """A figure of this size in inches, its title in the left corner, in as many lines as it needs."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    text = textwrap.fill(drawable(title), max(20, int(9 * width)))
    figure.suptitle(text, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def shorten(name: str, length: int) -> str:
    """The name in at most `length` characters.

    >>> shorten("chrysanthemum", 7)
    'chrysa…'
    """
    return name if len(name) <= length else f"{name[: length - 1]}…"


def say(axes: Axes, message: str) -> None:
    """A message where a picture would be."""
    axes.text(0.5, 0.5, message, transform=axes.transAxes, ha="center", va="center", fontsize=14, color=GREY)
    axes.set_axis_off()


def save(figure: Figure, path: Path) -> None:
    """Write the PNG whole or not at all."""
    texts: list[Any] = figure.findobj(Text)
    fonts = fonts_of("".join(text.get_text() for text in texts))
    for text in texts:
        text.set_parse_math(False)  # a name with dollar signs in it is no formula
        text.set_fontfamily(fonts)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    write_whole(path, buffer.getvalue())
