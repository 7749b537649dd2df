"""Image folders: what decodes to what, which files are refused, when a cache counts, streams as data sets."""

from __future__ import annotations

import logging
import os
import socket
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from torchvision import datasets
from torchvision.transforms import functional as TF

from resnet_func.app.data import DataError, batches, decode, load
from resnet_func.app.data import folder as folder_module
from resnet_func.app.data.folder import CACHE_FOLDER, list_images, load_images
from tests.app.image_folder import noise, save, write_split

# Python 3.12 and later warn about every fork of a process with threads; DataLoader forks by default.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def paletted():
    image = Image.fromarray(noise(8, 8, high=4), mode=None).convert("P")
    image.putpalette(noise(768).tolist())
    image.info["transparency"] = bytes([0, 128, 255, 255])
    return image


# pixels


def write_zoo(folder):
    """One of each kind of file that people have."""
    save(folder / "a" / "rgb.png", noise(8, 8, 3))
    save(folder / "a" / "grey.png", noise(8, 8))
    save(folder / "a" / "alpha.png", noise(8, 8, 4))
    save(folder / "a" / "palette.png", paletted())
    save(folder / "a" / "bilevel.png", Image.fromarray(noise(8, 8)).convert("1"))
    save(folder / "a" / "UPPER.JPG", noise(8, 8, 3))
    save(folder / "b" / "cmyk.jpeg", Image.fromarray(noise(8, 8, 3)).convert("CMYK"))
    save(folder / "b" / "nested" / "deep.webp", noise(8, 8, 3), lossless=True)
    save(folder / "b" / "bitmap.BMP", noise(8, 8, 3))
    (folder / "b" / "notes.txt").write_text("no image")
    (folder / "loose.txt").write_text("no class")


def test_pixels_and_labels_are_imagefolders(tmp_path):
    write_zoo(tmp_path / "train")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns when ImageFolder converts the palette
        oracle = datasets.ImageFolder(str(tmp_path / "train"))
        expected = {path: TF.pil_to_tensor(oracle.loader(path)) for path, _ in oracle.samples}
    listing = list_images(tmp_path / "train")
    assert listing.classes == tuple(oracle.classes)
    assert sorted(zip(listing.files, listing.labels, strict=True)) == sorted(oracle.samples)
    (images,) = load_images([listing], None)
    for path, image in zip(listing.files, images, strict=True):
        assert torch.equal(image, expected[path]), path


def test_hidden_files_and_folders_are_passed_over(tmp_path):
    write_split(tmp_path)
    (tmp_path / "a" / "._00.png").write_bytes(b"what macOS leaves")
    (tmp_path / "a" / ".thumbnails").mkdir()
    (tmp_path / "a" / ".thumbnails" / "00.png").write_bytes(b"")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    listing = list_images(tmp_path)
    assert (listing.classes, len(listing.files)) == (("a", "b"), 9)


def test_sixteen_bits_keep_the_upper_eight(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (8, 8), dtype=np.uint16)
    path = save(tmp_path / "deep.png", values)
    assert np.array_equal(decode(str(path), None), np.broadcast_to(values >> 8, (3, 8, 8)))


@pytest.mark.parametrize(("width", "height"), [(16, 16), (24, 12), (8, 16), (6, 6), (4, 8)])
def test_resizing_is_torchvisions_resize_and_centre_crop(width, height, tmp_path):
    path = save(tmp_path / "image.png", noise(height, width, 3))
    square = TF.center_crop(TF.resize(Image.open(path), 4), [4, 4])
    difference = decode(str(path), 4).astype(int) - TF.pil_to_tensor(square).numpy()
    assert np.abs(difference).max() <= 1


def test_images_of_different_sizes_need_an_image_size(tmp_path):
    write_split(tmp_path / "train", counts=(140, 140))
    save(tmp_path / "train" / "b" / "050.png", noise(9, 8, 3))
    save(tmp_path / "train" / "b" / "100.png", noise(8, 9, 3))
    listing = list_images(tmp_path / "train")
    with pytest.raises(DataError, match=r"b/050.png: 8x9 pixels, .* before it 8x8; set image_size"):
        load_images([listing], None)
    (images,) = load_images([listing], 4)
    assert images.shape == (281, 3, 4, 4)


# refusals


