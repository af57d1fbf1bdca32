"""Folders, lists and shards as sources of images: files that are used, and counts of those that are not."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from image_files import GOOD, encoded, negative_tar, pax_tar, photo, write_difficult_images, write_tar
from local_server import serving

from clipgen.errors import DataError
from clipgen.images import pixels
from clipgen.images.sources import Subset, describe_unused, image_suffixes, open_source
from train.data.images import Images


@pytest.fixture
def nasty(tmp_path: Path) -> Path:
    return write_difficult_images(tmp_path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six images in two folders."""
    folder = tmp_path / "photos"
    for i in range(6):
        path = folder / ("ab"[i % 2]) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photo(i), "PNG"))
    return folder


def names_below(data: str | Path, folder: Path) -> list[str]:
    return [str(Path(name).relative_to(folder)) for name in open_source(data).names]


def test_shards_and_lists_give_the_same_images_as_the_folder(nasty: Path, tmp_path: Path) -> None:
    names = sorted(GOOD)
    for n in range(2):
        part = {f"set/{i:04d}.{name.rsplit('.')[-1]}": GOOD[name] for i, name in enumerate(names) if i % 2 == n}
        more = {"set/0000.json": b"{}", "set/0000.seg.png": b"a mask", "__extra__.txt": b""}
        write_tar(tmp_path / "shards" / f"{n:03d}.tar", part | more)
    expected = [GOOD[name] for n in range(2) for name in names[n::2]]
    for data in ("shards/{000..001}.tar", "shards", "shards/*.tar", "shards/00[01].tar"):
        source = open_source(str(tmp_path / data))
        assert [source.read(i) for i in range(len(source.names))] == expected
    assert source.names[0].endswith("shards/000.tar/set/0000.JPEG")
    (tmp_path / "list.txt").write_text("# what I like\nnasty/deep/grey.png\n\n" + str(nasty / "deep" / "gone.png"))
    listed = open_source(tmp_path / "list.txt")
    assert len(listed.names) == 2 and listed.read(0) == GOOD["grey.png"]
    data = Images(listed, 32)
    data[(1, 0)]
    assert list(data.failures.values()) == ["No such file or directory"]


@pytest.mark.parametrize(("images", "shards"), [(1, 10), (10, 1)])
def test_folder_with_images_and_shards_is_refused_and_each_can_be_named_alone(
    tmp_path: Path, images: int, shards: int
) -> None:
    for i in range(images):
        (tmp_path / f"stray{i}.png").write_bytes(GOOD["grey.png"])
    for i in range(shards):
        write_tar(tmp_path / "deep" / f"{i}.tar", {"a.png": GOOD["grey.png"]})
    with pytest.raises(DataError, match=rf"both {images} image files and {shards} \.tar shards"):
        open_source(tmp_path)
    with pytest.raises(DataError, match="holds both"):
        open_source(tmp_path / "**/*")
    assert len(open_source(tmp_path / "**/*.tar").names) == shards
    assert len(open_source(tmp_path / "*.png").names) == images
    (tmp_path / "both.txt").write_text("stray0.png\ndeep/*.tar\n")
    assert len(open_source(tmp_path / "both.txt").names) == 1 + shards


def test_hidden_files_and_folders_are_skipped_in_folders_and_shards_and_counted(photos: Path, tmp_path: Path) -> None:
    for name in (".ipynb_checkpoints/0-checkpoint.png", "a/.cache/0.png", "__MACOSX/._0.png", ".DS_Store"):
        path = photos / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(GOOD["grey.png"])
    source = open_source(photos)
    assert len(source.names) == 6
    assert source.unused == {"hidden folders": 2, "hidden files": 2}
    members = dict.fromkeys(("./0.png", ".git/0.png", "__MACOSX/._0.png", "../1.png"), GOOD["grey.png"])
    source = open_source(write_tar(tmp_path / "shards" / "0.tar", members))
    assert [Path(name).name for name in source.names] == ["0.png", "1.png"]
    assert source.unused == {"hidden files": 2}


def test_linked_folders_are_searched_once_and_never_in_circles(photos: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "inner").mkdir(parents=True)
    (elsewhere / "inner" / "far.png").write_bytes(GOOD["grey.png"])
    (photos / "again").symlink_to(photos / "a")
    (photos / "far").symlink_to(elsewhere)
    (photos / "inner").symlink_to(elsewhere / "inner")
    (photos / "b" / "up").symlink_to(photos)
    (photos / "b" / "root").symlink_to(tmp_path)
    (photos / "gone.png").symlink_to(photos / "nothing.png")
    (photos / "self.png").symlink_to(photos / "self.png")
    assert names_below(photos, photos) == [
        "a/0.png",
        "a/2.png",
        "a/4.png",
        "b/1.png",
        "b/3.png",
        "b/5.png",
        "far/inner/far.png",
    ]
    assert open_source(photos).unused == {"links to a folder above": 1, "broken links": 2}


