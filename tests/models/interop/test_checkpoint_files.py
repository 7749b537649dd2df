"""Which dict of a checkpoint is taken, and files that are none."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_func.models.interop.checkpoint_files import find_state_dict, read_checkpoint

WANTED = {"conv.weight": torch.zeros(4, 3), "fc.bias": torch.zeros(2)}
OTHER = {"conv.weight": torch.zeros(4, 3), "fc.bias": torch.zeros(9)}
MOMENTA = {"state": {0: {"momentum_buffer": torch.zeros(4, 3)}}, "param_groups": [{"lr": 0.1}]}


def prefixed(tensors: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {prefix + key: leaf for key, leaf in tensors.items()}


@pytest.mark.parametrize(
    ("checkpoint", "place"),
    [
        (WANTED, ""),
        ({"optimizer": MOMENTA, "state_dict": WANTED}, "['state_dict']"),
        ({"optimizer": WANTED, "model": WANTED}, "['model']"),
        ({"ema": WANTED, "model": WANTED}, "['model']"),
        ({"model": OTHER, "ema": WANTED}, "['ema']"),
        ({"model": {"ema": prefixed(WANTED, "module."), "raw": OTHER}, "epoch": 2}, "['model']['ema']"),
        ({"params": {"conv": {"weight": torch.zeros(4, 3)}}, "state": {"fc": {"bias": torch.zeros(2)}}}, ""),
        ({"teacher": OTHER, "step": 1}, "['teacher']"),
    ],
    ids=["bare", "lightning", "two-equal", "ema", "other-classes", "nested", "pytrees", "only-one"],
)  # fmt: skip
def test_the_dict_that_fits_best_is_taken(checkpoint: dict[str, Any], place: str) -> None:
    found, where = find_state_dict(checkpoint, WANTED)
    assert where == place
    assert all(isinstance(leaf, torch.Tensor) for leaf in found.values())


def test_objects_in_a_file_are_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": WANTED, "rate": Fraction(1, 3)}, tmp_path / "net.pth")
    with pytest.raises(ValueError, match="holds Python objects .*weights_only=False"):
        read_checkpoint(tmp_path / "net.pth")


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_file_cut_short_is_one_line(tmp_path: Path, name: str, share: float) -> None:
    from safetensors.torch import save_file

    path = tmp_path / name
    save_file(WANTED, path) if name.endswith(".safetensors") else torch.save(WANTED, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="is no file of weights, or is cut short") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_text_and_folders_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.pth").write_text("not weights")
    with pytest.raises(ValueError, match="notes.pth is no file of weights"):
        read_checkpoint(tmp_path / "notes.pth")
    with pytest.raises(IsADirectoryError, match="is a folder; name the file of weights in it"):
        read_checkpoint(tmp_path)
