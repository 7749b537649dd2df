"""Loading by name, order, statistics. Nothing is downloaded: torchvision's own code reads small forgeries."""

from __future__ import annotations

import hashlib
import io
import itertools
import pickle
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets

from resnet_func.app import data
from resnet_func.app.data import DataError, Dataset, batches, channel_statistics, load, sources

quick = settings(deadline=None, max_examples=40)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def dataset(n, shape=(1, 2, 2), seed=0):
    """Random images; label i is sample i, so that a batch tells which samples are in it."""
    images = torch.randint(0, 256, (n, *shape), generator=seeded(seed), dtype=torch.uint8)
    return Dataset(images, torch.arange(n), tuple(map(str, range(n))), "forged train")


def order(source, batch_size, **options):
    return [labels.tolist() for _, labels in batches(source, batch_size, **options)]


# order


@quick
@given(st.integers(0, 40), st.integers(1, 50), st.booleans(), st.integers(0, 2**32))
def test_a_pass_visits_every_sample_once(n, batch_size, shuffle, seed):
    source = dataset(n)
    seen = order(source, batch_size, generator=seeded(seed), shuffle=shuffle)
    flat = [i for batch in seen for i in batch]
    assert sorted(flat) == list(range(n))
    assert shuffle or flat == list(range(n))
    assert all(len(batch) == batch_size for batch in seen[:-1])


@quick
@given(st.integers(0, 60), st.integers(0, 70), st.integers(0, 2**32))
def test_a_window_shuffles_what_lies_together(n, window, seed):
    order = data.shuffled(n, seeded(seed), window).tolist()
    assert sorted(order) == list(range(n))
    assert order == data.shuffled(n, seeded(seed), window).tolist()
    if 0 < window < n:
        assert any(in_runs(order, window, start) for start in range(n))
    else:
        assert order == torch.randperm(n, generator=seeded(seed)).tolist()


def in_runs(order, window, start):
    """Whether the order is that of windows, each of numbers that lie together, counted from `start` on."""
    turns = [(number - start) % len(order) // window for number in order]
    changes = sum(a != b for a, b in itertools.pairwise(turns))
    return changes == -(-len(order) // window) - 1


def test_windows_come_in_random_order_and_mix_within():
    orders = {tuple(data.shuffled(9, seeded(seed), 3).tolist()) for seed in range(200)}
    assert len(orders) > 150
    assert {order[0] for order in orders} == set(range(9))
    with pytest.raises(ValueError, match="window must be 0, for all, or more; got -1"):
        data.shuffled(9, seeded(), -1)


@quick
@given(st.integers(1, 40), st.data())
def test_drop_last_leaves_full_batches_of_the_same_order(n, draw):
    batch_size = draw.draw(st.integers(1, n))
    every = order(dataset(n), batch_size, generator=seeded(), shuffle=True)
    full = order(dataset(n), batch_size, generator=seeded(), shuffle=True, drop_last=True)
    assert full == [batch for batch in every if len(batch) == batch_size]
    assert len(full) == n // batch_size


def test_a_batch_is_images_with_their_labels():
    source = dataset(10)
    for images, labels in batches(source, 4, generator=seeded(), shuffle=True):
        assert images.dtype == torch.uint8
        assert torch.equal(images, source.images[labels])


def test_the_order_depends_on_the_generator_alone():
    before = torch.get_rng_state()
    first = order(dataset(50, seed=1), 8, generator=seeded(7), shuffle=True)
    assert order(dataset(50, (3, 4, 4), seed=2), 8, generator=seeded(7), shuffle=True) == first
    assert order(dataset(50), 8, generator=seeded(8), shuffle=True) != first
    assert torch.equal(torch.get_rng_state(), before)


def test_a_saved_generator_resumes_at_the_next_pass():
    generator = seeded()
    batches(
        dataset(50), 8, generator=generator, shuffle=True
    )  # one pass, of which no batch is even looked at
    saved = generator.get_state()
    second = order(dataset(50), 8, generator=generator, shuffle=True)
    assert order(dataset(50), 8, generator=torch.Generator().set_state(saved), shuffle=True) == second
    assert order(dataset(50), 8, generator=seeded(), shuffle=True) != second


def test_an_ordered_pass_leaves_the_generator_alone():
    generator = seeded()
    order(dataset(5), 2, generator=generator)
    assert torch.equal(generator.get_state(), seeded().get_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "must be 1 to 5, the samples of forged train; got 0"),
        ({"batch_size": 6, "drop_last": True}, "must be 1 to 5, .* got 6"),
        ({"batch_size": 2, "shuffle": True}, "shuffle needs a generator. Try"),
    ],
)
def test_batches_refuses_at_the_call(options, message):
    with pytest.raises(ValueError, match=message):
        batches(dataset(5), **options)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 1, 4, 4), [0, 0], r"images must be uint8 .*float32 \[2, 1, 4, 4\]"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), [0, 0], "images must be uint8"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), [0.0, 0.0], r"labels must be int64 \[2\]; got float32"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), [0, 0, 0], r"got int64 \[3\]"),
    ],
)
def test_a_dataset_is_bytes_with_one_label_each(images, labels, message):
    with pytest.raises(ValueError, match=message):
        Dataset(images, torch.tensor(labels), ("a", "b"), "forged")


