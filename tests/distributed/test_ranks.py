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
from tests.distributed import exact, real_images
from tests.distributed.processes import run_ranks
from tests.distributed.real_images import PREDICTIONS

SLACK = 16  # another order of the same sums: a few times the error of one process
EPS = [torch.finfo(dtype).eps for dtype in real_images.DTYPES]


def check(world: int, steps: int, folder: Path) -> None:
    """Whether `world` ranks train what one does; the ranks check all else that `worker` says."""
    run_ranks(world, "tests.distributed.worker", str(folder), str(steps))
    alone = exact.all_trainings(Ranks(0, 1), steps)
    wanted = {name: distributed.fingerprint(state) for name, state in alone.items()}
    assert json.loads((folder / f"{world}.json").read_text()) == wanted


def test_two_ranks_train_the_bits_of_one(tmp_path: Path) -> None:
    check(2, 10, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("world", [2, 3, 4], ids="{}-ranks".format)
def test_every_world_trains_the_same_bits(world: int, tmp_path: Path) -> None:
    """Fifty steps with GroupNorm, with BatchNorm over ranks, and private."""
    check(world, 50, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("world", [2, 3], ids="{}-ranks".format)
def test_ranks_stay_within_the_float64_shadow_of_one_process(world: int, tmp_path: Path) -> None:
    """On real images, whose sums round: in float64 as far away as float32's errors foretell, in float32 the
    same accuracy. (There a rounding may open a ReLU, and parameters go another way from then on.)"""
    run_ranks(world, "tests.distributed.real_images", str(tmp_path), "40")
    for norm in real_images.NORMS:
        together = torch.load(tmp_path / f"{norm}.pt", weights_only=True)
        alone = {str(dtype): real_images.train(norm, dtype, 40) for dtype in real_images.DTYPES}
        single, double = alone["torch.float32"], alone["torch.float64"]
        exactly = together["torch.float64"]
        assert exactly.keys() == double.keys()
        for name, leaf in double.items():
            rounding = max((single[name] - leaf).abs().max() / EPS[0], leaf.abs().max())
            assert (exactly[name] - leaf).abs().max() <= SLACK * EPS[1] * rounding, f"{norm} {name}"
        differ = together["torch.float32"][PREDICTIONS] != double[PREDICTIONS]
        # the standard error of an accuracy on so many images, at most
        assert differ.double().mean() < 0.5 / len(differ) ** 0.5, norm


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
