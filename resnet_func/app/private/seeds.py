"""The secret seeds of a private run: drawn once, kept beside its checkpoint while it lasts, then removed."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import NamedTuple

from resnet_func import files
from resnet_func.app.storage.run_folder import SECRET_SEEDS, RunError, checkpoints

BITS = 128


class Seeds(NamedTuple):
    """Whoever has them can undo the noise."""

    noise: int
    sampling: int
    augmentation: int


def draw(insecure: int | None = None) -> Seeds:
    """New seeds: from the system's entropy, or, for tests, from a number that is no secret.

    >>> draw(insecure=0) == draw(insecure=0), draw() == draw()
    (True, False)
    """
    if insecure is None:
        return Seeds(*(secrets.randbits(BITS) for _ in Seeds._fields))
    digests = (hashlib.sha256(f"insecure {name} {insecure}".encode()).digest() for name in Seeds._fields)
    return Seeds(*(int.from_bytes(digest[: BITS // 8], "big") for digest in digests))


def keep(folder: Path, seeds: Seeds) -> None:
    """Write the seeds for their owner alone (mode 0600), durably: before the first step, which they decide.

    Raises:
        RunError: there are seeds already, or the disk refuses.
    """
    path = checkpoints(folder) / SECRET_SEEDS
    text = json.dumps({name: f"{value:032x}" for name, value in seeds._asdict().items()})
    try:
        # made with the mode, not given it afterwards: nobody else can open it in between
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        files.sync_folder(path.parent)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}. Choose another --run-dir") from error


def read(folder: Path) -> Seeds:
    """The seeds of a run that goes on.

    Raises:
        RunError: they are gone or damaged: without them a step repeated would be a second release.
    """
    path = checkpoints(folder) / SECRET_SEEDS
    try:
        found = json.loads(path.read_text())
        return Seeds(**{name: int(found[name], 16) for name in Seeds._fields})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"the secret seeds of this private run, {path}, are gone or damaged: a repeated step would draw "
            "other noise and spend its budget twice. Start a new run"
        ) from error


def forget(folder: Path) -> None:
    """Remove the seeds; where there are none, nothing happens."""
    path = checkpoints(folder) / SECRET_SEEDS
    path.unlink(missing_ok=True)
    files.sync_folder(path.parent)
