"""Every quick cell of the matrix and of the trajectories; and that a changed network is caught and named."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parity.cell import Cell, run
from parity.sections import bitwise, trajectory
from resnet_func.models import layers, zoo
from resnet_func.types import Params, State

CELLS = [*bitwise.cells(quick=True), *trajectory.cells(quick=True)]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.path)
def test_cell(cell: Cell) -> None:
    result = run(cell)
    assert result.outcome == "passed", result.said
    assert result.said.startswith("0 ULP in ")


def test_the_full_matrix_has_every_variant() -> None:
    variants = len(bitwise.DTYPES) * 2 * len(bitwise.FORMATS) * 2
    assert len(bitwise.cells(quick=False)) == len(zoo.ZOO) * variants


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_its_cells_say_so() -> None:
    result = run(next(cell for cell in bitwise.cells(quick=False) if cell.name.endswith("-cuda")))
    assert (result.outcome, result.said) == ("skipped", "no CUDA device here")


def test_one_bit_in_one_buffer_is_caught_and_named() -> None:
    batch_norm = layers.batch_norm

    def biased(params: Params, state: State, x: Tensor, *, train: bool) -> tuple[Tensor, State]:
        y, after = batch_norm(params, state, x, train=train)
        wrong = after["running_var"].clone()
        wrong[0] = torch.nextafter(wrong[0], torch.tensor(0.0))
        return y, {**after, "running_var": wrong}

    with mock.patch.object(layers, "batch_norm", biased):
        result = run(Cell("bitwise", "m", partial(bitwise.check, "resnet20", "fp32", "train", "nchw", "cpu")))
    assert result.outcome == "failed"
    assert "leaves differ; worst buffer " in result.said
    assert "running_var: 1 of " in result.said
    assert "by up to 1 ULP" in result.said


def test_the_padding_of_one_convolution_is_caught_and_named() -> None:
    conv2d, wrong = layers.conv2d, []

    def reflecting(spec: layers.Conv, params: Params, x: Tensor) -> Tensor:
        if wrong or (spec.c_in, spec.c_out) != (64, 64):
            return conv2d(spec, params, x)
        wrong.append("layer3.0.conv2")  # the first of this width
        padded = F.pad(x, [spec.padding] * 4, mode="reflect")
        return conv2d(replace(spec, padding=0), params, padded)

    with mock.patch.object(layers, "conv2d", reflecting):
        cell = Cell("bitwise", "m", partial(bitwise.check, "resnet20", "fp64", "train", "nchw", "cpu"))
        result = run(cell)
    assert wrong
    assert result.outcome == "failed"
    assert "leaves differ; worst " in result.said
    assert result.command == "python -m parity --only bitwise/m"
