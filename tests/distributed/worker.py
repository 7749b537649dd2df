"""One rank of the tests that need several: checks what only a group can show, and writes what it trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import resnet_func as rf
from resnet_func import distributed, tree
from resnet_func.distributed import Ranks
from resnet_func.testing.shadow import cast_floating
from tests.distributed import exact


def check_collectives(ranks: Ranks) -> None:
    """Rows come back in order, sums keep memory formats, and who differs is found."""
    dealt = [3, 1, 2, 2, 1]
    rows = torch.arange(9, dtype=torch.int64)
    own = [block for i, block in enumerate(rows.split(dealt)) if i % ranks.world == ranks.rank]
    gathered = distributed.gather_rows(torch.cat([*own, rows[:0]]), ranks, dealt=dealt)
    assert gathered.equal(rows)

    last = ranks.world - 1
    assert distributed.differing_ranks(ranks.rank // last, ranks) == [last]
    numbers = torch.full((2, 3, 4, 4), float(ranks.rank))
    values = [numbers.contiguous(memory_format=torch.channels_last), torch.ones(2, dtype=torch.bfloat16)]
    summed = distributed.sum_over_ranks(values, ranks)
    assert summed[0].eq(sum(range(ranks.world))).all()
    assert summed[0].stride() == values[0].stride()
    assert summed[1].dtype == torch.bfloat16


def check_against_one_process(ranks: Ranks) -> None:
    """A step on parts of a batch is the step on the batch, in float64; BatchNorm over ranks is BatchNorm."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 3, 8, 8, generator=draw, dtype=torch.float64), torch.arange(9)
    optimizer = rf.optim.sgd(0.1, 0.9)
    cases: tuple[tuple[Literal["batch", "group"], bool], ...]
    cases = ("group", False), ("batch", True), ("batch", False)
    for norm, sync in cases:
        model = rf.resnet20(depths=(1, 1, 1), norm=norm)
        params, state = cast_floating(model.init(draw), torch.float64)
        start = rf.train.init_train_state(params, state, optimizer)
        step = rf.train.make_train_step(
            model, rf.losses.cross_entropy, optimizer, ranks=ranks, sync_batch_norm=sync
        )
        plain = rf.train.make_train_step(model, rf.losses.cross_entropy, optimizer)
        mine = ranks.part(9)
        found, metrics = step(start, x[mine], y[mine])
        assert not distributed.differing_ranks(distributed.fingerprint(found), ranks)
        if norm == "group" or sync:
            wanted, wanted_metrics = plain(start, x, y)
            assert_close(found.params, wanted.params)
            assert_close(found.state, wanted.state)
            assert_close(metrics, wanted_metrics)
        else:  # each part a batch of its own, and running statistics averaged
            states = [plain(start, x[part], y[part])[0].state for part in parts(ranks.world)]
            assert_close(found.state, tree.map(lambda *of: sum(of) / len(of), *states))


def parts(world: int) -> list[slice]:
    return [Ranks(rank, world).part(9) for rank in range(world)]


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for a, b in zip(tree.leaves(found), tree.leaves(wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, check_dtype=False)


def main(folder: Path, steps: int) -> None:
    torch.set_num_threads(1)
    ranks, _ = distributed.join(timeout=60)
    check_collectives(ranks)
    check_against_one_process(ranks)
    states = exact.all_trainings(ranks, steps)
    trained = {name: distributed.fingerprint(state) for name, state in states.items()}
    for name, number in trained.items():
        assert not distributed.differing_ranks(number, ranks), name
    if ranks.rank == 0:
        (folder / f"{ranks.world}.json").write_text(json.dumps(trained))
    distributed.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
