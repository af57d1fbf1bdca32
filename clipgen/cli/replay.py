"""`clipgen replay`: draw a file's image again from its receipt, and compare."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipgen.cli.common import (
    FILES,
    MACHINE,
    WHAT,
    Json,
    Quiet,
    Weights,
    check_out,
    load,
    option,
    printable,
)
from clipgen.errors import RequestError

if TYPE_CHECKING:
    from PIL import Image

    from clipgen.outputs.metadata import Receipt

ROUNDING = 1
"""Levels of 255 by which pixels of the same tokens may differ: the decoder's sums have another order in a batch."""
COMPRESSED = 5.0
"""Largest mean difference, of 255, that WebP and JPEG of quality 20 or more leave; another seed's is 6 or more."""
EXAMPLE = "Example: clipgen replay outputs/a-lemon-7-1.png"

_FILE = typer.Argument(metavar="FILE", show_default=False, dir_okay=False, help="An image that clipgen has written.")
_IMAGES = option(WHAT, "An image that it was drawn from, if there is one; can be given several times.", "--image")
_SAVE = option(FILES, "Where to write the new image, .png.", dir_okay=False, callback=check_out)
_DEVICE = option(MACHINE, "cpu, cuda, cuda:1, mps ...", envvar="CLIPGEN_DEVICE", model="the one in the receipt")
_DTYPE = option(MACHINE, "Precision.", envvar="CLIPGEN_DTYPE", model="the one in the receipt")


def replay(
    file: Annotated[Path, _FILE],
    images: Annotated[list[Path] | None, _IMAGES] = None,
    save: Annotated[Path | None, _SAVE] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    weights: Weights = None,
    device: Annotated[str | None, _DEVICE] = None,
    dtype: Annotated[str | None, _DTYPE] = None,
) -> None:
    """Draw an image again from the receipt in its file, and say whether it is the same.

    Exit code 0: the same; 1: different; 2: it cannot be drawn again.
    """
    from clipgen.images.pixels import file_format, load_image, save_image
    from clipgen.outputs.metadata import Receipt, image_digest

    receipt = Receipt.from_file(file)
    original = load_image(file)
    sources = [load_image(path) for path in images or []]
    request = receipt.request({image_digest(source): source for source in sources})
    pipe = load(weights, *_machine(receipt, device, dtype))
    result = pipe.generate([request])[0]
    index = result.seeds.index(receipt.image_seed)
    redrawn, record = result.images[index], result.receipts[index]
    if save:
        save_image(redrawn, save, metadata=record.to_metadata())
    difference = compare(original, redrawn)
    lossless = file_format(file) == "PNG"
    same = difference is not None and (difference["most"] <= ROUNDING if lossless else difference["mean"] <= COMPRESSED)
    circumstances = ("model", "weights", "dtype", "device", "torch", "software")
    both = {name: [getattr(receipt, name), getattr(record, name)] for name in circumstances}
    changed = {name: [then, now] for name, (then, now) in both.items() if then != now}
    if as_json:
        shown = {"file": str(file), "same": same, "difference": difference, "lossless": lossless}
        print(json.dumps(shown | {"changed": changed, "receipt": asdict(receipt)}))
    else:
        print("\n".join(_lines(receipt, difference, lossless, same, changed)))
    raise typer.Exit(0 if same else 1)


def _machine(receipt: Receipt, device: str | None, dtype: str | None) -> tuple[str | None, str | None]:
    """Choose device and precision: those asked for, else those of the receipt if this machine has them."""
    import torch

    from clipgen.weights.precision import pick_device, pick_precision

    kind = receipt.device.split(" ")[0]
    if device is None and (kind == "cpu" or (kind == "cuda" and torch.cuda.is_available())):
        device = kind
    if dtype is None:
        with suppress(RequestError):  # otherwise what suits the device
            pick_precision(receipt.dtype, pick_device(device))
            dtype = receipt.dtype
    return device, dtype


def compare(a: Image.Image, b: Image.Image) -> dict[str, float] | None:
    """Measure the mean and largest difference of two images' values, 0 to 255, and the share of values that differ.

    None when their sizes differ.
    """
    import numpy as np

    if a.size != b.size:
        return None
    difference = np.abs(np.asarray(a, dtype=np.int16) - np.asarray(b, dtype=np.int16))
    return {"mean": float(difference.mean()), "most": int(difference.max()), "share": float((difference > 0).mean())}


def _lines(
    receipt: Receipt, difference: dict[str, Any] | None, lossless: bool, same: bool, changed: dict[str, list[str]]
) -> Iterator[str]:
    yield f"{printable(receipt.text)}: seed {receipt.image_seed}, {printable(receipt.model)}"
    if difference is None:
        yield "different: the images have different sizes"
    elif not lossless:
        state = "the same up to compression" if same else "different, by more than compression explains"
        yield f"{state}: mean difference {difference['mean']:.2f} of 255, largest {difference['most']}"
    elif difference["most"] == 0:
        yield "the same: every pixel matches exactly"
    elif difference["most"] <= ROUNDING:
        yield (
            f"the same up to rounding: {difference['share']:.2%} of the values differ by 1 of 255, as they may when an "
            "image was drawn together with others"
        )
    else:
        yield (
            f"different: {difference['share']:.1%} of the values, by {difference['mean']:.2f} of 255 on average and "
            f"{difference['most']} at most"
        )
    names = {"software": "clipgen", "torch": "PyTorch", "dtype": "precision"}
    for name, (then, now) in changed.items():
        then, now = (printable(value[:12] + "..." if name == "weights" else value) for value in (then, now))
        yield f"  {names.get(name, name)}: {then} then, {now} now"
    if not same and not changed:
        yield "  nothing recorded in the receipt has changed: its pixels were edited, or another CPU rounded"
