"""The options that the benchmarks share; each command adds its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar

from benchmarks.harness.statistics import Rule

RESULTS = Path(__file__).parents[1] / "results"
TOY = "resnet8"  # He et al.'s family with one block a stage: not in the zoo, and quick to compile
QUICK = Rule(least=2, most=2)
QUICK_BACKEND = "aot_eager"  # traces as the compiler does, and generates no code

T = TypeVar("T", bound="Output")


@dataclass(frozen=True)
class Output:
    """What becomes of a run."""

    quick: bool = False
    """A toy: a network of three blocks, a few images of 8 pixels, nothing compiled. No measurement."""
    write: bool = True
    """Whether to write the result file and the picture."""
    results: Path = RESULTS
    """The folder for both."""

    @property
    def backend(self) -> str:
        """What compiles."""
        return QUICK_BACKEND if self.quick else "inductor"

    @property
    def turn_seconds(self) -> float:
        """How long a variant is timed in each round."""
        return 1e-3 if self.quick else 0.1

    @property
    def toy_note(self) -> str:
        """What the title of a toy run ends in."""
        return ", toy run" if self.quick else ""

    def stopping_rule(self, seconds: float) -> Rule:
        """When to stop timing."""
        return QUICK if self.quick else Rule(seconds=seconds)


@dataclass(frozen=True)
class Kept(Output):
    """Networks trained on a data set, kept in a folder so that a run that was stopped goes on."""

    dataset: str = "digits"
    """As in `resnet-func train`."""
    data_dir: str = ""
    """Where the data set is."""
    work: str = "runs/benchmark"
    """The folder that keeps what is trained."""
    threads: int | None = None
    """Inside one operation, on the CPU."""

    def portable(self) -> Self:
        """What a result file says: nothing of this machine's folders."""
        return replace(self, data_dir="DIR" if self.data_dir else "", work=type(self).work, threads=None)


@dataclass(frozen=True)
class Step(Output):
    """The network, its batch, and where it runs."""

    model: str = "resnet20"
    """A network of the zoo, torchvision:NAME, timm:NAME, FILE.py:CALLABLE or pkg.mod:CALLABLE."""
    batch: int = 128
    """Images a step."""
    size: int = 32
    """Side of the images in pixels; up to 64 torchvision's networks get the CIFAR stem."""
    device: str = "auto"
    """auto, cpu or cuda."""


@dataclass(frozen=True)
class Threaded(Step):
    """A step with one number of threads."""

    threads: int | None = None
    """Inside one operation, on the CPU; as many as torch takes if left out."""


@dataclass(frozen=True)
class Compared(Threaded):
    """Variants of a step that take turns."""

    without: tuple[str, ...] = ()
    """Leave out the variants whose names contain one of these words, such as compiled or JAX."""
    memory: bool = True
    """Whether to look at peak memory, each variant in a fresh process."""
    seconds: float = 300.0
    """Time after which timing stops, if the interquartile ranges are not under 10 % before."""


def toy(options: T, **changes: Any) -> T:
    """The options as they are, or with a toy's network and batch where a `quick` run is asked for.

    A network that is not of the zoo stays, and takes images of the size that is asked for.
    """
    if not options.quick:
        return options
    own = {} if ":" in getattr(options, "model", "") else {"model": TOY, "size": 8}
    return replace(options, **{"batch": 4, **own, **changes})


def check_words(name: str, given: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    """Refuse an option's words that it does not know.

    Raises:
        ValueError: a word is not allowed, or there is none.
    """
    wrong = [word for word in given if word not in allowed]
    if wrong or not given:
        raise ValueError(f"--{name} must be of {', '.join(allowed)}; got {', '.join(wrong) or 'nothing'}")


def check_without(words: tuple[str, ...], names: list[str], what: str = "variant") -> None:
    """Refuse a word of `--without` that leaves nothing out.

    Raises:
        ValueError: a word is in none of the names.
    """
    lost = [word for word in words if not any(word in name for name in names)]
    if lost:
        raise ValueError(f"no {what} has {', '.join(lost)} in its name; there are {'; '.join(names)}")
