"""The pictures of a run folder: curves, confusion matrix, most confident mistakes.

Drawn on matplotlib's objects alone: no display, no pyplot, no global state, so safe in any thread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from resnet_func.app.names import counted
from resnet_func.app.output.canvas import GREY, draw_image, make_figure, save, say, shorten
from resnet_func.app.output.fonts import drawable

TEST = "#0072B2"
STYLES: dict[str, dict[str, Any]] = {  # Okabe and Ito's colours: distinct to every kind of colour vision
    "train": {"color": "#D55E00", "linestyle": "--", "linewidth": 1.3},
    "test": {"color": TEST, "linestyle": "-", "linewidth": 1.8},
}
FEW_POINTS = 12  # up to here each epoch gets a marker
LOG_RANGE = 30.0  # losses that span more than this factor get a logarithmic axis
ERROR_FLOOR = 0.2  # percentage points: where the logarithm of the error levels off
ERROR_TICKS = (0, 50, 70, 80, 90, 95, 97, 98, 99, 99.5, 99.8, 100)
CLASSES_WITH_COUNTS, CLASSES_WITH_NAMES = 20, 50
LISTED_MISTAKES, SHOWN_MISTAKES = 12, 36

Numbers = NDArray[np.float64]


def curves(records: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw loss and accuracy over epochs, train and test; of a private run also epsilon.

    Args:
        records: One mapping per epoch, as in metrics.jsonl: epoch, train_loss, train_accuracy, test_loss,
            test_accuracy (fractions), and of private runs epsilon. A value that is absent, None, NaN or
            infinite is left out.
        path: The PNG to write; what it replaces stays whole until then.
        title: Above the panels.

    Edge cases: no records give a picture that says so; the panels are shaded from the first epoch on whose
    train loss is not finite.
    """
    private = any("epsilon" in record for record in records)
    figure = make_figure(15 if private else 11, 4.2, title)
    loss, accuracy, *rest = figure.subplots(1, 3 if private else 2)
    loss.set_title("Loss", loc="left", fontsize=11)
    accuracy.set_title("Accuracy (%)", loc="left", fontsize=11)
    epochs = _column(records, "epoch")
    for axes, metric, percent in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
        shown = [split for split in STYLES if split == "test" or not private]
        series = {split: percent * _column(records, f"{split}_{metric}") for split in shown}
        values = np.concatenate(list(series.values()))
        values = values[np.isfinite(values)]
        if not len(values):
            say(axes, "no finite values" if len(records) else "no epochs yet")
            continue
        _draw_series(axes, epochs, series)
        _scale_loss(axes, values) if metric == "loss" else _scale_accuracy(axes, values)
        _tidy_axes(axes, epochs)
    _note_best(accuracy, epochs, 100 * _column(records, "test_accuracy"))
    if private:
        _draw_budget(rest[0], epochs, _column(records, "epsilon"))
    else:
        _mark_divergence(loss, accuracy, epochs, _column(records, "train_loss"))
    save(figure, path)


def _draw_budget(axes: Axes, epochs: Numbers, epsilon: Numbers) -> None:
    axes.set_title("Epsilon spent", loc="left", fontsize=11)
    finite = np.isfinite(epsilon)
    if not finite.any():
        say(axes, "no finite values")
        return
    _draw_series(axes, epochs, {"test": epsilon})
    _tidy_axes(axes, epochs)
    axes.legend_ = None  # of one line
    axes.set_ylim(0, 1.1 * epsilon[finite].max() or 1)
    axes.annotate(
        f"{epsilon[finite][-1]:.3g}",
        (epochs[finite][-1], epsilon[finite][-1]),
        xytext=(-4, 6),
        textcoords="offset points",
        ha="right",
        fontsize=10,
        color=GREY,
    )


def _column(records: Sequence[Mapping[str, Any]], key: str) -> Numbers:
    values = [record.get(key) for record in records]
    numbers = np.array([math.nan if value is None else float(value) for value in values], dtype=np.float64)
    return np.where(np.isfinite(numbers), numbers, math.nan)


def _draw_series(axes: Axes, epochs: Numbers, series: Mapping[str, Numbers]) -> None:
    marker = "o" if len(epochs) <= FEW_POINTS else ""
    for split, values in series.items():
        finite = np.isfinite(values)
        axes.plot(epochs[finite], values[finite], marker=marker, markersize=4, label=split, **STYLES[split])


def _tidy_axes(axes: Axes, epochs: Numbers) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    axes.set_xlabel("epoch", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.5g}"))
    axes.minorticks_off()
    margin = max(0.02 * np.ptp(epochs), 0.2 if len(epochs) > 1 else 0.5)
    axes.set_xlim(epochs.min() - margin, epochs.max() + margin)
    axes.legend(frameon=True, framealpha=0.85, edgecolor="none", fontsize=10)


