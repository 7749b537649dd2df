"""The record of which images were right: epoch by epoch, and again after a run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resnet_func.app.storage.checkpoint import CheckpointError
from resnet_func.app.training import training_record


def test_epochs_add_up_and_those_done_again_are_replaced(tmp_path: Path) -> None:
    assert training_record.read(tmp_path) is None
    rows = [torch.tensor(row) for row in ([True, False], [False, False], [True, True])]
    for epoch, row in enumerate(rows[:2]):
        training_record.write(tmp_path, epoch, row)
    training_record.write(tmp_path, 1, rows[2])
    found = training_record.read(tmp_path)
    assert found is not None
    assert torch.equal(found, torch.stack([rows[0], rows[2]]))
    training_record.write(tmp_path, 0, rows[1])
    found = training_record.read(tmp_path)
    assert found is not None
    assert found.tolist() == [[False, False]]


def test_a_record_that_lacks_epochs_is_refused(tmp_path: Path) -> None:
    training_record.write(tmp_path, 0, torch.tensor([True]))
    with pytest.raises(CheckpointError, match="1 epochs and 1 images, where the run has 3 and 1"):
        training_record.write(tmp_path, 3, torch.tensor([True]))
