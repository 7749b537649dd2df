"""Taps in, captures out: one ordinary backward pass that leaves every layer's factors behind.

A tap is a zero added to a layer's output; its gradient is the output's cotangent. The forward pass returns
each tapped layer's input beside the logits. Normalisation weights and biases get one copy per sample, `[N,
C]`, whose gradients are the per-sample gradients. No weight gradient is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from resnet_func import tree
from resnet_func.autodiff import value_and_grad
from resnet_func.losses import check_per_sample
from resnet_func.models.config import ResNetConfig
from resnet_func.models.layers import BatchNorm, Conv, GroupNorm, LayerSpec, Linear
from resnet_func.models.resnet import layer_specs
from resnet_func.per_sample.contract import ConvFactors, Direct, Factors, LinearFactors
from resnet_func.types import Logits, LossFn, Model, Params, PerSample, State

# Says of a leaf's dotted path whether it is trained.
Trainable: TypeAlias = Callable[[str], bool]


class Captured(NamedTuple):
    """What one pass over a batch leaves behind.

    `factors` holds every trainable leaf by its dotted path, in the order of the parameters; `losses [N]` are
    averaged over views; `logits [views * N, classes]`, views first; `targets [views * N, ...]`.
    """

    losses: PerSample
    logits: Logits
    targets: Tensor
    factors: dict[str, Factors]
    views: int


def capture(
    model: Model,
    loss_fn: LossFn,
    trainable: Trainable,
    params: Params,
    state: State,
    x: Tensor,
    y: Tensor,
) -> Captured:
    """The factors of every trainable leaf, for `x [N, views, C, H, W]` and `y [N, ...]`.

    Running statistics are used, never updated. The result can be differentiated where the losses are being
    differentiated; otherwise the backward pass keeps no graph.
    """
    if model.config is None:
        raise ValueError("capture needs a model whose layers it knows; for a module use method='vmap'")
    specs = trained_specs(model.config, trainable)
    n, views = x.shape[:2]
    x, y = fold_views(x, y)
    flat = tree.flatten(params)
    taps = _make_taps(model.config, specs, flat, x, n)

    def run(taps: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
        tapped = {path: _each_view(leaf, path, views) for path, leaf in taps.items()}
        logits, out_state = model.apply(tree.unflatten({**flat, **tapped}), state, x, train=False)
        inputs = {path: leaf for path, leaf in tree.flatten(out_state).items() if path.endswith(".input")}
        losses = loss_fn(logits, y)
        check_per_sample(losses, x.shape[0])
        return losses.reshape(views, n).mean(0), (logits, inputs)

    losses, gradients, (logits, inputs) = value_and_grad(run, taps)
    factors = _collect(specs, flat, inputs, gradients, views)
    return Captured(losses, logits, y, {path: factors[path] for path in flat if path in factors}, views)


def fold_views(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """`x [N, views, ...]` as `[views * N, ...]`, views first, with each view's target beside it."""
    views = x.shape[1]
    if views == 1:
        return x[:, 0], y
    return x.transpose(0, 1).flatten(0, 1), y.repeat(views, *[1] * (y.ndim - 1))


def trained_specs(config: ResNetConfig, trainable: Trainable) -> dict[str, tuple[LayerSpec, tuple[str, ...]]]:
    """Each layer with something to train: its spec, and the names of its trained leaves."""
    specs = {}
    for path, spec in tree.flatten(layer_specs(config)).items():
        names = tuple(name for name in _leaf_names(spec) if trainable(f"{path}.{name}"))
        if names:
            specs[path] = (spec, names)
    return specs


def _leaf_names(spec: LayerSpec) -> tuple[str, ...]:
    if isinstance(spec, Conv):
        return ("weight",)
    return ("weight", "bias") if isinstance(spec, Linear | GroupNorm | BatchNorm) else ()


def _make_taps(
    config: ResNetConfig,
    specs: Mapping[str, tuple[LayerSpec, tuple[str, ...]]],
    params: Mapping[str, Tensor],
    x: Tensor,
    n: int,
) -> dict[str, Tensor]:
    """The leaves to differentiate: taps of convolutions and linear layers, copies `[N, C]` of affine ones."""
    sizes = output_sizes(config, x.shape[2], x.shape[3])
    zero = x.new_zeros((), dtype=_output_dtype(x))  # stride 0 when expanded: a tap takes no memory
    taps = {}
    for path, (spec, _) in specs.items():
        if isinstance(spec, Conv):
            taps[f"{path}.tap"] = zero.expand(x.shape[0], spec.c_out, *sizes[path])
        elif isinstance(spec, Linear):
            taps[f"{path}.tap"] = zero.expand(x.shape[0], spec.c_out)
        else:
            # one copy per sample of both, even where one is frozen: its gradient is simply not used
            for name in ("weight", "bias"):
                leaf = params[f"{path}.{name}"]
                taps[f"{path}.{name}"] = leaf.expand(n, *leaf.shape)
    return taps


def _output_dtype(x: Tensor) -> torch.dtype:
    """What a convolution of `x` returns: autocast's dtype where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _each_view(leaf: Tensor, path: str, views: int) -> Tensor:
    """A per-sample copy `[N, C]` repeated for every view; taps have all views already."""
    return leaf if views == 1 or path.endswith(".tap") else leaf.repeat(views, 1)


def _collect(
    specs: Mapping[str, tuple[LayerSpec, tuple[str, ...]]],
    params: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    views: int,
) -> dict[str, Factors]:
    factors: dict[str, Factors] = {}
    for path, (spec, names) in specs.items():
        if isinstance(spec, Conv):
            a, g = inputs[f"{path}.input"], gradients[f"{path}.tap"]
            factors[f"{path}.weight"] = ConvFactors(spec, params[f"{path}.weight"], a, g, views)
        elif isinstance(spec, Linear):
            weight = params[f"{path}.weight"]
            # small, and narrower under autocast: compute in the parameters' dtype
            a, g = (t.to(weight.dtype) for t in (inputs[f"{path}.input"], gradients[f"{path}.tap"]))
            if "weight" in names:
                factors[f"{path}.weight"] = LinearFactors(weight, a, g, views)
            if "bias" in names:
                factors[f"{path}.bias"] = Direct(g.reshape(views, -1, spec.c_out).sum(0))
        else:
            factors |= {f"{path}.{name}": Direct(gradients[f"{path}.{name}"]) for name in names}
    return factors


def output_sizes(config: ResNetConfig, height: int, width: int) -> dict[str, tuple[int, int]]:
    """The output pixels `(height, width)` of every convolution, for images of the given size."""
    specs: dict[str, Any] = layer_specs(config)
    size = _through(specs["conv1"], (height, width))
    sizes = {"conv1": size}
    if config.stem == "imagenet":
        size = ((size[0] - 1) // 2 + 1, (size[1] - 1) // 2 + 1)  # 3x3 max-pool, stride 2, padding 1
    for stage in [name for name in specs if name.startswith("layer")]:
        for index, block in specs[stage].items():
            inner = size
            for name, spec in block.items():
                if isinstance(spec, Conv):
                    inner = sizes[f"{stage}.{index}.{name}"] = _through(spec, inner)
                elif isinstance(spec, dict):
                    sizes[f"{stage}.{index}.{name}.0"] = _through(spec["0"], size)
            size = inner
    return sizes


def _through(spec: Conv, size: tuple[int, int]) -> tuple[int, int]:
    return (spec.output_size(size[0]), spec.output_size(size[1]))
