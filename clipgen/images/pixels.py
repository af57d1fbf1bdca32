"""Every pixel range, resize and normalisation of the project, and images read from and written to files.

Three representations exist, and only this module converts between them:

- PIL: RGB, 8 bits, upright, no alpha;
- pixels: float32 (B, 3, H, W) in [-1, 1], what the VQGAN reads and writes, `(x - 0.5) / 0.5`;
- CLIP input: float32 (B, 3, S, S), `(x - mean) / std` with OpenAI's per-channel mean and std.

Image files are treated as hostile: only common formats are decoded, the size in the header is checked before any
pixel is decoded, and any error inside a decoder becomes a `DataError` that says what to do.
"""

from __future__ import annotations

import base64
import importlib
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, features
from torch import Tensor

from clipgen.errors import DataError
from clipgen.utils.files import replacing

# github.com/openai/CLIP, clip/clip.py: the statistics that its image towers were trained with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

MAX_MEGAPIXELS = 64
_MAX_EXIF = 1_000_000  # bytes of a note; clipgen writes a few hundred
READ_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
OPTIONAL_FORMATS = {"AVIF": ("pillow with AVIF", (".avif",)), "HEIF": ("pillow-heif", (".heic", ".heif"))}
"""Formats that need an installed library: its name, and the usual suffixes."""
SAVE_FORMATS = {"png": "PNG", "webp": "WEBP", "jpg": "JPEG", "jpeg": "JPEG"}
PARAMETERS = "parameters"
"""Name of the text that Stable Diffusion web UIs read: a PNG text chunk, and UserComment in EXIF."""
_ASCII, _UNICODE = b"ASCII\0\0\0", b"UNICODE\0"  # EXIF 2.3, 4.6.5: UserComment begins with its encoding
_EXIF_BYTES = 65_000  # room for EXIF in a JPEG file: 64 KB less its own structure
_TOO_LARGE = f"more than the {MAX_MEGAPIXELS} megapixels allowed; make it smaller, a few hundred pixels are enough"


@cache
def read_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that can be read here: `READ_FORMATS`, and those whose library is installed."""
    found = [*READ_FORMATS]
    if features.check("avif"):
        found.append("AVIF")
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
        found.append("HEIF")
    except ImportError:
        pass
    return tuple(found)


def load_image(source: str | Path | bytes | BinaryIO) -> Image.Image:
    """Read an image file of any supported format as an upright 8-bit RGB image.

    Animations give their first frame, transparency is put on white, 16-bit greys are scaled to 8 bits, and the EXIF
    orientation is applied. `info` keeps nothing of the file but its name, under "name", for receipts.

    Raises:
        DataError: the file is missing, empty, damaged, of a format outside `read_formats`, or has more than
            `MAX_MEGAPIXELS`.
    """
    name = f"'{source}'" if isinstance(source, (str, Path)) else "the given image"
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with Image.open(file, formats=read_formats()) as opened:
            _check_size(opened)
            opened.load()
            image = to_rgb(_upright(opened))
            image.info = {"name": Path(source).name} if isinstance(source, (str, Path)) else {}
            return image
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    except FileNotFoundError:
        raise DataError(f"{name}: no such file; check the path") from None
    except IsADirectoryError:
        raise DataError(f"{name} is a folder; give the path of one image file") from None
    except PermissionError:
        raise DataError(f"{name} cannot be read; check its permissions") from None
    except Image.DecompressionBombError:
        raise DataError(f"{name} has {_TOO_LARGE}") from None
    except Image.UnidentifiedImageError:
        allowed = ", ".join(read_formats())
        reason = "is empty (0 bytes)" if _is_empty(file) else "is not an image that can be read, or is damaged"
        raise DataError(f"{name} {reason}; allowed formats are {allowed}: convert or export it again") from None
    except Exception as error:  # on damaged files PIL's decoders raise everything from struct.error to IndexError
        raise DataError(f"{name} is truncated or damaged ({error}); download or export it again") from error


def file_format(path: str | Path) -> str:
    """Format of an image file that can be read, such as "PNG", whatever its name ends in."""
    with Image.open(path, formats=read_formats()) as image:
        return image.format or ""


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata that `save_image` embedded in a file; {} when there is none. No pixel is decoded.

    Raises:
        DataError: the file is missing, damaged, or not a PNG, WebP or JPEG.
    """
    try:
        with Image.open(path, formats=[*dict.fromkeys(SAVE_FORMATS.values())]) as image:
            _check_size(image)
            # A PNG's `text` would decode the pixels to find text after them; clipgen writes it before them.
            found = image.info if image.format == "PNG" else _read_exif(image)
    except FileNotFoundError:
        raise DataError(f"'{path}': no such file; check the path") from None
    except Image.UnidentifiedImageError:
        raise DataError(f"'{path}' is not an image in one of the formats {', '.join(SAVE_FORMATS)}") from None
    except Exception as error:  # as in `load_image`
        raise DataError(f"'{path}' cannot be read ({error})") from error
    return {str(key): value for key, value in found.items() if isinstance(value, str)}


