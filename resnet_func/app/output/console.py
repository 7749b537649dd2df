"""What a run says on the console: a progress bar on a terminal, one line an epoch elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from resnet_func import train
from resnet_func.app.names import printable
from resnet_func.app.storage.run_folder import Record


class ConsoleReporter:
    """Reports to a console; use it as a context manager.

    Args:
        console: Where to write; a bar is drawn if it is a terminal.
        epochs: Epochs of the whole run.
        done: Epochs that were done before.
    """

    def __init__(self, console: Console, epochs: int, done: int = 0) -> None:
        self.console, self.epochs, self.done = console, epochs, done
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %  {task.fields[rate]:,.0f} images/s  ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.task = self.bar.add_task("training", total=epochs, completed=done, rate=0.0)

    def __enter__(self) -> ConsoleReporter:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def note(self, text: str) -> None:
        """Print a line, as it is: names in brackets are no markup, and nothing in it breaks the line."""
        self.console.print(Text(printable(text)), soft_wrap=True)

    def batch(self, progress: train.Progress, num_samples: int) -> None:
        """Move the bar: `progress.samples` of the epoch's `num_samples` are done."""
        rate = progress.samples / progress.seconds if progress.seconds else 0.0
        completed = progress.epoch + progress.samples / num_samples
        description = f"epoch {progress.epoch + 1}/{self.epochs}"
        self.bar.update(self.task, description=description, completed=completed, rate=rate)

    def epoch(self, record: Record) -> None:
        """Print an epoch's line; that of a private run tells what was spent, and nothing of its images."""
        if "epsilon" in record:
            measured = f"epsilon {record['epsilon']:#.4g}"
        else:
            measured = f"train loss {record['train_loss']:.4f}  accuracy {record['train_accuracy']:6.2%}"
        self.note(
            f"epoch {record['epoch']:>{len(str(self.epochs))}}/{self.epochs}  {measured}"
            f"  |  test loss {record['test_loss']:.4f}  accuracy {record['test_accuracy']:6.2%}"
            f"  |  {record['seconds']:.1f} s  {record['images_per_second']:,.0f} images/s"
        )
