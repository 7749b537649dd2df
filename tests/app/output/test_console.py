"""What a run says: a line an epoch to a file, a bar on a terminal."""

from __future__ import annotations

import io

from rich.console import Console

from resnet_func.app.output.console import ConsoleReporter
from resnet_func.train import Progress

RECORD = {
    "epoch": 2,
    "train_loss": 1.25,
    "train_accuracy": 0.5,
    "test_loss": 1.5,
    "test_accuracy": 0.4375,
    "seconds": 3.0,
    "images_per_second": 1234.0,
}


def run(terminal: bool) -> tuple[str, ConsoleReporter]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100)
    with ConsoleReporter(console, epochs=12, done=1) as reporter:
        reporter.batch(Progress(epoch=1, batch=1, samples=50, seconds=0.5), 100)
        reporter.epoch(RECORD)
    return out.getvalue(), reporter


def test_one_line_an_epoch_where_nobody_watches() -> None:
    text, _ = run(terminal=False)
    assert text == (
        "epoch  2/12  train loss 1.2500  accuracy 50.00%  |  test loss 1.5000  accuracy 43.75%"
        "  |  3.0 s  1,234 images/s\n"
    )


def test_a_bar_on_a_terminal() -> None:
    text, reporter = run(terminal=True)
    assert "epoch 2/12" in text
    assert "100 images/s" in text
    assert "ETA" in text
    assert reporter.bar.tasks[0].completed == 1.5


def test_notes_are_printed_as_they_are() -> None:
    out = io.StringIO()
    ConsoleReporter(Console(file=out, width=30), epochs=1).note(
        "run [2] :cat: of [bold]\x1b[31m\na long path"
    )
    assert out.getvalue() == r"run [2] :cat: of [bold]\x1b[31m\na long path" + "\n"


def test_the_line_of_a_private_epoch_tells_epsilon():
    from io import StringIO

    from rich.console import Console

    from resnet_func.app.output.console import ConsoleReporter

    out = StringIO()
    record = {
        "epoch": 1,
        "epsilon": 1.5,
        "test_loss": 2.0,
        "test_accuracy": 0.25,
        "seconds": 1.0,
        "images_per_second": 10.0,
    }
    ConsoleReporter(Console(file=out, width=200), epochs=3).epoch(record)
    assert "epsilon 1.500" in out.getvalue()
    assert "train" not in out.getvalue()
