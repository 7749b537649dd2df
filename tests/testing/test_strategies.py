"""The strategies: what they draw is valid, random in every leaf, reproducible, and shrinks."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import optree
import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st

import resnet_func as rf
from resnet_func import testing, tree
from resnet_func.testing import Batch, Network, random_batch, random_network, strategies

DTYPES = [torch.float32, torch.float64]


@given(testing.models(), testing.batches())
def test_every_network_takes_every_batch(network: Network, batch: Batch) -> None:
    model, params, state = network
    x, y = batch
    for train in (False, True):
        logits, _ = model.apply(params, state, x, train=train)
        assert logits.shape == (len(x), 3)
        assert logits.isfinite().all()
    assert rf.losses.cross_entropy(logits, y).isfinite().all()


@given(testing.models(dtype=torch.float64))
def test_no_leaf_of_a_network_is_as_it_starts(network: Network) -> None:
    model, params, state = network
    fresh = model.init(torch.Generator().manual_seed(0), dtype=torch.float64)
    for drawn, start in zip((params, state), fresh, strict=True):
        assert list(tree.flatten(drawn)) == list(tree.flatten(start))
        for leaf, other in zip(tree.leaves(drawn), tree.leaves(start), strict=True):
            assert (leaf != other).all()
            assert leaf.dtype == other.dtype


@given(testing.configs(blocks=["preact"], norms=["none", "group"], num_classes=7))
def test_configs_keep_to_what_is_asked(config: rf.ResNetConfig) -> None:
    assert config.block == "preact"
    assert config.norm in ("none", "group")
    assert config.num_classes == 7


def test_configs_reach_every_choice() -> None:
    seen: dict[str, set[Any]] = {}

    @settings(max_examples=200, database=None, derandomize=True)
    @given(testing.configs())
    def collect(config: rf.ResNetConfig) -> None:
        for field in config.__dataclass_fields__:
            seen.setdefault(field, set()).add(getattr(config, field))

    collect()
    fixed = {"num_classes", "in_channels"}
    assert {field for field, values in seen.items() if len(values) == 1} == fixed
    assert seen["block"] == {"basic", "bottleneck", "preact"}
    assert seen["norm"] == {"batch", "group", "none"}


@settings(max_examples=10)
@given(testing.models(), testing.batches(samples=st.just(5), sizes=st.integers(3, 6), num_classes=2))
def test_what_is_printed_makes_it_again(network: Network, batch: Batch) -> None:
    names = {
        "random_network": random_network,
        "random_batch": random_batch,
        "ResNetConfig": rf.ResNetConfig,
        "torch": torch,
    }
    for drawn in (network, batch):
        again = eval(repr(drawn), names)
        testing.assert_trees_equal(tuple(again)[-2:], tuple(drawn)[-2:])
    x, y = batch
    assert len(x) == len(y) == 5
    assert all(3 <= size <= 6 for size in x.shape[2:])
    assert y.max() < 2


def test_a_seed_gives_the_same_network_in_every_dtype() -> None:
    config = rf.ResNetConfig(block="basic", depths=(1,), widths=(4,))
    single, double = (random_network(config, 3, dtype) for dtype in DTYPES)
    testing.assert_trees_equal(single.params, tree.map(torch.Tensor.float, double.params))


def test_a_falsifying_example_is_small() -> None:
    network = find(testing.models(testing.configs(norms=["none", "group"])), lambda _: True)
    assert network.model.config == rf.ResNetConfig(
        block="basic", depths=(1,), widths=(4,), stem="cifar", norm="none", norm_groups=1, num_classes=3
    )
    assert repr(find(testing.batches(), lambda _: True)).startswith("random_batch([2, 3, 9, 9], 0,")
    assert set(find(testing.dyadic_tensors((50,)), lambda _: True).tolist()) == {-1, 0, 1}


@given(st.data(), st.sampled_from(DTYPES), st.integers(1, 100), st.integers(-20, 20))
def test_dyadic_sums_are_exact(data: st.DataObject, dtype: torch.dtype, largest: int, exponent: int) -> None:
    a = data.draw(testing.dyadic_tensors((50,), largest=largest, exponents=st.just(exponent), dtype=dtype))
    whole = a * 2.0**-exponent
    assert a.dtype == dtype
    assert torch.equal(whole, whole.round())
    assert whole.abs().max() <= largest
    exact = sum(int(value) ** 2 for value in whole.tolist())
    for order in (a, a.flip(0), a.sort().values):
        assert (order * order).sum().item() == exact * 4.0**exponent


@pytest.mark.parametrize("largest", [0, 2**24 + 1])
def test_dyadic_tensors_refuse_a_bound_that_cannot_be(largest: int) -> None:
    with pytest.raises(ValueError, match=f"largest must be in 1 .. 2/eps, .* got {largest}"):
        find(testing.dyadic_tensors((1,), largest=largest, dtype=torch.float32), lambda _: True)


EXAMPLE = {
    "a": (torch.zeros(3, 2), [torch.zeros(4, dtype=torch.bfloat16)]),
    "b": {"n": torch.zeros((), dtype=torch.int64), "on": torch.zeros(9, dtype=torch.bool), "none": None},
}


@given(testing.pytrees_like(EXAMPLE), testing.pytrees_like(EXAMPLE, largest=2))
def test_pytrees_have_the_structure_of_the_example(normal: Any, dyadic: Any) -> None:
    for drawn in (normal, dyadic):
        assert optree.tree_structure(drawn) == optree.tree_structure(EXAMPLE)
        kinds = [(leaf.shape, leaf.dtype) for leaf in tree.leaves(drawn)]
        assert kinds == [(leaf.shape, leaf.dtype) for leaf in tree.leaves(EXAMPLE)]
    assert set(dyadic["a"][0].flatten().tolist()) <= {-2, -1, 0, 1, 2}
    assert (normal["a"][0] != normal["a"][0].round()).all()


def test_pytrees_can_look_like_shapes_alone() -> None:
    model = rf.build(rf.ResNetConfig(block="basic", depths=(1,), widths=(1,), num_classes=2))
    params, _ = model.init(torch.Generator(), device="meta")
    drawn = find(testing.pytrees_like(params), lambda _: True)
    assert [leaf.shape for leaf in tree.leaves(drawn)] == [leaf.shape for leaf in tree.leaves(params)]
    assert all(leaf.device.type == "cpu" for leaf in tree.leaves(drawn))


# --------------------------------------------------------------------------- Hypothesis is optional


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


WITHOUT_HYPOTHESIS = """
import sys
sys.modules["hypothesis"] = None
from resnet_func.testing import check_laws, randn
for name in ("models", "modules"):
    try:
        exec(f"from resnet_func.testing import {name}")
    except ImportError as error:
        print(error)
