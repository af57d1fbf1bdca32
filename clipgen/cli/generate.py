"""`clipgen generate`: images from prompts, from an image, or from a mix of them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipgen.cli.common import (
    FILES,
    HOW,
    WHAT,
    Device,
    Dtype,
    FileFormat,
    Out,
    Quiet,
    Seed,
    Weights,
    check_out,
    checked_text,
    find_weights,
    load,
    log,
    make_folder,
    option,
    printable,
    read_prompts,
    warn,
)
from clipgen.cli.progress import progress
from clipgen.outputs.naming import free_stem
from clipgen.request import new_seed
from clipgen.utils.text import is_blank

if TYPE_CHECKING:
    from PIL import Image

    from clipgen.pipeline import ClipGen
    from clipgen.request import GenerationOutput, GenerationRequest, Part

CANDIDATES = 16
EXAMPLE = "Example: clipgen generate 'a lemon' 'a red heart' -n 4 --seed 7"

_PROMPTS = typer.Argument(
    metavar="PROMPT...",
    show_default=False,
    help="What to draw, in quotes; - reads prompts from stdin, one a line. Several prompts get the same seed. Put -- "
    "before a prompt that begins with a dash.",
)
_PROMPTS_FILE = option(WHAT, "A text file with one prompt a line; - reads stdin.")
_IMAGE = option(WHAT, "An image to draw variations of, or to mix into every prompt.")
_IMAGE_WEIGHT = option(WHAT, "How much the image counts; a prompt counts 1.")
_KEEP_ROWS = option(
    WHAT,
    "Keep this many rows of the image's tokens, from the top, and draw the rest from the prompt, or from the image if "
    "there is no prompt.",
)
_MIX = option(
    WHAT,
    "Mix a text into every prompt, which counts 1: --mix 'a dog=0.5'. A negative weight moves away from the text. Can "
    "be given several times.",
    metavar="TEXT=WEIGHT",
)
_NEGATIVE = option(
    WHAT,
    "Move away from a text: the further, the higher --guidance is; it must be above 1. Can be given several times.",
    metavar="TEXT",
)
_NUM_OUTPUTS = option(HOW, "Images to keep per prompt.", "--num-outputs", "-n")
_CANDIDATES = option(
    HOW,
    "Images to draw per prompt, of which CLIP picks the best. More is better and slower.",
    model=f"{CANDIDATES}, or --num-outputs if that is more",
)
_GUIDANCE = option(HOW, "How closely to follow the prompt, 0 to 30; 1 is off.", model="the model's")
_TEMPERATURE = option(HOW, "Randomness of the tokens, 0 to 10; 0 always takes the likeliest.", model="the model's")
_TOP_K = option(HOW, "Choose among the K likeliest tokens; 0 is off.", model="the model's")
_TOP_P = option(
    HOW, "Choose among the likeliest tokens that add up to probability P, above 0 to 1; 1 is off.", model="the model's"
)
_SHARDS = option(
    FILES,
    "Write WebDataset shards into this folder instead of --out: 64 prompts each, images with their receipts. A stopped "
    "run resumes; torchrun shares the shards among processes.",
    file_okay=False,
    callback=check_out,
)
_PREVIEWS = option(
    FILES,
    "While drawing, write the unfinished images to preview-SEED.png in the folder this many times at most; 0 is off.",
    min=0,
)
_JSON = option(
    FILES,
    "Print a JSON object per prompt, a line each: prompt, seed, files and their clip_scores and seeds (best first), "
    "the grid of them, seconds, and coverage: how near the prompt is to the training images, and to which.",
    "--json",
)


def generate(
    prompts: Annotated[list[str] | None, _PROMPTS] = None,
    prompts_file: Annotated[Path | None, _PROMPTS_FILE] = None,
    image: Annotated[Path | None, _IMAGE] = None,
    image_weight: Annotated[float | None, _IMAGE_WEIGHT] = None,
    keep_rows: Annotated[int, _KEEP_ROWS] = 0,
    mix: Annotated[list[str] | None, _MIX] = None,
    negative: Annotated[list[str] | None, _NEGATIVE] = None,
    num_outputs: Annotated[int, _NUM_OUTPUTS] = 4,
    candidates: Annotated[int | None, _CANDIDATES] = None,
    guidance: Annotated[float | None, _GUIDANCE] = None,
    temperature: Annotated[float | None, _TEMPERATURE] = None,
    top_k: Annotated[int | None, _TOP_K] = None,
    top_p: Annotated[float | None, _TOP_P] = None,
    seed: Seed = None,
    out: Out = Path("outputs"),
    shards: Annotated[Path | None, _SHARDS] = None,
    format: FileFormat = "png",
    previews: Annotated[int, _PREVIEWS] = 0,
    as_json: Annotated[bool, _JSON] = False,
    quiet: Quiet = False,
    weights: Weights = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Draw images from prompts, from an image, or from a mix of them.

    Writes the images and a grid of them, and prints their paths, the seed, the CLIP scores and the time.
    """
    texts = _number_texts(prompts, prompts_file, image)
    others = [_weighted(part) for part in mix or []]
    if keep_rows and image is None:
        raise typer.BadParameter("--keep-rows needs --image: the image whose rows are kept")
    if image_weight is not None and (image is None or (keep_rows and any(not is_blank(t) for t in texts.values()))):
        raise typer.BadParameter("--image-weight needs --image as a part of the prompt, not one whose rows are kept")
    from clipgen.images.pixels import load_image
    from clipgen.request import GenerationRequest

    source = load_image(image) if image else None
    weight = 1.0 if image_weight is None else image_weight
    settings: dict[str, Any] = {
        "num_outputs": num_outputs,
        "candidates": max(CANDIDATES, num_outputs) if candidates is None else candidates,
        "guidance": guidance,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": new_seed() if seed is None else seed,
        "negative_prompt": [checked_text(text) for text in negative] if negative else None,
        "keep": source if keep_rows else None,
        "keep_rows": keep_rows,
    }
    requests = {
        number: GenerationRequest(
            prompt=_parts(text, None if keep_rows and not is_blank(text) else source, weight, others), **settings
        )
        for number, text in texts.items()
    }
    if shards is not None:
        if previews:
            warn("--previews is ignored: shards hold finished images only")
        _write_shards(shards, requests, seed, format, as_json, (weights, device, dtype))
        return
    from clipgen.utils.distributed import Processes

    if Processes.from_environment().count > 1:
        raise typer.BadParameter("several processes share the prompts only with --shards DIR")
    pipe = load(weights, device, dtype)
    make_folder(out)
    results = _draw(pipe, list(requests.values()), out, previews)
    for text, result in zip(texts.values(), results, strict=True):
        if result.truncated:
            warn(f"the prompt is too long for the model, which did not read this part: {result.truncated}")
        stem = free_stem(out, text or (image.stem if image else ""), result.seed)
        files, sheet = _write(result, stem, format)
        if result.match and result.match.is_out_of_distribution:
            warn(result.match.warning(repr(text or "the image")))
        _show(text, result, files, sheet, as_json)


