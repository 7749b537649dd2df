"""Data sets too large for a file system: images packed in tar archives as WebDataset packs them.

    train/*.tar and test/*.tar, with members   KEY.jpg (or .png ...)   the image
                                               KEY.cls                 its class: a number from 0, or a name
    classes.txt, which may be missing          the names of the numbers, one a line

The members of an image have one KEY, the name up to its first dot; other ones (KEY.json, KEY.txt) are passed
over. The archives are read through once, headers and classes alone, and where each image lies is kept beside
them. From then on they are a stream like a folder's, any image at any time.

`webdataset` writes them. Its pipeline does not read them here: it shuffles in a buffer of each worker of each
rank, so that the order depends on how many there are, and a pass is resumed by reading all that came before.
Where images are found by their place, the order is the run's own, on any number of ranks, from any step on;
what is kept of reading in sequence is `--shuffle-window`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from resnet_func.app.data.decoding import DECODE_VERSION, DataError
from resnet_func.app.data.folder import CACHE_FOLDER, SUFFIXES, Listing, list_images
from resnet_func.app.data.members import Member
from resnet_func.app.errors import AppError
from resnet_func.app.names import counted, printable
from resnet_func.files import write_whole

LAYOUT = "train/*.tar and test/*.tar"
CLASSES = "classes.txt"
INDEX_VERSION = 1
BLOCK = 512  # a tar's unit; one of zeros ends it

logger = logging.getLogger(__name__)


def list_shards(folder: Path, classes: Sequence[str] | None = None) -> Listing:
    """List the images of `folder/*.tar`, archive by archive by name, and as they lie in each.

    Args:
        folder: Holds the archives; `folder/../classes.txt`, if there, names the classes.
        classes: Every class there may be, in label order; None takes those of classes.txt, or those found:
            numbers by size, names in the alphabet's order.

    Returns:
        The listing, whose files are addresses (`members`); labels index `classes`.

    Raises:
        DataError: there are no archives; one is damaged, not whole, compressed, or holds an image without a
            class, a class without an image, or a class that is not among `classes`.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == ".tar" and path.name[0] != ".")
        facts = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); expected {LAYOUT}") from error
    if not paths:
        raise DataError(f"{folder}: no *.tar; expected {LAYOUT}")
    fingerprint = _digest([INDEX_VERSION, sorted(SUFFIXES), facts])
    index = folder.parent / CACHE_FOLDER / f"shards-{folder.name}.json"
    images = _read_index(index, fingerprint)
    if images is None:
        images = [image for path in paths for image in _images(path)]
        _write_index(index, fingerprint, images)
    names = _class_names(folder.parent / CLASSES)
    numbered = all(image.label.isdecimal() for image in images)
    labels = [_class_of(folder, image, names if numbered else None) for image in images]
    if classes is None:
        found = set(labels)
        classes = (names if numbered else None) or sorted(found, key=int if numbered else None)
    place = {name: i for i, name in enumerate(classes)}
    for image, label in zip(images, labels, strict=True):
        if label not in place:
            raise DataError(
                f"{folder / image.archive}: {image.name} is of class {label!r}; no such class among the "
                f"{len(classes)} of train"
            )
    return Listing(
        folder=folder,
        classes=tuple(classes),
        files=tuple(str(Member(str(folder / image.archive), *image[1:4])) for image in images),
        labels=tuple(place[label] for label in labels),
        fingerprint=_digest([fingerprint, DECODE_VERSION, list(classes)]),
    )


def write_shards(folder: Path | str, to: Path | str, *, images: int = 10_000, seed: int = 0) -> None:
    """Pack an image folder: `to/train/000000.tar` and so on, `to/test/...`, `to/classes.txt`.

    In random order, so that images that lie together are of any class. Files are packed as they are.

    Args:
        folder: Holds train/<class>/* and test/<class>/*.
        to: A new folder, or an empty one.
        images: At most so many in an archive.
        seed: Of the order.

    Raises:
        DataError: the folder is ill-arranged.
        AppError: `to` holds something, `images` is not positive, or webdataset is not installed.
        OSError: the disk refuses; what was written is to be deleted.
    """
    folder, to = Path(folder), Path(to)
    if images < 1:
        raise AppError(f"images must be 1 or more in an archive; got {images}")
    if to.exists() and any(to.iterdir()):
        raise AppError(f"{to} is not empty. Give a new folder")
    train = list_images(folder / "train")
    if any("\n" in name or name != name.strip() for name in train.classes):
        raise DataError(
            f"{folder}: a class that begins or ends with white space cannot be a line of {CLASSES}"
        )
    for split, listing in (("train", train), ("test", list_images(folder / "test", train.classes))):
        (to / split).mkdir(parents=True)
        _pack(listing, to / split, images, seed)
    write_whole(to / CLASSES, "".join(f"{name}\n" for name in train.classes).encode(errors="surrogateescape"))