"""


def test_without_hypothesis_the_comparers_work_and_the_strategies_say_how_to_get_it() -> None:
    done = python(WITHOUT_HYPOTHESIS)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 2
    for line in said:
        assert line.startswith("the strategies of resnet_func.testing need Hypothesis")
        assert "pip install hypothesis" in line
        assert "resnet-func[testing]" in line


def test_every_name_that_is_promised_is_there() -> None:
    for name in testing.__all__:
        assert getattr(testing, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nonesuch'"):
        testing.nonesuch  # noqa: B018


# --------------------------------------------------------------------------- tensors


def test_tensors_reach_every_dtype_layout_and_special_value() -> None:
    dtypes, strides, values = set(), set(), set()

    @settings(max_examples=600, database=None, derandomize=True)
    @given(testing.tensors())
    def collect(leaf: torch.Tensor) -> None:
        dtypes.add(leaf.dtype)
        strides.add("contiguous" if leaf.is_contiguous() else "other")
        strides.update(["offset"] if leaf.storage_offset() else [])
        strides.update(["expanded"] if leaf.numel() > 1 and leaf.stride(0) == 0 else [])
        if leaf.is_floating_point() and leaf.numel():
            values.update(map(str, leaf.flatten().tolist()))

    collect()
    assert dtypes == {*strategies.FLOATING, *strategies.WHOLE}
    assert strides == {"contiguous", "other", "offset", "expanded"}
    assert {"nan", "inf", "-inf", "0.0", "-0.0"} <= values


@given(st.data(), st.sampled_from(strategies.LAYOUTS), st.sampled_from([*strategies.FLOATING]))
def test_tensors_keep_to_what_is_asked(data: st.DataObject, layout: Any, dtype: torch.dtype) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=5)))
    leaf = data.draw(testing.tensors(shape, dtypes=[dtype], layouts=[layout], special=False))
    assert (tuple(leaf.shape), leaf.dtype) == (shape, dtype)
    assert leaf.isfinite().all()
    if layout == "channels_last" and len(shape) == 4:
        assert leaf.is_contiguous(memory_format=torch.channels_last)


@given(
    testing.tensors((2, 3, 2, 2), layouts=["contiguous"]),
    st.sampled_from(["transposed", "strided", "offset"]),
)
def test_another_layout_holds_the_same_values(leaf: torch.Tensor, layout: Any) -> None:
    testing.assert_trees_equal(strategies._laid_out(leaf, layout), leaf)
