"""Image files to RGB pixels of 8 bits.

What becomes of each of Pillow's modes; where torchvision's ImageFolder reads a mode well, its pixels:

| mode                      | what it is                        | becomes                                   |
|---------------------------|-----------------------------------|-------------------------------------------|
| 1                         | black and white                   | 0 and 255 in all three channels           |
| L                         | grey, 8 bits                      | the value in all three channels           |
| LA, La                    | grey, alpha (a: premultiplied)    | the grey; alpha is dropped                |
| P, PA                     | palette, alpha                    | the palette's colour; alpha is dropped    |
| RGB, RGBX                 | colour, unused byte               | as it is                                  |
| RGBA, RGBa                | colour, alpha (a: premultiplied)  | the colour; alpha is dropped              |
| CMYK, YCbCr, HSV, LAB     | other colour spaces               | Pillow's conversion to RGB (LAB to sRGB)  |
| I;16, I;16L, I;16B, I;16N | grey, 16 bits                     | the upper 8 bits                          |
| I of a PNG, PGM or PPM    | grey, 16 bits                     | the upper 8 bits                          |
| I otherwise               | grey, 32-bit integers             | the range that the values lie in          |
| F                         | grey, floating point              | the range that the values lie in          |

I and F do not say which value is white. The smallest of the ranges 0 to 1, 0 to 255 and 0 to 65,535 that
holds all values of the file is mapped to 0 to 255 (floats may leave it by a tenth and are clipped); where
none holds them, the file's lowest value is black and its highest white. NaN is black.

Transparency shows the colour that lies beneath. EXIF orientation is not applied. Of an animation or a file of
several pages the first image counts.
"""

from __future__ import annotations

import io
import logging
import os
import stat
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from resnet_func.app.data import members
from resnet_func.app.errors import AppError
from resnet_func.app.names import printable

DECODE_VERSION = 2  # to be raised when `decode` gives other pixels, so that no old cache is used
FULL_SCALES = (1.0, 255.0, 65535.0)
FLOAT_OVERSHOOT = (
    0.1  # what interpolation leaves above the full scale, and below 0 for each unit of the highest value
)

logger = logging.getLogger(__name__)


class DataError(AppError, ValueError):
    """Data that cannot be used: one line that names the file or folder, and the way out."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def decode(path: str, image_size: int | None) -> UInt8[np.ndarray, "3 h w"]:
    """Decode one image file to RGB; with `image_size`, the centre square by antialiased bilinear resize.

    `path` may be the address of a member of an archive (`members`).

    The table at the top of this module says what becomes of each kind of image. A warning of Pillow's becomes
    a line in the log that names the file, once.

    Raises:
        DataError: the file is unreadable, truncated, no image or no regular file.
    """
    pixels, notes = decode_with_notes(path, image_size)
    log_once(notes)
    return pixels


def decode_with_notes(
    path: str, image_size: int | None, archives: members.Archives | None = None
) -> tuple[UInt8[np.ndarray, "3 h w"], tuple[str, ...]]:
    """`decode` that returns what Pillow warns of, a line each, and logs nothing.

    `archives` are read from where they are open, if `path` is a member's address.
    """
    member = members.parse(path)
    with _pillow_warnings() as caught:
        try:
            if member is not None:
                file = io.BytesIO(members.read(path) if archives is None else archives.read(member))
            elif _is_file(path):
                file = path
            else:  # opening a pipe would wait for its writer for ever
                raise ValueError("not a regular file")
            with Image.open(file) as image:
                rgb = to_rgb(image)
        except DataError:
            raise
        except Exception as error:  # each of Pillow's formats raises its own: OSError, SyntaxError ...
            raise DataError(
                f"{path}: cannot be decoded ({_reason(error)}); replace it or delete it"
            ) from error
    if image_size is not None and rgb.size != (image_size, image_size):
        width, height = rgb.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        square = (left, top, left + side, top + side)
        rgb = rgb.resize((image_size, image_size), Image.Resampling.BILINEAR, box=square)
    notes = tuple(printable(f"{path}: {message}") for message in dict.fromkeys(caught))
    return np.asarray(rgb).transpose(2, 0, 1), notes


def _is_file(path: str) -> bool:
    """Whether it is a regular file.

    Raises:
        DataError: it is a folder, or there is nothing.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file") from error
    if stat.S_ISDIR(mode):
        raise DataError(f"{path}: a folder, not an image")
    return stat.S_ISREG(mode)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, as the table at the top of this module says.

    >>> to_rgb(Image.new("F", (1, 1), 0.5)).getpixel((0, 0))
    (128, 128, 128)
    """
    # Pillow would clip 16 bits at 255 instead of scaling; those of a PGM it reads as mode I
    sixteen_bits = image.mode == "I" and image.format in ("PNG", "PPM")
    if sixteen_bits or image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        overshoot = FLOAT_OVERSHOOT if image.mode == "F" else 0.0
        image = Image.fromarray(_scale_to_8_bits(np.asarray(image).astype(np.float64), overshoot))
    elif image.mode == "La":
        image = image.convert("LA")  # there is no direct way
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB warns
    return image.convert("RGB")


def _scale_to_8_bits(values: Float[np.ndarray, "h w"], overshoot: float) -> UInt8[np.ndarray, "h w"]:
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    for scale in FULL_SCALES:
        if low >= -overshoot * high and high <= (1 + overshoot) * scale:
            low, high = 0.0, scale
            break
    span = high - low or 1.0  # a single value, outside every range, is black
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    scaled = (values - low) * (255 / span)
    # 16 bits keep the upper eight, as those of mode I;16 do
    scaled = np.floor(values / 256) if (low, high) == (0.0, 65535.0) else np.rint(scaled)
    return scaled.clip(0, 255).astype(np.uint8)


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__


# ------------------------------------------------------------------------------------ Pillow's warnings

_local = threading.local()
_lock = threading.Lock()
_listeners = 0
_logged: set[str] = set()


def log_once(notes: Iterable[str]) -> None:
    """Log each line that this process has not logged yet."""
    for note in notes:
        if note not in _logged:
            _logged.add(note)
            logger.warning("%s", note)


@contextmanager
def _pillow_warnings() -> Iterator[list[str]]:
    """Collect what Pillow warns of in this thread.

    `warnings.catch_warnings` alone belongs to the process, not to a thread: the first thread in opens it, the
    last one out closes it, and each finds its own list.
    """
    global _listeners, _catcher
    _local.messages = messages = []
    with _lock:
        if not _listeners:
            _catcher = warnings.catch_warnings()
            _catcher.__enter__()
            warnings.filterwarnings("always", module=r"PIL(\.|$)")
            warnings.filterwarnings("always", category=Image.DecompressionBombWarning)
            warnings.showwarning = _collect_or_show(warnings.showwarning)
        _listeners += 1
    try:
        yield messages
    finally:
        _local.messages = None
        with _lock:
            _listeners -= 1
            if not _listeners:
                _catcher.__exit__(None, None, None)


_catcher = warnings.catch_warnings()


def _collect_or_show(show):  # pyright: ignore[reportMissingParameterType]
    def collect(message, category, filename, lineno, file=None, line=None):  # pyright: ignore[reportMissingParameterType]
        messages = getattr(_local, "messages", None)
        if messages is None:
            show(message, category, filename, lineno, file, line)
        else:
            messages.append(" ".join(str(message).split()))

    return collect