def test_a_dataset_moves_as_a_whole():
    moved = dataset(4).to("meta")
    assert (moved.images.device.type, moved.labels.device.type) == ("meta", "meta")
    assert (moved.name, moved.num_samples, moved.image_shape) == ("forged train", 4, (1, 2, 2))


# statistics


@quick
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32))
def test_statistics_are_numpys_in_float64(n, c, side, seed):
    images = dataset(n, (c, side, side + 1), seed).images
    pixels = images.permute(1, 0, 2, 3).reshape(c, -1).double().numpy() / 255
    mean, std = channel_statistics(images)
    expected = np.where(pixels.std(1) > 1e-12, pixels.std(1), 1.0)
    np.testing.assert_allclose(mean.numpy(), pixels.mean(1), rtol=1e-7)
    np.testing.assert_allclose(std.numpy(), expected, rtol=1e-7)


def test_statistics_run_over_all_chunks_of_images_or_source():
    source = dataset(2 * sources.CHUNK + 100, (2, 3, 3))
    pixels = source.images.double() / 255
    mean, std = channel_statistics(source.images)
    torch.testing.assert_close(mean, pixels.mean((0, 2, 3)).float(), rtol=1e-7, atol=0)
    torch.testing.assert_close(std, pixels.std((0, 2, 3), correction=0).float(), rtol=1e-7, atol=0)
    assert all(map(torch.equal, channel_statistics(source), (mean, std)))


def test_normalised_data_have_mean_zero_and_deviation_one():
    source = dataset(200, (3, 4, 4))
    x = data.normalize(source.images, *channel_statistics(source), torch.float64)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", range(0, 256, 5))
def test_a_constant_channel_normalises_to_zero(value):
    images = torch.full((300, 1, 2, 2), value, dtype=torch.uint8)
    assert not data.normalize(images, *channel_statistics(images)).any()


@pytest.mark.parametrize("images", [dataset(0).images, torch.zeros(2, 3, 4, 4)], ids=["empty", "float"])
def test_statistics_refuse(images):
    with pytest.raises(ValueError, match=r"at least one image|expected uint8"):
        channel_statistics(images)


# by name


def test_digits_are_scikit_learns_split_by_class():
    before = torch.get_rng_state()
    train, test = load("digits")
    assert torch.equal(torch.get_rng_state(), before)
    assert (train.num_samples, test.num_samples, train.image_shape) == (1433, 364, (1, 8, 8))
    values, targets = load_digits(return_X_y=True)
    rows = [
        (*(image.double() / 255 * 16).round().flatten().tolist(), label)
        for source in (train, test)
        for image, label in zip(source.images, source.labels.tolist(), strict=True)
    ]
    assert sorted(rows) == sorted((*v, t) for v, t in zip(values.tolist(), targets.tolist(), strict=True))
    shares = np.bincount(test.labels.numpy()) / np.bincount(targets)
    assert ((shares >= 0.2) & (shares < 0.21)).all()


def test_digits_resize_like_any_other():
    train, test = load("digits", image_size=16)
    assert (train.image_shape, test.image_shape) == ((1, 16, 16), (1, 16, 16))
    small = load("digits").train
    torch.testing.assert_close(train.images.float().mean(), small.images.float().mean(), rtol=0.02, atol=0)
    assert torch.equal(train.labels, small.labels)


class Python2Pickler(pickle.Pickler):
    """Writes a dtype as CIFAR's own pickles have it: align as an integer, for which new numpy warns."""

    def reducer_override(self, obj):
        if isinstance(obj, np.dtype):
            return (np.dtype, ("u1", 0, 1), (3, "|", None, None, None, -1, -1, 0))
        return NotImplemented


