"""However a sum is cut, ordered or batched, it is the same to the bit: on data whose sums are exact.

The sign of a zero alone depends on the order of an exact sum, and is left out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import resnet_func as rf
from parity.properties.cases import SEEDS, Exact, exact, exact_cases, linear_loss, same
from parity.properties.table import needs, prop
from resnet_func import testing, tree
from resnet_func.testing import generator
from resnet_func.types import Params

WHY = "small integers and powers of two: every sum is exact in float64, in any order"


@prop(tolerance="bitwise", why=WHY, case=exact_cases(), seed=SEEDS)
def permuting_the_batch_permutes_the_logits(case: Exact, seed: int) -> None:
    """Logits of a permuted batch are the permuted logits."""
    order = torch.arange(len(case.x)).roll(1 + seed % (len(case.x) - 1))
    logits = case.logits(case.params, case.x)
    same(case.logits(case.params, case.x[order]), logits[order])


@prop(tolerance="bitwise", why=WHY, case=exact_cases())
def a_batch_is_its_samples(case: Exact) -> None:
    """The logits of a batch of N are those of N batches of one."""
    logits = case.logits(case.params, case.x)
    same(torch.cat([case.logits(case.params, x) for x in case.x.split(1)]), logits)


@prop(tolerance="bitwise", why=WHY, case=exact_cases(samples=st.integers(3, 5)), cut=st.integers(1, 2))
def chunked_gradients_sum_to_the_whole(case: Exact, cut: int) -> None:
    """The gradients of the parts of a batch sum to the gradient of the batch."""
    whole = case.grads(case.x, case.y)
    parts = [case.grads(x, y) for x, y in zip(case.x.split(cut), case.y.split(cut), strict=True)]
    total = parts[0]
    for part in parts[1:]:
        total = tree.map(torch.add, total, part)
    same(total, whole)


@prop(tolerance="bitwise", why=WHY, case=exact_cases(), copies=st.integers(2, 3))
def a_repeated_batch_multiplies_the_gradient(case: Exact, copies: int) -> None:
    """k copies of a batch have k times its gradient."""
    repeated = case.grads(case.x.repeat(copies, 1, 1, 1), case.y.repeat(copies, 1))
    same(repeated, tree.map(lambda g: copies * g, case.grads(case.x, case.y)))


@prop(tolerance="bitwise", why=WHY, case=exact_cases(), seed=SEEDS)
def gradients_are_linear_in_the_cotangent(case: Exact, seed: int) -> None:
    """The gradient for a sum of cotangents is the sum of the gradients."""
    other = torch.randint(1, 3, case.y.shape, generator=generator(seed)).double()
    apart = tree.map(torch.add, case.grads(case.x, case.y), case.grads(case.x, other))
    same(case.grads(case.x, case.y + other), apart)


@prop(tolerance="bitwise", why=WHY, case=exact_cases(), seed=SEEDS)
def vmap_over_networks_is_a_loop(case: Exact, seed: int) -> None:
    """Stacked parameters under `torch.func.vmap` give the logits that each network gives alone."""
    others = [exact(case.config, tuple(case.x.shape), (seed + i) % 2**32) for i in range(2)]
    trees = [other.params for other in others]
    stacked = tree.map(lambda *leaves: torch.stack(leaves), *trees)
    together = torch.func.vmap(case.logits, in_dims=(0, None))(stacked, case.x)
    needs(not torch.equal(together[0], together[1]), "networks that differ")
    same(together, torch.stack([case.logits(params, case.x) for params in trees]))


def per_sample(case: Exact, **options: Any) -> Params:
    transform = rf.per_sample.grads(case.model, linear_loss, train=False, check=False, **options)
    return transform(case.params, case.state, case.x, case.y)


@prop(tolerance="bitwise", why=WHY, case=exact_cases())
def exact_per_sample_gradients_sum_to_the_gradient(case: Exact) -> None:
    """`per_sample.grads`, summed over samples, is the batch gradient."""
    whole = case.grads(case.x, case.y)
    same(tree.map(lambda g: g.sum(0), per_sample(case)), whole)


@prop(tolerance="bitwise", why=WHY, case=exact_cases(), method=st.sampled_from(["vmap", "loop"]))
def every_method_gives_the_same_per_sample_gradients(case: Exact, method: str) -> None:
    """Contraction gives the per-sample gradients that `vmap(grad)` and a loop over samples give."""
    same(per_sample(case, method="contract"), per_sample(case, method=method))


@prop(tolerance="bitwise", why=WHY, case=exact_cases(), seed=SEEDS)
def permuting_the_batch_permutes_per_sample_gradients(case: Exact, seed: int) -> None:
    """Per-sample gradients of a permuted batch are the permuted per-sample gradients."""
    order = torch.arange(len(case.x)).roll(1 + seed % (len(case.x) - 1))
    permuted = case._replace(x=case.x[order], y=case.y[order])
    same(per_sample(permuted), tree.map(lambda g: g[order], per_sample(case)))


@prop(tolerance="bitwise", why=WHY, case=exact_cases(samples=st.integers(3, 5)), size=st.integers(1, 2))
def microbatches_change_no_per_sample_gradient(case: Exact, size: int) -> None:
    """`microbatch=` bounds memory only."""
    same(per_sample(case, microbatch=size), per_sample(case))


@prop(tolerance="bitwise", why=WHY, case=exact_cases())
def an_unbounded_clipped_sum_is_the_gradient(case: Exact) -> None:
    """`per_sample.clipped_sum(max_norm=inf)` is the batch gradient."""
    clipped = rf.per_sample.clipped_sum(
        case.model, linear_loss, max_norm=float("inf"), train=False, check=False
    )
    total, _ = clipped(case.params, case.state, case.x, case.y)
    same(total, case.grads(case.x, case.y))


@prop(
    tolerance="bitwise",
    why=WHY + "; so are means over four and a learning rate that is a power of two",
    case=exact_cases(samples=st.just(4), norms=["none"]),
    pieces=st.sampled_from([2, 4]),
)
def microbatches_change_no_training_step(case: Exact, pieces: int) -> None:
    """A training step in pieces is the step of the whole batch."""
    y = case.y.argmax(1)
    optimizer = rf.optim.sgd(2.0**-4)
    begin = rf.train.init_train_state(case.params, case.state, optimizer)
    whole, _ = rf.train.make_train_step(case.model, logit_of_the_target, optimizer)(begin, case.x, y)
    step = rf.train.make_train_step(case.model, logit_of_the_target, optimizer, microbatches=pieces)
    same(step(begin, case.x, y)[0], whole)


def logit_of_the_target(logits: Tensor, y: Tensor) -> Tensor:
    return linear_loss(logits, F.one_hot(y, logits.shape[1]).to(logits.dtype))


@prop(
    tolerance="bitwise",
    why="dyadic logits: subtracting the maximum is exact, and what is left is the same",
    logits=testing.dyadic_tensors((5, 4), largest=50, exponents=st.integers(-3, 0)),
    shift=st.integers(1, 64),
    seed=SEEDS,
)
def cross_entropy_does_not_see_a_shift(logits: Tensor, shift: int, seed: int) -> None:
    """Adding a constant to a sample's logits changes neither its loss nor the loss's gradient."""
    y = torch.randint(4, (5,), generator=generator(seed))
    shifted = logits + shift * torch.arange(1, 6, dtype=logits.dtype)[:, None]
    gradient = torch.func.grad(lambda z: rf.losses.cross_entropy(z, y).sum())
    same(rf.losses.cross_entropy(shifted, y), rf.losses.cross_entropy(logits, y))
    same(gradient(shifted), gradient(logits))
