"""Per-sample gradients, and what can be known of them, at about the price of an ordinary step.

    import resnet_func as rf
    ps = rf.per_sample
    ps.norms(model, rf.losses.cross_entropy)(params, state, x, y)    # [N]

For any network: the calls of its forward pass are intercepted (`intercept`), one backward pass gives the
cotangents of their outputs (`capture`), `layer_factors` knows the kinds of layers, and `contract` makes of a
layer's input and cotangent what is wanted, as `plan` says.
"""

from resnet_func.per_sample.dataset import over_dataset
from resnet_func.per_sample.engine import detect_nonfinite
from resnet_func.per_sample.inner_products import gram, layer_grams, ntk
from resnet_func.per_sample.plan import Plan, plan
from resnet_func.per_sample.quantities.noise_scale import Moments, NoiseScale
from resnet_func.per_sample.quantities.projections import sketch_quantity
from resnet_func.per_sample.quantities.quantity import Quantity
from resnet_func.per_sample.transforms import clipped_sum, dot, grads, layer_norms, moments, norms, sketch

__all__ = [
    "Moments",
    "NoiseScale",
    "Plan",
    "Quantity",
    "clipped_sum",
    "detect_nonfinite",
    "dot",
    "grads",
    "gram",
    "layer_grams",
    "layer_norms",
    "moments",
    "norms",
    "ntk",
    "over_dataset",
    "plan",
    "sketch",
    "sketch_quantity",
]
