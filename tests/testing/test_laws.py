"""Every law holds for networks of many kinds, and each is broken by a network that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import resnet_func as rf
from resnet_func import testing
from resnet_func.testing import LAWS, check_laws, randn
from resnet_func.types import Model, Params, State

ALL = [name for name in LAWS if name != "compiled"]
X = randn(3, 4, seed=0)


def outcomes(results: list[testing.LawResult]) -> dict[str, str]:
    return {result.law: result.outcome for result in results}


@settings(max_examples=8)
@given(testing.models(), testing.batches())
def test_our_networks_keep_the_laws(network: testing.Network, batch: testing.Batch) -> None:
    results = check_laws(*network, [batch.x, tuple(batch)])
    assert outcomes(results) == dict.fromkeys(ALL, "passed")


@settings(max_examples=10)
@given(testing.modules(layers=testing.strategies.st.integers(1, 2)))
def test_modules_of_every_layer_keep_the_laws(made: testing.GeneratedModule) -> None:
    model, params, state = rf.from_module(made.module)
    # torch.func's second derivative of torch._weight_norm is not symmetric (seen with torch 2.15)
    laws = [name for name in ALL if name != "second-order" or "weight_norm" not in repr(made)]
    found = outcomes(check_laws(model, params, state, [made.x], laws=laws))
    assert set(found.values()) <= {"passed", "skipped"}
    skipped = {name for name, outcome in found.items() if outcome == "skipped"}
    assert skipped <= {"nan-stays", "adjoint"}  # tokens have no NaN, weight_norm no forward mode


# --------------------------------------------------------------------------- what breaks them


def linear(change: Callable[[Tensor, Tensor, State, bool], Any]) -> tuple[Model, Params, State]:
    """A linear network whose output, or output and state, `change(y, x, state, train)` makes."""

    def apply(params: Params, state: State, x: Tensor, *, train: bool) -> tuple[Any, State]:
        made = change(torch.tanh(x @ params["weight"]), x, state, train)
        return made if isinstance(made, tuple) else (made, state)

    def init(
        source: torch.Generator, *, device: Any = None, dtype: Any = torch.float32
    ) -> tuple[Params, State]:
        return (
            {"weight": torch.empty(4, 2, device=device, dtype=dtype)},
            {"mean": torch.empty(2, device=device, dtype=dtype)},
        )

    params, state = {"weight": randn(4, 2, seed=1)}, {"mean": randn(2, seed=2)}
    return Model(None, init, apply), params, state


def mutates(y: Tensor, x: Tensor, state: State, train: bool) -> Tensor:
    x.mul_(1.5)
    return y


def counts(y: Tensor, x: Tensor, state: State, train: bool) -> Tensor:
    CALLS.append(1)
    return y + len(CALLS)


def moves_statistics(y: Tensor, x: Tensor, state: State, train: bool) -> tuple[Tensor, State]:
    return y, {"mean": state["mean"] + 1}


class Straight(torch.autograd.Function):
    """A gradient that is not the derivative."""

    @staticmethod
    def forward(y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # type: ignore[override]
        return tangent.clone()

    @staticmethod
    def vmap(info: Any, dims: Any, y: Tensor) -> Any:
        return Straight.apply(y), dims[0]


CALLS: list[int] = []
BROKEN: dict[str, tuple[str, Callable[[Tensor, Tensor, State, bool], Any], str]] = {
    "mutation": ("purity", mutates, "evaluation: an input was mutated: .* 2: "),
    "random": ("purity", lambda y, x, s, t: y + torch.rand(()), "the global random generator was used"),
    "alias": ("purity", lambda y, x, s, t: x[:, :2], "output 0 shares memory with input 2"),
    "history": ("determinism", counts, "1 of 1 leaves differ; worst leaf"),
    "statistics": ("evaluation-state", moves_statistics, "worst mean: 2 of 2 entries"),
    "half": (
        "dtype",
        lambda y, x, s, t: y.half(),
        "leaf is torch.float16 where all that goes in",
    ),
    "position": ("batch-order", lambda y, x, s, t: y * torch.arange(len(y))[:, None], "the output is off by"),
    "mean": ("batch-of-one", lambda y, x, s, t: y - y.mean(0), "the output is off by"),
    "chunk": ("chunks", lambda y, x, s, t: y / len(y), "the output is off by"),
    "item": ("vmap", lambda y, x, s, t: y * float(y.sum()), "RuntimeError"),
    "largest": ("nan-stays", lambda y, x, s, t: y / y.abs().max(), "the output is off by nan"),
    "storage": ("layout", lambda y, x, s, t: y * x.stride(0), "the output is off by"),
    "leak": ("per-sample-sum", lambda y, x, s, t: y * y.sum(), "weight is off by"),
    "backward": ("adjoint", lambda y, x, s, t: Straight.apply(y), "apart, allowed"),
}


@pytest.mark.parametrize(("law", "change", "said"), BROKEN.values(), ids=BROKEN)
def test_a_law_that_is_broken_is_named_with_what_failed(law: str, change: Any, said: str) -> None:
    network = linear(change)
    (result,) = check_laws(*network, [X.clone()], laws=[law], raise_on_failure=False)
    assert result.outcome == "failed", result
    assert "\n" not in result.said
    with pytest.raises(AssertionError, match=rf"^1 of 1 laws are broken\n{law}: .*{said}"):
        check_laws(*network, [X.clone()], laws=[law])


def test_the_sound_network_breaks_none() -> None:
    """So that what breaks above is the change."""
    results = check_laws(*linear(lambda y, x, s, t: y), [X], raise_on_failure=False)
    assert outcomes(results) == dict.fromkeys(ALL, "passed")


def test_hidden_batch_statistics_are_found() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))
    found = outcomes(check_laws(*rf.from_module(module), [X], raise_on_failure=False))
    assert {name for name, outcome in found.items() if outcome == "failed"} == {
        "batch-of-one",
        "chunks",
        "vmap",
        "nan-stays",
        "per-sample-sum",
    }


def test_an_asymmetric_second_derivative_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Skewed(torch.autograd.Function):
        """The derivative, whose own derivative is wrong."""

        @staticmethod
        def forward(g: Tensor, y: Tensor) -> Tensor:
            return g * 2 * y

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
            g, y = ctx.saved_tensors
            return grad * 2 * y, grad.flip(1) * 2 * g * y

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(y: Tensor) -> Tensor:
            return y * y

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
            return Skewed.apply(grad, *ctx.saved_tensors)

    network = linear(lambda y, x, s, t: Square.apply(y))
    (result,) = check_laws(*network, [X], laws=["second-order"], raise_on_failure=False)
    assert result.outcome == "failed"


# --------------------------------------------------------------------------- what is asked, and cannot be


def test_tokens_have_no_nan_and_one_sample_no_others() -> None:
    module = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2))
    laws = ["nan-stays", "batch-of-one", "vmap"]
    results = check_laws(*rf.from_module(module), [torch.tensor([[1, 4], [0, 2]])], laws=laws)
    assert [result.outcome for result in results] == ["skipped", "passed", "passed"]
    one = check_laws(*rf.from_module(module), [torch.tensor([[1, 4]])], laws=laws)
    assert [result.outcome for result in one] == ["skipped", "skipped", "passed"]
    assert one[1].said == "one sample: give batches of two or more"


def test_a_network_of_one_precision_says_so() -> None:
    single = randn(4, 2, seed=3)
    results = check_laws(*linear(lambda y, x, s, t: x @ single), [X], raise_on_failure=False)
    found = {result.law: result for result in results}
    assert found["dtype"].outcome == "failed"
    assert found["batch-of-one"].said.startswith("not computed in float64: expected m")


def test_the_batch_that_breaks_a_law_is_named() -> None:
    network = linear(lambda y, x, s, t: y - y.mean(0) if len(y) == 3 else y)
    with pytest.raises(AssertionError, match="batch-of-one: batch 1: the output is off by"):
        check_laws(*network, [X[:2], X], laws=["batch-of-one"])


def test_mistakes_are_one_line() -> None:
    network = linear(lambda y, x, s, t: y)
    with pytest.raises(ValueError, match="no law is called puritry; there are purity, "):
        check_laws(*network, [X], laws=["puritry"])
    with pytest.raises(ValueError, match="expected at least one batch; got none"):
        check_laws(*network, [])
