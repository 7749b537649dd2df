"""Rows dealt to ranks: the rows of one process, whoever dies on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from resnet_func.app.errors import UsageError
from resnet_func.app.ranks import dealing
from resnet_func.app.ranks.launch import ONE_PROCESS, Group, RankError
from resnet_func.attribution import Store
from resnet_func.distributed import Ranks

ROWS = torch.arange(22, dtype=torch.float32).reshape(11, 2)


def rows(start: int, stop: int) -> Tensor:
    return ROWS[start:stop]


def store(folder: Path, **key: int) -> Store:
    return dealing.open_dealt(folder, "scores", key, rows=11, width=2, chunk=3)


def rank(number: int, world: int, timeout: float = 60.0) -> Group:
    return Group(Ranks(number, world), None, timeout)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_together_fill_the_rows_of_one(tmp_path: Path, world: int) -> None:
    for number in reversed(range(world)):  # rank 0 waits for the others
        dealing.fill(store(tmp_path), rows, rank(number, world))
        dealing.wait(store(tmp_path), rank(number, world))
    assert dealing.take(store(tmp_path)).equal(ROWS)
    assert not list(tmp_path.iterdir())


def test_what_a_rank_left_out_is_done_by_whoever_comes_next(tmp_path: Path) -> None:
    computed: list[int] = []
    again: list[int] = []

    def dies(start: int, stop: int) -> Tensor:
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(start)
        return rows(start, stop)

    with pytest.raises(KeyboardInterrupt):
        dealing.fill(store(tmp_path), dies, ONE_PROCESS)

    def goes_on(start: int, stop: int) -> Tensor:
        again.append(start)
        return rows(start, stop)

    dealing.fill(store(tmp_path), goes_on, ONE_PROCESS)
    assert (computed, again) == ([0, 3], [6, 9])
    assert dealing.take(store(tmp_path)).equal(ROWS)


def test_a_rank_that_does_nothing_is_named(tmp_path: Path) -> None:
    dealing.fill(store(tmp_path), rows, rank(0, 2))
    with pytest.raises(RankError, match="rank 1 finished no chunk for 0.1 s, which leaves 2 of 4"):
        dealing.wait(store(tmp_path), rank(0, 2, timeout=0.1))


def test_only_a_ranks_own_rows_are_told(tmp_path: Path) -> None:
    told: list[int] = []

    def begin(count: int):
        told.append(count)
        return told.append

    dealing.fill(store(tmp_path), rows, rank(1, 2), begin)
    dealing.fill(store(tmp_path), rows, rank(1, 2), begin)
    assert told == [5, 3, 2]


def test_what_a_killed_rank_had_begun_is_removed(tmp_path: Path) -> None:
    filled = store(tmp_path)
    half = filled.path / "c/3/0.0123.partial"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    unborn = tmp_path / f"{filled.path.name}.0123.tmp"
    (unborn / "c").mkdir(parents=True)
    dealing.fill(filled, rows, ONE_PROCESS)
    dealing.wait(filled, ONE_PROCESS)
    assert not half.exists()
    assert not unborn.exists()


def test_other_options_have_another_store(tmp_path: Path) -> None:
    dealing.fill(store(tmp_path, seed=0), rows, ONE_PROCESS)
    assert store(tmp_path, seed=1).missing() == [0, 1, 2, 3]


def test_scores_that_need_all_rows_first_are_refused() -> None:
    dealing.check_dealt(["margin", "forgetting"])
    with pytest.raises(UsageError, match="self_influence_ekfac cannot be dealt to ranks"):
        dealing.check_dealt(["margin", "self_influence_ekfac"])
