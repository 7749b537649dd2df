"""The files of a run: config.json, metrics.jsonl, the pictures; checkpoints lie in `checkpoints/`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Record = Mapping[str, float]


class RunError(Exception):
    """A run folder cannot be used as asked; the message is one line with the way out."""


def new(folder: Path | None, name: str) -> Path:
    """Make a run folder; without one given, the first free of runs/NAME, runs/NAME-2, ...

    Raises:
        RunError: the folder holds something already, or cannot be made.
    """
    if folder is None:
        candidates = (Path("runs") / (name if i == 1 else f"{name}-{i}") for i in range(1, 10_000))
        folder = next(path for path in candidates if not path.exists())
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunError(
                f"{folder} exists already. Go on with it by --resume {folder}, or choose another --run-dir"
            )
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"cannot make the run folder {folder}: {error.strerror}. Choose another --run-dir"
        ) from error
    return folder


def checkpoints(folder: Path) -> Path:
    """Where the run's checkpoints lie."""
    return folder / "checkpoints"


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.json in one piece."""
    _write(folder / "config.json", json.dumps(config, indent=2) + "\n")


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json holds.

    Raises:
        RunError: the folder is not a run's, or the file is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise RunError(
            f"{folder} is not a run folder: it has no config.json. Make one with: resnet-func train"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}. Restore it from a copy") from error
    if not isinstance(config, dict):
        raise RunError(f"{path} is damaged: it holds no object. Restore it from a copy")
    return config


def write_metrics(folder: Path, records: Sequence[Record]) -> None:
    """Write metrics.jsonl in one piece, an object a line."""
    _write(folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The objects of metrics.jsonl; none where there is no such file.

    Raises:
        RunError: a line is damaged.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}. Restore it from a copy, or start a new run") from error


def latest() -> Path:
    """The run folder below runs/ that was written last.

    Raises:
        RunError: there is none.
    """
    configs = sorted(Path("runs").glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    if not configs:
        raise RunError(
            "there is no run below runs/. Make one with: resnet-func train, or name one with --run-dir"
        )
    return configs[-1].parent


def _write(path: Path, text: str) -> None:
    # to a temporary file first, so that a crash or a full disk leaves the old one whole
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {error.strerror}. The old file, if any, is kept") from error
