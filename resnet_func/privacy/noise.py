"""Noise that can be drawn again: standard normal numbers by seed, step and leaf."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from resnet_func import tree
from resnet_func.numerics import accumulation_dtype
from resnet_func.train.trainable import trained_leaves
from resnet_func.types import Params, Trainable

# The noise of the count of unclipped samples, beside that of the parameters.
COUNT = "count of unclipped samples"


def gaussian_noise(
    params: Params,
    *,
    seed: int,
    step: int,
    adaptive: bool = False,
    trainable: Trainable | None = None,
) -> Params:
    """Independent standard normal numbers like the trained leaves of `params`: the noise of one step, the
    same whenever it is drawn.

    Leaf by leaf from NumPy's Philox4x64-10, keyed by 128 bits of the seed's SHA-256 and counted by step and
    trained leaf (in the order of their paths, so that frozen leaves change no number): no two steps or leaves
    share a number, a step repeated after a crash is the same release and not a second one, and no other
    random stream is read or advanced. They are drawn on the CPU, in at least float32, then moved.
    (`torch.Generator` on a CPU keeps 32 bits of its seed: noise that could be found by trying.)

    Whoever has the seed can subtract the noise: take `secrets.randbits(128)`, and keep it secret. The
    generator is not cryptographic, and floating-point normals are not exactly Gaussian (Mironov 2012,
    https://doi.org/10.1145/2382196.2382264): the guarantee is that of the idealised mechanism.

    Args:
        params: A tree of tensors; only their shapes, dtypes and devices are looked at.
        seed: Any integer.
        step: The number of the step, 0 to 2^64 - 1, each used once.
        adaptive: Whether the step's bound adapts (`AdaptiveNorm`): then there is one number more, for the
            count of unclipped samples; parameters that are no dict then give one, by dotted paths.
        trainable: That of the step: the other leaves get no noise.

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

    def draw(number: int, shape: torch.Size, dtype: torch.dtype) -> np.ndarray:
        # the lowest of the counter's four words count the numbers of a leaf
        counter = np.array([0, 0, step, number], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
        return generator.standard_normal(shape, dtype=np.float64 if dtype == torch.float64 else np.float32)

    leaves = dict(sorted(trained_leaves(params, trainable).items()))
    if adaptive:
        device = next(iter(leaves.values())).device
        leaves[COUNT] = torch.zeros((), dtype=torch.float32, device=device)
    # Leaves side by side, the largest first, which changes no number: NumPy lets other threads run meanwhile.
    numbered = sorted(enumerate(leaves), key=lambda pair: -leaves[pair[1]].numel())
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        drawn = {
            path: pool.submit(draw, number, leaves[path].shape, accumulation_dtype(leaves[path].dtype))
            for number, path in numbered
        }
    noise = {path: torch.as_tensor(drawn[path].result()).to(leaf.device) for path, leaf in leaves.items()}
    if not adaptive:
        return tree.select(params, noise)
    count = noise.pop(COUNT)
    rest = tree.select(params, noise) if isinstance(params, Mapping) else noise
    return {**rest, COUNT: count}


def add_noise(total: dict[str, Tensor], noise: dict[str, Tensor], std: float | Tensor) -> dict[str, Tensor]:
    """`total + std * noise`, in at least float32; a `std` that is the number 0 adds nothing."""
    if not isinstance(std, Tensor) and not std:
        return total
    return {path: leaf.to(noise[path].dtype) + std * noise[path] for path, leaf in total.items()}


def check_noise(noise: dict[str, Tensor], leaves: dict[str, Tensor], *, adaptive: bool = False) -> None:
    """Refuse noise of other leaves or other shapes: it would broadcast, and one number would hide nothing.

    Both are by dotted path; `leaves` are those that are trained.

    Raises:
        ValueError: a leaf is missing, or has another shape or less precision.
    """
    wanted = dict(leaves)
    if adaptive:
        wanted[COUNT] = torch.zeros((), dtype=torch.float32, device="meta")
    for path in {**wanted, **noise}:
        leaf, like = noise.get(path), wanted.get(path)
        got = None if leaf is None else (leaf.shape, leaf.dtype)
        need = None if like is None else (like.shape, accumulation_dtype(like.dtype))
        if got != need:
            raise ValueError(
                "noise must be like the parameters that are trained, in at least float32: "
                f"{path!r} must be {need}; got {got}. Try privacy.gaussian_noise(params, seed=, step="
                f"{', adaptive=True' if adaptive else ''}), with the trainable= of the step"
            )
