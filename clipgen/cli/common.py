"""What the commands share: messages, options that mean the same everywhere, texts from the command line and from files.

Results go to stdout, everything else to stderr. PyTorch is imported only when there is something to draw, so `--help`
answers at once.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from clipgen.errors import DataError, OutputError
from clipgen.utils.text import is_blank, printable, read_lines

if TYPE_CHECKING:
    from clipgen.pipeline import ClipGen
    from clipgen.request import GenerationOutput

console = Console(stderr=True, highlight=False)


def log(message: str) -> None:
    """Print a note on stderr, above the progress bar if there is one; `--quiet` drops it."""
    with suppress(OSError):  # a note that cannot be shown must not end the run
        console.print(printable(message), markup=False, soft_wrap=True)


def warn(message: str) -> None:
    """Print a warning on stderr, with `--quiet` too."""
    with suppress(OSError):
        print(printable(message), file=sys.stderr, flush=True)


def option(panel: str, help: str, *names: str, model: str = "", **settings: Any) -> Any:
    """Declare an option in a group of the help; `model` says what happens when it is left out."""
    default = f" [dim]\\[default: {model}][/dim]" if model else ""
    return typer.Option(*names, help=help + default, rich_help_panel=panel, **settings)


def _set_quiet(quiet: bool) -> bool:
    console.quiet = quiet
    return quiet


def check_out(path: Path | None) -> Path | None:
    """Refuse "-" as a place to write to: files are not written to stdout."""
    if path is not None and str(path) == "-":
        raise typer.BadParameter("is '-', but files are not written to stdout; give a path, ./- if it is named so")
    return path


WHAT, HOW, FILES, MACHINE = "What to draw", "How to draw it", "What to write", "What to draw with"

Seed = Annotated[
    int | None,
    option(HOW, "The same seed and settings give the same images.", "--seed", "-s", model="a new one, printed"),
]
Out = Annotated[Path, option(FILES, "Folder for the images.", "--out", "-o", file_okay=False, callback=check_out)]
FileFormat = Annotated[Literal["png", "webp", "jpg"], option(FILES, "File format.")]
Json = Annotated[bool, option(FILES, "Print one JSON object.", "--json")]
Quiet = Annotated[
    bool,
    option(FILES, "Print only results, warnings and errors.", "--quiet", "-q", callback=_set_quiet),
]
Weights = Annotated[
    str | None,
    option(
        MACHINE,
        "A model: a folder, a name (mini, coco), or hf://user/repo.",
        envvar="CLIPGEN_WEIGHTS",
        model="coco where it was fetched, else mini",
    ),
]
Device = Annotated[
    str | None,
    option(MACHINE, "cpu, cuda, cuda:1, mps ...", envvar="CLIPGEN_DEVICE", model="a GPU if there is one"),
]
Dtype = Annotated[
    str | None,
    option(
        MACHINE,
        "Precision: float32, bfloat16, float16 or int8.",
        envvar="CLIPGEN_DTYPE",
        model="what suits the device",
    ),
]


def checked_text(text: str) -> str:
    """Return a text from the command line unchanged.

    Raises:
        BadParameter: it holds bytes that are not UTF-8, which arrive as lone surrogates; or it is "-".
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise typer.BadParameter(f"the prompt {text!a} is not valid UTF-8; type it again") from None
    if text == "-":
        raise typer.BadParameter("'-' stands for stdin, which holds the prompts of `clipgen generate -` only")
    return text


def read_prompts(file: Path) -> list[str]:
    """Read the prompts of a text file, or of stdin for "-": one per line, "" for a line that shows nothing.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or holds no prompt.
    """
    if str(file) == "-" and sys.stdin.isatty():
        log("type one prompt per line; Ctrl-D ends")
    lines = ["" if is_blank(line) else line for line in read_lines(file)]
    if not any(lines):
        name = "stdin" if str(file) == "-" else f"'{file}'"
        raise DataError(f"{name} holds no prompt; write one per line")
    return lines


def make_folder(out: Path) -> None:
    """Create the folder of --out before the work begins, so that a mistake in its path costs no time.

    Raises:
        OutputError: it cannot be created or written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        reason = "a file of that name exists" if isinstance(error, FileExistsError) else error.strerror
        raise OutputError(f"--out '{out}' cannot be written to: {reason}; give another folder") from None


def find_weights(weights: str | None) -> Path:
    """Return the model folder that --weights means, fetching it if it is a published model that is not here yet."""
    from clipgen.cli.progress import downloads
    from clipgen.weights.resolve import resolve_weights

    with downloads() as report:
        return resolve_weights(weights, log, report)


def load(weights: str | None, device: str | None, dtype: str | None) -> ClipGen:
    """Load the model that --weights means and log how long that took."""
    from clipgen.pipeline import ClipGen

    folder = find_weights(weights)
    started = time.perf_counter()
    pipe = ClipGen.from_pretrained(folder, device=device, dtype=dtype)
    log(f"loaded {folder} on {pipe.device} in {time.perf_counter() - started:.1f} s")
    return pipe


def show_figure(
    file: Path, results: Sequence[GenerationOutput], title: str, about: dict[str, Any], as_json: bool
) -> None:
    """Print where the one file that shows several images is, and what it shows: `title` for people, `about` as JSON."""
    seed, scores = results[0].seed, [round(result.scores[0], 4) for result in results]
    if as_json:
        print(json.dumps({**about, "seed": seed, "file": str(file), "clip_scores": scores}))
    else:
        print(f"{title}: seed {seed}, {results[0].seconds['total']:.1f} s\n  {file}")
