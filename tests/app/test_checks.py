"""Options that cannot be: each by its name, what it must be, and what it is; the program exits with 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from resnet_func.app.cli import main
from resnet_func.app.experiment import Experiment, Task
from resnet_func.app.recipes import DIGITS
from resnet_func.app.storage import run_folder

pytestmark = pytest.mark.usefixtures("own_folder")

COMMANDS = {
    "train": ["train"],
    "evaluate": ["evaluate"],
    "predict": ["predict", "a.png"],
    "scores": ["scores"],
    "attribute": ["attribute", "a.png"],
    "curvature": ["curvature"],
}
MACHINE = {
    "--threads -1": "--threads must be 0, for all cores, or up to 4096; got -1",
    "--threads 100000": "--threads must be 0, for all cores, or up to 4096; got 100000",
    "--device foo": "--device must be auto, cpu, cuda, cuda:N or mps; got 'foo'",
    "--device cuda:x": "--device must be auto, cpu, cuda, cuda:N or mps; got 'cuda:x'",
    "--rank-timeout 0": "--rank-timeout must be seconds above 0, and finite; got 0.0",
    "--rank-timeout nan": "--rank-timeout must be seconds above 0, and finite; got nan",
}
VALUES = {
    "train": [
        "--seed -1",
        f"--seed {2**63}",
        "--snapshots -1",
        "--shuffle-window -1",
        "--minutes -5",
        "--minutes nan",
        "--minutes inf",
        "--batch-size 0",
        "--microbatches 0",
        "--learning-rate nan",
        "--rest-learning-rate -1",
        "--weight-decay -1",
        "--momentum 1",
        "--label-smoothing 1",
        "--clip-norm -1",
        "--clip-norm nan",
        "--ema 1",
        "--warmup 1",
        "--crop -1",
        "--cutout -1",
        "--image-size -1",
        "--epochs -1",
        "--corrupt 2",
        "--corrupt nan",
        "--corrupt-seed -1",
        "--keep 0",
        "--early-scales 2 0.5",
        "--early-scales nan nan",
        "--private --epsilon 0",
        "--private --epsilon nan",
        "--private --epsilon 8 --delta 0",
        "--private --epsilon 8 --max-norm inf",
        "--private --epsilon 8 --views 0",
    ],
    "scores": ["--batch-size 0"],
    "attribute": ["--batch-size 0", "--shown 0", "--dim 0", "--test-index -1"],
    "curvature": ["--batch-size 0", "--images 0", "--steps 0", "--probes 0", "--seed -1", f"--seed {2**64}"],
    "summary": ["resnet18 --image-size -1", "resnet18 --num-classes -1"],
}
PAIRS = [(command, words) for command, every in VALUES.items() for words in every]


def refusal(call: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a call is refused as wrong usage."""
    assert main(call) == 2
    said = capsys.readouterr().err
    assert said.startswith("resnet-func: ")
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("words", MACHINE)
def test_a_machine_that_cannot_be_is_wrong_usage(
    capsys: pytest.CaptureFixture[str], command: str, words: str
) -> None:
    assert MACHINE[words] in refusal([*COMMANDS[command], *words.split()], capsys)


@pytest.mark.parametrize(("command", "words"), PAIRS, ids=[" ".join(pair) for pair in PAIRS])
def test_a_number_out_of_range_is_wrong_usage(
    capsys: pytest.CaptureFixture[str], command: str, words: str
) -> None:
    said = refusal([*COMMANDS.get(command, [command]), *words.split()], capsys)
    name = next(word for word in reversed(words.split()) if word.startswith("--")).removeprefix("--")
    assert name in said or name.replace("-", "_") in said


def test_a_device_that_is_not_here_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    """It may be on another machine."""
    assert main(["train", "--device", "cuda:97"]) == 1
    assert "cuda:97" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["folder", "shards"])
def test_ones_own_images_need_their_folder(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert f"--dataset {name} needs --data-dir" in refusal(["train", "--dataset", name], capsys)


@pytest.mark.parametrize("spec", ["vgg", "torchvision:resnet19", ":x"])
def test_a_network_that_nobody_has_is_wrong_usage_of_both(
    capsys: pytest.CaptureFixture[str], spec: str
) -> None:
    assert refusal(["summary", spec], capsys) == refusal(["train", "--model", spec], capsys)


def test_a_folder_for_digits_is_refused_of_a_run_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = Task(tuple("0123456789"), 1, (0.3,), (0.4,), 8)
    run_folder.write_config(tmp_path, Experiment("digits", None, 0, DIGITS), task)
    for call in (["evaluate", "--run-dir"], ["attribute", "a.png", "--run-dir"], ["scores"], ["curvature"]):
        said = refusal([*call, str(tmp_path), "--data-dir", "images"], capsys)
        assert f"{tmp_path} is of digits, which come with scikit-learn and need no --data-dir" in said


@pytest.mark.parametrize("words", ["--crop 16", "--cutout 17"])
def test_what_is_larger_than_the_images_is_refused_where_their_size_is_known(
    capsys: pytest.CaptureFixture[str], words: str
) -> None:
    assert "--image-size 16; got" in refusal(["train", "--image-size", "16", *words.split()], capsys)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fail(options: object) -> None:
        raise error

    monkeypatch.setattr("resnet_func.app.commands.train.main", fail)
    assert main(["train"]) == 1
    assert capsys.readouterr().err.startswith("resnet-func: there is not enough memory: lower --batch-size")


@pytest.mark.parametrize("spec", ["math:sin", "builtins:list"])
def test_a_callable_that_makes_no_network_is_one_line(capsys: pytest.CaptureFixture[str], spec: str) -> None:
    assert main(["summary", spec]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"resnet-func: {spec} ")
    assert said.count("\n") == 1
