"""The commands' options, as frozen data; tyro makes flags of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from resnet_func.app.experiment import DatasetName, Neighbours, PrivateClipping, TrainingSet
from resnet_func.app.recipes import Recipe, RecipeName


@dataclass(frozen=True)
class Machine:
    """How to compute; changes speed, and results only within rounding."""

    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    threads: int = 0
    """CPU threads; 0 is all cores."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the forward pass; auto is bf16 where the hardware has it."""
    memory_format: Literal["auto", "channels_last", "contiguous"] = "auto"
    """Layout of images and weights."""
    winograd: Literal["auto", "on", "off"] = "auto"
    """Convolutions by minimal filtering where that is cheaper; auto is on for the CPU in fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile the training step; auto where a compiler is found and the run is long enough to pay."""
    rank_timeout: float = 300.0
    """Seconds that the ranks of torchrun wait for each other before they give up."""


@dataclass(frozen=True)
class PrivateTraining:
    """Training with differential privacy; the guarantee is printed before it starts."""

    private: bool = False
    """Train with differential privacy, at a budget of --epsilon and --delta (extra: privacy)."""
    epsilon: float | None = None
    """What the run may spend; 1 to 8 is common."""
    delta: float = 1e-5
    """The probability that the guarantee fails; below one over the number of images."""
    max_norm: float = 1.0
    """Bound on one image's gradient; where adaptive clipping starts."""
    clipping: PrivateClipping = "flat"
    """How gradients are bounded: all layers as one, layer by layer, normalised, or by a moving quantile."""
    views: int = 1
    """Augmented views of each image in a step, averaged before clipping."""
    sampling: Literal["poisson", "fixed-size", "shuffle"] = "poisson"
    """How batches are drawn; shuffle is refused, since nothing accounts for it."""
    neighbours: Neighbours | None = None
    """What two data sets may differ by; by default an image more or less (replaced, for fixed-size)."""
    diagnostics: bool = False
    """Also write what is computed from the images without noise, such as the share clipped. NOT private."""
    insecure_noise_seed: int | None = None
    """For tests: the seed of noise and batches, by which anybody can undo the noise. No guarantee."""


@dataclass(frozen=True)
class Train:
    """Train a ResNet and write a run folder: config, metrics, checkpoints, pictures."""

    dataset: DatasetName = "digits"
    """digits come with scikit-learn, the named sets are downloaded, folder is your own images, shards are
    your own in tar archives."""
    data_dir: Path | None = None
    """Where the data set is: for folder, train/<class>/* and test/<class>/*; for shards, train/*.tar and
    test/*.tar; else the download's root."""
    shuffle_window: int = 0
    """Shuffle so many images that lie together at a time, to read archives in stretches; 0 is all at once."""
    recipe: RecipeName = "fast"
    """fast: the most accuracy for minutes on two cores; article: ResNet-18 at 224 pixels with Adam;
    private: what --private takes by default."""
    run_dir: Path | None = None
    """A new folder for the results; by default the first free runs/DATASET-MODEL."""
    resume: Path | None = None
    """A run folder to go on with; its config.json decides everything but the machine."""
    seed: int = 0
    """Of initialisation, order and augmentation."""
    init: Path | None = None
    """A .pth or .safetensors file to start from; a last layer that does not fit the classes is drawn anew."""
    download: bool = True
    """Whether a missing data set may be downloaded."""
    snapshots: int = 0
    """Keep the network after so many epochs, evenly spaced, for scores and attribute to average over."""
    record: bool = False
    """Test on the training images, too, after each epoch: scores then counts how often each is forgotten."""
    training_set: Annotated[TrainingSet, tyro.conf.OmitArgPrefixes] = field(default_factory=TrainingSet)
    """What is done to the training images before training."""
    hyper: Annotated[Recipe, tyro.conf.OmitArgPrefixes] = field(default_factory=Recipe)
    """The recipe's values, each of which can be changed."""
    machine: Annotated[Machine, tyro.conf.OmitArgPrefixes] = field(default_factory=Machine)
    privacy: Annotated[PrivateTraining, tyro.conf.OmitArgPrefixes] = field(default_factory=PrivateTraining)


