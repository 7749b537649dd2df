"""A device that is not here: one batch of everything, as shapes and devices without numbers.

A tensor left behind on the CPU shows: fake tensors refuse to mix devices as a GPU would. What only goes
forward is on "cuda". Autograd asks CUDA's driver for the device, so what goes backward is on "meta", which is
as far from the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import resnet_func as rf
from benchmarks.commands import per_sample as per_sample_benchmark
from benchmarks.forms import networks, variants
from benchmarks.forms.variants import Setting, Spec
from resnet_func import losses, optim, tree
from resnet_func.app import batches, data, inference, parts, recipes, runtime
from resnet_func.app.batches import Preparer
from resnet_func.app.experiment import Experiment
from resnet_func.app.tasks import make_task
from resnet_func.app.training_set import load_data
from resnet_func.models import winograd
from resnet_func.train import average_flips, init_train_state, make_train_step, to_memory_format
from tests.app.image_folder import make_image_folder

CUDA, META = torch.device("cuda", 0), torch.device("meta")
RECIPE = replace(recipes.FAST, epochs=2, batch_size=5, ema=0.9, cutout=2, microbatches=2, clip_norm=1.0)


class Generator(torch.Generator):
    """One that says it is on the device: a real one needs a driver."""

    device = META


def fake() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)  # constants, such as Winograd's maps, are real ones


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    with fake():
        yield CUDA


@pytest.fixture
def meta() -> Iterator[torch.device]:
    with fake():
        yield META


def assert_on(device: torch.device, *results: Any) -> None:
    leaves = [leaf for result in results for leaf in tree.leaves(result)]
    assert leaves
    assert {leaf.device for leaf in leaves} == {device}


@pytest.mark.parametrize("device", [CUDA, META], ids=str)
def test_what_stays_behind_is_seen(device: torch.device) -> None:
    real = torch.ones(3)
    with fake():
        for left_behind in (torch.ones(3), real):
            with pytest.raises(RuntimeError, match="device"):
                torch.ones(3, device=device) - left_behind


# --------------------------------------------------------------------------- the program


class Source:
    """Images of a real source's shape, without what is in them."""

    def __init__(self, real: Any) -> None:
        self.num_samples, self.image_shape = real.num_samples, real.image_shape
        self.classes = real.classes

    def read(self, picks: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for pick in picks:
            images = torch.zeros(len(pick), *self.image_shape, dtype=torch.uint8)
            yield images, torch.zeros(len(pick), dtype=torch.int64)


@pytest.fixture
def splits(tmp_path: Path) -> data.Splits:
    make_image_folder(tmp_path, train=6, test=3)
    return load_data(described(tmp_path))


def described(folder: Path) -> Experiment:
    return Experiment("folder", str(folder), 3, RECIPE)


def machine(device: torch.device) -> runtime.Runtime:
    here = runtime.configure(device="cpu", threads=1, precision="fp32", winograd="on", compile="off")
    return replace(here, device=device)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "muon"])
