"""`python -m parity audit`: train with canaries, and see whether they betray more than was claimed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import tyro
from rich.console import Console

import resnet_func as rf
from resnet_func import optim, privacy, tree
from resnet_func.privacy.audit import Audit, Canaries
from resnet_func.testing import generator, randn
from resnet_func.types import TrainState


@dataclass(frozen=True)
class Options:
    """An audit of private training in one run: a tiny ResNet on noise, with canaries beside it."""

    epsilon: float = 1.0
    """What is claimed."""

    delta: float = 1e-5
    """What is claimed."""

    canaries: int = 1000
    """More of them give a sharper bound."""

    steps: int = 10
    """Of training."""

    rate: float = 0.5
    """Probability that a sample is in a step's batch."""

    max_norm: float = 1.0
    """Bound on a sample's gradient."""

    noise: float = 1.0
    """Times the noise that the claim needs; below 1 the claim is false, and an audit may show it."""

    seed: int = 0
    """Of data, coins, batches and noise."""


class Finding(NamedTuple):
    """A claim, and what an audit says of it."""

    claimed: float
    noise_multiplier: float
    audit: Audit

    @property
    def refuted(self) -> bool:
        return self.audit.lower_bound > self.claimed

    def sentence(self) -> str:
        """What was found, in a line."""
        bound, guesses, right = self.audit
        return (
            f"claimed epsilon {self.claimed:g}, lower bound {bound:.3f} with 95 % confidence ({right} of "
            f"{guesses} guesses right, noise multiplier {self.noise_multiplier:.3f}): "
            + ("REFUTED" if self.refuted else "not refuted")
        )


def audit(options: Options, *, model: rf.Model | None = None, size: int = 8) -> Finding:
    """Audit the library's own step, sampler, noise and accountant.

    Raises:
        ImportError: dp-accounting is not installed.
    """
    chosen = model or rf.resnet20(depths=(1, 1, 1), widths=(8, 8, 8), norm="group")
    params, state = chosen.init(generator(options.seed))
    canaries = privacy.insert_canaries(chosen, rf.losses.cross_entropy, params, state, options.canaries)
    rule = {"sampling_rate": options.rate, "steps": options.steps}
    sigma = privacy.noise_multiplier(options.epsilon, options.delta, **rule)

    def train(canaries: Canaries, x: Any, y: Any) -> TrainState:
        count, optimizer = len(x["canary"]), optim.sgd(0.1)
        step = privacy.make_private_step(
            canaries.model,
            canaries.loss_fn,
            optimizer,
            max_norm=options.max_norm,
            noise_multiplier=sigma * options.noise,
            expected_batch_size=options.rate * count,
            check=False,
        )
        train_state = rf.train.init_train_state(canaries.params, canaries.state, optimizer)
        batches = privacy.poisson_batches(count, **rule, seed=options.seed)
        for number, (indices, mask) in enumerate(batches):
            noise = privacy.gaussian_noise(train_state.params, seed=options.seed, step=number)
            own_x, own_y = tree.map(lambda leaf, i=indices: leaf[i], (x, y))
            train_state, _ = step(train_state, own_x, own_y, mask, noise)
        return train_state

    x = randn(16, 3, size, size, seed=options.seed)
    y = torch.arange(16) % 10
    source = generator(options.seed + 1)
    found = privacy.run_audit(canaries, train, x, y, delta=options.delta, generator=source)
    return Finding(options.epsilon, sigma, found)


def main(arguments: list[str], console: Console, complaints: Console) -> int:
    """Exit status: 0 when the claim stands, 1 when it is refuted, 2 for options that cannot be."""
    options = tyro.cli(Options, args=arguments, prog="python -m parity audit")
    try:
        found = audit(options)
    except (ValueError, ImportError) as error:
        complaints.print(f"Error: {error}", markup=False)
        return 2
    console.print(found.sentence(), markup=False, soft_wrap=True)
    return int(found.refuted)
