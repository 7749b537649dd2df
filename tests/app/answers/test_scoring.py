"""The scores of runs: averaged, written, refused where the data differ."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resnet_func.app import batches, runtime
from resnet_func.app.answers import scoring
from resnet_func.app.cli import main
from resnet_func.app.errors import AppError
from resnet_func.app.experiment import Experiment, TrainingSet
from resnet_func.app.ranks.launch import ONE_PROCESS, Group
from resnet_func.app.recipes import FAST
from resnet_func.app.storage import run_folder
from resnet_func.app.training_set import Training, load_data, load_training
from resnet_func.attribution import Scores
from resnet_func.distributed import Ranks
from resnet_func.losses import cross_entropy
from tests.app.image_folder import TINY, train_run

pytestmark = pytest.mark.usefixtures("own_folder")
NORM = ("--norm", "group")


@pytest.fixture(scope="module")
def runs(images, tmp_path_factory):
    """Two seeds with a third of the labels wrong."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in ("0", "1"):
        options = ("--corrupt", "0.34", "--record", "--snapshots", "2", *NORM)
        train_run(images, folder / seed, "--seed", seed, *options)
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_scores_writes_a_line_an_image_the_most_suspicious_first(runs, capsys):
    assert main(["scores", str(runs / "0"), "--threads", "1"]) == 0
    found = rows(runs / "0" / "scores.csv")
    assert [int(row["rank"]) for row in found] == list(range(1, 25))
    assert sorted(int(row["index"]) for row in found) == list(range(24))
    margins = [float(row["margin"]) for row in found]
    assert margins == sorted(margins)
    assert sum(int(row["planted"]) for row in found) == 8
    for row in found:
        # the folder is the class: a label that differs from it was planted
        assert (row["label"] != Path(row["file"]).parent.name) == bool(int(row["planted"]))
        assert row["suggestion"] != row["label"]
    assert {"loss", "el2n", "grand", "self_influence", "forgetting"} < set(found[0])
    for name in ("suspects.png", "found.png"):
        assert (runs / "0" / name).read_bytes().startswith(b"\x89PNG")
    assert "of the planted labels," in capsys.readouterr().out


def test_scores_of_two_seeds_are_means(runs, capsys):
    values = []
    for names in ([str(runs / "0")], [str(runs / "1")], [str(runs / "0"), str(runs / "1")]):
        assert main(["scores", *names, "--scores", "loss", "--threads", "1"]) == 0
        found = rows(Path(names[0]) / "scores.csv")
        values.append(torch.tensor([float(r["loss"]) for r in sorted(found, key=lambda r: int(r["index"]))]))
    torch.testing.assert_close(values[2], (values[0] + values[1]) / 2, rtol=1e-5, atol=1e-6)


def test_ranks_together_give_the_scores_of_one_process(runs):
    """To the bit, each opening the store that another made; rank 0 alone gets them."""
    machine = scoring.exact(runtime.configure(device="cpu", threads=1, precision="fp32", compile="off"))
    experiment, _ = run_folder.read_config(runs / "0")
    training, _ = load_training(experiment)

    def scored(group: Group) -> Scores | None:
        names = ["loss", "grand"]
        found = scoring.score_runs([runs / "0"], training, names, machine, group=group, batch_size=5)
        return None if found is None else found[0]

    alone = scored(ONE_PROCESS)
    assert [scored(Group(Ranks(rank, 3), None, 60.0)) for rank in (2, 1)] == [None, None]
    together = scored(Group(Ranks(0, 3), None, 60.0))
    assert together.predictions.equal(alone.predictions)
    for name, values in alone.values.items():
        assert together.values[name].equal(values)


def test_what_a_score_keeps_is_trained_on_and_resumes(runs, images, tmp_path, capsys):
    assert main(["scores", str(runs / "0"), "--threads", "1"]) == 0
    call = ["train", "--dataset", "folder", "--data-dir", str(images), "--run-dir", "kept", *TINY, *NORM]
    chosen = ["--keep", "0.5", "--which", "easy", "--by", "loss", "--scores", str(runs / "0" / "scores.csv")]
    assert main([*call, *chosen]) == 0
    assert "12 training and 9 test images" in capsys.readouterr().out
    experiment, task = run_folder.read_config(tmp_path / "kept")
    assert experiment.training_set.keep == 0.5
    assert task.train_images == 12
    assert main(["train", "--resume", "kept"]) == 0
    assert "have changed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--scores", "els"], 2, "there is no score 'els'"),
        (["--rank-by", "grund"], 2, "--rank-by grund is not among the scores loss, margin"),
        (["--batch-size", "0"], 2, "--batch-size must be 1 or more"),
    ],
)
def test_wrong_options_get_one_line(runs, capsys, words, code, said):
    assert main(["scores", str(runs / "0"), *words]) == code
    assert said in capsys.readouterr().err


