"""`clipgen` and `python -m clipgen`: the command line of `clipgen.cli.main`."""

import sys
from pathlib import Path

from clipgen.utils.ctrl_c import end_at_ctrl_c


def main() -> None:
    """Run the command line. Its modules are imported here, where Ctrl-C ends the program without a traceback."""
    end_at_ctrl_c()
    ignore_working_folder()
    from clipgen.cli.main import app

    app()


def ignore_working_folder() -> None:
    """Take the working folder off the import path, unless clipgen itself is imported from it.

    `python -m` puts it there first, so a clip.py or torch.py of the user would be imported, and executed, instead of
    the package.
    """
    code = Path(__file__).resolve().parents[1]
    if sys.path and Path(sys.path[0]).resolve() == Path.cwd().resolve() != code:
        del sys.path[0]


if __name__ == "__main__":
    main()
