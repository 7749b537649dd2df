"""`resnet-func evaluate`: test a trained network."""

from __future__ import annotations

from dataclasses import replace

from resnet_func.app import batches, inference
from resnet_func.app.commands.common import configure, load, plain_console, say
from resnet_func.app.options import Evaluate
from resnet_func.app.output import report
from resnet_func.app.storage import run_folder


def main(options: Evaluate) -> None:
    """Test on the run's test images; print a table by class, and draw the confusions and mistakes."""
    output, folder = plain_console(), options.run_dir or run_folder.latest()
    machine = configure(options.machine, folder)
    trained = load(folder, options.checkpoint, machine, flips=options.flips or None)
    experiment, classes = trained.experiment, trained.task.classes
    if options.data_dir is not None:
        experiment = replace(experiment, data_dir=str(options.data_dir))
    source = batches.load_data(experiment).test
    batches.check_classes(trained.task, source)
    evaluation = inference.evaluate_trained(trained, source, machine)
    output.print(report.class_table(evaluation, classes))
    title = f"{experiment.recipe.model} on {experiment.dataset}"
    report.write_pictures(evaluation, source, classes, folder, title)
    say(
        output,
        f"accuracy {evaluation.accuracy:.2%}, loss {evaluation.loss:.4f} on {source.num_samples} images",
    )
    say(output, f"wrote {folder}/confusion.png and {folder}/mistakes.png")