def test_runs_on_other_data_have_no_mean(runs, images, capsys):
    assert main(["scores", "no such run"]) == 1
    assert "is not a run folder" in capsys.readouterr().err
    call = ["train", "--dataset", "folder", "--data-dir", str(images), "--run-dir", "clean", *TINY, *NORM]
    assert main([*call, "--epochs", "1"]) == 0
    assert main(["scores", str(runs / "0"), "clean"]) == 1
    assert "trained on other images or labels" in capsys.readouterr().err
    assert main(["scores", "clean", "--scores", "forgetting", "margin"]) == 1
    assert "no record to count forgetting in" in capsys.readouterr().err
    assert main(["scores", "clean"]) == 0
    assert "the network disagrees with" in capsys.readouterr().out
    first = Experiment("digits", None, 0, FAST, training_set=TrainingSet(keep=0.5, which="random"))
    scoring.check_same_data([first, first])
    with pytest.raises(AppError, match="other images"):
        scoring.check_same_data([first, replace(first, seed=1)])


def test_advice_names_the_best_score() -> None:
    from resnet_func.app import data, training_set

    source = training_set.select(data.load("digits").train, torch.arange(10))
    planted = torch.arange(10) == 3
    good, bad = torch.zeros(10), torch.arange(10.0)
    good[3] = 1
    scores = Scores({"loss": bad, "el2n": good}, source.labels, (source.labels + 1) % 10)
    training = Training(source, torch.arange(10), planted)
    experiment = Experiment("folder", "my images", 0, FAST)
    said = scoring.advice(scores, training, "loss", Path("run"), experiment)
    assert "el2n finds 100.0% in the first 10 %" in said
    clean = training._replace(planted=torch.zeros(10, dtype=torch.bool))
    said = scoring.advice(scores, clean, "loss", Path("a run"), experiment)
    assert "train --dataset folder --data-dir 'my images' --keep 0.99 --which easy --by loss" in said
    assert said.endswith("--scores 'a run/scores.csv'")
    untrained = scores._replace(predictions=(source.labels + 1) % 10)
    said = scoring.advice(untrained, clean, "loss", Path("run"), experiment)
    assert "disagrees with 10 of 10 labels (100.0%): it has not learnt these images" in said
    assert "--keep" not in said
    found = scoring.found_by_score(scores, planted)
    assert found["el2n"] == (1.0, 1.0)
    assert found["loss"] == (0.0, 0.0)


def test_an_epoch_of_small_images_is_scored_on_small_images(images, tmp_path):
    """The networks that a run keeps are looked at as they were trained, each at its epoch's size."""
    run = tmp_path / "run"
    train_run(images, run, "--snapshots", "2", "--early-scales", "0.5", "0.5", *NORM)
    machine = scoring.exact(runtime.configure(device="cpu", threads=1, precision="fp32", compile="off"))
    trained, kept, _ = scoring.load_checkpoints(run, machine)
    assert [each.scale for each in kept] == [0.5, 1.0]
    splits = load_data(trained.experiment)
    training = Training(splits.train, torch.arange(24), torch.zeros(24, dtype=torch.bool))
    scores, _ = scoring.score_runs([run], training, ["loss"], machine, batch_size=8)
    prepare = batches.Preparer(trained.task, machine)
    want = torch.zeros(24)
    for each, scale in zip(kept, (0.5, 1.0), strict=True):
        x = prepare.scale(prepare(splits.train.images), scale)
        assert x.shape[-1] == round(scale * trained.task.image_size)
        logits, _ = trained.model.apply(*each.leaves, x, train=False)
        want += cross_entropy(logits, splits.train.labels) / 2
    torch.testing.assert_close(scores.values["loss"], want, rtol=1e-4, atol=1e-5)