def _mark_divergence(loss: Axes, accuracy: Axes, epochs: Numbers, train_loss: Numbers) -> None:
    lost = epochs[np.isnan(train_loss)]
    if len(lost):
        loss.set_title(f"not finite from epoch {lost[0]:.0f}", loc="right", fontsize=10, color=GREY)
        for axes in (loss, accuracy):
            if axes.axison:
                axes.axvspan(lost[0] - 0.5, epochs[-1] + 0.5, color="black", alpha=0.07, linewidth=0)


def _scale_loss(axes: Axes, losses: Numbers) -> None:
    if losses.min() > 0 and losses.max() > LOG_RANGE * losses.min():
        axes.set_yscale("log")
        decades = math.log10(losses.max() / losses.min())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3.5 else (1,)))
    elif losses.min() >= 0:
        axes.set_ylim(0, 1.05 * losses.max() or 1)


def _scale_accuracy(axes: Axes, accuracies: Numbers) -> None:
    """Where a run gets from far to near 100 %, the logarithm of the error; else as it is."""
    low, high = accuracies.min(), accuracies.max()
    if high > 90 and 100 - low > 5 * (100 - high + ERROR_FLOOR):
        ceiling = 100 + ERROR_FLOOR
        scale = (lambda a: -np.log10(np.maximum(ceiling - a, 1e-6)), lambda y: ceiling - 10.0**-y)
        axes.set_yscale("function", functions=scale)
        axes.set_ylabel("error on a log scale", fontsize=9, color=GREY)
        axes.yaxis.set_major_locator(FixedLocator(ERROR_TICKS))
    else:
        margin = max(0.06 * (high - low), 0.5)
        bottom = max(low - margin, -0.5)
        axes.set_ylim(bottom, min(high + margin, 100 + 0.03 * (100 - bottom)))


def _note_best(axes: Axes, epochs: Numbers, accuracy: Numbers) -> None:
    if not np.isfinite(accuracy).any():
        return
    best = int(np.nanargmax(accuracy))
    axes.plot(epochs[best], accuracy[best], "o", color=TEST, markersize=8, markerfacecolor="none")
    final = f"{accuracy[-1]:.2f}" if np.isfinite(accuracy[-1]) else "not finite"
    text = f"test: final {final}, best {accuracy[best]:.2f} at epoch {epochs[best]:.0f}"
    axes.set_title(text, loc="right", fontsize=10, color=TEST)


def confusion(matrix: Int[Tensor, "c c"], classes: Sequence[str], path: Path, title: str) -> None:
    """Draw a confusion matrix: rows are true classes, columns predictions.

    Colour is the percentage of the row: blue where right, orange where wrong, on a scale of its own, so that
    rare mistakes show beside a strong diagonal. Up to 20 classes each cell shows its count and each row its
    accuracy; above that the most frequent mistakes are listed.

    Args:
        matrix: Counts [C, C].
        classes: Names of the C classes.
        path: The PNG to write.
        title: Above the picture.

    Raises:
        ValueError: the matrix is not C x C.
    """
    classes = [drawable(name) for name in classes]
    counts = matrix.cpu().numpy().astype(np.float64)
    if counts.shape != (len(classes), len(classes)):
        raise ValueError(f"{len(classes)} classes need a square matrix of that size; got {counts.shape}")
    totals = counts.sum(1, keepdims=True)
    percent = 100 * counts / np.where(totals > 0, totals, 1)
    samples = int(totals.sum())
    accuracy = f"{np.trace(counts) / samples:.2%} of {samples:,} right" if samples else "no samples"
    small = len(classes) <= CLASSES_WITH_COUNTS
    figure = make_figure(8.2 if small else 11, 7, f"{title}: {accuracy}")
    axes, *beside = figure.subplots(1, 2 - small, squeeze=False, width_ratios=(2.3, 1)[: 2 - small])[0]
    _draw_cells(figure, axes, percent)
    _label_classes(axes, classes)
    if small:
        _write_counts(axes, counts, percent)
    else:
        _list_mistakes(beside[0], counts, percent, classes)
    save(figure, path)


