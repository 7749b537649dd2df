"""One seed, one tensor."""

from __future__ import annotations

import pytest
import torch

from resnet_func.testing import generator, randn


def test_a_seed_gives_the_same_numbers_in_every_dtype() -> None:
    exact = randn(3, 4, seed=5, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(randn(3, 4, seed=5, dtype=dtype), exact.to(dtype))
    assert not torch.equal(randn(3, 4, seed=6, dtype=torch.float64), exact)


@pytest.mark.parametrize("make", [lambda: generator(3), lambda: randn(3, seed=1)])
def test_the_global_generator_is_left_alone(make) -> None:
    before = torch.get_rng_state()
    make()
    assert torch.equal(torch.get_rng_state(), before)
