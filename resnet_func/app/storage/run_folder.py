"""The files of a run: config.json, metrics.jsonl, the pictures; checkpoints lie in `checkpoints/`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from resnet_func import files
from resnet_func.app.errors import AppError
from resnet_func.app.experiment import Experiment, Task
from resnet_func.app.storage.typed_json import FieldError, UnlikeFieldsError, from_json

Record = Mapping[str, float]
LAUNCH = "launch.txt"  # by which torchrun a run is being trained
SECRET_SEEDS = "secret-seeds.json"  # of a private run, beside its checkpoints


class RunError(AppError):
    """A run folder cannot be used as asked; the message is one line with the way out."""


# --------------------------------------------------------------------------- folders


@contextmanager
def new(folder: Path | None, name: str) -> Iterator[Path]:
    """Make a run folder, which no other run gets; one that holds no checkpoint in the end is removed again.

    Args:
        folder: The folder, absent or empty; None is the first free of runs/NAME, runs/NAME-2, ...
        name: See `folder`.

    Raises:
        RunError: the folder holds something already, or cannot be made.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as parent, new(Path(parent) / "run", "digits") as folder:
    ...     checkpoints(folder).is_dir()
    True
    """
    free_names = (Path("runs") / (name if i == 1 else f"{name}-{i}") for i in count(1))
    for path in [folder] if folder else free_names:
        absent = [place for place in (path, *path.parents) if not place.exists()]
        if _claim(path):
            break
    else:
        raise RunError(
            f"{folder} exists already. Go on with it by --resume {folder}, or choose another --run-dir"
        )
    try:
        yield path
    except BaseException:
        if not any(_has_checkpoint(path, which) for which in ("best", "last")):
            for file in (path / "config.json", path / LAUNCH, checkpoints(path) / SECRET_SEEDS):
                file.unlink(missing_ok=True)
            for place in (checkpoints(path), *absent):
                with suppress(OSError):  # not empty: it has become another's
                    place.rmdir()
        raise


def _claim(folder: Path) -> bool:
    """Make the folder, or take an empty one; False where it is taken."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            return False
        checkpoints(folder).mkdir()  # fails where it exists: of two runs at once, one gets the folder
    except (FileExistsError, FileNotFoundError):  # taken, or removed by the run that had it
        return False
    except OSError as error:
        raise RunError(
            f"cannot make the run folder {folder}: {error.strerror}. Choose another --run-dir"
        ) from error
    return True


def checkpoints(folder: Path) -> Path:
    """Where the run's checkpoints lie.

    >>> str(checkpoints(Path("runs/digits-resnet20")))
    'runs/digits-resnet20/checkpoints'
    """
    return folder / "checkpoints"


def latest() -> Path:
    """The run below runs/ that was begun last, of those that have a checkpoint.

    Raises:
        RunError: there is none.
    """
    configs = [path for path in Path("runs").glob("*/config.json") if _has_checkpoint(path.parent, "last")]
    if not configs:
        raise RunError(
            "there is no run with a checkpoint below runs/. Make one with: resnet-func train, "
            "or name the folder of one"
        )
    return max(configs, key=lambda path: path.stat().st_mtime).parent


def mark_launch(folder: Path, launch: str) -> None:
    """Note which launch trains the run: the next start of that launch goes on with it.

    Raises:
        RunError: the disk refuses.
    """
    _write(folder / LAUNCH, launch + "\n")


