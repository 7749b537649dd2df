"""The processes of a group, and what they tell each other: sums, rows, fingerprints.

The only file that knows the private name of torch's functional collectives, which `torch.compile` takes into
its graph. Every one of them has the time limit that the group was joined with.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from resnet_func import tree
from resnet_func.numerics import accumulation_dtype


@dataclass(frozen=True)
class Ranks:
    """This process's place in a group of processes that train together; plain data.

    Args:
        rank: This process, 0 to world - 1.
        world: How many there are.
        group: torch's name of the group; "" in a world of one, which needs no group.

    >>> Ranks(0, 1)
    Ranks(rank=0, world=1, group='')
    """

    rank: int
    world: int
    group: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank must be 0 to world - 1; got rank={self.rank} of world={self.world}")

    def part(self, size: int) -> slice:
        """This rank's rows of a batch: parts differ in length by one at most, and follow each other.

        >>> [Ranks(rank, 3).part(8) for rank in range(3)]
        [slice(0, 3, None), slice(3, 6, None), slice(6, 8, None)]
        """
        share, rest = divmod(size, self.world)
        first = self.rank * share + min(self.rank, rest)
        return slice(first, first + share + (self.rank < rest))


class Joined(NamedTuple):
    """A process's place, and the store in which the group's processes leave each other words; alone, None."""

    ranks: Ranks
    store: Store | None


def join(device: torch.device | str = "cpu", *, timeout: float = 300.0) -> Joined:
    """Join the group that `torchrun` started this process for, as its environment says.

    Args:
        device: What is computed on: "cuda" sums by NCCL, all else by gloo.
        timeout: Seconds that a collective may take before it fails.

    Returns:
        This process's place and the group's store; without torchrun, or in a world of one, `Ranks(0, 1)`.

    Raises:
        ValueError: the timeout is not above 0, or the device has no backend.
        RuntimeError: the others do not come in time.

    >>> join().ranks
    Ranks(rank=0, world=1, group='')
    """
    if not timeout > 0:
        raise ValueError(f"timeout must be above 0 seconds; got {timeout}")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Joined(Ranks(0, 1), None)
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"several processes compute on cpu or cuda; got {kind!r}. Try device='cpu'")
    limit = timedelta(seconds=timeout)
    found, rank, world = next(rendezvous("env://", timeout=limit))
    # torchrun may keep one store for all starts of a group: each has names of its own
    store = PrefixStore(f"resnet_func/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", found)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=PrefixStore("group", store), rank=rank, world_size=world, timeout=limit
    )
    assert dist.group.WORLD is not None  # it was made just now
    dist.barrier()  # whoever fails at once would else break the others' connecting
    return Joined(Ranks(rank, world, dist.group.WORLD.group_name), store)


def leave() -> None:
    """Leave the group; nothing where none was joined. Without it a process may crash while it ends.

    >>> leave()
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(leaves: list[Tensor], ranks: Ranks) -> list[Tensor]:
    """The sums over all ranks of tensors, in one collective; every rank gets the same bits.

    They are summed in the widest dtype among them, float32 at least. Sums of several ranks are exact, and so
    the same for every world, where the numbers are: on dyadic data. Inside a compiled function the collective
    is part of the graph. There is no derivative.

    Args:
        leaves: Floating-point tensors, of the same shapes on every rank.
        ranks: Of `join`.

    Returns:
        Tensors of the same shapes, dtypes and memory formats.

    >>> sum_over_ranks([torch.ones(2)], Ranks(0, 1))
    [tensor([1., 1.])]
    """
    if ranks.world == 1 or not leaves:
        return leaves
    dtype = accumulation_dtype(max((leaf.dtype for leaf in leaves), key=lambda dtype: dtype.itemsize))
    # in row-major order, whatever a rank's kernels chose to lay out
    bucket = torch.cat([leaf.reshape(-1).to(dtype) for leaf in leaves])
    parts = all_reduce(bucket, ranks).split([leaf.numel() for leaf in leaves])
    return [_shaped_like(part, leaf) for part, leaf in zip(parts, leaves, strict=True)]


def all_reduce(x: Tensor, ranks: Ranks) -> Tensor:
    """The sum of `x` over all ranks: torch's functional collective, which compiles."""
    if ranks.world == 1:
        return x
    from torch.distributed import _functional_collectives as functional  # private, and slow to import

    group: Any = ranks.group  # a name: a constant in a compiled graph
    return functional.wait_tensor(functional.all_reduce(x, "sum", group))


def _shaped_like(flat: Tensor, leaf: Tensor) -> Tensor:
    shaped, last = flat.view(leaf.shape).to(leaf.dtype), torch.channels_last
    is_last = leaf.ndim == 4 and leaf.is_contiguous(memory_format=last) and not leaf.is_contiguous()
    return shaped.contiguous(memory_format=last) if is_last else shaped


# --------------------------------------------------------------------------- outside of the graph


def gather_rows(rows: Tensor, ranks: Ranks, *, dealt: list[int]) -> Tensor:
    """All ranks' rows, in the order of blocks that were dealt in turn: block `i` to rank `i % world`.

    Args:
        rows: `[n, ...]` on the CPU, this rank's blocks one after the other; the same dtype on every rank.
        ranks: Of `join`.
        dealt: The number of rows of every block, this rank's and the others'.

    Returns:
        `[sum(dealt), ...]`, on every rank, to the bit.

    >>> gather_rows(torch.arange(3), Ranks(0, 1), dealt=[2, 1])
    tensor([0, 1, 2])
    """
    if ranks.world == 1:
        return rows
    blocks_of = [dealt[rank :: ranks.world] for rank in range(ranks.world)]
    padded = torch.cat([rows, rows.new_zeros(max(map(sum, blocks_of)) - len(rows), *rows.shape[1:])])
    received = [torch.empty_like(padded) for _ in blocks_of]
    dist.all_gather(received, padded)
    parts = [iter(part[: sum(own)].split(own)) for part, own in zip(received, blocks_of, strict=True)]
    return torch.cat([next(parts[i % ranks.world]) for i in range(len(dealt))])


def fingerprint(of: Any) -> int:
    """63 bits of the SHA-256 of all leaves' bytes, in the order of `tree.leaves`.

    >>> fingerprint([torch.zeros(2)]) == fingerprint([-torch.zeros(2)])
    False
    """
    digest = hashlib.sha256()
    for leaf in tree.leaves(of):
        dense = leaf.detach().cpu().contiguous()
        digest.update(dense.reshape(-1).view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def differing_ranks(mine: int, ranks: Ranks) -> list[int]:
    """The ranks whose number, such as a `fingerprint`, is not rank 0's; all ranks get the same list.

    >>> differing_ranks(3, Ranks(0, 1))
    []
    """
    if ranks.world == 1:
        return []
    number = torch.tensor([mine], dtype=torch.int64, device="cpu")
    numbers = [torch.empty_like(number) for _ in range(ranks.world)]
    dist.all_gather(numbers, number)
    return [rank for rank, other in enumerate(numbers) if int(other) != int(numbers[0])]
