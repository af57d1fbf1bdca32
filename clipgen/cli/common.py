"""What the commands share: how they talk, the options that mean the same everywhere, names of files.

Results go to stdout, everything else to stderr. PyTorch is imported only when there is something to draw, so `--help`
answers at once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from clipgen.pipeline import ClipGen

console = Console(stderr=True, highlight=False)


class Format(StrEnum):
    """File formats."""

    png = "png"
    webp = "webp"
    jpg = "jpg"


def fail(message: str, code: int = 2) -> NoReturn:
    """Print one line on stderr and exit."""
    print(f"clipgen: {printable(message)}", file=sys.stderr)
    sys.exit(code)


def log(message: str) -> None:
    """Tell the user something that is not a result: on stderr, above the progress bar if there is one."""
    console.print(printable(message), markup=False, soft_wrap=True)


def printable(text: str) -> str:
    """One line without control characters: text that came from outside must not drive the terminal."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


def option(panel: str, help: str, *names: str, model: str = "", **settings: Any) -> Any:
    """An option in a group of the help; `model` says what happens when it is left out."""
    default = f" [dim]\\[default: {model}][/dim]" if model else ""
    return typer.Option(*names, help=help + default, rich_help_panel=panel, **settings)


WHAT, HOW, FILES, MACHINE = "What to draw", "How to draw it", "What to write", "What to draw with"

Seed = Annotated[
    int | None, option(HOW, "The same seed and settings give the same images.", model="a new one, printed")
]
Out = Annotated[Path, option(FILES, "Folder for the images.", file_okay=False)]
FileFormat = Annotated[Format, option(FILES, "File format.")]
Json = Annotated[bool, option(FILES, "Print one JSON object.", "--json")]
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
    """Text from the command line, where bytes that are not UTF-8 arrive as lone surrogates.

    Raises:
        BadParameter: it holds such.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise typer.BadParameter(f"the prompt {text!a} is not valid UTF-8; type it again") from None
    return text


def read_lines(file: Path, flag: str) -> list[str]:
    """The prompts of a text file, or of stdin for "-": its lines that are not empty.

    Raises:
        BadParameter: it cannot be read, is no UTF-8, or holds none; `flag` is what it was given as.
    """
    try:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        lines = [line.strip() for line in data.decode("utf-8-sig").splitlines()]
    except OSError as error:
        raise typer.BadParameter(f"{flag} '{file}' cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise typer.BadParameter(f"{flag} '{file}' is not UTF-8 text; save it as UTF-8") from None
    texts = [line for line in lines if line]
    if not texts:
        raise typer.BadParameter(f"{flag} '{file}' holds no prompt; write one a line")
    return texts


def find_weights(weights: str | None) -> Path:
    """Return the model folder that --weights means, fetching it if it is a published model that is not here yet."""
    from clipgen.weights.resolve import resolve_weights

    return resolve_weights(weights, log)


def load(weights: str | None, device: str | None, dtype: str | None) -> tuple[ClipGen, str]:
    """Load the model that --weights means; log the time. Returns it with its digest (`weights_digest`)."""
    from clipgen.outputs.metadata import weights_digest
    from clipgen.pipeline import ClipGen

    folder = find_weights(weights)
    started = time.perf_counter()
    pipe = ClipGen.from_pretrained(folder, device=device, dtype=dtype)
    log(f"loaded {folder} on {pipe.device} in {time.perf_counter() - started:.1f} s")
    return pipe, weights_digest(folder)


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None] | None]:
    """Yields a progress callback that moves a bar on a terminal; anywhere else a line at the end says it is done."""
    started = time.perf_counter()
    if not console.is_terminal:
        yield None
        log(f"drew {label} in {time.perf_counter() - started:.1f} s")
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
