"""`python -m clipgen generate`: images from prompts, from an image, or from a mix of them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipgen.cli import common as t
from clipgen.cli.common import FILES, HOW, WHAT, option
from clipgen.outputs.naming import free_stem
from clipgen.request import new_seed

if TYPE_CHECKING:
    from PIL import Image

    from clipgen.outputs.metadata import Receipt
    from clipgen.pipeline import ClipGen
    from clipgen.request import GenerationOutput, GenerationRequest, Part
    from clipgen.weights.training_index import IndexMatch

CANDIDATES = 16
BATCH = 64
"""Candidates drawn together: whole prompts are added to a batch while they fit."""
EXAMPLE = "Example: python -m clipgen generate 'a lemon' 'a red heart' --num-outputs 4 --seed 7"

_PROMPTS = typer.Argument(
    metavar="PROMPT...",
    show_default=False,
    help="What to draw, in quotes. Several prompts get the same seed. Put -- before a prompt that begins with a dash.",
)
_PROMPTS_FILE = option(WHAT, "A text file with one prompt a line; - reads stdin.")
_IMAGE = option(WHAT, "An image to draw variations of, or to mix into every prompt.")
_IMAGE_WEIGHT = option(WHAT, "How much the image counts; a prompt counts 1.")
_KEEP_ROWS = option(
    WHAT,
    "Keep so many rows of the image's tokens, from the top, and draw the rest anew: what the prompt says, or the image "
    "where there is none.",
)
_MIX = option(
    WHAT,
    "Mix a text into every prompt, which counts 1: --mix 'a dog=0.5'. A negative weight moves away from it. May be "
    "given several times.",
    metavar="TEXT=WEIGHT",
)
_NEGATIVE = option(
    WHAT,
    "Keep away from a text. The higher --guidance is, the farther; it must be above 1. May be given several times.",
    metavar="TEXT",
)
_CANDIDATES = option(
    HOW,
    "Images to draw per prompt, of which CLIP picks the best. More is better and slower.",
    model=f"{CANDIDATES}, or --num-outputs if that is more",
)
_GUIDANCE = option(HOW, "How closely to follow the prompt, 0 to 30; 1 is off.", model="the model's")
_TEMPERATURE = option(HOW, "How daring to be, 0 to 10; 0 always takes the likeliest token.", model="the model's")
_TOP_K = option(HOW, "Choose among the K likeliest tokens; 0 is off.", model="the model's")
_TOP_P = option(
    HOW, "Choose among the likeliest tokens that add up to probability P, above 0 to 1; 1 is off.", model="the model's"
)
_SHARDS = option(
    FILES,
    "Write WebDataset shards into this folder in place of --out: 64 prompts each, pictures with their receipts. Goes "
    "on where it was stopped; torchrun shares them among processes.",
    file_okay=False,
)
_PREVIEWS = option(
    FILES,
    "While drawing, write the unfinished images to preview-SEED.png in the folder, at most so often; 0 does not.",
    min=0,
)
_JSON = option(
    FILES,
    "Print a JSON object per prompt, a line each: prompt, seed, files and their clip_scores and seeds (best first), "
    "the grid of them, seconds, and coverage: how near the prompt is to the training pictures, and to which.",
    "--json",
)


def generate(
    prompts: Annotated[list[str] | None, _PROMPTS] = None,
    prompts_file: Annotated[Path | None, _PROMPTS_FILE] = None,
    image: Annotated[Path | None, _IMAGE] = None,
    image_weight: Annotated[float, _IMAGE_WEIGHT] = 1.0,
    keep_rows: Annotated[int, _KEEP_ROWS] = 0,
    mix: Annotated[list[str] | None, _MIX] = None,
    negative: Annotated[list[str] | None, _NEGATIVE] = None,
    num_outputs: Annotated[int, option(HOW, "Images to keep per prompt.")] = 4,
    candidates: Annotated[int | None, _CANDIDATES] = None,
    guidance: Annotated[float | None, _GUIDANCE] = None,
    temperature: Annotated[float | None, _TEMPERATURE] = None,
    top_k: Annotated[int | None, _TOP_K] = None,
    top_p: Annotated[float | None, _TOP_P] = None,
    seed: t.Seed = None,
    out: t.Out = Path("outputs"),
    shards: Annotated[Path | None, _SHARDS] = None,
    format: t.FileFormat = t.Format.png,
    previews: Annotated[int, _PREVIEWS] = 0,
    as_json: Annotated[bool, _JSON] = False,
    weights: t.Weights = None,
    device: t.Device = None,
    dtype: t.Dtype = None,
) -> None:
    """Draw images from prompts, from an image, or from a mix of them.

    Writes the images and a grid of them, and prints their paths, the seed, the CLIP scores and the time.
    """
    texts = _texts(prompts, prompts_file, image)
    others = [_weighted(part) for part in mix or []]
    if keep_rows and image is None:
        raise typer.BadParameter("--keep-rows needs --image: the picture whose rows stay")
    from clipgen.images.pixels import load_image
    from clipgen.outputs.metadata import receipts
    from clipgen.request import GenerationRequest

    picture = load_image(image) if image else None
    settings: dict[str, Any] = {
        "num_outputs": num_outputs,
        "candidates": max(CANDIDATES, num_outputs) if candidates is None else candidates,
        "guidance": guidance,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": new_seed() if seed is None else seed,
        "negative": [t.checked_text(text) for text in negative] if negative else None,
        "keep": picture if keep_rows else None,
        "keep_rows": keep_rows,
    }
    requests = [
        GenerationRequest(
            prompt=_parts(text, None if keep_rows and text.strip() else picture, image_weight, others), **settings
        )
        for text in texts
    ]
    if shards is not None:
        from clipgen.cli.bulk import write_shards

        write_shards(shards, requests, seed, format.value, as_json, (weights, device, dtype))
        return
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise typer.BadParameter("several processes share the prompts only with --shards DIR")
    pipe, digest = t.load(weights, device, dtype)
    for text, result in zip(texts, _draw(pipe, requests, out, previews), strict=True):
        if result.dropped:
            t.log(f"the prompt is too long for the model, which did not read this part: {result.dropped}")
        stem = free_stem(out, text or (image.stem if image else ""), result.seed)
        files, sheet = _write(result, stem, format.value, receipts(pipe, result, digest))
        covered = pipe.covered(result.request.prompt)
        if covered and covered.low:
            t.log(covered.warning(repr(text or "the image")))
        _show(text, result, files, sheet, covered, as_json)


def _draw(pipe: ClipGen, requests: Sequence[GenerationRequest], out: Path, previews: int) -> Iterator[GenerationOutput]:
    """Batch by batch, so that the first files are there early and memory does not grow with the number of prompts."""
    from clipgen.images.pixels import grid, save_image

    file = out / f"preview-{requests[0].seed}.png"

    def show(pictures: list[Image.Image]) -> None:
        save_image(grid(pictures), file)

    size = max(1, BATCH // requests[0].drawn)
    for start in range(0, len(requests), size):
        stop = min(start + size, len(requests))
        with t.progress(f"{stop} of {len(requests)} prompts") as report:
            try:
                results = pipe.generate(
                    requests[start:stop], report, preview=show if previews > 0 else None, previews=previews
                )
            finally:
                if previews > 0:
                    file.unlink(missing_ok=True)
        yield from results


def _texts(prompts: Sequence[str] | None, file: Path | None, image: Path | None) -> list[str]:
    """Every prompt of the run, in order; one empty prompt when there is only an image."""
    texts = [*(prompts or []), *(t.read_lines(file, "--prompts-file") if file else [])]
    if not texts and image is None:
        raise typer.BadParameter("nothing to draw: give a prompt in quotes, --prompts-file or --image")
    return [t.checked_text(text) for text in texts] or [""]


def _weighted(part: str) -> tuple[str, float]:
    """'a dog=0.5' -> ('a dog', 0.5)."""
    text, equals, weight = t.checked_text(part).rpartition("=")
    try:
        if equals:
            return text, float(weight)
    except ValueError:
        pass
    raise typer.BadParameter(f"--mix is {part!r}; write TEXT=WEIGHT, such as 'a dog=0.5'")


def _parts(
    text: str, picture: Image.Image | None, image_weight: float, others: Sequence[tuple[str, float]]
) -> list[tuple[Part, float]]:
    """The pipeline's prompt: the text, the image, and what is mixed in."""
    parts: list[tuple[Part, float]] = [] if picture is None else [(picture, image_weight)]
    if text.strip() or picture is None:  # an empty prompt is an error, unless there is an image
        parts.append((text, 1.0))
    return [*parts, *others]


