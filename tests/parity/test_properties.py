"""Every property of the table on a few generated examples; and that what is false or empty fails."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from parity.cell import run
from parity.properties import PROPERTIES, Property, cells
from parity.properties.cases import bits, exact, same
from parity.properties.table import needs
from resnet_func import ResNetConfig, tree

ENTRIES = pytest.mark.parametrize("entry", PROPERTIES.values(), ids=PROPERTIES.keys())
CI = settings.get_profile("ci")


@ENTRIES
def test_property(entry: Property) -> None:
    assert entry.check(CI).endswith("examples, 0 vacuous")


@pytest.mark.nightly
@ENTRIES
def test_property_on_10000_examples(entry: Property) -> None:
    entry.check(settings.get_profile("nightly"))


def test_the_table_says_what_and_why() -> None:
    assert len(PROPERTIES) >= 30
    for name, entry in PROPERTIES.items():
        assert entry.name == name
        assert all((entry.statement, entry.tolerance, entry.why, entry.strategies)), name


@pytest.mark.parametrize("quick", [True, False])
def test_there_is_a_cell_for_each(quick: bool) -> None:
    assert [cell.path for cell in cells(quick)] == [f"properties/{name}" for name in PROPERTIES]


def made_up(test) -> Property:
    return Property("made-up", "It is so.", "bitwise", "it is", test, {"n": st.integers(0, 1000)})


def test_a_cell_gives_its_figure() -> None:
    result = run(next(cell for cell in cells(True) if cell.name == "cross-entropy-does-not-see-a-shift"))
    assert (result.outcome, result.said) == ("passed", f"bitwise, {CI.max_examples} examples, 0 vacuous")


def test_a_false_property_gives_its_smallest_example() -> None:
    def small(n: int) -> None:
        assert n < 10, f"{n} is not small"

    with pytest.raises(AssertionError, match=r"^10 is not small.*small\( n=10, \)$"):
        made_up(small).check(settings(CI, max_examples=100))


def test_an_error_in_a_property_is_a_failure() -> None:
    def broken(n: int) -> None:
        raise TypeError("no such thing")

    with pytest.raises(AssertionError, match=r"^TypeError: no such thing; .*n=0"):
        made_up(broken).check(CI)


@pytest.mark.parametrize(("least", "passes"), [(0, True), (1, True), (500, False), (1001, False)])
def test_vacuous_examples_are_counted(least: int, passes: bool) -> None:
    def picky(n: int) -> None:
        needs(n >= least, "a large number")

    profile = settings(CI, max_examples=300)
    if passes:
        assert made_up(picky).check(profile) == f"bitwise, 300 examples, {least} vacuous"
    else:
        with pytest.raises(AssertionError, match=r"says too little: bitwise, 300 examples, \d+ vacuous"):
            made_up(picky).check(profile)


def test_the_bound_on_bits_bounds() -> None:
    """Where it says that float32's 24 bits are enough, float32 gives the float64 numbers."""
    config = ResNetConfig(block="basic", depths=(1,), widths=(4,), stem="cifar", norm="none", num_classes=3)
    found = [case for case in (exact(config, (2, 3, 2, 2), seed) for seed in range(50)) if bits(case) <= 24]
    assert len(found) >= 10
    for case in found:
        single = case._replace(params=tree.map(torch.Tensor.float, case.params))
        grads = single.grads(case.x.float(), case.y.float())
        same(tree.map(torch.Tensor.double, grads), case.grads(case.x, case.y))


def test_data_that_are_not_exact_are_refused() -> None:
    config = ResNetConfig(block="bottleneck", depths=(8,), widths=(8,), norm="none", num_classes=3)
    with pytest.raises(AssertionError, match="sums of .* bits are not exact"):
        exact(config, (2, 3, 8, 8), 0)
