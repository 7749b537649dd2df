"""Which leaves are trained: of any tree, numbers with a fraction alone, and by what each is called."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import resnet_func as rf
from resnet_func import losses, optim, tree
from resnet_func.testing import generator
from resnet_func.train.trainable import check_opt_state, select_trained, trained_leaves


class Layer(NamedTuple):
    weight: Tensor
    bias: Tensor


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(sum(shape)), dtype=torch.float64)


W, B = draw(3, 2), draw(2)
# parameters, the network, and the paths of weight and bias
TREES: dict[str, tuple[Any, Callable[[Any, Tensor], Tensor], tuple[str, str]]] = {
    "flat, with dotted names": (
        {"fc.weight": W, "fc.bias": B},
        lambda p, x: x @ p["fc.weight"] + p["fc.bias"],
        ("fc.weight", "fc.bias"),
    ),
    "a list": ([W, B], lambda p, x: x @ p[0] + p[1], ("0", "1")),
    "a tuple in a list": ([(W,), {"b": B}], lambda p, x: x @ p[0][0] + p[1]["b"], ("0.0", "1.b")),
    "a named tuple": (Layer(W, B), lambda p, x: x @ p.weight + p.bias, ("weight", "bias")),
    "an ordered dict": (OrderedDict(w=W, b=B), lambda p, x: x @ p["w"] + p["b"], ("w", "b")),
    "with None": (
        {"w": W, "none": None, "b": [None, B]},
        lambda p, x: x @ p["w"] + (p["none"] or 0) + p["b"][1],
        ("w", "b.1"),
    ),
    "with a counter": (
        {"w": W, "calls": torch.tensor(1), "b": B},
        lambda p, x: (x @ p["w"] + p["b"]) * p["calls"],
        ("w", "b"),
    ),
    "with an empty branch": (
        {"relu": {}, "w": W, "b": B},
        lambda p, x: x @ p["w"] + p["b"] + len(p["relu"]),
        ("w", "b"),
    ),
}
X, Y = draw(5, 3), torch.tensor([0, 1, 1, 0, 1])


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("only_bias", [False, True], ids=["all", "bias"])
def test_a_step_takes_any_tree(name: str, only_bias: bool) -> None:
    """The numbers are those of nested dicts, and the tree comes back as it was."""
    params, network, (weight, bias) = TREES[name]
    optimizer = optim.adamw(0.1, weight_decay=0.1)
    trainable = (lambda path: path == bias) if only_bias else None
    model = rf.from_function(network)
    begin = rf.train.init_train_state(params, {}, optimizer, ema=True, trainable=trainable)
    step = rf.train.make_train_step(
        model, losses.cross_entropy, optimizer, ema_decay=0.9, trainable=trainable, microbatches=2
    )
    plain = rf.from_function(lambda p, x: x @ p["w"] + p["b"])
    nested_trainable = (lambda path: path == "b") if only_bias else None
    nested_begin = rf.train.init_train_state(
        {"w": W, "b": B}, {}, optimizer, ema=True, trainable=nested_trainable
    )
    nested = rf.train.make_train_step(
        plain, losses.cross_entropy, optimizer, ema_decay=0.9, trainable=nested_trainable, microbatches=2
    )
    got, _ = step(begin, X, Y)
    want, _ = nested(nested_begin, X, Y)
    for field in ("params", "ema_params"):
        flat, expected = tree.flatten(getattr(got, field)), getattr(want, field)
        torch.testing.assert_close(flat[weight], expected["w"], rtol=1e-14, atol=0)
        torch.testing.assert_close(flat[bias], expected["b"], rtol=1e-14, atol=0)
        assert list(flat) == list(tree.flatten(params))
    assert type(got.params) is type(params)


def test_what_cannot_be_trained_is_told_in_one_line() -> None:
    with pytest.raises(ValueError, match="'fc.scale' is a float. Try torch.as_tensor"):
        trained_leaves({"fc": {"scale": 1.0}})
    with pytest.raises(ValueError, match="'w' is complex, and cannot be trained here"):
        trained_leaves({"w": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="selects no leaf of floating-point numbers; the leaves are n"):
        trained_leaves({"n": torch.tensor(1)})
    with pytest.raises(ValueError, match="two leaves have the path 'a.b'"):
        trained_leaves({"a.b": W, "a": {"b": B}})
    frozen = {"w": torch.zeros(2, dtype=torch.complex64), "b": B}
    assert list(trained_leaves(frozen, lambda path: path == "b")) == ["b"]


def test_all_leaves_are_the_very_tree() -> None:
    params = {"w": W, "none": None}
    assert select_trained(params, trained_leaves(params)) is params
    counted = [W, torch.tensor(1)]
    assert select_trained(counted, trained_leaves(counted))[1] is None


def test_a_state_of_other_leaves_is_refused() -> None:
    with pytest.raises(ValueError, match="holds '1', which trainable refuses"):
        check_opt_state(([W, B],), [W, B], [W, None])
