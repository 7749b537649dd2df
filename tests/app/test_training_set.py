"""What an experiment makes of the training images: wrong labels planted, a part kept by a score."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resnet_func.app import data, training_set
from resnet_func.app.data.folder import list_images
from resnet_func.app.data.stream import open_stream
from resnet_func.app.errors import AppError
from resnet_func.app.experiment import TrainingSet
from tests.app.image_folder import CLASSES, make_image_folder

DIGITS = data.load("digits").train


def scores(path: Path, values: list[float], name: str = "el2n") -> str:
    order = sorted(range(len(values)), key=lambda i: -values[i])
    path.write_text(f"rank,index,{name}\n" + "".join(f"{r},{i},{values[i]}\n" for r, i in enumerate(order)))
    return str(path)


def test_nothing_to_do_leaves_the_images_alone() -> None:
    training = training_set.prepare(TrainingSet(), DIGITS, 0)
    assert training.source is DIGITS
    assert not training.planted.any()
    assert torch.equal(training.places, torch.arange(DIGITS.num_samples))


def test_planted_labels_are_wrong_and_do_not_depend_on_the_runs_seed() -> None:
    changes = TrainingSet(corrupt=0.1)
    training, again = (training_set.prepare(changes, DIGITS, seed) for seed in (0, 1))
    assert int(training.planted.sum()) == round(0.1 * DIGITS.num_samples)
    assert torch.equal(training.source.labels != DIGITS.labels, training.planted)
    assert torch.equal(training.source.labels, again.source.labels)
    assert training.source.labels.max() < 10
    other = training_set.prepare(replace(changes, corrupt_seed=1), DIGITS, 0)
    assert not torch.equal(other.planted, training.planted)


@pytest.mark.parametrize(("which", "kept"), [("hard", [1, 3]), ("easy", [0, 2])])
@pytest.mark.parametrize(("name", "sign"), [("el2n", 1), ("margin", -1)])
def test_hard_and_easy_ones_are_kept_in_order(tmp_path, which, kept, name, sign) -> None:
    source = training_set.select(DIGITS, torch.arange(4))
    path = scores(tmp_path / "scores.csv", [sign * v for v in (0.1, 0.9, 0.2, 0.8)], name)
    training = training_set.prepare(TrainingSet(keep=0.5, which=which, by=name, scores=path), source, 0)
    assert training.places.tolist() == kept
    assert torch.equal(training.source.labels, source.labels[kept])
    assert torch.equal(next(data.batches(training.source, 2))[0], source.images[kept])


def test_random_ones_are_the_seeds() -> None:
    changes = TrainingSet(keep=0.3, which="random", corrupt=0.2)
    first, same, other = (training_set.prepare(changes, DIGITS, seed) for seed in (0, 0, 1))
    assert torch.equal(first.places, same.places)
    assert not torch.equal(first.places, other.places)
    assert first.source.num_samples == round(0.3 * DIGITS.num_samples) == len(first.planted)
    clean = DIGITS.labels[first.places]
    assert torch.equal(first.source.labels != clean, first.planted)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_kept_at_random_does_not_depend_on_what_is_planted(seed: int) -> None:
    """Of equal seeds, too: drawn alike, all wrong labels would be kept."""
    changes = TrainingSet(keep=0.5, which="random", corrupt=0.5, corrupt_seed=seed)
    training = training_set.prepare(changes, DIGITS, seed)
    kept, planted, n = len(training.planted), round(0.5 * DIGITS.num_samples), DIGITS.num_samples
    expected = kept * planted / n
    deviation = (expected * (1 - planted / n) * (n - kept) / (n - 1)) ** 0.5  # hypergeometric
    assert abs(int(training.planted.sum()) - expected) < 5 * deviation


def test_streams_and_files(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path, train=4)
    stream = open_stream(list_images(root / "train"), 8, "images train")
    held = data.load("folder", root, image_size=8).train
    for source in (stream, held):
        training = training_set.prepare(TrainingSet(keep=0.5, which="random", corrupt=0.5), source, 0)
        images, labels = next(data.batches(training.source, 6))
        expected = next(data.batches(source, 12))
        assert torch.equal(images, expected[0][training.places])
        assert torch.equal(labels != expected[1][training.places], training.planted)
        name = training_set.image_name(training.source, 0, int(training.places[0]))
        assert name == source.files[int(training.places[0])]
        assert Path(name).parent.name in CLASSES
    assert training_set.image_name(DIGITS, 3, 7) == "digits train 7"


def test_fingerprints_follow_images_and_labels(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path, train=2)
    stream = open_stream(list_images(root / "train"), 8, "images train")
    sources = [
        DIGITS,
        training_set.with_labels(DIGITS, (DIGITS.labels + 1) % 10),
        training_set.select(DIGITS, torch.arange(10)),
        stream,
        training_set.with_labels(stream, 2 - stream.labels),
    ]
    prints = [training_set.fingerprint(source) for source in sources]
    assert len(set(prints)) == len(prints)
    assert training_set.fingerprint(DIGITS) == prints[0]


def test_scores_of_other_data_and_other_files_are_refused(tmp_path: Path) -> None:
    good = Path(scores(tmp_path / "scores.csv", [0.1, 0.2]))
    with pytest.raises(AppError, match="has scores of 2 images, where the data set has 3"):
        training_set.read_scores(good, "el2n", 3)
    with pytest.raises(AppError, match="has no score 'loss'; it has el2n"):
        training_set.read_scores(good, "loss", 2)
    with pytest.raises(AppError, match="cannot read the scores"):
        training_set.read_scores(tmp_path / "none.csv", "loss", 2)
    good.write_text("index,el2n\n0,abc\n")
    with pytest.raises(AppError, match="is damaged"):
        training_set.read_scores(good, "el2n", 1)
    for fields in ({"keep": 0.0}, {"corrupt": -0.1}, {"corrupt": 1.5}, {"keep": 0.5}):
        with pytest.raises(ValueError, match="must be a share|needs a file of scores"):
            TrainingSet(**fields)
    for make in (training_set.select, training_set.with_labels):
        with pytest.raises(TypeError, match="expected a Dataset or a Stream"):
            make(Other(), torch.arange(1))  # type: ignore[arg-type]


class Other:
    files = ()
