"""What Ctrl-C does outside `entry_point`. It imports next to nothing, so that it can act at once."""

import signal
import threading


def end_at_ctrl_c() -> None:
    """Until `entry_point` takes over, let Ctrl-C end the process at once and without a traceback.

    For the seconds in which a program imports its packages. An ignored SIGINT (`nohup`) stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def heed_ctrl_c() -> None:
    """Let Ctrl-C end the process at once, whether it was ignored or Python's to handle. For the main thread."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
