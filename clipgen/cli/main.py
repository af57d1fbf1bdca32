"""The command line: `python -m clipgen generate "a lemon"`.

A mistake of the user ends with exit code 2 and one line that says what to change; Ctrl-C with 130.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from clipgen import __version__
from clipgen.cli import app as app_command
from clipgen.cli import doctor, evaluate, generate, morph, replay, sheet, weights
from clipgen.cli.common import fail
from clipgen.errors import ClipGenError


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
        except ClipGenError as error:
            fail(str(error))
        if code == 130:
            fail("stopped; the files named so far are complete", 130)
        sys.exit(code)


def _given(cause: BaseException | None) -> str:
    """What the user wrote, which Typer's messages about numbers leave out; pydantic's error underneath knows it."""
    details: list[Any] = getattr(cause, "errors", list)()
    return f": {details[0]['input']!r}" if details else ""


app = typer.Typer(cls=Commands, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
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
    """Turn a prompt or an image into new images: CLIP understands, a GPT composes, a VQGAN paints."""