def _pack(listing: Listing, to: Path, images: int, seed: int) -> None:
    try:
        from webdataset.writer import ShardWriter
    except ImportError as error:
        raise AppError(
            "writing shards needs webdataset, which is not installed: pip install 'resnet-func[shards]'"
        ) from error
    draw = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(len(listing.files), generator=draw, device="cpu").tolist()
    pattern = str(to.absolute()).replace("%", "%%") + "/%06d.tar"
    with ShardWriter(pattern, maxcount=images, verbose=0, encoder=False, mtime=0) as writer:
        for number, place in enumerate(order):
            file = Path(listing.files[place])
            name = re.sub(r"[^A-Za-z0-9_-]", "_", file.stem)[:60]
            content = {file.suffix[1:].lower(): file.read_bytes(), "cls": b"%d" % listing.labels[place]}
            writer.write({"__key__": f"{number:08}-{name}", **content})


# --------------------------------------------------------------------------- one archive


class _Image(NamedTuple):
    archive: str
    name: str
    offset: int
    size: int
    label: str  # what the member of its class holds


def _images(path: Path) -> Iterator[_Image]:
    """The images of an archive, in its order."""
    images: dict[str, tuple[str, int, int]] = {}
    classes: dict[str, str] = {}
    for member, content in _members(path):
        key, _, suffix = _split(member.name)
        suffix, held = suffix.lower(), classes if content is not None else images
        if content is None and f".{suffix}" not in SUFFIXES:
            continue
        if key in held:
            what = "images" if content is None else "classes"
            raise DataError(f"{path}: {key} has two {what}; pack it anew")
        if content is None:
            images[key] = member.name, member.offset_data, member.size
        else:
            classes[key] = content.decode("utf-8", "surrogateescape").strip()
    for key in {**images, **classes}:
        if not classes.get(key):
            raise DataError(
                f"{path}: {key} has no class; expected a member {key}.cls with its number or name"
            )
        if key not in images:
            raise DataError(f"{path}: {key} has no image ({' '.join(sorted(SUFFIXES))}) beside {key}.cls")
    if not images:
        raise DataError(f"{path}: no images ({' '.join(sorted(SUFFIXES))}); delete it, or pack it anew")
    for key, (name, offset, size) in images.items():
        yield _Image(path.name, name, offset, size, classes[key])


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """The files of an archive that are not hidden, with what those that tell a class hold."""
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                base = member.name.rpartition("/")[2]
                if member.isreg() and "." in base.strip(".") and base[0] != ".":
                    is_class = _split(member.name)[2].lower() == "cls"
                    held = tar.extractfile(member) if is_class else None
                    yield member, None if held is None else held.read()
            file.seek(tar.offset)  # tarfile takes a damaged header, and a missing end, for the end
            if file.read(BLOCK) != bytes(BLOCK):
                raise tarfile.ReadError("it does not end as an archive does")
    except (tarfile.TarError, OSError, EOFError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise DataError(
            f"{path}: no whole, uncompressed tar archive ({reason}); copy or pack it anew"
        ) from error


def _split(name: str) -> tuple[str, str, str]:
    """Key, dot and suffix of a member, as WebDataset has it: at the first dot of its own name."""
    folder, slash, base = name.rpartition("/")
    key, dot, suffix = base.partition(".")
    return folder + slash + key, dot, suffix


# --------------------------------------------------------------------------- classes


def _class_names(path: Path) -> list[str] | None:
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    names = text.removesuffix("\n").split("\n")
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{path}: two lines are {twice[0]!r}; expected a name of its own for each class")
    return names


def _class_of(folder: Path, image: _Image, names: Sequence[str] | None) -> str:
    label = image.label
    if names is None:
        return str(int(label)) if label.isdecimal() else label
    if int(label) >= len(names):
        raise DataError(
            f"{folder / image.archive}: {image.name} is of class {label}; {folder.parent / CLASSES} has "
            f"{counted(len(names), 'line')}, the first for class 0"
        )
    return names[int(label)]


# --------------------------------------------------------------------------- the index, kept beside the data


def _digest(of: Any) -> str:
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()


def _read_index(path: Path, fingerprint: str) -> list[_Image] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["fingerprint"] != fingerprint or found["digest"] != _digest(found["images"]):
            return None
        return [_Image(*image) for image in found["images"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_index(path: Path, fingerprint: str, images: list[_Image]) -> None:
    whole = {"fingerprint": fingerprint, "digest": _digest(images), "images": images}
    try:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(whole).encode())
    except OSError as error:
        reason = printable(str(error))
        logger.warning("no index, the archives are read through on every start: %s", reason)
