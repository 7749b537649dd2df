"""The pictures: written whole, of every kind of run, and showing what they are given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from resnet_func.app.output import fonts, plots

CLASSES = ("cat", "dog", "a rather long name of a class")


def records(n: int, **changes: Any) -> list[dict[str, Any]]:
    return [
        {
            "epoch": i + 1,
            "train_loss": 2 / (i + 1),
            "train_accuracy": 1 - 0.5 / (i + 1),
            "test_loss": 2.2 / (i + 1),
            "test_accuracy": 1 - 0.6 / (i + 1),
            **changes,
        }
        for i in range(n)
    ]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.mark.parametrize(
    "runs",
    [
        records(0),
        records(1),
        records(2),
        records(200),
        records(3, train_loss=float("nan"), test_loss=None),
        records(3, train_loss=float("inf"), test_loss=float("nan"), train_accuracy=0.0, test_accuracy=1.0),
        [{"epoch": 1}],
    ],
    ids=["none", "one", "two", "many", "nan", "inf", "empty"],
)
def test_curves_of_every_run(tmp_path: Path, runs: list[dict[str, Any]]) -> None:
    plots.curves(runs, tmp_path / "curves.png", "a title")
    assert pixels(tmp_path / "curves.png").shape[0] > 300
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_curves_show_train_and_test(tmp_path: Path) -> None:
    drawn = {}
    for name, changes in (("both", {}), ("no test", {"test_loss": None, "test_accuracy": None})):
        plots.curves(records(5, **changes), tmp_path / "curves.png", "a title")
        drawn[name] = pixels(tmp_path / "curves.png")
    assert (drawn["both"] != drawn["no test"]).any()


@pytest.mark.parametrize("count", [1, 3, 30, 60])
def test_confusion_of_every_size(tmp_path: Path, count: int) -> None:
    matrix = torch.diag(torch.full((count,), 9)) + (torch.arange(count**2).reshape(count, count) % 7 == 3)
    plots.confusion(matrix, [f"class {i}" for i in range(count)], tmp_path / "c.png", "a title")
    assert pixels(tmp_path / "c.png").std() > 1


def test_confusion_is_blue_where_right_and_orange_where_wrong(tmp_path: Path) -> None:
    def colours(matrix: list[list[int]]) -> tuple[int, int]:
        plots.confusion(torch.tensor(matrix), ("a", "b"), tmp_path / "c.png", "t")
        red, _, blue = pixels(tmp_path / "c.png").transpose(2, 0, 1)
        return int((blue > red + 60).sum()), int((red > blue + 60).sum())

    right, wrong = colours([[9, 0], [0, 9]]), colours([[0, 9], [9, 0]])
    assert right[0] > 10 * right[1]
    assert wrong[1] > 10 * wrong[0]


def test_confusion_without_samples(tmp_path: Path) -> None:
    plots.confusion(torch.zeros(3, 3, dtype=torch.int64), CLASSES, tmp_path / "c.png", "t")
    assert (tmp_path / "c.png").is_file()


def test_confusion_must_be_square(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"3 classes need a square matrix of that size; got \(2, 3\)"):
        plots.confusion(torch.zeros(2, 3), CLASSES, tmp_path / "c.png", "t")


def show_mistakes(tmp_path: Path, images: torch.Tensor, confidences: torch.Tensor) -> np.ndarray:
    count = len(images)
    labels = torch.zeros(count, dtype=torch.int64)
    plots.mistakes(images, labels, labels + 1, confidences, CLASSES, tmp_path / "m.png", "t")
    return pixels(tmp_path / "m.png")


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 25, 50])
def test_mistakes_of_every_number(tmp_path: Path, count: int, channels: int) -> None:
    images = torch.arange(count * channels * 64).reshape(count, channels, 8, 8).to(torch.uint8)
    assert show_mistakes(tmp_path, images, torch.linspace(0, 1, count)).std() > 1


def test_the_most_confident_mistakes_are_shown(tmp_path: Path) -> None:
    """Of 50 images the 36 most confident ones are red, the rest blue: no blue is seen."""
    images = torch.zeros(50, 3, 8, 8, dtype=torch.uint8)
    images[14:, 0], images[:14, 2] = 255, 255
    red, _, blue = show_mistakes(tmp_path, images, torch.linspace(0, 1, 50)).transpose(2, 0, 1)
    assert (red > blue + 200).sum() > 1000
    assert not (blue > red + 200).any()


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "curves.png").mkdir()
    with pytest.raises(OSError, match="curves.png"):
        plots.curves(records(2), tmp_path / "curves.png", "t")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


# names people have

NAMES = (
    "$x$",
    "a$b",
    r"$\frac{$",
    "[old]",
    "汉字",
    "😀",
    "two\nlines",
    "\x1b[31m\0",
    "\udce9",
    "عربي",
    "_a^b",
)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The strings of every picture saved, as they were when it was drawn."""
    texts: list[str] = []
    real = Figure.savefig

    def savefig(figure: Figure, *args: Any, **options: Any) -> None:
        real(figure, *args, **options)
        texts.extend(text.get_text() for text in figure.findobj(Text) if not text.get_parse_math())

    monkeypatch.setattr(Figure, "savefig", savefig)
    return texts


