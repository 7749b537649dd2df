"""Under `torchrun`: join the other ranks, tell them things, and let one rank speak for all when it ends.

    torchrun --nproc-per-node 2 -m resnet_func train

torchrun starts the processes, and starts them again. What is here finds out which of them this one is.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from resnet_func.app.errors import AppError, Interrupted, Unspoken

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

    from resnet_func.distributed import Ranks

T = TypeVar("T")

LOADING_SECONDS = 3600.0  # that others wait for the first to download and decode the data
GRACE_SECONDS = 5.0  # that ranks wait for each other's word when something has gone wrong
SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


class RankError(AppError):
    """The ranks cannot go on together; the message is one line with the way out."""


def is_launched() -> bool:
    """Whether `torchrun`, or what sets the same environment, has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether this is rank 0, or the only process.

    >>> is_first()
    True
    """
    return os.environ.get("RANK", "0") == "0"


def is_restarted() -> bool:
    """Whether torchrun has started the group again after a rank failed.

    >>> is_restarted()
    False
    """
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def name_of_launch() -> str:
    """One name for all starts of a group by one torchrun: those after a failure find their run by it."""
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    # without --rdzv-id all jobs are called "none"; rank 0's launcher is on one node then, and stays
    own = f"{platform.node()} {os.getppid()} {_began(os.getppid())}" if job == "none" else job
    return hashlib.sha256(own.encode()).hexdigest()[:32]


def _began(process: int) -> str:
    """When a process began, in ticks since the machine did: numbers of processes come again."""
    try:
        # the fields after the command's name, which may hold anything, in brackets
        fields = (
            Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
        )
        return fields.split()[19]
    except (OSError, IndexError):  # no Linux
        return ""


def local_device(device: str) -> str:
    """The device of this rank: where the choice is CUDA's, each rank of a node has one of its own.

    >>> local_device("cpu")
    'cpu'
    """
    import torch

    if not is_launched() or device not in ("auto", "cuda") or not torch.cuda.is_available():
        return "cpu" if device == "auto" and not torch.cuda.is_available() else device
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


class Group:
    """The ranks of a launch, and the store by which they tell each other words; alone, one rank of one."""

    def __init__(self, ranks: Ranks | None, store: Store | None, timeout: float) -> None:
        self.ranks, self.store, self.timeout, self.words = ranks, store, timeout, 0

    @property
    def rank(self) -> int:
        return self.ranks.rank if self.ranks else 0

    @property
    def world(self) -> int:
        return self.ranks.world if self.ranks else 1

    def from_first(self, word: Callable[[], str]) -> str:
        """What `word` returns on rank 0, where alone it is called; in the same order on all."""
        if self.store is None:
            return word()
        self.words += 1
        if self.rank == 0:
            self.store.set(f"from-first/{self.words}", word())
        return self.store.get(f"from-first/{self.words}").decode()

    def first_on_node(self, load: Callable[[], T]) -> T:
        """`load` on one rank of each node before the others: they find the downloads and caches it left."""
        if self.store is None:
            return load()
        key = f"loaded/{os.environ.get('GROUP_RANK', '0')}"
        if os.environ.get("LOCAL_RANK", "0") == "0":
            found = load()
            self.store.set(key, "1")
            return found
        self.store.wait([key], timedelta(seconds=max(self.timeout, LOADING_SECONDS)))
        return load()

    def agree(self, mine: bool) -> bool:
        """Whether any rank says so: a sum over ranks, so that all go the same way at the same step."""
        if self.world == 1:
            return mine
        import torch
        import torch.distributed as dist

        said = torch.tensor([int(mine)], dtype=torch.int32, device="cpu")
        dist.all_reduce(said)
        return bool(said.item())

    def check_same(self, number: int, what: str) -> None:
        """Refuse to go on where a rank's number is not rank 0's.

        Raises:
            RankError: names the ranks and what they differ in.
        """
        from resnet_func.distributed import Ranks, differing_ranks

        if differing := differing_ranks(number, self.ranks or Ranks(0, 1)):
            raise RankError(f"{name_ranks(differing)} {what}")

    # ----------------------------------------------------------------------- how it ends

    def may_speak(self) -> bool:
        """Whether this rank is the first to ask: of all that fail, one prints why."""
        if self.store is None:
            return True
        try:
            return self.store.add("spoken", 1) == 1
        except RuntimeError:  # the store is gone with rank 0, where torchrun does not keep it
            return self.rank == 1

    def missing(self) -> list[int]:
        """The ranks that do not say within the time of grace that they, too, have lost the others."""
        assert self.store is not None  # who is alone loses nobody
        waiting = set(range(self.world)) - {self.rank}
        end = time.monotonic() + GRACE_SECONDS
        try:
            self.store.set(f"lost/{self.rank}", "1")
            while waiting and time.monotonic() < end:
                waiting = {rank for rank in waiting if not self.store.check([f"lost/{rank}"])}
                time.sleep(0.05)
        except RuntimeError:
            return [0]
        return sorted(waiting)


ONE_PROCESS = Group(None, None, 300.0)
"""No launch: the only process."""


@contextmanager
def group(device: str = "cpu", *, timeout: float = 300.0) -> Iterator[Group]:
    """Join the launch's ranks; alone where there is none. Of errors inside, one rank speaks.

    Args:
        device: What is computed on.
        timeout: Seconds that ranks wait for each other.

    Raises:
        RankError: a rank is gone, hangs, or differs.
        Unspoken: whatever was raised inside, on all ranks but the one that tells it.

    >>> with group() as alone:
    ...     alone.rank, alone.world, alone.agree(True), alone.from_first(lambda: "here")
    (0, 1, True, 'here')
    """
    if not is_launched():
        yield Group(None, None, timeout)
        return
    from resnet_func import distributed

    end_with_launcher()
    try:
        ranks, store = distributed.join(local_device(device), timeout=timeout)
    except RuntimeError as error:
        failure = RankError(f"the ranks do not come together: {str(error).splitlines()[0]}")
        raise failure if is_first() else Unspoken(failure) from error
    joined = Group(ranks, store, timeout)
    try:
        yield joined
    except (Interrupted, KeyboardInterrupt) as stop:
        if joined.rank:
            raise Unspoken(stop) from None
        raise
    except (RuntimeError, ValueError, OSError, AppError) as error:
        failure = _explain(error, joined)
        if not joined.may_speak():
            raise Unspoken(failure) from None
        raise failure from error
    finally:
        distributed.leave()


def is_lost(error: BaseException) -> bool:
    """Whether a collective has failed because of another rank.

    >>> is_lost(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"))
    True
    """
    from torch.distributed import DistError

    said = str(error).lower()
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in said or "nccl" in said)
    )


def _explain(error: Exception, joined: Group) -> Exception:
    if joined.world == 1 or not is_lost(error):
        return error if joined.rank == 0 or isinstance(error, RankError) else _of_rank(joined.rank, error)
    hangs = "timed out" in str(error).lower() or "timeout" in str(error).lower()
    missing = joined.missing()
    if not missing:
        return RankError(f"the ranks have lost each other: {str(error).splitlines()[0]}")
    what = f"did not answer within {joined.timeout:g} s" if hangs else "ended"
    return RankError(
        f"{name_ranks(missing)} {what}, and the others cannot go on without. The run goes on from its last "
        "checkpoint by --resume, or by itself with torchrun --max-restarts"
    )


def _of_rank(rank: int, error: Exception) -> Exception:
    return RankError(f"rank {rank}: {error}")


def name_ranks(ranks: list[int]) -> str:
    """The ranks, in words.

    >>> name_ranks([1]), name_ranks([0, 2])
    ('rank 1', 'ranks 0, 2')
    """
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def end_with_launcher() -> None:
    """Have Linux send SIGTERM when the launcher dies, however it does: no rank is left behind alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, int(signal.SIGTERM), 0, 0, 0)


@contextmanager
def quiet_unless_first() -> Iterator[None]:
    """For what every rank would print alike, such as the parser's help: rank 0 alone prints."""
    if is_first():
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
    ):
        yield
