"""Private training as a run does it: secret batches in parts, clipped, with noise that can be drawn again."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_func import privacy, tree
from resnet_func.app import data
from resnet_func.app.batches import ONE_RANK, Preparer, make_generator
from resnet_func.app.data import augment
from resnet_func.app.experiment import Plan, Privacy
from resnet_func.app.private import seeds
from resnet_func.app.private.guarantee import PrivateError
from resnet_func.app.ranks.launch import Group
from resnet_func.app.recipes import Recipe
from resnet_func.app.storage import checkpoint, run_folder
from resnet_func.distributed import Ranks
from resnet_func.losses import smoothed_cross_entropy
from resnet_func.optim import Optimizer
from resnet_func.per_sample import clipped_sum
from resnet_func.train import Evaluation, Progress, Step, init_train_state, to_memory_format
from resnet_func.types import Metrics, Model, Params, State, TrainState

MOST_IN_A_PART = 64


# --------------------------------------------------------------------------- batches


class Part(NamedTuple):
    """Some of a batch: `x [n, C, H, W]` or `[n, views, C, H, W]`, `y [n]`, and what is no padding."""

    x: Tensor
    y: Tensor
    mask: Tensor


class PrivateBatch(NamedTuple):
    """A step's images in parts of one size, and the step's number in the run.

    Its length is the expected one: the true one is private.
    """

    parts: list[Part]
    step: int
    expected: int

    def __len__(self) -> int:
        return self.expected


def part_size(recipe: Recipe, views: int) -> int:
    """Images that are clipped at a time: an eighth of a batch, so that little of the last part is padding.

    >>> part_size(Recipe(batch_size=1024), 1), part_size(Recipe(batch_size=100, microbatches=20), 1)
    (64, 5)
    """
    size = min(MOST_IN_A_PART, max(32, recipe.batch_size // 8), -(-recipe.batch_size // recipe.microbatches))
    return max(1, size // views)


class PrivateTrainer:
    """What a run needs of private training; `measured` collects an epoch's diagnostics."""

    def __init__(self, plan: Plan, drawn: seeds.Seeds, ranks: Ranks | None = None) -> None:
        assert plan.budget is not None
        self.budget, self.privacy, self.recipe = plan.budget, plan.budget.privacy, plan.experiment.recipe
        self.seeds, self.machine, self.ranks = drawn, plan.machine, ranks
        self.measured: list[dict[str, float]] = []

    def batches(
        self, source: data.Source, prepare: Preparer, epoch: int, first: int
    ) -> Iterator[tuple[Any, Any]]:
        """The batches of an epoch from batch `first` on: a `PrivateBatch` each, targets inside, and None.

        Parts are dealt to the ranks in turn, as many to each: the last may be nothing but padding.

        Crops and flips come from a secret seed, too: by a known one, an image more would move the others'
        draws, and what they add by more than the bound.
        """
        recipe, ranks, device = self.recipe, self.ranks or ONE_RANK, prepare.runtime.device
        changes = augment.Augment(recipe.crop, recipe.flip, recipe.cutout)
        size = part_size(recipe, self.privacy.views)
        waiting: deque[tuple[int, int, Tensor, bool]] = deque()

        def picks() -> Iterator[Tensor]:
            for step, indices, mask in self._drawn(source.num_samples, epoch, first, size * ranks.world):
                cut = list(enumerate(zip(indices.split(size), mask.split(size), strict=True)))
                mine = cut[ranks.rank :: ranks.world]
                for number, (index, kept) in mine:
                    waiting.append((step, number, kept, number == mine[-1][0]))
                    yield index

        parts: list[Part] = []
        for images, labels in source.read(picks()):
            step, number, kept, last = waiting.popleft()
            draws, x = make_generator(device, self.seeds.augmentation, step, number), prepare(images)
            views = [augment.apply(changes, x, draws) for _ in range(self.privacy.views)]
            views = [prepare.scale(view, recipe.scale_at(epoch)) for view in views]
            x = views[0] if len(views) == 1 else torch.stack(views, 1)
            parts.append(Part(x, labels.to(device), kept.to(device)))
            if last:
                yield PrivateBatch(parts, step, recipe.batch_size), None
                parts = []

    def _drawn(
        self, num_images: int, epoch: int, first: int, size: int
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Step, indices and mask of each batch, of whole parts."""
        run = self.budget
        start = epoch * run.epoch_steps
        rule: dict[str, Any] = {
            "steps": start + run.epoch_steps,
            "seed": self.seeds.sampling,
            "first_step": start + first,
        }
        if run.privacy.sampling == "poisson":
            batches = privacy.poisson_batches(num_images, sampling_rate=run.rate, capacity=size, **rule)
        else:
            batches = privacy.fixed_size_batches(num_images, batch_size=self.recipe.batch_size, **rule)
        for step, (indices, mask) in enumerate(batches, start + first):
            short = -len(indices) % size
            yield step, F.pad(indices, (0, short)), F.pad(mask, (0, short))

    def make_step(self, model: Model, optimizer: Optimizer) -> Step:
        """One step, in the form of `train.make_train_step`; what it says of the loss is nothing, 0."""
        recipe, chosen = self.recipe, self.privacy
        adaptive = chosen.clipping == "adaptive"
        summed = clipped_sum(
            model,
            smoothed_cross_entropy(recipe.label_smoothing),
            max_norm=chosen.max_norm,
            clipping="flat" if chosen.clipping == "adaptive" else chosen.clipping,
            nonfinite="zero",
            views=chosen.views > 1,
        )
        parts = privacy.make_private_parts(
            summed,
            optimizer,
            max_norm=bound_of(chosen),
            noise_multiplier=chosen.noise_multiplier,
            expected_batch_size=recipe.batch_size,
            neighbours=chosen.neighbours,
            ema_decay=recipe.ema or None,
        )
        clip, finish = parts.clip, parts.finish
        if self.machine.compile:  # a part has one size: one graph, however many parts a batch has
            clip = torch.compile(clip, fullgraph=True, dynamic=False)
            finish = torch.compile(finish, fullgraph=True, dynamic=False)

        def step(train_state: TrainState, batch: Any, targets: Any) -> tuple[TrainState, Metrics]:
            clipped = privacy.join([clip(train_state, *part) for part in batch.parts])
            if self.ranks is not None:
                clipped = privacy.join_over_ranks(clipped, self.ranks)
            noise = privacy.gaussian_noise(
                train_state.params, seed=self.seeds.noise, step=batch.step, adaptive=adaptive
            )
            if chosen.diagnostics:
                found = parts.measure(train_state, clipped)
                self.measured.append({name: float(value) for name, value in found.items()})
            noise = to_memory_format(noise, self.machine.memory_format)
            return finish(train_state, clipped, noise), {
                "loss": torch.zeros((), dtype=torch.float32, device="cpu")
            }

        return step

    def record(self, progress: Progress, evaluation: Evaluation) -> dict[str, float]:
        """What an epoch's line of metrics.jsonl tells, beside its number: nothing that is not private, unless
        that was asked for."""
        found = {
            "epsilon": self.budget.spent((progress.epoch + 1) * self.budget.epoch_steps),
            "test_loss": evaluation.loss,
            "test_accuracy": evaluation.accuracy,
            "seconds": round(progress.seconds, 3),
            "images_per_second": round(progress.samples / progress.seconds, 1),
        }
        measured, self.measured = self.measured, []
        for name in measured[0] if measured else ():
            found[name] = sum(step[name] for step in measured) / len(measured)
        return found


def make_trainer(
    plan: Plan, folder: Path, group: Group, *, resume: bool, insecure: int | None
) -> PrivateTrainer | None:
    """The trainer of a run, with new seeds or those that it goes on with; None for a run that is not private.

    Raises:
        RunError: the seeds cannot be kept, or are gone.
    """
    if plan.budget is None:
        return None
    if resume and _is_done(folder, plan.experiment.recipe):  # nothing is drawn any more
        return PrivateTrainer(plan, seeds.Seeds(0, 0, 0), group.ranks)

    def draw() -> str:
        if not resume:
            seeds.keep(folder, seeds.draw(insecure))
        return "kept"

    group.from_first(draw)  # secrets go by the file, not over the network
    return PrivateTrainer(plan, seeds.read(folder), group.ranks)


def _is_done(folder: Path, recipe: Recipe) -> bool:
    meta = checkpoint.read_meta(run_folder.checkpoints(folder), "last")
    return meta.get("progress", {}).get("epoch", 0) >= recipe.epochs


def bound_of(chosen: Privacy) -> float | privacy.AdaptiveNorm:
    """The bound as the step takes it."""
    adaptive = chosen.clipping == "adaptive"
    return privacy.AdaptiveNorm(start=chosen.max_norm) if adaptive else chosen.max_norm


def begin(
    chosen: Privacy | None, params: Params, state: State, optimizer: Optimizer, *, ema: bool
) -> TrainState:
    """The state before the first step, of private runs and others.

    Raises:
        PrivateError: the network has BatchNorm.
    """
    if chosen is None:
        return init_train_state(params, state, optimizer, ema=ema)
    if any(path.endswith("running_mean") for path in tree.flatten(state)):
        raise PrivateError(
            "this network has BatchNorm, which couples the images of a batch, so that no image's gradient "
            "can be bounded by itself. Take one with GroupNorm or LayerNorm"
        )
    return privacy.init_private_state(params, state, optimizer, max_norm=bound_of(chosen), ema=ema)