def broken(kind, tmp_path):
    whole = save(tmp_path / f"whole.{kind.split()[-1]}", noise(64, 64, 3)).read_bytes()
    return whole[: len(whole) // 2] if kind.startswith("truncated") else b""


@pytest.mark.parametrize("kind", ["truncated jpg", "truncated png", "empty png", "empty jpg", "text"])
def test_a_broken_image_is_one_clear_line(kind, tmp_path):
    path = tmp_path / "train" / "a" / f"99.{kind.split()[-1]}"
    write_split(tmp_path / "train")
    write_split(tmp_path / "test")
    if kind == "text":
        path = path.with_suffix(".jpg")
        path.write_text("404 not found")
    else:
        path.write_bytes(broken(kind, tmp_path))
    for max_bytes in (10**9, 0):
        with pytest.raises(
            DataError, match=r"train/a/99\.\w+: cannot be decoded \(.+\); replace it"
        ) as caught:
            for _ in batches(load("folder", tmp_path, image_size=8, max_bytes=max_bytes).train, 4):
                pass
        assert "\n" not in str(caught.value)
    assert not list((tmp_path / CACHE_FOLDER).glob("train*"))


def test_folders_in_disorder_are_one_clear_line(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        list_images(tmp_path / "absent")
    with pytest.raises(DataError, match="no class folders; expected train/<class>"):
        list_images(tmp_path)
    write_split(tmp_path)
    with pytest.raises(DataError, match="/b: no such class among the 2 of train"):
        list_images(tmp_path, ["a", "c"])
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "readme.txt").write_text("no image")
    with pytest.raises(DataError, match=r"/c: no images \(\.bmp .*\); add some or delete"):
        list_images(tmp_path)


# cache


@pytest.fixture
def decodes(monkeypatch):
    """The number of images in each decode of a whole split: empty when the cache was used."""
    counts = []
    real = folder_module._decode_all

    def counting(files, image_size):
        counts.append(len(files))
        return real(files, image_size)

    monkeypatch.setattr(folder_module, "_decode_all", counting)
    return counts


def read(folder, image_size=None):
    return load_images([list_images(folder)], image_size)[0]


def cache_of(folder, size="native"):
    return folder.parent / CACHE_FOLDER / f"{folder.name}-{size}.safetensors"


@pytest.fixture
def split(tmp_path):
    write_split(tmp_path / "train")
    return tmp_path / "train"


def test_the_second_read_is_from_the_cache(split, decodes):
    first, second = read(split), read(split)
    assert torch.equal(first, second)
    assert decodes == [9]
    assert os.listdir(split.parent / CACHE_FOLDER) == ["train-native.safetensors"]


def test_each_size_has_its_cache(split, decodes):
    for _ in range(2):
        assert [read(split, size).shape[2] for size in (None, 4, 6)] == [8, 4, 6]
    assert decodes == [9, 9, 9]


def add(split):
    save(split / "a" / "99.png", noise(8, 8, 3))


def remove(split):
    (split / "a" / "00.png").unlink()


def rename(split):
    (split / "a" / "00.png").rename(split / "a" / "77.png")


def rewrite_same_size(split):
    path = split / "a" / "00.png"
    before = path.stat()
    pixels = np.asarray(Image.open(path)).copy()
    save(path, pixels[::-1].copy())
    with path.open("ab") as file:
        file.write(b"\0" * (before.st_size - path.stat().st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def replace_same_time(split):
    path = split / "a" / "00.png"
    before = path.stat()
    save(path, noise(8, 8, 3, high=2))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [add, remove, rename, rewrite_same_size, replace_same_time])
def test_a_stale_cache_is_rebuilt(change, split, decodes):
    read(split)
    change(split)
    images = read(split)
    assert len(decodes) == 2
    files = list_images(split).files
    assert torch.equal(images, torch.from_numpy(np.stack([decode(path, None) for path in files])))
    assert torch.equal(read(split), images)
    assert len(decodes) == 2


def test_the_cache_of_test_depends_on_the_classes_of_train(tmp_path):
    write_split(tmp_path / "test", counts=(1, 1))
    fingerprints = {list_images(tmp_path / "test", c).fingerprint for c in (["a", "b"], ["a", "a2", "b"])}
    assert len(fingerprints) == 2


def flip_one_bit(content):
    return content[:-50] + bytes([content[-50] ^ 1]) + content[-49:]


@pytest.mark.parametrize(
    "damage",
    [lambda c: c[:-1], lambda c: c[:20], lambda c: b"", lambda c: b"garbage" * 99, flip_one_bit],
    ids=["cut", "header-cut", "empty", "garbage", "bit-flip"],
)
def test_a_damaged_cache_is_rebuilt(damage, split, decodes):
    first = read(split).clone()
    cache = cache_of(split)
    content = cache.read_bytes()
    cache.unlink()
    cache.write_bytes(damage(content))
    assert torch.equal(read(split), first)
    assert torch.equal(read(split), first)
    assert decodes == [9, 9]


def test_a_cache_is_as_readable_as_any_new_file(split):
    read(split)
    plain = split.parent / "plain"
    plain.touch()
    assert cache_of(split).stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize(
    "error", [PermissionError("Read-only file system"), SafetensorError("No space left")]
)
def test_an_unwritable_cache_costs_one_line(error, tmp_path, decodes, monkeypatch, caplog):
    pixels = write_split(tmp_path / "train")
    write_split(tmp_path / "test")

    def fail(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(folder_module, "save_file", fail)
    with caplog.at_level(logging.WARNING):
        train, test = load("folder", tmp_path)
    assert torch.equal(train.images, pixels)
    assert test.num_samples == 9
    (record,) = caplog.records
    assert str(error) in record.getMessage()
    assert "\n" not in record.getMessage()
    assert os.listdir(tmp_path / CACHE_FOLDER) == []


def test_a_folder_where_no_cache_folder_can_be_made(split, monkeypatch, caplog):
    (split.parent / CACHE_FOLDER).write_text("in the way")  # root may write anywhere, but not into a file
    assert len(read(split)) == 9
    assert len(caplog.records) == 1


def test_a_read_only_cache_is_used_in_silence(split, decodes, monkeypatch, caplog):
    read(split)
    monkeypatch.setattr(folder_module, "save_file", None)
    read(split)
    assert decodes == [9]
    assert not caplog.records


def test_an_interrupted_write_leaves_the_old_cache_and_nothing_else(split, monkeypatch):
    read(split)
    old = cache_of(split).read_bytes()
    add(split)

    def interrupt(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(folder_module, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        read(split)
    assert cache_of(split).read_bytes() == old
    assert os.listdir(split.parent / CACHE_FOLDER) == [cache_of(split).name]


# folders people have


def test_links_to_parents_are_passed_over(tmp_path, caplog):
    write_split(tmp_path / "train")
    for link, target in (
        ("train/a/up", ".."),
        ("train/a/root", "../.."),
        ("train/loop", "."),
        ("train/b/b", "."),
    ):
        (tmp_path / link).symlink_to(target)
    listing = list_images(tmp_path / "train")
    assert (listing.classes, len(listing.files), listing.labels) == (("a", "b"), 9, (0,) * 5 + (1,) * 4)
    (record,) = caplog.records
    assert "passed over" in record.getMessage()
    assert "3 more" in record.getMessage()
    assert len(record.getMessage()) < len(str(tmp_path)) + 200


def test_folders_that_link_to_each_other_are_read_once(tmp_path):
    write_split(tmp_path)
    for i in range(12):
        (tmp_path / "a" / f"d{i}").mkdir()
        save(tmp_path / "a" / f"d{i}" / "x.png", noise(8, 8, 3))
        for j in range(12):
            (tmp_path / "a" / f"d{i}" / f"to{j}").symlink_to(f"../d{j}")
    assert len(list_images(tmp_path).files) == 9 + 12


def test_links_elsewhere_are_followed(tmp_path):
    write_split(tmp_path / "elsewhere")
    write_split(tmp_path / "train")
    (tmp_path / "train" / "c").symlink_to("../elsewhere/a")
    (tmp_path / "train" / "a" / "more").symlink_to("../../elsewhere/b")
    listing = list_images(tmp_path / "train")
    assert [listing.labels.count(i) for i in range(3)] == [9, 4, 5]


def test_what_is_no_file_is_passed_over(tmp_path, caplog):
    write_split(tmp_path)
    os.mkfifo(tmp_path / "a" / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "a" / "socket.png"))
        (tmp_path / "a" / "folder.png").mkdir()
        (tmp_path / "a" / "dangling.png").symlink_to("nowhere")
        (tmp_path / "a" / "itself.png").symlink_to("itself.png")
        (tmp_path / "c").symlink_to("nowhere")
        listing = list_images(tmp_path)
        (images,) = load_images([listing], None)
    assert (listing.classes, len(images)) == (("a", "b"), 9)
    (record,) = caplog.records
    assert record.getMessage().endswith("c (No such file or directory), and 4 more like it")


def test_a_folder_that_cannot_be_read_is_one_short_line(tmp_path, monkeypatch):
    write_split(tmp_path)
    (tmp_path / "a" / "locked").mkdir()
    real = os.listdir

    def listdir(path):
        if str(path).endswith("locked"):  # whoever is root may read everything
            raise PermissionError(13, "Permission denied", str(path) * 100)
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(
        DataError, match=r"a/locked: cannot be read \(Permission denied\); expected"
    ) as caught:
        list_images(tmp_path)
    assert len(str(caught.value)) < len(str(tmp_path)) + 200


@pytest.mark.parametrize("name", ["two\nlines", "[old]", "\udce9", "汉字", " "])
def test_names_of_any_characters(name, tmp_path):
    write_split(tmp_path / "train")
    save(tmp_path / "train" / name / f"{name}.png", noise(8, 8, 3))
    listing = list_images(tmp_path / "train")
    (images,) = load_images([listing], None)
    assert name in listing.classes
    assert len(images) == 10
    (tmp_path / "train" / name / f"{name}.png").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be decoded") as caught:
        load_images([list_images(tmp_path / "train")], None)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()
