"""The suite's own comparisons: what they accept does not depend on the scale, nor on where a bit differs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from parity.properties.cases import SEEDS, normal
from parity.properties.table import prop
from resnet_func.testing import assert_trees_equal, assert_trees_near, generator

RTOL = 1e-6


def accepts(comparison: Callable[..., None], *trees: dict[str, Tensor], **options: float) -> bool:
    return not refusal(partial(comparison, *trees, **options))


def refusal(call: Callable[[], Any]) -> str:
    """What a call raises, in words; nothing where it does not."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@prop(
    tolerance="exact",
    why="a power of two goes through every rounding of float64 unchanged",
    seed=SEEDS,
    exponent=st.sampled_from([-60, -20, 0, 20, 60]),
    factor=st.sampled_from([0.25, 4.0]),
)
def tolerances_are_relative(seed: int, exponent: int, factor: float) -> None:
    """At every scale, an error below `rtol` of the largest entry is accepted and one above is not."""
    want = normal(7, seed=seed)
    got = want.clone()
    got[seed % 7] += factor * RTOL * want.abs().max()
    scaled = tuple({"leaf": leaf * 2.0**exponent} for leaf in (got, want))
    accepted = accepts(assert_trees_near, *scaled, rtol=RTOL)
    said = "accepted" if accepted else "refused"
    assert accepted == (factor < 1), f"{factor} x rtol at scale 2^{exponent} is {said}"


@prop(
    tolerance="exact",
    why="a NaN is near nothing",
    seed=SEEDS,
    entry=st.integers(0, 11),
)
def no_nan_is_overlooked(seed: int, entry: int) -> None:
    """A NaN in any entry of any leaf is refused, whatever the tolerance."""
    want = {name: normal(4, seed=seed + index) for index, name in enumerate("abc")}
    got = {name: leaf.clone() for name, leaf in want.items()}
    got["abc"[entry // 4]][entry % 4] = torch.nan
    assert not accepts(assert_trees_near, got, want, rtol=1.0), "a NaN is accepted"


@prop(
    tolerance="exact",
    why="bits",
    seed=SEEDS,
    size=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def no_bit_is_overlooked(seed: int, size: int, dtype: torch.dtype) -> None:
    """`assert_trees_equal` notices one flipped bit in any entry, the sign of a zero included."""
    want = {"a": normal(3, seed=seed).to(dtype), "b": normal(size, seed=seed + 1).to(dtype)}
    source = generator(seed)
    at = int(torch.randint(size, (), generator=source))
    if seed % 4 == 0:
        want["b"][at] = 0.0
    flipped = want["b"].clone()
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[flipped.element_size()]
    bit = -1 if seed % 4 == 0 else int(torch.randint(8 * flipped.element_size() - 1, (), generator=source))
    flipped.view(width)[at] ^= torch.iinfo(width).min if bit < 0 else 1 << bit
    got = {**want, "b": flipped}
    assert not accepts(assert_trees_equal, got, want), f"a flipped bit in entry {at} of {size} is not seen"
