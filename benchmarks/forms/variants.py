"""The same step written every way: module and function, eager and compiled, in each layout and precision.

A training step is forward, backward, SGD with Nesterov momentum and weight decay and, if asked for, the
moving average of parameters and running statistics. Every variant does all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.forms.networks import Case, make_module
from benchmarks.forms.step import (
    AGAIN,
    BASELINE,
    EMA_DECAY,
    FORMATS,
    JAX,
    LR,
    MOMENTUM,
    WEIGHT_DECAY,
    Setting,
    Spec,
    changes,
    make_optimizer,
)
from benchmarks.harness.conditions import compiled
from benchmarks.harness.measure import Outcome, Skipped, Variant
from resnet_func import optim, tree
from resnet_func.app import runtime
from resnet_func.losses import cross_entropy
from resnet_func.models import winograd
from resnet_func.train import autocast, init_train_state, make_train_step, to_memory_format
from resnet_func.types import Params, State, TrainState


def make_variant(spec: Spec, case: Case, setting: Setting) -> Variant:
    """The variant of that form.

    Raises:
        Skipped: it cannot run here.
    """
    if "compiled" in spec.form and (obstacle := runtime.compile_obstacle(case.x.device)):
        raise Skipped(obstacle)
    if spec.form == JAX and case.model.config is None:
        raise Skipped("in JAX there are the zoo's networks only")
    if spec.form == JAX:
        from benchmarks.forms import jax_step  # not everybody has JAX

        return jax_step.make_variant(spec, case, setting)
    case = case._replace(
        params=to_memory_format(case.params, FORMATS[spec.layout]),
        x=case.x.contiguous(memory_format=FORMATS[spec.layout]),
    )
    forms = TRAIN if setting.train else INFERENCE
    return forms[spec.form](spec, case, setting)


def _precision(spec: Spec, case: Case) -> AbstractContextManager[Any]:
    return torch.autocast(case.x.device.type, torch.bfloat16) if spec.dtype == "bf16" else nullcontext()


def _functional(spec: Spec, case: Case) -> Any:
    model = winograd.wrap(case.model) if "Winograd" in spec.form else case.model
    return autocast(model, case.x.device.type, torch.bfloat16) if spec.dtype == "bf16" else model


# --------------------------------------------------------------------------- training, modules


def _module_training(spec: Spec, case: Case, setting: Setting) -> Variant:
    module = make_module(case).train()
    start = {name: leaf.detach().clone() for name, leaf in module.named_parameters()}
    forward = compiled(module, setting.backend) if "compiled" in spec.form else module
    optimizer = torch.optim.SGD(
        module.parameters(), LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    averaged = _average_of(module) if setting.ema else None
    losses: list[Tensor] = []

    def step() -> None:
        optimizer.zero_grad()
        with _precision(spec, case):
            logits = forward(case.x)
        loss = nn.functional.cross_entropy(logits.float(), case.y)
        loss.backward()
        optimizer.step()
        if averaged is not None:
            averaged.update_parameters(module)
        losses[:] = [loss.detach()]

    return Variant(step, lambda: changes(losses[0], dict(module.named_parameters()), start), spec.dtype)


def _average_of(module: nn.Module) -> AveragedModel:
    averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY), use_buffers=True)
    averaged.update_parameters(module)  # the first call only copies
    return averaged


# --------------------------------------------------------------------------- training, functions


def _whole_step(spec: Spec, case: Case, setting: Setting) -> Variant:
    """The library's own step; where compiled, as one graph."""
    decay = EMA_DECAY if setting.ema else None
    train_step = make_train_step(_functional(spec, case), cross_entropy, make_optimizer(), ema_decay=decay)
    if "compiled" in spec.form:
        graphs = "CUDA graphs" in spec.form
        train_step = compiled(train_step, setting.backend, "reduce-overhead" if graphs else None)
    return _functional_training(train_step, spec, case, setting)


def _gradient_compiled(spec: Spec, case: Case, setting: Setting) -> Variant:
    """Forward and backward as one graph; optimizer and moving average eager."""
    model, optimizer = _functional(spec, case), make_optimizer()

    def objective(params: Params, state: State, x: Tensor, y: Tensor) -> tuple[Tensor, State]:
        logits, state = model.apply(params, state, x, train=True)
        return cross_entropy(logits, y).mean(), state

    gradient = compiled(torch.func.grad_and_value(objective, has_aux=True), setting.backend)

    def train_step(train_state: TrainState, x: Tensor, y: Tensor) -> tuple[TrainState, Any]:
        grads, (loss, state) = gradient(train_state.params, train_state.state, x, y)
        params, opt_state = optimizer.step(grads, train_state.opt_state, train_state.params)
        averages = (train_state.ema_params, train_state.ema_state)
        if train_state.ema_params:
            averages = (
                optim.ema(train_state.ema_params, params, EMA_DECAY),
                optim.ema(train_state.ema_state, state, EMA_DECAY),
            )
        return TrainState(params, state, opt_state, *averages), {"loss": loss}

    return _functional_training(train_step, spec, case, setting)


