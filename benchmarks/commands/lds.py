"""The linear datamodelling score of every method of attribution, against networks retrained on halves.

    uv run --extra bench python -m benchmarks lds --dataset folder --data-dir DIR --classes cat dog

For each test image: Spearman's correlation, over random halves of the training images, between the log-odds
of its label by a network trained on the half, and the sum of the half's scores. What is trained is kept in a
folder: a run that was stopped goes on, and several with `--rank` and `--ranks` share the work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from benchmarks.forms import attribution_peers, networks, retraining
from benchmarks.forms.retraining import Images, Recipe
from benchmarks.harness import conditions, markdown, measure, pictures, report
from benchmarks.harness.measure import Skipped
from benchmarks.harness.options import TOY, Kept
from resnet_func.app.storage.checkpoint import CheckpointError
from resnet_func.attribution import (
    Lds,
    Sketch,
    StoreError,
    diagonal_fisher,
    influence,
    lds,
    open_store,
    sampled_ekfac,
    tracin,
    trak,
)
from resnet_func.attribution.quantities import Checkpoint
from resnet_func.losses import cross_entropy
from resnet_func.types import Model


@dataclass(frozen=True)
class Options(Kept):
    """Measure how well attributions predict what retraining does."""

    classes: tuple[str, ...] = ()
    """Of the data set; all by default."""
    train_images: int = 5000
    """At most, of the training split."""
    test_images: int = 500
    """At most, of the test split."""
    image_size: int = 0
    """To which images are resized; 0 is the data set's own."""
    model: str = TOY
    """A network of the zoo, or its smallest relative."""
    width: int = 16
    """Channels of its first stage."""
    epochs: int = 10
    """Of each training."""
    batch: int = 64
    """Images a step of training."""
    learning_rate: float = 0.1
    """The highest of SGD with momentum 0.9."""
    subsets: int = 100
    """Networks trained on halves."""
    networks: int = 10
    """Networks trained on all images, which the methods look at."""
    dim: int = 4096
    """Numbers in a sketch."""
    damping: float = 0.1
    """Of TRAK, as a share of the mean diagonal entry."""
    peers: int = 0
    """Networks that traker and dattri look at; none by default. Needs the extra `bench`, and, since their
    projections are dense, minutes for each network."""
    work: str = "runs/lds"
    """The folder that keeps what is trained."""
    rank: int = 0
    """Which of several processes this one is; only the first one measures, when all halves are done."""
    ranks: int = 1
    """How many processes there are."""


class Row(NamedTuple):
    """A method's score and the seconds that its attributions took."""

    name: str
    score: Lds
    seconds: float


class Task(NamedTuple):
    """What the methods are given."""

    model: Model
    networks: list[Checkpoint]
    train: Images
    test: Images
    dim: int
    damping: float


def run(options: Options) -> None:
    """Train what is missing, measure, print the table, write the result file and the picture.

    Raises:
        ValueError: options that cannot be, or a folder that holds other networks.
    """
    if options.quick:
        sizes: dict[str, Any] = {"train_images": 40, "test_images": 6, "width": 4, "epochs": 1, "batch": 10}
        options = replace(options, subsets=3, networks=2, dim=16, **sizes)
    if min(options.subsets - 2, options.networks, options.ranks - options.rank) < 1 or options.rank < 0:
        raise ValueError("--subsets must be 3 or more, --networks 1 or more, --rank from 0 to below --ranks")
    machine = conditions.set_up("cpu", options.threads)
    try:
        task, outcomes = prepare(options)
    except (StoreError, CheckpointError) as error:
        raise ValueError(str(error)) from error
    if outcomes is None:
        report.say("the halves of this rank are trained; the first rank measures when all are")
        return
    masks = torch.stack([retraining.subset(i, len(task.train.y)) for i in range(options.subsets)])
    rows, skipped = [], {}
    for name, method in methods(options).items():
        start = time.perf_counter()
        try:
            scores = method(task)
        except Skipped as reason:
            skipped[name] = str(reason)
            continue
        seconds = time.perf_counter() - start
        found = lds(scores, masks, outcomes, resamples=50 if options.quick else 500)
        rows.append(Row(name, found, seconds))
        measure.progress.print(f"{name}: {found.mean:.3f} ({found.low:.3f}-{found.high:.3f})")
    publish(options, conditions.capture(machine), rows, skipped)


def prepare(options: Options) -> tuple[Task, Tensor | None]:
    """The task, and the outcomes of all halves; None where other ranks have not done theirs."""
    most = (options.train_images, options.test_images)
    if options.image_size < 0 or not 0 <= options.peers <= options.networks:
        raise ValueError("--image-size must be 0 or more, and --peers from 0 to --networks")
    which = (options.dataset, options.data_dir, options.classes)
    train_set, test = retraining.load(*which, most, options.image_size)
    classes = int(train_set.y.max()) + 1
    widths = tuple(options.width * 2**stage for stage in range(3))
    changes: dict[str, Any] = {"num_classes": classes, "in_channels": train_set.x.shape[1]}
    size = train_set.x.shape[2]
    model = networks.make_model(options.model, size, widths=widths, **changes)
    recipe = Recipe(options.epochs, options.batch, options.learning_rate)
    key = {**recipe._asdict(), "model": options.model, "width": options.width}
    key |= {"data": train_set.key, "image_size": options.image_size}
    folder = Path(options.work)
    store = open_store(
        folder / "outcomes",
        {**key, "test": test.key},
        rows=options.subsets,
        width=len(test.y),
        chunk_rows=1,
    )
    done = count(len(store.missing(options.rank, options.ranks)))
    retraining.fill(store, model, recipe, train_set, test, rank=options.rank, ranks=options.ranks, done=done)
    if options.rank or store.missing():
        return Task(model, [], train_set, test, options.dim, options.damping), None
    full = [
        retraining.full_network(folder, index, model, recipe, train_set, key)
        for index in range(options.networks)
    ]
    task = Task(model, full, train_set, test, options.dim, options.damping)
    return task, torch.cat(list(store.blocks()))


