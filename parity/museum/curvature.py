"""Bugs of Hessian products and of K-FAC."""

from __future__ import annotations

from parity.museum.exhibit import Exhibit, edit
from resnet_func.curvature import products
from resnet_func.curvature.kfac import _averages
from resnet_func.curvature.kronecker import Block

EXHIBITS = [
    Exhibit(
        "kfac-of-the-mean-loss",
        "the cotangents of a mean loss go into K-FAC's factor as they are, N squared times too small",
        "K-FAC ports with backward hooks, whose loss is a mean by default",
        "properties/traces-of-curvature-are-squared-gradients",
        edit(
            _averages,
            (
                "Factors(sums.left / count, sums.right / (count * repeats))",
                "Factors(sums.left / count**3, sums.right / (count * repeats))",
            ),
        ),
    ),
    Exhibit(
        "gauss-newton-without-the-loss",
        "the Gauss-Newton product leaves out the loss's Hessian in the logits: J'J, right for squared errors",
        "the formula of least squares, taken over to cross-entropy",
        "properties/gauss-newton-forms-are-of-the-logits",
        edit(
            products._gauss_newton_product,
            ("torch.func.jvp(of_logits, (logits,), (tangent,))[1]", "tangent"),
        ),
    ),
    Exhibit(
        "damping-after-the-inverse",
        "the damping is added to the inverse eigenvalues, not to the eigenvalues",
        "a bracket in the wrong place",
        "properties/inverse-products-undo-products",
        edit(Block.inverse_product, ("1 / (self.eigenvalues + damping)", "1 / self.eigenvalues + damping")),
    ),
]