@pytest.mark.parametrize("name", ["IMG_2024.05.01.jpg", "a.b.c.png", "v1.0.webp", "photo.JPG.jpeg"])
def test_names_with_more_dots_are_images_in_folders_and_shards_alike(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / name).write_bytes(GOOD["grey.png"])
    shard = write_tar(tmp_path / "shards" / "0.tar", {name: GOOD["grey.png"]})
    assert [Path(n).name for n in open_source(tmp_path / "folder").names] == [name]
    assert [Path(n).name for n in open_source(shard).names] == [name]


def test_masks_of_a_sample_are_left_out_in_folders_and_shards_alike_and_counted(tmp_path: Path) -> None:
    files = dict.fromkeys(("0.jpg", "0.seg.png", "0.depth.left.png", "0.1.png", "1.seg.png"), GOOD["grey.png"])
    (tmp_path / "folder").mkdir()
    for name, data in files.items():
        (tmp_path / "folder" / name).write_bytes(data)
    for data in (tmp_path / "folder", write_tar(tmp_path / "shards" / "0.tar", files)):
        source = open_source(data)
        assert {Path(name).name for name in source.names} == {"0.jpg", "0.1.png", "1.seg.png"}
        assert "2 masks" in describe_unused(source)


def test_files_that_are_not_used_are_counted_by_kind(photos: Path) -> None:
    for name in ("a/0.txt", "a/1.txt", "README", "set.zip", "x.heic"):
        (photos / name).write_bytes(b"x")
    source = open_source(photos)
    kinds = {".txt": 2, "without a suffix": 1, ".zip": 1, ".heic": 1}
    assert source.unused == kinds and len(source.names) == 6
    said = describe_unused(source)
    assert said.startswith("not used: 2 .txt") and "install pillow-heif to read .heic" in said
    assert describe_unused(open_source(photos / "a" / "*.png")) == ""
    assert Subset(source, 2).unused == kinds


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "avif", "apng"])
def test_less_common_suffixes_are_read(suffix: str, tmp_path: Path) -> None:
    if f".{suffix}" not in image_suffixes():
        pytest.skip(f"this Pillow cannot read {suffix}")
    kind = {"avif": "AVIF", "apng": "PNG"}.get(suffix, "JPEG")
    (tmp_path / f"a.{suffix}").write_bytes(encoded(photo(0), kind))
    data = Images(tmp_path, 16)
    assert len(data) == 1 and not data[(0, 0)].failures


