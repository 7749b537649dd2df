"""Per-sample gradients, and what can be known of them, at about the price of an ordinary step.

    import resnet_func as rf
    ps = rf.per_sample
    ps.norms(model, rf.losses.cross_entropy)(params, state, x, y)    # [N]

Taps go in, captures come out (`capture`), and are contracted layer by layer (`contract`, as `plan` says).
"""

from resnet_func.per_sample.dataset import reduce
from resnet_func.per_sample.engine import detect_nonfinite
from resnet_func.per_sample.inner_products import gram, layer_grams, ntk
from resnet_func.per_sample.noise_scale import Moments, NoiseScale
from resnet_func.per_sample.plan import Plan, plan
from resnet_func.per_sample.projections import sketch_quantity
from resnet_func.per_sample.quantity import Quantity
from resnet_func.per_sample.transforms import clipped_sum, grads, layer_norms, moments, norms, sketch

__all__ = [
    "Moments",
    "NoiseScale",
    "Plan",
    "Quantity",
    "clipped_sum",
    "detect_nonfinite",
    "grads",
    "gram",
    "layer_grams",
    "layer_norms",
    "moments",
    "norms",
    "ntk",
    "plan",
    "reduce",
    "sketch",
    "sketch_quantity",
]
