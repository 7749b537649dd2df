"""Optimizers and learning-rate schedules as pure functions, equal to `torch.optim` to the bit."""

from resnet_func.optim.base import Optimizer, Updates, apply_updates
from resnet_func.optim.combine import PartitionState, clip_by_global_norm, clipped, ema, partition
from resnet_func.optim.first_order import AdamState, SGDState, adam, adamw, sgd
from resnet_func.optim.muon import MuonState, muon
from resnet_func.optim.schedules import Schedule, constant, cosine, one_cycle, step

__all__ = [
    "AdamState",
    "MuonState",
    "Optimizer",
    "PartitionState",
    "SGDState",
    "Schedule",
    "Updates",
    "adam",
    "adamw",
    "apply_updates",
    "clip_by_global_norm",
    "clipped",
    "constant",
    "cosine",
    "ema",
    "muon",
    "one_cycle",
    "partition",
    "sgd",
    "step",
]
