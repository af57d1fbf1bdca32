"""Every pixel range, resize and normalisation of the project, and images in and out of files.

Three representations exist, and only this module converts between them:

- PIL: RGB, 8 bits, upright, no alpha;
- pixels: float32 (B, 3, H, W) in [-1, 1], what the VQGAN reads and writes, `(x - 0.5) / 0.5`;
- CLIP input: float32 (B, 3, S, S), `(x - mean) / std` with OpenAI's per-channel mean and std.

Image files are treated as hostile: only common formats are decoded, the size in the header is checked before any
pixel is, and whatever goes wrong inside a decoder becomes an `DataError` that says what to do.
"""

from __future__ import annotations

import io
import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, PngImagePlugin
from torch import Tensor

from clipgen.errors import DataError

# github.com/openai/CLIP, clip/clip.py: the statistics that its image towers were trained with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

MAX_MEGAPIXELS = 64
READ_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
SAVE_FORMATS = {"png": "PNG", "webp": "WEBP", "jpg": "JPEG", "jpeg": "JPEG"}
_ASCII = b"ASCII\0\0\0"  # EXIF 2.3, 4.6.5: the first 8 bytes of UserComment name its code


def load_image(source: str | Path | bytes | BinaryIO) -> Image.Image:
    """Read an image file, whatever its kind, as an upright 8-bit RGB picture.

    Animations give their first frame, transparency is put on white, 16-bit greys are scaled to 8 bits, and the EXIF
    orientation is applied. The picture's `info` keeps nothing of the file but its name, under "name", for receipts.

    Args:
        source: path, the bytes of a file, or a binary file object.

    Raises:
        DataError: no such file, empty, damaged, a format outside `READ_FORMATS`, or above `MAX_MEGAPIXELS`.
    """
    name = f"'{source}'" if isinstance(source, (str, Path)) else "the given image"
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with Image.open(file, formats=READ_FORMATS) as image:
            _check_size(image)
            image.load()
            picture = to_rgb(_upright(image))
            picture.info = {"name": Path(source).name} if isinstance(source, (str, Path)) else {}
            return picture
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    except FileNotFoundError:
        raise DataError(f"{name}: no such file; check the path") from None
    except IsADirectoryError:
        raise DataError(f"{name} is a folder; give the path of one image file") from None
    except PermissionError:
        raise DataError(f"{name} may not be read; check its permissions") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"{name} has {_TOO_LARGE}") from None
    except Image.UnidentifiedImageError:
        allowed = ", ".join(READ_FORMATS)
        reason = "is empty (0 bytes)" if _is_empty(file) else "is not an image that can be read, or is damaged"
        raise DataError(f"{name} {reason}; allowed formats are {allowed}: convert or export it again") from None
    except Exception as error:  # on damaged files PIL's decoders raise everything from struct.error to IndexError
        message = f"{name} is truncated or damaged ({error}); download or export it again"
        raise DataError(message) from error


MAX_METADATA = 1_000_000
"""Characters of one value that `read_metadata` returns; ours have some hundred."""


def read_metadata(path: str | Path) -> dict[str, str]:
    """What `save_image` has embedded in a file; {} when there is nothing of the kind. No pixel is decoded.

    Raises:
        DataError: no such file, not a PNG, WebP or JPEG, damaged, or an endless value.
    """
    try:
        with Image.open(path, formats=[*dict.fromkeys(SAVE_FORMATS.values())]) as image:
            _check_size(image)
            # A PNG's `text` would decode the pixels to look behind them; ours comes before them.
            found = image.info if image.format == "PNG" else _user_comment(image)
    except FileNotFoundError:
        raise DataError(f"'{path}': no such file; check the path") from None
    except Image.UnidentifiedImageError:
        raise DataError(f"'{path}' is no image of the kinds written here: {', '.join(SAVE_FORMATS)}") from None
    except Exception as error:  # as in `load_image`
        raise DataError(f"'{path}' cannot be read ({error})") from error
    metadata = {str(key): str(value) for key, value in found.items() if isinstance(value, str)}
    if any(len(value) > MAX_METADATA for value in metadata.values()):
        raise DataError(f"'{path}' has metadata of more than {MAX_METADATA:,} characters; it is not from here")
    return metadata


def _user_comment(image: Image.Image) -> dict[str, str]:
    """The JSON object of names and texts in the EXIF field UserComment; {} when that holds anything else."""
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if not isinstance(comment, bytes) or not comment.startswith(_ASCII) or len(comment) > MAX_METADATA:
        return {}
    try:
        found = json.loads(comment.removeprefix(_ASCII).decode("ascii"))
    except (ValueError, RecursionError):  # a camera's comment, or someone's idea of a joke
        return {}
    return found if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()) else {}


_TOO_LARGE = (
    f"more than the {MAX_MEGAPIXELS} megapixels allowed; make it smaller first, a few hundred pixels are enough"
)


def _check_size(image: Image.Image) -> None:
    """Refuse by the size in the header, before decoding would allocate it."""
    width, height = image.size
    if width * height > MAX_MEGAPIXELS * 1_000_000:
        raise DataError(f"the image has {width} x {height} pixels, {_TOO_LARGE}")


