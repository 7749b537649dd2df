"""Predictions with and without the last layer's posterior, and how well they know how sure they may be."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from resnet_func import curvature
from resnet_func.app import data
from resnet_func.app.batches import Preparer, evaluation_batches
from resnet_func.app.errors import AppError
from resnet_func.app.inference import Trained
from resnet_func.app.runtime import Runtime
from resnet_func.curvature import Posterior
from resnet_func.losses import accuracy, calibration_error, cross_entropy


class Calibration(NamedTuple):
    """How good probabilities are: share of right classes, mean negative log likelihood, calibration error."""

    accuracy: float
    loss: float
    calibration_error: float


def refuse_private(trained: Trained) -> None:
    """Refuse a run whose training images nothing more may be told of.

    Raises:
        AppError: the run is private.
    """
    if trained.experiment.privacy is not None:
        raise AppError(
            "--laplace makes predictions from the training images anew, without noise, and this run promises "
            "privacy. Leave out --laplace"
        )


def calibrate(
    trained: Trained, training: data.Source, test: data.Source, machine: Runtime
) -> tuple[Posterior, dict[str, Calibration]]:
    """The posterior from the training images, and the test images' figures without it and with it.

    Raises:
        ValueError: the network does not end in a linear layer.
    """
    recipe, prepare = trained.experiment.recipe, Preparer(trained.task, machine)
    model, params, state = trained.model, trained.params, trained.state
    fit = curvature.laplace(model, cross_entropy, train=False)
    posterior = fit(params, state, evaluation_batches(recipe, training, prepare, recipe.epochs - 1))
    plain, averaged, labels = [], [], []
    for x, y in evaluation_batches(recipe, test, prepare, recipe.epochs - 1):
        layer = curvature.last_layer(model, params, state, x)
        plain.append(layer.logits.double().softmax(1).cpu())
        averaged.append(posterior.probabilities(layer).cpu())
        labels.append(y.cpu())
    targets = torch.cat(labels)
    found = {"plain": measure(torch.cat(plain), targets), "Laplace": measure(torch.cat(averaged), targets)}
    return posterior, found


def measure(probabilities: Tensor, targets: Tensor) -> Calibration:
    """The figures of class probabilities `[N, classes]`.

    >>> measure(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([0, 0])).accuracy
    1.0
    """
    right = probabilities.gather(1, targets.unsqueeze(1)).double()
    loss = float(-right.clamp(min=torch.finfo(torch.float64).tiny).log().mean())
    share = float(accuracy(probabilities, targets).double().mean())
    return Calibration(share, loss, calibration_error(probabilities, targets))
