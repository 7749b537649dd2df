"""Per-sample losses against their formulas, in float64."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_func import losses


def batch(seed: int, n: int = 5, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (n,), generator=generator)


def negative_log_likelihood(logits: torch.Tensor, target: int) -> float:
    values = logits.tolist()
    return math.log(math.fsum(math.exp(value) for value in values)) - values[target]


@given(st.integers(0, 2**31), st.integers(1, 9))
def test_cross_entropy_is_its_formula(seed: int, n: int) -> None:
    logits, targets = batch(seed, n)
    want = [negative_log_likelihood(row, int(t)) for row, t in zip(logits, targets, strict=True)]
    torch.testing.assert_close(losses.cross_entropy(logits, targets).tolist(), want, rtol=1e-12, atol=1e-13)


@given(st.integers(0, 2**31), st.floats(0, 0.99))
def test_smoothing_mixes_in_the_uniform_distribution(seed: int, smoothing: float) -> None:
    logits, targets = batch(seed)
    uniform = torch.stack([losses.cross_entropy(logits, torch.full_like(targets, k)) for k in range(4)]).mean(
        0
    )
    want = (1 - smoothing) * losses.cross_entropy(logits, targets) + smoothing * uniform
    got = losses.smoothed_cross_entropy(smoothing)(logits, targets)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_squared_error_has_the_residual_as_gradient() -> None:
    logits, _ = batch(0)
    targets, _ = batch(1)
    grad = torch.func.grad(lambda z: losses.squared_error(z, targets).sum())(logits)
    torch.testing.assert_close(grad, logits - targets, rtol=0, atol=1e-15)
    assert losses.squared_error(logits, targets).shape == (5,)


def test_logit_picks_one_and_ignores_targets() -> None:
    logits, targets = batch(0)
    assert torch.equal(losses.logit(2)(logits, targets - 99), logits[:, 2])


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_smoothing_out_of_range(smoothing: float) -> None:
    with pytest.raises(ValueError, match=r"smoothing must be in \[0, 1\)"):
        losses.smoothed_cross_entropy(smoothing)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0, 1]), "expected one label per image, [3]; got [2]"),
        (torch.tensor([[0], [1], [2]]), "expected one label per image, [3]; got [3, 1]"),
        (torch.tensor([0.0, 1.0, 2.0]), "expected int64 class indices; got torch.float32"),
        (torch.tensor([0, -1, 7]), "labels must be in 0 .. 3; got -1, 7"),
    ],
    ids=["length", "rank", "float", "range"],
)
def test_wrong_labels(targets: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        losses.check_targets(targets, 3, 4)
    losses.check_targets(torch.tensor([0, 3, 1]), 3, 4)


# --------------------------------------------------------------------------- targets of every shape


@given(st.integers(0, 2**31), st.integers(1, 6), st.floats(0, 0.99))
def test_probabilities_weigh_the_classes(seed: int, n: int, smoothing: float) -> None:
    """Of as many samples as classes, too, where they were taken for something else."""
    logits, _ = batch(seed, n)
    weights = batch(seed + 1, n)[0].softmax(1)
    classes = [torch.full((n,), k) for k in range(4)]
    for loss_fn in (losses.cross_entropy, losses.smoothed_cross_entropy(smoothing)):
        want = torch.stack([loss_fn(logits, k) for k in classes], 1)
        got = loss_fn(logits, weights)
        assert got.shape == (n,)
        torch.testing.assert_close(got, (weights * want).sum(1), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0, 1, 2], dtype=torch.int32), "expected int64 class indices; got torch.int32"),
        (torch.tensor([0.0, 1.0, 2.0]), "expected int64 class indices; got torch.float32"),
        (torch.tensor([0, 1]), "class indices [3], int64, or probabilities [3, 4], floating; got [2] of"),
        (torch.zeros(3, 4, dtype=torch.int64), "probabilities [3, 4], floating; got [3, 4] of torch.int64"),
        (torch.zeros(3, 1), "probabilities [3, 4], floating; got [3, 1] of torch.float32"),
    ],
    ids=["int32", "float", "length", "one-hot-of-integers", "column"],
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_says_what_targets_it_takes(
    targets: torch.Tensor, message: str, smoothing: float
) -> None:
    for loss_fn in (losses.cross_entropy, losses.smoothed_cross_entropy(smoothing)):
        with pytest.raises(ValueError, match=re.escape(message)):
            loss_fn(torch.zeros(3, 4), targets)


@pytest.mark.parametrize(
    ("logits", "targets"),
    [((5, 1), (5,)), ((5, 4), (5,)), ((5, 4), (4,)), ((5, 4), (5, 1)), ((5, 4), (1, 4))],
)
def test_squared_error_refuses_what_would_broadcast(
    logits: tuple[int, ...], targets: tuple[int, ...]
) -> None:
    message = f"targets of the logits' shape, {list(logits)}; got {list(targets)}. Try targets[:, None]"
    with pytest.raises(ValueError, match=re.escape(message)):
        losses.squared_error(torch.zeros(logits), torch.ones(targets))


# --------------------------------------------------------------------------- metrics and checks

NO_INDICES = {
    "soft": torch.ones(3, 4),
    "soft-square": torch.ones(3, 3),
    "multi-label": torch.ones(3, 4, dtype=torch.bool),
    "floats": torch.ones(3),
    "bits": torch.ones(3, dtype=torch.bool),
    "length": torch.ones(2, dtype=torch.int64),
    "tree": {"class": torch.ones(3, dtype=torch.int64)},
}


@pytest.mark.parametrize("name", NO_INDICES)
def test_accuracy_is_of_class_indices(name: str) -> None:
    assert not losses.are_class_indices(NO_INDICES[name], 3)
    with pytest.raises(ValueError, match=r"accuracy needs class indices, one integer per sample, \[3\]"):
        losses.accuracy(torch.zeros(3, 3), NO_INDICES[name])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_accuracy_is_one_for_the_largest_logit(dtype: torch.dtype) -> None:
    logits, targets = batch(3, n=9)
    got = losses.accuracy(logits, targets.to(dtype))
    assert got.dtype == torch.float32
    assert got.tolist() == [
        float(max(range(4), key=row.__getitem__) == t)
        for row, t in zip(logits.tolist(), targets.tolist(), strict=True)
    ]


@pytest.mark.parametrize("values", [torch.zeros(()), torch.zeros(1), torch.zeros(3, 1), 0.5, None], ids=str)
def test_what_is_not_per_sample_is_refused(values: object) -> None:
    with pytest.raises(ValueError, match=r"loss_fn must return one loss per sample, \[3\]; got"):
        losses.check_per_sample(values, 3)  # type: ignore[arg-type]
    losses.check_per_sample(torch.zeros(3), 3)
