"""The training images behind a prediction: features kept in the run folder, scores by four methods."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from resnet_func.app.answers import scoring
from resnet_func.app.batches import Preparer
from resnet_func.app.inference import Trained
from resnet_func.app.ranks import dealing
from resnet_func.app.ranks.launch import ONE_PROCESS, Group
from resnet_func.app.runtime import Runtime
from resnet_func.app.training_set import Training, fingerprint
from resnet_func.attribution import (
    Features,
    Sketch,
    Store,
    cosine_scores,
    gram_factor,
    influence,
    make_features,
    open_store,
    sampled_ekfac,
    tracin_scores,
    trak_scores,
)
from resnet_func.attribution import fingerprint as tree_fingerprint
from resnet_func.attribution.store import CHUNK_ROWS
from resnet_func.losses import cross_entropy

FOLDER = "attribution"
METHODS = ("trak", "cosine", "tracin", "influence")
DAMPING = 0.1

# `progress(what, rows)` gives a function that is told the rows done
Progress: TypeAlias = Callable[[str, int], Callable[[int], object]]


class Network(NamedTuple):
    """A run's network at its checkpoints, and the training images: what every method starts from.

    Where `group` has several ranks, the training images are dealt to them.
    """

    folder: Path
    trained: Trained
    checkpoints: list[scoring.Kept]
    training: Training
    data_key: str
    machine: Runtime
    batch_size: int
    group: Group = ONE_PROCESS


def open_network(
    folder: Path, training: Training, machine: Runtime, batch_size: int, group: Group = ONE_PROCESS
) -> tuple[Network, list[str]]:
    """The network of a run and its training images, and warnings."""
    trained, checkpoints, warnings = scoring.load_checkpoints(folder, machine)
    key = hashlib.sha256(f"{fingerprint(training.source)} {trained.task}".encode()).hexdigest()
    return Network(folder, trained, checkpoints, training, key, machine, batch_size, group), warnings


def scores(
    network: Network, method: str, x: Tensor, y: Int64[Tensor, "t"], dim: int, progress: Progress
) -> Float[Tensor, "train t"] | None:
    """Scores of every training image for the classes `y` of images `x`: high where it helped.

    Of several ranks each computes its chunks of what is kept of the training images, and rank 0, which waits
    for the others' chunks, alone gets the scores: those of one process to the bit. The curvature that
    "influence" needs is computed by every rank by itself.

    Args:
        network: From `open_network`.
        method: "trak", "cosine", "tracin" or "influence".
        x: Images as the network takes them.
        y: The class to explain of each.
        dim: Numbers in a sketch.
        progress: Told how far a pass over the training images is.

    Raises:
        StoreError: what is kept in the run folder is of another network or other data.
        RankError: a rank does not do its part.
        ValueError: there is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"method must be {', '.join(METHODS[:-1])} or {METHODS[-1]}; got {method!r}")
    if method == "influence":
        return _influence(network, x, y, progress)
    sketch = Sketch(dim=dim)
    stores = [_features(network, checkpoint, sketch, progress) for checkpoint in network.checkpoints]
    if network.group.rank:
        return None
    for store in stores:
        dealing.wait(store, network.group)
    pairs = [
        (Blocks(store), make_features(kept.model, sketch, train=False)(*kept.leaves, [(x, y)]))
        for store, kept in zip(stores, network.checkpoints, strict=True)
    ]
    if method == "cosine":
        return cosine_scores(*pairs[-1])
    if method == "tracin":
        return tracin_scores(pairs, [1.0] * len(pairs))
    factors = [
        _factor(network, c, sketch, pair[0]) for c, pair in zip(network.checkpoints, pairs, strict=True)
    ]
    return trak_scores(pairs, factors=factors)


