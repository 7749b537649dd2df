"""In a world of one, joining changes nothing; tests/distributed trains privately on several ranks."""

from __future__ import annotations

from typing import Any

import torch

from resnet_func import losses, optim, privacy, tree
from resnet_func.distributed import Ranks
from resnet_func.per_sample import clipped_sum
from resnet_func.train import init_train_state
from tests.per_sample.cases import batch, network, small


def test_joining_one_rank_changes_nothing() -> None:
    model, params, state = network(small(), 0)
    summed = clipped_sum(model, losses.cross_entropy, max_norm=0.5, nonfinite="zero")
    rule: dict[str, Any] = {"noise_multiplier": 1.0, "expected_batch_size": 4.0}
    parts = privacy.make_private_parts(summed, optim.sgd(0.5), max_norm=0.5, **rule)
    before = init_train_state(params, state, optim.sgd(0.5))
    clipped = parts.clip(before, *batch(3, 1), torch.tensor([True, False, True]))
    joined = privacy.join_over_ranks(clipped, Ranks(0, 1))
    assert joined.mask.dtype == torch.bool
    assert all(a.equal(b) for a, b in zip(tree.leaves(joined), tree.leaves(clipped), strict=True))
