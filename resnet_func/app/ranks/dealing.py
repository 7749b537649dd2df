"""Rows of a data set dealt to ranks: each fills its chunks of one store, and none waits for another.

There is no collective in between. What a rank that ended early had written stays, and whoever starts the same
command again, with as many ranks or fewer, computes what is missing.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_func.app.errors import UsageError
from resnet_func.app.ranks.launch import Group, RankError, name_ranks
from resnet_func.attribution import Scores, Store, open_store

PER_ROW = ("loss", "margin", "el2n", "grand", "self_influence")
"""Scores that a sample has by itself; the others take passes over all samples first."""


def open_dealt(
    folder: Path, name: str, key: Mapping[str, Any], *, rows: int, width: int, chunk: int
) -> Store:
    """A store in a run folder, of its own for every key: what other options began lies elsewhere.

    Raises:
        StoreError: the disk refuses, or zarr is not installed.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"{name}-{digest}.zarr"
    return open_store(path, key, rows=rows, width=width, chunk_rows=chunk)


def fill(
    store: Store,
    compute: Callable[[int, int], Tensor],
    group: Group,
    begin: Callable[[int], Callable[[int], object]] = lambda rows: lambda done: None,
) -> None:
    """Fill this rank's chunks that are missing, and wait for none: the others' may be missing after it.

    Args:
        store: The same on every rank, on a file system that all see.
        compute: `compute(start, stop)` gives those rows.
        group: The ranks.
        begin: Where there is something to do, is told how many rows; what it returns is told those done.

    Raises:
        StoreError: the disk refuses.
    """
    missing = store.missing(group.rank, group.world)
    if missing:
        rows = sum(stop - start for start, stop in map(store.row_range, missing))
        store.fill(compute, rank=group.rank, ranks=group.world, done=begin(rows))


def wait(store: Store, group: Group) -> None:
    """On rank 0, wait until the other ranks' chunks are there, too; the others go on.

    Args:
        store: What every rank fills.
        group: The ranks. The limit of its timeout holds between two chunks.

    Raises:
        RankError: no chunk has come for so long; names the ranks that owe some.
    """
    if group.rank:
        return
    missing, last = store.missing(), time.monotonic()
    while missing:
        time.sleep(0.05)
        if len(left := store.missing()) < len(missing):
            missing, last = left, time.monotonic()
        elif time.monotonic() - last > group.timeout:
            owing = sorted({chunk % group.world for chunk in missing})
            raise RankError(
                f"{name_ranks(owing)} finished no chunk for {group.timeout:g} s, which leaves "
                f"{len(missing)} of {store.chunks}. Run the same command again: it goes on with those"
            )
    store.remove_leftovers()


def check_dealt(names: list[str]) -> None:
    """Refuse scores that cannot be dealt.

    Raises:
        UsageError: names them.
    """
    if whole := [name for name in names if name not in (*PER_ROW, "forgetting")]:
        raise UsageError(
            f"--scores {' '.join(whole)} cannot be dealt to ranks: all images are gone through before any "
            "has its score. Leave that out, or run without torchrun"
        )


def as_rows(scores: Scores) -> Tensor:
    """Scores as rows of numbers `[N, scores + 2]`: predictions and suggestions last.

    >>> index = torch.tensor([1, 2])
    >>> as_rows(Scores({"loss": torch.ones(2)}, index, index)).tolist()
    [[1.0, 1.0, 1.0], [1.0, 2.0, 2.0]]
    """
    columns = [*scores.values.values(), scores.predictions, scores.suggestions]
    return torch.stack([column.to(torch.float32) for column in columns], 1)


def from_rows(rows: Tensor, names: list[str]) -> Scores:
    """What `as_rows` was given.

    >>> index = torch.tensor([1, 2])
    >>> scores = Scores({"loss": torch.ones(2)}, index, index)
    >>> from_rows(as_rows(scores), ["loss"]).suggestions
    tensor([1, 2])
    """
    *values, predictions, suggestions = (column.clone() for column in rows.unbind(1))
    own = dict(zip(names, values, strict=True))
    return Scores(own, predictions.to(torch.int64), suggestions.to(torch.int64))


def take(store: Store) -> Tensor:
    """All rows of a store that is full, which is removed: what it held is to be written elsewhere."""
    rows = torch.cat(list(store.blocks()))
    store.remove()
    return rows
