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
from parity.sections.shadow import Case, Errors, Leaves, Step
from resnet_func import tree
from resnet_func.models import zoo
from resnet_func.testing import generator


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


def changed(
    leaf_of: Callable[[str, Tensor], Tensor], module: Callable[[Case], Step] = shadow.module_nchw
) -> Callable[[Case], Step]:
    """The module's step with other leaves."""

    def variant(case: Case) -> Step:
        step = module(case)

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
    assert result.outcome == "passed", result.said
    assert result.said.startswith("errors' ratio to the module's: median ")
    assert "; to the plain module's: 1.00, the module's own " in result.said


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

    result = outcome(monkeypatch, "channels_last-train", changed(one, shadow.module_channels_last))
    assert result.outcome == "failed"
    assert result.said.startswith("errors' ratio to the module's: median 1.00, worst ")
    assert " in gradient layer2.0.bn1.bias, which may be " in result.said


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
    """They are instance norm, in the module too: only float64 says so."""
    claim = shadow.CLAIMS["singles-eval"]._replace(train=True)
    monkeypatch.setitem(shadow.CLAIMS, "singles-eval", claim)
    monkeypatch.setattr(shadow, "float64", without_buffers(shadow.float64))
    result = outcome(monkeypatch, "singles-eval", shadow.singles)
    assert result.outcome == "failed"
    assert result.said.startswith("another function: logits is off by ")


def test_a_wrong_sum_in_the_module_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Averaged on both sides, the errors are equally large."""
    monkeypatch.setattr(shadow, "sum_of", lambda leaves: torch.stack(list(leaves)).mean(0))
    claim = shadow.CLAIMS["singles-eval"]._replace(module=shadow.singles)
    monkeypatch.setitem(shadow.CLAIMS, "singles-eval", claim)
    result = outcome(monkeypatch, "singles-eval", shadow.singles)
    assert result.said.startswith("another function: gradient ")


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
    for dtype in (torch.float32, torch.float64):
        assert shadow.error(truth.to(dtype), truth) == torch.finfo(dtype).eps
    assert shadow.error(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert shadow.error(torch.tensor([3.0, float("nan")]), truth) == float("inf")
    with pytest.raises(AssertionError, match="zero or not finite"):
        shadow.error(torch.zeros(2), torch.zeros(2, dtype=torch.float64))


def test_a_module_that_is_not_finite_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = changed(lambda name, leaf: leaf * float("nan"))
    claim = shadow.CLAIMS["channels_last-eval"]._replace(module=broken)
    monkeypatch.setitem(shadow.CLAIMS, "channels_last-eval", claim)
    result = outcome(monkeypatch, "channels_last-eval", shadow.channels_last)
    assert result.said == "the module is not finite"


def spread(sigma: float, batches: int, seed: int) -> dict[str, list[float]]:
    """Errors of sixty leaves whose logarithms are normal with this deviation."""
    logs = sigma * torch.randn(60, batches, generator=generator(seed), dtype=torch.float64)
    return {str(index): row for index, row in enumerate((1e-6 * logs.exp()).tolist())}


def test_equally_good_sides_pass_whatever_their_spread() -> None:
    for seed in range(200):
        for sigma, batches in ((0.01, 4), (0.1, 8), (0.5, 4), (1.0, 8)):
            ours, module = (spread(sigma, batches, 2 * seed + side) for side in (0, 1))
            shadow.certified({name: Errors(ours[name], module[name], module[name]) for name in ours})


@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.5])
def test_what_exceeds_the_spread_fails(sigma: float) -> None:
    module = spread(sigma, 4, 0)
    limits = shadow.limits_of(module)
    shifted = {
        name: Errors([1.01 * limits.median * one for one in each], each, each)
        for name, each in module.items()
    }
    with pytest.raises(AssertionError, match="the median may be "):
        shadow.certified(shifted)
    one_off = {name: Errors(each, each, each) for name, each in module.items()}
    one_off["7"] = one_off["7"]._replace(ours=[1.01 * limits.leaf["7"] * one for one in module["7"]])
    with pytest.raises(AssertionError, match="in 7, which may be "):
        shadow.certified(one_off)


def test_the_limits_are_close_where_the_module_hardly_varies() -> None:
    limits = shadow.limits_of(spread(0.01, 8, 0))
    assert 1 < limits.median < max(limits.leaf.values()) < 1.1


def test_a_batch_in_which_a_relu_opens_on_one_side_changes_little() -> None:
    plain = spread(0.1, 4, 0)
    opened = {name: [1000 * each[0], *each[1:]] for name, each in plain.items()}
    assert shadow.limits_of(opened).median < shadow.limits_of(plain).median ** 3


@pytest.mark.parametrize("batches", shadow.FEW_VALUES)
def test_the_correction_for_few_values(batches: int) -> None:
    """Published figures, found again: the deviation is that of the normal distribution, on average."""
    values = torch.randn(100_000, batches, generator=generator(0), dtype=torch.float64)

    def middle(rows: Tensor) -> Tensor:
        return rows.quantile(0.5, dim=1)

    deviation = middle((values - middle(values)[:, None]).abs()).mean().item()
    # a mean over 100,000 draws, each of which varies by less than one
    assert shadow.FEW_VALUES[batches] * deviation / shadow.MAD_OF_NORMAL == pytest.approx(1, abs=0.015)


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
