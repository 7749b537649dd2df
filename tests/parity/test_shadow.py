"""The certificates hold, and a step that is less exact, or another, has none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from parity import steps
from parity.cell import Cell, Result, run
from parity.sections import shadow
from parity.sections.shadow import AS_GOOD, EPS, OTHER_LAYOUT, Case, Leaves, Step
from resnet_func import tree
from resnet_func.models import zoo


@pytest.mark.parametrize("cell", shadow.cells(quick=True), ids=lambda cell: cell.path)
def test_cell(cell: Cell) -> None:
    result = run(cell)
    assert result.outcome == "passed", result.said


COMPILED = [cell for cell in shadow.cells(quick=False) if "compiled" in cell.name]


@pytest.mark.nightly
@pytest.mark.parametrize("cell", COMPILED, ids=lambda cell: cell.path)
@pytest.mark.filterwarnings("default")  # those of torch's compiler
def test_compiled_cell(cell: Cell) -> None:
    result = run(cell)
    assert result.outcome in ("passed", "skipped"), result.said


def test_the_full_run_has_every_network() -> None:
    names = {cell.name for cell in shadow.cells(quick=False)}
    for claim in ("channels_last-train", "channels_last-eval", "singles-eval", "singles-group_norm"):
        assert {f"{name}/{claim}" for name in zoo.ZOO} <= names
    assert len(COMPILED) == len(shadow.COMPILED)


# --------------------------------------------------------------------------- what has no certificate


def outcome(monkeypatch: pytest.MonkeyPatch, claim: str, variant: Callable[[Case], Step]) -> Result:
    monkeypatch.setitem(shadow.CLAIMS, claim, shadow.CLAIMS[claim]._replace(variant=variant))
    return run(Cell("fp64-shadow", "mutant", partial(shadow.check, "resnet20", claim, batches=2)))


def changed(leaf_of: Callable[[str, Tensor], Tensor]) -> Callable[[Case], Step]:
    """The module's step with other leaves."""

    def variant(case: Case) -> Step:
        step = shadow.module_nchw(case)

        def run(x: Tensor, cotangent: Tensor) -> Leaves:
            return {name: leaf_of(name, leaf) for name, leaf in step(x, cotangent).items()}

        return run

    return variant


def rounded(dtype: torch.dtype) -> Callable[[str, Tensor], Tensor]:
    return lambda name, leaf: leaf.to(dtype).to(leaf.dtype)


CLAIMS = ("channels_last-train", "channels_last-eval", "singles-eval", "singles-group_norm")


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_module_itself_is_as_good_as_itself(claim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = outcome(monkeypatch, claim, shadow.module_nchw)
    assert (result.outcome, result.said) == ("passed", "errors' ratio: median 1.00, worst 1.00")


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_step_rounded_to_half_precision(
    claim: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = outcome(monkeypatch, claim, changed(rounded(dtype)))
    assert result.outcome == "failed"
    assert "; the median may be " in result.said


def test_one_leaf_rounded_to_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    def one(name: str, leaf: Tensor) -> Tensor:
        return rounded(torch.bfloat16)(name, leaf) if name == "gradient layer2.0.bn1.bias" else leaf

    result = outcome(monkeypatch, "channels_last-train", changed(one))
    assert result.outcome == "failed"
    assert result.said.startswith("errors' ratio: median 1.00, worst ")
    assert f" in gradient layer2.0.bn1.bias, which may be {OTHER_LAYOUT.worst}" in result.said


@pytest.mark.parametrize("factor", [1 + 1e-4, float("nan")])
def test_one_leaf_off(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    result = outcome(
        monkeypatch,
        "singles-eval",
        changed(lambda name, leaf: leaf * factor if name == "logits" else leaf),
    )
    assert result.outcome == "failed"
    assert " in logits, which may be " in result.said


def test_bfloat16_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def variant(case: Case) -> Step:
        params = tree.map(lambda leaf: leaf.bfloat16().float(), case.params)
        return shadow.channels_last(case._replace(params=params))

    assert outcome(monkeypatch, "channels_last-train", variant).outcome == "failed"


def test_singles_that_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow, "sum_of", lambda leaves: torch.stack(list(leaves)).mean(0))
    assert outcome(monkeypatch, "singles-eval", shadow.singles).outcome == "failed"


def test_singles_under_batch_statistics_are_another_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are instance norm, which nothing else would say."""
    claim = shadow.CLAIMS["singles-eval"]._replace(train=True)
    monkeypatch.setitem(shadow.CLAIMS, "singles-eval", claim)
    monkeypatch.setattr(shadow, "float64", without_buffers(shadow.float64))
    assert outcome(monkeypatch, "singles-eval", shadow.singles).outcome == "failed"


def without_buffers(make: Callable[[Case], Step]) -> Callable[[Case], Step]:
    def variant(case: Case) -> Step:
        step = make(case)
        return lambda x, c: {k: leaf for k, leaf in step(x, c).items() if not k.startswith("buffer")}

    return variant


# --------------------------------------------------------------------------- the parts


def test_a_shadow_in_float32_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow, "float64", shadow.module_nchw)
    result = outcome(monkeypatch, "channels_last-eval", shadow.channels_last)
    assert result.said == "a shadow of torch.float32 proves nothing"


def test_the_error_is_relative_and_at_least_one_rounding() -> None:
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert shadow.error(torch.tensor([3.0, 4.0]), truth) == EPS
    assert shadow.error(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert shadow.error(torch.tensor([3.0, float("nan")]), truth) == float("inf")
    with pytest.raises(AssertionError, match="zero or not finite"):
        shadow.error(torch.zeros(2), torch.zeros(2, dtype=torch.float64))


def test_a_reference_that_is_not_finite_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = changed(lambda name, leaf: leaf * float("nan"))
    claim = shadow.CLAIMS["channels_last-eval"]._replace(reference=broken)
    monkeypatch.setitem(shadow.CLAIMS, "channels_last-eval", claim)
    assert (
        outcome(monkeypatch, "channels_last-eval", shadow.channels_last).said == "the reference is not finite"
    )


def test_the_limits() -> None:
    assert "median 1.00, worst 1.50" in shadow.certified({"a": 1.0, "b": 1.0, "c": 1.5}, AS_GOOD)
    with pytest.raises(AssertionError, match="the median may be 1.05"):
        shadow.certified({"a": 1.1, "b": 1.1, "c": 0.1}, AS_GOOD)
    with pytest.raises(AssertionError, match="worst 2.50 in c, which may be 2.0"):
        shadow.certified({"a": 1.0, "b": 1.0, "c": 2.5}, AS_GOOD)


@pytest.mark.parametrize(
    ("name", "norm", "ends"),
    [
        ("resnet18", "batch", "bn2"),
        ("resnet50", "group", "bn3"),
        ("wrn_16_4", "batch", "conv2"),
    ],
)
def test_the_branches_that_are_made_small(name: str, norm: str, ends: str) -> None:
    model = zoo.by_name(name, norm=norm)
    ones = tree.map(torch.ones_like, model.init(torch.Generator(), device="meta")[0])
    ones = tree.map(lambda leaf: torch.ones(leaf.shape[:1]), ones)
    scaled = tree.flatten(steps.with_small_branches(ones))
    small = {path for path, leaf in scaled.items() if leaf[0] != 1}
    assert small == {path for path in scaled if path.startswith("layer") and path.endswith(f"{ends}.weight")}
