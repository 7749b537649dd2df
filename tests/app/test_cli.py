"""The program as a user calls it: what it writes, what it says, and what it answers to mistakes."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from resnet_func import calibration
from resnet_func.app import inference, recipes, runtime
from resnet_func.app.answers import scoring
from resnet_func.app.cli import main
from resnet_func.app.data import write_shards
from resnet_func.app.storage import checkpoint, run_folder
from resnet_func.app.training import budget
from resnet_func.app.training_set import load_data
from resnet_func.models import zoo
from tests.app.image_folder import TINY, make_image_folder, read_metrics, train_run

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    return train_run(images, tmp_path_factory.mktemp("runs") / "run")


def test_train_fills_the_run_folder(trained):
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "config.json",
        "metrics.jsonl",
        "curves.png",
        "confusion.png",
        "mistakes.png",
        "checkpoints",
    }
    assert [record["epoch"] for record in read_metrics(trained)] == [1, 2]
    assert set(read_metrics(trained)[0]) == {
        "epoch",
        "train_loss",
        "train_accuracy",
        "test_loss",
        "test_accuracy",
        "seconds",
        "images_per_second",
    }
    for name in ("curves.png", "confusion.png", "mistakes.png"):
        assert (trained / name).read_bytes().startswith(b"\x89PNG")


def test_evaluate_repeats_the_last_epoch(trained, capsys):
    assert main(["evaluate", "--run-dir", str(trained), "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert f"accuracy {read_metrics(trained)[-1]['test_accuracy']:.2%}" in printed
    assert all(name in printed for name in ("blue", "green", "red", "recall"))


def test_evaluate_with_flips_and_the_best_checkpoint(trained, capsys):
    assert main(["evaluate", "--run-dir", str(trained), "--flips", "--checkpoint", "best"]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_evaluate_with_the_last_layers_posterior(trained, capsys):
    assert main(["evaluate", "--run-dir", str(trained), "--laplace", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    # of the images alone, where the recipe tests on mirror images, too
    machine = scoring.exact(runtime.configure(device="cpu", threads=1, precision="fp32"))
    network, _ = inference.load_trained(trained, "last", machine)
    test = load_data(network.experiment).test
    accuracy = f"accuracy {inference.evaluate_trained(network, test, machine).accuracy:.2%}"
    assert f"plain:   {accuracy}, negative log likelihood" in printed
    assert "Laplace: accuracy" in printed
    assert printed.count("calibration error") == 2
    assert "posterior is of 24 training images" in printed
    assert main(["evaluate", "--run-dir", str(trained), "--laplace", "--flips"]) == 2
    assert "Leave out --flips" in capsys.readouterr().err


def test_predict_names_the_classes(trained, images, capsys):
    files = [str(images / "test" / "red" / "000.png"), str(images / "test" / "blue" / "001.png")]
    assert main(["predict", *files, "--run-dir", str(trained)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("%") == 6
    assert all(name in printed for name in ("blue", "green", "red", "000.png", "001.png"))


def test_predict_goes_on_after_a_file_that_it_cannot_read(trained, images, tmp_path, capsys):
    good = [str(images / "test" / "red" / "000.png"), str(images / "test" / "blue" / "001.png")]
    (tmp_path / "text.png").write_text("no image")
    call = ["predict", good[0], str(tmp_path / "text.png"), "missing.png", good[1], "--run-dir", str(trained)]
    assert main(call) == 1
    printed = capsys.readouterr()
    told = printed.err.splitlines()
    assert len(told) == 2
    assert all(line.startswith("resnet-func: ") for line in told)
    assert "text.png: cannot be decoded" in told[0]
    assert "missing.png: there is no such file" in told[1]
    assert main(["predict", *good, "--run-dir", str(trained)]) == 0
    assert capsys.readouterr().out == printed.out
    assert main(["predict", "missing.png", "--run-dir", str(trained)]) == 1
    assert capsys.readouterr().out == ""


ORDERS = {  # words, and what is read of them
    "number-first": ("attribute --test-index 3 a.png --run-dir R", ["a.png"], (3,)),
    "file-first": ("attribute a.png --test-index 3 4 --run-dir R", ["a.png"], (3, 4)),
    "between": (
        "attribute a.png --test-index 3 b.png 5 --run-dir R c.png",
        ["a.png", "b.png", "c.png"],
        (3, 5),
    ),
    "equals": ("attribute --run-dir=R --test-index=3 a.png", ["a.png"], (3,)),
    "underscore": ("attribute --run-dir R --test_index 3 a.png", ["a.png"], (3,)),
    "equal-words": ("attribute --run-dir R --threads 1 1", ["1"], ()),
    "predict": ("predict a.png --run-dir R b.png", ["a.png", "b.png"], None),
    "runs": ("scores --scores margin el2n R --batch-size 4", ["R"], ("margin", "el2n")),
    "runs-first": ("scores R --scores margin el2n", ["R"], ("margin", "el2n")),
}


@pytest.mark.parametrize(("words", "files", "listed"), ORDERS.values(), ids=ORDERS)
def test_files_and_runs_may_stand_anywhere(trained, monkeypatch, words, files, listed):
    parsed = []
    command = words.split()[0]
    monkeypatch.setattr(f"resnet_func.app.commands.{command}.main", parsed.append)
    assert main([word.replace("R", str(trained)) for word in words.split()]) == 0
    found = vars(parsed[0])
    assert [str(path) for path in found.get("images", found.get("runs"))] == [
        file.replace("R", str(trained)) for file in files
    ]
    assert found.get("test_index", found.get("scores")) == listed


def test_a_run_folder_in_place_of_an_image(trained, capsys):
    for command in ("predict", "attribute"):
        assert exit_code([command, str(trained)]) == 2
        assert f"is a run folder, not an image: name it by --run-dir {trained}" in capsys.readouterr().err


def test_a_damaged_config_is_one_line_in_every_command(trained, images, tmp_path, capsys):
    damaged, image = tmp_path / "damaged", str(images / "test" / "red" / "000.png")
    shutil.copytree(trained, damaged)
    config = json.loads((damaged / "config.json").read_text())
    config["experiment"]["recipe"]["microbatches"] = "two"
    (damaged / "config.json").write_text(json.dumps(config))
    run = ["--run-dir", str(damaged)]
    for call in (
        ["evaluate", *run],
        ["predict", image, *run],
        ["attribute", image, *run],
        ["scores", str(damaged)],
        ["curvature", str(damaged)],
        ["train", "--resume", str(damaged)],
    ):
        assert exit_code(call) == 1
        error = capsys.readouterr().err
        assert (
            f"{damaged}/config.json is damaged: experiment.recipe.microbatches must be a whole number"
            in error
        )
        assert error.count("\n") == 1


def test_summary_prints_the_published_numbers(capsys):
    assert main(["summary", "resnet50"]) == 0
    printed = capsys.readouterr().out
    assert "layer4.2.conv3" in printed
    assert "25,557,032" in printed


def test_the_default_run_folder_and_the_latest_run(images, capsys):
    call = ["train", "--dataset", "folder", "--data-dir", str(images), *TINY, "--epochs", "1"]
    assert main(call) == 0
    assert main(call) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["folder-resnet20", "folder-resnet20-2"]
    assert main(["evaluate"]) == 0
    assert "runs/folder-resnet20-2/confusion.png" in capsys.readouterr().out


def test_the_default_batch_follows_a_small_folder(images, capsys):
    where = ["--dataset", "folder", "--data-dir", str(images), "--run-dir", "run"]
    call = ["train", *where, "--model", "resnet20", "--epochs", "1", "--crop", "1", "--threads", "1"]
    assert main(call) == 0
    said = capsys.readouterr().out
    assert "batch size: 8 in place of 512, for 24 training images" in " ".join(said.split())
    assert run_folder.read_config(Path("run"))[0].recipe.batch_size == 8
    assert main(["train", "--resume", "run"]) == 0  # the config is what decides
    assert "in place of" not in capsys.readouterr().out


def test_a_run_goes_on_with_the_batch_it_began_with(images, capsys, monkeypatch):
    monkeypatch.setattr(recipes, "FAST", replace(recipes.FAST, batch_size=12))
    where = ["--dataset", "folder", "--data-dir", str(images), "--run-dir", "run"]
    call = ["train", *where, "--model", "resnet20", "--epochs", "1", "--crop", "1", "--threads", "1"]
    with mock.patch.object(recipes, "fit_batch", lambda recipe, *data: recipe):  # as it was begun long ago
        assert main(call) == 0
    assert main(["train", "--resume", "run"]) == 0
    assert "in place of" not in capsys.readouterr().out


def test_resume_of_a_finished_run_changes_nothing(trained, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    assert main(["train", "--resume", str(copy)]) == 0
    assert read_metrics(copy) == read_metrics(trained)
    for name in ("last.json", "best.json"):
        path = Path("checkpoints") / name
        assert (copy / path).read_bytes() == (trained / path).read_bytes()


def test_help_states_the_defaults_of_the_recipe(capsys):
    for recipe in ("fast", "article"):
        with pytest.raises(SystemExit) as stop:
            main(["train", "--recipe", recipe, "--dataset", "cifar10", "--help"])
        assert stop.value.code == 0
        printed = " ".join(capsys.readouterr().out.split())
        values = recipes.recipe(recipe, "cifar10")
        for name in ("model", "epochs", "learning-rate", "image-size"):
            value = getattr(values, name.replace("-", "_"))
            assert f"--{name}" in printed
            assert f"(default: {value})" in printed, name
        for field in fields(values):
            assert f"--{field.name.replace('_', '-')}" in printed


USAGE = {
    "no-such-command": (["trian"], "trian"),
    "no-such-option": (["train", "--epoch", "3"], "--epoch"),
    "no-such-dataset": (["train", "--dataset", "imagenet"], "imagenet"),
    "no-such-recipe": (["train", "--recipe", "slow"], "slow"),
    "epochs-not-a-number": (["train", "--epochs", "many"], "many"),
    "epochs-zero": (["train", "--epochs", "0"], "epochs must be 1 or more; got 0"),
    "batch-size-negative": (["train", "--batch-size", "-4"], "batch_size must be 1 or more; got -4"),
    "warmup-above-one": (["train", "--warmup", "1.5"], "warmup must be a share of the steps"),
    "no-such-model": (
        ["train", "--model", "resnet19"],
        "no network is called 'resnet19'; the zoo has resnet18",
    ),
    "predict-nothing": (["predict"], "IMAGE"),
    "seed-negative": (["train", "--seed", "-1"], "--seed must be 0 or more, below 2 ** 63; got -1"),
    "images-for-digits": (["train", "--data-dir", "."], "digits come with scikit-learn"),
    "norm-of-another": (
        ["summary", "torchvision:resnet18", "--norm", "group"],
        "torchvision:resnet18 has its own",
    ),
    "run-as-a-score": (["scores", "--scores", "."], ". was read as the name of a score"),
    "run-of-evaluate": (["evaluate", "run"], "resnet-func evaluate --run-dir run"),
    "summary-of-no-such-model": (["summary", "vgg"], "no network is called 'vgg'; the zoo has resnet18"),
    "folder-without-data-dir": (["train", "--dataset", "folder"], "--dataset folder needs --data-dir"),
    "test-index-no-number": (["attribute", "--test-index", "x"], "--test-index"),
}


@pytest.mark.parametrize(("call", "says"), USAGE.values(), ids=USAGE)
def test_wrong_usage_exits_2(call, says, capsys):
    assert exit_code(call) == 2
    printed = capsys.readouterr()
    words = " ".join(
        (printed.err + printed.out).replace("│", " ").replace("|", " ").split()
    )  # out of the box
    assert says in words
    assert "Traceback" not in printed.err
    assert not list(Path().iterdir())


def test_a_value_out_of_range_is_one_plain_line(capsys):
    assert exit_code(["train", "--epochs", "0"]) == 2
    assert (
        capsys.readouterr().err == "resnet-func: epochs must be 1 or more; got 0. Or give the run --minutes\n"
    )


def test_what_could_steer_a_terminal_is_escaped(capsys):
    assert exit_code(["evaluate", "--run-dir", "a\x1b[31mb"]) == 1
    printed = capsys.readouterr().err
    assert "a\\x1b[31mb is not a run folder" in printed
    assert "\x1b" not in printed


FAILURES = {
    "summary-of-no-such-module": (["summary", "nosuch:net"], "no package or module 'nosuch'"),
    "no-such-folder": (["train", "--dataset", "folder", "--data-dir", "nowhere"], "nowhere"),
    "cuda-where-none-is": (["train", "--device", "cuda:9"], "cuda:9"),
    "batch-larger-than-data": (["train", "--batch-size", "5000"], "batch_size 5000 is more than the 1433"),
    "crop-larger-than-image": (["train", "--crop", "9"], "padding"),
    "norm-groups-do-not-fit": (["train", "--model", "resnet20", "--norm", "group", "--crop", "99"], "99"),
    "colour-statistics-for-grey": (["train", "--normalization", "imagenet"], "normalization='imagenet'"),
    "evaluate-without-a-run": (["evaluate"], "there is no run with a checkpoint below runs/"),
    "evaluate-no-run-folder": (["evaluate", "--run-dir", "."], "has no config.json"),
    "resume-no-run-folder": (["train", "--resume", "nowhere"], "nowhere"),
    "no-network": (["train", "--dataset", "cifar10", "--data-dir", "empty", "--no-download"], "cifar10"),
}


@pytest.mark.parametrize(("call", "says"), FAILURES.values(), ids=FAILURES)
def test_failures_exit_1_with_one_line(call, says, capsys):
    assert exit_code(call) == 1
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith("resnet-func: ")
    assert error.count("\n") == 1
    assert not list(Path().iterdir()), "a refused run leaves nothing"


def test_failures_with_a_trained_run(trained, images, tmp_path, capsys):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8 no image")
    emptied = tmp_path / "emptied"
    shutil.copytree(trained, emptied)
    for path in (emptied / "checkpoints").glob("last*"):
        path.write_bytes(b"damaged")
    garbled = tmp_path / "garbled"
    shutil.copytree(trained, garbled)
    (garbled / "config.json").write_text("{")
    calls = {
        "broken.jpg": ["predict", str(broken), "--run-dir", str(trained)],
        "missing.png": ["predict", "missing.png", "--run-dir", str(trained)],
        "exists already": ["train", "--run-dir", str(trained)],
        "last": ["evaluate", "--run-dir", str(emptied)],
        "config.json is damaged": ["evaluate", "--run-dir", str(garbled)],
        "elsewhere": ["evaluate", "--run-dir", str(trained), "--data-dir", "elsewhere"],
    }
    before = (trained / "metrics.jsonl").read_bytes()
    for says, call in calls.items():
        assert exit_code(call) == 1, call
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_resume_refuses_other_options(trained, capsys):
    assert exit_code(["train", "--resume", str(trained), "--epochs", "9"]) == 2
    assert "--resume takes everything from" in capsys.readouterr().err


def test_a_diverged_run_says_so_and_keeps_its_checkpoint(images, capsys):
    call = ["train", "--dataset", "folder", "--data-dir", str(images), *TINY, "--run-dir", "run"]
    assert exit_code([*call, "--learning-rate", "1e30", "--epochs", "3"]) == 1
    assert "training diverged. Lower --learning-rate" in capsys.readouterr().err


def test_a_full_disk_is_one_line(images, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise checkpoint.CheckpointError("cannot save: No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    call = ["train", "--dataset", "folder", "--data-dir", str(images), *TINY, "--run-dir", "run"]
    assert exit_code(call) == 1
    assert capsys.readouterr().err == "resnet-func: cannot save: No space left on device\n"


def test_of_equal_flags_all_take_the_last(images, monkeypatch):
    parsed = []
    monkeypatch.setattr("resnet_func.app.commands.train.main", parsed.append)
    for call, dataset, recipe in (
        (["--dataset", "cifar10", "--dataset", "digits"], "digits", recipes.DIGITS),
        (["--dataset", "digits", "--dataset=cifar10"], "cifar10", recipes.FAST),
        (["--recipe=fast", "--recipe", "article"], "digits", recipes.ARTICLE),
        (["--recipe", "article", "--recipe", "fast", "--dataset", "mnist"], "mnist", None),
    ):
        assert main(["train", *call]) == 0
        options = parsed.pop()
        assert (options.dataset, options.hyper) == (dataset, recipe or recipes.recipe("fast", "mnist"))


def test_minutes_take_the_place_of_epochs_and_epochs_of_minutes(monkeypatch, capsys):
    parsed = []
    monkeypatch.setattr("resnet_func.app.commands.train.main", parsed.append)
    for words, epochs, minutes in (
        ("--dataset cifar10", 0, 20),
        ("--dataset cifar10 --minutes 5", 0, 5),
        ("--dataset cifar10 --epochs 3", 3, 0),
        ("--minutes 0.5", 0, 0.5),
        ("--epochs 7", 7, 0),
        ("", recipes.DIGITS.epochs, 0),
    ):
        assert main(["train", *words.split()]) == 0
        options = parsed.pop()
        assert (options.hyper.epochs, options.hyper.minutes) == (epochs, minutes), words
    assert exit_code(["train", "--minutes", "5", "--epochs", "3"]) == 2
    assert "leave one out" in capsys.readouterr().err


def test_a_run_of_minutes_goes_on_with_the_epochs_it_chose(images, capsys, monkeypatch):
    tiny = [word for word in TINY if word not in ("--epochs", "2")]
    call = ["train", "--dataset", "folder", "--data-dir", str(images), *tiny, "--run-dir", "run"]
    monkeypatch.setattr(budget, "MEASURE_SECONDS", 0.0)
    fast = replace(calibration.TYPICAL, source="measured")
    monkeypatch.setattr(calibration, "measured", lambda *_: fast)
    assert main([*call, "--minutes", "0.01"]) == 0
    assert "budget: 0.01 minutes are " in capsys.readouterr().out
    config, machine = run_folder.read_config(Path("run"))[0], run_folder.read_machine(Path("run"))
    assert config.recipe.epochs >= 1
    assert machine == {"speeds": fast.as_numbers(), "compile": False}
    asked = []
    configure = runtime.configure
    monkeypatch.setattr(runtime, "configure", lambda **given: asked.append(given) or configure(**given))
    assert main(["train", "--resume", "run"]) == 0
    assert "budget" not in capsys.readouterr().out
    assert asked[0]["speeds"].as_numbers() == fast.as_numbers()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_run_on_shards_is_resumed_asked_and_tested(images, capsys):
    write_shards(images, "shards", images=9)
    data = ("--dataset", "shards", "--data-dir", "shards", "--shuffle-window", "10", "--run-dir", "run")
    assert main(["train", *data, *TINY, "--model", "tests.app.tiny:network"]) == 0
    experiment, task = run_folder.read_config(Path("run"))
    assert (experiment.dataset, experiment.shuffle_window, task.train_images) == ("shards", 10, 24)
    assert main(["train", "--resume", "run"]) == 0
    assert main(["evaluate", "--run-dir", "run"]) == 0
    assert main(["scores", "run", "--threads", "1", "--scores", "loss"]) == 0
    assert re.search(r"shards/train/00000[0-2]\.tar::0000", Path("run/scores.csv").read_text())
    shutil.rmtree("shards/train")
    capsys.readouterr()
    assert exit_code(["evaluate", "--run-dir", "run"]) == 1
    assert "shards: expected train/*.tar and test/*.tar" in capsys.readouterr().err


def test_resume_twice_takes_the_last(trained, tmp_path, monkeypatch):
    parsed = []
    monkeypatch.setattr("resnet_func.app.commands.train.main", parsed.append)
    assert main(["train", "--resume", "nowhere", "--resume", str(trained)]) == 0
    assert (parsed[0].resume, parsed[0].dataset, parsed[0].hyper.epochs) == (trained, "folder", 2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_last_record_the_printed_line_and_evaluate_agree(images, capsys, precision):
    machine = ["--threads", "1", "--precision", precision]
    call = ["train", "--dataset", "folder", "--data-dir", str(images), *TINY, "--run-dir", "run", *machine]
    assert main(call) == 0
    record = read_metrics(Path("run"))[-1]
    numbers = f"accuracy {record['test_accuracy']:.2%}, loss {record['test_loss']:.4f}"
    assert f"test {numbers} after 2 epochs" in capsys.readouterr().out
    assert main(["evaluate", "--run-dir", "run", *machine]) == 0
    assert f"{numbers} on 9 images" in capsys.readouterr().out


def test_a_run_that_was_refused_is_not_the_latest(images, capsys):
    call = ["train", "--dataset", "folder", "--data-dir", str(images), *TINY, "--epochs", "1"]
    assert main(call) == 0
    assert exit_code([*call, "--crop", "99"]) == 1
    killed = Path("runs") / "killed"  # without a chance to tidy up
    (killed / "checkpoints").mkdir(parents=True)
    shutil.copy(Path("runs") / "folder-resnet20" / "config.json", killed)
    capsys.readouterr()
    assert main(["evaluate"]) == 0
    assert "runs/folder-resnet20/confusion.png" in capsys.readouterr().out


def test_a_fallback_is_said_on_stderr(trained, images, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    newest = max((run / "checkpoints").glob("last.*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    newest.write_bytes(newest.read_bytes()[:-1])
    for call in (["evaluate"], ["predict", str(images / "test" / "red" / "000.png")]):
        assert main([*call, "--run-dir", str(run)]) == 0
        printed = capsys.readouterr()
        assert printed.err.startswith("resnet-func: checkpoint 'last' is damaged")
        assert printed.err.endswith("loaded the one before it\n")
        assert printed.err.count("\n") == 1
        assert "%" in printed.out


NAMES_ON_DISK = ("[b] :cat:", "[old]", "[red]x")


def test_names_are_printed_as_they_are(tmp_path, capsys):
    images = make_image_folder(tmp_path / "data [bold]", classes=NAMES_ON_DISK)
    run = tmp_path / "run [2] :dog:"
    call = ["train", "--dataset", "folder", "--data-dir", str(images), *TINY, "--epochs", "1"]
    assert main([*call, "--run-dir", str(run)]) == 0
    assert f"see {run}/curves.png" in capsys.readouterr().out
    assert main(["evaluate", "--run-dir", str(run)]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {run}/confusion.png" in printed
    assert all(name in printed for name in NAMES_ON_DISK)
    photo = shutil.copy(next((images / "test").rglob("*.png")), tmp_path / "photo [i]1[b] :cat:.png")
    os.chdir(tmp_path)
    assert main(["predict", photo.name, "--run-dir", str(run)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (photo.name, *NAMES_ON_DISK))


def test_a_name_that_the_terminal_cannot_show_is_escaped(trained, images, tmp_path, capsys):
    photo = os.fsencode(tmp_path) + b"/caf\xe9.png"
    shutil.copy(next((images / "test").rglob("*.png")), photo)
    assert main(["predict", os.fsdecode(photo), "--run-dir", str(trained)]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/caf\\udce9.png\n")


def test_an_error_names_a_path_as_it_is(tmp_path, capsys):
    assert exit_code(["train", "--resume", "my  run [a]"]) == 1
    assert capsys.readouterr().err.startswith("resnet-func: my  run [a] is not a run folder")


def test_one_step_in_all(images, capsys):
    call = ["train", "--dataset", "folder", "--data-dir", str(images), *TINY, "--epochs", "1"]
    assert exit_code([*call, "--batch-size", "24", "--schedule", "one-cycle"]) == 1
    assert "Raise --epochs, lower --batch-size, or try --schedule constant" in capsys.readouterr().err
    assert not list(Path().iterdir())


def test_every_network_of_the_zoo_has_a_summary(capsys):
    for name in zoo.ZOO:
        assert main(["summary", name]) == 0, name
    assert "layer3.17.conv2" in capsys.readouterr().out


def test_python_m_is_the_same_program():
    done = subprocess.run(
        [sys.executable, "-m", "resnet_func", "summary", "resnet9000"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("resnet-func: no network is called 'resnet9000'; the zoo has")


def exit_code(call: list[str]) -> int:
    """What the process would exit with; the option parser exits by itself."""
    try:
        return main(call)
    except SystemExit as stop:
        return int(stop.code or 0)


NETWORK = """
from torch import nn