def _write(
    result: GenerationOutput, stem: Path, suffix: str, records: Sequence[Receipt]
) -> tuple[list[Path], Path | None]:
    """Save the images, best first, and a grid of them when there are several."""
    from clipgen.images.pixels import grid, save_image
    from clipgen.outputs.metadata import together

    files = [
        save_image(image, stem.with_name(f"{stem.name}-{i}.{suffix}"), metadata=record.to_metadata())
        for i, (image, record) in enumerate(zip(result.images, records, strict=True), start=1)
    ]
    if len(files) == 1:
        return files, None
    sheet = stem.with_name(f"{stem.name}-grid.{suffix}")
    return files, save_image(grid(result.images), sheet, metadata=together(records))


def _show(
    text: str,
    result: GenerationOutput,
    files: list[Path],
    sheet: Path | None,
    covered: IndexMatch | None,
    as_json: bool,
) -> None:
    """Print one prompt's result on stdout."""
    seconds = round(result.seconds["total"], 3)
    if as_json:
        record = {
            "prompt": text,
            "seed": result.seed,
            "files": [str(file) for file in files],
            "clip_scores": [round(score, 4) for score in result.scores],
            "seeds": result.seeds,
            "grid": sheet and str(sheet),
            "seconds": seconds,
            "coverage": covered and asdict(covered),
        }
        print(json.dumps(record), flush=True)
        return
    print(f"{t.printable(text) or 'the image'}: seed {result.seed}, {seconds:.1f} s")
    for file, score, seed in zip(files, result.scores, result.seeds, strict=True):
        print(f"  {file}  CLIP score {score:.3f}, seed {seed}")
    if sheet:
        print(f"  {sheet}")
    if covered:
        print(f"  {covered}")
    sys.stdout.flush()