def forge(path, content):
    """Write a file; return the [name, md5] that torchvision is to expect."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return [path.name, hashlib.md5(content).hexdigest()]


def forge_cifar(root, monkeypatch, cls, folder, label_key, meta_key):
    """A CIFAR of five images in two training files... and two for testing; returns the pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (7, 3072), dtype=np.uint8)
    entries = []
    for name, part in (("one", slice(0, 3)), ("two", slice(3, 5)), ("test", slice(5, 7))):
        content = io.BytesIO()
        rows = pixels[part]
        Python2Pickler(content, 2).dump({"data": rows, label_key: list(range(len(rows)))})
        entries.append(forge(root / folder / name, content.getvalue()))
    meta = forge(root / folder / "meta", pickle.dumps({meta_key: ["ant", "bee", "cat"]}))
    monkeypatch.setattr(cls, "train_list", entries[:2])
    monkeypatch.setattr(cls, "test_list", entries[2:])
    monkeypatch.setattr(cls, "meta", {"filename": meta[0], "key": meta_key, "md5": meta[1]})
    return torch.from_numpy(pixels).view(-1, 3, 32, 32)


CIFARS = {
    "cifar10": (datasets.CIFAR10, "cifar-10-batches-py", "labels", "label_names"),
    "cifar100": (datasets.CIFAR100, "cifar-100-python", "fine_labels", "fine_label_names"),
}


@pytest.mark.parametrize("name", CIFARS)
@pytest.mark.parametrize("download", [True, False])
def test_cifar_is_torchvisions(name, download, tmp_path, monkeypatch):
    pixels = forge_cifar(tmp_path, monkeypatch, *CIFARS[name])
    train, test = load(name, tmp_path, download=download)
    assert torch.equal(train.images, pixels[:5])
    assert torch.equal(test.images, pixels[5:])
    assert train.labels.tolist() == [0, 1, 2, 0, 1]
    assert (train.classes, train.name, test.name) == (("ant", "bee", "cat"), f"{name} train", f"{name} test")
    assert load(name, tmp_path, image_size=8).test.image_shape == (3, 8, 8)


