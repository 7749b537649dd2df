"""A trained network: load it from its run, test it, ask it about images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_func.app import data
from resnet_func.app.batches import ONE_RANK, Preparer, evaluation_batches
from resnet_func.app.experiment import Experiment, Task
from resnet_func.app.parts import make_network, make_optimizer, model_to_test
from resnet_func.app.private.trainer import begin
from resnet_func.app.runtime import Runtime
from resnet_func.app.storage import checkpoint, run_folder
from resnet_func.distributed import Ranks, gather_rows
from resnet_func.losses import cross_entropy
from resnet_func.train import (
    Evaluation,
    evaluate,
    make_eval_step,
    to_memory_format,
)
from resnet_func.types import Model, Params, State, TrainState


class Trained(NamedTuple):
    """A network as its machine computes it, with its parameters, and what it is for."""

    model: Model
    params: Params
    state: State
    task: Task
    experiment: Experiment


def parameters_to_test(train_state: TrainState) -> tuple[Params, State]:
    """The parameters and state to evaluate: the moving averages where they are kept.

    >>> parameters_to_test(TrainState({"w": 1}, {}, None, ema_params={"w": 2}, ema_state={}))
    ({'w': 2}, {})
    """
    if not train_state.ema_params:
        return train_state.params, train_state.state
    return train_state.ema_params, train_state.ema_state


def load_trained(
    folder: Path, which: str, runtime: Runtime, *, flips: bool | None = False
) -> tuple[Trained, str | None]:
    """The network of a run at one of its checkpoints, and a warning.

    Args:
        folder: The run folder.
        which: "last", "best", or one of `run_folder.snapshots`.
        runtime: The machine; as in training, it decides algorithm, precision and memory format.
        flips: Average the logits over each image and its mirror image; None is as the recipe says.

    Returns:
        The network, and None or one line: its newest checkpoint is damaged, and the one before it was loaded.

    Raises:
        RunError: the folder is not a run's.
        CheckpointError: there is no such checkpoint, or none intact.
    """
    experiment, task = run_folder.read_config(folder)
    recipe, checkpoints = experiment.recipe, run_folder.checkpoints(folder)
    model = make_network(recipe, task, runtime)
    like = model.init(torch.Generator("cpu"), device="meta")
    if which != "last":
        (params, state), _, warning = checkpoint.load(checkpoints, which, like, device=runtime.device)
    else:
        # the optimizer's state has the same structure whatever the number of steps
        optimizer = make_optimizer(recipe, 2, like[0])
        start = begin(experiment.privacy, *like, optimizer, ema=recipe.ema > 0)
        saved, _, warning = checkpoint.load(checkpoints, which, start, device=runtime.device)
        params, state = parameters_to_test(saved)
    params = to_memory_format(params, runtime.memory_format)
    asked = recipe if flips is None else replace(recipe, test_flips=flips)
    return Trained(model_to_test(model, asked), params, state, task, experiment), warning


def evaluate_trained(
    trained: Trained,
    source: data.Source,
    runtime: Runtime,
    *,
    epoch: int | None = None,
    ranks: Ranks = ONE_RANK,
) -> Evaluation:
    """Losses and logits of a network on a source; for the same options the same to the bit as in the run.

    Args:
        trained: The network.
        source: Images and labels of the network's task.
        runtime: The machine that the network was made or loaded for.
        epoch: Test at the image size of this epoch (from 0); None is the last.
        ranks: The processes that the batches are dealt to; each calls this, and gets the same.
    """
    recipe, size = trained.experiment.recipe, trained.experiment.recipe.evaluation_batch
    epoch = recipe.epochs - 1 if epoch is None else epoch
    batches = evaluation_batches(recipe, source, Preparer(trained.task, runtime), epoch, ranks)
    sizes = [min(size, source.num_samples - first) for first in range(0, source.num_samples, size)]
    if ranks.rank and ranks.rank >= len(sizes):
        mine = _no_rows(len(trained.task.classes))
    else:
        step = make_eval_step(trained.model, cross_entropy)
        mine = evaluate(step, trained.params, trained.state, batches)
    return Evaluation(*(gather_rows(rows, ranks, dealt=sizes) for rows in mine))


def _no_rows(classes: int) -> Evaluation:
    floats: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    labels = torch.zeros(0, dtype=torch.int64, device="cpu")
    return Evaluation(torch.zeros(0, **floats), torch.zeros(0, classes, **floats), labels)


def read_image(path: Path, trained: Trained) -> Tensor:
    """One image file as uint8 `[C, H, W]` of the task's channels, decoded as in training.

    Raises:
        DataError: the file is missing or no image.
    """
    rgb = torch.from_numpy(data.decode(str(path), trained.experiment.decode_size).copy())
    if trained.task.in_channels != 1:
        return rgb
    # ITU-R 601, as Pillow turns colour to grey
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float32, device="cpu")
    return (rgb * weights[:, None, None]).sum(0, keepdim=True).round().to(torch.uint8)


def predict(trained: Trained, images: Iterable[Tensor], runtime: Runtime) -> Tensor:
    """Logits `[K, classes]` on the CPU of K >= 1 images, uint8 `[C, H, W]` of the task's channels.

    Images of any size; as many are held at a time as `evaluate_trained` takes.
    """
    prepare, logits, images = Preparer(trained.task, runtime), [], iter(images)
    with torch.no_grad():
        while batch := list(islice(images, trained.experiment.recipe.evaluation_batch)):
            x = torch.cat([prepare(image[None]) for image in batch])
            logits.append(trained.model.apply(trained.params, trained.state, x, train=False)[0].cpu())
    return torch.cat(logits)