def count(total: int) -> Callable[[int], None]:
    """Says how many of the halves are trained."""
    finished: list[int] = []

    def done(rows: int) -> None:
        finished.append(rows)
        measure.progress.print(f"half {sum(finished)} of {total} trained")

    return done


# --------------------------------------------------------------------------- the methods


def methods(options: Options) -> dict[str, Callable[[Task], Tensor]]:
    """Scores `[train, test]` by the name of the method."""
    several = options.networks
    found: dict[str, Callable[[Task], Tensor]] = {
        "TracIn, 1 network": by_tracin,
        "gradient cosine, 1 network": lambda task: by_tracin(task, cosine=True),
        "influence by the diagonal Fisher, 1 network": by_diagonal,
        "influence by EKFAC, 1 network": by_ekfac,
        "TRAK-1": lambda task: by_trak(task, 1),
        "TRAK-1, dense": lambda task: by_trak(task, 1, "dense"),
    }
    if several > 1:
        found[f"TRAK-{several}"] = lambda task: by_trak(task, several)
    if options.peers:
        for name in attribution_peers.SCORES:
            found[f"TRAK-{options.peers} by {name}"] = lambda task, name=name: by_peer(
                task, options.peers, name
            )
    return found


def by_tracin(task: Task, *, cosine: bool = False) -> Tensor:
    run = tracin(task.model, cross_entropy, cosine=cosine, train=False)
    return run(task.networks[:1], task.train.batches(), task.test.batches())


def by_diagonal(task: Task) -> Tensor:
    batches, network = task.train.batches(), task.networks[0]
    fisher = diagonal_fisher(task.model, cross_entropy, train=False)(*network, batches)
    return influence(task.model, cross_entropy, fisher, train=False)(network, batches, task.test.batches())


def by_ekfac(task: Task) -> Tensor:
    batches, network = task.train.batches(), task.networks[0]
    estimate = sampled_ekfac(task.model, cross_entropy, train=False)(*network, batches)
    return influence(task.model, cross_entropy, estimate, train=False)(network, batches, task.test.batches())


def by_trak(task: Task, number: int, projection: Any = "factorized") -> Tensor:
    run = trak(task.model, Sketch(task.dim, 0, projection), damping=task.damping, train=False)
    return run(task.networks[:number], task.train.batches(), task.test.batches())


def by_peer(task: Task, number: int, name: str) -> Tensor:
    score = attribution_peers.SCORES[name]
    return score(task.model, task.networks[:number], task.train, task.test, task.dim)


# --------------------------------------------------------------------------- results


def publish(options: Options, where: dict[str, Any], rows: list[Row], skipped: dict[str, str]) -> None:
    """Table, result file and picture."""
    title = (
        f"LDS of {options.subsets} halves, {options.dataset} {' '.join(options.classes)}, {options.model} of "
        f"width {options.width}{options.toy_note}"
    )
    table = Table("method", "LDS", "95 % interval", "seconds", title=title, title_justify="left")
    for row in rows:
        interval = f"{row.score.low:.3f}-{row.score.high:.3f}"
        table.add_row(row.name, f"{row.score.mean:.3f}", interval, f"{row.seconds:,.1f}")
    figures = {
        row.name: {
            "mean": row.score.mean,
            "low": row.score.low,
            "high": row.score.high,
            "seconds": row.seconds,
        }
        for row in rows
    }
    words = [options.dataset, *options.classes, options.model, f"w{options.width}", f"s{options.subsets}"]
    report.publish(
        options.portable(),
        where,
        f"lds-{'-'.join(words)}",
        {"figures": figures, "skipped": skipped},
        tables=[table],
        notes=report.left_out(skipped),
        draw=lambda path: draw(path, title, where, rows),
    )


def draw(path: Path, title: str, where: dict[str, Any], rows: list[Row]) -> None:
    """A bar with its interval for every method, the best on top."""
    shown = sorted(rows, key=lambda row: row.score.mean)
    figure = Figure(figsize=(9, 1.6 + 0.36 * len(rows)), dpi=pictures.DPI, layout="constrained")
    figure.suptitle(f"{title}\n{conditions.describe(where)}", x=0.01, ha="left", fontsize=10)
    axes = figure.subplots()
    for place, row in enumerate(shown):
        colour = pictures.ORANGE if " by traker" in row.name or " by dattri" in row.name else pictures.BLUE
        error = [[row.score.mean - row.score.low], [row.score.high - row.score.mean]]
        axes.barh(place, row.score.mean, xerr=error, color=colour, height=0.6, ecolor=pictures.GREY)
    axes.set_yticks(range(len(shown)), [row.name for row in shown])
    axes.axvline(0, color=pictures.GREY, linewidth=0.8)
    axes.set_xlabel("linear datamodelling score (longer is better; 95 % intervals)")
    axes.spines[["top", "right"]].set_visible(False)
    pictures.save(figure, path)


def section(contents: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """The table of RESULTS.md: for each machine and its result, a row a method."""
    lines = []
    for machine, content in contents:
        rows = [
            [name, f"{of['mean']:.3f} ({of['low']:.3f}-{of['high']:.3f})", f"{of['seconds']:,.1f}"]
            for name, of in content["figures"].items()
        ]
        lines += markdown.table([f"{machine}: method", "LDS (95 % interval)", "seconds"], rows)
    return lines
