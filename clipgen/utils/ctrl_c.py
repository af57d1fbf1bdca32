"""Handling of Ctrl-C outside `entry_point`. Imports almost nothing, so that it can run first."""

import signal
import threading


def end_at_ctrl_c() -> None:
    """Let Ctrl-C end the process at once, without a traceback, until `entry_point` takes over.

    Covers the seconds in which a program imports its packages. An ignored SIGINT (`nohup`) stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def heed_ctrl_c() -> None:
    """Let Ctrl-C end the process at once, even if SIGINT was ignored. Has an effect only in the main thread."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