def test_train(optimizer: Any, splits: data.Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described_run = replace(described(tmp_path), recipe=replace(RECIPE, optimizer=optimizer))
    task, source = make_task(RECIPE, splits), Source(splits.train)
    monkeypatch.setattr(batches, "make_generator", lambda device, *seeds: Generator())
    with fake():
        model = winograd.wrap(rf.resnet20(num_classes=len(task.classes)))
        params, state = model.init(torch.Generator(), device=META)
        chosen = parts.make_optimizer(described_run.recipe, 10, params)
        train_state = init_train_state(to_memory_format(params, torch.channels_last), state, chosen, ema=True)
        loss = losses.smoothed_cross_entropy(0.1)
        step = make_train_step(model, loss, chosen, microbatches=2, ema_decay=0.9)
        prepare = Preparer(task, machine(META))
        x, y = next(iter(batches.train_batches(described_run, source, prepare, 0, 0)))
        after, metrics = step(train_state, x, y)
        assert_on(META, x, y, after.params, after.state, after.ema_params, after.ema_state, metrics)


def test_evaluate_and_predict(splits: data.Splits, tmp_path: Path) -> None:
    task, source = make_task(RECIPE, splits), Source(splits.test)
    with fake():
        model = winograd.wrap(rf.resnet20(num_classes=len(task.classes)))
        params, state = model.init(torch.Generator(), device=CUDA)
        trained = inference.Trained(average_flips(model), params, state, task, described(tmp_path))
        evaluation = inference.evaluate_trained(trained, source, machine(CUDA))
        assert evaluation.logits.shape == (source.num_samples, len(task.classes))
        image = torch.zeros(splits.test.image_shape, dtype=torch.uint8)
        logits = inference.predict(trained, [image, image], machine(CUDA))
        assert_on(torch.device("cpu"), evaluation.losses, evaluation.logits, evaluation.targets, logits)


# --------------------------------------------------------------------------- the library


def network(device: torch.device) -> tuple[Any, ...]:
    model = rf.resnet20(norm="group", num_classes=4)
    params, state = model.init(torch.Generator(), device=device)
    x, y = torch.zeros(3, 3, 16, 16, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    return model, params, state, x, y


TRANSFORMS: dict[str, Callable[[Any, Any], Callable[..., Any]]] = {
    "norms": rf.per_sample.norms,
    "layer_norms": rf.per_sample.layer_norms,
    "clipped_sum": lambda model, loss: rf.per_sample.clipped_sum(model, loss, max_norm=1.0),
    "grads": rf.per_sample.grads,
    "gram": lambda model, loss: (
        lambda params, state, *batch: rf.per_sample.gram(model, loss)(params, state, batch)
    ),
    "sketch": lambda model, loss: rf.per_sample.sketch(model, loss, dim=16, seed=0),
    "moments": rf.per_sample.moments,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_per_sample(name: str, meta: torch.device) -> None:
    model, *batch = network(meta)
    assert_on(meta, TRANSFORMS[name](model, losses.cross_entropy)(*batch))


@pytest.mark.parametrize("train", [False, True])
def test_winograd(train: bool, meta: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "cheapest_tile", lambda *_: 4)
    monkeypatch.setattr(winograd, "product_pays", lambda *_: True)
    model, params, state, x, _ = network(meta)

    def loss(params: Any) -> Tensor:
        return winograd.wrap(model).apply(params, state, x, train=train)[0].sum()

    assert_on(meta, torch.func.grad(loss)(params))


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon"])
def test_an_optimizer_with_a_schedule(name: str, meta: torch.device) -> None:
    _, params, *_ = network(meta)
    optimizer = optim.clipped(getattr(optim, name)(optim.one_cycle(0.1, 10)), 1.0)
    if name == "muon":
        optimizer = optim.partition(lambda path: path.endswith("conv1.weight"), optimizer, optim.sgd(0.1))
    assert_on(meta, optimizer.step(params, optimizer.init(params), params)[0])


# --------------------------------------------------------------------------- the benchmarks


FORMS = [
    (train, form)
    for train, forms in ((True, variants.TRAIN), (False, variants.INFERENCE))
    for form in forms
    if "compiled" not in form
]


@pytest.mark.parametrize("layout", variants.FORMATS)
@pytest.mark.parametrize(("train", "form"), FORMS)
def test_benchmark(train: bool, form: str, layout: str) -> None:
    device = META if train else CUDA
    with fake():
        case = networks.make_case(networks.TOY, 4, 16, device)
        variant = variants.make_variant(Spec(form, layout), case, Setting(train, train, "eager"))
        variant.step()
        assert_on(device, variant.outcome())


@pytest.mark.parametrize("name", ["norms", "grads", "clipped_sum", "clipped_sum, vmap"])
def test_benchmark_of_per_sample(name: str, meta: torch.device) -> None:
    case = networks.make_case(networks.TOY, 4, 16, meta, norm="group")
    results = per_sample_benchmark.make_function(name, case)(case.params, case.x, case.y)
    assert_on(meta, [result for result in results if result is not None])
