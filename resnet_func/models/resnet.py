"""ResNets as pure functions: `build(config) -> Model(config, init, apply)`.

He et al. 2015 (https://arxiv.org/abs/1512.03385), the pre-activation blocks of Wide ResNets (Zagoruyko and
Komodakis 2016, https://arxiv.org/abs/1605.07146), and torchvision's variants, with torchvision's names.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_func import tree
from resnet_func.models.blocks import Scope, Specs, block_of, norm_and_relu
from resnet_func.models.config import ResNetConfig
from resnet_func.models.layers import (
    BatchNorm,
    Conv,
    GroupNorm,
    Linear,
    Pad,
    global_average_pool,
    init_layer,
)
from resnet_func.numerics import is_autocast_enabled
from resnet_func.types import Logits, Model, Params, State


def build(config: ResNetConfig) -> Model:
    """The network of a config as pure functions, which can be pickled.

    >>> model = build(ResNetConfig(block="basic", depths=(1,), widths=(8,), num_classes=10))
    >>> params, state = model.init(torch.Generator().manual_seed(0))
    >>> model.apply(params, state, torch.zeros(2, 3, 32, 32), train=True)[0].shape
    torch.Size([2, 10])
    """
    return Model(config, ResNetInit(config), ResNetApply(config))


class ResNetInit:
    """The `init` of a config."""

    def __init__(self, config: ResNetConfig) -> None:
        self.config, self.specs = config, layer_specs(config)

    def __call__(
        self,
        generator: torch.Generator,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Params, State]:
        """Fresh parameters and state.

        The numbers are drawn in float32 on the generator's device and then moved, so that a seed gives
        the same network in every dtype and on every device. `device="meta"` gives the shapes alone and
        draws nothing.
        """
        return _init(self.config, self.specs, generator, device=device, dtype=dtype)


class ResNetApply:
    """The `apply` of a config."""

    def __init__(self, config: ResNetConfig) -> None:
        self.config, self.specs = config, layer_specs(config)

    def __call__(self, params: Params, state: State, x: Tensor, *, train: bool) -> tuple[Logits, State]:
        """Logits `[N, num_classes]` of images `x [N, in_channels, H, W]`, and the state after them.

        `train=True` normalises with the batch's statistics and updates the running ones.

        Raises:
            ValueError: `x` has the wrong rank, channel count or dtype.
        """
        _check_images(self.config, params, x)
        return _apply(self.config, self.specs, params, state, x, train=train)


# --------------------------------------------------------------------------- the layers of a config


def layer_specs(config: ResNetConfig) -> Specs:
    """Every layer's hyper-parameters, nested like the parameters, in the order of the forward pass."""
    specs: Specs = {"conv1": _stem_conv(config)}
    if not config.is_preactivated:
        specs |= _norm("bn1", config, config.stem_channels)
    c_in, dilation = config.stem_channels, 1
    for index, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
        stride = 1 if index == 0 else 2
        first_dilation = dilation
        if (
            index > 0
            and config.replace_stride_with_dilation
            and config.replace_stride_with_dilation[index - 1]
        ):
            stride, dilation = 1, dilation * 2
        stage: Specs = {"0": _block_specs(config, c_in, width, stride, first_dilation)}
        c_in = width * config.expansion
        stage |= {str(i): _block_specs(config, c_in, width, 1, dilation) for i in range(1, depth)}
        specs[f"layer{index + 1}"] = stage
    if config.is_preactivated:
        specs |= _norm("bn1", config, c_in)
    return specs | {"fc": Linear(c_in, config.num_classes)}


def _stem_conv(config: ResNetConfig) -> Conv:
    kernel, stride, padding = (7, 2, 3) if config.stem == "imagenet" else (3, 1, 1)
    return Conv(
        config.in_channels,
        config.stem_channels,
        kernel,
        stride,
        padding,
        standardize=config.weight_standardization,
        affine=config.standardization_affine,
    )


def _norm(name: str, config: ResNetConfig, channels: int) -> Specs:
    match config.norm:
        case "batch":
            return {name: BatchNorm(channels)}
        case "group":
            return {name: GroupNorm(channels, config.norm_groups)}
        case "none":
            return {}


