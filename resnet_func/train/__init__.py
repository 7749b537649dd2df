"""Training and evaluation: pure steps, the loops around them, and wrappers of networks."""

from resnet_func.train.loops import Batches, Evaluation, Progress, evaluate, fit, train_epoch
from resnet_func.train.step import EvalStep, Step, init_train_state, make_eval_step, make_train_step
from resnet_func.train.wrappers import autocast, average_flips, to_memory_format

__all__ = [
    "Batches",
    "EvalStep",
    "Evaluation",
    "Progress",
    "Step",
    "autocast",
    "average_flips",
    "evaluate",
    "fit",
    "init_train_state",
    "make_eval_step",
    "make_train_step",
    "to_memory_format",
    "train_epoch",
]
