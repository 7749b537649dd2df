"""One rank of a timed training step, started by `processes`: `python -m benchmarks.forms.rank_step WORK`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.forms import networks
from benchmarks.harness import conditions
from resnet_func import distributed, tree
from resnet_func.losses import cross_entropy
from resnet_func.optim import sgd
from resnet_func.train import init_train_state, make_train_step, to_memory_format


class Work(NamedTuple):
    """What to time: a network, the whole batch, which ranks share, and for how long."""

    model: str
    batch: int
    size: int
    device: str
    threads: int
    seconds: float


class Timed(NamedTuple):
    """Medians: of a step, of its all-reduce by itself, and the bytes that all-reduce sums."""

    step: float
    all_reduce: float
    bytes: int


def measure(work: Work) -> Timed:
    """Time this rank's step, and the sum of tensors like its gradients alone; the ranks go in step."""
    machine = conditions.set_up(work.device, work.threads)
    ranks, _ = distributed.join(machine.device)
    case = networks.make_case(work.model, work.batch, work.size, machine.device)
    optimizer, mine = sgd(0.1, 0.9), ranks.part(work.batch)
    params = to_memory_format(case.params, torch.channels_last)
    state = init_train_state(params, case.state, optimizer)
    step = make_train_step(case.model, cross_entropy, optimizer, ranks=ranks)
    x, y = case.x[mine].contiguous(memory_format=torch.channels_last), case.y[mine]
    leaves = tree.leaves(params)
    statistics = [leaf for leaf in tree.leaves(case.state) if leaf.is_floating_point()]
    step_seconds = _median(lambda: step(state, x, y), work.seconds, ranks)
    sums = [*leaves, *statistics]
    all_reduce = _median(lambda: distributed.sum_over_ranks(sums, ranks), work.seconds / 4, ranks)
    distributed.leave()
    return Timed(step_seconds, all_reduce, 4 * sum(leaf.numel() for leaf in sums) if ranks.world > 1 else 0)


def _median(call: Callable[[], object], seconds: float, ranks: distributed.Ranks) -> float:
    """Of calls after two that warm up; as many on every rank, by the clock of the slowest."""
    times: list[float] = []
    end = torch.zeros(1)
    call()
    call()
    started = time.perf_counter()
    while not end.item() or len(times) < 2:
        before = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - before)
        (end,) = distributed.sum_over_ranks([torch.tensor([float(before - started > seconds)])], ranks)
    return float(np.median(times))


if __name__ == "__main__":
    timed = measure(Work(**json.loads(sys.argv[1])))
    print(json.dumps(timed._asdict()), flush=True)
