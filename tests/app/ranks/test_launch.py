"""Several ranks train the run of one; when it ends badly, one of them says why."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from resnet_func.app.errors import Interrupted
from resnet_func.app.ranks import launch
from resnet_func.distributed import Ranks
from tests.app.image_folder import make_image_folder, read_metrics
from tests.app.rank_runs import Recorder, train, train_privately
from tests.distributed.processes import ROOT, run_ranks

ALONE = launch.Group(Ranks(0, 1), None, 60.0)


def newest(folder: Path) -> bytes:
    files = (folder / "checkpoints").glob("last.*.safetensors")
    return max(files, key=lambda path: path.stat().st_mtime_ns).read_bytes()


def results(folder: Path) -> list[tuple[float, float]]:
    return [(record["test_loss"], record["test_accuracy"]) for record in read_metrics(folder)]


def test_two_ranks_train_and_test_the_run_of_one(tmp_path: Path) -> None:
    """To the bit, also where it stops on two and goes on on one: order and augmentation know no ranks."""
    images, runs = make_image_folder(tmp_path / "images", train=9, test=3), tmp_path / "runs"
    runs.mkdir()
    run_ranks(2, "tests.app.rank_runs", str(images), str(runs))
    train(images, tmp_path / "alone", ALONE)
    assert newest(runs / "whole") == newest(tmp_path / "alone")
    assert results(runs / "whole") == results(tmp_path / "alone")
    train(images, runs / "stopped", ALONE, resume=True)
    assert newest(runs / "stopped") == newest(tmp_path / "alone")
    assert not list(runs.rglob("*.tmp"))


def test_a_launch_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    name = launch.name_of_launch()
    assert name == launch.name_of_launch()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert name != launch.name_of_launch()


def test_only_the_first_rank_prints_what_all_would(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with launch.quiet_unless_first():
            print(f"rank {rank}")
    assert capsys.readouterr().out == "rank 0\n"


def test_an_interrupted_rank_alone_saves(tmp_path: Path) -> None:
    images = make_image_folder(tmp_path / "images", train=5, test=2)
    with pytest.raises(Interrupted):
        train(images, tmp_path / "run", ALONE, reporter=Recorder(signal_after=1))
    assert (tmp_path / "run/checkpoints/last.json").is_file()


# --------------------------------------------------------------------------- under torchrun itself


TRAIN = ["train", "--epochs", "8", "--batch-size", "64", "--seed", "1", "--run-dir", "run"]


def start(folder: Path, *options: str, words: Sequence[str] = TRAIN) -> subprocess.Popen[str]:
    """`torchrun -m resnet_func` of two ranks in a folder, its output in `log`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *options]
    folder.mkdir(exist_ok=True)
    with open(folder / "log", "a", encoding="utf-8") as log:
        return subprocess.Popen(
            [*launcher, "-m", "resnet_func", *words],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )


def children(process: subprocess.Popen[str]) -> list[int]:
    """The ranks of a launcher, once both are there."""
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
        if len(ranks := [int(pid) for pid in found.stdout.split()]) == 2:
            return ranks
        time.sleep(0.1)
    return []


def stop(process: subprocess.Popen[str]) -> None:
    """End what is left where something failed: a launcher that is asked to ends its ranks, too."""
    process.terminate()
    try:
        process.wait(timeout=60)
    finally:
        process.kill()


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.nightly
def test_twenty_kills_end_in_the_bytes_of_an_unbroken_run(tmp_path: Path) -> None:
    """A random rank at a random time, twenty times; torchrun starts the group again."""
    whole = start(tmp_path / "whole", "--standalone")
    assert whole.wait(timeout=300) == 0
    wanted, draw, kills, launches = newest(tmp_path / "whole/run"), random.Random(0), 0, 0
    while kills < 20:
        folder, launches = tmp_path / f"broken-{launches}", launches + 1
        process, log, victims = start(folder, "--standalone", "--max-restarts", "20"), folder / "log", []
        try:
            while kills < 20 and trains(process, log, starts=len(victims) + 1):
                time.sleep(draw.uniform(0, 4))
                if ranks := children(process):
                    victims.append(draw.choice(ranks))
                    os.kill(victims[-1], signal.SIGKILL)
                    kills += 1
            assert process.wait(timeout=300) == 0, log.read_text()
        finally:
            stop(process)
        assert newest(folder / "run") == wanted, log.read_text()
        assert not list(folder.rglob("*.tmp"))
        assert not any(map(is_running, victims))


