"""Recipes are checked data, and their early epochs are small."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_func.app import recipes
from resnet_func.app.recipes import ARTICLE, DIGITS, FAST, PRIVATE, PRIVATE_DIGITS, Recipe
from resnet_func.models import zoo


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "epochs must be 1 or more; got 0"),
        ({"batch_size": -3}, "batch_size must be 1 or more"),
        ({"microbatches": 0}, "microbatches must be 1 or more"),
        ({"weight_decay": float("nan")}, "weight_decay must be 0 or more, and finite; got nan"),
        ({"learning_rate": -0.1}, "learning_rate must be 0 or more, and finite; got -0.1"),
        ({"learning_rate": float("nan")}, "learning_rate must be 0 or more"),
        ({"rest_learning_rate": float("inf")}, "rest_learning_rate must be 0 or more, and finite; got inf"),
        ({"momentum": 1.0}, "momentum must be in [0, 1); got 1.0"),
        ({"label_smoothing": 1.0}, "label_smoothing must be in [0, 1)"),
        ({"ema": -0.5}, "ema must be in [0, 1); got -0.5"),
        ({"model": "vgg"}, "no network is called 'vgg'"),
        ({"crop": -1}, "crop must be 0 or more"),
        ({"warmup": 1.0}, "warmup must be a share of the steps, in [0, 1); got 1.0"),
        ({"early_scales": ((2.0, 0.5),)}, "early_scales are pairs (scale in (0, 1]"),
        ({"early_scales": ((0.5, 1.5),)}, "early_scales are pairs"),
    ],
)
def test_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Recipe(**fields)


@given(
    epochs=st.integers(1, 60),
    scales=st.lists(st.tuples(st.sampled_from([0.25, 0.5, 0.75]), st.floats(0, 1)), max_size=3).map(tuple),
)
def test_the_last_epoch_is_at_full_size_and_sizes_come_in_order(
    epochs: int, scales: tuple[tuple[float, float], ...]
) -> None:
    recipe = Recipe(epochs=epochs, early_scales=scales)
    sizes = [recipe.scale_at(epoch) for epoch in range(epochs)]
    assert sizes[-1] == 1.0
    order = [*(scale for scale, _ in scales), 1.0]
    cursor = 0
    for size in sizes:
        cursor = order.index(size, cursor)  # raises where a size comes out of its turn


@given(
    epochs=st.integers(1, 60),
    scales=st.lists(st.tuples(st.sampled_from([0.25, 0.5, 0.75]), st.floats(0, 1)), max_size=3).map(tuple),
)
def test_epochs_are_counted_by_scale(epochs: int, scales: tuple[tuple[float, float], ...]) -> None:
    recipe = Recipe(epochs=epochs, early_scales=scales)
    assert recipe.epochs_by_scale() == Counter(recipe.scale_at(epoch) for epoch in range(epochs))


def test_the_fast_recipe_has_minutes_and_a_quarter_of_full_epochs() -> None:
    assert (FAST.epochs, FAST.minutes) == (0, 20)
    assert replace(FAST, epochs=12).epochs_by_scale()[1.0] == 3
    assert {DIGITS.scale_at(epoch) for epoch in range(DIGITS.epochs)} == {1.0}


@pytest.mark.parametrize(
    ("dataset", "flips"), [("digits", False), ("mnist", False), ("cifar10", True), ("fashion_mnist", True)]
)
def test_digits_are_not_mirrored(dataset: str, flips: bool) -> None:
    recipe = recipes.recipe("fast", dataset)
    assert recipe.flip == recipe.test_flips == flips


def test_the_article_is_as_described() -> None:
    assert recipes.recipe("article", "digits") is ARTICLE
    assert (ARTICLE.model, ARTICLE.stem, ARTICLE.image_size) == ("resnet18", "imagenet", 224)
    assert (ARTICLE.optimizer, ARTICLE.learning_rate, ARTICLE.batch_size, ARTICLE.epochs) == (
        "adam",
        1e-3,
        64,
        10,
    )
    assert ARTICLE.normalization == "imagenet"
    assert (ARTICLE.crop, ARTICLE.flip, ARTICLE.cutout) == (0, False, 0), "its source augments nothing"


def test_every_recipe_names_a_network() -> None:
    assert {recipe.model for recipe in (FAST, DIGITS, ARTICLE, PRIVATE, PRIVATE_DIGITS)} <= set(zoo.ZOO)


@given(batch_size=st.integers(1, 2000), microbatches=st.integers(1, 50))
def test_evaluation_takes_the_images_of_a_microbatch_at_a_time(batch_size: int, microbatches: int) -> None:
    recipe = Recipe(batch_size=batch_size, microbatches=microbatches)
    largest = len(torch.empty(batch_size).chunk(microbatches)[0])
    assert recipe.evaluation_batch == min(largest, 500)


@given(batch=st.integers(1, 1000), images=st.integers(1, 100_000))
def test_a_fitting_batch_is_the_largest_of_the_halves_with_eight_steps(batch: int, images: int) -> None:
    fitting = recipes.fit_batch(Recipe(batch_size=batch), images).batch_size
    halves = {batch >> times for times in range(11)} - {0}
    fits = {half for half in halves if half <= images and (half <= 8 or half * 8 <= images)}
    assert fitting == max(fits)
