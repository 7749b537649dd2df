"""Noise: normal, and the same whenever it is drawn again; noise that does not fit is refused."""

from __future__ import annotations

import pytest
import torch

from resnet_func import privacy, tree
from resnet_func.privacy.noise import add_noise, check_noise


def test_noise_is_standard_normal_and_depends_on_seed_step_and_leaf_alone() -> None:
    like = {"a": torch.zeros(200, 200), "b": {"c": torch.zeros(200, 200)}}
    random = torch.get_rng_state()
    noise = privacy.gaussian_noise(like, seed=5, step=3)
    again = privacy.gaussian_noise(like, seed=5, step=3)
    assert torch.equal(random, torch.get_rng_state())
    assert all(map(torch.equal, tree.leaves(noise), tree.leaves(again)))
    others = [privacy.gaussian_noise(like, seed=s, step=t) for s, t in ((5, 4), (6, 3))]
    streams = [leaf.flatten() for one in (noise, *others) for leaf in tree.leaves(one)]
    n = streams[0].numel()
    for i, stream in enumerate(streams):
        assert abs(stream.mean().item()) < 6 / n**0.5
        assert abs(stream.var().item() - 1) < 6 * (2 / n) ** 0.5
        for other in streams[:i]:  # independent: a product of two has variance 1
            assert abs((stream * other).mean().item()) < 6 / n**0.5


def test_the_count_has_a_number_of_its_own() -> None:
    like = {"a": torch.zeros(3), "b": torch.zeros(2)}
    plain, more = (privacy.gaussian_noise(like, seed=5, step=3, adaptive=on) for on in (False, True))
    count = more.pop("count of unclipped samples")
    assert count.shape == ()
    assert all(map(torch.equal, tree.leaves(plain), tree.leaves(more)))
    assert not any(float(count) in leaf.tolist() for leaf in tree.leaves(more))


def test_noise_of_narrow_parameters_is_added_in_float32() -> None:
    params = {"w": torch.ones(4, dtype=torch.bfloat16)}
    noise = privacy.gaussian_noise(params, seed=0, step=0)
    assert noise["w"].dtype == torch.float32
    assert torch.equal(add_noise(params, noise, 2.0)["w"], 1 + 2 * noise["w"])
    assert add_noise(params, noise, 0.0) is params


def test_noise_that_would_broadcast_is_refused() -> None:
    params = {"w": torch.zeros(4)}
    for noise in ({"w": torch.zeros(1)}, {}, {"w": torch.zeros(4), "v": torch.zeros(1)}):
        with pytest.raises(ValueError, match="noise must be like the parameters"):
            check_noise(noise, params)
    with pytest.raises(ValueError, match="step must be 0 to"):
        privacy.gaussian_noise(params, seed=0, step=-1)
