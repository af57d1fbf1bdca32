"""The command line: `clipgen "a lemon"`, `clipgen weights fetch coco`.

A mistake of the user ends with exit code 2 and one line that says what to change; Ctrl-C with 130.
"""

from __future__ import annotations

import difflib
import io
import re
import shlex
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from clipgen import __version__
from clipgen.cli import app as app_command
from clipgen.cli import doctor, evaluate, generate, morph, replay, sheet, weights
from clipgen.errors import ClipGenError
from clipgen.utils.entry_point import entry_point

ROOT_OPTIONS = ("-h", "--help", "--version", "--install-completion", "--show-completion")
HELP = {"help_option_names": ["-h", "--help"]}


class Commands(TyperGroup):
    """The group of all commands. It reports every error in one line and accepts the short form of `generate`."""

    @entry_point(prefix="clipgen", stopped="stopped; the files named so far are complete")
    def main(self, args: Sequence[str] | None = None, *_: Any, **settings: Any) -> Any:
        """Run a command; without arguments show the help."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # no prompt may end the run because a terminal cannot show it
                stream.reconfigure(errors="backslashreplace")
        warnings.filterwarnings("ignore", "Image size")  # Pillow's, of images that are refused in one line
        args = expand(sys.argv[1:] if args is None else args, self.commands)
        try:
            code = super().main(args or ["--help"], **settings | {"standalone_mode": False, "prog_name": "clipgen"})
        except typer.TyperException as error:
            raise ClipGenError(error.format_message() + _given(error.__cause__)) from None
        if code == 130:
            raise KeyboardInterrupt
        sys.exit(code)


def expand(args: Sequence[str], commands: Iterable[str]) -> list[str]:
    """Put `generate` before arguments that begin with a prompt or with one of its options.

    A single word that is not a command is treated as a mistyped one, so that a typo does not draw an image.

    Raises:
        ClipGenError: the first argument is such a word.
    """
    if not args or args[0] in (*commands, *ROOT_OPTIONS):
        return list(args)
    first = args[0]
    if first.startswith("-") or not re.fullmatch(r"\S+", first):
        return ["generate", *args]
    names = {name: name for name in commands} | {name: f"weights {name}" for name in weights.NAMES}
    near = difflib.get_close_matches(first.lower(), names, n=1)
    if near:
        raise ClipGenError(f"{first!r} is not a command; did you mean `clipgen {names[near[0]]}`? (all: clipgen -h)")
    raise ClipGenError(f"{first!r} is not a command (see clipgen -h); to draw it: clipgen generate {shlex.join(args)}")


def _given(cause: BaseException | None) -> str:
    """The value that the user gave. Typer's messages about numbers leave it out; pydantic's error underneath has it."""
    details: list[Any] = getattr(cause, "errors", list)()
    return f": {details[0]['input']!r}" if details else ""


app = typer.Typer(cls=Commands, rich_markup_mode="rich", pretty_exceptions_enable=False, context_settings=HELP)
app.command(epilog=generate.EXAMPLE)(generate.generate)
app.command(epilog=replay.EXAMPLE)(replay.replay)
app.command(epilog=sheet.EXAMPLE)(sheet.sheet)
app.command(epilog=morph.EXAMPLE)(morph.morph)
app.command(epilog=doctor.EXAMPLE)(doctor.doctor)
app.command(epilog=evaluate.EXAMPLE)(evaluate.evaluate)
app.command("app", epilog=app_command.EXAMPLE)(app_command.app)
app.add_typer(weights.app, name="weights")


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
    """Generate images from a prompt or an image: CLIP encodes it, a GPT generates tokens, a VQGAN decodes them.

    `clipgen "a lemon"` is short for `clipgen generate "a lemon"`, also with options before or after the prompt.
    """
