"""Stores: whole chunks, whatever happens; the right ones, or a refusal by name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from resnet_func.attribution import Store, StoreError, fingerprint, open_store

ROWS, WIDTH, CHUNK = 11, 3, 4
KEY = {"checkpoint": "a" * 64, "data": "b" * 64, "dim": 2, "seed": 0, "projection": "factorized"}


def make(path: Path, **changes: Any) -> Store:
    return open_store(path, {**KEY, **changes}, rows=ROWS, width=WIDTH, chunk_rows=CHUNK)


def rows(start: int, stop: int) -> Tensor:
    return torch.arange(start * WIDTH, stop * WIDTH, dtype=torch.float32).reshape(-1, WIDTH)


def whole(store: Store) -> Tensor:
    return torch.cat(list(store.blocks()))


def test_what_is_filled_comes_back_and_nothing_is_computed_twice(tmp_path: Path) -> None:
    store, computed = make(tmp_path / "s"), []

    def compute(start: int, stop: int) -> Tensor:
        computed.append((start, stop))
        return rows(start, stop)

    assert store.missing() == [0, 1, 2]
    store.write(1, rows(4, 8))
    seen: list[int] = []
    make(tmp_path / "s").fill(compute, done=seen.append)
    assert computed == [(0, 4), (8, 11)]
    assert seen == [4, 3]
    again = make(tmp_path / "s")
    assert torch.equal(whole(again), rows(0, ROWS))
    again.fill(compute)
    assert len(computed) == 2


def test_rows_of_zeros_count_as_written(tmp_path: Path) -> None:
    """zarr leaves out a chunk that holds its fill value only, unless it is told not to."""
    for value in (0.0, float("nan")):
        store = make(tmp_path / str(value))
        store.fill(lambda start, stop, value=value: torch.full((stop - start, WIDTH), value))
        assert store.missing() == []


def test_ranks_share_the_chunks(tmp_path: Path) -> None:
    stores = [make(tmp_path / "s") for _ in range(2)]
    assert [store.missing(rank, 2) for rank, store in enumerate(stores)] == [[0, 2], [1]]
    stores[1].fill(rows, rank=1, ranks=2)
    with pytest.raises(StoreError, match="lacks 2 of 3 chunks"):
        whole(stores[1])
    stores[0].fill(rows, rank=0, ranks=2)
    assert torch.equal(whole(stores[1]), rows(0, ROWS))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"checkpoint": "c" * 64}, "checkpoint aaaaaaaaaaaa..., not cccccccccccc..."),
        ({"data": "d" * 64}, "data bbbbbbbbbbbb..., not dddddddddddd..."),
        ({"seed": 1}, "seed 0, not 1"),
        ({"more": 1}, "more none, not 1"),
    ],
)
def test_another_key_is_refused_by_name(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    make(tmp_path / "s")
    with pytest.raises(StoreError) as refusal:
        make(tmp_path / "s", **change)
    assert named in str(refusal.value)
    with pytest.raises(StoreError, match="rows 11, not 12"):
        open_store(tmp_path / "s", KEY, rows=12, width=WIDTH)


def test_a_key_of_pairs_opens_again(tmp_path: Path) -> None:
    """JSON has no tuples: a store made for some is opened for them."""
    make(tmp_path / "s", checkpoints=[(0.5, "c"), (1.0, "d")]).fill(rows)
    assert not make(tmp_path / "s", checkpoints=[(0.5, "c"), (1.0, "d")]).missing()


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "note.txt").write_text("hello")
    with pytest.raises(StoreError, match="is no store"):
        make(tmp_path / "s")
    with pytest.raises(StoreError, match=r"takes rows \[4, 3\]; got \[2, 3\]"):
        make(tmp_path / "t").write(0, rows(0, 2))


@pytest.mark.parametrize(
    ("field", "value"),
    [("codecs", None), ("fill_value", "x"), ("attributes", 7), ("data_type", "int32"), ("shape", [4, 3])],
    ids=str,
)
def test_damaged_metadata_are_one_line(tmp_path: Path, field: str, value: Any) -> None:
    make(tmp_path / "s").fill(rows)
    metadata = json.loads((tmp_path / "s" / "zarr.json").read_text())
    (tmp_path / "s" / "zarr.json").write_text(json.dumps({**metadata, field: value}))
    with pytest.raises(StoreError, match="(is no store|was made for).*Delete"):
        make(tmp_path / "s")


def test_a_cut_chunk_is_named(tmp_path: Path) -> None:
    store = make(tmp_path / "s")
    store.fill(rows)
    file = tmp_path / "s" / "c" / "1" / "0"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(StoreError, match="is damaged"):
        whole(make(tmp_path / "s"))


def test_half_a_chunk_does_not_count(tmp_path: Path) -> None:
    """What zarr leaves behind when it is killed between writing and renaming."""
    store = make(tmp_path / "s")
    store.write(0, rows(0, 4))
    whole_chunk = tmp_path / "s" / "c" / "0" / "0"
    whole_chunk.rename(whole_chunk.with_suffix(".0123.partial"))
    assert make(tmp_path / "s").missing() == [0, 1, 2]


@pytest.mark.nightly
def test_killed_at_any_moment_it_goes_on(tmp_path: Path) -> None:
    """A process that is killed by kill -9 while it writes leaves whole chunks, and the rest missing."""
    code = f"""
        import sys, time, torch
        from resnet_func.attribution import open_store
        from pathlib import Path
        store = open_store(Path({str(tmp_path / "s")!r}), {KEY!r}, rows=4000, width=500, chunk_rows=8)
        def compute(start, stop):
            if start == 80:
                print("going", flush=True)
            return torch.arange(start, stop)[:, None].float().expand(-1, 500)
        store.fill(compute)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, env=os.environ
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    store = open_store(tmp_path / "s", KEY, rows=4000, width=500, chunk_rows=8)
    missing = store.missing()
    assert 0 < len(missing) < store.chunks
    for chunk in set(range(store.chunks)) - set(missing):
        start, stop = store.row_range(chunk)
        expected = np.arange(start, stop, dtype=np.float32)
        assert (np.asarray(store.array[start:stop]) == expected[:, None]).all()
    store.fill(lambda start, stop: torch.arange(start, stop)[:, None].float().expand(-1, 500))
    assert torch.equal(whole(store)[:, 0], torch.arange(4000).float())


def test_fingerprints_tell_names_shapes_dtypes_and_values_apart() -> None:
    base = {"a": torch.zeros(2, 3), "b": {"c": torch.ones(1)}}
    others = [
        {"a": torch.zeros(3, 2), "b": {"c": torch.ones(1)}},
        {"a": torch.zeros(2, 3), "b": {"d": torch.ones(1)}},
        {"a": torch.zeros(2, 3, dtype=torch.int32), "b": {"c": torch.ones(1)}},
        {"a": torch.zeros(2, 3), "b": {"c": torch.full((1,), 1 + 2**-20)}},
    ]
    prints = [fingerprint(of) for of in (base, *others)] + [fingerprint(base, {}), fingerprint(base, base)]
    assert len(set(prints)) == len(prints)
    assert fingerprint(base) == fingerprint({"b": {"c": torch.ones(1)}, "a": torch.zeros(3, 2).T})
    assert fingerprint({"a": torch.tensor(1)}) != fingerprint({"a": torch.tensor(2)})
