"""`resnet-func curvature`: how sharp the loss is around a trained network."""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from torch import Tensor

from resnet_func import curvature, files
from resnet_func.app.answers import scoring
from resnet_func.app.batches import Preparer, make_generator
from resnet_func.app.commands.common import configure, load, plain_console, say
from resnet_func.app.inference import Trained
from resnet_func.app.names import counted
from resnet_func.app.options import Curvature
from resnet_func.app.output import spectrum as picture
from resnet_func.app.storage import run_folder
from resnet_func.app.tasks import check_classes
from resnet_func.app.training_set import load_training
from resnet_func.curvature import Estimate, Spectrum
from resnet_func.losses import cross_entropy

NAMES = {"hessian": "Hessian", "ggn": "Gauss-Newton matrix"}
LISTED = 5
FLAT, NO_MINIMUM = 0.05, 0.2  # shares of the largest eigenvalue that the most negative one has


def main(options: Curvature) -> None:
    """Write spectrum.png and spectrum.json; print trace and extreme eigenvalues, and what they mean."""
    output, folder = plain_console(), options.run or run_folder.latest()
    # second derivatives need their digits; a compiler pays where it was asked for
    compiled = options.machine.compile == "on"
    machine = replace(scoring.exact(configure(options.machine)), precision="fp32")
    trained = load(folder, options.checkpoint, machine)
    data = _draw_images(options, trained, Preparer(trained.task, machine))
    generator = make_generator("cpu", options.seed, 0)
    asked = {"matrix": options.matrix, "compiled": compiled, "progress": output.is_terminal, "train": False}
    spectrum = curvature.spectrum(trained.model, cross_entropy, steps=options.steps, **asked)(
        trained.params, trained.state, data, generator=generator
    )
    trace = curvature.trace(trained.model, cross_entropy, probes=options.probes, **asked)(
        trained.params, trained.state, data, generator=generator
    )
    count = sum(len(x) for x, _ in data)
    what = f"{NAMES[options.matrix]} of the loss on {counted(count, 'training image')}"
    title = f"{trained.experiment.recipe.model} on {trained.experiment.dataset}: {what}"
    picture.draw(spectrum, folder / "spectrum.png", title)
    files.write_whole(folder / "spectrum.json", _as_json(options, spectrum, trace, count).encode())
    for line in describe(spectrum, trace, options.matrix):
        say(output, line)
    say(output, f"wrote {folder}/spectrum.png and {folder}/spectrum.json")


def _draw_images(options: Curvature, trained: Trained, prepare: Preparer) -> list[tuple[Tensor, Tensor]]:
    """Training images at random, not augmented, in batches that stay in memory."""
    experiment = trained.experiment
    if options.data_dir is not None:
        experiment = replace(experiment, data_dir=str(options.data_dir))
    source = load_training(experiment)[0].source
    check_classes(trained.task, source)
    draw = make_generator("cpu", options.seed, 1)
    picks = torch.randperm(source.num_samples, generator=draw, device="cpu")[: options.images]
    read = source.read(picks.sort().values.split(options.batch_size))
    return [(prepare(images), labels.to(prepare.runtime.device)) for images, labels in read]


def describe(spectrum: Spectrum, trace: Estimate, matrix: str) -> list[str]:
    """The figures in two lines, and in a third what they mean for somebody who trains."""
    largest, smallest = spectrum.largest(LISTED).tolist(), float(spectrum.smallest())
    error = f" ± {trace.error:.2g}" if trace.error == trace.error else ""
    lines = [
        f"largest eigenvalues: {', '.join(f'{value:.4g}' for value in largest)}; smallest: {smallest:.4g}",
        f"trace: {trace.value:.4g}{error}, over {spectrum.dim:,} parameters; "
        f"{spectrum.negative_share():.1%} of the eigenvalues are clearly below zero",
    ]
    if largest[0] <= 0:
        return [*lines, "no direction curves upwards: the network has not begun to learn, or is flat here"]
    bound = f"2 / {largest[0]:.4g} = {2 / largest[0]:.2g}"
    rate = f"plain gradient descent is stable up to a learning rate of {bound}"
    if matrix == "ggn":
        return [*lines, f"{rate}, as far as the Gauss-Newton part goes"]
    ratio = -smallest / largest[0]
    if ratio > NO_MINIMUM:
        place = "this is no minimum: along its most negative direction the loss still falls"
    elif ratio > FLAT:
        place = "close to a minimum, but some directions still lead down"
    else:
        place = "at a minimum, or flat, along every direction that was seen"
    return [*lines, f"{place}; {rate}"]


def _as_json(options: Curvature, spectrum: Spectrum, trace: Estimate, images: int) -> str:
    error = trace.error if trace.error == trace.error else None
    return json.dumps(
        {
            "matrix": options.matrix,
            "images": images,
            "seed": options.seed,
            "parameters": spectrum.dim,
            "trace": {"value": trace.value, "standard_error": error, "probes": options.probes},
            "nodes": spectrum.nodes.tolist(),
            "weights": spectrum.weights.tolist(),
            "residuals": spectrum.residuals.tolist(),
        },
        indent=1,
    )
