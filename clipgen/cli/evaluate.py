"""`python -m clipgen evaluate`: a model measured against prompts and real pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from clipgen.cli import common as t
from clipgen.cli.common import FILES, HOW, option
from clipgen.utils.files import write_text

EXAMPLE = "Example: python -m clipgen evaluate --prompts prompts.txt --reference photos --features clip"
MEASURE = "What to measure with"


class Features(StrEnum):
    """Networks that pictures are compared by."""

    inception = "inception"
    clip = "clip"
    efficientnet = "efficientnet"


_REFERENCE = option(
    MEASURE, "Real pictures: a folder, a .txt list, or .tar shards such as 'data/{000..127}.tar'.", show_default=False
)
_PROMPTS = option(
    MEASURE,
    "A text file with one prompt a line. Without it, variations of the reference pictures are drawn.",
    dir_okay=False,
)
_LIMIT = option(MEASURE, "Use at most so many of the real pictures, spread evenly.", model="all", min=1)
_FEATURES = option(
    MEASURE, "inception gives FID and Inception Score (fetched once, 96 MB); the others are for want of it."
)
_CAPTIONER = option(
    MEASURE, "Folder of a transformers captioner, such as BLIP: adds the caption score.", file_okay=False
)
_CANDIDATES = option(HOW, "Pictures drawn for each prompt, of which CLIP's best is measured.")


def evaluate(
    reference: Annotated[str, _REFERENCE],
    prompts: Annotated[Path | None, _PROMPTS] = None,
    limit: Annotated[int | None, _LIMIT] = None,
    features: Annotated[Features, _FEATURES] = Features.inception,
    captioner: Annotated[Path | None, _CAPTIONER] = None,
    candidates: Annotated[int, _CANDIDATES] = 1,
    seed: Annotated[int, option(HOW, "The same seed draws the same pictures.")] = 0,
    out: Annotated[Path | None, option(FILES, "Write the JSON here too.", dir_okay=False)] = None,
    weights: t.Weights = None,
    device: t.Device = None,
    dtype: t.Dtype = None,
) -> None:
    """Measure a model: FID-k, Inception Score, CLIP score, R-precision, CapS; PSNR, LPIPS and rFID of its VQGAN.

    Prints one JSON object with the figures, what was left out and why, warnings, settings and hashes. torchrun shares
    the work among processes.
    """
    texts = t.read_lines(prompts, "--prompts") if prompts else None
    source = _open(reference, limit)
    from clipgen.utils.distributed import Processes

    processes = Processes.from_environment()
    log: Callable[[str], None] = t.log if processes.rank == 0 else _silent
    from clipgen.evaluation.caption_score import Captioner
    from clipgen.evaluation.evaluate import Evaluators
    from clipgen.evaluation.evaluate import evaluate as measure
    from clipgen.evaluation.features import build_extractor, build_lpips, fetched, is_here
    from clipgen.outputs.metadata import weights_digest
    from clipgen.pipeline import ClipGen

    folder = t.find_weights(weights)
    pipe = ClipGen.from_pretrained(folder, processes.device(device), dtype)
    extractor = build_extractor(features.value, pipe.clip, folder / "clip.safetensors", log)
    lpips = build_lpips(fetched("vgg16", log), pipe.device) if is_here("vgg16") else None
    tools = Evaluators(extractor, lpips, Captioner(captioner, pipe.device) if captioner else None)
    count = len(source.names) + (len(source.names) if texts is None else len(texts))
    with _bar(-(-count // processes.count), processes.rank == 0) as progress:
        result = measure(pipe, tools, texts, source, seed, candidates, processes, progress)
    named = {"weights": str(folder), "prompts": prompts and str(prompts), "reference": reference}
    result = {"given": named, "weights_sha256": weights_digest(folder), **result}
    if processes.rank == 0:
        _show(result, out)


def _open(reference: str, limit: int | None) -> Any:
    try:
        from clipgen.images.sources import Subset, open_source
    except ImportError as error:
        raise typer.BadParameter(f"evaluate needs {error.name}; install requirements-train.txt") from None
    source = open_source(reference)
    return source if limit is None else Subset(source, limit)


def _show(result: dict[str, Any], out: Path | None) -> None:
    text = json.dumps(result, indent=2)
    if out:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_text(out, text + "\n")
        except OSError as error:
            t.log(f"--out '{out}' cannot be written: {error.strerror}")
            print(text, flush=True)
            raise typer.Exit(2) from None
    for warning in result["warnings"]:
        t.log(f"note: {warning}")
    print(text, flush=True)


def _silent(message: str) -> None:
    """What only one of several processes is to say."""


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, for the first process."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    if not (shown and t.console.is_terminal):
        yield lambda done: None
        return
    with Progress(*columns, console=t.console, transient=True) as bar:
        task = bar.add_task("measuring", total=total)
        yield lambda done: bar.advance(task, done)