def trains(process: subprocess.Popen[str], log: Path, starts: int) -> bool:
    """Waits until the group has begun to train for so many times; False where the run ends before."""
    end = time.monotonic() + 200
    while process.poll() is None:
        if log.read_text().count("ranks: 2") >= starts:
            return True
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)
    return False


@pytest.mark.nightly
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_to_the_launcher_saves_and_leaves_nobody(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, "--standalone")
    ranks, log, end = children(process), tmp_path / "log", time.monotonic() + 120
    while "epoch 2/8" not in log.read_text() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=60) == 1  # torchrun's own
    said = [line for line in log.read_text().splitlines() if line.startswith("resnet-func:")]
    assert len(said) == 1
    assert "interrupted: the run is saved; go on with: torchrun" in said[0]
    assert (tmp_path / "run/checkpoints/last.json").is_file()
    assert not any(map(is_running, ranks))


SCORES = ["scores", "run", "--batch-size", "16"]
ATTRIBUTE = ["attribute", "--test-index", "0", "--run-dir", "run", "--batch-size", "16", "--dim", "64"]


@pytest.mark.nightly
@pytest.mark.parametrize(("words", "kills"), [(SCORES, 20), (ATTRIBUTE, 6)], ids=["scores", "attribute"])
def test_ranks_that_are_killed_leave_what_one_process_does(
    tmp_path: Path, words: list[str], kills: int
) -> None:
    """Random ranks at random times; the rows that were written stay, and nothing else that was begun."""
    train_words = ["train", "--epochs", "1", "--batch-size", "64", "--norm", "group", "--run-dir", "run"]
    assert start(tmp_path, "--standalone", words=train_words).wait(timeout=300) == 0
    run, trained, draw = tmp_path / "run", tmp_path / "trained", random.Random(0)
    shutil.copytree(run, trained)
    alone = [sys.executable, "-m", "resnet_func", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(alone, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=300)
    wanted = contents(run)
    while kills:
        shutil.rmtree(run)
        shutil.copytree(trained, run)
        process, seen = start(tmp_path, "--standalone", "--max-restarts", "20", words=words), set()
        try:
            while kills and (ranks := computing(process, run, seen)):
                time.sleep(draw.uniform(0, 3))
                seen |= set(ranks)
                if process.poll() is None and any(map(is_running, ranks)):
                    os.kill(draw.choice([rank for rank in ranks if is_running(rank)]), signal.SIGKILL)
                    kills -= 1
            assert process.wait(timeout=300) == 0, (tmp_path / "log").read_text()
        finally:
            stop(process)
        assert contents(run) == wanted
        assert not any(map(is_running, seen))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def chunks(run: Path) -> set[str]:
    """Those that are written; other folders come and go meanwhile, which `os.walk` bears."""
    return {top for top, _, names in os.walk(run) if "0" in names and Path(top).parent.name == "c"}


def computing(process: subprocess.Popen[str], run: Path, seen: set[int]) -> list[int]:
    """The ranks of a new start, once they have written a chunk of rows; none where the command has ended."""
    before, end = chunks(run), time.monotonic() + 200
    while process.poll() is None:
        assert time.monotonic() < end
        ranks = children(process)
        if ranks and not seen & set(ranks) and chunks(run) - before:
            return ranks
        time.sleep(0.02)
    return []


@pytest.mark.nightly
@pytest.mark.parametrize("world", [2, 3], ids="{}-ranks".format)
def test_a_private_run_is_the_same_on_any_number_of_ranks(tmp_path: Path, world: int) -> None:
    """ResNet-20, clipped sums of parts rounded to a grid: the same Poisson batches, and noise once."""
    images = make_image_folder(tmp_path / "images", train=60, test=3)
    (tmp_path / "runs").mkdir()
    run_ranks(world, "tests.app.rank_runs", str(images), str(tmp_path / "runs"), "private")
    train_privately(images, tmp_path / "alone", ALONE)
    assert newest(tmp_path / "runs/private") == newest(tmp_path / "alone")
    assert results(tmp_path / "runs/private") == results(tmp_path / "alone")
