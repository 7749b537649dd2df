"""Streams: the data set to the bit, decoded by workers that the parent alone ends."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
import signal
import time

import pytest
import torch
from PIL import Image

from resnet_func.app.data import DataError, Dataset, Stream, batches, channel_statistics, load, sources
from tests.app.image_folder import noise, save, write_split

# Python 3.12 and later warn about every fork of a process with threads; DataLoader forks by default.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


# streams


@pytest.fixture
def both(tmp_path):
    """The same training split in memory and streamed."""
    write_split(tmp_path / "train", counts=(20, 13))
    write_split(tmp_path / "test")
    return load("folder", tmp_path).train, load("folder", tmp_path, max_bytes=0).train


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stream_is_the_data_set_to_the_bit(both, workers):
    memory, stream = both
    assert isinstance(memory, Dataset)
    assert isinstance(stream, Stream)
    stream = dataclasses.replace(stream, workers=workers)
    for options in ({"generator": seeded(3), "shuffle": True}, {"drop_last": True}):
        state = options["generator"].get_state() if "generator" in options else None
        a = list(batches(memory, 5, **options))
        if state is not None:
            options["generator"].set_state(state)
        b = list(batches(stream, 5, **options))
        assert len(a) == len(b) == (6 if "drop_last" in options else 7)
        for (images, labels), (streamed_images, streamed_labels) in zip(a, b, strict=True):
            assert torch.equal(images, streamed_images)
            assert torch.equal(labels, streamed_labels)
    facts = [(s.name, s.classes, s.num_samples, s.image_shape) for s in both]
    assert facts[0] == facts[1]


def test_a_stream_touches_no_global_generator(both):
    before = torch.get_rng_state()
    list(batches(both[1], 8, generator=seeded(), shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stream_can_be_left_early_and_started_again(both):
    memory, stream = both
    for images, _ in batches(stream, 4):
        assert torch.equal(images, memory.images[:4])
        break
    assert sum(len(images) for images, _ in batches(stream, 4)) == 33


def test_a_stream_of_nothing_asks_no_worker(both):
    assert list(both[1].read(())) == []


def test_a_stream_measures_an_even_sample(both, monkeypatch):
    memory, stream = both
    assert all(map(torch.equal, channel_statistics(stream), channel_statistics(memory)))
    monkeypatch.setattr("resnet_func.app.data.sources.STREAM_STATISTICS_IMAGES", 11)
    assert all(map(torch.equal, channel_statistics(stream), channel_statistics(memory.images[::3])))


def test_a_stream_delivers_where_it_is_sent(both):
    images, labels = next(batches(both[1].to("meta"), 4))
    assert (images.device.type, labels.device.type) == ("meta", "meta")


def test_a_stream_resizes(both, tmp_path):
    streamed = load("folder", tmp_path, image_size=4, max_bytes=0).train
    images, _ = next(batches(streamed, 33))
    assert torch.equal(images, load("folder", tmp_path, image_size=4).train.images)
    assert streamed.image_shape == (3, 4, 4)


def test_a_stream_names_the_first_image_of_another_size(both, tmp_path):
    save(tmp_path / "train" / "b" / "99.png", noise(9, 8, 3))
    with pytest.raises(DataError, match=r"b/99.png: 8x9 pixels, .* 8x8; set image_size") as caught:
        list(batches(load("folder", tmp_path, max_bytes=0).train, 4))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_survive_ctrl_c(method, both, monkeypatch):
    """Ctrl-C reaches every process of a terminal; only the parent may decide what it means."""
    loader = functools.partial(torch.utils.data.DataLoader, multiprocessing_context=method)
    monkeypatch.setattr(torch.utils.data, "DataLoader", loader)
    memory, streamed = both
    iterator = batches(dataclasses.replace(streamed, workers=2), 2)
    found = [next(iterator)[0], next(iterator)[0]]  # both workers are up
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
    time.sleep(0.2)
    found += [images for images, _ in iterator]
    assert torch.equal(torch.cat(found), memory.images)


def test_statistics_of_a_stream_hold_few_images(both, monkeypatch):
    """However large the images, as many bytes are read at a time; the sums are the same."""
    memory, streamed = both
    expected = channel_statistics(memory)
    sizes = []
    real = Stream.read

    def read(self, index_batches):
        index_batches = list(index_batches)
        sizes.extend(map(len, index_batches))
        return real(self, index_batches)

    monkeypatch.setattr(Stream, "read", read)
    for limit, size in ((5 * 3 * 8 * 8, 5), (1, 1)):
        sizes.clear()
        monkeypatch.setattr(sources, "CHUNK_BYTES", limit)
        assert all(map(torch.equal, channel_statistics(streamed), expected))
        assert all(map(torch.equal, channel_statistics(memory), expected))
        assert max(sizes) == size
        assert sum(sizes) == 33


def test_a_chunk_of_large_images_is_a_few_megabytes():
    for side in (8, 32, 224, 1024, 10_000):
        count = sources._chunk_size((3, side, side))
        assert 1 <= count <= 1024
        assert count == 1 or count * 3 * side**2 <= 8 << 20


def test_a_workers_warnings_are_told_once(both, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # forked workers know it
    for _ in range(2):
        list(both[1].read([torch.arange(2), torch.arange(2)]))
    lines = [record.getMessage() for record in caplog.records if "exceeds limit" in record.getMessage()]
    assert len(lines) == 2
    assert all(line.startswith(path) for line, path in zip(sorted(lines), both[1].files, strict=False))
