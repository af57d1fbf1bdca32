"""`python -m clipgen ...`: the command line of `clipgen.cli.main`."""

from clipgen.cli.main import app

if __name__ == "__main__":
    app()
