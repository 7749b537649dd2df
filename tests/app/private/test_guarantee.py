"""The budget: noise for all steps at the true rate, and a sentence that says what is not promised."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest

from resnet_func import privacy
from resnet_func.app.experiment import Experiment, Privacy
from resnet_func.app.options import PrivateTraining
from resnet_func.app.private import guarantee
from resnet_func.app.recipes import Recipe
from resnet_func.app.storage.run_folder import RunError

pytest.importorskip("dp_accounting")
WISH = PrivateTraining(private=True, epsilon=2.0, delta=1e-5)
RECIPE = Recipe(epochs=3, batch_size=300, norm="group", normalization="fixed")


def test_the_rate_is_the_expected_batch_over_the_images_and_no_other() -> None:
    """Not one over the number of batches."""
    chosen = Privacy(8.0, 1e-5, 1.0)
    run = guarantee.budget(chosen, RECIPE, 1000)
    assert (run.rate, run.epoch_steps, run.steps) == (Fraction(3, 10), 3, 9)
    assert run.spent(9) == privacy.epsilon(1.0, 1e-5, sampling_rate=0.3, steps=9)


def test_calibrated_noise_spends_what_was_wished_and_no_more() -> None:
    chosen = guarantee.calibrate(WISH, RECIPE, 1000)
    run = guarantee.budget(chosen, RECIPE, 1000)
    assert 0.99 * 2.0 < run.spent(run.steps) <= 2.0
    guarantee.check_budget(run)
    with pytest.raises(RunError, match="config.json says epsilon 2, but its 18 steps spend"):
        guarantee.check_budget(guarantee.budget(chosen, replace(RECIPE, epochs=6), 1000))


def test_a_fixed_size_is_for_an_image_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(privacy, "noise_multiplier", lambda *args, **run: asked.append(run) or 2.0)
    chosen = guarantee.calibrate(replace(WISH, sampling="fixed-size"), RECIPE, 1000)
    assert (chosen.neighbours, chosen.noise_multiplier) == ("replace-one", 2.0)
    wanted = {"steps": 9, "sampling_rate": 0.3, "neighbours": "replace-one", "sampling": "fixed-size"}
    assert asked == [wanted]


@pytest.mark.parametrize(
    ("changes", "images", "message"),
    [({"delta": 1e-3}, 1000, "protects nobody"), ({}, 299, "more than the 299 training images")],
    ids=str,
)
def test_what_cannot_be_is_refused(changes: dict, images: int, message: str) -> None:
    with pytest.raises(guarantee.PrivateError, match=message):
        guarantee.calibrate(replace(WISH, **changes), RECIPE, images)


def test_the_sentence_says_what_is_promised_and_what_not() -> None:
    chosen = Privacy(8.0, 1e-5, 1.25)
    experiment = Experiment("digits", None, 0, RECIPE, privacy=chosen)
    said = guarantee.guarantee(experiment, guarantee.budget(chosen, RECIPE, 1000))
    for part in (
        "(8, 1e-05)-differentially private",
        "one image more or less",
        "noise of 1.25",
        "9 steps on Poisson batches at rate 3/10",
        "choice of hyper-parameters",
        "computed on test images",
        "not cryptographic",
        "floating-point",
    ):
        assert part in said
    assert "\n" not in said
    assert "deviation" not in said
    of_data = replace(experiment, recipe=replace(RECIPE, normalization="data"), init="w.pth")
    said = guarantee.guarantee(of_data, guarantee.budget(chosen, RECIPE, 1000))
    assert "mean and standard deviation of the training images" in said
    assert "what the weights of --init were made from" in said
    insecure = replace(chosen, insecure=True)
    assert guarantee.guarantee(experiment, guarantee.budget(insecure, RECIPE, 1000)).startswith("NOT private")