def find_launch(launch: str, folder: Path | None) -> Path | None:
    """The run that a launch began last, without the temporary files that it may have left.

    Args:
        launch: Its name, as `mark_launch` was told.
        folder: The only one to look at; None looks at all below runs/.

    Returns:
        The run folder, with or without a checkpoint; None if there is none.
    """
    marks = [path / LAUNCH for path in ([folder] if folder else Path("runs").glob("*"))]
    own = [mark for mark in marks if mark.is_file() and mark.read_bytes().strip() == launch.encode()]
    if not own:
        return None
    path = max(own, key=lambda mark: mark.stat().st_mtime_ns).parent
    remove_leftovers(path)
    return path


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes that were killed; only where nobody writes to the run."""
    for left in [*folder.glob("*.tmp"), *checkpoints(folder).glob("*.tmp")]:
        if left.is_file():
            left.unlink(missing_ok=True)


def can_resume(folder: Path) -> bool:
    """Whether a run has a checkpoint to go on from.

    >>> can_resume(Path("no such run"))
    False
    """
    return _has_checkpoint(folder, "last")


def forget_launch(folder: Path) -> None:
    """Remove the mark of `mark_launch`: the run was stopped on purpose."""
    (folder / LAUNCH).unlink(missing_ok=True)


def _has_checkpoint(folder: Path, which: str) -> bool:
    from resnet_func.app.storage import checkpoint  # imports torch, which a refused option does not wait for

    return checkpoint.exists(checkpoints(folder), which)


def snapshots(folder: Path) -> list[str]:
    """The names of the checkpoints that a run kept of earlier epochs, the first first.

    >>> snapshots(Path("no such run"))
    []
    """
    paths = checkpoints(folder).glob("epoch-*.json")
    names = {path.name.removesuffix(".json").removesuffix(".previous") for path in paths}
    numbered = [name for name in names if name.removeprefix("epoch-").isdecimal()]  # others are not ours
    return sorted(numbered, key=lambda name: int(name.removeprefix("epoch-")))


# --------------------------------------------------------------------------- files


def write_config(
    folder: Path, experiment: Experiment, task: Task, machine: Mapping[str, Any] | None = None
) -> None:
    """Write config.json: enough to resume, evaluate and predict.

    `machine` is what the run chose by itself on its machine, in JSON's types: see `read_machine`.

    Raises:
        RunError: the disk refuses; the old file, if any, is kept.
    """
    config = {"experiment": asdict(experiment), "task": task._asdict(), "machine": dict(machine or {})}
    _write(folder / "config.json", json.dumps(config, indent=2) + "\n")


def read_config(folder: Path) -> tuple[Experiment, Task]:
    """What `write_config` wrote.

    Raises:
        RunError: the folder is not a run's, or the file is damaged or of another version; the field is named.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise RunError(
            f"{folder} is not a run folder: it has no config.json. Make one with: resnet-func train"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged: {error}. Restore it from a copy") from error
    try:
        found = from_json(_Config, config, "")
        _check_task(found.task)
    except UnlikeFieldsError as error:
        raise RunError(f"{path} is not of this version: {error}. Start a new run") from error
    except FieldError as error:
        raise RunError(f"{path} is damaged: {error}. Restore it from a copy, or start a new run") from error
    return found.experiment, found.task


@dataclass(frozen=True)
class _Machine:
    """What a run chose by itself."""

    speeds: dict[str, float] = field(default_factory=dict)
    compile: bool | None = None

    def __post_init__(self) -> None:
        for name, value in self.speeds.items():
            if not 0 < value < math.inf:
                raise ValueError(f"speeds.{name} must be above 0 and finite; got {value}")


class _Config(NamedTuple):
    """What config.json holds."""

    experiment: Experiment
    task: Task
    machine: _Machine = _Machine()


def _check_task(task: Task) -> None:
    """Refuse what no network is for."""
    channels = task.in_channels
    for name, ok, expected in (
        ("classes", task.classes, "one class or more"),
        ("in_channels", channels >= 1, "1 or more"),
        ("mean", len(task.mean) == channels and all(map(math.isfinite, task.mean)), f"{channels} numbers"),
        ("std", len(task.std) == channels and all(0 < s < math.inf for s in task.std), f"{channels} above 0"),
        ("image_size", task.image_size >= 1, "1 or more"),
    ):
        if not ok:
            raise FieldError(f"task.{name} must be {expected}; got {getattr(task, name)}")


def read_machine(folder: Path) -> dict[str, Any]:
    """What a run chose by itself, so that it goes on with the same: "speeds" and "compile".

    Empty for runs of earlier versions, and where the file cannot be read, which `read_config` says.
    """
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8"))["machine"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def write_metrics(folder: Path, records: Sequence[Record]) -> bool:
    """Make metrics.jsonl hold the records, an object a line; whether it did not already.

    Raises:
        RunError: the disk refuses; the old file, if any, is kept.
    """
    path, text = folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records)
    if path.is_file() and path.read_bytes() == text.encode():
        return False
    _write(path, text)
    return True


def _write(path: Path, text: str) -> None:
    try:
        files.write_whole(path, text.encode())
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}. The old file, if any, is kept") from error
