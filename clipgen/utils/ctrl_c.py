"""Ctrl-C before a program has begun. It imports next to nothing, so that it can act at once."""

import signal


def end_at_ctrl_c() -> None:
    """Until `entry_point` takes over, let Ctrl-C end the process at once and without a traceback.

    For the seconds in which a program imports its packages. An ignored SIGINT (`nohup`) stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
