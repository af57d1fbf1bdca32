"""Where pictures come from, what is done with bad ones, in which order they come, and what `train.check` says."""

from __future__ import annotations

import io
import json
import random
import struct
import sys
import tarfile
import zlib
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from local_server import serving
from PIL import Image

from clipgen.errors import DataError
from clipgen.images.pixels import to_clip
from clipgen.images.sources import Files, Shards, open_source
from train import check
from train.data.images import Images, ResumableSampler, image_batches


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """Smooth colours that differ from seed to seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def bomb() -> bytes:
    """A PNG of a few bytes whose header says 60,000 x 60,000."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


EXIF = Image.Exif()
EXIF[0x0112] = 6  # lay it on its right side
GOOD = {
    "cmyk.jpg": encoded(photo(1).convert("CMYK"), "JPEG"),
    "grey.png": encoded(photo(2).convert("L"), "PNG"),
    "grey16.png": encoded(Image.fromarray((np.arange(1600, dtype=np.uint16) * 40).reshape(40, 40)), "PNG"),
    "alpha.png": encoded(photo(3).convert("RGBA"), "PNG"),
    "palette.gif": encoded(photo(4).convert("P"), "GIF"),
    "turned.jpg": encoded(photo(5, (60, 30)), "JPEG", exif=EXIF),
    "one_pixel.png": encoded(photo(6, (1, 1)), "PNG"),
    "ribbon.png": encoded(photo(7, (3000, 2)), "PNG"),
    "large.webp": encoded(photo(8, (3000, 2500)), "WEBP"),
    "PLAIN.JPEG": encoded(photo(9), "JPEG"),
}
BAD = {
    "bomb.png": bomb(),
    "cut.jpg": encoded(photo(10, (300, 300)), "JPEG")[:700],
    "empty.png": b"",
    "text.jpg": b"<html>not found</html>",
}


@pytest.fixture
def nasty(tmp_path: Path) -> Path:
    folder = tmp_path / "nasty" / "deep"
    folder.mkdir(parents=True)
    for name, data in (GOOD | BAD).items():
        (folder / name).write_bytes(data)
    (folder / "notes.txt").write_text("no picture, and does not say so")
    (folder / "folder.png").mkdir()
    (folder / "nowhere.png").symlink_to(folder / "gone.png")
    (folder / ".hidden.png").write_bytes(GOOD["grey.png"])
    return tmp_path / "nasty"


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_every_kind_of_picture_is_read_and_every_bad_one_named(nasty: Path) -> None:
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


def test_an_item_is_the_same_whoever_asks_and_another_for_another_seed(nasty: Path) -> None:
    one, other = Images(nasty, 32, min_scale=0.5), Images(nasty, 32, min_scale=0.5)
    for i in reversed(range(len(other))):
        other[(i, 0)]  # meets the bad ones in another order
    assert all(torch.equal(one[(i, 9)].pixels, other[(i, 9)].pixels) for i in range(len(one)))
    assert any(not torch.equal(one[(3, 9)].pixels, one[(3, seed)].pixels) for seed in range(5))


def test_without_crops_clip_sees_what_its_own_preprocessing_shows_it(tmp_path: Path) -> None:
    photo(0, (90, 70)).save(tmp_path / "a.png")
    batch = Images(tmp_path, 32, min_scale=1.0, flip=False, clip_size=56)[(0, 0)]
    assert torch.equal(batch.clip, to_clip([photo(0, (90, 70))], 56))


def test_no_readable_picture_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 1 images can be read, .*a\.png: is empty"):
        Images(tmp_path, 32)[(0, 0)]


def test_shards_and_lists_give_the_same_pictures_as_the_folder(nasty: Path, tmp_path: Path) -> None:
    names = sorted(GOOD)
    for n in range(2):
        part = {f"set/{i:04d}.{name.rsplit('.')[-1]}": GOOD[name] for i, name in enumerate(names) if i % 2 == n}
        more = {"set/0000.json": b"{}", "set/0000.seg.png": b"a mask", "__extra__.txt": b""}
        write_tar(tmp_path / "shards" / f"{n:03d}.tar", part | more)
    shards = open_source(str(tmp_path / "shards" / "{000..001}.tar"))
    assert isinstance(shards, Shards) and len(shards.names) == len(GOOD)
    expected = [GOOD[name] for n in range(2) for name in names[n::2]]
    assert [shards.read(i) for i in range(len(expected))] == expected
    assert shards.names[0].endswith("shards/000.tar/set/0000.JPEG")
    folder = open_source(tmp_path / "shards")
    assert [folder.read(i) for i in range(len(expected))] == expected
    (tmp_path / "list.txt").write_text("# what I like\nnasty/deep/grey.png\n\n" + str(nasty / "deep" / "gone.png"))
    listed = open_source(tmp_path / "list.txt")
    assert isinstance(listed, Files) and len(listed.names) == 2 and listed.read(0) == GOOD["grey.png"]
    data = Images(listed, 32)
    data[(1, 0)]
    assert list(data.failures.values()) == ["No such file or directory"]


