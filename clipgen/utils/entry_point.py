"""The boundary around every program of the project: what a user can act on becomes one line and an exit code.

Exit codes: 2 for a mistake or a circumstance that the user can change, 130 for Ctrl-C, 141 when the reader of the
output has gone (as in `| head`). Anything else is a fault of the program and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any, TextIO, TypeVar, cast

from clipgen.errors import ClipGenError
from clipgen.utils.paths import place_library_caches
from clipgen.utils.text import printable

F = TypeVar("F", bound=Callable[..., Any])


def entry_point(prefix: str = "error", stopped: str = "stopped") -> Callable[[F], F]:
    """Decorate a program's main function: it ends with one line on stderr and an exit code, not with a traceback.

    Args:
        prefix: what an error's line begins with.
        stopped: what Ctrl-C prints.
    """

    def decorate(main: F) -> F:
        @wraps(main)
        def run(*args: Any, **kwargs: Any) -> Any:
            open_closed_streams()
            place_library_caches()
            return _run(lambda: main(*args, **kwargs), prefix, stopped)

        return cast(F, run)

    return decorate


def open_closed_streams() -> None:
    """Replace standard streams that were closed (`>&-`) by the null device.

    Python has None for them, and the next file that is opened would get their number, so that a library's messages
    would end up in an image.
    """
    names = ("stdin", "stdout", "stderr")
    if all(getattr(sys, name) is not None for name in names):
        return
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for number, name in enumerate(names):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if name == "stdin" else "w"))  # noqa: SIM115 lives as long as the process


def _run(main: Callable[[], Any], prefix: str, stopped: str) -> Any:
    interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    in_charge = in_main_thread and before in (signal.default_int_handler, signal.SIG_DFL)
    if in_charge:
        signal.signal(signal.SIGINT, interrupt)
    stdout = sys.stdout  # Typer replaces it when a pipe breaks
    try:
        try:
            result = main()
        except SystemExit:
            stdout.flush()
            raise
        stdout.flush()  # a full disk shows itself here at the latest
        return result
    except KeyboardInterrupt:
        interrupted = True
    except BrokenPipeError:
        _abandon(stdout)
        raise SystemExit(141) from None
    except ClipGenError as error:
        raise _exit(f"{prefix}: {error}", 2) from None
    except OSError as error:
        try:
            stdout.flush()
        except OSError:
            _abandon(stdout)
        raise _exit(f"{prefix}: {_describe(error)}", 2) from None
    except Exception:
        if not interrupted:  # some extension modules turn an interrupt of their import into an error of another kind
            raise
    finally:
        if in_charge:
            signal.signal(signal.SIGINT, before)
    if in_charge:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends what is left to do
    raise _exit(stopped, 130)


def _exit(message: str, code: int) -> SystemExit:
    with suppress(OSError):  # perhaps nobody is there to read it
        print(printable(message), file=sys.stderr, flush=True)
    return SystemExit(code)


def _describe(error: OSError) -> str:
    """Name the file, if there is one, and what is wrong with it."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = f"cannot write: {reason}; make room or write elsewhere"
    return reason if error.filename is None else f"{os.fsdecode(error.filename)}: {reason}"


def _abandon(stdout: TextIO) -> None:
    """Send what is left in stdout's buffer to the null device, so that Python's own flush at exit cannot fail."""
    try:
        number = stdout.fileno()
    except (OSError, ValueError):
        return  # not a file, as in tests
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)
