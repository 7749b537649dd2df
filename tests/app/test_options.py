"""Options: data with defaults, of which the help tells."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tyro

from resnet_func.app.options import Evaluate, Machine, Predict, Summary, Train
from resnet_func.app.recipes import Recipe


def parse(kind: type, *flags: str) -> object:
    return tyro.cli(kind, args=list(flags))


def test_no_flags_are_the_defaults() -> None:
    assert parse(Train) == Train()
    assert parse(Evaluate) == Evaluate()


def test_flags_have_no_prefixes() -> None:
    assert parse(
        Train, "--dataset", "folder", "--data-dir", "images", "--epochs", "3", "--threads", "1", "--no-flip"
    ) == Train(
        dataset="folder",
        data_dir=Path("images"),
        hyper=Recipe(epochs=3, flip=False),
        machine=Machine(threads=1),
    )


def test_early_scales_are_pairs() -> None:
    options = parse(Train, "--early-scales", "0.5", "0.6", "0.75", "0.2")
    assert isinstance(options, Train)
    assert options.hyper.early_scales == ((0.5, 0.6), (0.75, 0.2))


def test_positional_arguments() -> None:
    assert parse(Predict, "a.png", "b.png") == Predict((Path("a.png"), Path("b.png")))
    assert parse(Summary, "resnet18", "--image-size", "64") == Summary("resnet18", image_size=64)


@pytest.mark.parametrize("kind", [Train, Evaluate, Predict, Summary, Machine])
def test_every_option_is_explained(kind: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(kind, "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(kind):
        if field.name not in ("hyper", "machine"):
            assert field.name.replace("_", "-") in text.lower() or field.name.upper() in text
    assert kind.__doc__ is not None
