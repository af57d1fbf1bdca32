"""Image files of many kinds, good and bad, and tar files of them."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """Smooth colours that differ from seed to seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def png(width: int, height: int, bits: int, colour_type: int, scanlines: bytes, *chunks: bytes) -> bytes:
    """A PNG file with this header, whether or not the scanlines fit it, and further chunks, each its type and data."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    parts = [header, *chunks, b"IDAT" + zlib.compress(scanlines), b"IEND"]
    framed = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


EXIF = Image.Exif()
EXIF[0x0112] = 6  # orientation: rotated by 90 degrees
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
    "bomb.png": png(60_000, 60_000, 8, 2, b""),
    "cut.jpg": encoded(photo(10, (300, 300)), "JPEG")[:700],
    "empty.png": b"",
    "text.jpg": b"<html>not found</html>",
}


def write_difficult_images(folder: Path) -> Path:
    """Write `GOOD` and `BAD` into a folder two levels deep, among things that are not images."""
    deep = folder / "nasty" / "deep"
    deep.mkdir(parents=True)
    for name, data in (GOOD | BAD).items():
        (deep / name).write_bytes(data)
    (deep / "notes.txt").write_text("not an image, and does not claim to be one")
    (deep / "folder.png").mkdir()
    (deep / "nowhere.png").symlink_to(deep / "gone.png")
    (deep / ".hidden.png").write_bytes(GOOD["grey.png"])
    return folder / "nasty"


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def negative_tar(path: Path) -> Path:
    """A tar file whose second header, of a negative size, points back to itself."""
    write_tar(path, {"a.png": b"", "b.png": b""})
    data = bytearray(path.read_bytes())
    header = data[512:1024]
    header[124:136] = b"\xff" * 10 + b"\xfe\x00"  # -512, in base 256
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[512:1024] = header
    path.write_bytes(data)
    return path


def pax_tar(path: Path, headers: dict[str, str]) -> Path:
    """A tar file of an empty image with extended headers."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.png")
        info.pax_headers = headers
        tar.addfile(info)
    return path
