"""Training images: unreadable ones, their order, and batches that resume at any step."""

from __future__ import annotations

from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from image_files import BAD, GOOD, photo, write_difficult_images
from PIL import Image

from clipgen.errors import DataError
from clipgen.images.pixels import to_clip
from train.data.images import Images, ResumableSampler
from train.encode import Encoders
from train.loop.loader import image_batches


@pytest.fixture
def nasty(tmp_path: Path) -> Path:
    return write_difficult_images(tmp_path)


def test_difficult_images_are_read_and_bad_ones_are_named(nasty: Path) -> None:
    data = Images(nasty, 32, min_scale=0.5, clip_size=24)
    assert len(data) == len(GOOD) + len(BAD)
    batch = data.batch([(i, 7) for i in range(len(data))])
    assert batch.pixels.shape == (14, 3, 32, 32) and batch.pixels.abs().max() <= 1
    assert batch.clip.shape == (14, 3, 24, 24)
    assert {Path(name).name for name in data.failures} == set(BAD)
    assert dict(batch.failures) == data.failures
    reasons = {Path(name).name: why for name, why in data.failures.items()}
    assert "64 megapixels" in reasons["bomb.png"] and "empty" in reasons["empty.png"]
    assert "truncated" in reasons["cut.jpg"] and "not an image" in reasons["text.jpg"]


def test_item_depends_on_index_and_seed_only(nasty: Path) -> None:
    one, other = Images(nasty, 32, min_scale=0.5), Images(nasty, 32, min_scale=0.5)
    for i in reversed(range(len(other))):
        other[(i, 0)]  # reads the bad images in another order
    assert all(torch.equal(one[(i, 9)].pixels, other[(i, 9)].pixels) for i in range(len(one)))
    assert any(not torch.equal(one[(3, 9)].pixels, one[(3, seed)].pixels) for seed in range(5))


def test_uncropped_image_gets_the_preprocessing_of_clip(tmp_path: Path) -> None:
    photo(0, (90, 70)).save(tmp_path / "a.png")
    batch = Images(tmp_path, 32, min_scale=1.0, flip=False, clip_size=56)[(0, 0)]
    assert torch.equal(batch.clip, to_clip([photo(0, (90, 70))], 56))


def test_data_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 1 images can be read, .*a\.png: is empty"):
        Images(tmp_path, 32)[(0, 0)]


@given(length=st.integers(1, 50), seed=st.integers(0, 1000), start=st.integers(0, 200), count=st.integers(0, 60))
def test_sampler_covers_every_epoch_and_starts_anywhere(length: int, seed: int, start: int, count: int) -> None:
    sampler = ResumableSampler(length, seed)
    keys = sampler.keys(0, 260)
    for epoch in range(260 // length):
        assert sorted(i for i, _ in keys[epoch * length : (epoch + 1) * length]) == list(range(length))
    assert ResumableSampler(length, seed).keys(start, count) == keys[start : start + count]
    assert len({crop_seed for _, crop_seed in keys}) == 260  # no two crops are alike


def test_batches_start_at_any_step_and_do_not_depend_on_workers(nasty: Path) -> None:
    data = Images(nasty, 16, min_scale=0.5)
    sampler = ResumableSampler(len(data), 3)
    keys = lambda step: sampler.keys(step * 4, 4)  # noqa: E731
    whole = list(islice(image_batches(data, keys, count(), workers=0), 8))
    fresh = Images(nasty, 16, min_scale=0.5)
    later = list(islice(image_batches(fresh, keys, count(3), workers=2), 5))
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(whole[3:], later, strict=True))
    assert fresh.failures and fresh.failures.items() <= data.failures.items()  # those of the workers reach this process


def test_crops_differ_between_images_and_every_second_view_is_flipped(tmp_path: Path) -> None:
    gradient = np.linspace(0, 255, 64, dtype=np.uint8)
    picture = Image.fromarray(np.stack([*np.meshgrid(gradient, gradient), np.zeros((64, 64), np.uint8)], axis=-1))
    for name in "abcdef":
        picture.save(tmp_path / f"{name}.png")
    images = Images(tmp_path, 16, min_scale=0.5)
    encoders = Encoders(Accelerator(cpu=True), images, nn.Identity(), nn.Identity(), 2, 0, {})  # type: ignore[arg-type]
    keys = encoders._keys(range(12))
    pixels = images.batch(keys).pixels
    assert len({pixels[row].numpy().tobytes() for row in range(12)}) == 12
    rises = [bool(pixels[row, 0, 8, -1] > pixels[row, 0, 8, 0]) for row in range(12)]
    assert rises == 6 * [True] + 6 * [False]
