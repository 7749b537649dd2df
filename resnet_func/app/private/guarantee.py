"""The budget of a private run: its noise, what its steps spend, and what is promised, in a sentence."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

from resnet_func import privacy
from resnet_func.app.errors import AppError
from resnet_func.app.experiment import Experiment, Privacy
from resnet_func.app.options import PrivateTraining
from resnet_func.app.recipes import Recipe
from resnet_func.app.storage.run_folder import RunError


class PrivateError(AppError):
    """The run cannot be private as asked; the message is one line with the way out."""


class Budget(NamedTuple):
    """What a run's epsilon depends on.

    Attributes:
        privacy: The wish, with its noise.
        rate: The expected batch size over the number of images.
        epoch_steps, steps: Of an epoch, of the run.
    """

    privacy: Privacy
    rate: Fraction
    epoch_steps: int
    steps: int

    def spent(self, steps: int) -> float:
        """Epsilon after so many steps."""
        return privacy.epsilon(
            self.privacy.noise_multiplier, self.privacy.delta, steps=steps, **_run_of(self.privacy, self.rate)
        )


def _run_of(chosen: Privacy | PrivateTraining, rate: Fraction) -> dict[str, Any]:
    return {"sampling_rate": float(rate), "neighbours": chosen.neighbours, "sampling": chosen.sampling}


def budget(chosen: Privacy, recipe: Recipe, num_images: int) -> Budget:
    """The budget of a run on so many images."""
    epoch_steps = num_images // recipe.batch_size
    return Budget(chosen, Fraction(recipe.batch_size, num_images), epoch_steps, recipe.epochs * epoch_steps)


def calibrate(wish: PrivateTraining, recipe: Recipe, num_images: int) -> Privacy:
    """The wish with the least noise that keeps it for all steps of the run.

    Raises:
        PrivateError: delta is too large for so many images, or an epoch has no step.
        ValueError: no noise keeps the wish; ImportError: dp-accounting is not installed.
    """
    assert wish.epsilon is not None
    if wish.delta >= 1 / num_images:
        raise PrivateError(
            f"--delta {wish.delta:g} protects nobody: it allows to publish one of {num_images} images as it "
            f"is. Use less than {1 / num_images:.1g}"
        )
    if recipe.batch_size > num_images:
        raise PrivateError(
            f"--batch-size {recipe.batch_size} is more than the {num_images} training images; try "
            f"--batch-size {max(1, num_images // 8)}"
        )
    fixed = wish.sampling == "fixed-size"
    neighbours = wish.neighbours or ("replace-one" if fixed else "add-or-remove-one")
    chosen = Privacy(
        epsilon=wish.epsilon,
        delta=wish.delta,
        noise_multiplier=0.0,
        max_norm=wish.max_norm,
        clipping=wish.clipping,
        views=wish.views,
        sampling="fixed-size" if fixed else "poisson",
        neighbours=neighbours,
        diagnostics=wish.diagnostics,
        insecure=wish.insecure_noise_seed is not None,
    )
    run = budget(chosen, recipe, num_images)
    found = privacy.noise_multiplier(wish.epsilon, wish.delta, steps=run.steps, **_run_of(chosen, run.rate))
    return replace(chosen, noise_multiplier=float(found))


def check_budget(run: Budget) -> None:
    """Refuse to go on with a run whose steps would spend more than was promised.

    Raises:
        RunError: config.json was changed.
    """
    spent = run.spent(run.steps)
    if spent > run.privacy.epsilon:
        raise RunError(
            f"config.json says epsilon {run.privacy.epsilon:g}, but its {run.steps} steps spend {spent:.4g}: "
            "it was changed. Restore it from a copy"
        )


def guarantee(experiment: Experiment, run: Budget) -> str:
    """What is promised, and what is not."""
    chosen = run.privacy
    if chosen.insecure:
        return "NOT private: the seed of the noise is an option (--insecure-noise-seed), and undoes it"
    differ = {"add-or-remove-one": "in one image more or less", "replace-one": "in one image replaced"}
    batches = "Poisson batches" if chosen.sampling == "poisson" else "batches of a fixed size, drawn anew"
    uncovered = ["the choice of hyper-parameters", "the number of training images and the names of classes"]
    uncovered += ["what is computed on test images"]
    if experiment.recipe.normalization == "data":
        uncovered += ["mean and standard deviation of the training images (--normalization fixed needs none)"]
    if experiment.init is not None:
        uncovered += ["what the weights of --init were made from"]
    if chosen.diagnostics:
        uncovered += ["the metrics called not_private (--diagnostics)"]
    return (
        f"private: the network is ({chosen.epsilon:g}, {chosen.delta:g})-differentially private for training "
        f"sets that differ {differ[chosen.neighbours]}, by noise of {chosen.noise_multiplier:.4g} times the "
        f"bound in {run.steps} steps on {batches} at rate {run.rate.numerator}/{run.rate.denominator}. "
        f"Not covered: {', '.join(uncovered)}. The noise is floating-point numbers of a generator that is "
        "not cryptographic: the guarantee is that of the idealised mechanism"
    )
