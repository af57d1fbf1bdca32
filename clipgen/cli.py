"""The command line: `python -m clipgen generate "a lemon"`.

Results go to stdout, everything else to stderr. A mistake of the user ends with exit code 2 and one line that says what
to change; Ctrl-C with 130. PyTorch is imported only when there is something to draw, so `--help` answers at once.
"""

from __future__ import annotations

import io
import json
import re
import secrets
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from typer.core import TyperGroup

from clipgen import __version__, weights_cli

if TYPE_CHECKING:
    from clipgen.pipeline import ClipGen
    from clipgen.request import Request, Result

WEIGHTS = Path(__file__).resolve().parent.parent / "weights" / "mini"
CANDIDATES = 16
BATCH = 64
"""Candidates drawn together: whole prompts are added to a batch while they fit."""
SLUG_BYTES = 80
"""Longest part of a file's name that comes from its prompt."""

console = Console(stderr=True, highlight=False)


class Format(StrEnum):
    """File formats."""

    png = "png"
    webp = "webp"
    jpg = "jpg"


class Commands(TyperGroup):
    """The boundary: what a user did wrong becomes one line and an exit code, never a traceback."""

    def main(self, args: Sequence[str] | None = None, *_: Any, **settings: Any) -> Any:
        """Run; without arguments show the help. Errors of clipgen are `ValueError`s that its modules define."""
        args = sys.argv[1:] if args is None else args
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # no prompt may end the run because a terminal cannot show it
                stream.reconfigure(errors="backslashreplace")
        try:
            code = super().main(args or ["--help"], **settings | {"standalone_mode": False})
        except typer.TyperException as error:
            fail(error.format_message() + _given(error.__cause__), error.exit_code)
        except ValueError as error:
            if not type(error).__module__.startswith("clipgen."):
                raise
            fail(str(error))
        if code == 130:
            fail("stopped; the files named so far are complete", 130)
        sys.exit(code)


def _given(cause: BaseException | None) -> str:
    """What the user wrote, which Typer's messages about numbers leave out; pydantic's error underneath knows it."""
    details: list[Any] = getattr(cause, "errors", list)()
    return f": {details[0]['input']!r}" if details else ""


def fail(message: str, code: int = 2) -> NoReturn:
    """Print one line on stderr and exit."""
    print(f"clipgen: {printable(message)}", file=sys.stderr)
    sys.exit(code)


def say(message: str) -> None:
    """Tell the user something that is not a result: on stderr, above the progress bar if there is one."""
    console.print(printable(message), markup=False, soft_wrap=True)


def printable(text: str) -> str:
    """One line without control characters: text that came from outside must not drive the terminal."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


app = typer.Typer(cls=Commands, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
app.add_typer(weights_cli.app, name="weights")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"clipgen {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Turn a prompt or an image into new images: CLIP understands, a GPT composes, a VQGAN paints."""


def _option(panel: str, help: str, *names: str, model: str = "", **settings: Any) -> Any:
    """An option in a group of the help; `model` says what happens when it is left out."""
    default = f" [dim]\\[default: {model}][/dim]" if model else ""
    return typer.Option(*names, help=help + default, rich_help_panel=panel, **settings)