def draw(kind: str, names: Sequence[str], path: Path) -> None:
    count = len(names)
    if kind == "curves":
        plots.curves(records(2), path, " ".join(names))
    elif kind == "confusion":
        plots.confusion(torch.eye(count, dtype=torch.int64), names, path, names[0])
    elif kind == "list":
        many = [*names, *map(str, range(60))]
        matrix = torch.zeros(len(many), len(many), dtype=torch.int64)
        matrix[torch.arange(count), torch.arange(count) + 1] = 1
        plots.confusion(matrix, many, path, names[0])
    else:
        labels = torch.arange(count)
        images = torch.zeros(count, 3, 4, 4, dtype=torch.uint8)
        plots.mistakes(images, labels, (labels + 1) % count, torch.ones(count), names, path, names[0])


@pytest.mark.parametrize("kind", ["curves", "confusion", "list", "mistakes"])
def test_names_of_any_characters_are_drawn_as_they_are(kind: str, tmp_path: Path, drawn: list[str]) -> None:
    draw(kind, NAMES, tmp_path / "picture.png")
    everything = "\n".join(drawn)
    for name in ("$x$", "[old]", "_a^b", r"two\nlines", r"\x1b[31m", r"\udce9"):
        assert name in everything


def test_what_no_font_has_is_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: list[str]
) -> None:
    monkeypatch.setattr(fonts, "font_with", lambda c: fonts.OWN_FONT if c != "字" else None)
    plots.confusion(torch.eye(2), ("é字", "b"), tmp_path / "c.png", "t")
    assert r"é\u5b57" in drawn


def test_a_private_run_has_a_panel_for_epsilon_and_none_for_the_training_images(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    records = [
        {"epoch": i + 1, "epsilon": 2.0 * (i + 1), "test_loss": 2.0 - i, "test_accuracy": 0.1 * i}
        for i in range(2)
    ]
    plots.curves(records, tmp_path / "curves.png", "private")
    loss, accuracy, epsilon = drawn[0].axes
    assert [line.get_label() for line in loss.get_lines()] == ["test"]
    assert "finite" not in loss.get_title("right")
    assert accuracy.get_title("left") == "Accuracy (%)"
    assert epsilon.get_title("left") == "Epsilon spent"
    assert list(epsilon.get_lines()[0].get_ydata()) == [2.0, 4.0]


@pytest.mark.parametrize(
    ("count", "says"), [(1, "t: the only mistake"), (3, "t: the 3 most confident mistakes")]
)
def test_the_mistakes_say_what_their_numbers_are(
    tmp_path: Path, drawn: list[str], count: int, says: str
) -> None:
    show_mistakes(tmp_path, torch.zeros(count, 1, 8, 8, dtype=torch.uint8), torch.full((count,), 0.875))
    title = next(text for text in drawn if text.startswith("t: ")).replace("\n", " ")
    assert title == f"{says}, as given label → predicted label (the network's confidence)"
    assert drawn.count(f"{CLASSES[0]} →\n{CLASSES[1]} (87.5%)") == count


def test_what_happens_once_happens_one_time(tmp_path: Path, drawn: list[str]) -> None:
    draw("list", ("a", "b"), tmp_path / "c.png")
    assert "1 time," in "\n".join(drawn)
    assert "1 times" not in "\n".join(drawn)
