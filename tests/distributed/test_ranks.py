"""Several processes compute what one does, to the bit where sums are exact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_func import distributed
from resnet_func.distributed import Ranks
from tests.distributed import exact
from tests.distributed.processes import run_ranks


@pytest.fixture(scope="module")
def alone() -> dict[str, int]:
    """What one process trains."""
    return {name: distributed.fingerprint(state) for name, state in exact.all_trainings(Ranks(0, 1)).items()}


@pytest.mark.parametrize(
    "world", [2, *(pytest.param(n, marks=pytest.mark.nightly) for n in (3, 4))], ids="{}-ranks".format
)
def test_every_world_trains_the_same_bits(world: int, tmp_path: Path, alone: dict[str, int]) -> None:
    """Fifty steps with GroupNorm, BatchNorm over ranks, and private; and all that `worker` checks."""
    run_ranks(world, "tests.distributed.worker", str(tmp_path))
    assert json.loads((tmp_path / f"{world}.json").read_text()) == alone


@given(st.integers(0, 50), st.integers(1, 8))
def test_parts_are_the_batch(size: int, world: int) -> None:
    rows = list(range(size))
    parts = [rows[Ranks(rank, world).part(size)] for rank in range(world)]
    assert [row for part in parts for row in part] == rows
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_its_world_is_refused(rank: int, world: int) -> None:
    with pytest.raises(ValueError, match="rank must be 0 to world - 1"):
        Ranks(rank, world)


def test_a_fingerprint_is_of_every_bit_and_of_values_not_of_memory() -> None:
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    last = x.contiguous(memory_format=torch.channels_last)
    assert distributed.fingerprint([x, x.bool()]) == distributed.fingerprint([last, x.bool()])
    changed = x.clone()
    changed.view(torch.int32)[1, 2, 3, 3] ^= 1
    assert distributed.fingerprint([x]) != distributed.fingerprint([changed])


@pytest.mark.parametrize("timeout", [0.0, float("nan")])
def test_a_wait_without_limit_is_refused(timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout must be above 0"):
        distributed.join(timeout=timeout)
