"""A model as an `nn.Module` with torchvision's names: for export, hooks, and tools that want modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_func import tree
from resnet_func.models.config import ResNetConfig
from resnet_func.models.interop.modules import ModuleApply, copy_module
from resnet_func.models.interop.state_dicts import to_state_dict
from resnet_func.models.layers import (
    BATCH_NORM_MOMENTUM,
    NORM_EPS,
    BatchNorm,
    Conv,
    GroupNorm,
    LayerSpec,
    Linear,
    Pad,
    global_average_pool,
    pad_shortcut,
    standardize,
)
from resnet_func.models.resnet import ResNetApply, Specs, layer_specs
from resnet_func.types import Apply, Model, Params, State

TORCHVISION_WIDTHS = (64, 128, 256, 512)


def to_module(model: Model, params: Params, state: State) -> nn.Module:
    """The network as an `nn.Module`, equal to the function to the bit: logits, gradients, buffers afterwards.

    For a network that `build` or the zoo made: torchvision's class where it has one, else modules of
    `nn.Conv2d`, `nn.BatchNorm2d`, ... with torchvision's names. For one that `from_module` made: a copy of
    the module. For a network with another activation order than its block's own, gains in its convolutions
    or norms after its sums, and for any other function (of `from_function`; with `winograd.wrap`,
    `train.average_flips` or `train.autocast` around `apply`): a module that holds the tensors by name and
    runs the function, which has no layers to put hooks on.

    Args:
        model: Any model.
        params: Its parameters; the module's are copies, and require gradients where they are floating.
        state: Its state, copied too.

    Returns:
        The module, in training mode as constructors leave it; for inference call `.eval()`.

    Raises:
        ValueError: `params` and `state` are not this model's; every difference is listed.

    >>> from resnet_func import resnet20
    >>> model = resnet20()
    >>> to_module(model, *model.init(torch.Generator())).eval()(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """
    state_dict = to_state_dict(model, params, state)
    match model.apply:
        case ModuleApply():
            return _module_again(model.apply, {**tree.flatten(params), **tree.flatten(state)})
        case ResNetApply(config=config) if _has_modules(config):
            with torch.device("meta"):
                module = _torchvision(config) if _is_torchvisions(config) else ResNetModule(config)
            own = {key: leaf.detach().clone() for key, leaf in state_dict.items()}
            module.load_state_dict(own, assign=True)
            return module
        case _:
            return FunctionModule(model.apply, params, state)


def _module_again(apply: ModuleApply, leaves: Mapping[str, Tensor]) -> nn.Module:
    skeleton = apply.training
    names = {id(leaf): name for name, leaf in (*skeleton.named_parameters(), *skeleton.named_buffers())}
    return copy_module(skeleton, lambda leaf: leaves[names[id(leaf)]].detach().clone())


def _has_modules(config: ResNetConfig) -> bool:
    """Whether `ResNetModule` covers the config."""
    plain = replace(config, activation_order=None)
    return config.order == plain.order and not config.standardization_affine and not config.scale_norm


# --------------------------------------------------------------------------- torchvision's


def _is_torchvisions(config: ResNetConfig) -> bool:
    """Whether torchvision's ResNet class covers the config."""
    usual = (config.stem, config.shortcut, config.norm) == ("imagenet", "projection", "batch")
    sizes = (config.widths, config.stem_channels, config.in_channels) == (TORCHVISION_WIDTHS, 64, 3)
    return usual and sizes and config.block != "preact" and not config.weight_standardization


def _torchvision(config: ResNetConfig) -> nn.Module:
    from torchvision.models import resnet  # takes a second, and nothing else here needs it

    module = resnet.ResNet(
        resnet.Bottleneck if config.block == "bottleneck" else resnet.BasicBlock,
        list(config.depths),
        num_classes=config.num_classes,
        groups=config.groups,
        width_per_group=config.width_per_group,
        replace_stride_with_dilation=list(config.replace_stride_with_dilation) or None,
    )
    for part in module.modules():
        if isinstance(part, nn.ReLU):
            part.inplace = False  # backward hooks refuse outputs that change afterwards
    return module


# --------------------------------------------------------------------------- from layer specs


class ResNetModule(nn.Module):
    """The network of any config, made of torch's modules under torchvision's names."""

    conv1: nn.Module
    bn1: nn.Module
    fc: nn.Module

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.preact, self.max_pool = config.block == "preact", config.stem == "imagenet"
        self.stages: list[str] = []
        for name, spec in layer_specs(config).items():
            if name.startswith("layer"):
                self.stages.append(name)
                blocks = [Block(config.block, block) for block in spec.values()]
                self.add_module(name, nn.Sequential(*blocks))
            else:
                self.add_module(name, _layer(spec))
        if not hasattr(self, "bn1"):
            self.bn1 = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if not self.preact:
            x = F.relu(self.bn1(x))
        if self.max_pool:
            x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        for stage in self.stages:
            x = getattr(self, stage)(x)
        if self.preact:
            x = F.relu(self.bn1(x))
        return self.fc(global_average_pool(x))


class Block(nn.Module):
    """A residual block of any kind; in-place operations, which hooks refuse, are left out."""

    conv1: nn.Module
    bn1: nn.Module
    conv2: nn.Module
    bn2: nn.Module
    conv3: nn.Module
    bn3: nn.Module
    downsample: nn.Module

    def __init__(self, kind: str, specs: Specs) -> None:
        super().__init__()
        for name, spec in specs.items():
            self.add_module(name, _layer(spec))
        for name in ("bn1", "bn2", "bn3"):
            if not hasattr(self, name):
                self.add_module(name, nn.Identity())
        self.kind, self.projects = kind, isinstance(specs.get("downsample"), dict)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "preact":
            activated = F.relu(self.bn1(x))
            y = self.conv2(F.relu(self.bn2(self.conv1(activated))))
            return y + self.shortcut(activated if self.projects else x)
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.kind == "bottleneck":
            y = self.bn3(self.conv3(F.relu(y)))
        return F.relu(y + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """The identity where shapes agree; else zero padding or a projection."""
        return self.downsample(x) if hasattr(self, "downsample") else x


class StandardizedConv2d(nn.Conv2d):
    """A convolution whose filters are standardised first (Qiao et al. 2019)."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, standardize(self.weight), self.bias)


class PadShortcut(nn.Module):
    """He et al.'s option-A shortcut."""

    def __init__(self, spec: Pad) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, x: Tensor) -> Tensor:
        return pad_shortcut(self.spec, x)


def _layer(spec: LayerSpec | Specs) -> nn.Module:
    match spec:
        case Conv():
            conv = StandardizedConv2d if spec.standardize else nn.Conv2d
            make = partial(conv, spec.c_in, spec.c_out, spec.kernel, spec.stride, spec.padding)
            return make(dilation=spec.dilation, groups=spec.groups, bias=False)
        case Linear():
            return nn.Linear(spec.c_in, spec.c_out)
        case BatchNorm():
            return nn.BatchNorm2d(spec.channels, eps=NORM_EPS, momentum=BATCH_NORM_MOMENTUM)
        case GroupNorm():
            return nn.GroupNorm(spec.groups, spec.channels, eps=NORM_EPS)
        case Pad():
            return PadShortcut(spec)
        case _:
            return nn.Sequential(*(_layer(inner) for inner in spec.values()))


# --------------------------------------------------------------------------- any function


class FunctionModule(nn.Module):
    """A function as a module: holds its tensors by name, and writes the state it returns into the buffers."""

    def __init__(self, apply: Apply, params: Params, state: State) -> None:
        super().__init__()
        self.apply_function = apply
        for path, leaf in tree.flatten(params).items():
            leaf = nn.Parameter(leaf.detach().clone(), leaf.is_floating_point() or leaf.is_complex())
            self._holder(path).register_parameter(path.rpartition(".")[2], leaf)
        for path, leaf in tree.flatten(state).items():
            self._holder(path).register_buffer(path.rpartition(".")[2], leaf.detach().clone())

    def _holder(self, path: str) -> nn.Module:
        """The empty module, made where it is missing, that holds the leaf."""
        holder: nn.Module = self
        for name in path.split(".")[:-1]:
            if name not in holder._modules:
                holder.add_module(name, nn.Module())
            holder = holder._modules[name]  # pyright: ignore[reportAssignmentType]
        return holder

    def forward(self, x: Tensor) -> Any:
        params, state = dict(self.named_parameters()), dict(self.named_buffers())
        y, after = self.apply_function(tree.unflatten(params), tree.unflatten(state), x, train=self.training)
        with torch.no_grad():
            for path, leaf in tree.flatten(after).items():
                if leaf is not state[path]:  # a copy onto itself would still void the graph that saved it
                    state[path].copy_(leaf)
        return y
