"""Augmentation: every output is explained by some draw, every draw occurs, nothing else changes."""

from __future__ import annotations

import itertools
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import functional as TF

from resnet_func.app.data import augment
from resnet_func.app.data.augment import Augment

quick = settings(deadline=None, max_examples=40)
FUNCTIONS = {
    "crop-reflect": partial(augment.random_crop, padding=2),
    "crop-constant": partial(augment.random_crop, padding=2, pad="constant"),
    "flip": augment.random_flip,
    "cutout": partial(augment.cutout, size=3),
    "apply": partial(augment.apply, Augment(crop=2, flip=True, cutout=3)),
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def call(name, x, generator):
    return FUNCTIONS[name](x=x, generator=generator)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(n, c, h, w, dtype=torch.float32):
    """Images with no two equal pixels within one image and no zero (as far as the dtype can count)."""
    return (torch.arange(1, c * h * w + 1).view(1, c, h, w).expand(n, c, h, w)).to(dtype).contiguous()


@st.composite
def image_batches(draw, max_side=7):
    n, c = draw(st.integers(0, 4)), draw(st.integers(1, 3))
    h, w = draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
    dtype = draw(st.sampled_from([torch.uint8, torch.float32, torch.float64]))
    layout = draw(st.sampled_from([torch.contiguous_format, torch.channels_last]))
    return numbered(n, c, h, w, dtype).contiguous(memory_format=layout)


def windows(image, padding, pad):
    """Every window that a crop may cut, by numpy's own padding: {(dy, dx): window}."""
    _, h, w = image.shape
    padded = np.pad(image.numpy(), ((0, 0), (padding, padding), (padding, padding)), mode=pad)
    offsets = itertools.product(range(2 * padding + 1), repeat=2)
    return {(dy, dx): padded[:, dy : dy + h, dx : dx + w] for dy, dx in offsets}


def cutouts(image, size):
    """Every image that a cutout may leave, by a loop over centres."""
    _, h, w = image.shape
    result = {}
    for y, x in itertools.product(range(h), range(w)):
        left = image.clone()
        top, side = y - size // 2, x - size // 2
        left[:, max(top, 0) : max(top + size, 0), max(side, 0) : max(side + size, 0)] = 0
        result[y, x] = left
    return result


@quick
@given(image_batches(), st.data(), st.sampled_from(["reflect", "constant"]), st.integers(0, 2**32))
def test_crop_is_a_window_of_the_padded_image(x, data, pad, seed):
    limit = min(x.shape[2:]) - 1 if pad == "reflect" else 9
    padding = data.draw(st.integers(0, limit))
    out = augment.random_crop(x, padding, seeded(seed), pad=pad)
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    for image, cropped in zip(x, out, strict=True):
        candidates = windows(image, padding, pad).values()
        assert any(np.array_equal(cropped.numpy(), window) for window in candidates)


@quick
@given(image_batches(), st.data(), st.integers(0, 2**32))
def test_cutout_blanks_one_clipped_square(x, data, seed):
    size = data.draw(st.integers(0, min(x.shape[2:])))
    out = augment.cutout(x, size, seeded(seed))
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    for image, cut in zip(x, out, strict=True):
        assert any(torch.equal(cut, candidate) for candidate in cutouts(image, size).values())


@quick
@given(image_batches(), st.integers(0, 2**32))
def test_flip_gives_the_image_or_its_mirror(x, seed):
    out = augment.random_flip(x, seeded(seed))
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    for image, flipped in zip(x, out, strict=True):
        assert torch.equal(flipped, image) or torch.equal(flipped, image.flip(2))


def assert_uniform(counts, places, n):
    """Each of `places` outcomes occurs, none more than six standard deviations from its share of `n`."""
    share = n / places
    assert len(counts) == places
    assert all(abs(count - share) < 6 * share**0.5 for count in counts.values())


@pytest.mark.parametrize("pad", ["reflect", "constant"])
def test_crop_offsets_are_uniform_and_drawn_per_image(pad):
    n = 5000
    x = numbered(n, 1, 4, 6)
    place = {window.tobytes(): offset for offset, window in windows(x[0], 2, pad).items()}
    out = augment.random_crop(x, 2, seeded(), pad=pad)
    assert_uniform(Counter(place[image.numpy().tobytes()] for image in out), 25, n)


def test_flips_are_fair_and_drawn_per_image():
    x = numbered(4000, 1, 2, 3)
    flipped = (augment.random_flip(x, seeded()) != x).flatten(1).any(1)
    assert_uniform(Counter(flipped.tolist()), 2, 4000)
    assert 1800 < (flipped[1:] != flipped[:-1]).sum() < 2200  # neighbours are independent


def test_cutout_centres_are_uniform_and_drawn_per_image():
    n = 5000
    x = numbered(n, 2, 4, 5)
    place = {left.numpy().tobytes(): centre for centre, left in cutouts(x[0], 1).items()}
    out = augment.cutout(x, 1, seeded())
    assert_uniform(Counter(place[image.numpy().tobytes()] for image in out), 20, n)


def test_flipping_twice_is_flipping_once_in_distribution():
    x = numbered(4000, 1, 2, 3)
    generator = seeded()
    twice = augment.random_flip(augment.random_flip(x, generator), generator)
    assert_uniform(Counter((twice != x).flatten(1).any(1).tolist()), 2, 4000)


@every_function
def test_the_draw_does_not_depend_on_the_pixels(name):
    x = numbered(16, 3, 8, 8)
    doubled = call(name, 2 * x, seeded(3))
    assert torch.equal(doubled, 2 * call(name, x, seeded(3)))


@every_function
def test_an_image_does_not_depend_on_its_neighbours(name):
    x = numbered(16, 3, 8, 8)
    other = x.clone()
    other[5] += 1000
    a, b = call(name, x, seeded(3)), call(name, other, seeded(3))
    assert torch.equal(a[:5], b[:5])
    assert torch.equal(a[6:], b[6:])
    assert not torch.equal(a[5], b[5])


@every_function
def test_the_generator_decides_and_nothing_else(name):
    x = numbered(64, 3, 8, 8)
    before, untouched = torch.get_rng_state(), x.clone()
    generator = seeded(1)
    first, second = call(name, x, generator), call(name, x, generator)
    assert torch.equal(call(name, x, seeded(1)), first)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(x, untouched)


@every_function
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=["uint8", "fp32"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_memory_format_is_kept_and_changes_no_value(name, dtype, layout):
    x = numbered(8, 3, 8, 8, dtype)
    out = call(name, x.contiguous(memory_format=layout), seeded())
    assert out.is_contiguous(memory_format=layout)
    assert torch.equal(out, call(name, x, seeded()))


@every_function
def test_no_images_give_no_images(name):
    assert call(name, numbered(0, 3, 8, 8), seeded()).shape == (0, 3, 8, 8)


def test_apply_is_crop_then_flip_then_cutout():
    x = numbered(8, 3, 8, 8)
    a, b = seeded(5), seeded(5)
    expected = augment.random_crop(x, 2, b, pad="constant")
    expected = augment.cutout(augment.random_flip(expected, b), 4, b)
    assert torch.equal(augment.apply(Augment(crop=2, flip=True, cutout=4, pad="constant"), x, a), expected)


def test_every_image_is_mirrored_in_one_of_any_two_epochs():
    epochs = torch.stack([augment.mirrored_in(epoch, 5000, seeded(3)) for epoch in range(4)])
    assert (epochs[:-1] ^ epochs[1:]).all()
    assert abs(epochs[0].float().mean() - 0.5) < 5 * 0.5 / 5000**0.5  # five standard deviations


def test_apply_mirrors_the_images_that_it_is_told():
    x, mirrored = torch.arange(24.0).view(3, 1, 2, 4), torch.tensor([True, False, True])
    generator = seeded()
    out = augment.apply(augment.Augment(flip=True), x, generator, mirrored=mirrored)
    assert out.equal(torch.stack([x[0].flip(2), x[1], x[2].flip(2)]))
    assert generator.get_state().equal(seeded().get_state())  # nothing is drawn
    assert augment.apply(augment.Augment(), x, generator, mirrored=mirrored).equal(x)


def test_apply_of_nothing_draws_nothing():
    x, generator = numbered(8, 3, 8, 8), seeded()
    state = generator.get_state()
    assert augment.apply(Augment(), x, generator) is x
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda x, g: augment.random_crop(x, 6, g), "below the image's side; got 6 for 6x8 .*Try padding"),
        (lambda x, g: augment.random_crop(x, -1, g, pad="constant"), "must be 0 or more"),
        (lambda x, g: augment.random_crop(x, 1, g, pad="wrap"), 'pad must be "reflect" or "constant"'),
        (lambda x, g: augment.cutout(x, 7, g), "cutout size must be 0 to 6 for 6x8; got 7"),
        (lambda x, g: augment.cutout(x, -1, g), "got -1"),
        (lambda x, g: augment.random_flip(x[0], g), r"expected a batch of images \[N, C, H, W\]"),
        (lambda x, g: augment.random_flip(x.to("meta"), g), "got cpu for meta"),
        (lambda x, g: augment.resize(x, 0), "size of 1 or more"),
        (lambda x, g: augment.resize(x[0], 4), r"\(3, 6, 8\) and 4"),
        (lambda x, g: Augment(crop=-1), "0 or more; got -1 and 0"),
        (lambda x, g: Augment(pad="wrap"), "got 'wrap'"),
    ],
)
def test_mistakes_are_explained(mistake, message):
    with pytest.raises(ValueError, match=message):
        mistake(numbered(2, 3, 6, 8), seeded())


