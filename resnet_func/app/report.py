"""What a trained network's evaluation amounts to: accuracy, a table by class, and the pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from sklearn.metrics import classification_report, confusion_matrix

from resnet_func.app import data, plots
from resnet_func.train import Evaluation

MISTAKES_SHOWN = 25


def class_table(evaluation: Evaluation, classes: tuple[str, ...]) -> Table:
    """Precision, recall (the class's accuracy) and F1 of each class, with its number of images."""
    # the stubs know only the report as text
    scores: Any = classification_report(
        evaluation.targets,
        evaluation.logits.argmax(1),
        labels=range(len(classes)),
        target_names=classes,
        output_dict=True,
        zero_division=0,  # pyright: ignore[reportArgumentType]
    )
    table = Table("class", box=None)
    for name in ("precision", "recall", "F1", "images"):
        table.add_column(name, justify="right")
    for name in classes:
        precision, recall, f1, images = scores[name].values()
        table.add_row(name, f"{precision:.2%}", f"{recall:.2%}", f"{f1:.2%}", f"{images:.0f}")
    return table


def write_pictures(
    evaluation: Evaluation, source: data.Source, classes: tuple[str, ...], folder: Path, title: str
) -> None:
    """Write confusion.png and mistakes.png (the most confident mistakes) into `folder`."""
    predictions = evaluation.logits.argmax(1)
    matrix = confusion_matrix(evaluation.targets, predictions, labels=range(len(classes)))
    plots.confusion(torch.from_numpy(matrix), classes, folder / "confusion.png", title)
    confidence = evaluation.logits.softmax(1).amax(1)
    wrong = (predictions != evaluation.targets).nonzero().flatten()
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][:MISTAKES_SHOWN]
    images = [images for images, _ in source.read(worst.split(1))]
    plots.mistakes(
        torch.cat(images).cpu() if images else torch.empty((0, *source.image_shape), dtype=torch.uint8),
        evaluation.targets[worst],
        predictions[worst],
        confidence[worst],
        classes,
        folder / "mistakes.png",
        title,
    )
