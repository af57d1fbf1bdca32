"""`python -m clipgen ...`: the command line of `clipgen.cli`."""

from clipgen.cli import app

if __name__ == "__main__":
    app()