def test_shards_over_http_are_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPGEN_CACHE", str(tmp_path / "cache"))
    with serving() as server:
        for n in range(2):
            shard = write_tar(
                tmp_path / f"{n}.tar", {f"{n}{i}.png": encoded(photo(n * 2 + i), "PNG") for i in range(2)}
            )
            server.put(f"/{n}.tar", shard.read_bytes())
        source = open_source(f"{server.address}/{{0..1}}.tar")
        assert [source.read(i) for i in range(4)] == [encoded(photo(i), "PNG") for i in range(4)]
        asked = len(server.requests)
        assert asked == 2
        assert open_source(f"{server.address}/{{0..1}}.tar").names == source.names
        assert len(server.requests) == asked
        with pytest.raises(DataError, match=r"shard http.*/9\.tar.*404"):
            open_source(f"{server.address}/9.tar")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nowhere", "is not a folder"),
        (lambda p: p, "holds no image"),
        (lambda p: p / "{0..3}.tar", r"no shard .*0\.tar"),
        (lambda p: write_tar(p / "s" / "none.tar", {"a.txt": b""}), "holds no image"),
        (lambda p: _cut(write_tar(p / "s" / "cut.tar", {"a.png": bytes(5000)})), "whole, uncompressed"),
        (lambda p: _text(p / "zip.tar", b"PK" + bytes(2000)), "whole, uncompressed"),
        (lambda p: _text(p / "list.txt", b"\xff\xfe\x00"), "UTF-8"),
        (lambda p: _text(p / "list.txt", b"# nothing\n"), "holds no image"),
    ],
)
def test_what_is_no_data_set_is_named(make, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        open_source(make(tmp_path))


def _cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:3000])
    return path


def _text(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@given(length=st.integers(1, 50), seed=st.integers(0, 1000), at=st.integers(0, 200), count=st.integers(0, 60))
def test_the_order_covers_every_epoch_and_starts_anywhere(length: int, seed: int, at: int, count: int) -> None:
    order = ResumableSampler(length, seed)
    whole = order.keys(0, 260)
    for epoch in range(260 // length):
        assert sorted(i for i, _ in whole[epoch * length : (epoch + 1) * length]) == list(range(length))
    assert ResumableSampler(length, seed).keys(at, count) == whole[at : at + count]
    assert len({key for _, key in whole}) == 260  # no two crops alike


def test_batches_begin_at_any_step_and_do_not_depend_on_workers(nasty: Path) -> None:
    data = Images(nasty, 16, min_scale=0.5)
    order = ResumableSampler(len(data), 3)
    keys = lambda step: order.keys(step * 4, 4)  # noqa: E731
    whole = list(islice(image_batches(data, keys, 0, workers=0), 8))
    fresh = Images(nasty, 16, min_scale=0.5)
    later = list(islice(image_batches(fresh, keys, 3, workers=2), 5))
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(whole[3:], later, strict=True))
    assert fresh.failures and fresh.failures.items() <= data.failures.items()  # of the workers, told to this process


def run_check(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["check", *map(str, arguments), "--workers", "1"])
    try:
        check.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_check_says_what_is_wrong(
    nasty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (nasty / "again.png").write_bytes(encoded(photo(9, (200, 160)), "PNG"))  # PLAIN.JPEG, larger
    assert run_check(monkeypatch, nasty, "--out", tmp_path / "out", "--size", 64) == 0
    said = capsys.readouterr().out
    assert "15 pictures: 11 can be used, 4 cannot" in said and "are smaller than 64 px" in said
    assert "shorter side: 1 to 2500 px" in said and "text.jpg: is not an image" in said
    duplicates = (tmp_path / "out" / "duplicates.txt").read_text()
    assert "again.png" in duplicates and "PLAIN.JPEG" in duplicates
    assert len((tmp_path / "out" / "unreadable.txt").read_text().splitlines()) == 4
    assert len(json.loads((tmp_path / "out" / "report.json").read_text())["pictures"]) == 15
    assert Image.open(tmp_path / "out" / "contact.png").width > 300


@pytest.mark.parametrize("content", [None, b"broken"])
def test_check_fails_when_nothing_can_be_used(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if content:
        (tmp_path / "a.png").write_bytes(content)
    assert run_check(monkeypatch, tmp_path) == 1
    said = capsys.readouterr().out
    assert ("no picture that can be read" if content else "holds no image") in said


@given(st.lists(st.integers(0, 2**64 - 1), max_size=8), st.randoms(use_true_random=False))
def test_near_duplicates_are_those_that_a_search_of_all_pairs_finds(values: list[int], rng: random.Random) -> None:
    for value in values[:4]:
        flips = rng.sample(range(64), rng.randint(0, 5))
        values.append(value ^ sum(1 << bit for bit in flips))
    together = {
        frozenset((i, j))
        for i in range(len(values))
        for j in range(i)
        if (values[i] ^ values[j]).bit_count() <= check.ALIKE
    }
    groups = check.near_duplicates(values)
    place = {row: n for n, group in enumerate(groups) for row in group}
    assert all(place.get(i, -1) == place.get(j, -2) for i, j in map(tuple, together))
    assert set(place) == {row for pair in together for row in pair}


def test_the_hash_survives_size_and_compression_and_tells_pictures_apart() -> None:
    hashes = [check.dhash(photo(seed, (320, 240))) for seed in range(20)]
    for seed, value in enumerate(hashes):
        again = Image.open(io.BytesIO(encoded(photo(seed, (200, 150)), "JPEG", quality=60)))
        assert (check.dhash(again) ^ value).bit_count() <= check.ALIKE
    pairs = [(a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(pairs) > check.ALIKE
