"""Test accuracy against the share of the training images that a score keeps.

    uv run python -m benchmarks pruning --dataset folder --data-dir DIR

Drives `resnet-func train` and `resnet-func scores`, as a reader would: networks on all images, whose EL2N is
averaged; networks whose learning rate is 0, whose gradient norms are those of the initialisation; then
networks on the hardest by each score, and on as many drawn at random. Runs that are in the work folder are
not run again, and one that was stopped goes on. GraNd at initialisation was found to follow the norm of the
input (Kirsch 2023, https://arxiv.org/abs/2303.14753): their rank correlation stands below the table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.table import Table
from scipy import stats

from benchmarks.harness import conditions, markdown, measure, pictures, report
from benchmarks.harness.options import Kept
from resnet_func.app import cli, data, training_set
from resnet_func.app.storage import run_folder

ALL, RANDOM, EL2N, GRAND = "all images", "random", "hardest by EL2N", "hardest by GraNd at the start"
COLOURS = {RANDOM: pictures.GREY, EL2N: pictures.BLUE, GRAND: pictures.ORANGE}
NAMES = {RANDOM: "random", EL2N: "el2n", GRAND: "grand"}  # of run folders


@dataclass(frozen=True)
class Options(Kept):
    """Measure what may be left out of a training set."""

    model: str = "resnet20"
    """The network that is trained, and scored."""
    batch: int = 128
    """Images a step of training."""
    epochs: int = 8
    """Of every training; over half of the images they take half as long."""
    shares: tuple[float, ...] = (0.4, 0.7)
    """Of the training images, that are kept."""
    seeds: int = 3
    """Trainings of each kind."""
    work: str = "runs/pruning"
    """The folder that keeps the runs."""


class Score(NamedTuple):
    """A column of a file of scores."""

    name: str
    path: Path


def run(options: Options) -> None:
    """Run what is missing, print the table, write the result file and the picture.

    Raises:
        ValueError: options that cannot be.
        Disagreement: a command failed; it has said why.
    """
    if options.quick:
        options = replace(options, epochs=1, shares=(0.5,), seeds=1)
    if options.seeds < 1 or not options.shares or not all(0 < share < 1 for share in options.shares):
        raise ValueError("--seeds must be 1 or more, and --shares above 0 and below 1")
    try:
        source = data.load(options.dataset, options.data_dir or None).train
    except data.DataError as error:
        raise ValueError(str(error)) from error
    machine = conditions.set_up("cpu", options.threads)
    whole = [train(options, f"full-{seed}", seed) for seed in range(options.seeds)]
    untrained, once = ["--learning-rate", "0", "--rest-learning-rate", "0"], replace(options, epochs=1)
    initial = [train(once, f"initial-{seed}", seed, *untrained) for seed in range(options.seeds)]
    el2n, grand = score(options, whole, "el2n"), score(options, initial, "grand")
    kept = {RANDOM: (None, "random"), EL2N: (el2n, "hard"), GRAND: (grand, "hard")}
    accuracies: dict[str, dict[str, list[float]]] = {ALL: {"1": [accuracy(folder) for folder in whole]}}
    for kind, (by, which) in kept.items():
        accuracies[kind] = {
            f"{share:g}": [
                accuracy(train_on_part(options, kind, share, seed, by, which))
                for seed in range(options.seeds)
            ]
            for share in options.shares
        }
    values = training_set.read_scores(grand.path, grand.name, source.num_samples)
    correlation: Any = stats.spearmanr(values, input_norms(source))
    publish(options, conditions.capture(machine), accuracies, float(correlation[0]))


def train(options: Options, name: str, seed: int, *words: str) -> Path:
    """The folder of a finished training."""
    folder = Path(options.work) / name
    machine = ["--threads", str(options.threads or 0), "--compile", "off"]
    if run_folder.can_resume(folder):
        if options.epochs > len(records(folder)):
            command("train", "--resume", str(folder), *machine)
        return folder
    which = ["--dataset", options.dataset, *(["--data-dir", options.data_dir] if options.data_dir else [])]
    sizes = ["--model", options.model, "--batch-size", str(options.batch), "--epochs", str(options.epochs)]
    place = ["--seed", str(seed), "--run-dir", str(folder)]
    command("train", *which, *sizes, *words, *place, *machine)
    return folder


def train_on_part(options: Options, kind: str, share: float, seed: int, by: Score | None, which: str) -> Path:
    """The folder of a finished training on a part of the images."""
    how = ["--by", by.name, "--scores", str(by.path)] if by else []
    return train(
        options, f"{NAMES[kind]}-{share:g}-{seed}", seed, "--keep", f"{share:g}", "--which", which, *how
    )


def score(options: Options, folders: Sequence[Path], name: str) -> Score:
    """The average score of every training image over some runs."""
    found = Score(name, folders[0] / "scores.csv")
    if not found.path.exists():
        words = [*map(str, folders), "--scores", name, "--threads", str(options.threads or 0)]
        command("scores", *words)
    return found


def command(*words: str) -> None:
    """Run `resnet-func`.

    Raises:
        Disagreement: it failed.
        KeyboardInterrupt: it was interrupted, and has saved its work.
    """
    measure.progress.print(f"resnet-func {' '.join(words)}", highlight=False, markup=False)
    status = cli.main(list(words))
    if status == cli.INTERRUPTED:
        raise KeyboardInterrupt
    if status:
        raise measure.Disagreement(f"resnet-func {words[0]} failed, status {status}")


def records(folder: Path) -> list[dict[str, Any]]:
    """Of the epochs that a run has finished."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def accuracy(folder: Path) -> float:
    """On the test images, after the last epoch."""
    return records(folder)[-1]["test_accuracy"]