def _is_empty(file: object) -> bool:
    if isinstance(file, (str, Path)):
        return os.path.getsize(file) == 0
    return isinstance(file, io.BytesIO) and file.getbuffer().nbytes == 0


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; a picture with damaged EXIF data is still a picture."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # as above: anything can come out of parsing hostile EXIF
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
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _square_bytes(images: Sequence[Image.Image], size: int) -> Tensor:
    """Resize the shorter side to `size`, crop the centre: uint8 (B, 3, size, size).

    The same picture as torchvision's `Resize(size, BICUBIC)` and `CenterCrop(size)`, but the crop is part of the
    resize: a 10 x 1,000,000 picture never becomes 224 x 22,400,000.
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
        # ... and what that crop covers in the original.
        sx, sy = width / new_width, height / new_height
        box = (left * sx, top * sy, min((left + size) * sx, width), min((top + size) * sy, height))
        arrays.append(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box)))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()  # (B, 3, size, size)


def to_pixels(images: Sequence[Image.Image], size: int) -> Tensor:
    """PIL images to the VQGAN's range: shorter side to `size`, centre crop; float32 (B, 3, size, size) in [-1, 1]."""
    return _square_bytes(images, size).float() / 127.5 - 1


def from_pixels(x: Tensor) -> list[Image.Image]:
    """The VQGAN's pixels (B, 3, H, W) in about [-1, 1], clamped to it, to B RGB images.

    Raises:
        DataError: a wrong shape, or values that are not finite.
    """
    if x.ndim != 4 or x.shape[1] != 3:
        raise DataError(f"pixels have the shape {tuple(x.shape)}; it must be (B, 3, H, W)")
    x = x.detach().float()
    if not x.isfinite().all():
        raise DataError("the generated pixels are not finite (NaN or infinity); try float32, or check the weights")
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)  # on the device: a quarter of the bytes to copy
    return [Image.fromarray(array) for array in x.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def _clip_normalise(x: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] to CLIP's normalisation."""
    mean = x.new_tensor(CLIP_MEAN).view(1, 3, 1, 1)
    std = x.new_tensor(CLIP_STD).view(1, 3, 1, 1)
    return (x - mean) / std


def to_clip(images: Sequence[Image.Image], size: int) -> Tensor:
    """PIL images to CLIP's input with OpenAI's preprocessing; float32 (B, 3, size, size), mean and std normalised."""
    return _clip_normalise(_square_bytes(images, size).float() / 255)


def clip_from_pixels(x: Tensor, size: int) -> Tensor:
    """The VQGAN's pixels to CLIP's input without leaving the device, differentiable.

    Equals `to_clip(from_pixels(x), size)` up to the rounding to 8 bits: centre square, antialiased bicubic (the same
    kernel as PIL's), clamped where the kernel overshoots, then OpenAI's mean and std.

    Args:
        x: (B, 3, H, W) in about [-1, 1]; values outside are clamped, as they are in the picture that is saved.
        size: side of CLIP's input.

    Returns:
        float32 (B, 3, size, size), CLIP-normalised.
    """
    side = min(x.shape[-2:])
    top, left = round((x.shape[-2] - side) / 2), round((x.shape[-1] - side) / 2)
    x = (x[..., top : top + side, left : left + side].float().clamp(-1, 1) + 1) / 2
    if side != size:
        x = F.interpolate(x, size=(size, size), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
    return _clip_normalise(x)


def grid(images: Sequence[Image.Image], columns: int | None = None, gap: int = 2) -> Image.Image:
    """Lay images out row by row on white.

    Args:
        images: at least one; each cell is as large as the largest of them.
        columns: images in a row; None makes the grid about square.
        gap: pixels between the cells.

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
    """Write an image atomically, in the format of the path's suffix; missing parent folders are made.

    Args:
        image: a PIL image.
        path: where to; the suffix is one of `SAVE_FORMATS`.
        quality: 1 (small) to 100 (best), for webp and jpg; png is lossless.
        metadata: names and values to embed: text chunks of a PNG, else JSON in the EXIF field UserComment.

    Returns:
        The path written.

    Raises:
        DataError: unknown suffix, quality out of range, metadata that does not fit, or the file cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in SAVE_FORMATS:
        raise DataError(f"'{path}' has the format '{suffix}'; allowed are {', '.join(SAVE_FORMATS)}: change the suffix")
    if not 1 <= quality <= 100:
        raise DataError(f"quality is {quality}; it must be from 1 to 100")
    # Not tempfile: it makes files that only their owner can read. Same folder, so that the rename is atomic.
    temporary = path.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            to_rgb(image).save(temporary, SAVE_FORMATS[suffix], **_save_options(suffix, quality, metadata or {}))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot write '{path}': {error}") from error
    return path


def _save_options(suffix: str, quality: int, metadata: Mapping[str, str]) -> dict[str, object]:
    """PIL's keyword arguments for one format."""
    if suffix == "png":
        info = PngImagePlugin.PngInfo()
        for key, value in metadata.items():
            info.add_itxt(key, value)  # UTF-8; plain tEXt chunks are Latin-1 only
        return {"pnginfo": info}
    options: dict[str, object] = {"quality": quality}
    if suffix != "webp":
        options["subsampling"] = 0  # full colour resolution: small pictures with hard coloured edges need it
    if metadata:
        exif = Image.Exif()
        comment = _ASCII + json.dumps(dict(metadata)).encode("ascii")
        exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: comment}
        options["exif"] = exif
    return options
