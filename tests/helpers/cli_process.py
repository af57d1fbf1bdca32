"""The command line as a script of `training_kit.start`."""

from clipgen.cli.main import app as main

__all__ = ["main"]
