"""Every mode that Pillow has, what becomes of it, and how Pillow's warnings are told."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from resnet_func.app.data import DataError, decode, decoding
from resnet_func.app.data.decoding import to_rgb

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (8, 8), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
OPAQUE = np.concatenate([COLOUR, np.full((8, 8, 1), 255, np.uint8)], 2)
DEEP = RNG.integers(0, 65536, (8, 8), dtype=np.uint16)


def repeat(grey):
    return np.repeat(grey[:, :, None], 3, 2)


def palette(mode):
    image = Image.fromarray(GREY % 4).convert("P")
    image.putpalette([1, 2, 3, 40, 50, 60, 70, 80, 90, 200, 210, 220])
    return image.convert(mode) if mode != "P" else image


PALETTE = np.array([[1, 2, 3], [40, 50, 60], [70, 80, 90], [200, 210, 220]], np.uint8)[GREY % 4]


def of_bytes(mode, pixels):
    return Image.frombytes(mode, (8, 8), pixels.tobytes())


# one row of the table each: the image, and the pixels it must give
MODES = {
    "1": (lambda: Image.fromarray(GREY > 99), repeat(np.where(GREY > 99, 255, 0))),
    "L": (lambda: Image.fromarray(GREY), repeat(GREY)),
    "LA": (lambda: of_bytes("LA", np.stack([GREY, 255 - GREY], 2)), repeat(GREY)),
    "La": (lambda: of_bytes("La", np.stack([GREY, np.full_like(GREY, 255)], 2)), repeat(GREY)),
    "P": (lambda: palette("P"), PALETTE),
    "PA": (lambda: palette("PA"), PALETTE),
    "RGB": (lambda: Image.fromarray(COLOUR), COLOUR),
    "RGBX": (lambda: of_bytes("RGBX", OPAQUE), COLOUR),
    "RGBA": (lambda: of_bytes("RGBA", np.concatenate([COLOUR, GREY[..., None]], 2)), COLOUR),
    "RGBa": (lambda: of_bytes("RGBa", OPAQUE), COLOUR),
    "CMYK": (lambda: of_bytes("CMYK", np.concatenate([255 - COLOUR, 0 * GREY[..., None]], 2)), COLOUR),
    "YCbCr": (lambda: of_bytes("YCbCr", np.stack([GREY, 0 * GREY + 128, 0 * GREY + 128], 2)), repeat(GREY)),
    "HSV": (lambda: of_bytes("HSV", np.stack([GREY, 0 * GREY, GREY], 2)), repeat(GREY)),
    # lightness 0 and 255 without colour: black and white in sRGB, whatever the rendering
    "LAB": (
        lambda: of_bytes(
            "LAB", np.stack([np.where(GREY > 99, 255, 0), 0 * GREY, 0 * GREY], 2).astype(np.uint8)
        ),
        repeat(np.where(GREY > 99, 255, 0)),
    ),
    "I;16": (lambda: Image.fromarray(DEEP), repeat(DEEP >> 8)),
    "I;16L": (lambda: of_bytes("I;16L", DEEP.astype("<u2")), repeat(DEEP >> 8)),
    "I;16B": (lambda: of_bytes("I;16B", DEEP.astype(">u2")), repeat(DEEP >> 8)),
    "I;16N": (lambda: of_bytes("I;16N", DEEP), repeat(DEEP >> 8)),
    "I": (lambda: Image.fromarray(GREY.astype(np.int32)), repeat(GREY)),
    "F": (lambda: Image.fromarray(GREY.astype(np.float32)), repeat(GREY)),
}


@pytest.mark.parametrize("mode", MODES)
def test_the_table_of_modes(mode):
    make, expected = MODES[mode]
    image = make()
    assert image.mode == mode
    difference = np.asarray(to_rgb(image)).astype(int) - expected
    assert np.abs(difference).max() <= (1 if mode == "LAB" else 0)


def test_the_table_has_every_mode_of_pillow():
    assert set(Image.MODES) - set(MODES) == set()
    rows = [line.split("|")[1] for line in decoding.__doc__.splitlines() if line.startswith("| ")]
    told = {mode.strip().split(" ")[0] for row in rows for mode in row.split(",")}
    assert set(MODES) <= told


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.linspace(0, 1, 256, dtype=np.float32), np.arange(256)),  # fractions
        (np.linspace(-0.05, 1.05, 12, dtype=np.float32), None),  # what resampling makes of fractions
        (np.arange(256, dtype=np.float32), np.arange(256)),
        (np.arange(256, dtype=np.int32), np.arange(256)),
        (np.arange(0, 65536, 257, dtype=np.float32), np.arange(256)),  # 16 bits
        (np.arange(0, 65536, 257, dtype=np.int32), np.arange(256)),
        (np.array([0, 1], np.int32), [0, 255]),  # masks
        (np.array([-1, 0, 1], np.float32), [0, 128, 255]),
        (np.array([-300, 700], np.int32), [0, 255]),  # heights
        (np.array([0, 2**31 - 1], np.int32), [0, 255]),
        (np.array([-np.inf, np.nan, 0, 1, np.inf], np.float32), [0, 0, 0, 255, 255]),
        (np.array([np.nan], np.float32), [0]),
        (np.array([-5.0, -5.0], np.float32), [0, 0]),
    ],
    ids=str,
)
def test_the_range_of_wide_formats(values, expected):
    found = np.asarray(to_rgb(Image.fromarray(values[None])))[0, :, 0]
    if expected is None:
        expected = np.rint(values.astype(float).clip(0, 1) * 255)
    np.testing.assert_array_equal(found, expected)


@settings(deadline=None, max_examples=60)
@given(hnp.arrays(st.sampled_from([np.int32, np.float32]), (3, 4)))
def test_no_wide_image_is_refused_and_order_is_kept(values):
    with np.errstate(all="ignore"):
        found = np.asarray(to_rgb(Image.fromarray(values)))[..., 0].ravel().astype(int)
    flat = values.ravel().astype(float)
    numbers = ~np.isnan(flat)
    assert (np.diff(found[numbers][np.argsort(flat[numbers], kind="stable")]) >= 0).all()


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("F", "a.tiff"),
        ("I", "a.tiff"),
        ("I;16", "a.png"),
        ("I;16", "a.pgm"),
        ("I;16B", "a.tiff"),
        ("LAB", "a.tiff"),
    ],
)
def test_files_of_wide_formats(mode, name, tmp_path):
    make, expected = MODES[mode]
    make().save(tmp_path / name)
    difference = decode(str(tmp_path / name), None).transpose(1, 2, 0).astype(int) - expected
    assert np.abs(difference).max() <= (1 if mode == "LAB" else 0)


def test_a_dark_16_bit_pgm_stays_dark(tmp_path):
    """Its format says where white is, whatever the values."""
    Image.fromarray(DEEP // 256).save(tmp_path / "dark.pgm")
    assert not decode(str(tmp_path / "dark.pgm"), None).any()


# warnings


def write_bomb(path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    Image.fromarray(GREY).save(path)
    return str(path)


def test_a_warning_is_one_line_with_the_files_name_once(tmp_path, monkeypatch, caplog):
    path = write_bomb(tmp_path / "large\nimage.png", monkeypatch)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            decode(path, None)
    (record,) = caplog.records
    assert r"large\nimage.png: Image size (64 pixels)" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_warnings_of_threads_name_their_own_files(tmp_path, monkeypatch, caplog):
    paths = [write_bomb(tmp_path / f"{i}.png", monkeypatch) for i in range(40)]
    filters = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        notes = list(pool.map(lambda path: decoding.decode_with_notes(path, None)[1], paths))
    assert all(len(said) == 1 and said[0].startswith(path) for path, said in zip(paths, notes, strict=True))
    assert warnings.filters == filters
    assert not caplog.records


def test_warnings_of_others_pass(monkeypatch, tmp_path):
    """While an image is decoded, another thread's warning goes its usual way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with decoding._pillow_warnings() as own:
            thread = threading.Thread(target=warnings.warn, args=("another's",))
            thread.start()
            thread.join()
        assert own == []
    assert [str(warning.message) for warning in caught] == ["another's"]


def test_an_image_beyond_every_limit_is_refused(tmp_path, monkeypatch):
    path = write_bomb(tmp_path / "a.png", monkeypatch)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    with pytest.raises(DataError, match=r"a\.png: cannot be decoded \(Image size"):
        decode(path, None)


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    code = f"from resnet_func.app.data import decode; decode({str(tmp_path / 'pipe.png')!r}, None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert "pipe.png: cannot be decoded (not a regular file)" in done.stderr
