"""What all forms of a step share: settings, hyper-parameters, and how their results are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.forms.networks import Case
from benchmarks.harness.measure import Outcome, relative_distance
from parity.rounding import LayerNoise, rounding_noise
from resnet_func import optim, tree
from resnet_func.losses import cross_entropy
from resnet_func.train import init_train_state, make_train_step

LR, MOMENTUM, WEIGHT_DECAY, EMA_DECAY = 0.01, 0.9, 5e-4, 0.999
NOISE_DRAWS = 3
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


class Spec(NamedTuple):
    """One row of the table."""

    form: str
    layout: str = "NCHW"
    dtype: str = "fp32"

    @property
    def name(self) -> str:
        return f"{self.form}, {self.layout}, {self.dtype}"


class Setting(NamedTuple):
    """What all variants of a run share."""

    train: bool
    ema: bool
    backend: str


BASELINE = Spec("module eager")
AGAIN = Spec("module eager again")
JAX = "JAX jit"


def make_optimizer() -> optim.Optimizer:
    """SGD with Nesterov momentum and weight decay."""
    return optim.sgd(LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)


def allowed_distances(case: Case, *, train: bool) -> Callable[[str], Mapping[str, float]]:
    """How far from the baseline's outcome rounding in "fp32" or "bf16" may lead, measured on the case.

    The network's own step is taken again with noise of that size on every layer: a ReLU whose input rounds
    across zero moves a gradient, so an update is further off than logits are, and the more so the deeper the
    network. A wrong factor or sign is at a distance of 1 or 2.
    """

    @cache
    def allowed(dtype: str) -> dict[str, float]:
        # half of what bounds an entry: distances average over entries
        size = rounding_noise(case.params, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]) / 2
        exact, largest = _outcome(case, train), {}
        for seed in range(NOISE_DRAWS):
            with LayerNoise(size, seed):
                noisy = _outcome(case, train)
            for name, leaf in exact.items():
                moved = max(size, relative_distance(noisy[name], leaf))
                largest[name] = max(largest.get(name, 0.0), moved)
        return largest

    return allowed


def _outcome(case: Case, train: bool) -> Outcome:
    if not train:
        with torch.no_grad():
            return {"logits": case.model.apply(case.params, case.state, case.x, train=False)[0]}
    train_state = init_train_state(case.params, case.state, make_optimizer())
    step = make_train_step(case.model, cross_entropy, make_optimizer())
    moved, metrics = step(train_state, case.x, case.y)
    return changes(metrics["loss"], tree.flatten(moved.params), tree.flatten(case.params))


def changes(loss: Tensor, params: dict[str, Tensor], start: dict[str, Tensor]) -> Outcome:
    """A step's loss and how far each parameter moved, as one vector: what two variants must agree on."""
    moved = [(params[name].detach() - leaf).flatten() for name, leaf in sorted(start.items())]
    return {"loss": loss, "update": torch.cat(moved)}