def _block_specs(config: ResNetConfig, c_in: int, width: int, stride: int, dilation: int) -> Specs:
    c_mid, c_out = config.inner_width(width), width * config.expansion

    def conv(c_in: int, c_out: int, kernel: int, stride: int = 1, dilation: int = 1, groups: int = 1) -> Conv:
        padding = dilation * (kernel // 2)
        standardize, affine = config.weight_standardization, config.standardization_affine
        return Conv(c_in, c_out, kernel, stride, padding, dilation, groups, standardize, affine)

    if config.block == "bottleneck":
        convs = [
            conv(c_in, c_mid, 1),
            conv(c_mid, c_mid, 3, stride, dilation, config.groups),
            conv(c_mid, c_out, 1),
        ]
    else:
        convs = [conv(c_in, c_mid, 3, stride), conv(c_mid, c_out, 3)]
    specs: Specs = {}
    for number, spec in enumerate(convs, start=1):
        if config.is_preactivated:
            specs |= {**_norm(f"bn{number}", config, spec.c_in), f"conv{number}": spec}
        else:
            specs |= {f"conv{number}": spec, **_norm(f"bn{number}", config, spec.c_out)}
    if config.scale_norm:
        specs |= _norm("scale_norm", config, c_out)
    if stride != 1 or c_in != c_out:
        if config.shortcut == "pad":
            specs["downsample"] = Pad(c_in, c_out, stride)
        else:
            norm = {} if config.is_preactivated else _norm("1", config, c_out)
            specs["downsample"] = {"0": conv(c_in, c_out, 1, stride), **norm}
    return specs


# --------------------------------------------------------------------------- init


def _init(
    config: ResNetConfig,
    specs: Specs,
    generator: torch.Generator,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype,
) -> tuple[Params, State]:
    device = torch.device(device or generator.device)
    drawn_on = device if device.type == "meta" else generator.device
    made = {path: init_layer(spec, generator, drawn_on) for path, spec in tree.flatten(specs).items()}
    params = {f"{path}.{name}": leaf for path, (params, _) in made.items() for name, leaf in params.items()}
    state = {f"{path}.{name}": leaf for path, (_, state) in made.items() for name, leaf in state.items()}
    if config.zero_init_residual:
        params |= {path: torch.zeros_like(params[path]) for path in _residual_ends(specs)}

    def place(leaf: Tensor) -> Tensor:
        return leaf.to(device, dtype if leaf.is_floating_point() else leaf.dtype)

    return tree.map(place, tree.unflatten(params)), tree.map(place, tree.unflatten(state))


def _residual_ends(specs: Specs) -> list[str]:
    """The weight that scales each block's residual branch."""
    ends = []
    for stage in _stages(specs):
        for index, block in specs[stage].items():
            last = [name for name in block if name not in ("downsample", "scale_norm")][-1]
            gain = isinstance(block[last], Conv) and block[last].affine
            ends.append(f"{stage}.{index}.{last}.{'gain' if gain else 'weight'}")
    return ends


# --------------------------------------------------------------------------- apply


def _apply(
    config: ResNetConfig, specs: Specs, params: Params, state: State, x: Tensor, *, train: bool
) -> tuple[Logits, State]:
    layer = Scope(specs, params, state, train=train)
    x = layer("conv1", x)
    if not config.is_preactivated:
        x = norm_and_relu(config, layer, x)
    if config.stem == "imagenet":
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    block = block_of(config)
    for stage in _stages(specs):
        blocks = layer.enter(stage)
        for index in blocks.specs:
            x = block(blocks.enter(index), x)
    if config.is_preactivated:
        x = norm_and_relu(config, layer, x)
    return layer("fc", global_average_pool(x)), tree.prune(layer.state)


def _stages(specs: Specs) -> list[str]:
    return [name for name in specs if name.startswith("layer")]


def _check_images(config: ResNetConfig, params: Params, x: Tensor) -> None:
    if x.ndim != 4 or x.shape[1] != config.in_channels:
        raise ValueError(
            f"expected images [N, {config.in_channels}, H, W]; got {list(x.shape)}. "
            "Add a batch dimension with x[None], or build the model with in_channels="
            f"{x.shape[1] if x.ndim == 4 else 'C'}"
        )
    dtype = params["conv1"]["weight"].dtype
    if x.dtype != dtype and not is_autocast_enabled(x.device.type):
        raise ValueError(
            f"expected images of the parameters' dtype, {dtype}; got {x.dtype}. Convert one: x.to({dtype})"
        )
