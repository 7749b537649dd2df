"""Shards: the images of the folder that was packed, at any place; bad archives are named."""

from __future__ import annotations

import io
import logging
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image
from webdataset import tariterators

from resnet_func.app import tasks, training_set
from resnet_func.app.data import DataError, Source, Stream, load, members, shards, write_shards
from resnet_func.app.errors import AppError
from tests.app.image_folder import CLASSES, make_image_folder

# Python 3.12 and later warn about every fork of a process with threads; DataLoader forks by default.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def png(value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def pack(path: Path, contents: Mapping[str, bytes | str], *, mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # pyright: ignore[reportCallIssue, reportArgumentType]
        for name, content in contents.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def pack_both(root: Path, contents: Mapping[str, bytes | str]) -> Path:
    for split in ("train", "test"):
        pack(root / split / "0.tar", contents)
    return root


def pixels(source: Source) -> list[tuple[bytes, str]]:
    """Images and names of classes, in any order."""
    ((images, labels),) = source.read([torch.arange(source.num_samples)])
    return sorted(
        (image.numpy().tobytes(), source.classes[y]) for image, y in zip(images, labels, strict=True)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    write_shards(folder, tmp_path / "shards", images=7)
    return tmp_path / "shards"


def test_shards_hold_the_folder_that_was_packed(folder: Path, packed: Path) -> None:
    ours, theirs = load("shards", packed), load("folder", folder)
    assert len(list((packed / "train").glob("*.tar"))) == 4  # 24 images by 7
    for own, other in zip(ours, theirs, strict=True):
        assert isinstance(own, Stream)
        assert pixels(own) == pixels(other)
        assert (own.classes, own.image_shape) == (other.classes, other.image_shape)
    assert len(set(ours.train.labels[:7].tolist())) == 3  # mixed: an archive is of no one class
    assert ours.train.name == "shards train"


def test_packing_again_gives_the_same_bytes_and_another_seed_another_order(
    folder: Path, packed: Path, tmp_path: Path
) -> None:
    write_shards(folder, tmp_path / "again", images=7)
    write_shards(folder, tmp_path / "other", images=7, seed=1)
    first = "train/000000.tar"
    assert (tmp_path / "again" / first).read_bytes() == (packed / first).read_bytes()
    assert (
        load("shards", tmp_path / "other").train.labels.tolist()
        != load("shards", packed).train.labels.tolist()
    )


def test_what_is_read_is_what_webdataset_reads(packed: Path) -> None:
    theirs = []
    for path in sorted((packed / "train").glob("*.tar")):
        with open(path, "rb") as file:
            found = tariterators.tar_file_expander([{"url": path.name, "stream": file}])
            theirs += [(sample["png"], int(sample["cls"])) for sample in tariterators.group_by_keys(found)]
    source = load("shards", packed).train
    ours = [
        (members.read(file), label) for file, label in zip(source.files, source.labels.tolist(), strict=True)
    ]
    assert ours == theirs


def test_any_batch_is_read_by_itself_and_resized(packed: Path) -> None:
    source = load("shards", packed, image_size=4).train
    ((whole, labels),) = source.read([torch.arange(24)])
    picks = [torch.tensor([23, 0, 11]), torch.tensor([5])]
    for pick, (images, own) in zip(picks, source.read(picks), strict=True):
        assert images.equal(whole[pick])
        assert own.equal(labels[pick])


def test_the_index_is_kept_and_renewed_when_an_archive_changes(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load("shards", packed).train.files
    scanned: list[Path] = []
    scan = shards._images
    monkeypatch.setattr(shards, "_images", lambda path: (scanned.append(path), *scan(path))[1:])
    assert load("shards", packed).train.files == before
    assert not scanned
    pack(packed / "train/1.tar", {"new.png": png(), "new.cls": "0"})
    assert len(load("shards", packed).train.files) == 25
    assert len(scanned) == 5
    index = packed / ".resnet_func_cache/shards-train.json"
    index.write_text(index.read_text().replace("new.png", "old.png"))
    scanned.clear()
    assert load("shards", packed).train.files[-1].count("new.png") == 1
    assert scanned


def test_a_folder_that_cannot_hold_an_index_costs_a_line(
    packed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write_whole", full)
    with caplog.at_level(logging.WARNING):
        assert load("shards", packed).train.num_samples == 24
    assert "no index, the archives are read through on every start" in caplog.text


@pytest.mark.parametrize(
    ("labels", "names", "expected", "classes"),
    [
        (("10", "2", "2"), None, [1, 0, 0], ("2", "10")),
        (("dog", "cat", "dog\n"), None, [1, 0, 1], ("cat", "dog")),
        (("2", "0", " 0 "), "ant\nbee\ncat\n", [2, 0, 0], ("ant", "bee", "cat")),
        (("bee", "ant", "ant"), "cat\nbee\nant", [1, 0, 0], ("ant", "bee")),
    ],
    ids=["numbers", "names", "numbers-with-names", "names-need-no-file"],
)
def test_classes_are_numbers_or_names(
    tmp_path: Path, labels: tuple[str, ...], names: str | None, expected: list[int], classes: tuple[str, ...]
) -> None:
    contents: dict[str, bytes | str] = {}
    for number, label in enumerate(labels):
        contents |= {f"{number}.png": png(number), f"{number}.cls": label, f"{number}.json": "{}"}
    root = pack_both(tmp_path, contents)
    if names is not None:
        (root / "classes.txt").write_text(names)
    train, test = load("shards", root)
    assert train.labels.tolist() == test.labels.tolist() == expected
    assert train.classes == test.classes == classes


def test_other_members_folders_and_hidden_files_are_passed_over(tmp_path: Path) -> None:
    noise = {
        "a.seg.png": b"?",
        "a.txt": "?",
        ".hidden.png": b"?",
        "README": "?",
        "x.y/b.CLS": "0",
        "x.y/b.JPEG": png(),
    }
    root = pack_both(tmp_path, {"a.png": png(), "a.cls": "0", **noise})
    with tarfile.open(root / "train/0.tar", "a") as tar:
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    assert load("shards", root).train.num_samples == 2


GOOD = {"a.png": png(), "a.cls": "0"}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"a.png": png()}, "0.tar: a has no class; expected a member a.cls with its number or name"),
        ({"a.png": png(), "a.cls": " "}, "0.tar: a has no class"),
        ({"a.cls": "0"}, r"0.tar: a has no image \(.bmp .* beside a.cls"),
        ({**GOOD, "a.jpg": png()}, "0.tar: a has two images; pack it anew"),
        ({**GOOD, "a.CLS": "0"}, "0.tar: a has two classes; pack it anew"),
        ({"a.txt": "0"}, "0.tar: no images"),
        ({}, "0.tar: no images"),
    ],
    ids=["no-class", "empty-class", "no-image", "two-images", "two-classes", "other-members", "empty"],
)
def test_an_archive_that_is_no_shard_is_named(
    tmp_path: Path, contents: Mapping[str, bytes | str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load("shards", pack_both(tmp_path, contents))


@pytest.mark.parametrize(
    "damage", ["cut", "cut-at-a-member", "no-end", "header", "no-tar", "compressed", "empty"]
)
def test_a_damaged_archive_is_named(tmp_path: Path, damage: str) -> None:
    many = {f"{key}.{suffix}": GOOD[f"a.{suffix}"] for key in "abc" for suffix in ("png", "cls")}
    root = pack_both(tmp_path, many)
    path = root / "train/0.tar"
    whole = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[4].offset
    match damage:
        case "cut":
            whole = whole[: offset + 600]
        case "cut-at-a-member":
            whole = whole[:offset]
        case "no-end":
            whole = whole[: offset + 2048]  # what was packed is all there
        case "header":
            whole[offset + 100 : offset + 120] = b"damaged" * 2 + bytes(6)
        case "no-tar":
            whole = bytearray(b"once upon a time " * 400)
        case "empty":
            whole = bytearray()
    path.write_bytes(whole)
    if damage == "compressed":
        pack(path, many, mode="w:gz")
    with pytest.raises(DataError, match=r"train/0.tar: no whole, uncompressed tar archive \(.+\)"):
        load("shards", root)


def test_a_damaged_image_is_named_with_its_archive(tmp_path: Path) -> None:
    root = pack_both(tmp_path, {**GOOD, "b.png": png()[:40], "b.cls": "0"})
    source = load("shards", root).train
    with pytest.raises(DataError, match=r"train/0.tar::b.png@\d+\+40: cannot be decoded"):
        list(source.read([torch.tensor([0, 1])]))


@pytest.mark.parametrize(
    ("test", "names", "message"),
    [
        ("7", None, "test/0.tar: a.png is of class '7'; no such class among the 1 of train"),
        (
            "7",
            "ant\nbee\n",
            "test/0.tar: a.png is of class 7; .*classes.txt has 2 lines, the first for class 0",
        ),
        ("0", "ant\nant\n", "classes.txt: two lines are 'ant'"),
    ],
)
def test_an_unknown_class_is_named(tmp_path: Path, test: str, names: str | None, message: str) -> None:
    root = pack_both(tmp_path, GOOD)
    pack(root / "test/0.tar", {**GOOD, "a.cls": test})
    if names:
        (root / "classes.txt").write_text(names)
    with pytest.raises(DataError, match=message):
        load("shards", root)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="shards need data_dir, a folder that holds train/\\*.tar and test/"):
        load("shards")
    with pytest.raises(DataError, match="expected train/\\*.tar and test/\\*.tar"):
        load("shards", tmp_path)
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    with pytest.raises(DataError, match="train: no \\*.tar; expected train/\\*.tar"):
        load("shards", tmp_path)


def test_packing_refuses_what_it_would_spoil(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AppError, match="is not empty. Give a new folder"):
        write_shards(folder, folder)
    with pytest.raises(AppError, match="images must be 1 or more in an archive; got 0"):
        write_shards(folder, tmp_path / "new", images=0)
    monkeypatch.setitem(__import__("sys").modules, "webdataset.writer", None)
    with pytest.raises(AppError, match=r"pip install 'resnet-func\[shards\]'"):
        write_shards(folder, tmp_path / "new")


def test_a_run_knows_its_shards_again(packed: Path) -> None:
    """Moved, they are the same data; with other images they are not."""
    before, splits = tasks.digest_files(load("shards", packed)), load("shards", packed)
    print_before = training_set.fingerprint(splits.train)
    moved = packed.rename(packed.with_name("moved"))
    assert tasks.digest_files(load("shards", moved)) == before
    pack(moved / "train/000000.tar", {"a.png": png(), "a.cls": "0"})
    assert tasks.digest_files(load("shards", moved)) != before
    assert training_set.fingerprint(load("shards", moved).train) != print_before
    kept = training_set.select(splits.train, torch.tensor([3, 1]))
    assert kept.files == (splits.train.files[3], splits.train.files[1])
    assert training_set.image_name(kept, 0, 3) == splits.train.files[3]
    assert kept.classes == CLASSES