class Blocks:
    """The features in a store, chunk by chunk; to be gone through repeatedly."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __iter__(self) -> Iterator[Features]:
        return (Features.from_rows(rows) for rows in self.store.blocks())


def _rows(network: Network, start: int, stop: int) -> list[tuple[Tensor, Tensor]]:
    """The training images from start to stop, prepared, in batches."""
    prepare = Preparer(network.trained.task, network.machine)
    places = torch.arange(start, stop, dtype=torch.int64, device="cpu").split(network.batch_size)
    read = network.training.source.read(places)
    return [(prepare(images), labels.to(network.machine.device)) for images, labels in read]


def _key(network: Network, checkpoint: scoring.Kept) -> dict[str, Any]:
    return {
        "checkpoint": tree_fingerprint(*checkpoint.leaves),
        "scale": checkpoint.scale,
        "data": network.data_key,
    }


def _path(network: Network, kind: str, key: dict[str, Any]) -> Path:
    """A folder of its own for each network, data set and sketch: nothing is ever taken for something else."""
    name = hashlib.sha256(repr(sorted(key.items())).encode()).hexdigest()[:16]
    return network.folder / FOLDER / f"{kind}-{name}"


def _features(network: Network, checkpoint: scoring.Kept, sketch: Sketch, progress: Progress) -> Store:
    """The features of the training images at a checkpoint: this rank computes its chunks that are missing."""
    key = {**_key(network, checkpoint), **sketch._asdict()}
    n = network.training.source.num_samples
    path = _path(network, "features", key)
    store = open_store(path, key, rows=n, width=sketch.dim + 1, chunk_rows=CHUNK_ROWS)
    extract = make_features(checkpoint.model, sketch, train=False)

    def compute(start: int, stop: int) -> Tensor:
        return extract(*checkpoint.leaves, _rows(network, start, stop)).rows()

    dealing.fill(store, compute, network.group, partial(progress, "gradients of the training images"))
    return store


def _factor(network: Network, checkpoint: scoring.Kept, sketch: Sketch, blocks: Blocks) -> Tensor:
    """The Cholesky factor of TRAK, kept beside the features."""
    key = {**_key(network, checkpoint), **sketch._asdict(), "damping": DAMPING}
    path = _path(network, "gram", key)
    store = open_store(path, key, rows=sketch.dim, width=sketch.dim, chunk_rows=sketch.dim)
    if store.missing():
        store.write(0, gram_factor(blocks, DAMPING))
    return torch.cat(list(store.blocks())).double()


def _influence(network: Network, x: Tensor, y: Tensor, progress: Progress) -> Tensor | None:
    """Influence by EKFAC at the last checkpoint: a pass over the training images, kept for these images."""
    checkpoint = network.checkpoints[-1]
    images = tree_fingerprint({"x": x, "y": y})
    key = {**_key(network, checkpoint), "images": images, "curvature": "ekfac"}
    n = network.training.source.num_samples
    rows = min(CHUNK_ROWS * 8, n)
    store = open_store(_path(network, "influence", key), key, rows=n, width=len(y), chunk_rows=rows)
    if store.missing(network.group.rank, network.group.world):
        model, done = checkpoint.model, progress("curvature of the training loss", 4 * n)
        batches = scoring.TrainingBatches(
            network.training.source, Preparer(network.trained.task, network.machine), network.batch_size
        )
        counted = _Counted(batches, done)
        estimate = sampled_ekfac(model, cross_entropy, train=False)(*checkpoint.leaves, counted)
        run = partial(influence(model, cross_entropy, estimate, train=False), checkpoint.leaves)

        def compute(start: int, stop: int) -> Tensor:
            return run(_rows(network, start, stop), [(x, y)])

        dealing.fill(store, compute, network.group, partial(progress, "influence"))
    if network.group.rank:
        return None
    dealing.wait(store, network.group)
    return torch.cat(list(store.blocks()))


class _Counted:
    """Batches that tell how many images went by, twice each: forward and backward."""

    def __init__(self, batches: scoring.TrainingBatches, done: Callable[[int], object]) -> None:
        self.batches, self.done = batches, done

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.batches:
            yield x, y
            self.done(2 * len(x))


class Ranked(NamedTuple):
    """Training images for one image: places in the training set and scores, the strongest first."""

    helpful: Int64[Tensor, "k"]
    harmful: Int64[Tensor, "k"]
    scores: Float[Tensor, "n"]


def rank(of: Float[Tensor, "n"], shown: int) -> Ranked:
    """The most helpful and the most harmful training images: at most as many as have that sign.

    >>> rank(torch.tensor([0.5, -1.0, 2.0, 0.0]), 3).helpful
    tensor([2, 0])
    """
    order = of.argsort(descending=True, stable=True)
    helpful = order[: min(shown, int((of > 0).sum()))]
    harmful = order.flip(0)[: min(shown, int((of < 0).sum()))]
    return Ranked(helpful, harmful, of)


def images_at(training: Training, places: Sequence[int] | Tensor) -> list[Tensor]:
    """Training images as they are stored, uint8 `[C, H, W]` each."""
    index = torch.as_tensor(places, dtype=torch.int64, device="cpu")
    return [images[0].cpu() for images, _ in training.source.read(index.split(1))] if len(index) else []
