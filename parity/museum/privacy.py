"""Bugs of private training: each costs the guarantee, and none an error message."""

from __future__ import annotations

from parity.museum.exhibit import Exhibit, edit
from resnet_func.app.private import guarantee, seeds
from resnet_func.per_sample.quantities import quantity
from resnet_func.privacy import accounting, adaptive, noise, sampling, step

AUDIT = "privacy/an-audit-refutes-no-true-claim"
MOVES = "privacy/one-sample-moves-the-sum-by-the-bound-at-most"
SCALE = "privacy/noise-is-added-once-and-to-scale"
RELEASED = "privacy/all-that-is-released-has-noise"
FRESH = "privacy/noise-is-standard-normal-and-fresh"
SEEDS = "privacy/seeds-are-three-and-the-owners-alone"
COINS = "privacy/batches-are-independent-coins"
WHOLE = "privacy/no-sample-is-dropped-and-none-stands-in"

EXHIBITS = [
    Exhibit(
        "noise-too-small",
        "noise for the mean is added to the sum: smaller by the size of a batch",
        "first versions of DP-SGD everywhere",
        AUDIT,
        edit(
            step._PrivateRule.std_of,
            ("self.ratio * self", "self.ratio / self.expected_batch_size * self"),
        ),
    ),
    Exhibit(
        "noise-without-the-bound",
        "noise has the multiplier's size, whatever the bound",
        "code in which the bound was 1 until somebody tuned it",
        SCALE,
        edit(step._PrivateRule.std_of, ("self.ratio * self.bound_of(train_state)", "self.ratio * 1.0")),
    ),
    Exhibit(
        "noise-with-the-batch",
        "noise grows with the samples drawn, as if every part had added its own",
        "gradient accumulation around a private step",
        SCALE,
        edit(
            step._PrivateRule.finish,
            (
                "drawn, self.std_of(train_state))",
                "drawn, self.std_of(train_state) * len(clipped.mask) ** 0.5)",
            ),
        ),
    ),
    Exhibit(
        "clip-after-the-mean",
        "the mean gradient's norm decides, not each sample's",
        "torch.nn.utils.clip_grad_norm_ in a training loop",
        MOVES,
        edit(
            quantity._clip_and_sum,
            (
                "_factors_by_leaf(answers, norms, captured",
                "_factors_by_leaf(answers, norms.mean().expand_as(norms) / len(norms), captured",
            ),
        ),
    ),
    Exhibit(
        "norm-without-the-last-layer",
        "a sample's norm leaves its last leaf out, which is then not bounded",
        "hooks on the layers that have a rule",
        AUDIT,
        edit(
            quantity.total_norm,
            ("list(squares.values())", "(list(squares.values())[:-1] or [*squares.values()])"),
        ),
    ),
    Exhibit(
        "per-layer-bounds-not-shared",
        "every layer is clipped to the whole bound, and the noise is for one",
        "per-layer clipping in several libraries; the sum moves by the root of the layers more",
        MOVES,
        edit(quantity._factors_by_leaf, ("max_norm / len(layers) ** 0.5", "max_norm")),
    ),
    Exhibit(
        "divided-by-the-random-batch",
        "the sum is divided by the size of the batch as it was drawn",
        "jax_privacy lists it first among its sharp edges",
        "privacy/a-batch-of-any-size-is-divided-by-the-expected",
        edit(
            step._PrivateRule.finish,
            (
                "(noisy[path] / self.expected_batch_size).to",
                "(noisy[path] / clipped.mask.sum().clamp(min=1)).to",
            ),
        ),
    ),
    Exhibit(
        "empty-batch-skipped",
        "an empty batch leaves the parameters as they are, noise and all",
        "data loaders that draw again, or skip",
        "privacy/an-empty-batch-is-a-step-of-noise-over-the-expected-size",
        edit(
            step._PrivateRule.finish,
            (
                "    noisy = add_noise(",
                "    if not clipped.mask.any():\n        return train_state\n    noisy = add_noise(",
            ),
        ),
    ),
    Exhibit(
        "average-of-noiseless-updates",
        "the moving average is of what the parameters would be without noise",
        "an average put around the wrong step",
        RELEASED,
        edit(
            step._PrivateRule.finish,
            (
                "ema_params = put_trained(ema_params, ema(before, moved, decay), before)",
                "clean = tree.map(lambda p, g: p - g.to(p.dtype), trained, clipped.total)\n"
                "        ema_params = put_trained(ema_params, ema(before, clean, decay), before)",
            ),
        ),
    ),
    Exhibit(
        "count-without-noise",
        "the count that moves an adaptive bound is exact",
        "adaptive clipping added to a private loop",
        RELEASED,
        edit(adaptive.AdaptiveNorm.count_std, ("float(noise_multiplier) / (2", "0.0 / (2")),
    ),
    Exhibit(
        "the-same-noise-every-step",
        "the noise does not depend on the step: two releases differ by what it hid",
        "a generator seeded inside the step",
        FRESH,
        edit(noise.gaussian_noise, ("[0, 0, step, number]", "[0, 0, 0, number]")),
    ),
    Exhibit(
        "leaves-share-their-noise",
        "leaves of one shape get the same numbers",
        "a generator seeded for each leaf",
        FRESH,
        edit(noise.gaussian_noise, ("[0, 0, step, number]", "[0, 0, step, 0]")),
    ),
    Exhibit(
        "noise-from-the-sampling-seed",
        "noise and batches come from one seed",
        "one torch.manual_seed at the top of a script",
        SEEDS,
        edit(
            seeds.draw,
            (
                "Seeds(*(secrets.randbits(BITS) for _ in Seeds._fields))",
                "Seeds(*[secrets.randbits(BITS)] * 3)",
            ),
        ),
    ),
    Exhibit(
        "seeds-for-everybody",
        "the file of the secret seeds has the mode that the umask gives",
        "open(path, 'w')",
        SEEDS,
        edit(seeds.keep, ("0o600)", "0o644)")),
    ),
    Exhibit(
        "shuffled-batches",
        "samples are dealt out by a permutation, epoch by epoch, and accounted for as Poisson",
        "most published private training (https://arxiv.org/abs/2406.17298)",
        COINS,
        edit(
            sampling.included,
            (
                "    return _coins(num_samples, seed, step, device=device) < int(",
                "    size = int(Fraction(sampling_rate) * num_samples)\n"
                "    parts = num_samples // size\n"
                "    rank = _coins(num_samples, seed, step // parts, device=device).argsort().argsort()\n"
                "    return rank // size == step % parts + 0 * int(",
            ),
        ),
    ),
    Exhibit(
        "samples-beyond-the-capacity",
        "a batch that is too large is cut to the capacity",
        "compiled steps of a fixed shape",
        WHOLE,
        edit(
            sampling._fixed_length,
            (
                "    length = capacity * max(1, -(-len(indices) // capacity))",
                "    indices, length = indices[:capacity], capacity",
            ),
        ),
    ),
    Exhibit(
        "a-stand-in-for-an-empty-batch",
        "where nobody was drawn, the first sample comes",
        "samplers that never return an empty batch",
        WHOLE,
        edit(
            sampling._fixed_length,
            (
                "chosen.nonzero().flatten()",
                "(chosen if chosen.any() else torch.arange(len(chosen)) == 0).nonzero().flatten()",
            ),
        ),
    ),
    Exhibit(
        "epsilon-at-the-rate-of-the-loader",
        "the rate is one over the number of batches, rounded",
        "Opacus 1.6: a batch of 4096 of 50,000 counts as 1/13, an expected 3,846",
        "privacy/the-rate-is-the-expected-batch-over-the-images",
        edit(
            guarantee.budget,
            ("Fraction(recipe.batch_size, num_images)", "Fraction(1, -(-num_images // recipe.batch_size))"),
        ),
    ),
    Exhibit(
        "replacement-as-one-contribution",
        "for batches of a fixed size the sum is taken to move by one bound, not two",
        "accountants whose noise is relative to their own neighbours' sensitivity",
        "privacy/a-fixed-size-counts-two-contributions",
        edit(accounting._Run.event, ("GaussianDpEvent(multiplier / 2)", "GaussianDpEvent(multiplier)")),
    ),
]