def _read_exif(image: Image.Image) -> dict[str, str]:
    """The JSON object of names and texts in MakerNote, or in UserComment, its earlier place; {} without one."""
    exif = image.getexif().get_ifd(ExifTags.IFD.Exif)
    for tag in (ExifTags.Base.MakerNote, ExifTags.Base.UserComment):
        data = exif.get(tag)
        if not isinstance(data, bytes) or not data.startswith(_ASCII) or len(data) > _MAX_EXIF:
            continue
        try:
            found = json.loads(data.removeprefix(_ASCII).decode("ascii"))
        except (ValueError, RecursionError):  # a camera's own notes, or crafted data
            continue
        if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()):
            return found
    return {}


def _check_size(image: Image.Image) -> None:
    """Refuse an image that is too large by its header, before decoding allocates memory."""
    width, height = image.size
    if width * height > MAX_MEGAPIXELS * 1_000_000:
        raise DataError(f"the image has {width} x {height} pixels, {_TOO_LARGE}")


def _is_empty(file: object) -> bool:
    if isinstance(file, (str, Path)):
        return os.path.getsize(file) == 0
    return isinstance(file, io.BytesIO) and file.getbuffer().nbytes == 0


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; an image with damaged EXIF data is returned as it is."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # parsing hostile EXIF can raise any exception
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a PIL image of any common mode to 8-bit RGB, transparency on white.

    Raises:
        DataError: a mode whose range is unknown (32-bit integers, floats).
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F"):
        raise DataError(
            f"the image has 32 bits per channel (mode {image.mode}), whose range is unknown; convert it to 8 or 16"
        )
    if image.mode.startswith("I;16"):  # PIL's own conversion clips: everything above 255 would become white
        return Image.fromarray(((np.asarray(image) + np.uint32(128)) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _square_bytes(images: Sequence[Image.Image], size: int) -> Tensor:
    """Resize the shorter side to `size`, crop the centre: uint8 (B, 3, size, size).

    The result is that of torchvision's `Resize(size, BICUBIC)` and `CenterCrop(size)`, but the crop is part of the
    resize: a 10 x 1,000,000 image never becomes 224 x 22,400,000.
    """
    if size < 1:
        raise DataError(f"size is {size}; it must be at least 1 pixel")
    if not images:
        return torch.empty(0, 3, size, size, dtype=torch.uint8)
    arrays = []
    for image in map(to_rgb, images):
        width, height = image.size
        shorter = min(width, height)
        # The size after the resize and the offset of the crop, rounded as torchvision rounds them ...
        new_width, new_height = size * width // shorter, size * height // shorter
        left, top = round((new_width - size) / 2), round((new_height - size) / 2)
        # ... and the area of the original that the crop covers.
        sx, sy = width / new_width, height / new_height
        box = (left * sx, top * sy, min((left + size) * sx, width), min((top + size) * sy, height))
        arrays.append(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box)))
    return torch.from_numpy(rearrange(arrays, "b h w c -> b c h w"))


def to_pixels(images: Sequence[Image.Image], size: int) -> Tensor:
    """PIL images to the VQGAN's range: shorter side to `size`, centre crop; float32 (B, 3, size, size) in [-1, 1]."""
    return _square_bytes(images, size).float() / 127.5 - 1


def from_pixels(x: Tensor) -> list[Image.Image]:
    """The VQGAN's pixels (B, 3, H, W) in about [-1, 1], which are clamped, to B RGB images.

    Raises:
        DataError: the shape is wrong, or values are not finite.
    """
    if x.ndim != 4 or x.shape[1] != 3:
        raise DataError(f"pixels have the shape {tuple(x.shape)}; it must be (B, 3, H, W)")
    x = x.detach().float()
    if not x.isfinite().all():
        raise DataError("the generated pixels are not finite (NaN or infinity); try float32, or check the weights")
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)  # on the device: a quarter of the bytes to copy
    return [Image.fromarray(array) for array in rearrange(x, "b c h w -> b h w c").cpu().numpy()]


def _clip_normalise(x: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] to CLIP's normalisation."""
    mean = x.new_tensor(CLIP_MEAN).view(1, 3, 1, 1)
    std = x.new_tensor(CLIP_STD).view(1, 3, 1, 1)
    return (x - mean) / std