def _functional_training(train_step: Callable[..., Any], spec: Spec, case: Case, setting: Setting) -> Variant:
    train_state = init_train_state(case.params, case.state, make_optimizer(), ema=setting.ema)
    losses: list[Tensor] = []

    def step() -> None:
        nonlocal train_state
        train_state, metrics = train_step(train_state, case.x, case.y)
        if "CUDA graphs" in spec.form:  # what a graph returns is memory that its next replay overwrites
            train_state, metrics = tree.map(torch.clone, (train_state, metrics))
        losses[:] = [metrics["loss"]]

    def outcome() -> Outcome:
        return changes(losses[0], tree.flatten(train_state.params), tree.flatten(case.params))

    return Variant(step, outcome, spec.dtype)


# --------------------------------------------------------------------------- inference


def _module_inference(spec: Spec, case: Case, setting: Setting) -> Variant:
    module = make_module(case).eval()
    forward = compiled(module, setting.backend) if "compiled" in spec.form else module

    def run() -> Tensor:
        with _precision(spec, case):
            return forward(case.x).float()

    return _inference(run, spec, case)


def _functional_inference(spec: Spec, case: Case, setting: Setting) -> Variant:
    model = _functional(spec, case)

    def forward(params: Params, state: State, x: Tensor) -> Tensor:
        return model.apply(params, state, x, train=False)[0]

    if "compiled" in spec.form:
        mode = "reduce-overhead" if "CUDA graphs" in spec.form else None
        forward = compiled(forward, setting.backend, mode)
    return _inference(lambda: forward(case.params, case.state, case.x), spec, case)


def _inference(run: Callable[[], Tensor], spec: Spec, case: Case) -> Variant:
    logits: list[Tensor] = []

    def step() -> None:
        with torch.inference_mode():
            logits[:] = [run()]

    return Variant(step, lambda: {"logits": logits[0]}, spec.dtype)


# --------------------------------------------------------------------------- names

TRAIN: dict[str, Callable[[Spec, Case, Setting], Variant]] = {
    BASELINE.form: _module_training,
    AGAIN.form: _module_training,
    "module compiled": _module_training,
    "function eager": _whole_step,
    "function eager, Winograd": _whole_step,
    "function, gradient compiled": _gradient_compiled,
    "function, step compiled": _whole_step,
    "function, step compiled, Winograd": _whole_step,
    "function, step compiled, CUDA graphs": _whole_step,
}
INFERENCE: dict[str, Callable[[Spec, Case, Setting], Variant]] = {
    BASELINE.form: _module_inference,
    AGAIN.form: _module_inference,
    "module compiled": _module_inference,
    "function eager": _functional_inference,
    "function eager, Winograd": _functional_inference,
    "function compiled": _functional_inference,
    "function compiled, Winograd": _functional_inference,
    "function compiled, CUDA graphs": _functional_inference,
}


def specs(
    *, train: bool, layouts: tuple[str, ...], dtypes: tuple[str, ...], device: str, without: tuple[str, ...]
) -> list[Spec]:
    """Every row that was asked for, the baseline and its repetition first.

    Raises:
        ValueError: a word of `without` is in no row's name.
    """
    forms = [form for form in (*(TRAIN if train else INFERENCE), JAX) if form != AGAIN.form]
    elsewhere = "Winograd" if device.startswith("cuda") else "CUDA"  # cuDNN has such kernels of its own
    forms = [form for form in forms if elsewhere not in form]
    rows = [Spec(form, layout, dtype) for dtype in dtypes for form in forms for layout in layouts]
    rows = [row for row in rows if row.dtype == "fp32" or not (row.form == JAX or "Winograd" in row.form)]
    for word in without:
        if not any(word.lower() in row.name.lower() for row in rows):
            raise ValueError(f"--without {word!r} is in no variant's name; there are {_listed(rows)}")
    kept = [row for row in rows if not any(word.lower() in row.name.lower() for word in without)]
    return [BASELINE, AGAIN, *(row for row in kept if row != BASELINE)]


def _listed(rows: list[Spec]) -> str:
    return "; ".join(row.name for row in rows)
