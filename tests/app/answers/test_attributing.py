"""Attribution from a run folder: what is kept is reused, resumed, never mistaken; the command."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from resnet_func import losses
from resnet_func.app import batches, data, runtime
from resnet_func.app.answers import attributing, scoring
from resnet_func.app.answers.attributing import Network
from resnet_func.app.cli import main
from resnet_func.app.ranks.launch import Group
from resnet_func.app.storage import run_folder
from resnet_func.app.training_set import load_training
from resnet_func.attribution import (
    Sketch,
    cosine_scores,
    influence,
    make_features,
    sampled_ekfac,
    tracin_scores,
    trak_scores,
)
from resnet_func.distributed import Ranks
from tests.app.image_folder import train_run
from tests.distributed.processes import run_ranks

pytestmark = pytest.mark.usefixtures("own_folder")
DIM = 12


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    return train_run(images, run, "--snapshots", "2", "--norm", "group")


def opened(folder: Path) -> tuple[Network, Tensor, Tensor]:
    experiment, task = run_folder.read_config(folder)
    machine = scoring.exact(runtime.configure(device="cpu", threads=1, precision="fp32"))
    training, test = load_training(experiment)
    network, warnings = attributing.open_network(folder, training, machine, 5)
    assert not warnings
    x, y = next(data.batches(test, 2))
    return network, batches.Preparer(task, machine)(x), y


def without_kept(run: Path, copy: Path) -> Path:
    """A copy of a run that nothing has been asked of."""
    return shutil.copytree(run, copy, ignore=shutil.ignore_patterns("attribut*"))


class Told:
    """A progress bar that counts."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}

    def __call__(self, what: str, rows: int):
        def done(k: int) -> None:
            self.rows[what] = self.rows.get(what, 0) + k

        return done


@pytest.mark.parametrize("method", ["cosine", "tracin", "trak", "influence"])
def test_scores_are_the_librarys_and_are_kept(trained, method):
    network, x, y = opened(trained)
    told = Told()
    ours = attributing.scores(network, method, x, y, DIM, told)
    whole = list(
        scoring.TrainingBatches(
            network.training.source, batches.Preparer(network.trained.task, network.machine), 5
        )
    )
    model, sketch = network.trained.model, Sketch(dim=DIM)
    pairs = []
    for kept in network.checkpoints:
        extract = make_features(kept.model, sketch, train=False)
        pairs.append(([extract(*kept.leaves, whole)], extract(*kept.leaves, [(x, y)])))
    assert len(pairs) == 2
    if method == "cosine":
        expected = cosine_scores(*pairs[-1])
    elif method == "tracin":
        expected = tracin_scores(pairs, [1.0, 1.0])
    elif method == "trak":
        expected = trak_scores(pairs, damping=attributing.DAMPING)
    else:
        checkpoint = network.checkpoints[-1].leaves
        estimate = sampled_ekfac(model, losses.cross_entropy, train=False)(*checkpoint, whole)
        run = influence(model, losses.cross_entropy, estimate, train=False)
        expected = run(checkpoint, whole, [(x, y)])
    # stored in float32, and solved with a matrix that is nearly singular
    scale = float(expected.abs().max())
    torch.testing.assert_close(ours, expected, rtol=0, atol=(1e-3 if method == "trak" else 1e-4) * scale)
    again = Told()
    assert torch.equal(attributing.scores(network, method, x, y, DIM, again), ours)
    assert not again.rows


@pytest.mark.parametrize("method", ["trak", "influence"])
def test_ranks_together_give_the_scores_of_one_process(trained, tmp_path, monkeypatch, method):
    """To the bit; the others get none, and what a rank left out is done by whoever comes next."""
    monkeypatch.setattr(attributing, "CHUNK_ROWS", 1)
    trained = without_kept(trained, tmp_path / "run")
    network, x, y = opened(trained)
    attributing.scores(network, method, x, y, DIM, Told())
    kept = trained / attributing.FOLDER
    wanted = {path.relative_to(kept): path.read_bytes() for path in kept.glob("*/c/*/0")}
    ours = attributing.scores(network, method, x, y, DIM, Told())
    for chunk in [*wanted][::3]:
        (kept / chunk).unlink()
    for rank in (2, 1, 0):  # rank 0 waits for the others
        own = network._replace(group=Group(Ranks(rank, 3), None, 60.0))
        found = attributing.scores(own, method, x, y, DIM, Told())
        assert (found is None) == (rank > 0)
    assert found.equal(ours)
    assert {path: (kept / path).read_bytes() for path in wanted} == wanted