def _draw(pipe: ClipGen, requests: Sequence[GenerationRequest], out: Path, previews: int) -> Iterator[GenerationOutput]:
    """Generate in batches: the first files are written early, and memory does not grow with the number of prompts."""
    from clipgen.images.pixels import grid, save_image
    from clipgen.utils.memory import MAX_NUM_SEQS

    file = out / f"preview-{requests[0].seed}.png"

    def show(images: list[Image.Image]) -> None:
        save_image(grid(images), file)

    size = max(1, MAX_NUM_SEQS // requests[0].num_candidates)
    for start in range(0, len(requests), size):
        stop = min(start + size, len(requests))
        prompts = f"{stop} of {len(requests)} prompts"
        with progress(f"drawing {prompts}", f"drew {prompts}") as report:
            try:
                results = pipe.generate(
                    requests[start:stop], report, on_preview=show if previews > 0 else None, previews=previews
                )
            finally:
                if previews > 0:
                    file.unlink(missing_ok=True)
        yield from results


def _write_shards(
    folder: Path,
    requests: Mapping[int, GenerationRequest],
    seed: int | None,
    suffix: str,
    as_json: bool,
    model: tuple[str | None, str | None, str | None],
) -> None:
    """Generate this process's missing shards with the model that `load` would load; print the path of each."""
    from clipgen.outputs.metadata import weights_digest
    from clipgen.outputs.shards import claim, missing_shards, write_shard
    from clipgen.pipeline import ClipGen
    from clipgen.utils.distributed import Processes

    weights, device, dtype = find_weights(model[0]), *model[1:]
    processes = Processes.from_environment()
    requests = claim(folder, requests, weights_digest(weights), suffix, seed)
    todo = missing_shards(folder, requests, processes.rank, processes.count)
    if not todo:
        log(f"process {processes.rank + 1} of {processes.count}: all of its shards are in {folder}")
        return
    pipe = ClipGen.from_pretrained(weights, processes.device(device), dtype)
    for path, those in todo.items():
        started = time.perf_counter()
        count = write_shard(pipe, path, those, suffix, warn)
        seconds = round(time.perf_counter() - started, 3)
        record = {"shard": str(path), "prompts": len(those), "pictures": count, "seconds": seconds}
        print(json.dumps(record) if as_json else f"{path}: {count} images, {seconds:.1f} s", flush=True)


def _number_texts(prompts: Sequence[str] | None, file: Path | None, image: Path | None) -> dict[int, str]:
    """Number all prompts in order from 0; blank lines of a file have a number, too, so that numbers follow its lines.

    There is one empty prompt when there is only an image.
    """
    lines: list[str | None] = []
    for prompt in prompts or []:
        lines += [line or None for line in read_prompts(Path("-"))] if prompt == "-" else [checked_text(prompt)]
    lines += [line or None for line in read_prompts(file)] if file else []
    if not lines and image is None:
        raise typer.BadParameter("nothing to draw: give a prompt in quotes, --prompts-file or --image")
    return {number: line for number, line in enumerate(lines or [""]) if line is not None}


def _weighted(part: str) -> tuple[str, float]:
    """Parse a text and its weight: 'a dog=0.5' -> ('a dog', 0.5)."""
    text, equals, weight = checked_text(part).rpartition("=")
    try:
        if equals:
            return text, float(weight)
    except ValueError:
        pass
    raise typer.BadParameter(f"--mix is {part!r}; write TEXT=WEIGHT, such as 'a dog=0.5'")


def _parts(
    text: str, image: Image.Image | None, image_weight: float, others: Sequence[tuple[str, float]]
) -> list[tuple[Part, float]]:
    """Build the pipeline's prompt from the text, the image, and what is mixed in."""
    parts: list[tuple[Part, float]] = [] if image is None else [(image, image_weight)]
    if image is None or not is_blank(text):  # an empty prompt is an error, unless there is an image
        parts.append((text, 1.0))
    return [*parts, *others]


def _write(result: GenerationOutput, stem: Path, suffix: str) -> tuple[list[Path], Path | None]:
    """Save the images, best first, and a grid of them when there are several."""
    from clipgen.images.pixels import grid, save_image
    from clipgen.outputs.metadata import together

    files = [
        save_image(image, stem.with_name(f"{stem.name}-{i}.{suffix}"), metadata=record.to_metadata())
        for i, (image, record) in enumerate(zip(result.images, result.receipts, strict=True), start=1)
    ]
    if len(files) == 1:
        return files, None
    sheet = stem.with_name(f"{stem.name}-grid.{suffix}")
    return files, save_image(grid(result.images), sheet, metadata=together(result.receipts))


def _show(text: str, result: GenerationOutput, files: list[Path], sheet: Path | None, as_json: bool) -> None:
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
            "coverage": result.match and asdict(result.match),
        }
        print(json.dumps(record), flush=True)
        return
    print(f"{printable(text) or 'the image'}: seed {result.seed}, {seconds:.1f} s")
    for file, score, seed in zip(files, result.scores, result.seeds, strict=True):
        print(f"  {file}  CLIP score {score:.3f}, seed {seed}")
    if sheet:
        print(f"  {sheet}")
    if result.match:
        print(f"  {result.match}")
    sys.stdout.flush()
