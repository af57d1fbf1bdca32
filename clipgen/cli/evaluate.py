"""`clipgen evaluate`: measure a model with prompts and real images."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from clipgen.cli.common import (
    FILES,
    HOW,
    Device,
    Dtype,
    Quiet,
    Weights,
    check_out,
    console,
    find_weights,
    log,
    option,
    read_prompts,
    warn,
)
from clipgen.cli.progress import progress

EXAMPLE = "Example: clipgen evaluate --prompts prompts.txt --reference photos --features clip"
MEASURE = "What to measure with"

_REFERENCE = option(
    MEASURE, "Real images: a folder, a .txt list, or .tar shards such as 'data/{000..127}.tar'.", show_default=False
)
_PROMPTS = option(
    MEASURE,
    "A text file with one prompt a line. Without it, variations of the reference images are drawn.",
    dir_okay=False,
)
_LIMIT = option(MEASURE, "Use at most this many of the real images, spread evenly.", model="all", min=1)
_FEATURES = option(
    MEASURE, "inception gives FID and Inception Score (fetched once, 96 MB); use the others where it cannot be fetched."
)
_CAPTIONER = option(
    MEASURE, "Folder of a transformers captioner, such as BLIP: adds the caption score.", file_okay=False
)
_OUT = option(FILES, "Write the JSON here too.", "--out", "-o", dir_okay=False, callback=check_out)
_CANDIDATES = option(HOW, "Images to draw per prompt, of which CLIP's best is measured.")


def evaluate(
    reference: Annotated[str, _REFERENCE],
    prompts: Annotated[Path | None, _PROMPTS] = None,
    limit: Annotated[int | None, _LIMIT] = None,
    features: Annotated[Literal["inception", "clip", "efficientnet"], _FEATURES] = "inception",
    captioner: Annotated[Path | None, _CAPTIONER] = None,
    candidates: Annotated[int, _CANDIDATES] = 1,
    seed: Annotated[int, option(HOW, "The same seed draws the same images.", "--seed", "-s")] = 0,
    out: Annotated[Path | None, _OUT] = None,
    quiet: Quiet = False,
    weights: Weights = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Measure a model: FID-k, Inception Score, CLIP score, R-precision, CapS; PSNR, LPIPS and rFID of its VQGAN.

    Prints one JSON object with the figures, what was left out and why, warnings, settings and hashes. Under torchrun
    the processes share the work.
    """
    texts = [line for line in read_prompts(prompts) if line] if prompts else None
    source = _open(reference, limit)
    from clipgen.utils.distributed import Processes

    processes = Processes.from_environment()
    console.quiet = quiet or processes.rank > 0
    from clipgen.evaluation.caption_score import Captioner
    from clipgen.evaluation.evaluate import evaluate_model
    from clipgen.evaluation.features import build_extractor, build_lpips, fetched, is_here
    from clipgen.pipeline import ClipGen

    folder = find_weights(weights)
    pipe = ClipGen.from_pretrained(folder, processes.device(device), dtype)
    extractor = build_extractor(features, pipe.clip, folder / "clip.safetensors", log)
    lpips = build_lpips(fetched("vgg16", log), pipe.device) if is_here("vgg16") and find_spec("lpips") else None
    reader = Captioner(captioner, pipe.device) if captioner else None
    count = len(source.names) + len(source.names if texts is None else texts)
    with progress("measuring", f"measured {count} images") as report:
        result = evaluate_model(pipe, extractor, texts, source, lpips, reader, seed, candidates, processes, report)
    named = {"weights": str(folder), "prompts": prompts and str(prompts), "reference": reference}
    result = {"given": named, "weights_sha256": pipe.digest, **result}
    if processes.rank == 0:
        _show(result, out)


def _open(reference: str, limit: int | None) -> Any:
    try:
        from clipgen.images.sources import Subset, open_source
    except ImportError as error:
        raise typer.BadParameter(
            f"evaluate needs {error.name}; install requirements-train.txt or 'clipgen[eval]'"
        ) from None
    source = open_source(reference)
    return source if limit is None else Subset(source, limit)


def _show(result: dict[str, Any], out: Path | None) -> None:
    text = json.dumps(result, indent=2)
    for warning in result["warnings"]:
        warn(f"note: {warning}")
    print(text, flush=True)
    if out:  # after the figures are out: if it cannot be written, they are not lost
        from clipgen.utils.files import write_text

        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, text + "\n")
