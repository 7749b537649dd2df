"""Reports against scikit-learn's definitions written out."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from resnet_func.app.data import Dataset
from resnet_func.app.output import plots, report
from resnet_func.train import Evaluation
from tests.app.image_folder import global_defaults

CLASSES = ("cat", "dog", "eel")


def evaluation() -> Evaluation:
    """Cats: two of three right. Dogs: one of one, with a cat among the predictions. Eels: none there."""
    targets = torch.tensor([0, 0, 0, 1])
    predictions = torch.tensor([0, 0, 1, 1])
    confidence = torch.tensor([1.0, 2.0, 5.0, 3.0])
    logits = torch.nn.functional.one_hot(predictions, 3) * confidence[:, None]
    return Evaluation(torch.zeros(4), logits, targets)


def test_the_table_by_class() -> None:
    table = report.class_table(evaluation(), CLASSES)
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    assert columns == [
        list(CLASSES),
        ["100.00%", "50.00%", "0.00%"],
        ["66.67%", "100.00%", "0.00%"],
        ["80.00%", "66.67%", "0.00%"],
        ["3", "1", "0"],
    ]


@pytest.mark.parametrize("name", ["accuracy", "macro avg", "weighted avg", "micro avg", "samples avg", "dog"])
def test_a_class_may_be_called_anything(name: str) -> None:
    """Names that scikit-learn's text report uses for itself, and one name twice, change no number."""
    expected = [list(column.cells) for column in report.class_table(evaluation(), CLASSES).columns[1:]]
    table = report.class_table(evaluation(), (name, "dog", "eel"))
    assert [list(column.cells) for column in table.columns[1:]] == expected


def test_the_table_prints_names_as_they_are() -> None:
    out = io.StringIO()
    Console(file=out, width=100).print(
        report.class_table(evaluation(), ("[old]", ":cat: 汉字", "two\nlines"))
    )
    for name in ("[old]", ":cat: 汉字", r"two\nlines"):
        assert name in out.getvalue()
    assert len(out.getvalue().splitlines()) == 4


def test_the_pictures_get_the_matrix_and_the_worst_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(plots, "confusion", lambda matrix, *rest: drawn.update(matrix=matrix))
    monkeypatch.setattr(plots, "mistakes", lambda *given: drawn.update(mistakes=given))
    images = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 1, 2, 2).contiguous()
    results = evaluation()
    report.write_pictures(results, Dataset(images, results.targets, CLASSES, "pets"), CLASSES, tmp_path, "t")
    assert drawn["matrix"].tolist() == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    shown, labels, predictions, confidence, *_ = drawn["mistakes"]
    assert (shown[:, 0, 0, 0].tolist(), labels.tolist(), predictions.tolist()) == ([2], [0], [1])
    torch.testing.assert_close(confidence, results.logits[2:3].softmax(1).amax(1))


def test_no_mistakes_is_a_picture_too(tmp_path: Path) -> None:
    targets = torch.tensor([0, 1, 2])
    perfect = Evaluation(torch.zeros(3), torch.eye(3), targets)
    images = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    report.write_pictures(perfect, Dataset(images, targets, CLASSES, "pets"), CLASSES, tmp_path, "t")
    assert {path.name for path in tmp_path.iterdir()} == {"confusion.png", "mistakes.png"}


@pytest.mark.parametrize(("dtype", "device"), [(torch.float64, None), (torch.float32, "meta")])
def test_another_default_dtype_or_device_draws_the_same(
    tmp_path: Path, dtype: torch.dtype, device: str | None
) -> None:
    files = []
    results = evaluation()
    source = Dataset(torch.zeros(4, 3, 4, 4, dtype=torch.uint8), results.targets, CLASSES, "pets")
    for name, defaults in (("plain", (torch.float32, None)), ("other", (dtype, device))):
        (tmp_path / name).mkdir()
        with global_defaults(*defaults):
            report.write_pictures(results, source, CLASSES, tmp_path / name, "t")
            cells = [
                [str(c) for c in column.cells] for column in report.class_table(results, CLASSES).columns
            ]
        files.append((cells, [path.read_bytes() for path in sorted((tmp_path / name).iterdir())]))
    assert files[0] == files[1]
