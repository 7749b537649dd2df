"""Benchmarks of attribution at toy size: they run, go on where they stopped, and agree with the peers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import resnet_func as rf
from benchmarks.__main__ import main
from benchmarks.commands import lds, scores
from benchmarks.forms import attribution_peers, networks, retraining
from resnet_func import attribution
from resnet_func import per_sample as ps
from resnet_func.app import runtime
from resnet_func.attribution.quantities import log_odds
from tests.attribution.oracle import rows_of


@pytest.fixture(autouse=True)
def _untouched_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(runtime.ALLOCATOR_VARIABLE, "stock")


def toy_run(words: list[str], folder: Path) -> dict[str, Any]:
    assert main([*words, "--quick", "--threads", "1", "--results", str(folder)]) == 0
    (path,) = folder.glob(f"{words[0]}-*.json")
    assert path.with_suffix(".png").stat().st_size > 10_000
    return json.loads(path.read_text())


def test_scores(tmp_path: Path) -> None:
    result = toy_run(["scores", "--no-memory"], tmp_path)
    assert list(result["figures"]) == list(scores.VARIANTS[:6])
    assert all(of["ratio"]["median"] > 0 for of in result["figures"].values())
    assert main(["scores", "--dim", "0"]) == 2
    assert main(["scores", "--without", "nothing like it"]) == 2


def test_lds_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = str(tmp_path / "work")
    assert main(["lds", "--quick", "--threads", "1", "--work", work, "--rank", "1", "--ranks", "2"]) == 0
    (outcomes,) = (tmp_path / "work").glob("outcomes")
    chunks = {path: path.read_bytes() for path in (outcomes / "c").rglob("0") if path.is_file()}
    assert len(chunks) == 1
    result = toy_run(["lds", "--work", work], tmp_path / "results")
    assert {path: path.read_bytes() for path in chunks} == chunks
    names = set(result["figures"])
    assert {"TracIn, 1 network", "TRAK-1", "TRAK-2", "influence by EKFAC, 1 network"} <= names
    assert work not in json.dumps(result)
    monkeypatch.setattr(retraining, "trained", None)  # nothing is trained again
    again = toy_run(["lds", "--work", work], tmp_path / "results")
    for name, of in result["figures"].items():
        assert again["figures"][name]["mean"] == pytest.approx(of["mean"], nan_ok=True)


def test_lds_of_another_network_needs_another_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["lds", "--quick", "--threads", "1", "--work", str(tmp_path), "--rank", "1", "--ranks", "2"]
    assert main(words) == 0
    assert main([*words, "--learning-rate", "0.5"]) == 2
    assert "learning_rate 0.1, not 0.5" in capsys.readouterr().err
    assert main(["lds", "--rank", "2", "--ranks", "2"]) == 2
    assert main(["lds", "--peers", "11"]) == 2
    assert main(["lds", "--image-size", "-1"]) == 2
    assert main(["lds", "--quick", "--classes", "eleven", "--work", str(tmp_path / "x")]) == 2
    assert "has no class 'eleven'" in capsys.readouterr().err


def test_halves_are_halves_and_the_page_has_their_table() -> None:
    masks = torch.stack([retraining.subset(index, 41) for index in range(3)])
    assert masks.sum(1).tolist() == [20] * 3
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(masks[1], retraining.subset(1, 41))
    content = {"figures": {"TRAK-1": {"mean": 0.1234, "low": 0.1, "high": 0.15, "seconds": 3.0}}}
    assert "| TRAK-1 | 0.123 (0.100-0.150) | 3.0 |" in lds.section([("epyc", content)])


# --------------------------------------------------------------------------- the peers


@pytest.mark.filterwarnings("ignore")
def test_traker_scores_the_same_gradients_alike(tmp_path: Path) -> None:
    """traker itself, without its projection, against our scores of the same gradients."""
    trak = pytest.importorskip("trak", reason="needs the extra `bench`: uv sync --extra bench")
    projectors = pytest.importorskip("trak.projectors")
    case = networks.make_case(networks.TOY, 6, 8, norm="group", widths=(4, 4, 8), norm_groups=2)
    module = rf.to_module(case.model, case.params, case.state).eval()
    size, ridge = rf.tree.size(case.params), 1e-3
    peer = trak.TRAKer(
        model=module,
        task="image_classification",
        train_set_size=6,
        save_dir=str(tmp_path),
        projector=projectors.NoOpProjector(
            grad_dim=size, proj_dim=0, seed=0, proj_type="normal", device="cpu"
        ),
        device="cpu",
        use_half_precision=False,
        lambda_reg=ridge,
        logging_level=50,
    )
    peer.load_checkpoint(module.state_dict(), model_id=0)
    peer.featurize(batch=[case.x, case.y], num_samples=6)
    peer.finalize_features()
    peer.start_scoring_checkpoint("test", module.state_dict(), model_id=0, num_targets=2)
    peer.score(batch=[case.x[:2], case.y[:2]], num_samples=2)
    theirs = torch.from_numpy(peer.finalize_scores("test").copy()).double()
    wide = rf.tree.map(lambda leaf: leaf.double(), (case.params, case.state))
    x = case.x.double()
    gradients = rows_of(ps.grads(case.model, log_odds)(*wide, x, case.y)) / size**0.5
    slack = torch.sigmoid(-log_odds(case.model.apply(*wide, x, train=False)[0], case.y))
    features = attribution.Features(gradients, slack)
    damping = ridge / float((gradients.T @ gradients).diagonal().mean())
    test = attribution.Features(gradients[:2], slack[:2])
    ours = attribution.trak_scores([([features], test)], damping=damping)
    # the peer divides by a constant; the rest is float32 and the condition of its inverse
    ours, theirs = (scores / scores.norm() for scores in (ours, theirs))
    assert (ours - theirs).abs().max() < 1e-3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", attribution_peers.SCORES)
def test_peers_score_whole_data_sets(name: str) -> None:
    pytest.importorskip({"traker": "trak", "dattri": "dattri"}[name], reason="needs the extra `bench`")
    case = networks.make_case(networks.TOY, 8, 8, norm="group", widths=(4, 4, 8), norm_groups=2)
    images = retraining.Images(case.x, case.y, "")
    test = retraining.Images(case.x[:3], case.y[:3], "")
    score = attribution_peers.SCORES[name]
    found = score(case.model, [(case.params, case.state)] * 2, images, test, 4)
    assert found.shape == (8, 3)
    assert found.isfinite().all()