def _draw_cells(figure: Figure, axes: Axes, percent: Numbers) -> None:
    diagonal = np.eye(len(percent), dtype=bool)
    right = np.ma.masked_where(~diagonal, percent)
    wrong = np.ma.masked_where(diagonal | (percent == 0), percent)
    axes.imshow(right, cmap="Blues", vmin=-30, vmax=130, interpolation="nearest")
    # the square root lifts rare mistakes out of the white
    scale = PowerNorm(0.5, 0, max(float(percent[~diagonal].max(initial=0)), 1))
    image = axes.imshow(wrong, cmap="Oranges", norm=scale, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, shrink=0.5, pad=0.02, aspect=30)
    bar.set_label("mistakes, % of the true class", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def _label_classes(axes: Axes, classes: Sequence[str]) -> None:
    count = len(classes)
    if count <= CLASSES_WITH_NAMES:
        names, size = [shorten(name, 14) for name in classes], 10 if count <= CLASSES_WITH_COUNTS else 7
        upright = count <= 10 and max(map(len, names)) <= 4
        axes.set_xticks(range(count), names, rotation=0 if upright else 90, fontsize=size)
        axes.set_yticks(range(count), names, fontsize=size)
        axes.tick_params(length=0)
    axes.set_xlabel("predicted", fontsize=10)
    axes.set_ylabel("true", fontsize=10)
    axes.spines[:].set_color("#bfbfbf")


def _write_counts(axes: Axes, counts: Numbers, percent: Numbers) -> None:
    size = 9 if len(counts) <= 12 else 7
    worst = max(float(percent[~np.eye(len(counts), dtype=bool)].max(initial=0)), 1)
    for row, column in np.argwhere(counts > 0):
        right = row == column
        dark = percent[row, column] > (55 if right else 0.5 * worst)
        style: dict[str, Any] = {
            "color": "white" if dark else "black",
            "fontweight": "bold" if right else "normal",
        }
        axes.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", fontsize=size, **style)
    edge = {"x": len(counts) - 0.4, "color": GREY, "fontsize": size}
    for row, total in enumerate(counts.sum(1)):
        axes.text(y=row, s=f"{percent[row, row]:.1f}%" if total else "none", va="center", **edge)
    axes.text(y=-0.6, s="right", va="bottom", **edge)


def _list_mistakes(axes: Axes, counts: Numbers, percent: Numbers, classes: Sequence[str]) -> None:
    wrong = np.where(np.eye(len(counts), dtype=bool), 0, counts)
    lines = []
    for cell in np.argsort(-wrong, axis=None, kind="stable")[:LISTED_MISTAKES]:
        row, column = divmod(int(cell), len(counts))
        if wrong[row, column]:
            pair = f"{shorten(classes[row], 18)} → {shorten(classes[column], 18)}"
            lines.append(
                f"{pair}\n{counted(round(counts[row, column]), 'time')}, {percent[row, column]:.1f}%"
            )
    text = "\n".join(["most frequent mistakes\n", *lines] if lines else ["no mistakes"])
    axes.text(0, 0.5, text, va="center", fontsize=9, linespacing=1.4)
    axes.set_axis_off()


def mistakes(
    images: UInt8[Tensor, "k c h w"],
    labels: Int[Tensor, "k"],
    predictions: Int[Tensor, "k"],
    confidences: Float[Tensor, "k"],
    classes: Sequence[str],
    path: Path,
    title: str,
) -> None:
    """Draw up to 36 wrongly classified images, the most confident mistake first.

    Args:
        images: [K, C, H, W], uint8; three channels are RGB, else their mean is shown in grey.
        labels: True classes [K].
        predictions: Predicted classes [K]; an image whose prediction is right is left out.
        confidences: Probabilities of the predictions [K], in 0..1.
        classes: Names of the classes.
        path: The PNG to write.
        title: Above the grid, with what is written at each image: label → prediction, with its confidence.

    Edge cases: without a mistake the picture says so.
    """
    classes = [drawable(name) for name in classes]
    wrong = (labels != predictions).cpu().numpy()
    certainty = np.where(wrong, confidences.double().nan_to_num(0).cpu().numpy(), -1)
    shown = np.argsort(-certainty, kind="stable")[: min(wrong.sum(), SHOWN_MISTAKES)].tolist()
    columns = max(3, math.ceil(math.sqrt(len(shown))))
    rows = max(1, math.ceil(len(shown) / columns))
    figure = make_figure(
        1.75 * columns, 0.9 + 2.15 * rows, f"{title}: {_about(len(shown))}" if shown else title
    )
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid:
        axes.set_axis_off()
    for axes, index in zip(grid, shown, strict=False):
        draw_image(axes, images[index])
        true, predicted = (shorten(classes[int(of[index])], 14) for of in (labels, predictions))
        axes.set_title(f"{true} →\n{predicted} ({float(confidences[index]):.1%})", fontsize=9)
    if not shown:
        say(figure.add_subplot(), "no mistakes")
    save(figure, path)


def _about(shown: int) -> str:
    most = "the only mistake" if shown == 1 else f"the {shown} most confident mistakes"
    return f"{most}, as given label → predicted label (the network's confidence)"