def to_clip(images: Sequence[Image.Image], size: int) -> Tensor:
    """PIL images to CLIP's input with OpenAI's preprocessing; float32 (B, 3, size, size), mean and std normalised."""
    return _clip_normalise(_square_bytes(images, size).float() / 255)


def clip_from_pixels(x: Tensor, size: int) -> Tensor:
    """The VQGAN's pixels to CLIP's input (B, 3, size, size) without leaving the device, differentiable.

    Equals `to_clip(from_pixels(x), size)` up to the rounding to 8 bits: centre square, antialiased bicubic (the same
    kernel as PIL's), clamped where the kernel overshoots, then OpenAI's mean and std.

    Args:
        x: (B, 3, H, W) in about [-1, 1]; values outside are clamped, as they are in the image that is saved.
    """
    side = min(x.shape[-2:])
    top, left = round((x.shape[-2] - side) / 2), round((x.shape[-1] - side) / 2)
    x = (x[..., top : top + side, left : left + side].float().clamp(-1, 1) + 1) / 2
    if side != size:
        x = F.interpolate(x, size=(size, size), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
    return _clip_normalise(x)


def grid(images: Sequence[Image.Image], columns: int | None = None, gap: int = 2) -> Image.Image:
    """Lay images out row by row on white, `gap` px apart, about square without `columns`; the largest sets the cells.

    Raises:
        DataError: no images, columns below 1 or gap below 0.
    """
    if not images:
        raise DataError("a grid needs at least one image")
    if columns is not None and columns < 1:
        raise DataError(f"columns is {columns}; it must be at least 1")
    if gap < 0:
        raise DataError(f"gap is {gap}; it must be 0 or more pixels")
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    rows = math.ceil(len(images) / columns)
    width, height = max(i.width for i in images) + gap, max(i.height for i in images) + gap
    sheet = Image.new("RGB", (columns * width - gap, rows * height - gap), "white")
    for k, image in enumerate(images):
        sheet.paste(to_rgb(image), (k % columns * width, k // columns * height))
    return sheet


def save_image(
    image: Image.Image, path: str | Path, quality: int = 90, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write an image atomically, in the format of the path's suffix; missing parent folders are created.

    Args:
        quality: 1 (small) to 100 (best), for webp and jpg; png is lossless.
        metadata: names and values to embed: text chunks of a PNG, else JSON in the EXIF field MakerNote. The value
            named `PARAMETERS` is the EXIF field UserComment, where there is room for it.

    Raises:
        DataError: the suffix is unknown, quality out of range, metadata too large, or the file cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in SAVE_FORMATS:
        raise DataError(f"'{path}' has the format '{suffix}'; allowed are {', '.join(SAVE_FORMATS)}: change the suffix")
    if not 1 <= quality <= 100:
        raise DataError(f"quality is {quality}; it must be from 1 to 100")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            to_rgb(image).save(temporary, SAVE_FORMATS[suffix], **_save_options(suffix, quality, metadata or {}))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot write '{path}': {error}") from error
    return path


def to_data_url(image: Image.Image) -> str:
    """An image as a data: URL of a lossy WebP, for previews."""
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80, method=0)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _save_options(suffix: str, quality: int, metadata: Mapping[str, str]) -> dict[str, object]:
    """PIL's keyword arguments for saving in one format."""
    if suffix == "png":
        info = PngImagePlugin.PngInfo()
        for key, value in metadata.items():
            # UTF-8 (plain tEXt chunks are Latin-1 only), without the surrogates of file names that are not.
            info.add_itxt(key, value.encode("utf-8", "replace").decode())
        return {"pnginfo": info}
    options: dict[str, object] = {"quality": quality}
    if suffix != "webp":
        options["subsampling"] = 0  # full colour resolution: small images with hard coloured edges need it
    if metadata:
        exif = Image.Exif()
        exif[ExifTags.IFD.Exif] = _exif_fields(metadata)
        options["exif"] = exif
    return options


def _exif_fields(metadata: Mapping[str, str]) -> dict[int, bytes]:
    own = {name: value for name, value in metadata.items() if name != PARAMETERS}
    fields: dict[int, bytes] = {ExifTags.Base.MakerNote: _ASCII + json.dumps(own).encode("ascii")}
    comment = _UNICODE + metadata.get(PARAMETERS, "").encode("utf-16-be", "replace")
    if len(_UNICODE) < len(comment) <= _EXIF_BYTES - len(fields[ExifTags.Base.MakerNote]):
        fields[ExifTags.Base.UserComment] = comment
    return fields
