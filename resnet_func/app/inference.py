"""A run's trained network: load it, test it, ask it about images."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_func.app import checkpoint, data, run_folder
from resnet_func.app.experiment import (
    Experiment,
    Preparer,
    Task,
    from_description,
    make_network,
    make_optimizer,
    test_batches,
)
from resnet_func.app.run import tested
from resnet_func.app.runtime import Runtime
from resnet_func.losses import cross_entropy
from resnet_func.models import winograd
from resnet_func.train import Evaluation, average_flips, evaluate, init_train_state, make_eval_step
from resnet_func.types import Model, Params, State


class Trained(NamedTuple):
    """A run's network with its parameters, and what it is for."""

    model: Model
    params: Params
    state: State
    task: Task
    experiment: Experiment


def load_trained(folder: Path, which: str, runtime: Runtime, *, flips: bool = False) -> Trained:
    """The network of a run at its "last" or "best" checkpoint; `flips` averages over mirrored images.

    Raises:
        RunError: the folder is not a run's.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    experiment, task = from_description(run_folder.read_config(folder))
    model = make_network(experiment.recipe, task)
    if runtime.winograd:
        model = winograd.wrap(model)
    params, state = model.init(torch.Generator(), device=runtime.device)
    checkpoints = run_folder.checkpoints(folder)
    if which == "best":
        (params, state), _, _ = checkpoint.load(checkpoints, "best", (params, state))
    else:
        optimizer = make_optimizer(experiment.recipe, total_steps=2)
        like = init_train_state(params, state, optimizer, ema=experiment.recipe.ema > 0)
        params, state = tested(checkpoint.load(checkpoints, "last", like)[0])
    return Trained(average_flips(model) if flips else model, params, state, task, experiment)


def evaluate_trained(trained: Trained, source: data.Source, runtime: Runtime) -> Evaluation:
    """Losses and logits of a trained network on a source."""
    eval_step = make_eval_step(trained.model, cross_entropy)
    last = trained.experiment.recipe.epochs - 1  # at full size
    batches = test_batches(trained.experiment, source, Preparer(trained.task, runtime), last)
    return evaluate(eval_step, trained.params, trained.state, batches)


def predict(trained: Trained, images: list[Tensor], runtime: Runtime) -> Tensor:
    """Logits `[K, classes]` on the CPU of K images, uint8 `[C, H, W]` of the task's channels."""
    prepare = Preparer(trained.task, runtime)
    with torch.no_grad():
        x = torch.cat([prepare(image[None]) for image in images])
        logits, _ = trained.model.apply(trained.params, trained.state, x, train=False)
    return logits.cpu()


def read_image(path: Path, task: Task) -> Tensor:
    """One image file as uint8 `[C, H, W]` of the task's channels and size.

    Raises:
        DataError: the file is missing or no image.
    """
    rgb = torch.from_numpy(data.decode(str(path), task.image_size).copy())
    # ITU-R 601, as Pillow turns colour to grey
    weights = torch.tensor([0.299, 0.587, 0.114])
    grey = (rgb * weights[:, None, None]).sum(0, keepdim=True).round().to(torch.uint8)
    return grey if task.in_channels == 1 else rgb
