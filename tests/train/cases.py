"""Small networks and batches for the tests of training."""

from __future__ import annotations

import torch

import resnet_func as rf
from resnet_func.train import init_train_state

SIZE, CLASSES, BATCH = 8, 4, 6


def tiny(norm="batch"):
    return rf.build(
        rf.ResNetConfig(
            block="basic",
            depths=(1, 1),
            # 8 or more: oneDNN (torch 2.15, AVX2) writes out of bounds in the weight gradient of a strided
            # 1x1 convolution of fewer input channels in channels_last, which inductor chooses.
            widths=(8, 16),
            stem="cifar",
            norm=norm,
            norm_groups=2,
            num_classes=CLASSES,
        )
    )


def make_batch(seed=0, size=BATCH, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, SIZE, SIZE, generator=generator, dtype=dtype)
    return x, torch.randint(CLASSES, (size,), generator=generator)


def start(model, optimizer, *, ema=False, dtype=torch.float64):
    params, state = model.init(torch.Generator().manual_seed(1), dtype=dtype)
    return init_train_state(params, state, optimizer, ema=ema)


def linear(dtype: torch.dtype = torch.float64) -> rf.types.Model:
    """Logits `x @ weight + bias`, for questions that need no ResNet."""

    def init(generator, *, device=None, dtype=dtype):
        return {"weight": torch.zeros(3, 2, dtype=dtype), "bias": torch.zeros(2, dtype=dtype)}, {}

    def apply(params, state, x, *, train):
        return x @ params["weight"] + params["bias"], state

    return rf.types.Model(None, init, apply)