@pytest.mark.nightly
def test_two_processes_keep_and_draw_what_one_does(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(attributing, "CHUNK_ROWS", 1)
    call = ["attribute", "--test-index", "1", "--dim", str(DIM + 2), "--method", "tracin", "--threads", "1"]
    alone, dealt = (without_kept(trained, tmp_path / name) for name in ("alone", "dealt"))
    assert main([*call, "--run-dir", str(alone)]) == 0
    run_ranks(2, "tests.app.attributing_rank", *call, "--run-dir", str(dealt))
    one, two = (
        {path.relative_to(f): path for path in f.rglob("*") if path.is_file()} for f in (alone, dealt)
    )
    assert one.keys() == two.keys()
    assert sum(path.parts[0] == attributing.FOLDER and path.name == "0" for path in one) == 2 * 24
    assert not [path for path, file in one.items() if file.read_bytes() != two[path].read_bytes()]


def test_what_is_missing_is_computed_and_only_that(trained):
    network, x, y = opened(trained)
    first = attributing.scores(network, "tracin", x, y, DIM + 1, Told())
    chunks = sorted((trained / attributing.FOLDER).glob("features-*/c/0/0"))
    sizes = {chunk: chunk.stat().st_size for chunk in chunks}
    cut = [chunk for chunk, size in sizes.items() if size == 24 * (DIM + 2) * 4]
    cut[0].unlink()  # as if it had been killed before
    told = Told()
    assert torch.equal(attributing.scores(network, "tracin", x, y, DIM + 1, told), first)
    assert list(told.rows.values()) == [24]


def test_other_labels_are_other_data(trained):
    network, x, y = opened(trained)
    before = attributing.scores(network, "tracin", x, y, DIM, Told())
    source = network.training.source
    assert isinstance(source, data.Dataset)
    from resnet_func.app import training_set

    moved = network.training._replace(source=training_set.with_labels(source, (source.labels + 1) % 3))
    machine = network.machine
    other, _ = attributing.open_network(trained, moved, machine, 5)
    told = Told()
    after = attributing.scores(other, "tracin", x, y, DIM, told)
    assert told.rows
    assert not torch.allclose(before, after)


def test_the_command_prints_a_table_and_draws_a_picture(trained, images, capsys):
    file = str(images / "test" / "red" / "000.png")
    call = ["attribute", file, "--test-index", "1", "--run-dir", str(trained), "--dim", str(DIM)]
    assert main([*call, "--threads", "1", "--shown", "2"]) == 0
    printed = capsys.readouterr().out
    assert "cosine over 24 training images" in printed
    assert printed.count("helped") + printed.count("harmed") >= 4
    assert "test 1: " in printed
    for name in ("000", "test-1"):
        assert (trained / f"attribute-{name}-cosine.png").read_bytes().startswith(b"\x89PNG")
    assert main([*call, "--label", "blue", "--method", "tracin"]) == 0
    assert "blue (" in capsys.readouterr().out


def test_a_file_that_cannot_be_read_leaves_the_others(trained, images, capsys):
    file = str(images / "test" / "red" / "000.png")
    call = ["attribute", "none.png", file, "--run-dir", str(trained), "--dim", str(DIM), "--threads", "1"]
    assert main(call) == 1
    printed = capsys.readouterr()
    assert printed.err == "resnet-func: none.png: there is no such file\n"
    assert f"{file}: " in printed.out
    assert "attribute-000-cosine.png" in printed.out


def test_a_damaged_store_is_one_line(trained, images, tmp_path, capsys):
    run = without_kept(trained, tmp_path / "run")
    call = ["attribute", "--test-index", "0", "--run-dir", str(run), "--dim", str(DIM), "--threads", "1"]
    assert main(call) == 0
    capsys.readouterr()
    for path in (run / attributing.FOLDER).glob("*/zarr.json"):
        path.write_text('{"zarr_format": 3, "node_type": "array", "attributes": 7}')
    assert main(call) == 1
    error = capsys.readouterr().err
    assert "is no store" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "attribute needs an image file or more"),
        (["--test-index", "9"], 2, "--test-index must be 0 to 8; got 9"),
        (["--test-index", "0", "--label", "pink"], 2, "--label must be one of blue, green, red; got 'pink'"),
        (["--test-index", "0", "--dim", "0"], 2, "--dim must be 1 or more; got 0"),
        (["none.png"], 1, "none.png"),
    ],
)
def test_wrong_options_get_one_line(trained, capsys, words, code, said):
    assert main(["attribute", *words, "--run-dir", str(trained), "--threads", "1"]) == code
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_ranks_have_the_right_sign() -> None:
    ranked = attributing.rank(torch.tensor([1.0, -2.0, 0.0, 3.0, -1.0]), 2)
    assert ranked.helpful.tolist() == [3, 0]
    assert ranked.harmful.tolist() == [1, 4]
    assert not len(attributing.rank(torch.tensor([1.0]), 2).harmful)


def test_an_unknown_method_is_refused(trained):
    network, x, y = opened(trained)
    with pytest.raises(ValueError, match="method must be trak, cosine, tracin or influence; got 'arnoldi'"):
        attributing.scores(network, "arnoldi", x, y, DIM, Told())
