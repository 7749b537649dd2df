"""Training with differential privacy: accounting, Poisson batches, and the step between them.

    sigma = rf.privacy.noise_multiplier(8.0, 1e-5, sampling_rate=q, steps=steps)   # extra: privacy
    step = rf.privacy.make_private_step(
        model, loss_fn, optimizer, max_norm=1.0, noise_multiplier=sigma, expected_batch_size=q * len(images)
    )
    seed = secrets.randbits(128)
    batches = rf.privacy.poisson_batches(len(images), sampling_rate=q, steps=steps, seed=seed)
    for i, (indices, mask) in enumerate(batches):
        noise = rf.privacy.gaussian_noise(train_state.params, seed=noise_seed, step=i)
        train_state, metrics = step(train_state, images[indices], labels[indices], mask, noise)

What the guarantee is not about: whatever else looks at the data (normalisation by its mean, the choice of
hyper-parameters, the step's metrics), and a noise seed that somebody learns.

The noise of a step is independent of that of others. Correlated noise (banded matrix factorisation) is left
out: what is known of its amplification (Choquette-Choo et al. 2023, https://arxiv.org/abs/2306.08153) is for
batches from fixed parts of the data in turn, and dp-accounting computes none for Poisson batches.
"""

from resnet_func.privacy.accounting import NoiseMultiplier, epsilon, epsilon_curve, noise_multiplier
from resnet_func.privacy.adaptive import AdaptiveNorm, init_private_state
from resnet_func.privacy.audit import epsilon_lower_bound, insert_canaries, run_audit
from resnet_func.privacy.noise import gaussian_noise
from resnet_func.privacy.over_ranks import join_over_ranks
from resnet_func.privacy.sampling import fixed_size_batches, part, poisson_batches
from resnet_func.privacy.step import Clipped, join, make_private_parts, make_private_step, sensitivity

__all__ = [
    "AdaptiveNorm",
    "Clipped",
    "NoiseMultiplier",
    "epsilon",
    "epsilon_curve",
    "epsilon_lower_bound",
    "fixed_size_batches",
    "gaussian_noise",
    "init_private_state",
    "insert_canaries",
    "join",
    "join_over_ranks",
    "make_private_parts",
    "make_private_step",
    "noise_multiplier",
    "part",
    "poisson_batches",
    "run_audit",
    "sensitivity",
]
