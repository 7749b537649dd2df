"""The same step in JAX: `jit` of loss, gradient, SGD and moving average, on the same pytrees.

Buffers that a step replaces are donated to it, so nothing is copied that need not be.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from importlib import import_module, util
from typing import Any

import numpy as np
import torch

from benchmarks.forms.networks import Case
from benchmarks.forms.step import EMA_DECAY, LR, MOMENTUM, WEIGHT_DECAY, Setting, Spec, changes
from benchmarks.harness.measure import Outcome, Skipped, Variant
from resnet_func import tree

LAYOUTS = {"NCHW": "NCHW", "channels_last": "NHWC"}


def make_variant(spec: Spec, case: Case, setting: Setting) -> Variant:
    """The jitted training step, or the jitted inference, in float32.

    Raises:
        Skipped: JAX is not installed, or does not see the GPU that torch computes on.
    """
    if util.find_spec("jax") is None:
        raise Skipped("JAX is not installed; the extra `bench` has it")
    os.environ.setdefault("NPROC", str(torch.get_num_threads()))  # as many threads as torch; read once
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else it takes most of a GPU's memory
    jax = import_module("jax")
    if case.x.is_cuda and jax.default_backend() != "gpu":
        raise Skipped("JAX sees no GPU: its CUDA build is not installed")
    oracle = import_module("parity.sections.oracle_jax")
    layout = LAYOUTS[spec.layout]
    apply = partial(oracle.apply, case.model.config, layout=layout)
    x = case.x.cpu().numpy()
    x = jax.numpy.asarray(x.transpose(0, 2, 3, 1) if layout == "NHWC" else x)
    y = jax.numpy.asarray(case.y.cpu().numpy())
    params, state = (
        tree.map(lambda leaf: jax.numpy.array(leaf.detach().cpu().numpy()), part)
        for part in (case.params, case.state)
    )
    if setting.train:
        return _training(jax, apply, case, setting, (params, state, x, y))
    run = jax.jit(lambda params, state, x: apply(params, state, x, train=False)[0])
    logits: list[Any] = []

    def step() -> None:
        logits[:] = [run(params, state, x).block_until_ready()]

    return Variant(step, lambda: {"logits": _to_torch(logits[0])}, "fp32")


def _training(
    jax: Any, apply: Callable[..., Any], case: Case, setting: Setting, batch: tuple[Any, ...]
) -> Variant:
    params, state, x, y = batch
    momentum = tree.map(jax.numpy.zeros_like, params)
    averages = tree.map(jax.numpy.array, (params, state)) if setting.ema else ()
    carried = (params, state, momentum, averages)
    train_step = jax.jit(_make_step(jax, apply), donate_argnums=(0,))
    losses: list[Any] = []

    def step() -> None:
        nonlocal carried
        carried, loss = train_step(carried, x, y)
        losses[:] = [loss.block_until_ready()]

    def outcome() -> Outcome:
        now = tree.flatten(tree.map(_to_torch, carried[0]))
        start = {name: leaf.cpu() for name, leaf in tree.flatten(case.params).items()}
        return changes(_to_torch(losses[0]), now, start)

    return Variant(step, outcome, "fp32")


def _make_step(jax: Any, apply: Callable[..., Any]) -> Callable[..., Any]:
    def objective(params: Any, state: Any, x: Any, y: Any) -> Any:
        logits, state = apply(params, state, x, train=True)
        picked = jax.numpy.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1)
        return -picked.mean(), state

    def decayed(old: Any, new: Any) -> Any:
        if not jax.numpy.issubdtype(new.dtype, jax.numpy.floating):
            return new
        return old + (1 - EMA_DECAY) * (new - old)

    def step(carried: Any, x: Any, y: Any) -> Any:
        params, state, momentum, averages = carried
        (loss, state), grads = jax.value_and_grad(objective, has_aux=True)(params, state, x, y)
        grads = jax.tree.map(lambda g, p: g + WEIGHT_DECAY * p, grads, params)
        momentum = jax.tree.map(lambda m, g: MOMENTUM * m + g, momentum, grads)
        params = jax.tree.map(lambda p, g, m: p - LR * (g + MOMENTUM * m), params, grads, momentum)
        if averages:
            averages = jax.tree.map(decayed, averages, (params, state))
        return (params, state, momentum, averages), loss

    return step


def _to_torch(leaf: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(leaf))
