"""Curvature of a network's loss: products with its Hessian and Gauss-Newton matrix, K-FAC and EKFAC, and a
Laplace approximation of the last layer.

    estimate = rf.curvature.ekfac(model, loss_fn, fisher="empirical")(params, state, batches)
    estimate.inverse_product(gradients, damping=1e-3)    # a tree, or a batch of them

All of it is about the mean loss over the samples given, in evaluation mode, for any network of
`load_network`. A product is exact; K-FAC and EKFAC are block-diagonal approximations that have an inverse.
"""

from resnet_func.curvature.kfac import ekfac, kfac
from resnet_func.curvature.kronecker import KroneckerEstimate
from resnet_func.curvature.lanczos import Estimate, Spectrum
from resnet_func.curvature.laplace import Posterior, laplace, last_layer
from resnet_func.curvature.products import flat_function, ggn_vp, hvp
from resnet_func.curvature.spectrum import linear_operator, spectrum, trace

__all__ = [
    "Estimate",
    "KroneckerEstimate",
    "Posterior",
    "Spectrum",
    "ekfac",
    "flat_function",
    "ggn_vp",
    "hvp",
    "kfac",
    "laplace",
    "last_layer",
    "linear_operator",
    "spectrum",
    "trace",
]
