"""ResNetConfig: every ResNet of the zoo as frozen data, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, TypedDict

BOTTLENECK_EXPANSION = 4

ActivationOrder: TypeAlias = Literal["conv-norm-relu", "conv-relu-norm", "norm-relu-conv", "relu-norm-conv"]


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """The architecture of a ResNet.

    Args:
        block: "basic" (two 3x3 convolutions), "bottleneck" (1x1, 3x3, 1x1 with expansion 4; the 3x3
            strides, as in torchvision), or "preact" (norm and ReLU before each of two 3x3 convolutions).
        activation_order: What goes round each convolution of a block, in order. None is the block's own:
            "conv-norm-relu", as in torchvision, of "basic" and "bottleneck", and "norm-relu-conv" of
            "preact". "conv-norm-relu" has its last ReLU after the sum; in the other orders the sum goes on
            as it is. Orders that end in the convolution have a norm and a ReLU before the average pool. With
            differential privacy the order is worth up to twelve points of accuracy.
        depths: Blocks in each stage. Every stage after the first halves the resolution.
        widths: Channels of each stage, before the bottleneck's expansion.
        stem_width: Channels after the first convolution; None means `widths[0]`.
        groups: Groups of the bottleneck's 3x3 convolution (ResNeXt's cardinality).
        width_per_group: Bottleneck width as a share of 64: inner channels are
            `int(width * width_per_group / 64) * groups`.
        stem: "imagenet" (7x7 stride 2, then 3x3 max-pool stride 2) or "cifar" (3x3 stride 1).
        norm: "batch", "group" or "none" (the identity).
        norm_groups: Groups of every GroupNorm; must divide every normalised width.
        shortcut: Where shapes differ, "projection" (1x1 convolution and norm) or "pad" (He et al.'s
            option A: subsample, and pad with zero channels; no parameters).
        zero_init_residual: Start every block as its shortcut: the last norm's weight of a block is zero
            (the last convolution's where a block does not end in a norm).
        replace_stride_with_dilation: For each stage after the first, whether to dilate instead of stride
            (bottleneck only, as in torchvision); an empty tuple means never.
        weight_standardization: Standardise each filter to mean 0 and variance 1 before every convolution
            (Qiao et al. 2019, https://arxiv.org/abs/1903.10520).
        standardization_affine: Give each standardised filter a trained gain and a bias, and divide it by the
            root of its fan-in (Brock et al. 2021, https://arxiv.org/abs/2101.08692).
        scale_norm: Normalise after each block's sum, too (Klause et al. 2022,
            https://arxiv.org/abs/2203.00324).
        num_classes: Size of the output.
        in_channels: Channels of the input image.

    Raises:
        ValueError: a value is out of range, or two do not fit together; the message says which.

    >>> ResNetConfig(block="basic", depths=(2, 2), widths=(16, 32)).stem_channels
    16
    """

    block: Literal["basic", "bottleneck", "preact"]
    depths: tuple[int, ...]
    widths: tuple[int, ...] = (64, 128, 256, 512)
    stem_width: int | None = None
    groups: int = 1
    width_per_group: int = 64
    stem: Literal["imagenet", "cifar"] = "imagenet"
    norm: Literal["batch", "group", "none"] = "batch"
    norm_groups: int = 32
    shortcut: Literal["projection", "pad"] = "projection"
    zero_init_residual: bool = False
    replace_stride_with_dilation: tuple[bool, ...] = ()
    weight_standardization: bool = False
    standardization_affine: bool = False
    scale_norm: bool = False
    activation_order: ActivationOrder | None = None
    num_classes: int = 1000
    in_channels: int = 3

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_sizes(self)
        _check_bottleneck_only(self)
        _check_shortcut(self)
        _check_normalization(self)
        if self.norm == "group":
            _check_norm_groups(self)

    @property
    def stem_channels(self) -> int:
        """Channels after the stem."""
        return self.widths[0] if self.stem_width is None else self.stem_width

    @property
    def expansion(self) -> int:
        """A block's output channels over its stage's width."""
        return BOTTLENECK_EXPANSION if self.block == "bottleneck" else 1

    @property
    def order(self) -> ActivationOrder:
        """The activation order, the block's own where none was given."""
        own: ActivationOrder = "norm-relu-conv" if self.block == "preact" else "conv-norm-relu"
        return self.activation_order or own

    @property
    def is_preactivated(self) -> bool:
        """Whether norm and ReLU come before the convolutions, and so once more after the last block."""
        return self.order.endswith("conv")

    def inner_width(self, width: int) -> int:
        """Channels inside a block of a stage of this width."""
        return int(width * self.width_per_group / 64) * self.groups if self.block == "bottleneck" else width


class ConfigChanges(TypedDict, total=False):
    """The fields of `ResNetConfig` as keywords, for the functions of the zoo; the test holds them equal."""

    block: Literal["basic", "bottleneck", "preact"]
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    stem_width: int | None
    groups: int
    width_per_group: int
    stem: Literal["imagenet", "cifar"]
    norm: Literal["batch", "group", "none"]
    norm_groups: int
    shortcut: Literal["projection", "pad"]
    zero_init_residual: bool
    replace_stride_with_dilation: tuple[bool, ...]
    weight_standardization: bool
    standardization_affine: bool
    scale_norm: bool
    activation_order: ActivationOrder | None
    num_classes: int
    in_channels: int


_CHOICES = {
    "block": ("basic", "bottleneck", "preact"),
    "stem": ("imagenet", "cifar"),
    "norm": ("batch", "group", "none"),
    "shortcut": ("projection", "pad"),
    "activation_order": (None, "conv-norm-relu", "conv-relu-norm", "norm-relu-conv", "relu-norm-conv"),
}


def _check_choices(config: ResNetConfig) -> None:
    for field, allowed in _CHOICES.items():
        value = getattr(config, field)
        if value not in allowed:
            raise ValueError(f"{field} must be one of {', '.join(map(str, allowed))}; got {value!r}")


def _check_sizes(config: ResNetConfig) -> None:
    for field in ("depths", "widths", "replace_stride_with_dilation"):
        if not isinstance(getattr(config, field), tuple):
            raise ValueError(f"{field} must be a tuple; got {getattr(config, field)!r}. Try tuple(...)")
    if not config.depths or len(config.depths) != len(config.widths):
        raise ValueError(
            f"depths and widths need one entry per stage; got {len(config.depths)} depths "
            f"{config.depths} and {len(config.widths)} widths {config.widths}"
        )
    scalars = ("groups", "width_per_group", "norm_groups", "num_classes", "in_channels")
    numbers = {name: (getattr(config, name),) for name in scalars}
    numbers |= {"depths": config.depths, "widths": config.widths, "stem_width": (config.stem_channels,)}
    for field, values in numbers.items():
        if not all(isinstance(value, int) and value >= 1 for value in values):
            raise ValueError(f"{field} must be 1 or more, in whole numbers; got {getattr(config, field)!r}")


def _check_bottleneck_only(config: ResNetConfig) -> None:
    dilate = config.replace_stride_with_dilation
    if dilate and len(dilate) != len(config.depths) - 1:
        raise ValueError(
            f"replace_stride_with_dilation needs one flag per stage after the first "
            f"({len(config.depths) - 1} here); got {dilate}. Leave it empty for none"
        )
    if config.block != "bottleneck":
        for field, default in (("groups", 1), ("width_per_group", 64)):
            if getattr(config, field) != default:
                raise ValueError(
                    f"{field}={getattr(config, field)} needs block='bottleneck'; got block={config.block!r}. "
                    f"Leave {field}={default}, or scale widths"
                )
        if any(dilate):
            raise ValueError(
                "replace_stride_with_dilation needs block='bottleneck'; "
                f"got block={config.block!r}. Leave it empty"
            )
    for width in config.widths:
        if config.inner_width(width) < 1:
            raise ValueError(
                f"width_per_group={config.width_per_group} leaves no channels at width {width}; "
                f"it must be at least {-(-64 // width)}"
            )


def _check_shortcut(config: ResNetConfig) -> None:
    channels = (config.stem_channels, *(width * config.expansion for width in config.widths))
    if config.shortcut == "pad" and list(channels) != sorted(channels):
        raise ValueError(
            "shortcut='pad' can add channels but not drop them; "
            f"got {channels} from the stem to the last stage. Use shortcut='projection'"
        )


def _check_normalization(config: ResNetConfig) -> None:
    if config.standardization_affine and not config.weight_standardization:
        raise ValueError(
            "standardization_affine=True needs weight_standardization=True; got False. Set both, or neither"
        )
    if config.scale_norm and config.norm == "none":
        raise ValueError("scale_norm=True needs a norm; got norm='none'. Use norm='group'")


def _check_norm_groups(config: ResNetConfig) -> None:
    widths = {config.stem_channels}
    for width in config.widths:
        widths |= {config.inner_width(width), width * config.expansion}
    for width in sorted(widths):
        if width % config.norm_groups:
            fitting = max(g for g in range(1, config.norm_groups) if all(w % g == 0 for w in widths))
            raise ValueError(
                f"norm_groups must divide every width; {config.norm_groups} does not divide {width}. "
                f"Try norm_groups={fitting}"
            )
