"""ResNetConfig refuses what cannot be built, and says what to do."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from resnet_func import ResNetConfig

BASIC: dict[str, Any] = {"block": "basic", "depths": (1, 1), "widths": (16, 24)}
BOTTLENECK = {**BASIC, "block": "bottleneck"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**BASIC, "block": "plain"}, "block must be one of basic, bottleneck, preact; got 'plain'"),
        ({**BASIC, "norm": "layer"}, "norm must be one of batch, group, none"),
        ({**BASIC, "stem": "tiny"}, "stem must be one of imagenet, cifar"),
        ({**BASIC, "shortcut": "A"}, "shortcut must be one of projection, pad"),
        ({**BASIC, "depths": [1, 1]}, "depths must be a tuple; got [1, 1]. Try tuple(...)"),
        ({**BASIC, "depths": (1,)}, "depths and widths need one entry per stage; got 1 depths"),
        ({**BASIC, "depths": (), "widths": ()}, "one entry per stage"),
        ({**BASIC, "depths": (1, 0)}, "depths must be 1 or more, in whole numbers; got (1, 0)"),
        ({**BASIC, "widths": (16, 2.5)}, "widths must be 1 or more, in whole numbers"),
        ({**BASIC, "num_classes": 0}, "num_classes must be 1 or more"),
        ({**BASIC, "in_channels": -1}, "in_channels must be 1 or more"),
        ({**BASIC, "stem_width": 0}, "stem_width must be 1 or more"),
        ({**BASIC, "groups": 2}, "groups=2 needs block='bottleneck'"),
        ({**BASIC, "width_per_group": 32}, "width_per_group=32 needs block='bottleneck'"),
        ({**BASIC, "replace_stride_with_dilation": (True,)}, "needs block='bottleneck'"),
        (
            {**BOTTLENECK, "replace_stride_with_dilation": (True, True)},
            "one flag per stage after the first (1",
        ),
        ({**BOTTLENECK, "width_per_group": 2}, "leaves no channels at width 16; it must be at least 4"),
        ({**BASIC, "shortcut": "pad", "widths": (16, 8)}, "can add channels but not drop them"),
        ({**BASIC, "norm": "group", "norm_groups": 32}, "32 does not divide 16. Try norm_groups=8"),
    ],
)
def test_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ResNetConfig(**fields)


def test_the_proposed_way_out_works() -> None:
    with pytest.raises(ValueError, match="Try norm_groups=") as error:
        ResNetConfig(**BASIC, norm="group")
    groups = int(str(error.value).rpartition("=")[2])
    assert ResNetConfig(**BASIC, norm="group", norm_groups=groups).norm_groups == groups


def test_frozen_hashable_and_comparable() -> None:
    config = ResNetConfig(**BASIC)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.norm = "group"  # pyright: ignore[reportAttributeAccessIssue]
    assert config == ResNetConfig(**BASIC)
    assert hash(config) == hash(ResNetConfig(**BASIC))


def test_derived_widths() -> None:
    resnext = ResNetConfig(block="bottleneck", depths=(1, 1), widths=(64, 128), groups=32, width_per_group=4)
    assert [resnext.inner_width(width) for width in resnext.widths] == [128, 256]  # ResNeXt-50 32x4d
    assert (resnext.stem_channels, resnext.expansion) == (64, 4)
    assert ResNetConfig(**BASIC, stem_width=8).stem_channels == 8