_WHAT, _HOW, _FILES, _MACHINE = "What to draw", "How to draw it", "What to write", "What to draw with"
_PROMPTS = typer.Argument(
    metavar="PROMPT...",
    show_default=False,
    help="What to draw, in quotes. Several prompts get the same seed. Put -- before a prompt that begins with a dash.",
)
_PROMPTS_FILE = _option(_WHAT, "A text file with one prompt a line; - reads stdin.")
_IMAGE = _option(_WHAT, "An image to draw variations of. With a prompt, both count alike.")
_CANDIDATES = _option(
    _HOW,
    "Images to draw per prompt, of which CLIP picks the best. More is better and slower.",
    model=f"{CANDIDATES}, or --num-outputs if that is more",
)
_GUIDANCE = _option(_HOW, "How closely to follow the prompt, 0 to 30; 1 is off.", model="the model's")
_TEMPERATURE = _option(_HOW, "How daring to be, 0 to 10; 0 always takes the likeliest token.", model="the model's")
_TOP_K = _option(_HOW, "Choose among the K likeliest tokens; 0 is off.", model="the model's")
_TOP_P = _option(
    _HOW, "Choose among the likeliest tokens that add up to probability P, above 0 to 1; 1 is off.", model="the model's"
)
_SEED = _option(_HOW, "The same seed and settings give the same images.", model="a new one, printed")
_JSON = _option(
    _FILES,
    "Print a JSON object per prompt, a line each: prompt, seed, files and their clip_scores and seeds (best first), "
    "the grid of them, seconds.",
    "--json",
)
_WEIGHTS = _option(_MACHINE, "Folder of a model.", envvar="CLIPGEN_WEIGHTS", show_default="weights/mini")
_DEVICE = _option(_MACHINE, "cpu, cuda, cuda:1, mps ...", envvar="CLIPGEN_DEVICE", model="a GPU if there is one")
_DTYPE = _option(
    _MACHINE, "Precision: float32, bfloat16 or float16.", envvar="CLIPGEN_DTYPE", model="what suits the device"
)


@app.command(epilog="Example: python -m clipgen generate 'a lemon' 'a red heart' --num-outputs 4 --seed 7")
def generate(
    prompts: Annotated[list[str] | None, _PROMPTS] = None,
    prompts_file: Annotated[Path | None, _PROMPTS_FILE] = None,
    image: Annotated[Path | None, _IMAGE] = None,
    num_outputs: Annotated[int, _option(_HOW, "Images to keep per prompt.")] = 4,
    candidates: Annotated[int | None, _CANDIDATES] = None,
    guidance: Annotated[float | None, _GUIDANCE] = None,
    temperature: Annotated[float | None, _TEMPERATURE] = None,
    top_k: Annotated[int | None, _TOP_K] = None,
    top_p: Annotated[float | None, _TOP_P] = None,
    seed: Annotated[int | None, _SEED] = None,
    out: Annotated[Path, _option(_FILES, "Folder for the images.", file_okay=False)] = Path("outputs"),
    format: Annotated[Format, _option(_FILES, "File format.")] = Format.png,
    as_json: Annotated[bool, _JSON] = False,
    weights: Annotated[Path, _WEIGHTS] = WEIGHTS,
    device: Annotated[str | None, _DEVICE] = None,
    dtype: Annotated[str | None, _DTYPE] = None,
) -> None:
    """Draw images from prompts, from an image, or from both.

    Writes the images and a grid of them, and prints their paths, the seed, the CLIP scores and the time.
    """
    texts = _texts(prompts, prompts_file, image)
    from clipgen.images import load_image
    from clipgen.pipeline import ClipGen
    from clipgen.request import MAX_CANDIDATES, MAX_SEED, Request

    picture = load_image(image) if image else None
    settings: dict[str, Any] = {
        "num_outputs": num_outputs,
        "candidates": max(CANDIDATES, num_outputs) if candidates is None else candidates,
        "guidance": guidance,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": secrets.randbelow(MAX_SEED - MAX_CANDIDATES) if seed is None else seed,
    }
    requests = [Request(prompt=_mix(text, picture), **settings) for text in texts]
    started = time.perf_counter()
    pipe = ClipGen.from_pretrained(weights, device=device, dtype=dtype)
    say(f"loaded {weights} on {pipe.device} in {time.perf_counter() - started:.1f} s")
    for text, result in zip(texts, _draw(pipe, requests), strict=True):
        if result.dropped:
            say(f"the prompt is too long for the model, which did not read this part: {result.dropped}")
        stem = _stem(out, text or (image.stem if image else ""), result.seed)
        files, sheet = _write(result, stem, format.value, _metadata(pipe, text, result))
        _show(text, result, files, sheet, as_json)


