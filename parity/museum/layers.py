"""Bugs of single layers."""

from __future__ import annotations

from parity.museum.exhibit import REIMPLEMENTATIONS, Exhibit, constant, edit
from resnet_func.models import layers

EXHIBITS = [
    Exhibit(
        "momentum-of-the-old-value",
        "BatchNorm's momentum weighs the old statistics, not the new ones",
        "Keras: its momentum=0.99 is torch's 0.01",
        "bitwise/resnet20/fp32-train-nchw",
        constant(layers, "BATCH_NORM_MOMENTUM", 0.9),
    ),
    Exhibit(
        "biased-running-variance",
        "running_var averages the biased variance",
        "tinygrad until its pull request 807, MLX until its 3817",
        "properties/running-statistics-move-by-a-tenth",
        edit(
            layers.batch_norm,
            (
                '"running_var": var',
                '"running_var": torch.lerp(state["running_var"], x.var((0, 2, 3), correction=0), 0.1)',
            ),
        ),
    ),
    Exhibit(
        "unbiased-normalisation",
        "BatchNorm divides by the root of the unbiased variance",
        "reimplementations by x.var(), which is unbiased in torch",
        "properties/training-normalises-each-channel",
        edit(
            layers.batch_norm,
            (
                "    batches = state",
                "    v, m = torch.var_mean(x, (0, 2, 3), correction=1, keepdim=True)\n"
                '    y = (x - m) / (v + NORM_EPS).sqrt() * params["weight"][:, None, None]\n'
                '    y = y + params["bias"][:, None, None]\n'
                "    batches = state",
            ),
        ),
    ),
    Exhibit(
        "epsilon-of-keras",
        "the norms' epsilon is 1e-3",
        "Keras: BatchNormalization has epsilon=0.001",
        "bitwise/resnet20/fp32-eval-nchw",
        constant(layers, "NORM_EPS", 1e-3),
    ),
    Exhibit(
        "batches-not-counted",
        "num_batches_tracked stays as it was",
        REIMPLEMENTATIONS,
        "properties/only-training-counts-batches",
        edit(layers.batch_norm, ('state["num_batches_tracked"] + 1', 'state["num_batches_tracked"].clone()')),
    ),
    Exhibit(
        "statistics-updated-in-place",
        "BatchNorm moves the running statistics that the caller passed in",
        "F.batch_norm, and with it torch.func.functional_call",
        "properties/training-is-pure",
        edit(layers.batch_norm, ("mean, var = _own(mean, x), _own(var, x)", "pass")),
    ),
    Exhibit(
        "batch-statistics-in-evaluation",
        "evaluation normalises with the statistics of its batch",
        "a forgotten model.eval()",
        "properties/a-samples-logits-depend-on-its-image-alone",
        edit(
            layers.batch_norm,
            (
                "F.batch_norm(x, mean, var,",
                "F.batch_norm(x, mean if train else None, var if train else None,",
            ),
            ('params["bias"], train, BATCH', 'params["bias"], True, BATCH'),
        ),
    ),
    Exhibit(
        "group-size-for-groups",
        "GroupNorm takes its number of groups for the channels of a group",
        "the two conventions of flax's GroupNorm, num_groups and group_size",
        "properties/groups-of-one-channel-are-batches-of-one-sample",
        edit(
            layers.group_norm,
            ("return F.group_norm(x, spec.groups,", "return F.group_norm(x, spec.channels // spec.groups,"),
        ),
    ),
    Exhibit(
        "standardised-by-the-unbiased-deviation",
        "weight standardisation divides by the unbiased deviation",
        "the code published with Qiao et al. 2019, by weight.std()",
        "properties/standardised-filters-have-mean-0-and-variance-1",
        edit(layers.standardize, ("correction=0", "correction=1")),
    ),
    Exhibit(
        "shortcut-padded-on-one-side",
        "an option-A shortcut has all its zero channels after the copy",
        REIMPLEMENTATIONS,
        "bitwise/resnet20/fp32-eval-nchw",
        edit(layers.pad_shortcut, ("(spec.c_out - spec.c_in) // 2", "0")),
    ),
    Exhibit(
        "shortcut-averages-pixels",
        "an option-A shortcut averages pixels instead of taking every other one",
        REIMPLEMENTATIONS,
        "properties/padded-shortcuts-are-zeros-around-a-copy",
        edit(
            layers.pad_shortcut,
            ("x[:, :, :: spec.stride, :: spec.stride]", "F.avg_pool2d(x, spec.stride, ceil_mode=True)"),
        ),
    ),
    Exhibit(
        "maximum-instead-of-mean",
        "the last pooling takes maxima",
        REIMPLEMENTATIONS,
        "bitwise/resnet20/fp32-eval-nchw",
        edit(layers.global_average_pool, ("x.mean(", "x.amax(")),
    ),
    Exhibit(
        "same-padding",
        "a strided convolution of an even size is padded after the last pixel alone",
        'TensorFlow: padding="same"',
        "bitwise/resnet20/fp32-eval-nchw",
        edit(
            layers.conv2d,
            (
                "return F.conv2d(x, weight, bias, spec.stride, spec.padding, spec.dilation, spec.groups)",
                "short = [(s - 1) // spec.stride * spec.stride + spec.kernel - s for s in x.shape[:1:-1]]\n"
                "    sides = [side for s in short for side in (max(s, 0) // 2, max(s, 0) - max(s, 0) // 2)]\n"
                "    return F.conv2d(F.pad(x, sides), weight, None, spec.stride, 0, 1, spec.groups)",
            ),
        ),
    ),
    Exhibit(
        "kernel-of-another-layout",
        "the last weight is read as [in, out] without a transposition",
        "conversions of Dense kernels from flax and Keras, which are [in, out]",
        "bitwise/resnet20/fp32-eval-nchw",
        edit(
            layers.linear,
            ('F.linear(x, params["weight"],', 'F.linear(x, params["weight"].reshape(x.shape[1], -1).T,'),
        ),
    ),
    Exhibit(
        "initialised-by-fan-in",
        "convolutions start with variance 2 / fan-in",
        "torch.nn.init's default mode; torchvision asks for fan-out",
        "properties/networks-start-as-torchs-do",
        edit(layers.init_layer, ("spec.c_out * spec.kernel**2", "spec.c_in // spec.groups * spec.kernel**2")),
    ),
    Exhibit(
        "last-bias-starts-at-zero",
        "the last layer's bias starts at zero",
        "flax and Keras, where it does; torch draws it",
        "properties/networks-start-as-torchs-do",
        edit(layers.init_layer, ('"bias": bias}', '"bias": torch.zeros_like(bias)}')),
    ),
]