def input_norms(source: data.Source) -> np.ndarray[Any, Any]:
    """Of every training image, normalised as the networks see it."""
    mean, std = data.channel_statistics(source)
    parts = [
        data.normalize(images, mean, std).flatten(1).norm(dim=1) for images, _ in data.batches(source, 1024)
    ]
    return torch.cat(parts).numpy()


# --------------------------------------------------------------------------- results


def publish(
    options: Options,
    where: dict[str, Any],
    accuracies: Mapping[str, Mapping[str, Sequence[float]]],
    correlation: float,
) -> None:
    """Table, result file and picture."""
    title = f"{options.dataset}, {options.model}: test accuracy by what is kept{options.toy_note}"
    table = Table("kept", *(f"{share:.0%}" for share in options.shares), title=title, title_justify="left")
    for kind, of in accuracies.items():
        table.add_row(kind, *cells(of, options.shares))
    report.publish(
        options.portable(),
        where,
        f"pruning-{options.dataset}-{options.model}",
        {"figures": accuracies, "norm_correlation": correlation},
        tables=[table],
        notes=[as_sentence(correlation)],
        draw=lambda path: draw(path, title, where, accuracies),
    )


def as_sentence(correlation: float) -> str:
    return f"rank correlation of GraNd at initialisation with the norm of the input: {correlation:.2f}"


def cells(of: Mapping[str, Sequence[float]], shares: Sequence[float]) -> list[str]:
    """Median and range at each share; what is of all images is the same at each.

    >>> cells({"1": [0.5, 0.25, 0.75]}, [0.4])
    ['50.0 % (25.0-75.0)']
    """
    found = [100 * np.asarray(of.get(f"{share:g}", of.get("1"))) for share in shares]
    return [f"{np.median(seen):.1f} % ({seen.min():.1f}-{seen.max():.1f})" for seen in found]


def draw(
    path: Path,
    title: str,
    where: dict[str, Any],
    accuracies: Mapping[str, Mapping[str, Sequence[float]]],
) -> None:
    """A line for each way to choose, its range as a band; all images as the dashed line."""
    figure = Figure(figsize=(8, 5), dpi=pictures.DPI, layout="constrained")
    figure.suptitle(f"{title}\n{conditions.describe(where)}", x=0.01, ha="left", fontsize=10)
    axes = figure.subplots()
    axes.axhline(
        100 * float(np.median(accuracies[ALL]["1"])), color="black", linestyle="--", linewidth=1, label=ALL
    )
    for kind, colour in COLOURS.items():
        x = [100 * float(share) for share in accuracies[kind]]
        seen = 100 * np.asarray(list(accuracies[kind].values()))
        axes.fill_between(x, seen.min(1), seen.max(1), color=colour, alpha=0.15, linewidth=0)
        axes.plot(x, np.median(seen, 1), marker="o", color=colour, label=kind)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the training images kept, %")
    axes.set_ylabel("test accuracy, % (median; bands are the range)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    pictures.save(figure, path)


def section(contents: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """The table of RESULTS.md: for each machine and its result, a row for each way to choose."""
    lines = []
    for machine, content in contents:
        shares = content["options"]["shares"]
        rows = [[kind, *cells(of, shares)] for kind, of in content["figures"].items()]
        lines += markdown.table([f"{machine}: kept", *(f"{share:.0%}" for share in shares)], rows)
        lines += [f"{machine}: {as_sentence(content['norm_correlation'])}.", ""]
    return lines
