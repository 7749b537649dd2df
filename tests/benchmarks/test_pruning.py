"""The benchmark of pruning at toy size: it runs, and goes on where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.commands import pruning
from resnet_func.app import cli, data, runtime


@pytest.fixture(autouse=True)
def _untouched_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(runtime.ALLOCATOR_VARIABLE, "stock")


def test_it_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["pruning", "--quick", "--threads", "1", "--work", str(tmp_path / "work")]
    words += ["--results", str(tmp_path / "results")]
    asked: list[tuple[str, ...]] = []
    ordinary = cli.main

    def stop_at_the_third(argv: list[str]) -> int:
        asked.append(tuple(argv))
        return cli.INTERRUPTED if len(asked) == 3 else ordinary(argv)

    monkeypatch.setattr(cli, "main", stop_at_the_third)
    assert main(words) == 130
    assert main(words) == 0
    assert len(asked) == 1 + 7  # two networks, two scores and three trainings; one was stopped
    (path,) = (tmp_path / "results").glob("pruning-*.json")
    result = json.loads(path.read_text())
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert set(result["figures"]) == {pruning.ALL, *pruning.COLOURS}
    assert -1 <= result["norm_correlation"] <= 1
    assert str(tmp_path) not in path.read_text()
    by = [argv[argv.index("--which") + 1] for argv in asked if "--which" in argv]
    assert by == ["random", "hard", "hard"]
    monkeypatch.setattr(cli, "main", lambda argv: 1)  # nothing is run again
    assert main(words) == 0
    assert json.loads(path.read_text())["figures"] == result["figures"]


def test_a_run_with_epochs_left_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = tmp_path / "full-0", list[list[str]]()
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"test_accuracy": 0.5}\n' * 2)
    monkeypatch.setattr(pruning.run_folder, "can_resume", lambda _: True)
    monkeypatch.setattr(cli, "main", lambda argv: asked.append(argv) or 0)
    for epochs in (2, 3):
        pruning.train(pruning.Options(epochs=epochs, work=str(tmp_path)), "full-0", 0)
    assert [argv[:3] for argv in asked] == [["train", "--resume", str(folder)]]


def test_what_cannot_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pruning", "--shares", "1.5"]) == 2
    assert main(["pruning", "--seeds", "0"]) == 2
    assert main(["pruning", "--dataset", "folder", "--data-dir", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 3


def test_norms_are_those_of_normalised_images() -> None:
    source = data.load("digits", None).train
    pixels = torch.cat([images for images, _ in data.batches(source, source.num_samples)]).double()
    x = pixels / 255 if pixels.max() > 2 else pixels
    expected = ((x - x.mean()) / x.std(correction=0)).flatten(1).norm(dim=1)
    np.testing.assert_allclose(pruning.input_norms(source), expected.numpy(), rtol=1e-4)


def test_the_page_has_its_table() -> None:
    figures = {pruning.ALL: {"1": [0.9, 0.91, 0.92]}, pruning.RANDOM: {"0.4": [0.5, 0.6, 0.7]}}
    content = {"options": {"shares": [0.4]}, "figures": figures, "norm_correlation": 0.25}
    lines = pruning.section([("epyc", content)])
    assert "| epyc: kept | 40% |" in lines
    assert "| random | 60.0 % (50.0-70.0) |" in lines
    assert "| all images | 91.0 % (90.0-92.0) |" in lines
    assert any("input: 0.25" in line for line in lines)
