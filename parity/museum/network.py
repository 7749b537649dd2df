"""Bugs of how layers are put together."""

from __future__ import annotations

from parity.museum.exhibit import REIMPLEMENTATIONS, Exhibit, edit
from resnet_func.models import blocks, resnet

EVALUATION = "bitwise/resnet20/fp32-eval-nchw"
SUM = 'F.relu_(layer("scale_norm", y + shortcut(layer, x)))'

EXHIBITS = [
    Exhibit(
        "stride-on-the-first-convolution",
        "a bottleneck strides in its 1x1, not in its 3x3",
        "He et al. 2015 and their Caffe models; torchvision's is ResNet 1.5",
        "properties/bottlenecks-stride-or-dilate-as-torchvisions",
        edit(
            resnet._block_specs,
            ("conv(c_in, c_mid, 1),", "conv(c_in, c_mid, 1, stride),"),
            (
                "conv(c_mid, c_mid, 3, stride, dilation, config.groups)",
                "conv(c_mid, c_mid, 3, 1, dilation, config.groups)",
            ),
        ),
    ),
    Exhibit(
        "padding-moved-in-one-block",
        "one block of layer3 pads its second convolution by two, its first not at all",
        "a wrong entry in a table of layers, of which the shapes tell nothing",
        EVALUATION,
        edit(
            resnet.layer_specs,
            (
                "    return specs |",
                "    from dataclasses import replace\n"
                '    block = specs["layer3"]["1"]\n'
                '    block["conv1"] = replace(block["conv1"], padding=0)\n'
                '    block["conv2"] = replace(block["conv2"], padding=2)\n'
                "    return specs |",
            ),
        ),
    ),
    Exhibit(
        "no-relu-in-the-block",
        "no ReLU between a basic block's two convolutions",
        REIMPLEMENTATIONS,
        EVALUATION,
        edit(
            blocks.basic_block,
            ('F.relu_(layer("bn1", layer("conv1", x)))', 'layer("bn1", layer("conv1", x))'),
        ),
    ),
    Exhibit(
        "no-relu-after-the-sum",
        "no ReLU after a basic block's sum",
        "pre-activation networks, mixed with the others",
        EVALUATION,
        edit(
            blocks.basic_block,
            ('F.relu_(layer("scale_norm", y + shortcut(layer, x)))', "y + shortcut(layer, x)"),
        ),
    ),
    Exhibit(
        "relu-before-the-sum",
        "ReLU before the sum, not after it",
        "He et al. 2016 as a variant that trains worse (figure 4c)",
        EVALUATION,
        edit(
            blocks.basic_block,
            ('F.relu_(layer("scale_norm", y + shortcut(layer, x)))', "F.relu(y) + shortcut(layer, x)"),
        ),
    ),
    Exhibit(
        "norm-after-the-sum",
        "the block's last norm comes after the sum",
        "He et al. 2016 as a variant that trains worse (figure 4b)",
        EVALUATION,
        edit(
            blocks.basic_block,
            ('y = layer("bn2", layer("conv2", y))', 'y = layer("conv2", y)'),
            ('layer("scale_norm", y + shortcut(layer, x))', 'layer("bn2", y + shortcut(layer, x))'),
        ),
    ),
    Exhibit(
        "relu-before-the-norm",
        "convolution, ReLU, norm: in that order",
        REIMPLEMENTATIONS,
        EVALUATION,
        edit(
            blocks.basic_block,
            ('F.relu_(layer("bn1", layer("conv1", x)))', 'layer("bn1", F.relu(layer("conv1", x)))'),
        ),
    ),
    Exhibit(
        "projection-without-norm",
        "a projection's norm is left out",
        REIMPLEMENTATIONS,
        "properties/group-norm-is-torchvisions-to-rounding",
        edit(blocks.shortcut, ('projection("1", projection("0", x))', 'projection("0", x)')),
    ),
    Exhibit(
        "projection-of-the-raw-input",
        "a pre-activation block projects the input, not the activated input",
        "reimplementations of Wide ResNets",
        "bitwise/wrn_16_4/fp32-eval-nchw",
        edit(blocks.preact_block, ("activated if projects else x", "x")),
    ),
    Exhibit(
        "identity-of-the-activated-input",
        "every shortcut of a pre-activation network starts at the activated input",
        "reimplementations of Wide ResNets",
        "bitwise/wrn_16_4/fp32-eval-nchw",
        edit(blocks.preact_block, ("activated if projects else x", "activated")),
    ),
    Exhibit(
        "no-relu-at-the-end",
        "a pre-activation network ends without its last ReLU",
        REIMPLEMENTATIONS,
        "bitwise/wrn_16_4/fp32-eval-nchw",
        edit(
            resnet._apply,
            (
                "    if config.is_preactivated:\n        x = norm_and_relu(config, layer, x)",
                '    if config.is_preactivated:\n        x = layer("bn1", x)',
            ),
        ),
    ),
    Exhibit(
        "dilation-one-block-early",
        "the first block of a dilated stage has the stage's dilation, not the previous one's",
        "reimplementations for segmentation",
        "properties/bottlenecks-stride-or-dilate-as-torchvisions",
        edit(
            resnet.layer_specs,
            ("config, c_in, width, stride, first_dilation", "config, c_in, width, stride, dilation"),
        ),
    ),
    Exhibit(
        "zero-at-the-wrong-norm",
        "zero_init_residual empties the first norm of a block",
        REIMPLEMENTATIONS,
        "properties/zero-initialisation-empties-the-end-of-each-block",
        edit(
            resnet._init,
            ("for path in _residual_ends(specs)}", "for path in params if path.endswith('.bn1.weight')}"),
        ),
    ),
    Exhibit(
        "pooling-without-padding",
        "the stem's max-pool has no padding",
        REIMPLEMENTATIONS,
        "properties/the-function-is-torchvisions-module",
        edit(resnet._apply, ("kernel_size=3, stride=2, padding=1", "kernel_size=3, stride=2, padding=0")),
    ),
]