@dataclass(frozen=True)
class Evaluate:
    """Test a trained network: accuracy, a table by class, confusion.png and mistakes.png."""

    run_dir: Path | None = None
    """The run folder; by default the latest below runs/."""
    checkpoint: Literal["last", "best"] = "last"
    """last is the honest one: best was chosen by its test accuracy."""
    data_dir: Path | None = None
    """Where the data set is now, if it has moved."""
    flips: bool = False
    """Average the logits over each image and its mirror image."""
    laplace: bool = False
    """Also predict with the last layer's posterior, made from the training images: accuracy, negative log
    likelihood and calibration error with and without."""
    machine: Annotated[Machine, tyro.conf.OmitArgPrefixes] = field(default_factory=Machine)


@dataclass(frozen=True)
class Predict:
    """Name what is on images: the five likeliest classes of each."""

    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE...")]
    """Image files."""
    run_dir: Path | None = None
    """The run folder; by default the latest below runs/."""
    checkpoint: Literal["last", "best"] = "last"
    """Which of the run's checkpoints."""
    machine: Annotated[Machine, tyro.conf.OmitArgPrefixes] = field(default_factory=Machine)


@dataclass(frozen=True)
class Summary:
    """Print a network as a table: layer, output shape, parameters, multiply-accumulates."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A network of the zoo, torchvision:NAME, timm:NAME, FILE.py:CALLABLE or pkg.mod:CALLABLE."""
    image_size: int = 0
    """Side of the input in pixels; 0 is 32 for networks of the zoo with CIFAR's stem, and else 224."""
    stem: Literal["auto", "imagenet", "cifar"] = "auto"
    """The first layers, of the zoo's networks; auto is the network's own."""
    norm: Literal["batch", "group", "none"] = "batch"
    """The normalisation layers, of the zoo's networks."""
    num_classes: int = 0
    """Size of the output; 0 is the network's own."""


@dataclass(frozen=True)
class Scores:
    """Score every training image: scores.csv, suspects.png with the likeliest wrong labels, and advice."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN...")] = ()
    """Run folders, such as of several seeds, whose scores are averaged; by default the latest run."""
    scores: tuple[str, ...] = ()
    """Of loss, margin, el2n, grand, self_influence (also with _diagonal, _ekfac), forgetting, after the RUNs;
    by default what takes one pass."""
    rank_by: str = ""
    """The score that ranks the images and picks the suspects; by default margin, or the first of --scores."""
    data_dir: Path | None = None
    """Where the data set is now, if it has moved."""
    batch_size: int = 128
    """Images at a time."""
    machine: Annotated[Machine, tyro.conf.OmitArgPrefixes] = field(default_factory=Machine)


@dataclass(frozen=True)
class Attribute:
    """Show the training images that helped a prediction most, and those that harmed it most."""

    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE...")] = ()
    """Image files."""
    test_index: tuple[int, ...] = ()
    """Places of test images, from 0, instead of files or after them."""
    run_dir: Path | None = None
    """The run folder, which keeps what is computed of the training set; by default the latest below runs/."""
    method: Literal["cosine", "tracin", "trak", "influence"] = "cosine"
    """cosine is of gradients at the last epoch; tracin and trak use every one that train --snapshots kept;
    influence is by EKFAC, and for new images goes over the training set again."""
    label: str = ""
    """The class to explain; by default the predicted one."""
    shown: int = 8
    """Training images shown, of each kind."""
    dim: int = 2048
    """Numbers that the gradient of an image is sketched to: more are more exact, and take more space."""
    data_dir: Path | None = None
    """Where the data set is now, if it has moved."""
    batch_size: int = 128
    """Images at a time."""
    machine: Annotated[Machine, tyro.conf.OmitArgPrefixes] = field(default_factory=Machine)


@dataclass(frozen=True)
class Curvature:
    """Measure how sharp the loss is around a trained network: trace, extreme eigenvalues, spectrum.png."""

    run: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="RUN")] = None
    """The run folder; by default the latest below runs/."""
    matrix: Literal["hessian", "ggn"] = "hessian"
    """hessian: second derivatives of the training loss; ggn: its Gauss-Newton part, never negative."""
    images: int = 1000
    """Training images to look at, drawn at random."""
    steps: int = 40
    """Steps of Lanczos's method, each a pass over the images; more resolve more eigenvalues."""
    probes: int = 10
    """Random probes of the trace, each a pass over the images."""
    seed: int = 0
    """Of the images, the start and the probes."""
    checkpoint: Literal["last", "best"] = "last"
    """Which of the run's checkpoints."""
    batch_size: int = 128
    """Images at a time."""
    data_dir: Path | None = None
    """Where the data set is now, if it has moved."""
    machine: Annotated[Machine, tyro.conf.OmitArgPrefixes] = field(default_factory=Machine)
