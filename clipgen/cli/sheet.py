"""`clipgen sheet`: one prompt over several values of one or two settings, as a labelled grid."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from clipgen.cli.common import (
    HOW,
    WHAT,
    Device,
    Dtype,
    FileFormat,
    Json,
    Out,
    Quiet,
    Seed,
    Weights,
    checked_text,
    load,
    make_folder,
    option,
    printable,
    show_figure,
)
from clipgen.cli.progress import progress
from clipgen.outputs.naming import free_stem
from clipgen.request import new_seed

MAX_CELLS = 100
MAX_WEBP = 16383
"""Largest side of a WebP file, px."""
EXAMPLE = "Example: clipgen sheet 'a lemon' --guidance 1,2,4 --temperature 0.7,1,1.3"
SETTINGS = {"guidance": float, "temperature": float, "top_k": int, "top_p": float}

_PROMPT = typer.Argument(metavar="PROMPT", show_default=False, help="What to draw, in quotes.")
_CANDIDATES = option(HOW, "Images to draw per cell, of which CLIP picks the best; 1 shows unselected images.")


def _values(help: str) -> Any:
    return option(HOW, f"{help}: one value, or several separated by commas.", model="the model's", metavar="A,B,...")


def sheet(
    prompt: Annotated[str, _PROMPT],
    guidance: Annotated[str | None, _values("How closely to follow the prompt, 0 to 30")] = None,
    temperature: Annotated[str | None, _values("Randomness of the tokens, 0 to 10")] = None,
    top_k: Annotated[str | None, _values("Choose among the K likeliest tokens; 0 is off")] = None,
    top_p: Annotated[str | None, _values("Choose among the likeliest that add up to P")] = None,
    negative: Annotated[
        str | None, option(WHAT, "Move away from a text; guidance must be above 1.", metavar="TEXT")
    ] = None,
    candidates: Annotated[int, _CANDIDATES] = 1,
    seed: Seed = None,
    out: Out = Path("outputs"),
    format: FileFormat = "png",
    as_json: Json = False,
    quiet: Quiet = False,
    weights: Weights = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Draw a prompt with several values of one or two settings, with one seed and all else equal, as one grid.

    Values of the first setting make rows, those of the second columns. The file holds a receipt of every cell.
    """
    from clipgen.images.grids import labelled_grid
    from clipgen.images.pixels import save_image
    from clipgen.outputs.metadata import together
    from clipgen.request import GenerationRequest

    given = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    values = {name: _parse(name, text) for name, text in given.items() if text is not None}
    varying = axes(values)
    shared: dict[str, Any] = {"candidates": candidates, "seed": new_seed() if seed is None else seed}
    shared["negative_prompt"] = None if negative is None else checked_text(negative)
    cells = itertools.product(*values.values())
    requests = [
        GenerationRequest(checked_text(prompt), **shared | dict(zip(values, cell, strict=True))) for cell in cells
    ]
    pipe = load(weights, device, dtype)
    width = pipe.config.vqgan.image_size * len([*varying.values()][-1])
    if format == "webp" and width > MAX_WEBP:
        raise typer.BadParameter(f"the grid is more than {width} px wide; WebP has {MAX_WEBP}: use --format png")
    make_folder(out)
    with progress(f"drawing {len(requests)} cells", f"drew {len(requests)} cells") as report:
        results = pipe.generate(requests, progress=report)
    title = f"{printable(prompt)}, seed {results[0].seed}" + "".join(
        f", {name} {numbers[0]:g}" for name, numbers in values.items() if len(numbers) == 1
    )
    title += "" if negative is None else f", not {printable(negative)}"
    *rows, columns = ([f"{name} {value:g}" for value in numbers] for name, numbers in varying.items())
    image = labelled_grid([result.images[0] for result in results], columns, rows[0] if rows else [""], title)
    stem = free_stem(out, prompt, results[0].seed)
    records = [result.receipts[0] for result in results]
    file = save_image(image, stem.with_name(f"{stem.name}-sheet.{format}"), metadata=together(records))
    show_figure(file, results, printable(prompt), {"prompt": prompt, "axes": varying}, as_json)


def axes(values: dict[str, list[float]]) -> dict[str, list[float]]:
    """Pick the settings that vary: that of the columns, or those of the rows and of the columns.

    Raises:
        BadParameter: none varies, more than two do, or there are too many cells.
    """
    varying = {name: numbers for name, numbers in values.items() if len(numbers) > 1}
    if not 1 <= len(varying) <= 2:
        found = ", ".join(varying) or "none"
        names = ", ".join(f"--{name.replace('_', '-')}" for name in SETTINGS)
        raise typer.BadParameter(f"one or two settings must vary, here: {found}; give {names} values with commas")
    cells = math.prod(map(len, varying.values()))
    if cells > MAX_CELLS:
        raise typer.BadParameter(f"the grid has {cells} cells; {MAX_CELLS} are allowed: give fewer values")
    return varying


def _parse(name: str, text: str) -> list[float]:
    kind = SETTINGS[name]
    try:
        found = [kind(value) for value in text.split(",")]
    except ValueError:
        whole = "whole numbers" if kind is int else "numbers"
        raise typer.BadParameter(f"--{name.replace('_', '-')} is {text!r}; give {whole} separated by commas") from None
    if len(set(found)) < len(found):
        raise typer.BadParameter(f"--{name.replace('_', '-')} is {text!r}; it repeats a value")
    return found
