"""ResNets as pure functions over parameter pytrees, open to every `torch.func` transform."""

from resnet_func import attribution, losses, optim, per_sample, privacy, train, tree
from resnet_func.models import winograd, zoo
from resnet_func.models.config import ResNetConfig
from resnet_func.models.load import load_network
from resnet_func.models.modules import from_function, from_module
from resnet_func.models.pretrained import pretrained
from resnet_func.models.resnet import build
from resnet_func.models.state_dicts import from_state_dict, to_state_dict
from resnet_func.models.to_module import to_module
from resnet_func.models.zoo import (
    resnet18,
    resnet20,
    resnet32,
    resnet34,
    resnet44,
    resnet50,
    resnet56,
    resnet101,
    resnet110,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
    wrn_16_4,
    wrn_28_10,
    wrn_40_4,
)
from resnet_func.types import Model, TrainState

__version__ = "0.1.0"

__all__ = [
    "Model",
    "ResNetConfig",
    "TrainState",
    "attribution",
    "build",
    "from_function",
    "from_module",
    "from_state_dict",
    "load_network",
    "losses",
    "optim",
    "per_sample",
    "pretrained",
    "privacy",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnet101",
    "resnet110",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "to_module",
    "to_state_dict",
    "train",
    "tree",
    "wide_resnet50_2",
    "wide_resnet101_2",
    "winograd",
    "wrn_16_4",
    "wrn_28_10",
    "wrn_40_4",
    "zoo",
]
