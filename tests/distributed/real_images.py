"""Trainings on real images, scikit-learn's digits, by any number of ranks and in either precision."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import resnet_func as rf
from parity.sections.trajectory import digits
from resnet_func import distributed, tree
from resnet_func.distributed import Ranks
from resnet_func.testing import generator
from resnet_func.testing.shadow import cast_floating

NORMS: tuple[Literal["group", "batch"], ...] = ("group", "batch")
DTYPES = (torch.float32, torch.float64)
PREDICTIONS = "predictions"


def train(
    norm: Literal["group", "batch"], dtype: torch.dtype, steps: int, ranks: Ranks | None = None
) -> dict[str, Tensor]:
    """The leaves of a small ResNet after so many steps, and its predictions of images it has hardly seen."""
    model = rf.resnet20(depths=(1, 1, 1), norm=norm)
    optimizer = rf.optim.sgd(0.05, 0.9, weight_decay=5e-4)
    params, state = cast_floating(model.init(generator(0)), dtype)
    train_state = rf.train.init_train_state(params, state, optimizer)
    sync = ranks is not None and norm == "batch"
    step = rf.train.make_train_step(
        model, rf.losses.cross_entropy, optimizer, ranks=ranks, sync_batch_norm=sync
    )
    batches = list(digits(8, 2 * steps))
    for x, y in batches[:steps]:
        mine = slice(None) if ranks is None else ranks.part(len(x))
        train_state, _ = step(train_state, x[mine].to(dtype), y[mine])
    others = torch.cat([x for x, _ in batches[steps:]]).to(dtype)
    logits, _ = model.apply(train_state.params, train_state.state, others, train=False)
    leaves = {**tree.flatten(train_state.params), **tree.flatten(train_state.state)}
    return {**leaves, PREDICTIONS: logits.argmax(1)}


def main(folder: Path, steps: int) -> None:
    torch.set_num_threads(1)
    ranks, _ = distributed.join(timeout=60)
    for norm in NORMS:
        trained = {str(dtype): train(norm, dtype, steps, ranks) for dtype in DTYPES}
        if ranks.rank == 0:
            torch.save(trained, folder / f"{norm}.pt")
    distributed.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