def test_heic_is_read_where_its_library_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's one call, which tells Pillow of a format; the decoder itself is the library's."""
    from types import SimpleNamespace

    from PIL import BmpImagePlugin, Image

    class HeifImageFile(BmpImagePlugin.BmpImageFile):
        format = "HEIF"

    def register() -> None:
        Image.register_open("HEIF", HeifImageFile, lambda start: start.startswith(b"BM"))
        Image.register_extension("HEIF", ".heic")

    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    for registry in (Image.OPEN, Image.EXTENSION):
        for key, value in list(registry.items()):
            monkeypatch.setitem(registry, key, value)
    monkeypatch.setattr(Image, "ID", [*Image.ID])
    clear_format_caches()
    try:
        (tmp_path / "a.heic").write_bytes(encoded(photo(0), "BMP"))
        assert not Images(tmp_path, 16)[(0, 0)].failures
    finally:
        Image.OPEN.pop("HEIF", None)
        Image.EXTENSION.pop(".heic", None)
        clear_format_caches()


def clear_format_caches() -> None:
    pixels.read_formats.cache_clear()
    image_suffixes.cache_clear()


NOT_UTF8 = os.fsdecode(b"caf\xe9.png")


def test_names_that_are_not_utf8_are_read_listed_and_hashed(photos: Path, tmp_path: Path) -> None:
    (photos / NOT_UTF8).write_bytes(GOOD["grey.png"])
    source = open_source(photos)
    assert len(source.names) == 7 and len(source.fingerprint()) == 64
    (tmp_path / "list.txt").write_bytes(b"photos/caf\xe9.png\r\n")
    listed = open_source(tmp_path / "list.txt")
    assert listed.read(0) == GOOD["grey.png"] and len(listed.fingerprint()) == 64
    shard = open_source(write_tar(tmp_path / "shards" / "0.tar", {NOT_UTF8: GOOD["grey.png"]}))
    assert shard.read(0) == GOOD["grey.png"] and len(shard.fingerprint()) == 64


@pytest.mark.parametrize(
    ("head", "end", "encoding"),
    [("\ufeff", "\n", "utf-8"), ("", "\r\n", "utf-8"), ("", "\r", "utf-8"), ("\ufeff", "\r\n", "utf-16-le")],
)
def test_lists_with_any_mark_and_line_end_lose_no_image(
    head: str, end: str, encoding: str, photos: Path, tmp_path: Path
) -> None:
    odd = "a/line\u2028separator\x0c.png"
    (photos / odd).write_bytes(GOOD["grey.png"])
    text = head + end.join(["a/0.png", "# no image", "", odd, "b/1.png"])
    (photos / "list.TXT").write_bytes(text.encode(encoding))
    assert names_below(photos / "list.TXT", photos) == ["a/0.png", odd, "b/1.png"]


def test_home_braces_and_globs_are_expanded_everywhere(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for i in range(3):
        write_tar(tmp_path / "shards" / f"{i}.tar", {"a.png": GOOD["grey.png"]})
    everything = names_below(photos, photos)
    assert len(open_source("~/shards/{0..2}.tar").names) == len(open_source("~/shards/?.tar").names) == 3
    assert names_below("~/photos", photos) == names_below("~/photos/{a,b}", photos) == everything
    assert names_below("~/photos/**/*.png", photos) == names_below("~/photos/*", photos) == everything
    (tmp_path / "list.txt").write_text("~/photos/a\nphotos/b/*.png\n~/shards/{0..1}.tar\n")
    assert len(open_source(tmp_path / "list.txt").names) == 8


def test_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    for name in ("a[1].png", "{b}.png", "1.png"):
        (tmp_path / name).write_bytes(GOOD["grey.png"])
    (tmp_path / "list.txt").write_text("a[1].png\n{b}.png\n")
    assert names_below(tmp_path / "list.txt", tmp_path) == ["a[1].png", "{b}.png"]
    assert names_below(tmp_path / "a[1].png", tmp_path) == ["a[1].png"]


def test_fingerprint_is_that_of_the_images_wherever_they_lie(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = open_source(photos).fingerprint()
    monkeypatch.chdir(tmp_path)
    assert open_source("photos").fingerprint() == open_source("./photos/").fingerprint() == expected
    (tmp_path / "link").symlink_to(photos)
    assert open_source("link").fingerprint() == expected
    (photos / "notes.md").write_text("of no importance")
    assert open_source(photos).fingerprint() == expected
    Path("list.txt").write_text("".join(f"{name}\n" for name in open_source(photos).names))
    assert open_source("list.txt").fingerprint() == expected
    moved = photos.rename(tmp_path / "moved")
    assert open_source(moved).fingerprint() == expected
    write_tar(tmp_path / "x" / "0.tar", {"a.png": b"1", "b.png": b"2"})
    packed = open_source("x").fingerprint()
    (tmp_path / "x").rename(tmp_path / "y")
    assert open_source("y/{0..0}.tar").fingerprint() == packed != expected


@pytest.mark.parametrize("change", ["rename", "remove", "add", "content", "size"])
def test_fingerprint_changes_with_the_images(change: str, photos: Path) -> None:
    before, path = open_source(photos).fingerprint(), photos / "a" / "2.png"
    data = path.read_bytes()
    if change == "rename":
        path.rename(photos / "a" / "3.png")
    elif change == "remove":
        path.unlink()
    elif change == "add":
        (photos / "b" / "new.png").write_bytes(data)
    elif change == "content":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        path.write_bytes(data + b"x")
    assert open_source(photos).fingerprint() != before


def test_fingerprint_of_a_subset_tells_its_size_and_source(photos: Path) -> None:
    source = open_source(photos)
    found = {Subset(source, n).fingerprint() for n in (1, 2, 6)} | {source.fingerprint()}
    assert len(found) == 4
    assert Subset(source, 99).fingerprint() == Subset(source, 6).fingerprint()


def test_shards_over_http_are_fetched_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
    assert capsys.readouterr().out == "", "stdout is for results"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nowhere", "is not a folder"),
        (lambda p: p, "holds no image"),
        (lambda p: p / "{0..3}.tar", r"no shard .*0\.tar"),
        (lambda p: write_tar(p / "s" / "none.tar", {"a.txt": b""}), "holds no image"),
        (lambda p: _cut(write_tar(p / "s" / "cut.tar", {"a.png": bytes(5000)})), "complete, uncompressed"),
        (lambda p: negative_tar(p / "s" / "loop.tar"), "negative size"),
        (lambda p: pax_tar(p / "s" / "odd.tar", {"GNU.sparse.size": "x"}), "complete, uncompressed"),
        (lambda p: pax_tar(p / "s" / "far.tar", {"size": str(1 << 70)}), "complete, uncompressed"),
        (lambda p: _text(p / "zip.tar", b"PK" + bytes(2000)), "complete, uncompressed"),
        (lambda p: _text(p / "list.txt", b"\xff\xfe\x00"), "UTF-8"),
        (lambda p: _text(p / "list.txt", b"\x89PNG\0\0"), "not a text file"),
        (lambda p: p / "{0..1.tar", "braces"),
        (lambda p: "http://[x/{0..1}.tar", r"shard http://\[x/0\.tar: "),
        (lambda p: p / "a::b.tar", "no shard .*a::b.tar"),
        (lambda p: p / "*.png", "matches no file"),
        (lambda p: _text(p / "list.txt", b"# nothing\n"), "holds no image"),
    ],
)
def test_data_that_cannot_be_used_is_named(
    make: Callable[[Path], Path | str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPGEN_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=message):
        open_source(make(tmp_path))


def _cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:3000])
    return path


def _text(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