def make(num_classes):
    layers = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(4, num_classes))
"""


def test_a_network_of_ones_own_is_trained_evaluated_asked_and_begun_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, run = make_image_folder(tmp_path / "images"), tmp_path / "run"
    (tmp_path / "net.py").write_text(NETWORK)
    spec = f"{tmp_path / 'net.py'}:make"
    words = ["train", "--dataset", "folder", "--data-dir", str(images), "--model", spec]
    words += ["--epochs", "2", "--batch-size", "4", "--crop", "0", "--compile", "off"]
    assert main([*words, "--run-dir", str(run)]) == 0
    assert main(["evaluate", "--run-dir", str(run)]) == 0
    image = next((images / "test").rglob("*.png"))
    assert main(["predict", str(image), "--run-dir", str(run)]) == 0
    assert main(["summary", spec, "--num-classes", "7", "--image-size", "16"]) == 0
    assert "7" in capsys.readouterr().out
    weights = tmp_path / "weights.pth"
    module = runpy.run_path(str(tmp_path / "net.py"))["make"](9)  # another number of classes
    torch.save({"model": module.state_dict()}, weights)
    still = ["--learning-rate", "0", "--weight-decay", "0", "--optimizer", "sgd"]
    begun = [*words, *still, "--init", str(weights)]
    with pytest.warns(UserWarning, match="from_state_dict|checkpoint|head|'model'"):  # what was read
        assert main([*begun, "--run-dir", str(tmp_path / "begun")]) == 0
    folder = run_folder.checkpoints(tmp_path / "begun")
    flat, _, _ = checkpoint.load_flat(folder, "last")
    assert torch.equal(flat["params.0.weight"], module.state_dict()["0.weight"])
    assert flat["params.5.weight"].shape[0] != 9
    assert main([*words, "--init", str(tmp_path / "no.pth"), "--run-dir", str(tmp_path / "none")]) == 1
    assert "no.pth" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("--help", 0),
        ("train --help", 0),
        ("train --epochs 0", 2),
        ("train --model resnet19", 2),
        ("evaluate", 1),
    ],
)
def test_help_and_refusals_do_not_wait_for_torch(call, code):
    script = (
        "import sys; from resnet_func.app.cli import main\n"
        f"try: code = main({call.split()})\n"
        "except SystemExit as stop: code = stop.code\n"
        "sys.exit(100 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr


def test_a_command_of_one_process_is_refused_on_several_and_one_says_so(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert main(["summary", "resnet20"]) == 2
        printed = capsys.readouterr()
        assert printed.err.count("summary runs on one process: start it without torchrun") == lines
        assert not printed.out


# --------------------------------------------------------------------------- private training

PRIVATE = ("--private", "--epsilon", "2", "--delta", "1e-3", "--model", "tests.app.tiny:network")


def test_a_private_run_says_what_it_promises_and_keeps_it(images, capsys):
    data_dir = ("--dataset", "folder", "--data-dir", str(images))
    assert main(["train", *data_dir, "--run-dir", "run", *TINY, *PRIVATE]) == 0
    said = capsys.readouterr().out
    assert "(2, 0.001)-differentially private" in said
    assert "spent: epsilon" in said
    assert {"epsilon"} <= set(read_metrics(Path("run"))[0])
    assert read_metrics(Path("run"))[-1]["epsilon"] <= 2
    assert not list(Path("run").rglob("*seeds*"))
    assert main(["train", "--resume", "run"]) == 0  # nothing left to spend
    assert main(["evaluate", "--run-dir", "run", "--threads", "1"]) == 0
    assert main(["evaluate", "--run-dir", "run", "--threads", "1", "--laplace"]) == 1
    assert "this run promises privacy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--epsilon", "8"], "need --private"),
        (["--private"], "needs a budget"),
        (["--private", "--epsilon", "0"], "--epsilon must be above 0"),
        (["--private", "--epsilon", "8", "--delta", "1"], "--delta must be in"),
        (["--private", "--epsilon", "8", "--max-norm", "0"], "--max-norm must be above 0"),
        (["--private", "--epsilon", "8", "--views", "0"], "--views must be 1 or more"),
        (["--private", "--epsilon", "8", "--norm", "batch"], "Use --norm group"),
        (["--private", "--epsilon", "8", "--sampling", "shuffle"], "Use --sampling poisson"),
        (["--private", "--epsilon", "8", "--precision", "bf16"], "rounding to bf16"),
        (["--private", "--epsilon", "8", "--shuffle-window", "9"], "leave --shuffle-window out"),
        (["--shuffle-window", "-1"], "--shuffle-window must be 0 or more; got -1"),
        (
            ["--private", "--epsilon", "8", "--sampling", "fixed-size", "--neighbours", "add-or-remove-one"],
            "replace-one only",
        ),
    ],
    ids=str,
)
def test_what_would_cost_the_guarantee_is_refused(capsys, options, says):
    assert main(["train", *options]) == 2
    assert says in capsys.readouterr().err
    assert not Path("runs").exists()
