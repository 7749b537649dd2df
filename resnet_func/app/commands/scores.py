"""`resnet-func scores`: score every training image, and show the likeliest wrong labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from resnet_func.app.answers import scoring
from resnet_func.app.commands.common import configure, plain_console, say
from resnet_func.app.errors import UsageError, warn
from resnet_func.app.names import counted
from resnet_func.app.options import Scores
from resnet_func.app.output import suspects
from resnet_func.app.ranks import dealing, launch
from resnet_func.app.storage import run_folder
from resnet_func.app.tasks import check_classes
from resnet_func.app.training import training_record
from resnet_func.app.training_set import Training, image_name, load_training
from resnet_func.attribution import SUSPICIOUS, found_curve, suspicion_order
from resnet_func.attribution import Scores as Scored
from resnet_func.attribution.scores import DEFAULT

SHOWN = 64


def main(options: Scores) -> None:
    """Write scores.csv, suspects.png, and found.png where wrong labels were planted; give advice.

    Under torchrun every rank scores its part of the images.
    """
    with launch.group(options.machine.device, timeout=options.machine.rank_timeout) as group:
        _score(options, group)


def _score(options: Scores, group: launch.Group) -> None:
    output, folders = plain_console(quiet=group.rank > 0), options.runs or (run_folder.latest(),)
    machine = scoring.exact(configure(options.machine))
    experiments = [run_folder.read_config(folder)[0] for folder in folders]
    scoring.check_same_data(experiments)
    experiment, folder = experiments[0], folders[0]
    names = _names(options, folders)
    if group.ranks:
        dealing.check_dealt(names)
    rank_by = options.rank_by or ("margin" if "margin" in names else names[0])
    if options.data_dir is not None:
        experiment = replace(experiment, data_dir=str(options.data_dir))
    training, _ = group.first_on_node(lambda: load_training(experiment))
    for each in folders:
        check_classes(run_folder.read_config(each)[1], training.source)
    scored = scoring.score_runs(
        folders,
        training,
        names,
        machine,
        group=group,
        batch_size=options.batch_size,
        progress=output.is_terminal,
    )
    if scored is None:
        return
    if launch.is_restarted():
        run_folder.remove_leftovers(folder)
    scores, warnings = scored
    for warning in warnings:
        warn(warning)
    title = f"{experiment.recipe.model} on {experiment.dataset}"
    scoring.write_csv(folder / "scores.csv", scores, training, rank_by)
    _draw_suspects(scores, training, rank_by, folder, title)
    images = counted(training.source.num_samples, "image")
    say(output, f"wrote {folder}/scores.csv and {folder}/suspects.png: {images}")
    if training.planted.any():
        _draw_found(scores, training, folder, title)
    say(output, scoring.advice(scores, training, rank_by, folder, experiment))


def _names(options: Scores, folders: tuple[Path, ...]) -> list[str]:
    """The scores that are asked for; forgetting by default where all runs have a record.

    Raises:
        UsageError: there is no such score, or the ranking one is not among them.
    """
    names = list(options.scores) or list(DEFAULT)
    if not options.scores and all(training_record.read(folder) is not None for folder in folders):
        names.append("forgetting")
    unknown = [name for name in names if name not in SUSPICIOUS]
    if unknown:
        raise UsageError(f"there is no score {unknown[0]!r}; there are {', '.join(SUSPICIOUS)}")
    if options.rank_by and options.rank_by not in names:
        raise UsageError(f"--rank-by {options.rank_by} is not among the scores {', '.join(names)}")
    return names


def _draw_suspects(scores: Scored, training: Training, rank_by: str, folder: Path, title: str) -> None:
    order = suspicion_order(scores.values[rank_by], rank_by)[:SHOWN]
    source = training.source
    images = torch.cat([images for images, _ in source.read(order.split(1))]).cpu()
    planted = training.planted[order]
    planted_note = (
        f"; framed: the {counted(int(planted.sum()), 'planted one')}" if training.planted.any() else ""
    )
    suspects.suspects(
        images,
        source.labels.cpu()[order],
        scores.suggestions[order],
        [image_name(source, place, int(training.places[place])) for place in order.tolist()],
        source.classes,
        folder / "suspects.png",
        f"{title}: the {len(order)} likeliest wrong labels by {rank_by}{planted_note}",
        planted=planted,
    )


def _draw_found(scores: Scored, training: Training, folder: Path, title: str) -> None:
    curves = {
        name: found_curve(suspicion_order(values, name), training.planted)
        for name, values in scores.values.items()
    }
    share = float(training.planted.double().mean())
    said = f"{title}: {share:.0%} of the labels planted wrong, found by each score"
    suspects.found(curves, share, folder / "found.png", said)
