"""Noise that can be drawn again: standard normal numbers by seed, step and leaf."""

from __future__ import annotations

import hashlib
import operator

import numpy as np
import torch
from torch import Tensor

from resnet_func import tree
from resnet_func.numerics import accumulation_dtype
from resnet_func.types import Params

# The noise of the count of unclipped samples, beside that of the parameters.
COUNT = "count of unclipped samples"


def gaussian_noise(params: Params, *, seed: int, step: int, adaptive: bool = False) -> Params:
    """Independent standard normal numbers like `params`: the noise of one step, the same whenever it is
    drawn.

    Leaf by leaf from NumPy's Philox4x64-10, keyed by 128 bits of the seed's SHA-256 and counted by step and
    leaf: no two steps or leaves share a number, a step repeated after a crash is the same release and not a
    second one, and no other random stream is read or advanced. They are drawn on the CPU, in at least
    float32, then moved. (`torch.Generator` on a CPU keeps 32 bits of its seed: noise that could be found by
    trying.)

    Whoever has the seed can subtract the noise: take `secrets.randbits(128)`, and keep it secret. The
    generator is not cryptographic, and floating-point normals are not exactly Gaussian (Mironov 2012,
    https://doi.org/10.1145/2382196.2382264): the guarantee is that of the idealised mechanism.

    Args:
        params: Nested dicts of floating-point tensors; only their shapes, dtypes and devices are looked at.
        seed: Any integer.
        step: The number of the step, 0 to 2^64 - 1, each used once.
        adaptive: Whether the step's bound adapts (`AdaptiveNorm`): then there is one number more, for the
            count of unclipped samples.

    >>> import torch
    >>> from resnet_func import privacy
    >>> noise = privacy.gaussian_noise({"w": torch.zeros(2, 3)}, seed=0, step=0)
    >>> noise["w"].shape, noise["w"].dtype
    (torch.Size([2, 3]), torch.float32)
    """
    if not 0 <= step < 2**64:
        raise ValueError(f"step must be 0 to 2^64 - 1; got {step}")
    digest = hashlib.sha256(f"resnet_func.privacy noise {operator.index(seed)}".encode()).digest()
    key = int.from_bytes(digest[:16], "big")

    def draw(number: int, leaf: Tensor) -> Tensor:
        dtype = accumulation_dtype(leaf.dtype)
        # the lowest of the counter's four words count the numbers of a leaf
        counter = np.array([0, 0, step, number], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
        values = generator.standard_normal(
            tuple(leaf.shape), dtype=np.float64 if dtype == torch.float64 else np.float32
        )
        return torch.as_tensor(values).to(leaf.device)

    leaves = tree.flatten(params)
    noise = {path: draw(number, leaves[path]) for number, path in enumerate(sorted(leaves))}
    if adaptive:
        like = torch.zeros((), dtype=torch.float32, device=tree.leaves(params)[0].device)
        noise[COUNT] = draw(len(leaves), like)
    return tree.unflatten(noise)


def add_noise(total: Params, noise: Params, std: float | Tensor) -> Params:
    """`total + std * noise`, in at least float32; a `std` that is the number 0 adds nothing."""
    if not isinstance(std, Tensor) and not std:
        return total
    return tree.map(lambda leaf, z: leaf.to(z.dtype) + std * z, total, noise)


def check_noise(noise: Params, params: Params, *, adaptive: bool = False) -> None:
    """Refuse noise of another tree or other shapes: it would broadcast, and one number would hide nothing.

    Raises:
        ValueError: a leaf is missing, or has another shape or less precision.
    """
    given, wanted = tree.flatten(noise), dict(tree.flatten(params))
    if adaptive:
        wanted[COUNT] = torch.zeros((), dtype=torch.float32, device="meta")
    for path in {**wanted, **given}:
        leaf, like = given.get(path), wanted.get(path)
        got = None if leaf is None else (leaf.shape, leaf.dtype)
        need = None if like is None else (like.shape, accumulation_dtype(like.dtype))
        if got != need:
            raise ValueError(
                f"noise must be like the parameters, in at least float32: {path!r} must be {need}; got {got}."
                f" Try privacy.gaussian_noise(params, seed=, step={', adaptive=True' if adaptive else ''})"
            )