def _draw(pipe: ClipGen, requests: Sequence[Request]) -> Iterator[Result]:
    """Batch by batch, so that the first files are there early and memory does not grow with the number of prompts."""
    size = max(1, BATCH // requests[0].drawn)
    for start in range(0, len(requests), size):
        stop = min(start + size, len(requests))
        with _progress(f"{stop} of {len(requests)} prompts") as report:
            results = pipe.generate(requests[start:stop], progress=report)
        yield from results


def _texts(prompts: Sequence[str] | None, file: Path | None, image: Path | None) -> list[str]:
    """Every prompt of the run, in order; one empty prompt when there is only an image."""
    texts = [*(prompts or []), *(_read_lines(file) if file else [])]
    if not texts and image is None:
        raise typer.BadParameter("nothing to draw: give a prompt in quotes, --prompts-file or --image")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise typer.BadParameter(f"the prompt {text!a} is not valid UTF-8; type it again") from None
    return texts or [""]


def _read_lines(file: Path) -> list[str]:
    try:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        lines = [line.strip() for line in data.decode("utf-8-sig").splitlines()]
    except OSError as error:
        raise typer.BadParameter(f"--prompts-file '{file}' cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise typer.BadParameter(f"--prompts-file '{file}' is not UTF-8 text; save it as UTF-8") from None
    texts = [line for line in lines if line]
    if not texts:
        raise typer.BadParameter(f"--prompts-file '{file}' holds no prompt; write one a line")
    return texts


def _mix(text: str, picture: Any) -> Any:
    """The pipeline's prompt: text, image, or both with equal weights."""
    if picture is None:
        return text
    return [(picture, 1.0), (text, 1.0)] if text.strip() else picture


@contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int], None] | None]:
    """Yields a progress callback that moves a bar on a terminal; anywhere else a line at the end says it is done."""
    started = time.perf_counter()
    if not console.is_terminal:
        yield None
        say(f"drew {label} in {time.perf_counter() - started:.1f} s")
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _stem(out: Path, name: str, seed: int) -> Path:
    """A path in `out` named after prompt and seed, whose files `STEM-*` do not exist yet: nothing is overwritten."""
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFKC", name).lower())
    slug = words.encode()[:SLUG_BYTES].decode(errors="ignore").strip("-") or "image"
    taken = {path.name for path in out.glob("*")}
    for copy in range(1, len(taken) + 2):
        stem = f"{slug}-{seed}" if copy == 1 else f"{slug}-{seed}-v{copy}"
        if not any(name.startswith(f"{stem}-") or name.startswith(f"{stem}.") for name in taken):
            break
    return out / stem


def _write(result: Result, stem: Path, suffix: str, metadata: list[dict[str, str]]) -> tuple[list[Path], Path | None]:
    """Save the images, best first, and a grid of them when there are several."""
    from clipgen.images import grid, save_image

    files = [
        save_image(image, stem.with_name(f"{stem.name}-{i}.{suffix}"), metadata=entry)
        for i, (image, entry) in enumerate(zip(result.images, metadata, strict=True), start=1)
    ]
    if len(files) == 1:
        return files, None
    shared = {key: value for key, value in metadata[0].items() if key not in ("image_seed", "clip_score")}
    return files, save_image(grid(result.images), stem.with_name(f"{stem.name}-grid.{suffix}"), metadata=shared)


def _metadata(pipe: ClipGen, text: str, result: Result) -> list[dict[str, str]]:
    """What is written into each image: enough to draw it again."""
    settings = {"candidates": result.request.drawn, **asdict(result.request.sampling(pipe.config.sampling))}
    shared = {
        "prompt": text,
        "seed": str(result.seed),
        "settings": json.dumps(settings),
        "model": pipe.config.name,
        "software": f"clipgen {__version__}",
    }
    return [
        {**shared, "image_seed": str(seed), "clip_score": f"{score:.4f}"}
        for seed, score in zip(result.seeds, result.scores, strict=True)
    ]


def _show(text: str, result: Result, files: list[Path], sheet: Path | None, as_json: bool) -> None:
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
        }
        print(json.dumps(record), flush=True)
        return
    print(f"{printable(text) or 'the image'}: seed {result.seed}, {seconds:.1f} s")
    for file, score, seed in zip(files, result.scores, result.seeds, strict=True):
        print(f"  {file}  CLIP score {score:.3f}, seed {seed}")
    if sheet:
        print(f"  {sheet}")
    sys.stdout.flush()