@pytest.mark.parametrize("size", [3, 8, 20])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_resize_is_torchvisions(size, layout):
    x = torch.rand(2, 3, 8, 11, generator=seeded()).contiguous(memory_format=layout)
    out = augment.resize(x, size)
    assert torch.equal(out, TF.resize(x, [size, size], antialias=True))
    assert out.is_contiguous(memory_format=layout)


def test_resize_of_bytes_rounds_to_nearest():
    x = torch.randint(0, 256, (4, 1, 8, 8), generator=seeded(), dtype=torch.uint8)
    out = augment.resize(x, 16)
    assert out.dtype == torch.uint8
    assert torch.equal(out, augment.resize(x.float(), 16).round().to(torch.uint8))
    assert augment.resize(x[:0], 16).shape == (0, 1, 16, 16)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_normalize_is_torchvisions_to_the_bit(layout):
    x = torch.arange(768).to(torch.uint8).view(1, 3, 16, 16).contiguous(memory_format=layout)
    mean, std = torch.tensor([0.49, 0.48, 0.45]), torch.tensor([0.25, 0.24, 0.26])
    expected = TF.normalize(TF.to_tensor(x[0].permute(1, 2, 0).numpy()), mean.tolist(), std.tolist())[None]
    out = augment.normalize(x, mean, std)
    assert torch.equal(out, expected)
    assert out.is_contiguous(memory_format=layout)


def test_normalize_in_half_precision_rounds_once():
    x = torch.arange(256).to(torch.uint8).view(1, 1, 16, 16)
    mean, std = torch.tensor([0.3]), torch.tensor([0.7])
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(augment.normalize(x, mean, std, dtype), augment.normalize(x, mean, std).to(dtype))
    double = (x.double() / 255 - mean.double()) / std.double()
    assert torch.equal(augment.normalize(x, mean, std, torch.float64), double)


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.zeros(1, 3, 4, 4), torch.zeros(3), torch.ones(3)),
        (torch.zeros(1, 1, 4, 4, dtype=torch.uint8), torch.zeros(3), torch.ones(3)),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(3), torch.ones(1)),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(3), torch.ones(3)),
    ],
    ids=["float", "grey", "std", "unbatched"],
)
def test_normalize_refuses_what_does_not_fit(arguments):
    with pytest.raises(ValueError, match="expected uint8 images"):
        augment.normalize(*arguments)
