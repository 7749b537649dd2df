"""Another default dtype or device changes nothing: everything is created with its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from resnet_func.app.data import augment, batches, channel_statistics, load, normalize
from tests.app.image_folder import global_defaults, make_image_folder

# Python 3.12 and later warn about every fork of a process with threads; DataLoader forks by default.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

DEFAULTS = {"float64": (torch.float64, None), "meta": (torch.float32, "meta")}


@pytest.fixture(params=DEFAULTS)
def defaults(request):
    return DEFAULTS[request.param]


def everything(kind, root) -> Iterator[Tensor]:
    """Every tensor on the way from files to a normalised batch."""
    options = {"folder": {}, "small": {"image_size": 6}, "stream": {"max_bytes": 0}, "digits": {}}[kind]
    name = "digits" if kind == "digits" else "folder"
    train, test = load(name, root, **options)
    generator = torch.Generator("cpu").manual_seed(0)
    mean, std = channel_statistics(train)
    yield from (mean, std, generator.get_state())
    change = augment.Augment(crop=2, flip=True, cutout=3, pad="constant")
    for source in (train, test):
        for shuffle in (True, False):
            for images, labels in batches(source, 10, generator=generator, shuffle=shuffle):
                x = normalize(images, mean, std)
                yield from (images, labels, x, augment.apply(change, x, generator))
                yield from (augment.resize(x, 5), augment.resize(images, 5))
    yield generator.get_state()


@pytest.mark.parametrize("kind", ["folder", "small", "stream", "digits"])
@pytest.mark.parametrize("cached", [False, True])
def test_other_defaults_change_no_bit(kind, cached, defaults, tmp_path):
    plain = make_image_folder(tmp_path / "plain")
    other = plain if cached else make_image_folder(tmp_path / "other")
    expected = list(everything(kind, plain))
    with global_defaults(*defaults):
        found = list(everything(kind, other))
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
        assert torch.equal(ours, theirs)
