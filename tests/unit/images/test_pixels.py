"""Images in and out: hostile files, pixel ranges, CLIP's preprocessing, grids and atomic writing."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import encoded, photo, png
from PIL import ExifTags, Image, ImageFont

from clipgen.errors import DataError
from clipgen.images.grids import shorten
from clipgen.images.pixels import (
    CLIP_STD,
    clip_from_pixels,
    from_pixels,
    grid,
    load_image,
    save_image,
    to_clip,
    to_pixels,
    to_rgb,
)


def png16(values: np.ndarray, colour_type: int) -> bytes:
    """A 16-bit PNG (PIL writes only grey ones): values (H, W, channels) up to 65535."""
    height, width, _ = values.shape
    return png(width, height, 16, colour_type, b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))


def corner(image: Image.Image) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return tuple(np.asarray(image)[0, 0].tolist())


# --- reading ---


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_common_formats_are_read_from_paths_bytes_and_files(tmp_path: Path, format: str) -> None:
    data = encoded(photo(0), format)
    path = tmp_path / "no suffix"
    path.write_bytes(data)
    for source in (path, str(path), data, io.BytesIO(data)):
        image = load_image(source)
        assert image.mode == "RGB" and image.size == (48, 40)
        difference = np.abs(np.asarray(image).astype(int) - np.asarray(photo(0)))
        assert difference.mean() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    """The first row and column of the stored image are where EXIF 2.3, section 4.6.4 says."""
    stored = Image.new("RGB", (48, 32), "white")
    stored.paste((255, 0, 0), (0, 0, 16, 16))  # at the origin of the stored image
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = load_image(encoded(stored, "PNG", exif=exif))
    assert image.size == ((48, 32) if orientation < 5 else (32, 48))
    right, bottom = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    x, y = (image.width - 1 if right else 0), (image.height - 1 if bottom else 0)
    assert image.getpixel((x, y)) == (255, 0, 0)


def test_image_with_damaged_exif_is_read() -> None:
    data = encoded(photo(0), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert load_image(data).size == (48, 40)


def test_transparent_pixels_are_composited_on_white() -> None:
    assert corner(load_image(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG"))) == (255, 255, 255)
    assert corner(load_image(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 128)), "PNG"))) == (255, 127, 127)
    assert corner(load_image(encoded(Image.new("LA", (4, 4), (0, 0)), "PNG"))) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert corner(load_image(encoded(palette, "PNG"))) == (255, 0, 0)
    assert corner(load_image(encoded(palette, "PNG", transparency=1))) == (255, 255, 255)
    assert corner(load_image(encoded(palette, "GIF", transparency=1))) == (255, 255, 255)
    keyed = Image.new("RGB", (4, 4), (9, 9, 9))
    assert corner(load_image(encoded(keyed, "PNG", transparency=(9, 9, 9)))) == (255, 255, 255)


@pytest.mark.parametrize(("channels", "colour_type"), [(1, 0), (2, 4), (3, 2), (4, 6)])
def test_sixteen_bit_png_is_scaled_not_clipped(channels: int, colour_type: int) -> None:
    values = np.full((4, 4, channels), 40000, np.uint16)
    if channels in (2, 4):
        values[..., -1] = 65535
    assert abs(corner(load_image(png16(values, colour_type)))[0] - 40000 / 257) <= 1


def test_sixteen_bit_tiff_is_scaled() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    image = np.asarray(load_image(encoded(Image.fromarray(ramp), "TIFF")))
    np.testing.assert_allclose(image[..., 0], ramp / 257, atol=0.51)


@pytest.mark.parametrize("mode", ["L", "1", "CMYK"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = load_image(encoded(Image.new("RGB", (16, 16), "white").convert(mode), "TIFF"))
    assert corner(image) == (255, 255, 255)
    assert load_image(encoded(photo(0).convert("CMYK"), "JPEG")).mode == "RGB"


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animation_is_read_as_its_first_frame(format: str) -> None:
    frames = [Image.new("RGB", (16, 16), c) for c in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert corner(load_image(data)) == (255, 0, 0)


# --- refusing ---


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "allowed formats are PNG, JPEG"),
        (b"<!doctype html><html></html>", "allowed formats are PNG, JPEG"),
        (encoded(photo(0), "PPM"), "allowed formats are PNG, JPEG"),
        (encoded(photo(0), "ICO"), "allowed formats are PNG, JPEG"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "32 bits per channel"),
        (encoded(Image.new("I", (4, 4)), "TIFF"), "32 bits per channel"),
    ],
    ids=["empty", "svg", "html", "ppm", "ico", "float", "int32"],
)
def test_file_that_is_not_an_image_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "upload.png"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        load_image(data)
    with pytest.raises(DataError, match=message) as refusal:
        load_image(path)
    assert "upload.png" in str(refusal.value)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_image_is_refused(format: str) -> None:
    data = encoded(photo(0, (256, 256)), format)
    for length in (len(data) // 2, 10):
        with pytest.raises(DataError, match="damaged"):
            load_image(data[:length])


@pytest.mark.parametrize("size", [(30_000, 30_000), (12_000, 12_000), (8_001, 8_000)])
def test_too_many_pixels_in_the_header_are_refused(size: tuple[int, int]) -> None:
    data = bytearray(encoded(photo(0), "PNG"))
    data[16:24] = struct.pack(">II", *size)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(DataError, match="64 megapixels"):
        load_image(bytes(data))


def test_missing_path_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_image(tmp_path / "missing.png")
    with pytest.raises(DataError, match="is a folder"):
        load_image(tmp_path)


@settings(max_examples=150)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]), st.data())
def test_damaged_bytes_are_read_or_refused_as_data_error(format: str, draw: st.DataObject) -> None:
    data = bytearray(encoded(photo(0, (24, 16)), format))
    for _ in range(draw.draw(st.integers(1, 8))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    with contextlib.suppress(DataError):
        assert load_image(bytes(data)).mode == "RGB"


# --- pixels ---


def test_pixels_cover_minus_one_to_one_and_convert_back_exactly() -> None:
    image = photo(0, (32, 32))
    image.putpixel((0, 0), (0, 128, 255))
    x = to_pixels([image], 32)
    assert x.shape == (1, 3, 32, 32) and x.dtype == torch.float32
    assert x[0, 0, 0, 0] == -1 and x[0, 2, 0, 0] == 1
    assert np.array_equal(np.asarray(from_pixels(x)[0]), np.asarray(image))


def test_from_pixels_clamps_and_refuses_nan_and_wrong_shapes() -> None:
    image = from_pixels(torch.tensor([-7.0, 0.0, 7.0]).view(1, 3, 1, 1))[0]
    assert corner(image) == (0, 128, 255)
    assert from_pixels(torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16, requires_grad=True))[1].size == (4, 4)
    with pytest.raises(DataError, match="not finite"):
        from_pixels(torch.full((1, 3, 2, 2), float("nan")))
    with pytest.raises(DataError, match=r"\(B, 3, H, W\)"):
        from_pixels(torch.zeros(3, 2, 2))


@pytest.mark.parametrize("size", [(48, 32), (31, 77), (224, 224), (500, 333), (20, 300)])
def test_to_clip_equals_the_preprocessing_of_openai(size: tuple[int, int]) -> None:
    from clip.clip import _transform

    image = photo(0, size)
    for side in (32, 224):
        ours, reference = to_clip([image], side)[0], _transform(side)(image)
        levels = (ours - reference).abs() * torch.tensor(CLIP_STD).view(3, 1, 1) * 255
        assert levels.max() < 2.01 and levels.mean() < 0.06  # PIL's box is float32: a rounding here and there


def test_extremely_long_image_is_resized_in_little_memory() -> None:
    assert to_pixels([Image.new("RGB", (1, 100_000), "red")], 64)[0, 0].min() == 1


@pytest.mark.parametrize(("source", "side"), [(128, 64), (64, 224), (64, 64)])
def test_clip_from_pixels_equals_to_clip_of_the_saved_image(source: int, side: int) -> None:
    x = to_pixels([photo(0, (source, source)), photo(1, (source, source))], source) * 1.3
    difference = (clip_from_pixels(x, side) - to_clip(from_pixels(x), side)).abs()
    assert difference.max() * min(CLIP_STD) * 255 < 2.5
    assert clip_from_pixels(x.bfloat16(), side).dtype == torch.float32


def test_clip_from_pixels_is_differentiable_and_crops_the_centre() -> None:
    x = to_pixels([photo(0, (40, 40))], 40).mul(0.9).requires_grad_()
    clip_from_pixels(x, 16).square().mean().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    wide = torch.zeros(1, 3, 8, 20)
    wide[..., 6:14] = 1
    assert clip_from_pixels(wide, 8).equal(clip_from_pixels(torch.ones(1, 3, 8, 8), 8))


def test_no_images_give_an_empty_batch() -> None:
    assert to_pixels([], 8).shape == to_clip([], 8).shape == (0, 3, 8, 8)


# --- grids ---


def test_grid_places_images_row_by_row() -> None:
    images = [Image.new("RGB", (8, 8), c) for c in ("red", "lime", "blue", "black", "yellow")]
    sheet = grid(images, columns=2, gap=3)
    assert sheet.size == (19, 30)
    assert sheet.getpixel((11, 0)) == (0, 255, 0) and sheet.getpixel((0, 22)) == (255, 255, 0)
    assert sheet.getpixel((9, 0)) == sheet.getpixel((18, 29)) == (255, 255, 255)
    assert grid(images).size == (3 * 8 + 4, 2 * 8 + 2)
    assert grid(images[:1]).size == (8, 8) and grid(images[:2], columns=9).size == (18, 8)


@pytest.mark.parametrize("arguments", [([], 1, 2), ([photo(0)], 0, 2), ([photo(0)], 1, -1)])
def test_impossible_grids_are_refused(arguments: tuple[list[Image.Image], int, int]) -> None:
    with pytest.raises(DataError):
        grid(*arguments)


# --- writing ---

METADATA = {"prompt": 'a "lemon" 🍋 with hair\nand more', "seed": "0"}


def embedded(path: Path) -> dict[str, str]:
    with Image.open(path) as image:
        if image.format == "PNG":
            return dict(image.text)  # type: ignore[attr-defined]
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.MakerNote]
        return json.loads(comment.removeprefix(b"ASCII\0\0\0"))


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg", "jpeg", "PNG"])
def test_saved_image_holds_its_metadata_and_leaves_no_temporary(tmp_path: Path, suffix: str) -> None:
    path = save_image(photo(0), tmp_path / "new" / f"out.{suffix}", metadata=METADATA)
    assert embedded(path) == METADATA
    assert list((tmp_path / "new").iterdir()) == [path]
    assert np.abs(np.asarray(load_image(path)).astype(int) - np.asarray(photo(0))).mean() < 4
    assert path.stat().st_mode & 0o777 == (tmp_path / "new").stat().st_mode & 0o666  # as the umask says, not 0600


def test_quality_changes_the_size_of_lossy_formats_and_png_is_exact(tmp_path: Path) -> None:
    for suffix in ("jpg", "webp"):
        sizes = [
            save_image(photo(0, (128, 128)), tmp_path / f"{q}.{suffix}", quality=q).stat().st_size for q in (5, 100)
        ]
        assert sizes[0] < sizes[1]
    path = save_image(photo(0), tmp_path / "a.png", quality=1)
    assert np.array_equal(np.asarray(load_image(path)), np.asarray(photo(0)))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.bmp", {}, "allowed are png, webp, jpg, jpeg"),
        ("a", {}, "allowed are png"),
        ("a.png", {"quality": 0}, "from 1 to 100"),
        ("a.jpg", {"quality": 101}, "from 1 to 100"),
        ("a.jpg", {"metadata": {"prompt": "x" * 70_000}}, "cannot write"),
    ],
)
def test_refused_save_writes_nothing(tmp_path: Path, name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        save_image(photo(0), tmp_path / name, **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = save_image(photo(0), tmp_path / "a.jpg")
    before = path.read_bytes()
    with pytest.raises(DataError):
        save_image(photo(1), path, metadata={"prompt": "x" * 70_000})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        save_image(photo(0), tmp_path / "file" / "a.png")


def test_to_rgb_returns_an_rgb_image_itself() -> None:
    image = photo(0)
    assert to_rgb(image) is image


def test_16_bit_greys_are_rounded_to_8_bits() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    found = np.asarray(to_rgb(Image.fromarray(values)))
    assert np.array_equal(found[..., 0], np.round(values / 257).astype(np.uint8)) and (found[..., :1] == found).all()


def test_label_is_cut_to_the_longest_text_that_fits() -> None:
    font = ImageFont.load_default(14)
    text = "a very long label, " * 400
    short = shorten(text, font, 200)
    assert short.endswith("...") and text.startswith(short[:-3])
    assert font.getlength(short) <= 200 < font.getlength(text[: len(short) - 2] + "...")
    assert shorten("abc", font, 200) == "abc" and shorten("abc", font, 1) == ""
