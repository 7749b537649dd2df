"""What all forms of a step share: settings, hyper-parameters, and how their results are compared."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.forms.networks import Case
from benchmarks.harness.measure import Outcome
from resnet_func import tree

LR, MOMENTUM, WEIGHT_DECAY, EMA_DECAY = 0.01, 0.9, 5e-4, 0.999
# Relative distances that rounding excuses. A ReLU whose input rounds across zero moves a gradient, so the
# update of a step is further off than logits are; a wrong factor or sign is at a distance of 1 or 2.
TOLERANCES = {
    ("training", "fp32"): 0.02,  # a ResNet-18 module in its two layouts: 0.005
    ("training", "bf16"): 0.5,
    ("inference", "fp32"): 1e-3,
    ("inference", "bf16"): 5e-2,
}
DEEP = 40  # convolutions: more layers have more such ReLUs
DEEP_TOLERANCE = 0.1  # a ResNet-50 module in its two layouts: 0.04
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


def tolerance(task: str, dtype: str, case: Case) -> float:
    """The distance to the baseline's outcome that is put down to rounding."""
    convolutions = sum(leaf.ndim == 4 for leaf in tree.leaves(case.params))
    allowed = TOLERANCES[task, dtype]
    return max(allowed, DEEP_TOLERANCE) if task == "training" and convolutions > DEEP else allowed


def changes(loss: Tensor, params: dict[str, Tensor], start: dict[str, Tensor]) -> Outcome:
    """A step's loss and how far each parameter moved, as one vector: what two variants must agree on."""
    moved = [(params[name].detach() - leaf).flatten() for name, leaf in sorted(start.items())]
    return {"loss": loss, "update": torch.cat(moved)}
