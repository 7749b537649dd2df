"""What all ranks have clipped, added up before there is noise."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_func import tree
from resnet_func.distributed import Ranks, sum_over_ranks
from resnet_func.numerics import widen
from resnet_func.privacy.step import Clipped


def join_over_ranks(clipped: Clipped, ranks: Ranks) -> Clipped:
    """The clipped sums of all ranks as one, in one collective; between the halves of a private step.

    Every rank clips its `privacy.part` of a batch, joins over ranks, and finishes with the same noise: noise
    counts once, and all ranks hold the same state. Where sums are exact, every world gives the same bits.

    Args:
        clipped: Of `PrivateParts.clip` or `join`; of as many samples on every rank, as `privacy.part` deals.
        ranks: Of `distributed.join`.

    Returns:
        The sum, and norms and masks of all ranks one after the other.

    >>> import torch
    >>> half = torch.full((1,), 0.5)
    >>> part = Clipped({"w": torch.ones(2)}, half, half > 0, half[0])
    >>> join_over_ranks(part, Ranks(0, 1)).total
    {'w': tensor([1., 1.])}
    """
    mine = torch.arange(ranks.world, dtype=torch.int64, device=clipped.norms.device)[:, None] == ranks.rank

    def placed(row: Tensor) -> Tensor:
        return torch.where(mine, row[None].to(clipped.norms.dtype), 0)

    flat = {path: widen(leaf) for path, leaf in tree.flatten(clipped.total).items()}
    rows = placed(clipped.norms), placed(clipped.mask), clipped.unclipped
    *leaves, norms, mask, unclipped = sum_over_ranks([*flat.values(), *rows], ranks)
    total = tree.replace(clipped.total, dict(zip(flat, leaves, strict=True)))
    return Clipped(total, norms.flatten(), mask.flatten() > 0, unclipped)
