"""Variants of one computation: the first call of each, the check that they agree, and the timing."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.benchmark import Timer

from benchmarks.harness.statistics import Rule, Seconds, interleave, until_steady

Step = Callable[[], Any]
Outcome = Mapping[str, Tensor]

progress = Console(stderr=True, highlight=False, soft_wrap=True)


class Variant(NamedTuple):
    """One way to do the work.

    Args:
        step: What is timed. It may carry a state on from call to call.
        outcome: What came of the calls so far, by name: what must agree between variants.
        dtype: Its precision, "fp32" or "bf16", which excuses some distance to the baseline's outcome.
    """

    step: Step
    outcome: Callable[[], Outcome]
    dtype: str = "fp32"


class Skipped(Exception):  # noqa: N818
    """A variant cannot run here; the message says why."""


class Prepared(NamedTuple):
    """Variants that agree, ready to be timed; `first_call`: seconds to make and compile each, and a step."""

    steps: dict[str, Step]
    first_call: dict[str, float]
    skipped: dict[str, str]


class Disagreement(RuntimeError):  # noqa: N818
    """A variant computes something else: nothing is comparable, so nothing is timed."""


def prepare(
    makers: Mapping[str, Callable[[], Variant]], baseline: str, allowed: Callable[[str], Mapping[str, float]]
) -> Prepared:
    """Make every variant, call it once, and check its outcome against the baseline's.

    Args:
        makers: Variants by name; one that raises `Skipped` is left out with its reason.
        baseline: The name the others are held against.
        allowed: Of a precision: the relative distance to the baseline that it excuses, by the outcome's name.

    Raises:
        Disagreement: an outcome is further from the baseline's than the variant's precision excuses.
    """
    ready = Prepared({}, {}, {})
    names = [baseline, *(name for name in makers if name != baseline)]
    reference: Outcome = {}
    for name in names:
        start = time.perf_counter()
        try:
            variant = makers[name]()
        except Skipped as reason:
            ready.skipped[name] = str(reason)
            progress.print(f"{name}: left out, {reason}")
            continue
        variant.step()
        synchronize()
        ready.first_call[name] = time.perf_counter() - start
        outcome = {key: leaf.detach().clone() for key, leaf in variant.outcome().items()}
        reference = reference or outcome
        check(name, outcome, reference, allowed(variant.dtype))
        ready.steps[name] = variant.step
        progress.print(f"{name}: first call {ready.first_call[name]:.1f} s")
    return Prepared({name: ready.steps[name] for name in makers if name in ready.steps}, *ready[1:])


def check(name: str, got: Outcome, want: Outcome, allowed: Mapping[str, float]) -> None:
    """Raise `Disagreement` unless the outcomes are within the `allowed` distances, entry by entry."""
    for key, expected in want.items():
        error = relative_distance(got[key], expected)
        if not error <= allowed[key]:  # NaN is a disagreement too
            raise Disagreement(
                f"{name} computes another {key}: relative distance {error:.2g}, allowed {allowed[key]:.2g}; "
                "nothing is timed"
            )


def relative_distance(got: Tensor, want: Tensor) -> float:
    """`|got - want| / |want|` in float64, by Euclidean norms."""
    want = want.double().cpu()
    return float((got.double().cpu() - want).norm() / want.norm().clamp(min=1e-30))


def time_steps(
    steps: Mapping[str, Step], baseline: str, rule: Rule, *, threads: int, turn_seconds: float = 0.1
) -> Seconds:
    """Seconds a step of every variant, round by round, interleaved until the rule is met.

    Args:
        steps: From `prepare`: each has been called before.
        baseline: The variant whose ratios the rule looks at.
        rule: When to stop.
        threads: Inside one operation, on the CPU.
        turn_seconds: A turn is a step to warm up and as many as fill this time.
    """
    timers = {
        name: Timer("step()", globals={"step": step}, num_threads=threads) for name, step in steps.items()
    }
    for step in steps.values():  # a second call still finds caches and heuristics cold
        step()
    gc.collect()

    def turn(name: str) -> float:
        return timers[name].blocked_autorange(min_run_time=turn_seconds).mean

    seconds = interleave(list(steps), rule.most, turn, until_steady(rule, baseline))
    progress.print(f"timed {len(seconds[baseline])} rounds of {len(steps)} variants")
    return seconds


def compile_seconds(first_call: Mapping[str, float], seconds: Seconds) -> dict[str, float]:
    """What the first call of every compiled variant took beyond an ordinary one."""
    names = [name for name in seconds if "compiled" in name or "jit" in name]
    return {name: first_call[name] - min(seconds[name]) for name in names}


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
