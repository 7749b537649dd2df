"""TRAK's features by the libraries that attribution is compared with, on the CPU as they come."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import resnet_func as rf
from benchmarks.forms.networks import Case
from benchmarks.harness.measure import Skipped
from resnet_func.attribution.quantities import Checkpoint, log_odds
from resnet_func.types import Model

PEER_BATCH = 50
TRAKER, DATTRI = "TRAK features by traker", "TRAK features by dattri"


def make_traker(case: Case, dim: int) -> Callable[[], Tensor]:
    """`TRAKer.featurize` of the batch: gradients by vmap, projected by its `BasicProjector`.

    Returns:
        A step that gives `1 - p` of every sample, as the peer kept it.

    Raises:
        Skipped: traker is not installed.
    """
    try:
        from trak import TRAKer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise Skipped("traker is not installed: uv sync --extra bench") from error
    module = rf.to_module(case.model, case.params, case.state).eval()
    folder = tempfile.TemporaryDirectory()
    peer = TRAKer(
        model=module,
        task="image_classification",
        train_set_size=len(case.x),
        proj_dim=dim,
        save_dir=folder.name,
        device="cpu",
        use_half_precision=False,
        logging_level=logging.ERROR,
    )
    peer.load_checkpoint(module.state_dict(), model_id=0)

    def step() -> Tensor:
        assert folder.name  # as long as the step lives
        peer.saver.current_store["is_featurized"][:] = 0
        peer.featurize(batch=[case.x, case.y], inds=np.arange(len(case.x)))
        return torch.from_numpy(peer.saver.current_store["out_to_loss"][:, 0].copy())

    return step


def make_dattri(case: Case, dim: int) -> Callable[[], Tensor]:
    """The gradients by vmap that dattri's `TRAKAttributor` takes, through its `random_project`.

    Returns:
        A step that gives `1 - p` of every sample.

    Raises:
        Skipped: dattri is not installed.
    """
    try:
        from dattri.func.projection import random_project  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise Skipped("dattri is not installed: uv sync --extra bench") from error
    model, state, flat = case.model, case.state, rf.tree.flatten(case.params)

    def output(flat: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits, _ = model.apply(rf.tree.unflatten(flat), state, x[None], train=False)
        odds = log_odds(logits, y[None])[0]
        return odds, odds

    gradients = torch.vmap(torch.func.grad(output, has_aux=True), (None, 0, 0))

    def step() -> Tensor:
        found, odds = gradients(flat, case.x, case.y)
        rows = torch.cat([leaf.flatten(1) for leaf in found.values()], 1)
        options: Any = {"proj_dim": dim, "proj_max_batch_size": 32, "device": "cpu"}
        random_project(rows, len(rows), **options)(rows, ensemble_id=0)
        return torch.sigmoid(-odds)

    return step


# --------------------------------------------------------------------------- scores of a data set


def traker_scores(model: Model, networks: Sequence[Checkpoint], train: Any, test: Any, dim: int) -> Tensor:
    """TRAK scores `[train, test]` by traker, of the same networks.

    Raises:
        Skipped: traker is not installed.
    """
    try:
        from trak import TRAKer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise Skipped("traker is not installed: uv sync --extra bench") from error
    with tempfile.TemporaryDirectory() as folder:
        module = rf.to_module(model, *networks[0]).eval()
        peer = TRAKer(
            model=module,
            task="image_classification",
            train_set_size=len(train.y),
            proj_dim=dim,
            save_dir=folder,
            device="cpu",
            use_half_precision=False,
            logging_level=logging.ERROR,
        )
        batches = (
            [(x, y) for x, y in train.batches(PEER_BATCH)],
            [(x, y) for x, y in test.batches(PEER_BATCH)],
        )
        for index, network in enumerate(networks):
            weights = rf.to_module(model, *network).state_dict()
            peer.load_checkpoint(weights, model_id=index)
            for x, y in batches[0]:
                peer.featurize(batch=[x, y], num_samples=len(y))
        peer.finalize_features()
        peer.projector.model_id = (
            -1
        )  # it freed the projection, and would not draw it again for the same network
        for index, network in enumerate(networks):
            weights = rf.to_module(model, *network).state_dict()
            peer.start_scoring_checkpoint("test", weights, model_id=index, num_targets=len(test.y))
            for x, y in batches[1]:
                peer.score(batch=[x, y], num_samples=len(y))
        return torch.from_numpy(peer.finalize_scores("test").copy())


def dattri_scores(model: Model, networks: Sequence[Checkpoint], train: Any, test: Any, dim: int) -> Tensor:
    """TRAK scores `[train, test]` by dattri, of the same networks.

    Raises:
        Skipped: dattri is not installed.
    """
    try:
        from dattri.algorithm.trak import TRAKAttributor  # pyright: ignore[reportMissingImports]
        from dattri.task import AttributionTask  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise Skipped("dattri is not installed: uv sync --extra bench") from error
    module = rf.to_module(model, *networks[0]).eval()

    def output(params: Any, data: Any) -> Tensor:
        x, y = data
        logits = torch.func.functional_call(module, params, (x[None],))
        return log_odds(logits, y[None]).sum()

    def probability(params: Any, data: Any) -> Tensor:
        return torch.sigmoid(output(params, data))

    weights = [rf.to_module(model, *network).state_dict() for network in networks]
    task = AttributionTask(loss_func=output, model=module, checkpoints=weights)
    peer = TRAKAttributor(
        task=task,
        correct_probability_func=probability,
        projector_kwargs={"proj_dim": dim, "proj_max_batch_size": 32, "proj_seed": 0, "device": "cpu"},
        regularization=1e-2,
    )
    loaders = [
        DataLoader(TensorDataset(part.x, part.y), batch_size=PEER_BATCH, shuffle=False)
        for part in (train, test)
    ]
    peer.cache(loaders[0])
    return peer.attribute(loaders[1]).detach()


# By the peer's name: `scores(model, networks, train images, test images, dim) -> [train, test]`.
SCORES = {"traker": traker_scores, "dattri": dattri_scores}
