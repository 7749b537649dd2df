"""The record of a run: which training images were right after each epoch."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor

from resnet_func.app.storage import checkpoint, run_folder

NAME = "record"


def write(folder: Path, epoch: int, correct: Bool[Tensor, "n"]) -> None:
    """Add an epoch (from 0); what was recorded of it or later ones, before a run went on, is replaced.

    Raises:
        CheckpointError: the disk refuses, or the record so far is damaged or of fewer epochs.
    """
    rows = correct[None].to("cpu", torch.uint8)
    if epoch:
        before = _read(folder)[:epoch]
        if before.shape != (epoch, len(correct)):
            raise checkpoint.CheckpointError(
                f"the record in {folder} is of {len(before)} epochs and {before.shape[1]} images, where the "
                f"run has {epoch} and {len(correct)}. Start a new run"
            )
        rows = torch.cat([before, rows])
    checkpoint.save(run_folder.checkpoints(folder), NAME, {"correct": rows}, meta={"epochs": epoch + 1})


def read(folder: Path) -> Bool[Tensor, "epochs n"] | None:
    """The record of a run; None if it has none.

    Raises:
        CheckpointError: it is damaged.
    """
    return _read(folder).bool() if checkpoint.exists(run_folder.checkpoints(folder), NAME) else None


def _read(folder: Path) -> Tensor:
    return checkpoint.load_flat(run_folder.checkpoints(folder), NAME)[0]["correct"]
