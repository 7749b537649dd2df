"""Bugs of per-sample gradients, norms and clipped sums."""

from __future__ import annotations

from parity.museum.exhibit import Exhibit, both, edit
from resnet_func.per_sample import capture, collect, intercept, options, reference
from resnet_func.per_sample.layers import contract, ghost, layer
from resnet_func.per_sample.quantities import noise_scale, quantity

INSTANCE_NORM = edit(
    reference._gradient_of_one,
    (
        "        logits, _ = task.model.apply(task.params(trained), task.state, x, train=False)",
        "        from unittest import mock\n"
        "        from resnet_func.models import layers\n"
        "        def alone(params, state, x, *, train):\n"
        '            affine = params["weight"], params["bias"]\n'
        "            return layers.F.batch_norm(x, None, None, *affine, True, 0.1, layers.NORM_EPS), state\n"
        '        with mock.patch.object(layers, "batch_norm", alone):\n'
        "            logits, _ = task.model.apply(task.params(trained), task.state, x, train=True)",
    ),
)

EXHIBITS = [
    Exhibit(
        "mean-for-sum",
        "per-sample gradients are those of the mean loss, N times too small",
        "BackPACK's individual gradients where the loss is a mean",
        "properties/per-sample-gradients-sum-to-the-gradient",
        edit(capture._forward, (".mean(0), logits", ".mean(0) / batch.samples, logits")),
    ),
    Exhibit(
        "groups-ignored",
        "a grouped convolution's gradient is computed without its groups, and one slice kept",
        "torch.nn.grad.conv2d_weight of PyTorch 1.7 (pytorch issue 51430)",
        "properties/grouped-convolutions-have-the-gradients-of-a-loop",
        edit(
            contract._conv_grads,
            ("(n * c_out, *rest), n * spec.groups)", "(n * c_out, spec.c_in, *rest[1:]), n)"),
            (
                "weight.reshape(n, *factors.weight.shape)",
                "weight.reshape(n, c_out, spec.c_in, *rest[1:])[:, :, : rest[0]]",
            ),
        ),
    ),
    Exhibit(
        "ghost-norm-of-the-bias",
        "the bias's norm is a sum of squares over positions, without their products with each other",
        "a wrong bias formula in Opacus's fast gradient clipping, until its pull request 751",
        "properties/ghost-norms-are-norms-of-gradients",
        edit(
            layer.direct,
            ("split_views(by_view, views).sum(0)", "split_views(by_view, views).square().sum(0).sqrt()"),
        ),
    ),
    Exhibit(
        "ghost-norm-with-the-bias-in-it",
        "the weight's ghost norm takes the input with a 1 appended, and the bias counts twice",
        "the trick of the appended 1, beside a bias of its own",
        "properties/norms-are-norms-of-gradients",
        edit(
            ghost.linear_squared_norms,
            ("a[0].square().sum(1) * g", "(a[0].square().sum(1) + 1) * g"),
        ),
    ),
    Exhibit(
        "ghost-norm-without-pairs-of-views",
        "a sample's ghost norm leaves out the products between its views",
        "norms added over augmentations, where gradients are",
        "properties/ghost-norms-are-norms-of-gradients",
        edit(
            ghost.conv_squared_norms,
            (
                "products.reshape(n, -1).sum(1)",
                "products.reshape(n, spec.groups, views, views, -1).sum((1, 4)).diagonal(0, 1, 2).sum(1)",
            ),
        ),
    ),
    Exhibit(
        "clip-factor-with-epsilon",
        "the clip factor is C / (norm + 1e-6): no longer 1 at the bound, and not idempotent",
        "Opacus's DPOptimizer, after torch.nn.utils.clip_grad_norm_",
        "properties/clipped-sums-clip-each-gradient",
        edit(
            quantity.clip_factors,
            (
                "torch.where(norms <= max_norm, 1.0, _rounded_down(max_norm, norms)).to(norms.dtype)",
                "(max_norm / (norms + 1e-6)).clamp(max=1.0)",
            ),
        ),
    ),
    Exhibit(
        "one-factor-for-the-batch",
        "the sum is clipped, not the samples: one factor for all",
        "clip_grad_norm_ taken for per-sample clipping",
        "properties/clipped-sums-clip-each-gradient",
        edit(
            quantity._factors_by_leaf,
            ("rule(norms, max_norm)", "rule(norms.mean().expand_as(norms), max_norm)"),
        ),
    ),
    Exhibit(
        "norm-of-norms-added",
        "a gradient's norm is the sum of its leaves' norms",
        "reimplementations of the global norm",
        "properties/norms-are-norms-of-gradients",
        edit(quantity.total_norm, (".sum(0).sqrt()", ".sqrt().sum(0)")),
    ),
    Exhibit(
        "full-bound-for-each-layer",
        "per-layer clipping gives every layer the whole bound, sqrt(L) times the sensitivity",
        "reimplementations of per-layer clipping",
        "properties/clipping-by-layer-keeps-the-bound",
        edit(quantity._factors_by_leaf, ("max_norm / len(layers) ** 0.5", "max_norm")),
    ),
    Exhibit(
        "not-a-number-times-zero",
        "a broken sample has weight zero, and NaN times zero is NaN",
        "clipped sums that mask factors, not gradients",
        "properties/a-sample-that-is-not-finite-harms-no-other",
        edit(quantity._clip_and_sum, ("factors = masked(factors, kept)", "pass")),
    ),
    Exhibit(
        "clipped-sums-alias",
        "the first micro-batch's clipped sum is in the second's too, and counts twice",
        "accumulators that alias p.grad",
        "properties/microbatches-change-no-clipped-sum-and-no-moment",
        edit(
            quantity._join_sums,
            ("total[path].value + sums[path].value", "2 * total[path].value + sums[path].value"),
        ),
    ),
    Exhibit(
        "views-summed",
        "the gradients of a sample's augmented views are added up, not averaged",
        "reimplementations of augmentation multiplicity",
        "properties/gradients-of-views-are-averaged",
        edit(capture._forward, (".mean(0), logits", ".sum(0), logits")),
    ),
    Exhibit(
        "fisher-of-the-mean-gradient",
        "the second moment is the square of the summed gradient",
        "code for elastic weight consolidation that squares a batch's gradient",
        "properties/moments-are-means-over-gradients",
        edit(noise_scale._sums_of_leaf, ("grads.square().sum(0)", "grads.sum(0).square() / grads.shape[0]")),
    ),
    Exhibit(
        "silent-instance-norm",
        "per sample, BatchNorm normalises with the statistics of the one image",
        "vmap over modules with track_running_stats=False, as torch.func's page on batch norm allows",
        "properties/every-method-gives-the-same-per-sample-gradients",
        INSTANCE_NORM,
    ),
    Exhibit(
        "batch-statistics-not-refused",
        "BatchNorm in training mode is let through, and becomes instance norm",
        "the same, unasked",
        "properties/batch-statistics-have-no-per-sample-gradient",
        both(
            edit(options.refuse_batch_statistics, ("    raise ValueError(", "    str(")),
            INSTANCE_NORM,
        ),
    ),
    Exhibit(
        "wrapped-apply",
        "a wrapped network gets the gradients of what it wraps: the second call of a weight is not counted",
        "this library's first version, which read the layers off the config",
        "properties/wrapped-networks-have-the-gradients-of-what-they-compute",
        edit(collect._as_one, ("    alike = parts[0]", "    alike, parts = parts[0], parts[:1]")),
    ),
    Exhibit(
        "tied-weights-norms-added",
        "the squared norms of a weight's uses are added, without the products between them",
        "ghost clipping of tied embeddings, layer by layer",
        "properties/norms-of-a-tied-weight-count-its-uses-together",
        edit(
            contract.squared_norms,
            (
                "    if isinstance(factors, EmbeddingFactors):",
                "    if isinstance(factors, Several):\n"
                "        return _sum([squared_norms(part, 'materialize') for part in factors.parts])\n"
                "    if isinstance(factors, EmbeddingFactors):",
            ),
        ),
    ),
    Exhibit(
        "derived-weight-not-pulled-back",
        "the gradient of a standardised weight is given out as the weight's own",
        "hooks that see what a parametrisation made, not what it was made of",
        "properties/derived-weights-have-the-gradients-of-a-loop",
        edit(
            contract._pull_back,
            (
                "    if derived.jacobian is not None:",
                "    if inner.shape[1:] == derived.weight.shape:\n        return inner\n"
                "    if derived.jacobian is not None:",
            ),
        ),
    ),
    Exhibit(
        "hidden-batch-statistics",
        "a BatchNorm that keeps no running statistics is let through",
        "modules with track_running_stats=False, whose state says nothing",
        "properties/hidden-batch-statistics-are-refused",
        edit(intercept.refuse_coupling, ("    if training and", "    if False and")),
    ),
]
