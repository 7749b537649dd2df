"""The run folder: found, made, written in one piece, read with care."""

from __future__ import annotations

import json
import os
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resnet_func import calibration
from resnet_func.app.experiment import Experiment, Privacy, Task
from resnet_func.app.recipes import ARTICLE, FAST, Recipe
from resnet_func.app.storage import checkpoint, run_folder
from resnet_func.app.storage.run_folder import RunError

pytestmark = pytest.mark.usefixtures("own_folder")

EXPERIMENT = Experiment("cifar10", None, 7, FAST)
TASK = Task(("a", "[b]"), 3, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0), 32, 50, 10)
RECORDS = [{"epoch": 1, "train_loss": 0.1}, {"epoch": 2, "train_loss": float("inf")}]


def keep(folder: Path | None, name: str) -> Path:
    """A new run folder."""
    with run_folder.new(folder, name) as made:
        return made


def save_checkpoint(folder: Path) -> None:
    checkpoint.save(run_folder.checkpoints(folder), "last", {}, meta={})


def test_the_first_free_name() -> None:
    assert [keep(None, "a") for _ in range(3)] == [Path("runs/a"), Path("runs/a-2"), Path("runs/a-3")]


def test_an_empty_folder_may_be_used_and_a_full_one_not(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    folder.mkdir(parents=True)
    assert keep(folder, "a") == folder
    (folder / "kept").write_text("mine")
    with pytest.raises(
        RunError, match=re.escape(f"{folder} exists already. Go on with it by --resume {folder}")
    ):
        keep(folder, "a")
    assert (folder / "kept").read_text() == "mine"


@pytest.mark.parametrize("name", [None, "run"])
def test_of_runs_started_at_once_each_gets_its_own_folder(name: str | None) -> None:
    got: list[Path] = []
    refused: list[RunError] = []
    start = threading.Barrier(16)

    def begin() -> None:
        start.wait()
        try:
            got.append(keep(name and Path(name), "a"))
        except RunError as error:
            refused.append(error)

    for _ in range(10):
        threads = [threading.Thread(target=begin) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(set(got)) == len(got) == (1 if name else 160)
    assert len(got) + len(refused) == 160


@pytest.mark.parametrize("error", [RunError("refused"), KeyboardInterrupt()], ids=["refused", "stopped"])
@pytest.mark.parametrize("name", [None, "deep/run"])
def test_a_run_that_ends_before_its_first_checkpoint_leaves_nothing(
    tmp_path: Path, name: str | None, error: BaseException
) -> None:
    def fail() -> None:
        with run_folder.new(name and Path(name), "a") as folder:
            run_folder.write_config(folder, EXPERIMENT, TASK)
            raise error

    with pytest.raises(type(error)):
        fail()
    assert not list(tmp_path.iterdir())


def test_what_was_there_before_a_failed_run_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    keep(None, "a")

    def fail(folder: Path | None, *, name: str = "a") -> None:
        with run_folder.new(folder, name) as made:
            (made / "note").write_text("written by someone else")
            raise RunError

    for folder in (Path("mine"), None):
        with pytest.raises(RunError):
            fail(folder)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {
        *("mine", "mine/note", "runs", "runs/a", "runs/a/checkpoints", "runs/a-2", "runs/a-2/note")
    }


def test_a_run_that_fails_after_its_first_checkpoint_is_kept(tmp_path: Path) -> None:
    def fail() -> None:
        with run_folder.new(None, "a") as folder:
            run_folder.write_config(folder, EXPERIMENT, TASK)
            save_checkpoint(folder)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert run_folder.latest() == Path("runs/a")
    assert run_folder.read_config(Path("runs/a")) == (EXPERIMENT, TASK)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot make the run folder .*Choose another --run-dir"):
        keep(tmp_path / "file" / "run", "a")
    with pytest.raises(RunError, match="exists already"):
        keep(tmp_path / "file", "a")


@pytest.mark.parametrize("recipe", [FAST, ARTICLE], ids=["fast", "article"])
def test_the_config_comes_back(tmp_path: Path, recipe: Recipe) -> None:
    described = replace(EXPERIMENT, recipe=recipe)
    run_folder.write_config(tmp_path, described, TASK)
    assert run_folder.read_config(tmp_path) == (described, TASK)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_what_a_run_chose_by_itself_comes_back(tmp_path: Path) -> None:
    assert run_folder.read_machine(tmp_path) == {}
    run_folder.write_config(tmp_path, EXPERIMENT, TASK)
    assert run_folder.read_machine(tmp_path) == {}
    chosen = {"speeds": calibration.TYPICAL.as_numbers(), "compile": False}
    run_folder.write_config(tmp_path, EXPERIMENT, TASK, chosen)
    assert run_folder.read_machine(tmp_path) == chosen
    assert run_folder.read_config(tmp_path) == (EXPERIMENT, TASK)
    for damaged in ("{", "[]", "{}", '{"machine": 1}'):
        (tmp_path / "config.json").write_text(damaged)
        assert run_folder.read_machine(tmp_path) == {}


def test_a_config_that_does_not_know_how_many_images_there_were(tmp_path: Path) -> None:
    run_folder.write_config(tmp_path, EXPERIMENT, TASK)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["task"]["train_images"], config["task"]["test_images"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run_folder.read_config(tmp_path)[1] == TASK._replace(train_images=0, test_images=0)


@pytest.mark.parametrize("damage", ["experiment", "task"])
def test_a_config_of_another_version(tmp_path: Path, damage: str) -> None:
    run_folder.write_config(tmp_path, EXPERIMENT, TASK)
    config = json.loads((tmp_path / "config.json").read_text())
    config[damage]["unheard_of"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="not of this version.*unheard_of.*Start a new run"):
        run_folder.read_config(tmp_path)


DAMAGES = {  # where, what is there instead, and what is said of it
    "text-for-number": ("experiment.recipe.epochs", "ten", "experiment.recipe.epochs must be a whole number"),
    "number-for-text": ("experiment.dataset", 7, "experiment.dataset must be one of 'digits'.*got 7"),
    "no-such-choice": ("experiment.recipe.optimizer", "lion", "experiment.recipe.optimizer must be one of"),
    "truth-for-number": ("experiment.seed", True, "experiment.seed must be a whole number; got True"),
    "fraction": ("task.train_images", 2.5, "task.train_images must be a whole number; got 2.5"),
    "null": ("experiment.recipe.learning_rate", None, "learning_rate must be a number; got None"),
    "list-for-object": ("experiment.recipe", [], "experiment.recipe must be an object"),
    "object-for-list": ("task.classes", {}, "task.classes must be a list"),
    "text-for-object": ("task", "cats", "task must be an object; got 'cats'"),
    "inside-a-list": ("task.mean", [0.5, "x", 0.5], r"task.mean\[1\] must be a number; got 'x'"),
    "pair-of-three": (
        "experiment.recipe.early_scales",
        [[1, 2, 3]],
        r"early_scales\[0\] must be a list of 2",
    ),
    "path": ("experiment.data_dir", ["a"], "experiment.data_dir must be a text"),
    "privacy": ("experiment.privacy", "yes", "experiment.privacy must be an object; got 'yes'"),
    "training-set": ("experiment.training_set", None, "experiment.training_set must be an object"),
    "share": ("experiment.training_set.keep", 2.0, "experiment.training_set: keep must be a share"),
    "range": ("experiment.recipe.batch_size", 0, "experiment.recipe: batch_size must be 1 or more; got 0"),
    "negative-seed": ("experiment.seed", -1, "experiment: seed must be 0 or more"),
    "negative-snapshots": ("experiment.snapshots", -1, "experiment: snapshots must be 0 or more"),
    "no-classes": ("task.classes", [], "task.classes must be one class or more"),
    "channels": ("task.in_channels", 2, "task.mean must be 2 numbers"),
    "spread": ("task.std", [1.0, 0.0, 1.0], "task.std must be 3 above 0"),
    "size": ("task.image_size", 0, "task.image_size must be 1 or more"),
    "machine": ("machine", 1, "machine must be an object"),
    "compile": ("machine.compile", "no", "machine.compile must be true or false"),
    "speeds": ("machine.speeds", [1], "machine.speeds must be an object"),
    "a-speed": ("machine.speeds.call", "fast", "machine.speeds.call must be a number; got 'fast'"),
    "no-speed": ("machine.speeds.call", 0, "machine: speeds.call must be above 0"),
}
CHOSEN = {"speeds": calibration.TYPICAL.as_numbers(), "compile": False}


def change(folder: Path, where: str, value: Any) -> None:
    """Replace a field of config.json."""
    config = json.loads((folder / "config.json").read_text())
    *outer, last = where.split(".")
    inside = config
    for name in outer:
        inside = inside[name]
    inside[last] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("where", "value", "says"), DAMAGES.values(), ids=DAMAGES)
def test_a_field_of_another_type_is_named(tmp_path: Path, where: str, value: Any, says: str) -> None:
    run_folder.write_config(tmp_path, EXPERIMENT, TASK, CHOSEN)
    change(tmp_path, where, value)
    with pytest.raises(RunError, match=f"{tmp_path}/config.json is damaged: .*{says}.*Restore it") as refused:
        run_folder.read_config(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("where", ["experiment", "experiment.recipe", "task"])
def test_a_field_that_is_missing_is_named(tmp_path: Path, where: str) -> None:
    run_folder.write_config(tmp_path, EXPERIMENT, TASK, CHOSEN)
    config = json.loads((tmp_path / "config.json").read_text())
    *outer, last = where.split(".")
    del (config[outer[0]] if outer else config)[last]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match=f"not of this version: {where} is missing. Start a new run"):
        run_folder.read_config(tmp_path)


def test_a_private_runs_numbers_are_checked(tmp_path: Path) -> None:
    private = replace(EXPERIMENT, privacy=Privacy(8.0, 1e-5, 1.0))
    run_folder.write_config(tmp_path, private, TASK, CHOSEN)
    assert run_folder.read_config(tmp_path) == (private, TASK)
    for name, value in (
        ("epsilon", 0),
        ("delta", 1),
        ("noise_multiplier", -1),
        ("max_norm", 0),
        ("views", 0),
    ):
        run_folder.write_config(tmp_path, private, TASK, CHOSEN)
        change(tmp_path, f"experiment.privacy.{name}", value)
        with pytest.raises(RunError, match=f"config.json is damaged: experiment.privacy: {name} must be"):
            run_folder.read_config(tmp_path)


def test_snapshots_are_those_that_a_run_has_numbered(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name in ("epoch-10", "epoch-9", "epoch-9.previous", "epoch-copy", "epoch-"):
        (tmp_path / "checkpoints" / f"{name}.json").touch()
    assert run_folder.snapshots(tmp_path) == ["epoch-9", "epoch-10"]


def test_metrics_are_written_where_they_differ(tmp_path: Path) -> None:
    assert run_folder.write_metrics(tmp_path, RECORDS)
    assert not run_folder.write_metrics(tmp_path, RECORDS)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == RECORDS
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo')
    assert run_folder.write_metrics(tmp_path, RECORDS)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines


@pytest.mark.parametrize("text", ["{", "[]", "", "[" * 100_000], ids=["cut", "list", "empty", "deep"])
def test_a_damaged_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RunError, match="config.json is damaged.*Restore it from a copy"):
        run_folder.read_config(tmp_path)


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run folder: it has no config.json"):
        run_folder.read_config(tmp_path)


def test_the_latest_run_is_of_those_with_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no run with a checkpoint below runs/"):
        run_folder.latest()
    for age, name in ((100, "a"), (300, "b"), (200, "c"), (400, "refused")):
        folder = keep(None, name)
        run_folder.write_config(folder, EXPERIMENT, TASK)
        if name != "refused":
            save_checkpoint(folder)
        os.utime(tmp_path / "runs" / name / "config.json", (age, age))
    assert run_folder.latest() == Path("runs/b")


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder.write_config(tmp_path, EXPERIMENT, TASK)

    def fail(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(
        RunError, match="cannot write .*No space left on device. The old file, if any, is kept"
    ):
        run_folder.write_config(tmp_path, replace(EXPERIMENT, seed=8), TASK)
    monkeypatch.undo()
    assert run_folder.read_config(tmp_path) == (EXPERIMENT, TASK)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_launch_finds_the_run_it_has_begun_and_not_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_folder.find_launch("mine", None) is None
    for name, launch in (("a", "another"), ("b", "mine")):
        with run_folder.new(None, name) as folder:
            run_folder.mark_launch(folder, launch)
            (folder / "checkpoints/last.json.0.tmp").touch()
    assert run_folder.find_launch("mine", None) == Path("runs/b")
    assert run_folder.find_launch("mine", Path("runs/a")) is None
    assert [path.parent.parent.name for path in Path("runs").rglob("*.tmp")] == ["a"]
    with run_folder.new(None, "0") as later:  # a name that comes before
        run_folder.mark_launch(later, "mine")
    os.utime(later / "launch.txt", (2**31, 2**31))
    assert run_folder.find_launch("mine", None) == Path("runs/0")
    run_folder.forget_launch(Path("runs/0"))
    run_folder.forget_launch(Path("runs/b"))
    assert run_folder.find_launch("mine", None) is None


def test_a_refused_run_leaves_no_mark(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError), run_folder.new(folder, "run"):  # noqa: PT012
        run_folder.mark_launch(folder, "mine")
        raise RuntimeError
    assert not folder.exists()


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    left = [tmp_path / "scores.csv.0123.tmp", tmp_path / "checkpoints/last.json.0123.tmp"]
    kept = [tmp_path / "scores.csv", tmp_path / "checkpoints/last.json"]
    for path in left + kept:
        path.touch()
    (tmp_path / "scores-0123.zarr.tmp").mkdir()  # a store removes its own
    run_folder.remove_leftovers(tmp_path)
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in kept)
