"""What several commands do alike: set up the machine, load a run, print."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from torch import Tensor

from resnet_func import calibration
from resnet_func.app import data, inference, runtime
from resnet_func.app.errors import warn
from resnet_func.app.names import printable
from resnet_func.app.options import Machine
from resnet_func.app.ranks import launch
from resnet_func.app.storage import run_folder


def configure(
    machine: Machine, run: Path | None = None, group: launch.Group = launch.ONE_PROCESS
) -> runtime.Runtime:
    """Choose and apply what the options leave open; as `run` chose, if that is given and says so.

    All ranks of a group choose by the speeds that rank 0 has measured, so alike.
    """
    speeds = None
    if group.rank:
        speeds = calibration.from_numbers(json.loads(group.from_first(str)), "of rank 0")
    elif run is not None:
        with suppress(ValueError):
            speeds = calibration.from_numbers(run_folder.read_machine(run).get("speeds", {}), "of the run")
    chosen = runtime.configure(
        device=launch.local_device(machine.device),
        threads=machine.threads or None,
        precision=machine.precision,
        memory_format=machine.memory_format,
        winograd=machine.winograd,
        compile=machine.compile,
        speeds=speeds,
    )
    if not group.rank:
        group.from_first(lambda: json.dumps(chosen.speeds.as_numbers()))
    return chosen


def load(
    folder: Path, which: str, machine: runtime.Runtime, *, flips: bool | None = False
) -> inference.Trained:
    """The network of a run; a damaged checkpoint is said on stderr, where an older one takes its place."""
    trained, warning = inference.load_trained(folder, which, machine, flips=flips)
    if warning:
        warn(warning)
    return trained


def read_images(
    paths: Iterable[Path], trained: inference.Trained, failures: list[data.DataError], *, quiet: bool = False
) -> Iterator[tuple[Path, Tensor]]:
    """The images of those files that can be read, one at a time; of each other a line on stderr.

    Args:
        paths: Image files.
        trained: The network that they are for.
        failures: What is wrong with the others is appended here.
        quiet: Leave the lines out: another rank prints them.
    """
    for path in paths:
        try:
            image = inference.read_image(path, trained)
        except data.DataError as error:
            failures.append(error)
            if not quiet:
                warn(str(error))
        else:
            yield path, image


def plain_console(*, quiet: bool = False) -> Console:
    """A console that prints what a user named as it is: "[old]" is no markup, ":cat:" no picture."""
    return Console(markup=False, emoji=False, highlight=False, quiet=quiet)


def say(output: Console, text: str) -> None:
    """Print a line, however long, without breaking it; what could steer a terminal is escaped."""
    output.print(printable(text), soft_wrap=True)