class Garbage(BaseHTTPRequestHandler):
    """Answers every request with bytes that nobody wants."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "7")
        self.end_headers()
        self.wfile.write(b"garbage")

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


@pytest.fixture
def garbage_server(monkeypatch):
    """The address of a server on this machine."""
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Garbage) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize("name", CIFARS)
def test_a_damaged_cifar_is_one_clear_line(name, tmp_path, monkeypatch, garbage_server):
    forge_cifar(tmp_path, monkeypatch, *CIFARS[name])
    cls, folder, *_ = CIFARS[name]
    monkeypatch.setattr(cls, "url", f"{garbage_server}archive.tar.gz")
    with (tmp_path / folder / "two").open("ab") as file:
        file.write(b"x")
    for download in (True, False):
        with pytest.raises(DataError, match=rf"{name}: .*{folder} .*orrupted.*delete") as caught:
            load(name, tmp_path, download=download)
        assert "\n" not in str(caught.value)


def test_no_network_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR10, "url", (tmp_path / "absent.tar.gz").as_uri())
    with pytest.raises(DataError, match=r"cifar-10-batches-py .*absent.*check the network") as caught:
        load("cifar10", tmp_path / "new")
    assert "\n" not in str(caught.value)


def forge_mnist(folder, n_train=4, n_test=2):
    pixels = np.random.default_rng(0).integers(0, 256, (n_train + n_test, 28, 28), dtype=np.uint8)
    for split, part in (("train", slice(0, n_train)), ("t10k", slice(n_train, None))):
        images, labels = pixels[part], np.arange(len(pixels[part]), dtype=np.uint8)
        header = struct.pack(">IIII", 0x803, *images.shape)
        forge(folder / f"{split}-images-idx3-ubyte", header + images.tobytes())
        forge(
            folder / f"{split}-labels-idx1-ubyte", struct.pack(">II", 0x801, len(labels)) + labels.tobytes()
        )
    return torch.from_numpy(pixels)[:, None]


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_is_torchvisions(name, folder, tmp_path):
    pixels = forge_mnist(tmp_path / folder / "raw")
    train, test = load(name, tmp_path)
    assert torch.equal(train.images, pixels[:4])
    assert torch.equal(test.images, pixels[4:])
    assert test.labels.tolist() == [0, 1]
    assert len(train.classes) == 10


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_a_damaged_mnist_is_one_clear_line(name, folder, tmp_path, monkeypatch, garbage_server):
    raw = tmp_path / folder / "raw"
    forge_mnist(raw)
    images = raw / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-100])
    with pytest.raises(DataError, match=f"{name}: .*{folder}/raw"):
        load(name, tmp_path)
    images.unlink()
    monkeypatch.setattr(getattr(datasets, folder), "mirrors", [garbage_server])
    with pytest.raises(DataError, match=r"(Error downloading|cannot load) .*corrupted") as caught:
        load(name, tmp_path)
    assert "\n" not in str(caught.value)


def test_downloads_go_to_the_users_cache_by_default(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pixels = forge_mnist(tmp_path / "resnet_func" / "MNIST" / "raw")
    assert torch.equal(load("mnist").train.images, pixels[:4])


def test_mistakes_are_explained(tmp_path):
    with pytest.raises(DataError, match="no data set is called 'imagenet'; there are digits, cifar10"):
        load("imagenet")
    with pytest.raises(DataError, match="folder needs data_dir, a folder that holds train/<class>"):
        load("folder")
    with pytest.raises(ValueError, match="image_size must be 1 or more pixels; got 0"):
        load("digits", image_size=0)
    assert issubclass(DataError, ValueError)


# folder


def write_folder(root, test="test", counts=(3, 2)):
    """Classes ant and bee in train, bee alone for testing; the pixels tell split, class and index apart."""
    pixels = {}
    for split, names in (("train", ("ant", "bee")), (test, ("bee",))):
        for name, count in zip(names, counts, strict=False):
            for i in range(count):
                path = root / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                rng = np.random.default_rng([len(pixels), i])
                pixels[path.relative_to(root)] = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
                Image.fromarray(pixels[path.relative_to(root)]).save(path)
    return pixels


@pytest.mark.parametrize("test_name", ["test", "val", "valid"])
def test_a_folder_is_read_by_class_then_name(test_name, tmp_path):
    pixels = write_folder(tmp_path, test_name)
    train, test = load("folder", tmp_path)
    expected = torch.from_numpy(np.stack([pixels[path] for path in sorted(pixels)])).permute(0, 3, 1, 2)
    found = torch.cat([test.images, train.images] if test_name == "test" else [train.images, test.images])
    assert torch.equal(found, expected)
    assert (train.classes, train.labels.tolist()) == (("ant", "bee"), [0, 0, 0, 1, 1])
    assert (test.classes, test.labels.tolist()) == (("ant", "bee"), [1, 1, 1])
    assert (train.name, test.name) == (f"{tmp_path.name} train", f"{tmp_path.name} {test_name}")


def test_test_is_preferred_to_val(tmp_path):
    write_folder(tmp_path, "val", counts=(5, 5))
    write_folder(tmp_path, "test", counts=(2, 2))
    assert load("folder", tmp_path).test.num_samples == 2


@pytest.mark.parametrize(("max_bytes", "kind"), [(8 * 72, Dataset), (8 * 72 - 1, data.Stream)])
def test_a_folder_above_the_budget_streams(max_bytes, kind, tmp_path, monkeypatch):
    write_folder(tmp_path)
    for splits in (
        load("folder", tmp_path, max_bytes=max_bytes),
        monkeypatch.setattr(sources, "_available_memory", lambda: 2 * max_bytes) or load("folder", tmp_path),
    ):
        assert [type(source) for source in splits] == [kind, kind]


def test_the_budget_counts_pixels_after_resizing(tmp_path):
    write_folder(tmp_path)
    assert isinstance(load("folder", tmp_path, image_size=2, max_bytes=8 * 12).train, Dataset)
    assert isinstance(load("folder", tmp_path, image_size=9, max_bytes=8 * 72).train, data.Stream)


@pytest.mark.parametrize("missing", ["everything", "train", "test"])
def test_a_missing_folder_names_the_layout(missing, tmp_path):
    write_folder(tmp_path)
    root = tmp_path / "nowhere" if missing == "everything" else tmp_path
    if missing != "everything":
        (tmp_path / missing).rename(tmp_path / "other")
    with pytest.raises(DataError, match=rf"{root.name}: expected train/<class>/<image> and test/"):
        load("folder", root)


def test_available_memory_is_between_a_megabyte_and_what_there_is():
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 2**20 < sources._available_memory() <= total
