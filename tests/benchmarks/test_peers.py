"""Opacus and JAX, which share no code with us, find the same clipped sums."""

from __future__ import annotations

import pytest
import torch

import resnet_func as rf
from benchmarks.forms import peers
from benchmarks.forms.networks import Case
from resnet_func import tree
from resnet_func.losses import cross_entropy
from tests.per_sample.cases import generator


@pytest.mark.parametrize("peer", peers.PEERS)
@pytest.mark.parametrize("name", ["resnet20", pytest.param("resnet18", marks=pytest.mark.nightly)])
@pytest.mark.filterwarnings("ignore")
def test_peers_agree_in_float64(name: str, peer: str) -> None:
    library = peer.partition(",")[0].lower()
    pytest.importorskip(library, reason="needs the extra `bench`: uv sync --extra bench")
    model = rf.zoo.by_name(name, norm="group", stem="cifar", num_classes=10)
    assert model.config is not None
    params, state = model.init(generator(0), dtype=torch.float64)
    x = torch.randn(3, 3, 16, 16, generator=generator(1), dtype=torch.float64)
    y = torch.tensor([0, 1, 2])
    _, norms = rf.per_sample.clipped_sum(model, cross_entropy, max_norm=1.0)(params, state, x, y)
    max_norm = float(norms.median())  # clips some samples, and leaves others alone
    total, _ = rf.per_sample.clipped_sum(model, cross_entropy, max_norm=max_norm)(params, state, x, y)
    got, got_norms = peers.make_peer(peer, Case(name, model, params, state, x, y), max_norm)()
    torch.testing.assert_close(got_norms, norms, rtol=1e-10, atol=0)
    # Opacus adds 1e-6 to each norm before it divides
    error = tree.norm(tree.map(torch.sub, got, total)) / tree.norm(total)
    assert error < 1e-6 / max_norm
