"""The parts of an experiment: network, optimizer, compiled step, and where training starts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from resnet_func import optim, tree
from resnet_func.app.batches import make_generator
from resnet_func.app.experiment import Experiment, Plan, Task
from resnet_func.app.private.trainer import PrivateTrainer, begin
from resnet_func.app.recipes import Recipe
from resnet_func.app.runtime import Runtime
from resnet_func.distributed import Ranks
from resnet_func.losses import smoothed_cross_entropy
from resnet_func.models import winograd, zoo
from resnet_func.models.interop.load import load_network
from resnet_func.models.interop.state_dicts import from_state_dict
from resnet_func.train import Step, autocast, average_flips, make_train_step, to_memory_format
from resnet_func.types import Model, Params, State, TrainState


class Parts(NamedTuple):
    """What a run is made of: the network as it is tested, one training step, and where training starts."""

    tested: Model
    step: Step
    train_state: TrainState


def make_parts(plan: Plan, trainer: PrivateTrainer | None = None, ranks: Ranks | None = None) -> Parts:
    """Make the network, the step, compiled where the runtime says so, and the state before the first step.

    With `ranks` the step takes this rank's part of a batch.

    Raises:
        ValueError: the recipe's schedule needs more steps.
    """
    experiment, recipe, runtime = plan.experiment, plan.experiment.recipe, plan.machine
    if recipe.sync_batchnorm:
        ranks = ranks or Ranks(0, 1)  # by the same arithmetic on any number of processes
    plain = find_network(recipe, plan.task)
    model = compute_by(runtime, plain)
    params, state = start(experiment, model, runtime)
    total_steps = recipe.epochs * (plan.task.train_images // recipe.batch_size)
    optimizer = make_optimizer(recipe, total_steps, params, runtime.precision)
    train_state = begin(experiment.privacy, params, state, optimizer, ema=recipe.ema > 0)
    tested = model_to_test(model, recipe)
    if trainer is not None:  # in fp32 and by plain convolutions, whose gradients are taken image by image
        return Parts(tested, trainer.make_step(plain, optimizer), train_state)
    step = make_train_step(
        model,
        smoothed_cross_entropy(recipe.label_smoothing),
        optimizer,
        microbatches=recipe.microbatches,
        ema_decay=recipe.ema or None,
        ranks=ranks,
        sync_batch_norm=recipe.sync_batchnorm,
    )
    if runtime.compile:
        step = torch.compile(step, fullgraph=True, dynamic=False)
    return Parts(tested, step, train_state)


def start(experiment: Experiment, model: Model, runtime: Runtime) -> tuple[Params, State]:
    """Fresh parameters and state, or those of a file, with a fresh head where the file's does not fit.

    Raises:
        ValueError, OSError: the file does not hold this network's parameters, or cannot be read.
    """
    generator = make_generator("cpu", experiment.seed, 0)
    if experiment.init is None:
        params, state = model.init(generator, device=runtime.device)
    else:
        into = {"device": runtime.device, "dtype": torch.float32}
        try:
            params, state = from_state_dict(model, experiment.init, **into)
        except ValueError:
            params, state = from_state_dict(model, experiment.init, head="new", generator=generator, **into)
    return to_memory_format(params, runtime.memory_format), state


def make_network(recipe: Recipe, task: Task, runtime: Runtime) -> Model:
    """The recipe's network for the task, as the machine computes it."""
    return compute_by(runtime, find_network(recipe, task))


def find_network(recipe: Recipe, task: Task) -> Model:
    """The recipe's network for the classes and channels of the task.

    Norm and stem are the zoo's; other networks are called with `num_classes`, timm's with `in_chans` too.

    Raises:
        ValueError: the network takes images of three channels only.
    """
    num_classes, in_channels = len(task.classes), task.in_channels
    if ":" not in recipe.model:
        changes: Any = {**recipe.network_changes, "in_channels": in_channels}
        return zoo.by_name(recipe.model, num_classes=num_classes, **changes)
    if recipe.model.startswith("timm:"):
        return load_network(recipe.model, num_classes=num_classes, in_chans=in_channels)[0]
    if in_channels != 3:
        raise ValueError(f"{recipe.model} takes images of 3 channels; these have {in_channels}")
    return load_network(recipe.model, num_classes=num_classes)[0]


def compute_by(runtime: Runtime, model: Model) -> Model:
    """The model by the algorithm and in the precision of the runtime."""
    if runtime.winograd:
        model = winograd.wrap(model, runtime.speeds)
    return autocast(model, runtime.device.type, torch.bfloat16) if runtime.precision == "bf16" else model


def model_to_test(model: Model, recipe: Recipe) -> Model:
    """The model as the recipe tests it: over each image and its mirror image, or as it is.

    >>> from resnet_func import resnet20
    >>> model = resnet20()
    >>> model_to_test(model, Recipe(test_flips=False)) is model
    True
    """
    return average_flips(model) if recipe.test_flips else model


def make_optimizer(
    recipe: Recipe, total_steps: int, params: Params, precision: str = "fp32"
) -> optim.Optimizer:
    """The recipe's optimizer and schedule for a run of `total_steps`.

    Weights of two dimensions and more decay, norms and biases do not. Muon takes them, too, but the last: the
    head. Of `params` only the shapes are read. In "bf16" muon's products are in it, too.

    Raises:
        ValueError: the schedule needs more steps.
    """
    if total_steps < 2 and recipe.schedule == "one-cycle":
        raise ValueError(
            "schedule one-cycle needs 2 steps or more; this run has one. Raise --epochs, lower --batch-size, "
            "or try --schedule constant"
        )
    schedule = _schedule(recipe, recipe.learning_rate, total_steps)
    matrices = [path for path, leaf in tree.flatten(params).items() if leaf.ndim >= 2]
    decay = {"weight_decay": recipe.weight_decay, "decay_mask": set(matrices).__contains__}
    momentum = {"momentum": recipe.momentum, "nesterov": recipe.momentum > 0}
    match recipe.optimizer:
        case "sgd":
            optimizer = optim.sgd(schedule, **momentum, **decay)
        case "muon":
            rest = optim.sgd(_schedule(recipe, recipe.rest_learning_rate, total_steps), **momentum)
            narrow = torch.bfloat16 if precision == "bf16" else None
            chosen = optim.muon(schedule, weight_decay=recipe.weight_decay, precision=narrow, **momentum)
            optimizer = optim.partition(set(matrices[:-1]).__contains__, chosen, rest)
        case "adam":
            optimizer = optim.adam(schedule, **decay)
        case "adamw":
            optimizer = optim.adamw(schedule, **decay)
    return optim.clipped(optimizer, recipe.clip_norm) if recipe.clip_norm else optimizer


def _schedule(recipe: Recipe, peak: float, total_steps: int) -> optim.Schedule:
    match recipe.schedule:
        case "one-cycle":
            return optim.one_cycle(peak, total_steps, warmup_fraction=recipe.warmup)
        case "cosine":
            return optim.cosine(peak, total_steps, warmup_steps=int(recipe.warmup * total_steps))
        case "step":
            return optim.step(peak, [total_steps // 2, total_steps * 3 // 4], gamma=0.1)
        case "constant":
            return optim.constant(peak)
