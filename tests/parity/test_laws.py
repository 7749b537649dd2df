"""The command: a table of laws, exit 1 where one is broken, one line for a mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from parity import laws
from parity.__main__ import main
from resnet_func.app.storage import checkpoint
from resnet_func.testing import LAWS

NETWORKS = """
from torch import nn

def sound(num_classes=2):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, num_classes))

def coupled():
    return nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), sound())
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "networks.py"
    path.write_text(NETWORKS)
    return path


def test_a_sound_network_exits_0(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["laws", f"{file}:sound", "--image-size", "6"]) == 0
    out = capsys.readouterr().out
    for name in (*LAWS, "checkpoint"):
        assert (name in out) == (name != "compiled")
    assert out.endswith("15 laws: 15 passed, 0 failed, 0 skipped\n")


def test_a_network_that_couples_samples_exits_1(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["laws", f"{file}:coupled", "--image-size", "6", "--only", "purity,batch-of-one"]) == 1
    out = capsys.readouterr().out
    assert "the output is off by" in out
    assert out.endswith("2 laws: 1 passed, 1 failed, 0 skipped\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["resnet19"], "Error: no network of the zoo is called 'resnet19'; near it are resnet18, "),
        (["resnet20", "--only", "truth"], "Error: no law is called truth; there are purity, "),
        (["resnet20", "--samples", "0"], "Error: sizes must be 1 or more; got 64 and 0"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["laws", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith(said)
    assert err.count("\n") == 1


def test_a_checkpoint_that_loses_a_bit_is_found(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = checkpoint.load

    def rounded(folder, name, like):
        tree, meta, warning = load(folder, name, like)
        for leaf in tree.params["0"].values():
            leaf.view(torch.int32)[0] ^= 1
        return tree, meta, warning

    options = laws.LawsOptions(f"{file}:sound", image_size=6, only="checkpoint")
    assert laws.check_network(options)[0].outcome == "passed"
    monkeypatch.setattr(checkpoint, "load", rounded)
    (result,) = laws.check_network(options)
    assert (result.outcome, "1 ULP" in result.said) == ("failed", True)
