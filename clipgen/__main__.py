"""`clipgen` and `python -m clipgen`: the command line of `clipgen.cli.main`."""

from clipgen.utils.entry_point import end_at_ctrl_c


def main() -> None:
    """Run the command line. Its modules are imported here, where Ctrl-C ends the program without a traceback."""
    end_at_ctrl_c()
    from clipgen.cli.main import app

    app()


if __name__ == "__main__":
    main()
