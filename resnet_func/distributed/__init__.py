"""Several processes as one: `torchrun`'s ranks, sums over them, batch statistics over them."""

from resnet_func.distributed.batch_norm import sync_batch_norm
from resnet_func.distributed.ranks import (
    Joined,
    Ranks,
    differing_ranks,
    fingerprint,
    gather_rows,
    join,
    leave,
    sum_over_ranks,
)

__all__ = [
    "Joined",
    "Ranks",
    "differing_ranks",
    "fingerprint",
    "gather_rows",
    "join",
    "leave",
    "sum_over_ranks",
    "sync_batch_norm",
]
