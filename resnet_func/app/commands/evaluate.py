"""`resnet-func evaluate`: test a trained network."""

from __future__ import annotations

from dataclasses import replace

from resnet_func.app import inference
from resnet_func.app.answers import calibrating, scoring
from resnet_func.app.commands.common import configure, load, plain_console, say
from resnet_func.app.names import counted
from resnet_func.app.options import Evaluate
from resnet_func.app.output import report
from resnet_func.app.storage import run_folder
from resnet_func.app.tasks import check_classes
from resnet_func.app.training_set import load_data


def main(options: Evaluate) -> None:
    """Test on the run's test images; print a table by class, and draw the confusions and mistakes."""
    output, folder = plain_console(), options.run_dir or run_folder.latest()
    machine = configure(options.machine, folder)
    trained = load(folder, options.checkpoint, machine, flips=options.flips or None)
    if options.laplace:
        calibrating.refuse_private(trained)
    experiment, classes = trained.experiment, trained.task.classes
    if options.data_dir is not None:
        experiment = replace(experiment, data_dir=str(options.data_dir))
    splits = load_data(experiment)
    source = splits.test
    check_classes(trained.task, source)
    evaluation = inference.evaluate_trained(trained, source, machine)
    output.print(report.class_table(evaluation, classes))
    title = f"{experiment.recipe.model} on {experiment.dataset}"
    report.write_pictures(evaluation, source, classes, folder, title)
    images = counted(source.num_samples, "image")
    say(output, f"accuracy {evaluation.accuracy:.2%}, loss {evaluation.loss:.4f} on {images}")
    say(output, f"wrote {folder}/confusion.png and {folder}/mistakes.png")
    if options.laplace:
        check_classes(trained.task, splits.train)
        exactly = scoring.exact(machine)
        again = load(folder, options.checkpoint, exactly, flips=False)
        posterior, figures = calibrating.calibrate(again, splits.train, source, exactly)
        for name, figure in figures.items():
            say(output, describe(name, figure))
        say(
            output,
            f"the last layer's posterior is of {counted(splits.train.num_samples, 'training image')}, with a "
            f"prior of precision {posterior.prior_precision:.3g}, the likeliest",
        )


def describe(name: str, figure: calibrating.Calibration) -> str:
    """The figures in a line.

    >>> describe("plain", calibrating.Calibration(0.9, 0.25, 0.01))
    'plain:   accuracy 90.00%, negative log likelihood 0.2500, calibration error 1.00%'
    """
    return (
        f"{name + ':':8} accuracy {figure.accuracy:.2%}, negative log likelihood {figure.loss:.4f}, "
        f"calibration error {figure.calibration_error:.2%}"
    )
