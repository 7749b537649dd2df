"""Tables in Markdown, and what a result file says of its machine and of the command that made it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from parity import environment

NOT_WRITTEN = ("write", "results", "quick")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, an empty one after them.

    >>> table(["what", "ms"], [["a step", "5"]])
    ['| what | ms |', '|---|---|', '| a step | 5 |', '']
    """
    lines = [heads, ["---"] * len(heads), *rows]
    first, rule, *rest = ["| " + " | ".join(line) + " |" for line in lines]
    return [first, rule.replace(" ", ""), *rest, ""]


def interval(ratio: Mapping[str, float]) -> str:
    """A ratio's median and its 95 % interval.

    >>> interval({"median": 0.94, "low": 0.851, "high": 1.03})
    '0.94 (0.85-1.03)'
    """
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"


def machine_of(where: Mapping[str, Any]) -> str:
    """The machine's short name, as file names have it.

    >>> machine_of({"device": "cpu", "cpu": "AMD EPYC", "microarchitecture": "zen3", "cores": 2})
    'epyc-zen3-2c'
    """
    if str(where["device"]).startswith("cuda"):
        return environment.slug(where["gpu"])
    kind = where["microarchitecture"] or where["vector_extensions"]
    return environment.slug(f"{where['cpu']} {kind} {where['cores']}c")


def command_of(name: str, options: Mapping[str, Any], kind: type[Any]) -> str:
    """The command line that had these options: network and batch, and what differs from the defaults.

    Args:
        name: Of the command.
        options: As a result file has them.
        kind: The command's `Options`.
    """
    words: list[str] = []
    for field in fields(kind):
        value = options.get(field.name, field.default)
        value = tuple(value) if isinstance(value, list) else value
        if field.name in NOT_WRITTEN or (value == field.default and field.name not in ("model", "batch")):
            continue
        flag = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return f"uv run --extra bench python -m benchmarks {name} {shlex.join(words)}"
